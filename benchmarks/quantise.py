"""{whole, pruned} x {bf16, int8, nf4} of the demo model: size, loss, facts and tokens a second.

    python -m benchmarks.quantise

Drops 3 of 12 layers by the angular criterion, on the model as it is and on the quantised one, to see whether the order
changes the choice. The tensors it does not change: tests/test_quantize.py.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from lmprune.benching import BenchSettings
from lmprune.benching.measuring import Subject, measure
from lmprune.choosing import choose, write_recipe
from lmprune.cuts.plan import Plan
from lmprune.forward.loss import losses
from lmprune.models.cut import Cut, open_cut
from lmprune.models.dtypes import Quantization
from lmprune.profiling.settings import ProfileSettings
from lmprune.text import world
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import tokenize

TYPES: tuple[Quantization | None, ...] = (None, "int8", "nf4")
QUESTIONS = 60


def scores(cut: Cut, kind: Quantization | None) -> tuple[float, float]:
    """Loss in nats a token on held-out text; share of held-out facts that are said rightly."""
    import torch

    model, words = cut.load(quantization=kind, device="cpu"), cut.tokenizer()
    text = tokenize(DataSettings(data="demo"), words, samples=128, max_length=128, seed=77)
    loss = float(losses(model, [Plan(cut.layers)], text).mean()[0])

    def right(prompt: str, answer: str) -> bool:
        ids = torch.tensor([words(prompt)["input_ids"]])
        wanted = words(answer)["input_ids"]
        with torch.inference_mode():
            said = model.generate(ids, max_new_tokens=len(wanted), do_sample=False, pad_token_id=1)
        return bool(said[0, ids.shape[1] :].tolist() == wanted)

    facts = [right(world.question_prompt(q.text), f" {q.answer}") for _, q in zip(range(QUESTIONS), world.questions(7))]
    return loss, sum(facts) / QUESTIONS


def main() -> None:
    """The whole benchmark."""
    whole = open_cut("demo")
    by = ProfileSettings(samples=128, max_length=128, device="cpu")
    chosen = {kind: choose("demo", drop=3, settings=replace(by, quantization=kind)) for kind in TYPES}
    for kind, made in chosen.items():
        print(f"chosen on {kind or 'bf16'}: {made.plan.describe()}")
    with tempfile.TemporaryDirectory() as scratch:
        write_recipe(whole, chosen[None], Path(scratch) / "pruned.yml")
        cuts = {"whole": whole, "pruned": open_cut(Path(scratch) / "pruned.yml")}
        subjects = [Subject(f"{n} {kind or 'bf16'}", cut, kind) for n, cut in cuts.items() for kind in TYPES]
        speed = measure(subjects, BenchSettings(prompts="64", batch_sizes="1", tokens=16, device="cpu"))
        print("| model | MB | loss | facts | decode tokens/s | times as fast |\n|---|---|---|---|---|---|")
        for subject, row in zip(subjects, speed.rows):
            loss, facts = scores(subject.model, subject.quantization)
            print(
                f"| {subject.name} | {row.weight_bytes / 1e6:.2f} | {loss:.4f} | {facts:.0%} | "
                f"{row.decode_tokens_per_second:,.0f} | {row.decode_ratio.median:.2f} |"
            )


if __name__ == "__main__":
    main()
