"""What healing settles before its first step: whether its end can be reached, how much fits, how long it takes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import LmpruneError, OutputError, UsageError
from lmprune.healing.budget import SPARE, Course, Pace
from lmprune.healing.settings import HealSettings
from lmprune.settings import seconds_of
from lmprune.text.sources import DataSettings

SHORT = {"method": "lora", "batch_size": 4, "max_length": 32, "eval_blocks": 4, "dtype": "float32"}
CUT = Plan(8, (3, 4))


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """Drops layers 3 and 4 of a tiny Llama."""
    path = tmp_path / "cut.yml"
    path.write_text(Recipe(str(tiny("llama")), tuple(CUT.slices()), layers=8, dtype="bfloat16").to_yaml())
    return path


def _heal(recipe: Path, out: Path, **given: Any) -> Any:
    from lmprune.healing import heal

    values = SHORT | given
    if given.get("method") in ("refit", "scalar", "replaceme", "ghost", "linear-patch"):
        del values["batch_size"]
    return heal(recipe, out, HealSettings(**values), DataSettings(data="demo"))


# --- the end is tried first ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ("lora", 1), ("qlora", 1), ("full", 1), ("last-layers", 4), ("junction", 1), ("lora+distill", 1),
        ("refit", 1), ("scalar", 1), ("replaceme", 1), ("refit+full", 1),
    ],
)  # fmt: skip
def test_what_stops_the_end_stops_the_beginning(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, layers: int
) -> None:
    """Every method merges, proves and writes a few layers before any text is read."""
    from lmprune.healing import rehearsal, run

    seen = []

    def fail(model: Any, *args: Any) -> None:
        seen.append(model.config.num_hidden_layers)
        raise ValueError("no such thing can be saved")

    monkeypatch.setattr(rehearsal, "write_checkpoint", fail)
    monkeypatch.setattr(run, "blocks_of", None)
    with pytest.raises(OutputError, match="could be healed, but not written: no such thing can be saved"):
        _heal(recipe, tmp_path / "out", method=method)
    assert seen == [layers]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


@pytest.mark.parametrize(
    ("given", "where", "stops"),
    [
        ({"method": "refit", "stream": True}, "rehearsal", "write_changed"),
        ({"method": "replaceme", "stream": True}, "rehearsal", "streamed_losses"),
        ({"method": "ghost"}, "rehearsal", "write_patched"),
        ({"method": "linear-patch"}, "rehearsal", "finish_live"),
        ({"method": "linear-patch", "patch_steps": 3}, "patching", "save"),
    ],
)
def test_streamed_repairs_and_patches_try_their_end_too(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], where: str, stops: str
) -> None:
    from lmprune.healing import patching, rehearsal, run

    seen = []
    writes = rehearsal.write_changed if "stream" in given else rehearsal.write_patched

    def written(*args: Any) -> Any:
        seen.append((args[0].plan.dropped, {type(arg).__name__ for arg in args}))
        return writes(*args)

    def fail(*args: Any, **how: Any) -> None:
        raise ValueError("no such thing can be written")

    monkeypatch.setattr(rehearsal, writes.__name__, written)
    monkeypatch.setattr({"rehearsal": rehearsal, "patching": patching}[where], stops, fail)
    monkeypatch.setattr(run, "blocks_of", None)
    with pytest.raises(OutputError, match="could be healed, but not written: no such thing can be written"):
        _heal(recipe, tmp_path / "out", **given)
    if stops not in ("write_changed", "write_patched"):
        ((dropped, _),) = seen
        assert dropped == ((3, 4) if "stream" not in given else tuple(range(1, 8))), "as little as there can be"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


@pytest.mark.parametrize(
    "given", [{"method": "refit", "stream": True}, {"method": "ghost"}, {"method": "linear-patch"}]
)
def test_what_can_be_written_passes_its_trial(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    from lmprune.healing import run

    def stop(*args: Any, **how: Any) -> None:
        raise LmpruneError("so far so good")

    monkeypatch.setattr(run, "blocks_of", stop)
    with pytest.raises(LmpruneError, match="so far so good"):
        _heal(recipe, tmp_path / "out", **given)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


def test_maps_that_no_recipe_may_have_beside_it_are_refused_first(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.healing import rehearsal, run

    monkeypatch.setattr(rehearsal, "LARGEST", 4 * 64 * 64 - 1)
    monkeypatch.setattr(run, "blocks_of", None)
    with pytest.raises(
        OutputError, match=r"--method ghost: the maps of 1 cuts in states of width 64 are .*Use --method"
    ):
        _heal(recipe, tmp_path / "out", method="ghost")


def test_what_a_model_computes_besides_its_weights_is_widened_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Gemma's scale of embeddings, a buffer, is rounded where the model is loaded in bfloat16: 6.928 becomes 6.938."""
    from lmprune.healing.methods.refit import Refit
    from lmprune.healing.rehearsal import rehearse
    from lmprune.models.cut import open_cut

    cut = open_cut(tiny("gemma3_text", hidden_size=48, head_dim=12)).without(CUT, "cut")
    rehearse(cut, Refit(), 0, tmp_path, device="cpu", compute="float32")


def test_a_cut_that_only_all_layers_describe_is_rehearsed_whole(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprune.healing.methods.full import Full
    from lmprune.healing.rehearsal import _shortest
    from lmprune.models.cut import open_cut

    def never(self: Any, model: Any, cut: Plan | None) -> None:
        raise UsageError("too few")

    monkeypatch.setattr(Full, "check_model", never)
    cut = open_cut(recipe)
    assert _shortest(cut, Full()).plan == cut.plan


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_that_may_not_be_large_enough_are_one_line_before_training(recipe: Path, tmp_path: Path) -> None:
    with _largest_file(100_000), pytest.raises(OutputError, match=r"the healed model needs a file of .*ulimit -f"):
        _heal(recipe, tmp_path / "out", steps=2)


def test_a_disk_without_room_is_one_line_before_training(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        OutputError, match=r"needs [0-9.]+ [kM]B, and 1\.0 kB are free where .*out is to be\. Make room"
    ):
        _heal(recipe, tmp_path / "out", steps=2)


def test_a_checkpoint_that_cannot_be_written_is_one_line(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rehearse", "require_room"):
        monkeypatch.setattr(f"lmprune.healing.run.{name}", lambda *args, **how: None)
    with _largest_file(30_000), pytest.raises(OutputError, match=r"cannot write a checkpoint to .*begins again"):
        _heal(recipe, tmp_path / "out", steps=2, method="full")


def test_a_result_that_cannot_be_written_costs_no_training(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.healing import run, training

    with monkeypatch.context() as patch:

        def full(*args: Any) -> None:
            raise OutputError("cannot write OUT: no space left on device")

        patch.setattr(run, "write_checkpoint", full)
        with pytest.raises(OutputError, match=r"no space left on device\. What was trained is kept in"):
            _heal(recipe, tmp_path / "out", steps=2, method="full")
    monkeypatch.setattr(training.HealTrainer, "training_step", None)
    assert _heal(recipe, tmp_path / "out", steps=2, method="full").steps == 2


# --- budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "0", "5x", "-3s", "m5", "nan", "1e400", "5m" * 9])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(UsageError, match=r"--budget .* is no time"):
        seconds_of(text)


@pytest.mark.parametrize("seconds", [3.0, 20.0, 100.0, 1000.0])
@pytest.mark.parametrize("pace", [Pace(1, 0.1, 0.1), Pace(0.5, 3, 1), Pace(30, 1, 1), Pace(0.01, 0.5, 0.2)])
@pytest.mark.parametrize("every", [None, 1, 7])
def test_planned_steps_fit_and_waste_little(seconds: float, pace: Pace, every: int | None) -> None:
    steps = pace.steps(seconds, every)
    if not steps:
        assert pace.end + pace.training(1, 1) > 0.8 * seconds
        return
    taken = pace.training(steps, every or -(-steps // 10)) + pace.end
    assert taken <= seconds
    more = 2 * steps + 2
    assert pace.training(more, every or -(-more // 10)) + pace.end > (seconds - pace.end) * (1 - SPARE)


def test_a_budget_plans_steps_and_is_kept_in_the_history(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as the measured speed allows; a run that goes on keeps the plan."""
    from lmprune.healing import learning, training

    monkeypatch.setattr(learning, "measure", lambda *args, **how: Pace(100.0, 0.0, 0.0))
    with caplog.at_level(logging.INFO, "lmprune"), monkeypatch.context() as patch:

        def stop(self: Any, *args: Any, **kwargs: Any) -> None:
            save(self, *args, **kwargs)
            if self.state.global_step == 2:
                raise LmpruneError("killed")

        save = training.HealTrainer._save_checkpoint
        patch.setattr(training.HealTrainer, "_save_checkpoint", stop)
        with pytest.raises(LmpruneError, match="killed"):
            _heal(recipe, tmp_path / "out", budget="700s", eval_every=2)
    assert "6 steps of 4 blocks of 32 tokens, about 10:00 min" in caplog.text
    assert "768 tokens, each read 1.0 times" in caplog.text
    course = Course.from_data(json.loads((tmp_path / ".out.healing" / "course.json").read_text()))
    assert course.steps == 6
    done = _heal(recipe, tmp_path / "out", budget="700s", eval_every=2)
    told = json.loads((tmp_path / "out" / "lmprune.json").read_text())["healing"]
    assert done.steps == told["steps"] == told["settings"]["steps"] == 6
    assert told["budget"] == "700s" and told["pace"]["step"] == 100.0 and told["settings"]["warmup"] == 0


def test_a_budget_for_no_step_is_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprune.healing import learning, run

    monkeypatch.setattr(learning, "measure", lambda *args, **how: Pace(100.0, 0.0, 0.0))
    monkeypatch.setattr(run, "blocks_of", None)
    with pytest.raises(UsageError, match=r"--budget 60s: one step and all that comes after it take about 1:40 min"):
        _heal(recipe, tmp_path / "out", budget="60s")
    for given, said in (({"steps": 3}, "give one of them"), ({"method": "refit"}, "trains no steps")):
        with pytest.raises(UsageError, match=said):
            _heal(recipe, tmp_path / "out", budget="60s", **given)


def test_training_stops_before_a_step_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprune.healing import training

    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    deadline = training.Deadline(10.0)
    state, done = SimpleNamespace(global_step=0, max_steps=100), 0
    while True:
        control = SimpleNamespace(should_training_stop=False, should_evaluate=False, should_save=False)
        deadline.on_step_begin(None, state, control)  # type: ignore[arg-type]
        now[0] += 3.0
        state.global_step += 1
        deadline.on_step_end(None, state, control)  # type: ignore[arg-type]
        done += 1
        if control.should_training_stop:
            break
    assert done == 3 and control.should_evaluate and control.should_save


def test_measuring_changes_nothing(recipe: Path) -> None:
    import torch

    from lmprune.healing.methods.lora import Lora
    from lmprune.healing.pacing import measure
    from lmprune.healing.student import prepare
    from lmprune.models.cut import open_cut

    way = Lora(dropout=0.1, max_length=16, rank=2)
    student, _ = prepare(open_cut(recipe).load(dtype="float32"), way, None, 0)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    pace = measure(student, None, way, 2, 2, bf16=False, load=0.5)
    assert pace is not None and pace.step > 0 and pace.held_out > 0 and pace.load == 0.5
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


# --- type ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("can", "stored", "asked", "used"),
    [
        (True, "bfloat16", None, "bfloat16"),
        (True, "float32", None, "float32"),
        (False, "bfloat16", None, "float32"),
        (True, "bfloat16", "float32", "float32"),
        (False, "float32", "bfloat16", "bfloat16"),
    ],
)
def test_the_cpu_computes_in_bfloat16_where_it_can(
    can: bool, stored: str, asked: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.healing import machine

    monkeypatch.setattr(machine, "multiplies", lambda dtype: can)
    assert machine.Machine.of(HealSettings(device="cpu", dtype=asked or "auto"), stored).dtype == used


# --- documents kept apart -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_masked_documents_lose_what_each_loses_alone(kind: str, tiny: Callable[..., Path]) -> None:
    import numpy as np
    import torch

    from lmprune.forward.loss import held_out_loss
    from lmprune.models.cut import open_cut
    from lmprune.text.blocks import Blocks

    extra = {"n_embd": 64, "n_layer": 8, "n_head": 4, "n_positions": 512} if kind == "gpt2" else {}
    model = open_cut(tiny(kind, **extra)).load(dtype="float32").requires_grad_(False)
    ids = np.random.default_rng(0).integers(2, 300, (2, 24), dtype=np.int32)
    ids[0, [0, 5, 16]] = ids[1, [0, 9]] = 1
    blocks = Blocks(ids, ids, "x", unscored=1, mark=(1, True))
    nats, count = 0.0, 0
    for row, stops in zip(ids, ([0, 5, 16, 24], [0, 9, 24])):
        for start, stop in zip(stops, stops[1:]):
            document = torch.from_numpy(row[start:stop].astype(np.int64))[None]
            log_p = model(input_ids=document).logits[0, :-1].double().log_softmax(-1)
            nats -= float(log_p[range(stop - start - 1), document[0, 1:]].sum())
            count += stop - start - 1
    joined = held_out_loss(model, ids, batch=2, unscored=1)
    apart = held_out_loss(model, ids, batch=2, unscored=1, places=blocks.places)
    assert apart == pytest.approx(nats / count, rel=1e-5)
    assert abs(joined - apart) > 1e-4


@pytest.mark.parametrize("method", ["lora", "full+distill"])
def test_healing_keeps_documents_apart(recipe: Path, tmp_path: Path, method: str) -> None:
    """Training, Trainer's own evaluation, and the losses before and after read the same."""
    done = _heal(recipe, tmp_path / "out", method=method, steps=2, eval_every=1, document_mask=True, max_length=64)
    told = json.loads((tmp_path / "out" / "lmprune.json").read_text())["healing"]
    assert told["data"]["document_mask"] and told["held_out"][0][1] == pytest.approx(done.pruned, rel=1e-4)


def test_a_model_that_does_not_keep_documents_apart_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmprune.healing.rehearsal import check_apart
    from lmprune.models.cut import Cut, open_cut

    cut = open_cut(recipe)
    check_apart(cut, "cpu")
    load = Cut.load

    def deaf(self: Cut, **how: Any) -> Any:
        model = load(self, **how)
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda position_ids=None, **given: forward(**given))
        return model

    monkeypatch.setattr(Cut, "load", deaf)
    with pytest.raises(UsageError, match="reads one document of a block from another all the same"):
        check_apart(cut, "cpu")
