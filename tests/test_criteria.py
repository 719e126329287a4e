"""Each criterion keeps its promise: one row per criterion, and the claim of its method."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmprune.choosing import ModelEvidence, choose
from lmprune.criteria import CRITERIA
from lmprune.cuts.plan import Plan
from lmprune.errors import HostError, RecipeError, UsageError
from lmprune.forward.loss import losses
from lmprune.models.cut import Cut, open_cut
from lmprune.profiling import ProfileSettings
from lmprune.profiling.run import calibration_tokens, profile_model
from lmprune.text.sources import DataSettings


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> ModelEvidence:
    """Of the demo model with a layer 4 that passes its input on unchanged."""
    import torch

    cut = open_cut("demo")
    model = cut.load(dtype="float32")
    with torch.no_grad():
        model.model.layers[4].self_attn.o_proj.weight.zero_()
        model.model.layers[4].mlp.down_proj.weight.zero_()
    folder = tmp_path_factory.mktemp("identity")
    model.save_pretrained(folder)
    cut.tokenizer().save_pretrained(folder)
    settings = ProfileSettings(samples=16, max_length=32, token="all")
    return ModelEvidence(open_cut(folder), settings, DataSettings(data="demo"))


# criterion, layers to drop, the layers that it must drop on a model whose layer 4 is the identity, and what it says
CLAIMS = [
    ("angular", 1, (4,), r"^angular distance d\(4, 5\) = 0\.0000; 16 samples say nothing"),
    ("deepest", 2, (9, 10), r"^the deepest 2 layers but the last"),
    ("block-influence", 1, (4,), r"^block influence of 4 is at most -?0\.0000"),
    ("greedy-influence", 1, (4,), r"^in this order: 4"),
    ("greedy-angular", 1, (4,), r"^in this order: 4"),
    ("one-shot", 1, (4,), r"^alone, each of 4 costs at most -?0\.0000"),
    ("greedy", 1, (4,), r"^in this order: 4, down to a loss of"),
    ("segment", 1, (4,), r"^of 12 blocks 4 leaves the lowest loss"),
    ("oracle", 1, (4,), r"^of all 12 ways"),
    ("taylor", 1, (4,), r"the weights of 4$"),
    ("magnitude", 1, (4,), r"those of 4$"),
    ("best", 1, (4,), r"on unseen text it costs -?0\.0000"),
    ("finercut", 1, (4,), r"^in this order: (attention|mlp) 4, (attention|mlp) 4, down to -?0\.0000"),
    ("block-pruner", 1, (4,), r"^in this order: (attention|mlp) 4, (attention|mlp) 4"),
    ("evolve", 1, (4,), r"^the best of 0 generations, found in number 0: -?0\.0000"),
    ("random", 3, (2, 10, 11), r"^drawn at random with seed 0"),
]


def test_every_criterion_has_a_row() -> None:
    assert {name for name, *_ in CLAIMS} == set(CRITERIA)


@pytest.mark.parametrize(("name", "count", "dropped", "said"), CLAIMS)
def test_claims(name: str, count: int, dropped: tuple[int, ...], said: str, evidence: ModelEvidence) -> None:
    made = choose(evidence.cut, name, drop=count, evidence=evidence)
    assert made.plan.dropped == dropped and made.criterion == name and re.search(said, made.reason)


@pytest.mark.parametrize("name", ["angular", "deepest", "block-influence", "one-shot", "segment"])
def test_every_size_can_be_chosen(name: str, evidence: ModelEvidence) -> None:
    for count in (1, 5, 11):
        plan = choose(evidence.cut, name, drop=count, evidence=evidence).plan
        assert len(plan.dropped) == count and plan.layers == 12


def test_deepest_measures_nothing(evidence: ModelEvidence) -> None:
    untouched = ModelEvidence(evidence.cut)
    choose(evidence.cut, "deepest", fraction=0.25, evidence=untouched)
    assert not untouched.has_profile


def test_a_profile_of_another_model_is_refused(evidence: ModelEvidence, tiny: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="made from other weights"):
        choose("demo", drop=1, profile=evidence.profile())
    with pytest.raises(RecipeError, match=r"a profile of 12 layers, but .* has 8"):
        choose(tiny("llama"), drop=1, profile=evidence.profile())


def test_unknown_names_get_the_nearest(tiny: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="did you mean 'angular'"):
        choose(tiny("llama"), "angulr", drop=1)


def test_what_is_judged_on_is_in_no_profile(tiny: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "short.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{i} is a number, and {i + 1} comes after it"}) + "\n" for i in range(10))
    )
    short = ModelEvidence(open_cut(tiny("llama")), ProfileSettings(samples=50, max_length=16), DataSettings(str(text)))
    assert short.profile().samples == 6 and short.judged([Plan(8)]).values.shape == (1, 4)
    long = ModelEvidence(open_cut(tiny("llama")), ProfileSettings(samples=200, max_length=16), DataSettings("demo"))
    assert long.profile().samples == 200 and long.losses([Plan(8)]).values.shape == (1, 128)
    unseen = calibration_tokens(long.cut, ProfileSettings(samples=264, max_length=16), DataSettings("demo")).part(200)
    wanted = losses(long.model, [Plan(8)], unseen)
    assert np.array_equal(long.judged([Plan(8)]).values, wanted.values)


def test_a_loaded_model_is_measured_as_one_that_is_read(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, settings, data = open_cut(tiny("gemma3_text")), ProfileSettings(samples=4, max_length=16), DataSettings("demo")
    plans = (None, Plan(8, (2,)), Plan(8, (2, 5)))
    read = [profile_model(cut.without(plan, "", None), None, settings, data) for plan in plans]
    loads: list[Cut] = []
    monkeypatch.setattr(Cut, "load", lambda self, load=Cut.load, **how: loads.append(self) or load(self, **how))
    evidence = ModelEvidence(cut, settings, data)
    evidence.prepare()
    for plan, once in zip(plans, read):
        found = evidence.profile(plan)
        assert [found.distance(at, 1) for at in range(found.layers)] == [
            once.distance(at, 1) for at in range(once.layers)
        ]
    assert len(loads) == 1


# --- criteria of other packages ---------------------------------------------------------------------------------------

GREEDY = '''
"""Take away, one after the other, the layer without which the loss is lowest (SLEB, arXiv 2402.09025)."""

from lmprune import Choice, Plan


def choose(count, evidence):
    dropped = ()
    for _ in range(count):
        left = [layer for layer in range(evidence.layers) if layer not in dropped]
        plans = [Plan(evidence.layers, (*dropped, layer)) for layer in left]
        losses = evidence.losses(plans).mean()
        best = plans[losses.argmin()]
        dropped = best.dropped
    return Choice(best, f"a loss of {losses.min():.4f} nats a token is left", {"loss": float(losses.min())})
'''


def test_another_package_adds_a_criterion(
    package: Callable[..., None], evidence: ModelEvidence, run: Any, tmp_path: Path
) -> None:
    package("lmprune.criteria", "greedy_loss", GREEDY)
    made = choose(evidence.cut, "greedy_loss", drop=2, evidence=evidence)
    assert 4 in made.plan.dropped and "nats a token is left" in made.reason
    words = ("--data", "demo", "--samples", "6", "--max-length", "32")
    run("lmprune", "recipe", evidence.cut.name, "-o", "r.yml", "--drop", "1", "--criterion", "greedy_loss", *words)
    text = (tmp_path / "r.yml").read_text()
    assert "criterion: greedy_loss" in text and "dropped: [4]" in text and "nats a token is left" in text


def test_a_broken_criterion_of_another_package_is_named(package: Callable[..., None], evidence: ModelEvidence) -> None:
    package("lmprune.criteria", "broken", "import nothing_of_that_name")
    with pytest.raises(HostError, match="--criterion broken: outside_broken cannot be loaded"):
        choose(evidence.cut, "broken", drop=1)
    package("lmprune.criteria", "empty", "")
    with pytest.raises(HostError, match="has no 'choose'"):
        choose(evidence.cut, "empty", drop=1)
