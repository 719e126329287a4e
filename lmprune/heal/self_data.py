"""Text written by the unpruned model itself, to prompts from calibration text; kept in a cache.

What several papers find best for instruction-tuned models: the student learns the teacher's own distribution
(self-data distillation, arXiv 2410.09982; On the Limits of Layer Pruning for Generative Reasoning, arXiv 2602.01997).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lmprune.calibration import DataSettings, read_texts
from lmprune.errors import DataError
from lmprune.files import write_text
from lmprune.models.checkpoint import Checkpoint
from lmprune.models.loading import load_model, load_tokenizer

PROMPT = 16
"""Tokens of each document that the model goes on from."""
_BATCH = 32


def self_data(
    base: Path, data: DataSettings, *, blocks: int, length: int, seed: int, default: str, device: str, dtype: str
) -> Path:
    """A .jsonl file of texts by the model in ``base``, enough for ``blocks`` blocks of ``length`` tokens.

    Raises:
        DataError: the prompts are too few.
    """
    asked = [Checkpoint.open(base).fingerprint, asdict(data), default, blocks, length, seed, PROMPT]
    name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
    path = _cache() / f"{name}.jsonl"
    if not path.is_file():
        texts = _written(base, data, blocks * length, length, seed, default, device, dtype)
        write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lmprune" / "self-data"


@torch.no_grad()
def _written(
    base: Path, data: DataSettings, wanted: int, length: int, seed: int, default: str, device: str, dtype: str
) -> Iterator[str]:
    """Texts until they hold ``wanted`` tokens, sampled at temperature 1 without truncation."""
    tokenizer = load_tokenizer(base)
    model: Any = load_model(base, dtype=dtype, device=device)
    torch.manual_seed(seed)
    rows = (tokenizer(text)["input_ids"] for text in read_texts(data, seed=seed, default=default))
    prompts = (row[:PROMPT] for row in rows if len(row) >= PROMPT)
    done = 0
    while done < wanted:
        batch = list(islice(prompts, _BATCH))
        if not batch:
            raise DataError(
                f"--self-data: the prompts ran out after {done:,} of {wanted:,} tokens. Give more text or fewer --steps"
            )
        ids = torch.tensor(batch, device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length - PROMPT if length > 2 * PROMPT else PROMPT,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        for row in out:
            text = tokenizer.decode(row, skip_special_tokens=True)
            done += len(tokenizer(text)["input_ids"]) + 1
            yield text
        print(f"self-data: {min(done, wanted):,} of {wanted:,} tokens", file=sys.stderr, flush=True)
