"""A sweep gives the numbers of separate lm_eval runs, goes on where it stopped, and refuses what it must."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BIN

from lmprune.errors import NetworkError, OutputError, RecipeError, UsageError, UselessRepair
from lmprune.evaluation.rows import Results, results_in
from lmprune.reporting.collect import Collected
from lmprune.sweeping.folder import Sweep
from lmprune.sweeping.run import SweepRun
from lmprune.sweeping.settings import SweepSettings
from lmprune.text.sources import DataSettings

POINTS = {"baseline", "angular-02", "angular-04", "deepest-02", "deepest-04"}


def _numbers(raw: dict[str, Any]) -> dict[str, Any]:
    return {f"{t} {m}": v for t, values in raw["results"].items() for m, v in values.items() if isinstance(v, float)}


@pytest.mark.slow
def test_every_point_has_a_results_file_of_the_harness(sweep_folder: Path) -> None:
    sweep = Sweep.read(sweep_folder)
    assert {point.name for point in sweep.points} == POINTS
    for point in sweep.points:
        found = results_in(sweep_folder / "results" / point.name)
        assert found is not None and found.harness and found.limit == 4 and found.seed == 7
        kept = found.raw["config"].get("lmprune_layers_kept")
        assert kept == (list(point.plan.kept) if point.plan else None)
        note = found.raw["lmprune"]
        assert note["data"]["lmprune_demo_facts"]["documents"] == 4
        assert {"versions", "hardware", "settings", "base"} <= set(note)
        assert list((sweep_folder / "results" / point.name).glob("samples_lmprune_demo_arithmetic_*.jsonl"))
    assert sweep.passes["shared"] < sweep.passes["separate"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "angular-04", "deepest-02"])
def test_numbers_are_those_of_separate_runs(
    name: str, sweep_folder: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    ours = results_in(sweep_folder / "results" / name)
    assert ours is not None
    model_args = ",".join(f"{key}={value}" for key, value in ours.raw["config"]["model_args"].items())
    run(
        "lm_eval", "--model", "lmprune", "--model_args", model_args,
        "--tasks", "lmprune_demo,lmprune_demo_normalised_loss",
        "--include_path", _tasks(), "--limit", "4", "--batch_size", "32", "--output_path", tmp_path / "theirs",
        OMP_NUM_THREADS=str(torch.get_num_threads()),
    )  # fmt: skip
    (theirs,) = (tmp_path / "theirs").rglob("results_*.json")
    assert _numbers(ours.raw) == _numbers(json.loads(theirs.read_text()))


def _tasks() -> Path:
    from lmprune.tasks_folder import tasks_folder

    return tasks_folder()


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "qwen3",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("gemma3_text", "gpt_neox", "opt", "mixtral")),
    ],
)
def test_shared_states_change_nothing(kind: str, tiny: Callable[..., Path]) -> None:
    from lmprune.cuts.plan import Plan
    from lmprune.evaluation.plugin import LmpruneLM
    from lmprune.evaluation.shared import SharedCut, SharedLM

    config: dict[str, Any] = {"opt": {"word_embed_proj_dim": 48, "ffn_dim": 64}, "gemma3_text": {"head_dim": 12}}.get(
        kind, {}
    )
    base = str(tiny(kind, **config))
    dropped = [(), (3, 4), (3, 4, 5), (0, 7), (6,), (5, 6)]
    cuts = [SharedCut(str(gone), Plan(8, gone) if gone else None) for gone in dropped]
    requests = [(("", ""), list(range(10, 14 + i % 5)), [20 + i, 30 + i % 3]) for i in range(11)]
    shared = SharedLM(base, cuts, device="cpu", batch_size=4)
    separate = SharedLM(base, cuts, device="cpu", batch_size=4, share=False)
    for cut in cuts:
        shared.use(cut.name), separate.use(cut.name)
        assert shared._loglikelihood_tokens(requests) == separate._loglikelihood_tokens(requests)
    assert shared.views.share, "this architecture should share"
    shared.use("()")
    assert shared._loglikelihood_tokens(requests) == LmpruneLM(base, device="cpu", batch_size=4)._loglikelihood_tokens(
        requests, disable_tqdm=True
    )


def test_layers_in_common_are_run_once(tiny: Callable[..., Path]) -> None:
    from lmprune.cuts.plan import Plan
    from lmprune.evaluation.shared import SharedCut, SharedLM
    from lmprune.forward.tree import passes
    from lmprune.models.stack import find_stack

    cuts = [SharedCut(str(n), Plan(8, tuple(range(7 - n, 7)))) for n in (1, 2, 3, 4)]
    lm = SharedLM(str(tiny("llama")), cuts, device="cpu", batch_size=4)
    ran = []
    lm._loglikelihood_tokens([(("", ""), [5, 6], [7])])  # finds out whether sharing is exact, once
    for turn in lm.views.turns:
        for layer in find_stack(lm.views.view(turn.name)).layers:
            layer.mlp.register_forward_hook(lambda *_: ran.append(1))
    lm._loglikelihood_tokens([(("", ""), [5, 6, 7], [8])] * 2)
    assert len(ran) == passes(lm.views.turns)[0] == 10


def test_answers_survive_an_interruption(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from lmprune.cuts.plan import Plan
    from lmprune.evaluation.shared import SharedCut, SharedLM

    cuts = [SharedCut("a"), SharedCut("b", Plan(8, (3,)))]
    requests = [(("", ""), [5, 6, 7], [8])]
    lm = SharedLM(str(tiny("llama")), cuts, device="cpu", batch_size=4, journal=tmp_path / "j")
    lm.use("b")
    first = lm._loglikelihood_tokens(requests)
    with pytest.raises(OutputError, match="another run is writing"):
        SharedLM(str(tiny("llama")), cuts, device="cpu", batch_size=4, journal=tmp_path / "j")
    lm.close()
    with (tmp_path / "j").open("a") as file:
        file.write('{"key": "cut sho')
    with closing(SharedLM(str(tiny("llama")), cuts, device="cpu", batch_size=4, journal=tmp_path / "j")) as again:
        for name in ("a", "b"):
            again.use(name)
            again.model.register_forward_hook(lambda *_: pytest.fail("scored twice"))
        assert again._loglikelihood_tokens(requests) == first
    # The same name, but another model: its answers are its own.
    other = [SharedCut("a"), SharedCut("b", Plan(8, (4,)))]
    with closing(SharedLM(str(tiny("llama")), other, device="cpu", batch_size=4, journal=tmp_path / "j")) as another:
        another.use("b")
        assert another._loglikelihood_tokens(requests) != first


def _again(folder: Path, sweep: Sweep, **changes: Any) -> SweepRun:
    settings = dict(sweep.settings) | changes
    data = DataSettings(**settings.pop("data"))
    return SweepRun(sweep.model["name"], folder, SweepSettings(**settings), data)


@pytest.mark.slow
def test_it_goes_on_where_it_stopped(sweep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "run"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    shutil.rmtree(copy / "results" / "angular-02")
    sweep = Sweep.read(copy)
    before = {p: p.stat().st_mtime_ns for p in (copy / "results").rglob("results_*.json")}
    again = _again(copy, sweep)
    assert again.measure(again.prepare()) == []
    assert before.items() <= {p: p.stat().st_mtime_ns for p in (copy / "results").rglob("results_*.json")}.items()
    redone, first = (results_in(folder / "results" / "angular-02") for folder in (copy, sweep_folder))
    assert redone and first and _numbers(redone.raw) == _numbers(first.raw)


def test_other_settings_are_refused(sweep_folder: Path) -> None:
    with pytest.raises(OutputError, match=r"other limit \(limit: 4, now 5\)"):
        _again(sweep_folder, Sweep.read(sweep_folder), limit=5).prepare()


def test_a_foreign_sweep_deletes_nothing_outside(sweep_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "a" / "run"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    data = json.loads((copy / "sweep.json").read_text())
    data["points"][1]["name"] = "/../../x"
    (copy / "sweep.json").write_text(json.dumps(data))
    (outside := tmp_path / "a" / "x.mine").mkdir()
    with pytest.raises(RecipeError, match="no point's name"):
        _again(copy, Sweep.read(sweep_folder)).prepare()
    assert outside.is_dir()


def test_repair_is_added_to_a_finished_sweep_and_healing_starts_from_it(
    sweep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    run = _again(copy, Sweep.read(copy), repair="refit", heal="quick", heal_steps=2)
    sweep = run.prepare()
    left = [point.name for point in run.left(sweep)]
    assert set(left) == {f"{name}-{made}" for name in POINTS - {"baseline"} for made in ("repaired", "healed")}
    asked: list[tuple[Path, str | None]] = []

    def healed(start: Path, out: Path, settings: Any, data: Any) -> None:
        asked.append((start, settings.method))
        assert settings.method or not settings.repair_first
        if "angular" in str(out):
            raise UselessRepair("it does not help")
        out.mkdir(parents=True)

    monkeypatch.setattr("lmprune.sweeping.run.heal", healed)
    monkeypatch.setattr(SweepRun, "_evaluate", lambda *_: None)
    monkeypatch.setattr("lmprune.sweeping.run.LmpruneLM", lambda *_, **__: None)
    run.measure(sweep)
    assert (copy / "recipes" / "deepest-02.yml", "refit") in asked
    assert (copy / "repaired" / "deepest-02", None) in asked
    assert (copy / "recipes" / "angular-02.yml", None) in asked, "what no repair helps is healed as it was cut"
    with pytest.raises(UsageError, match="--repair lora: it trains"):
        _again(copy, sweep, repair="lora")


@pytest.mark.slow
def test_a_recipe_that_is_there_is_not_chosen_anew(sweep_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "recipes").mkdir(parents=True)
    before = Sweep.read(sweep_folder)
    names = [point.name for point in before.points if point.n]
    for name in names:
        shutil.copy(sweep_folder / "recipes" / f"{name}.yml", out / "recipes")
    run = _again(out, before)
    assert {point for point in run.prepare().points} == {*before.points} and not run.choices
    (out / "sweep.json").unlink()
    shutil.copy(out / "recipes" / f"{names[0]}.yml", out / "recipes" / f"{names[-1]}.yml")
    with pytest.raises(RecipeError, match="drops other than"):
        _again(out, before).prepare()


def test_healing_is_added_to_a_finished_sweep(sweep_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    before = Sweep.read(copy)
    again = _again(copy, before, heal="quick", heal_steps=2)
    prepared = again.prepare()
    assert [point.name for point in again.wanted(prepared)[: len(POINTS)]] == [point.name for point in before.points]
    left = {p.name for p in prepared.points if not (copy / "results" / p.name).is_dir()}
    assert left == {f"{name}-healed" for name in POINTS - {"baseline"}}
    after = Sweep.read(copy)
    assert after == prepared and after.settings["heal"] == "quick"
    with pytest.raises(OutputError, match="other heal_steps"):
        _again(copy, after, heal_steps=3)
    with pytest.raises(OutputError, match="other heal and"):
        _again(copy, before)


@pytest.mark.slow
def test_another_fraction_and_criterion_are_added_to_a_finished_sweep(sweep_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    before = Sweep.read(copy)
    old = {p: p.stat().st_mtime_ns for part in ("recipes", "results") for p in (copy / part).rglob("*") if p.is_file()}
    again = _again(copy, before, fractions="0.125", criteria="deepest,segment")
    prepared = again.prepare()
    assert [point.name for point in again.left(prepared)] == ["deepest-01", "segment-01"]
    assert again.measure(prepared) == []
    again.bench(prepared)
    assert old == {p: p.stat().st_mtime_ns for p in old}
    after = Sweep.read(copy)
    assert {point.name for point in after.points} == POINTS | {"deepest-01", "segment-01"}
    assert (after.settings["fractions"], after.settings["criteria"]) == ("0.25,0.5,0.125", "angular,deepest,segment")
    rows = json.loads((copy / "bench.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {point.name for point in after.points}
    assert not Collected.read(copy).problems
    # What was asked for first goes on, and finds all done.
    assert _again(copy, before).left(_again(copy, before).prepare()) == []


@pytest.mark.slow
def test_a_task_is_added_to_a_finished_sweep(sweep_folder: Path, tmp_path: Path) -> None:
    """It is measured alone, and gives what it gives among the others."""
    copy, task = tmp_path / "run", "lmprune_demo_normalised_loss"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    data = json.loads((copy / "sweep.json").read_text())
    data["tasks"].remove(task)
    data["settings"]["tasks"] = "lmprune_demo"
    del data["data"][task]
    (copy / "sweep.json").write_text(json.dumps(data))
    whole = {name: results_in(copy / "results" / name) for name in POINTS}
    for result in whole.values():
        assert result is not None
        raw = json.loads(json.dumps(result.raw))
        for key in ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples"):
            raw[key].pop(task, None)
        del raw["lmprune"]["data"][task]
        raw["lmprune"]["tasks"].remove(task)
        result.path.write_text(json.dumps(raw))
    before = Sweep.read(copy)
    assert _again(copy, before).left(_again(copy, before).prepare()) == []
    again = _again(copy, before, tasks=task)
    prepared = again.prepare()
    assert {point.name for point in again.left(prepared)} == POINTS
    asked, only = [], again.tasks.only
    again.tasks.only = lambda names: asked.append(tuple(names)) or only(names)  # type: ignore[method-assign]
    assert again.measure(prepared) == []
    assert set(asked) == {(task,)}, "what was measured is not measured again"
    for name, old in whole.items():
        new = results_in(copy / "results" / name)
        assert old and new and new.scores == old.scores and new.data == old.data
    assert not Collected.read(copy).problems and not Collected.read(copy).missing
    assert _again(copy, before).left(_again(copy, before).prepare()) == [], "the first command goes on too"


def test_changed_documents_are_refused_before_anything_is_measured(sweep_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    before = Sweep.read(copy)
    data = json.loads((copy / "sweep.json").read_text())
    data["data"]["lmprune_demo_facts"]["hash"] = "0123"
    (copy / "sweep.json").write_text(json.dumps(data))
    with pytest.raises(OutputError, match="another hash of lmprune_demo_facts: '0123', now"):
        _again(copy, before).prepare()


def test_what_cannot_be_compared_is_refused_before_tasks_are_loaded(
    sweep_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.sweeping import run

    before = Sweep.read(sweep_folder)
    monkeypatch.setattr(run, "LoadedTasks", lambda *_, **__: pytest.fail("loaded the tasks"))
    for changes, says in (
        ({"seed": 8}, "other seed"),
        ({"dtype": "bfloat16"}, "other dtype"),
        ({"quantization": "nf4"}, "other quantization"),
        ({"samples": 9}, "other samples"),
        ({"data": {**before.settings["data"], "data": "c4"}}, "other data"),
    ):
        with pytest.raises(OutputError, match=says):
            _again(sweep_folder, before, **changes)


@pytest.mark.parametrize("began", ["bfloat16", "float32"])
def test_a_sweep_goes_on_in_the_type_that_it_began_in(sweep_folder: Path, tmp_path: Path, began: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    told = json.loads((copy / "sweep.json").read_text())
    told["model"]["dtype"] = began
    (copy / "sweep.json").write_text(json.dumps(told))
    run = _again(copy, Sweep.read(copy))
    assert run.dtype == began == run._model_arguments()["dtype"]
    assert all(run._opened_alone(point)["dtype"] == began for point in Sweep.read(copy).points)


def test_a_launcher_gets_only_the_points_that_were_asked_for(sweep_folder: Path) -> None:
    run = _again(sweep_folder, Sweep.read(sweep_folder), launcher="print", points="deepest-02")
    (line,) = run.launch(run.prepare())
    assert "--points deepest-02 " in line


@pytest.mark.slow
def test_a_budget_stops_between_points(sweep_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    for point in POINTS - {"baseline"}:
        shutil.rmtree(copy / "results" / point)
    again = _again(copy, Sweep.read(copy), budget="0.001s")
    left = again.measure(again.prepare())
    # One point is always measured, or a small budget would never get anywhere: the first in the order.
    assert [point.name for point in left] == [point.name for point in Sweep.read(copy).points[2:]]


def test_agreement_is_measured_once_and_for_points_that_come(
    sweep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.errors import DataError
    from lmprune.sweeping import agreeing
    from lmprune.sweeping import run as running
    from lmprune.sweeping.agreed import Agreements

    copy = tmp_path / "run"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    again = _again(copy, Sweep.read(copy), agree=6)
    again.agree(again.prepare())
    first = Agreements.read(copy)
    assert first is not None and set(first.points) == POINTS and first.samples == 6
    assert first.points["baseline"].same == 1.0 and 0 < first.points["angular-04"].same < 1
    assert first.points["angular-04"].same_stderr > 0 and Collected.read(copy).agreements == first
    monkeypatch.setattr(agreeing, "_said", lambda *_: pytest.fail("measured twice"))
    again.agree(again.prepare())
    monkeypatch.undo()
    data = json.loads((copy / "agreement.json").read_text())
    del data["points"]["deepest-02"]
    (copy / "agreement.json").write_text(json.dumps(data))
    again.agree(again.prepare())
    assert Agreements.read(copy) == first

    (copy / "agreement.json").unlink()

    def no_text(*_: Any, **__: Any) -> Any:
        raise DataError("no text")

    monkeypatch.setattr(running, "tokenize", no_text)
    again.agree(again.prepare())
    assert Agreements.read(copy) is None, "without text a sweep ends all the same"


@pytest.mark.slow
def test_few_bits_are_added_to_a_finished_sweep(sweep_folder: Path, tmp_path: Path) -> None:
    from lmprune.sweeping.run import sweep

    copy = tmp_path / "run"
    shutil.copytree(sweep_folder, copy, symlinks=True)
    before = Sweep.read(copy)
    model = str(before.model["name"])
    settings = dict(before.settings)
    data = DataSettings(**settings.pop("data"))
    done = sweep(model, copy, SweepSettings(**settings | {"quantizations": "int8", "agree": 4}), data)
    assert done.left == () and set(done.measured) == POINTS | {f"{name}-int8" for name in POINTS}
    run = Collected.read(copy).alike()
    sizes = {row["name"]: row for row in run.bench["rows"]} if run.bench else {}
    for name in POINTS:
        assert sizes[f"{name}-int8"]["weight_bytes"] < sizes[name]["weight_bytes"]
        opened = run.results[f"{name}-int8"].raw["config"]["model_args"]
        assert opened["quantization"] == "int8" and ("recipe" in opened) is (name != "baseline")
    assert run.agreements is not None and run.agreements.points["baseline-int8"].same > 0.5
    # Without the option what is there stays, and nothing is measured again.
    same = sweep(model, copy, SweepSettings(**settings | {"agree": 4}), data)
    assert set(same.measured) == set(done.measured) and Sweep.read(copy).settings["quantizations"] == "int8"


@pytest.mark.parametrize(
    ("model", "options", "error", "says"),
    [
        (
            "BASE",
            {"tasks": "lmprune_dmo"},
            UsageError,
            "no task 'lmprune_dmo' .*did you mean 'lmprune_demo'.*lmprune eval ls tasks",
        ),
        ("BASE", {"tasks": "gsm8k"}, NetworkError, "task 'gsm8k' needs data"),
        ("BASE", {"tasks": "lmprune_demo,lmprune_demo_facts"}, UsageError, "Name each task once"),
        ("BASE", {"fractions": "0.12,0.13"}, UsageError, "both are 1 of 8"),
        ("BASE", {"fractions": "0.01"}, UsageError, "rounds to 0"),
        ("BASE", {"criteria": "depest"}, UsageError, "did you mean 'deepest'"),
        ("BASE", {"heal": "quik"}, UsageError, "did you mean 'quick'"),
        ("BASE", {"profile": "none.json"}, RecipeError, "no profile at none.json"),
        (
            "BASE",
            {"points": "baseline-nf4", "quantizations": "int8"},
            UsageError,
            "no point 'baseline-nf4'.*baseline-int8",
        ),
        ("BASE", {"points": "nonsense"}, UsageError, "no point 'nonsense'.* Points: baseline, angular-02, deepest-02$"),
        ("BASE", {"points": "deepest-02-healed"}, UsageError, "no point 'deepest-02-healed'"),
        ("BASE", {"device": "cuda:99"}, UsageError, "--device cuda:99: torch sees"),
        ("BASE", {"device": "mps", "heal": "quick"}, UsageError, "--device mps: healing works"),
    ],
)
def test_mistakes_are_told_before_any_work(
    model: str, options: dict[str, Any], error: type[Exception], says: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        settings = SweepSettings(**{"tasks": "lmprune_demo", "fractions": "0.25", "device": "cpu"} | options)
        SweepRun(str(tiny("qwen3")), tmp_path / "run", settings, DataSettings(data="demo"))
    assert not (tmp_path / "run").exists()


def test_a_foreign_folder_is_left_alone(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("x")
    with pytest.raises(OutputError, match="it holds 'letters'"):
        SweepRun(
            str(tiny("qwen3")),
            tmp_path,
            SweepSettings(tasks="lmprune_demo", fractions="0.25"),
            DataSettings(data="demo"),
        )


@pytest.mark.slow
def test_a_multi_step_task_is_always_there(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from lmprune.evaluation.loaded import LoadedTasks

    tasks = LoadedTasks(["lmprune_demo_facts"], {"pretrained": str(tiny("qwen3"))}, steps="lmprune_demo_arithmetic")
    assert tasks.added == "lmprune_demo_arithmetic" and tasks.generative == ["lmprune_demo_arithmetic"]
    settings = SweepSettings(tasks="lmprune_demo_facts", fractions="0.25", device="cpu")
    run = SweepRun(str(tiny("qwen3")), tmp_path / "run", settings, DataSettings(data="demo"))
    assert run.tasks.names == ["lmprune_demo_facts", "lmprune_demo_arithmetic"]


def test_a_cut_of_the_demo_has_the_demos_tasks_and_text(tmp_path: Path) -> None:
    import lmprune
    from lmprune.evaluation.loaded import DEMO_TASKS

    lmprune.write_recipe("demo", lmprune.Plan(12, (3,)), tmp_path / "first.yml")
    lmprune.prune(tmp_path / "first.yml", tmp_path / "pruned")
    settings = SweepSettings(fractions="0.3", criteria="deepest", device="cpu")
    for model in (tmp_path / "first.yml", tmp_path / "pruned"):
        run = SweepRun(str(model), tmp_path / "run", settings, DataSettings())
        assert run.tasks.names == list(DEMO_TASKS) and run.cut.default_data == "demo", "no network is needed"


def test_results_of_groups_stand_for_their_members(tmp_path: Path) -> None:
    raw = {
        "results": {
            "mmlu": {"acc,none": 0.5, "acc_stderr,none": 0.01, "alias": "mmlu"},
            "mmlu_stem": {"acc,none": 0.4},
            "mmlu_anatomy": {"acc,none": 0.4},
            "c4": {"bits_per_byte,none": 0.9, "bits_per_byte_stderr,none": "N/A", "word_perplexity,none": 20.0},
        },
        "group_subtasks": {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_anatomy"], "all": ["mmlu", "c4"]},
        "configs": {
            "mmlu_anatomy": {"output_type": "multiple_choice", "doc_to_choice": ["A", "B", "C", "D"]},
            "c4": {},
        },
        "higher_is_better": {"mmlu": {"acc": True}, "c4": {"bits_per_byte": False}},
        "lm_eval_version": "0.4.13",
    }
    (tmp_path / "results_x.json").write_text(json.dumps(raw))
    scores = Results.read(tmp_path / "results_x.json").scores
    assert set(scores) == {"mmlu", "c4"}
    assert scores["mmlu"].chance == 0.25 and scores["mmlu"].choice and scores["mmlu"].stderr == 0.01
    assert scores["c4"].metric == "bits_per_byte" and not scores["c4"].higher_is_better and scores["c4"].stderr is None


@pytest.mark.parametrize(
    ("choices", "chance"),
    [
        (["no", "yes"], 1 / 2),
        ({"a": "x", "b": "y", "c": "z"}, 1 / 3),
        ("{{[sol1, sol2]}}", 1 / 2),
        ("def doc_to_choice(doc):\n    return [doc['choice1'], doc['choice2']]\n", 1 / 2),
        ("{{choices.text}}", 1 / 4),
        ("def doc_to_choice(doc):\n    return [c for c in doc['choices']]\n", 1 / 4),
        (None, 1 / 4),
    ],
)
def test_chance_of_foreign_results_is_what_their_configuration_tells(
    choices: object, chance: float, tmp_path: Path
) -> None:
    raw: dict[str, Any] = {
        "results": {"t": {"acc,none": 0.5}},
        "configs": {"t": {"output_type": "multiple_choice", "doc_to_choice": choices}},
    }
    (tmp_path / "results_x.json").write_text(json.dumps(raw))
    assert Results.read(tmp_path / "results_x.json").scores["t"].chance == chance
    raw["lmprune"] = {"data": {"t": {"documents": 4, "chance": 0.3}}}
    (tmp_path / "results_x.json").write_text(json.dumps(raw))
    assert Results.read(tmp_path / "results_x.json").scores["t"].chance == 0.3


def test_chance_of_a_group_is_the_mean_over_its_documents(tmp_path: Path) -> None:
    raw = {
        "results": {"g": {"acc,none": 0.5}, "a": {"acc,none": 0.5}, "b": {"acc,none": 0.5}},
        "group_subtasks": {"g": ["a", "b"]},
        "configs": {"a": {"output_type": "multiple_choice"}, "b": {"output_type": "multiple_choice"}},
        "lmprune": {"data": {"a": {"documents": 1, "chance": 0.5}, "b": {"documents": 3, "chance": 0.25}}},
    }
    (tmp_path / "results_x.json").write_text(json.dumps(raw))
    assert Results.read(tmp_path / "results_x.json").scores["g"].chance == 5 / 16


SMALL: tuple[object, ...] = (
    "--fractions", "0.25,0.5", "--criteria", "deepest", "--tasks", "lmprune_demo_facts,lmprune_demo_arithmetic",
    "--limit", 4, "--device", "cpu", "--data", "demo", "--json",
)  # fmt: skip


def _all_numbers(folder: Path) -> dict[str, dict[str, Any]]:
    found = {place.name: results_in(place) for place in (folder / "results").iterdir()}
    return {name: _numbers(results.raw) for name, results in found.items() if results}


@pytest.mark.slow
def test_processes_and_printed_commands_give_the_numbers_of_one_process(
    run: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    words = ("lmprune", "sweep", tiny("qwen3"), *SMALL, "--heal", "quick", "--heal-steps", 2)
    one = json.loads(run(*words, "--no-bench", "-o", "one").stdout)
    assert set(one["scores"]) == {"baseline", *(f"deepest-0{n}{h}" for n in (2, 4) for h in ("", "-healed"))}

    two = json.loads(run(*words, "-o", "two", "--launcher", "accelerate", "--processes", 2).stdout)
    assert two["left"] == [] and two["scores"] == one["scores"]
    assert (tmp_path / "two" / "bench.json").is_file()

    printed = json.loads(run(*words, "-o", "three", "--launcher", "print", "--processes", 2).stdout)["commands"]
    assert len(printed) == 2
    for line in printed:
        run(*shlex.split(line))
    three = json.loads(run(*words, "--no-bench", "-o", "three").stdout)
    assert three["left"] == [] and three["scores"] == one["scores"]
    assert _all_numbers(tmp_path / "one") == _all_numbers(tmp_path / "two") == _all_numbers(tmp_path / "three")


@pytest.mark.slow
def test_a_killed_sweep_goes_on(run: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path) -> None:
    words = ("sweep", tiny("qwen3"), *SMALL, "--no-bench", "-o", "run")
    killed = subprocess.Popen(
        [str(BIN / "lmprune"), *map(str, words)], cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    results = tmp_path / "run" / "results"
    while killed.poll() is None and not (results / "baseline").is_dir():
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    before = {path: path.stat().st_mtime_ns for path in results.rglob("results_*.json")}
    assert before
    assert json.loads(run("lmprune", *words).stdout)["left"] == []
    after = {path: path.stat().st_mtime_ns for path in results.rglob("results_*.json")}
    assert before.items() <= after.items() and len(after) == 3
    assert not [path.name for path in results.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_cut_is_swept_further(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import lmprune
    from lmprune.models.cut import open_cut

    base = tiny("qwen3")
    lmprune.write_recipe(base, lmprune.Plan(8, (2,)), tmp_path / "first.yml")
    settings = SweepSettings(
        fractions="0.3", criteria="deepest", tasks="lmprune_demo_facts", limit=2, batch_size=32, seed=7
    )
    with pytest.raises(UsageError, match="stands in no file"):
        lmprune.sweep(lmprune.Recipe.read(tmp_path / "first.yml"), tmp_path / "run", settings)
    done = lmprune.sweep(tmp_path / "first.yml", tmp_path / "run", settings, DataSettings(data="demo"))
    assert not done.left and "2 of 2 points measured" in repr(done)
    assert open_cut(tmp_path / "run" / "recipes" / "deepest-02.yml").plan == lmprune.Plan(8, (2, 5, 6))
    kept = {name: results.raw["config"]["lmprune_layers_kept"] for name, results in done.results().items()}
    assert kept == {"baseline": [0, 1, 3, 4, 5, 6, 7], "deepest-02": [0, 1, 3, 4, 7]}
    for name, results in done.results().items():
        alone = lmprune.evaluate(results.raw["config"]["model_args"], "lmprune_demo_facts", limit=2)
        assert _numbers({"results": {"lmprune_demo_facts": alone["results"]["lmprune_demo_facts"]}}).items() <= (
            _numbers(results.raw).items()
        ), name
    page, *_ = lmprune.report(tmp_path / "run", tmp_path / "page.html")
    assert "deepest-02" in page.read_text()


@pytest.mark.parametrize(
    ("preset", "quantization"), [("quick", "nf4"), pytest.param("reassessing", None, marks=pytest.mark.slow)]
)
def test_a_quantised_sweep_heals_adapters_on_few_bits(
    preset: str, quantization: str | None, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    settings = SweepSettings(
        fractions="0.25",
        criteria="deepest",
        tasks="lmprune_demo_arithmetic",
        device="cpu",
        quantization="nf4",
        heal=preset,
    )
    sweep = SweepRun(tiny("qwen3"), tmp_path / "run", settings, DataSettings(data="demo"))
    point = next(point for point in sweep.prepare().points if point.healed)
    assert sweep.healing(point).quantization == quantization


def test_sublayers_are_no_points_of_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--criteria finercut: it drops sublayers"):
        settings = SweepSettings(fractions="0.3", criteria="deepest,finercut", device="cpu")
        SweepRun("demo", tmp_path / "run", settings, DataSettings())


def test_tasks_of_ones_own_are_found(tmp_path: Path) -> None:
    from lmprune.evaluation.loaded import LoadedTasks

    (tmp_path / "d.jsonl").write_text(json.dumps({"q": "one and", "a": "two"}) + "\n")
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    tasks = LoadedTasks(["mine"], {}, steps="lmprune_demo_arithmetic", include_path=str(tmp_path))
    assert tasks.names == ["mine"] and tasks.data(None)["mine"]["documents"] == 1
    with pytest.raises(UsageError, match="no such folder"):
        LoadedTasks(["mine"], {}, steps="lmprune_demo_arithmetic", include_path=str(tmp_path / "none"))
