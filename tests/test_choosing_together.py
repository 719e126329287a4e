"""Several processes share the samples of a search and choose the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lmprune.cuts.plan import Plan
from lmprune.forward.loss import LossTable
from lmprune.forward.objectives import kl
from lmprune.models.loading import load_model
from lmprune.text.tokens import Tokens

pytestmark = pytest.mark.usefixtures("one_thread")


class Two:
    """A process of two whose fellow has measured what is expected of it before."""

    rank, size, main = 0, 2, True

    def __init__(self, others: Callable[[], list[Any]]) -> None:
        self._others = others

    def gather(self, mine: Any) -> list[Any]:
        return [mine, self._others()]


def test_each_process_measures_its_batches_and_knows_all(tiny: Callable[..., Path]) -> None:
    model, rng = load_model(tiny("llama"), dtype="float32"), np.random.default_rng(0)
    tokens = Tokens(tuple(rng.integers(4, 60, length).astype(np.int32) for length in (5, 12, 7, 9, 7, 12)))
    plans = [Plan(8), Plan(8, (3,))]
    alone = LossTable(model, tokens, kl.score(tokens), batch_size=2, progress=False)
    whole = alone.losses(plans)
    values = {tuple(batch): whole.values[:, batch] * whole.tokens[batch] for batch in alone._batches}
    asked = iter(alone._batches[1::2])

    def other() -> list[Any]:
        batch = next(asked, None)
        return [] if batch is None else [(values[tuple(batch)], 1.0)]

    shared = LossTable(model, tokens, kl.score(tokens), batch_size=2, progress=False, processes=Two(other))  # type: ignore[arg-type]
    assert np.array_equal(shared.losses(plans).values, whole.values)
    assert next(asked, None) is None and shared.passes < alone.passes


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--stream", "--objective", "loss")])
def test_two_processes_choose_as_one(tiny: Callable[..., Path], tmp_path: Path, more: tuple[str, ...]) -> None:
    words = ["recipe", str(tiny("qwen3")), "--criterion", "best", "--drop", "2", "--data", "demo", "--samples", "24"]
    words += ["--max-length", "32", "--json", "--device", "cpu", *more]
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")

    def recipe(name: str, *launcher: str) -> tuple[Any, Any]:
        command = [*(launcher or (sys.executable,)), "-m", "lmprune", *words, "-o", name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return json.loads(done.stdout), yaml.safe_load((tmp_path / name).read_text())

    (one, written), (two, also) = recipe("one.yml"), recipe("two.yml", *launch)
    assert {**one, "out": ""} == {**two, "out": ""}
    assert {**written, "base_model": ""} == {**also, "base_model": ""}  # its folder is named after the recipe
    assert not [file.name for file in tmp_path.iterdir() if "partial" in file.name]
