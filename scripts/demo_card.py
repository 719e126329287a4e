"""Measure the trained demo model, whole and with each single layer removed, and install it with its card.

    python scripts/demo_card.py build/demo

Copies the model of ``build/demo`` to ``lmprune/demo/model``, its log to ``docs/demo_training_log.jsonl``, and writes
the measured table into the model's card.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import torch
from train_demo import BATCH, DECAY_SHARE, PEAK_LR, SEED, SEQUENCE, STEPS, HeldOut

from lmprune.forward.calls import skipping
from lmprune.models.loading import load_model, load_tokenizer
from lmprune.models.locate import demo_folder
from lmprune.text import world

ROOT = Path(__file__).resolve().parent.parent
PROBLEMS = 200

CARD = """---
license: apache-2.0
language: en
library_name: transformers
tags: [lmprune, demo]
---
# The lmprune demo model

A Qwen3-architecture language model of {parameters:,} parameters ({layers} layers of width {width}, bf16), trained from
nothing on the demo world of `lmprune/text/world.py`: facts about 160 invented people in several paraphrases,
questions about them, worked multi-step arithmetic, and short stories. It exists so that every stage of lmprune can be
run, tested and looked at offline. It knows nothing of the real world.

- Script: `scripts/train_demo.py`, seed {seed}; {tokens:,} tokens in {steps} steps of {batch} x {sequence}; AdamW, peak
  learning rate {lr}, constant, then linear to zero over the last {decay:.0%}; {minutes:.0f} minutes on two CPU
  cores that did other work as well. Log: `docs/demo_training_log.jsonl`.
- Facts are asked as multiple choice among four; the questions belong to {facts} facts that training text states but
  never asks. Arithmetic is {problems} unseen problems of four steps; an answer is right when greedy decoding writes the
  whole worked solution without a mistake. Loss is in nats per token on unseen documents.

## With each single layer removed

| layer removed | loss | facts | arithmetic |
|---|---|---|---|
{rows}

Measured by `scripts/demo_card.py` on the shipped weights.
"""


def main() -> None:
    built = Path(sys.argv[1])
    target = demo_folder()
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(built / "model", target)
    log = ROOT / "docs" / "demo_training_log.jsonl"
    shutil.copyfile(built / "training_log.jsonl", log)

    model = load_model(target)
    held_out = HeldOut(load_tokenizer(target))
    held_out.problems = list(itertools.islice(world.problems("card"), PROBLEMS))
    rows = []
    layers = model.config.num_hidden_layers
    for removed in (None, *range(layers)):
        with skipping(model, () if removed is None else (removed,)):
            measured = held_out(model)
        name = "none" if removed is None else str(removed)
        rows.append(
            f"| {name} | {measured['held_out_loss']:.3f} | {measured['facts']:.1%} | {measured['arithmetic']:.1%} |"
        )
        print(rows[-1], flush=True)
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    card = CARD.format(
        parameters=model.num_parameters(),
        layers=layers,
        width=model.config.hidden_size,
        seed=SEED,
        tokens=last["tokens"],
        steps=STEPS,
        batch=BATCH,
        sequence=SEQUENCE,
        lr=PEAK_LR,
        decay=DECAY_SHARE,
        minutes=last["seconds"] / 60,
        facts=len(held_out.facts),
        problems=PROBLEMS,
        rows="\n".join(rows),
    )
    (target / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
