"""Criteria side by side, and what every single layer is worth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmprune
from lmprune.choosing import ModelEvidence
from lmprune.comparing import Compared, Comparison, compare, gone, layer_costs
from lmprune.criteria import Choice
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import Plan
from lmprune.cuts.sublayers import plan_of
from lmprune.drawing.bars import draw_choices, draw_layers
from lmprune.errors import UsageError
from lmprune.models.cut import open_cut
from lmprune.profiling import ProfileSettings
from lmprune.text.sources import DataSettings

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS, DATA = ProfileSettings(samples=8, max_length=24), DataSettings(data="demo")


@pytest.fixture(scope="module")
def done(tiny: Callable[..., Path]) -> Comparison:
    names = ["angular", "greedy", "finercut", "random", "segment", "taylor"]
    how = ChoiceSettings(objective="loss+kl")
    return compare(tiny("llama"), drop=1, criteria=names, settings=SETTINGS, data=DATA, how=how)


def test_every_choice_is_judged_on_text_that_none_saw(done: Comparison, tiny: Callable[..., Path]) -> None:
    evidence = ModelEvidence(open_cut(tiny("llama")), SETTINGS, DATA)
    for row in done.rows:
        if row.choice is None:
            continue
        whole, cut = evidence.by("loss").judged([Plan(8), row.choice.plan]).mean()
        assert row.rise == pytest.approx(cut - whole) and done.whole == pytest.approx(whole)
        whole, cut = evidence.by("loss+kl").judged([Plan(8), row.choice.plan]).mean()
        assert row.judged == pytest.approx(cut - whole)
    rises = [row.rise for row in done.rows if row.rise is not None]
    assert rises == sorted(rises) and len(rises) == 5


def test_what_cannot_choose_says_why_in_its_row(done: Comparison) -> None:
    rows = {row.criterion: row for row in done.rows}
    assert rows["taylor"].rise is None and "no gradient" in (rows["taylor"].problem or "")
    assert rows["random"].choice is None and rows["random"].rise is not None
    assert rows["greedy"].passes > rows["angular"].passes == 0 and rows["angular"].profiles == 1
    assert rows["greedy"].choice is not None and rows["greedy"].choice.details["objective"] == "loss+kl"
    assert repr(done).startswith("<Comparison of 6 criteria for 1 layers")


def test_tables_and_json_tell_the_same(done: Comparison) -> None:
    head, rows = done.table()
    assert "loss+kl" in head and all(len(row) == len(head) for row in rows)
    data = json.loads(json.dumps(done.to_data()))
    assert [row["criterion"] for row in data["rows"]] == [row[0] for row in rows]
    sublayers = next(row for row in done.rows if row.criterion == "finercut")
    assert sublayers.choice is not None and gone(sublayers.choice.plan) in [row[1] for row in rows]


def test_what_two_choices_have_in_common_is_counted_in_layers() -> None:
    plans = [plan_of(8, [(1, "mlp"), (2, "mlp"), (2, "attention"), (5, "attention")]), Plan(8, (1, 2)), Plan(8, (6, 7))]
    rows = [Compared(str(at), Choice(plan, ""), float(at)) for at, plan in enumerate(plans)]
    assert [Comparison("m", 2, 1.0, tuple(rows)).overlap(row) for row in rows] == [2.0, 1.5, 0.0]


def test_every_layer_has_a_cost_by_every_objective(tiny: Callable[..., Path], tmp_path: Path) -> None:
    found = layer_costs(tiny("llama"), SETTINGS, DATA, objectives=["loss", "kl"])
    evidence = ModelEvidence(open_cut(tiny("llama")), SETTINGS, DATA)
    whole, third = evidence.losses([Plan(8), Plan(8, (2,))]).mean()
    assert found.rises["loss"][2] == pytest.approx(third - whole) and list(found.rises["kl"]) == list(range(8))
    # What precedes each layer is computed once, for both objectives; kl looks at the whole model first.
    assert found.passes == pytest.approx(2 * (8 + 28) / 8 + 1) and found.seconds > 0
    head, rows = found.table()
    assert head[:3] == ["layer", "loss rises by", "kl rises by"] and len(rows) == 8
    draw_layers(tmp_path / "l.svg", {name: ("rises", rise) for name, rise in found.rises.items()}, "title")
    assert (tmp_path / "l.svg").read_text().count("layer that is switched off") == 1
    assert lmprune.layer_costs is layer_costs


def test_choices_are_drawn(done: Comparison, tmp_path: Path) -> None:
    bars = [(row.criterion, gone(row.choice.plan), row.rise or 0.0) for row in done.rows if row.choice]
    draw_choices(tmp_path / "c.svg", bars, 0.3, "title")
    text = (tmp_path / "c.svg").read_text()
    assert all(name in text for name, *_ in bars) and "median of random draws" in text
    with pytest.raises(UsageError, match="unknown kind of picture"):
        draw_choices(tmp_path / "c.gif", bars, None, "title")


def test_a_comparison_is_of_one_number_of_layers() -> None:
    with pytest.raises(UsageError, match="at one number of layers"):
        compare("demo", drop=2, how=ChoiceSettings(max_loss=0.1))


@pytest.mark.slow
def test_cuts_are_evaluated_on_tasks(run: Callable[..., Any], tmp_path: Path) -> None:
    """Also one's own."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "own.jsonl").write_text('{"q": "one", "a": 1}\n{"q": "two", "a": 0}\n')
    (tmp_path / "own" / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'own' / 'own.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['x', 'y']\n"
        "doc_to_target: a\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        "metadata: {version: 1}\n"
    )
    words = ("--samples", "8", "--max-length", "32", "--tasks", "lmprune_demo_facts,own", "--include_path", "own")
    words = (*words, "--limit", "4", "--json")
    found = json.loads(run("lmprune", "compare", "demo", "--drop", "2", "--criteria", "deepest,random", *words).stdout)
    (deepest,) = (row for row in found["rows"] if row["criterion"] == "deepest")
    assert found["scores"]["lmprune_demo_facts"]["value"] == 1 and set(deepest["scores"]) == {
        "lmprune_demo_facts",
        "own",
    }
    assert deepest["rise"]["error"] > 0
    found = json.loads(run("lmprune", "layers", "demo", "-o", "l.png", *words).stdout)
    assert found["rows"][0]["scores"]["lmprune_demo_facts"]["value"] < 1 and (tmp_path / "l.png").is_file()
    assert found["rows"][0]["scores"]["own"]["error"] is not None and found["rows"][0]["rises"]["loss"]["error"] > 0
