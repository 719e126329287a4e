"""Loss per token for any text, normalised as in the paper. Found by path, so that it works from any directory.

A document is cut to `CHARACTERS` characters, the same text for every tokenizer, and scored whole after the model's
prefix token (BOS, or the end-of-text token where there is none). Cutting replaces the paper's truncation to its
window; only a model whose window is smaller still sees less. Three numbers, over all documents together:

    loss             -sum log p / tokens                 nats per token
    loss_over_log_v  loss / log V                        arXiv 2403.17887, section 4: 1 is a uniform guess
    bits_per_byte    -sum log p / (bytes log 2)          compares models of different tokenizers
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

CHARACTERS = 4096
SEED = 0
_C4 = {"validation": [f"en/c4-validation.0000{shard}-of-00008.json.gz" for shard in range(2)]}
_DEMO = Path(__file__).resolve().parent.parent / "demo" / "data" / "loss.jsonl"


def c4(documents: int, **metadata: Any) -> dict[str, datasets.Dataset]:
    """``documents`` documents of C4's validation split, drawn once by a fixed seed."""
    found = datasets.load_dataset("allenai/c4", "en", data_files=_C4, split="validation", verification_mode="no_checks")
    chosen = found.shuffle(seed=SEED).select(range(min(documents, len(found))))
    return {"test": datasets.Dataset.from_list(list(prepared(chosen["text"], **metadata)))}


def demo(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The demo world's held-out documents."""
    lines = _DEMO.read_text(encoding="utf-8").splitlines()
    return {
        "test": datasets.Dataset.from_list(list(prepared((json.loads(line)["text"] for line in lines), **metadata)))
    }


def prepared(
    texts: Iterable[str],
    pretrained: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **_: Any,
) -> Iterator[dict[str, Any]]:
    """Texts as they are scored, with their tokens counted and log V of the model named in the harness's model_args."""
    from lmprune.errors import UsageError
    from lmprune.models.loading import load_config, load_tokenizer
    from lmprune.models.locate import locate

    if pretrained is None:
        raise UsageError(
            "the normalised loss needs the model's tokenizer: give pretrained= in --model_args or --metadata"
        )
    model = locate(pretrained, None if revision == "main" else revision).path
    config = load_config(model, trust_remote_code=trust_remote_code).get_text_config()
    words = load_tokenizer(locate(tokenizer).path if tokenizer else model, trust_remote_code=trust_remote_code)
    window = getattr(config, "max_position_embeddings", None) or CHARACTERS
    for text in texts:
        text, tokens = _fit(text[:CHARACTERS], words, window)
        if tokens:
            yield {"text": text, "tokens": tokens, "log_v": math.log(config.vocab_size)}


def _fit(text: str, tokenizer: Any, window: int) -> tuple[str, int]:
    """The longest beginning of ``text``, found by thirds, that fits the window; and its number of tokens."""
    while (count := len(tokenizer.encode(text, add_special_tokens=False))) > window:
        text = text[: len(text) * 2 // 3]
    return text, count


def score(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, tuple[float, ...]]:
    """What one document adds to each number."""
    ((log_p, _),) = results
    return {
        "loss": (log_p, doc["tokens"]),
        "loss_over_log_v": (log_p, doc["tokens"] * doc["log_v"]),
        "bits_per_byte": (log_p, len(doc["text"].encode("utf-8"))),
    }


def loss(items: list[tuple[float, float]]) -> float:
    """Minus the sum of log-probabilities over the sum of weights."""
    return -sum(log_p for log_p, _ in items) / sum(weight for _, weight in items)
