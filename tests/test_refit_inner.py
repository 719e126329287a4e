"""What an MLP reads, solved with what it writes: Gauss-Newton before a cut."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_repair import PLAN, refit, rows_of, student_of
from torch import Tensor, nn
from toys import model_of

from lmprune.errors import UsageError
from lmprune.forward.batches import Batch
from lmprune.healing import inner as inner_module
from lmprune.healing import keeping, refitting
from lmprune.healing.inner import Inner, Newton, inner_of
from lmprune.healing.keeping import Kept
from lmprune.healing.layerwise import Layerwise
from lmprune.healing.methods.refit import Refit
from lmprune.healing.writers import Writer, stages_of

pytestmark = pytest.mark.usefixtures("one_thread")


def _found(kind: str) -> Inner | None:
    model = model_of(kind)
    layerwise = Layerwise(model, [Batch.of([row], torch.device("cpu")) for row in rows_of(2)])
    layerwise.begin()
    stages = stages_of(layerwise, 0, layerwise.states[0][:1, : layerwise.probe.ids.shape[1]])
    return inner_of(layerwise, 0, layerwise.states[0][:1, : layerwise.probe.ids.shape[1]], stages[-1])


@pytest.mark.parametrize(
    ("kind", "path", "names"),
    [
        ("llama", "mlp", ("gate_proj", "up_proj")),
        ("gpt2", "mlp", ("c_fc",)),
        ("phi3", "mlp", ("gate_up_proj",)),
        ("gpt_neox", "mlp", ("dense_h_to_4h",)),
        ("gemma3_text", "mlp", ("gate_proj", "up_proj")),
    ],
)
def test_what_an_mlp_reads_is_found_by_trying(kind: str, path: str, names: tuple[str, ...]) -> None:
    found = _found(kind)
    assert found is not None and (found.path, found.names) == (path, names)
    assert found.changed == [f"{path}.{name}.weight" for name in names]


@pytest.mark.parametrize("kind", ["mixtral", "mamba", "opt"])
def test_experts_and_what_sees_other_tokens_or_stands_in_the_layer_itself_stay(kind: str) -> None:
    assert _found(kind) is None


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(3, 2, False), nn.Linear(3, 2, False), nn.Linear(2, 3, False)

    def forward(self, states: Tensor) -> Tensor:
        made: Tensor = self.down(torch.sigmoid(self.gate(states)) * self.up(states))
        return made


def test_where_the_mlp_is_linear_a_step_is_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """In `up` alone it is: conjugate gradients of as many iterations as weights end at the solution."""
    monkeypatch.setattr(inner_module, "_DAMPING", 1e-12)
    monkeypatch.setattr(inner_module, "_CURVED", 1)
    torch.manual_seed(0)
    layer = nn.Module()
    layer.mlp = _Gated()
    states, wanted = torch.randn(2, 400, 3), torch.randn(2, 400, 3)
    gate = torch.sigmoid(layer.mlp.gate(states)).detach()
    down = layer.mlp.down.weight.detach()
    design = torch.einsum("otm,otd,wm->otwmd", gate, states, down).reshape(-1, 6)
    expected = torch.linalg.lstsq(design.double(), wanted.reshape(-1, 1).double()).solution.view(2, 3)
    inner = Inner("mlp", ("up",), Writer("mlp.down", "", 1.0))
    parts = [(held, s, w) for held in (False, True) for s, w in zip(states, wanted)]
    newton = Newton(layer, inner, lambda: iter(parts))
    before = newton.error(newton.weights)
    assert newton.step() and newton.error(newton.weights) < before
    torch.testing.assert_close(layer.mlp.up.weight.detach().double(), expected, atol=1e-3, rtol=1e-3)


def _spoilt(kind: str) -> tuple[Any, Any]:
    """A model whose layers that go do nothing, and what is left of it with other maps in the MLP before the cut."""
    whole = model_of(kind)
    layers = whole.transformer.h if kind == "gpt2" else whole.model.layers
    for layer in PLAN.dropped:
        ends = (layers[layer].attn.c_proj, layers[layer].mlp.c_proj) if kind == "gpt2" else (
            layers[layer].self_attn.o_proj, layers[layer].mlp.down_proj)  # fmt: skip
        for end in ends:
            nn.init.zeros_(end.weight)
            if end.bias is not None:
                nn.init.zeros_(end.bias)
    with torch.no_grad():
        for name in ("c_fc",) if kind == "gpt2" else ("gate_proj", "up_proj"):
            linear = getattr(layers[1].mlp, name)
            linear.weight *= 30  # so that it is not nearly linear
        student = student_of(whole)
        ours = student.transformer.h if kind == "gpt2" else student.model.layers
        for name in ("c_fc",) if kind == "gpt2" else ("gate_proj", "up_proj"):
            linear = getattr(ours[1].mlp, name)
            noise = torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(1))
            linear.weight += 0.3 * linear.weight.std() * noise
    return whole, student


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_planted_change_of_what_an_mlp_reads_is_recovered(kind: str) -> None:
    left = {}
    for how in ("none", "cut"):
        whole, student = _spoilt(kind)
        report = refit(student, whole, PLAN, rows_of(150), Refit(ridges="1e-8", until_layer=1, inner=how))
        left[how] = report.projections[-1].after
        paths = {done.path for done in report.projections if done.form == refitting.NEWTON}
        assert paths == (
            set() if how == "none" else {"mlp.c_fc"} if kind == "gpt2" else {"mlp.gate_proj", "mlp.up_proj"}
        )
    assert left["cut"] < 0.2 * left["none"], left


@pytest.mark.parametrize(("options", "changes"), [({}, False), ({"what": "down", "inner": "cut"}, False)])
def test_it_is_left_out_where_only_outputs_are_asked_for(options: dict[str, str], changes: bool) -> None:
    whole = model_of("llama")
    student = student_of(whole)
    before = copy.deepcopy(student.model.layers[1].mlp.gate_proj.weight)
    refit(student, whole, PLAN, rows_of(40), Refit(until_layer=1, **options))  # type: ignore[arg-type]
    assert torch.equal(before, student.model.layers[1].mlp.gate_proj.weight) != changes
    with pytest.raises(UsageError, match="--inner"):
        Refit(inner="some").check("refit")


def test_a_killed_solve_goes_on_with_the_same_weights(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, rows = model_of("llama"), rows_of(40)
    straight = student_of(whole)
    refit(straight, whole, PLAN, rows, Refit(inner="cut"))

    def stop(self: Any, layer: int, *rest: Any) -> None:
        keep(self, layer, *rest)
        raise KeyboardInterrupt

    keep = keeping.Kept.keep
    monkeypatch.setattr(Kept, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        refit(student_of(whole), whole, PLAN, rows, Refit(inner="cut"), kept=Kept(tmp_path))
    monkeypatch.setattr(Kept, "keep", keep)
    again = student_of(whole)
    refit(again, whole, PLAN, rows, Refit(inner="cut"), kept=Kept(tmp_path))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in straight.state_dict().items())


def test_what_has_no_derivative_stays_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Newton) -> bool:
        raise RuntimeError("no forward derivative")

    monkeypatch.setattr(Newton, "step", fails)
    whole = model_of("llama")
    student, plain = student_of(whole), student_of(whole)
    rows: list[NDArray[np.int32]] = rows_of(40)
    report = refit(student, whole, PLAN, rows, Refit(inner="cut", last_for="states"))
    refit(plain, whole, PLAN, rows, Refit(inner="none", last_for="states"))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in student.state_dict().items())
    assert any("no forward derivative" in note for note in report.notes)
