"""Text written by the unpruned model itself, to prompts from calibration text; kept in a cache.

What several papers find best for instruction-tuned models: the student learns the teacher's own distribution
(self-data distillation, arXiv 2410.09982; On the Limits of Layer Pruning for Generative Reasoning, arXiv 2602.01997).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import GenerationConfig

from lmprune.cache import cache_root
from lmprune.errors import DataError
from lmprune.forward.calls import generating
from lmprune.models.checkpoint import Checkpoint
from lmprune.models.loading import load_model, load_tokenizer
from lmprune.text.blocks import HeldOut
from lmprune.text.sources import DataSettings, Document, read_documents
from lmprune.text.talks import talk_ids
from lmprune.text.tokens import token_ids

PROMPT = 16
"""Tokens of a plain document that the model goes on from. Of a conversation, all up to the first answer."""
MOST_BLOCKS = 1024
"""Blocks that are written at most, since writing is far slower than training; longer runs read them again."""
_BATCH = 32


@dataclass(frozen=True)
class Prompt:
    """What the model goes on from: its tokens, and for a conversation its messages."""

    ids: list[int]
    messages: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Writer:
    """Writes the text. ``blocks`` of ``length`` tokens are wanted; no prompt is a held-out document's."""

    base: Path
    data: DataSettings
    held_out: HeldOut
    blocks: int
    length: int
    seed: int
    default: str
    device: str
    dtype: str

    def write(self) -> DataSettings:
        """The text as a data source. An interrupted call goes on where it stopped.

        Raises:
            DataError: no document can be a prompt.
        """
        folder = cache_root() / "self-data"
        path = folder / f"{self._key()}.jsonl"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            half = path.with_suffix(".half")
            with FileLock(path.with_suffix(".lock")):  # another run may want the same text
                if not path.is_file():
                    self._fill(half)
                    half.replace(path)
        return DataSettings(data=str(path), chat_template=self.data.chat_template, bos=self.data.bos)

    def _key(self) -> str:
        """Of all that the text depends on."""
        asked = {
            "base": Checkpoint.open(self.base).fingerprint,
            "data": asdict(self.data),
            "default": self.default,
            "held_out": self.held_out.digest,
            "tokens": self._wanted,
            "length": self.length,
            "seed": self.seed,
            "dtype": self.dtype,
            "template": load_tokenizer(self.base).chat_template if self.data.chat_template else None,
        }
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]

    @property
    def _wanted(self) -> int:
        return min(self.blocks, MOST_BLOCKS) * self.length

    def _fill(self, half: Path) -> None:
        """Append batch after batch to ``half`` until it holds the wanted tokens; whole batches in it are kept."""
        tokenizer = load_tokenizer(self.base)
        lines = half.read_text(encoding="utf-8").split("\n")[:-1] if half.is_file() else []
        before = len(lines) // _BATCH
        lines = lines[: before * _BATCH]
        half.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        done = sum(self._size(json.loads(line)["text"], tokenizer) for line in lines)
        prompts = islice(self._prompts(tokenizer), before * _BATCH, None)
        model: Any = None
        with half.open("a", encoding="utf-8") as file, tqdm(total=self._wanted, initial=done, unit="tokens") as bar:
            bar.set_description("self-data")
            for batch in range(before, 1 << 32):
                if done >= self._wanted:
                    return
                asked = list(islice(prompts, _BATCH))
                if not asked:
                    break
                model = model or self._model()
                # Its own seed for each batch, so that a resumed run writes what an uninterrupted one does.
                torch.manual_seed(self.seed * 1_000_003 + batch)
                for document in self._answers(model, tokenizer, asked):
                    size = self._size(document, tokenizer)
                    done += size
                    bar.update(size)
                    file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
                file.flush()
        if not done:
            raise DataError(
                f"--self-data: no document holds {PROMPT} tokens to go on from, and none fits half a block. "
                "Give other text, or a greater --max-length"
            )

    def _model(self) -> Any:
        """The base, without what its makers chose for generation: penalties and truncation would bend its words."""
        model: Any = load_model(self.base, dtype=self.dtype, device=self.device)
        theirs = model.generation_config
        model.generation_config = GenerationConfig(
            bos_token_id=theirs.bos_token_id, eos_token_id=theirs.eos_token_id, pad_token_id=theirs.pad_token_id
        )
        return model

    def _prompts(self, tokenizer: Any) -> Iterator[Prompt]:
        documents = read_documents(self.data, seed=self.seed, default=self.default)
        for document in self.held_out.without(documents):
            prompt = self._prompt(document, tokenizer)
            if prompt is not None:
                yield prompt

    def _prompt(self, document: Document, tokenizer: Any) -> Prompt | None:
        """None where the document is too short to go on from, or leaves no room for an answer."""
        if not self.data.chat_template:
            if not isinstance(document, str):
                raise DataError("the data hold conversations, not texts. Add --chat-template")
            ids = token_ids(document, tokenizer)[:PROMPT]
            return Prompt(ids) if len(ids) == PROMPT else None
        talk = [{"role": "user", "content": document}] if isinstance(document, str) else document
        first = next((i for i, message in enumerate(talk) if message["role"] == "assistant"), len(talk))
        messages = talk[:first]
        if not messages:
            return None
        ids = talk_ids(messages, tokenizer, ask=True)
        return Prompt(ids, messages) if len(ids) <= self.length // 2 else None

    @torch.no_grad()
    def _answers(self, model: Any, tokenizer: Any, asked: list[Prompt]) -> Iterator[Document]:
        """One document for each prompt, sampled at temperature 1 without truncation."""
        longest = max(len(prompt.ids) for prompt in asked)
        end = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        ids = torch.tensor([[pad or 0] * (longest - len(prompt.ids)) + prompt.ids for prompt in asked])
        mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in asked])
        how: dict[str, Any] = {"max_new_tokens": max(1, self.length - longest), "pad_token_id": pad}
        how |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        with generating(model, eos_token_id=model.generation_config.eos_token_id, **how):
            out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
        for prompt, row in zip(asked, out.tolist()):
            text = tokenizer.decode(row[longest:], skip_special_tokens=True)
            if prompt.messages is None:
                yield tokenizer.decode(prompt.ids + row[longest:], skip_special_tokens=True)
            else:
                yield [*prompt.messages, {"role": "assistant", "content": text}]

    def _size(self, document: Document, tokenizer: Any) -> int:
        """Tokens that a document takes in a block."""
        if isinstance(document, str) and not self.data.chat_template:
            return len(token_ids(document, tokenizer)) + 1
        return len(talk_ids(document, tokenizer)) + 1
