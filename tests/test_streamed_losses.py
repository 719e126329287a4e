"""One read of a model larger than memory serves all cuts of a step, with the losses of the pass in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import MEMORY, tiny_config, tiny_model

from lmprune.choosing import ModelEvidence, choose
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError, UsageError
from lmprune.forward.loss import LossTable
from lmprune.forward.objectives import kl
from lmprune.forward.streaming import StreamedModel
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model
from lmprune.profiling import ProfileSettings
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = DataSettings(data="demo")


def tokens() -> Tokens:
    rng = np.random.default_rng(0)
    return Tokens(tuple(rng.integers(4, 90, length).astype(np.int32) for length in (12, 9, 12, 7, 5, 12)))


def tables(folder: Path, score: Any = None) -> list[LossTable]:
    """Of the model in memory, and of the same read layer by layer."""
    streamed = StreamedModel(open_cut(folder), dtype="auto", device=torch.device("cpu"))
    models = (load_model(folder), streamed)
    return [LossTable(model, tokens(), score and score(tokens()), batch_size=2, progress=False) for model in models]


LAST_DIGIT = dict.fromkeys(("gpt_oss", "mixtral"), 2e-6)
"""With experts, whose products are of few rows, the last digit of a float32 may differ on some processors."""


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "gemma3_text",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("qwen3", "gpt2", "gpt_oss", "mixtral", "gemma2")),
    ],
)
def test_losses_are_those_of_the_model_in_memory(kind: str) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        tiny_model(tiny_config(kind)).save_pretrained(scratch)
        layers = open_cut(scratch).layers
        plans = [Plan(layers), *(Plan(layers, (layer,)) for layer in range(layers))]
        if kind in ("llama", "qwen3", "gpt2", "mixtral"):  # of others not all pairs leave a pattern that a config says
            plans += [Plan(layers, (0, layers - 1)), Plan(layers, (1, 2))]
        else:
            plans = [plan for plan in plans if not plan.dropped or plan.dropped == (layers - 1,)]
        kept, streamed = (table.losses(plans).values for table in tables(Path(scratch)))
        assert np.abs(kept - streamed).max() <= LAST_DIGIT.get(kind, 0) and len({*kept[:, 0]}) == len(plans)


def test_every_layer_is_read_once_for_all_cuts(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    honest = StreamedModel._read
    monkeypatch.setattr(StreamedModel, "_read", lambda self, layer: read.append(layer) or honest(self, layer))
    kept, streamed = tables(tiny("llama"), kl.score)
    plans = [Plan(8, (layer,)) for layer in range(8)]
    assert np.array_equal(kept.losses(plans).values, streamed.losses(plans).values)
    assert read == list(range(8)), "also where the whole model must be seen first"
    # the whole model's 8 layers, and of each cut those behind the one that is gone
    assert streamed.passes == pytest.approx(6 * (8 + sum(7 - layer for layer in range(8))) / 8)
    read.clear()
    monkeypatch.setattr("lmprune.forward.streaming.free_memory", lambda: 0)
    rounds = tables(tiny("llama"), kl.score)[1]
    assert np.array_equal(kept.losses(plans).values, rounds.losses(plans).values)
    assert len(read) == 8 * 3, "a batch at a time where there is no room for more"


def test_a_model_without_room_is_chosen_for_layer_by_layer(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(**how: Any) -> Any:
        settings = ProfileSettings(samples=8, max_length=24, **how)
        evidence = ModelEvidence(open_cut(tiny("llama")), settings, DATA, how=ChoiceSettings(exact=True))
        return [choose(evidence.cut, name, drop=2, evidence=evidence) for name in ("greedy", "segment")], evidence

    in_memory, _ = chosen()
    asked, evidence = chosen(stream=True)
    assert asked == in_memory and not evidence._lab.loaded
    monkeypatch.setattr("lmprune.forward.machine.free_memory", lambda device="cpu": 1000)
    without, evidence = chosen()
    assert without == in_memory and not evidence._lab.loaded
    with pytest.raises(ModelError, match="needs the whole model in memory"):
        chosen(stream=False)


@pytest.mark.parametrize(
    ("name", "objective", "error", "said"),
    [
        ("greedy", "self", UsageError, "read layer by layer writes nothing"),
        ("taylor", None, ModelError, "needs the whole model in memory"),
        ("finercut", None, UsageError, "loses whole layers only"),
    ],
)
def test_what_needs_the_whole_model_is_one_line(
    tiny: Callable[..., Path], name: str, objective: str | None, error: type[Exception], said: str
) -> None:
    settings = ProfileSettings(samples=8, max_length=24, stream=True)
    with pytest.raises(error, match=said):
        choose(tiny("llama"), name, drop=1, settings=settings, data=DATA, how=ChoiceSettings(objective=objective))


def test_best_goes_by_loss_where_the_model_cannot_write(tiny: Callable[..., Path]) -> None:
    settings = ProfileSettings(samples=8, max_length=24, stream=True)
    assert choose(tiny("llama"), "best", drop=1, settings=settings, data=DATA).details["objective"] == "loss"
