"""Train the embedded demo model from nothing: tokenizer, weights, training log.

    python scripts/train_demo.py --out build/demo            # about 80 minutes on two cores
    python scripts/train_demo.py --out build/demo --resume   # goes on from the last checkpoint

The text comes from `lmprune.text.world`; chunk ``i`` of the training tokens is a pure function of ``(seed, i)``,
so a resumed run reads the same text as an uninterrupted one. Writes a Hugging Face folder (bf16 safetensors,
tokenizer) and ``training_log.jsonl``. `scripts/demo_card.py` measures the result and writes its card.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lmprune.text import world

SEED = 0
VOCABULARY = 1280
SEQUENCE = 256
BATCH = 16
STEPS = 4600
PEAK_LR = 3e-3
WARMUP = 100
DECAY_SHARE = 0.4
CHUNK_STEPS = 50
LOG_EVERY = 25
EVALUATE_EVERY = 250
END = "<|endoftext|>"
PAD = "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ message['content'] }}\nAnswer:"
    "{% else %} {{ message['content'] }}\n{% endif %}{% endfor %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's own text: any input can be encoded, the world's words are one token each."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(itertools.islice(world.documents("tokenizer"), 60_000), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """12 layers of width 128, tied embeddings, 2.2 M parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    return Qwen3ForCausalLM(config)


def chunk(tokenizer: PreTrainedTokenizerFast, index: int) -> torch.Tensor:
    """Training tokens of chunk ``index``: (CHUNK_STEPS, BATCH, SEQUENCE), documents packed end to end."""
    wanted = CHUNK_STEPS * BATCH * SEQUENCE
    stream = world.documents(f"train-{SEED}-{index}")
    ids: list[int] = []
    end = tokenizer.eos_token_id
    while len(ids) < wanted:
        texts = list(itertools.islice(stream, 500))
        for row in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            ids.append(end)
            ids.extend(row)
    return torch.tensor(ids[:wanted]).view(CHUNK_STEPS, BATCH, SEQUENCE)


class HeldOut:
    """What the log reports: loss on unseen text, facts never asked in training, unseen four-step problems."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.eos_token_id
        ids: list[int] = []
        for text in itertools.islice(world.documents("held-out"), 400):
            ids += [self.end, *tokenizer.encode(text)]
        self.text = torch.tensor(ids[: len(ids) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)
        self.facts = list(world.questions("log"))
        self.problems = list(itertools.islice(world.problems("log"), 100))

    def _rows(self, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids, target mask), right-padded, for prompts and their continuations."""
        rows = [([self.end, *self.tokenizer.encode(a)], self.tokenizer.encode(b)) for a, b in pairs]
        width = max(len(a) + len(b) for a, b in rows)
        ids = torch.full((len(rows), width), self.end)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, (a, b) in enumerate(rows):
            ids[i, : len(a) + len(b)] = torch.tensor(a + b)
            mask[i, len(a) : len(a) + len(b)] = True
        return ids, mask

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        model.eval()
        losses = [float(model(input_ids=x, labels=x).loss) for x in self.text.split(16)]
        pairs = [(world.question_prompt(q.text), f" {v}") for q in self.facts for v in (q.answer, *q.wrong)]
        ids, mask = self._rows(pairs)
        scores = []
        for x, m in zip(ids.split(64), mask.split(64)):
            logp = model(input_ids=x).logits.float().log_softmax(-1)[:, :-1]
            picked = logp.gather(-1, x[:, 1:, None])[..., 0]
            scores.append((picked * m[:, 1:]).sum(-1))
        facts = (torch.cat(scores).view(-1, 4).argmax(-1) == 0).float().mean()
        ids, mask = self._rows([(world.problem_prompt(p), p.solution) for p in self.problems])
        right = []
        for x, m in zip(ids.split(50), mask.split(50)):
            guess = model(input_ids=x).logits[:, :-1].argmax(-1)
            right.append(((guess == x[:, 1:]) | ~m[:, 1:]).all(-1))
        model.train()
        return {
            "held_out_loss": round(float(np.mean(losses)), 4),
            "facts": round(float(facts), 4),
            # greedy decoding writes the reference solution if and only if every teacher-forced argmax agrees
            "arithmetic": round(float(torch.cat(right).float().mean()), 4),
        }


def learning_rate(step: int) -> float:
    """Warm-up, a constant plateau, then a linear decay to zero over the last part."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    start = int(STEPS * (1 - DECAY_SHARE))
    return PEAK_LR * min(1.0, (STEPS - step) / (STEPS - start))


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=STEPS, help="stop early, for a trial")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer()
    model = build_model(tokenizer)
    optimizer = make_optimizer(model)
    held_out = HeldOut(tokenizer)
    state_path, log_path = args.out / "state.pt", args.out / "training_log.jsonl"
    first, spent = 0, 0.0
    if args.resume:
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    compiled = torch.compile(model)
    began = time.monotonic() - spent
    with log_path.open("a" if args.resume else "w") as log:
        for step in range(first, args.steps):
            if step % CHUNK_STEPS == 0 or step == first:
                data = chunk(tokenizer, step // CHUNK_STEPS)
            lr = learning_rate(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x = data[step % CHUNK_STEPS]
            loss = compiled(input_ids=x, labels=x).loss
            if not math.isfinite(float(loss)):
                raise SystemExit(f"loss is {float(loss)} at step {step}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            row: dict[str, Any] = {}
            if done % LOG_EVERY == 0:
                row = {
                    "step": done,
                    "tokens": done * BATCH * SEQUENCE,
                    "loss": round(float(loss), 4),
                    "lr": round(lr, 6),
                    "seconds": round(time.monotonic() - began, 1),
                }
            if done % EVALUATE_EVERY == 0 or done == args.steps:
                row |= held_out(model)
                torch.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": done,
                        "seconds": time.monotonic() - began,
                    },
                    state_path,
                )
            if row:
                log.write(json.dumps(row) + "\n")
                log.flush()
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
