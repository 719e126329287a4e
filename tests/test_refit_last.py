"""The last layer solved for the whole model's distribution over the next token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_repair import PLAN, refit, rows_of, student_of
from torch import Tensor
from toys import model_of

from lmprune.errors import UsageError
from lmprune.healing import last as last_module
from lmprune.healing import refitting
from lmprune.healing.methods.refit import Refit

pytestmark = pytest.mark.usefixtures("one_thread")


def _divergence(student: Any, whole: Any, rows: Any) -> float:
    """In nats a token, sample by sample."""
    total = tokens = 0.0
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(row).long()[None]
            ours, theirs = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (student, whole))
            total += float((theirs.exp() * (theirs - ours)).sum())
            tokens += len(row)
    return total / tokens


def _sharp(kind: str) -> Any:
    """A model that is surer of what comes next than a random one is."""
    whole = model_of(kind)
    head = whole.get_output_embeddings().weight
    if head is not whole.get_input_embeddings().weight:  # else the layers would say next to nothing
        with torch.no_grad():
            head *= 20
    return whole


def _held(rows: Any) -> Any:
    return rows[refitting.HELD - 1 :: refitting.HELD]


@pytest.mark.parametrize("kind", ["llama", pytest.param("olmo2", marks=pytest.mark.slow)])
def test_the_distribution_comes_nearer_on_other_text(kind: str) -> None:
    whole, rows, other = _sharp(kind), rows_of(150), rows_of(30, seed=1)
    states, both = student_of(whole), student_of(whole)
    refit(states, whole, PLAN, rows, Refit(last_for="states"))
    report = refit(both, whole, PLAN, rows, Refit())
    done = report.projections[-1]
    assert done.form == refitting.DISTRIBUTION and done.layer == 5 and done.ridge is None
    assert _divergence(both, whole, other) < _divergence(states, whole, other)
    # What is told is what the models say on the text that was held out, before and after.
    assert done.before > done.after
    assert done.after == pytest.approx(_divergence(both, whole, _held(rows)), rel=1e-3)
    changed = {name for name, value in states.state_dict().items() if not torch.equal(value, both.state_dict()[name])}
    assert all((name.startswith(f"{_last(both)}.") and done.path in name) or "norm" in name for name in changed)


def _last(model: Any) -> str:
    from lmprune.models.stack import find_stack

    stack = find_stack(model)
    return f"{stack.path}.{len(stack.layers) - 1}"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_a_spoilt_last_projection_is_recovered(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that go do nothing, and nothing else was changed: the divergence can be none."""
    whole = _sharp(kind)
    for layer in PLAN.dropped:
        for linear in _written(whole, layer):
            for parameter in linear.parameters():
                torch.nn.init.zeros_(parameter)
    student = student_of(whole)
    with torch.no_grad():
        weight = _written(student, -1)[1].weight
        weight += weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(refitting._Refit, "solved", lambda *_: [])  # not for states before
    report = refit(student, whole, PLAN, rows_of(150), Refit())
    (done,) = report.projections
    assert done.after < 0.1 * done.before


def _written(model: Any, layer: int) -> tuple[Any, Any]:
    """What writes in that layer."""
    if hasattr(model, "transformer"):
        return model.transformer.h[layer].attn.c_proj, model.transformer.h[layer].mlp.c_proj
    return model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj


def test_it_is_solved_though_the_states_before_it_gain_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, rows = _sharp("llama"), rows_of(60)
    monkeypatch.setattr(refitting._Refit, "is_over", lambda self, place, idle: place > 1)
    student = student_of(whole)
    report = refit(student, whole, PLAN, rows, Refit())
    assert [(done.layer, done.form == refitting.DISTRIBUTION) for done in report.projections[-2:]] == [
        (1, False),
        (5, True),
    ]
    assert report.projections[-1].after == pytest.approx(_divergence(student, whole, _held(rows)), rel=1e-3)


def test_text_in_parts_and_targets_computed_again_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, rows = _sharp("llama"), rows_of(40)
    students = [student_of(whole) for _ in range(2)]
    refit(students[0], whole, PLAN, rows, Refit())
    monkeypatch.setattr(last_module, "_AT_ONCE", 1)
    monkeypatch.setattr(last_module, "KEPT_BYTES", 0)
    refit(students[1], whole, PLAN, rows, Refit())
    first, second = (student.model.layers[-1].mlp.down_proj.weight.detach() for student in students)
    torch.testing.assert_close(first, second, atol=2e-3, rtol=0)


@pytest.mark.parametrize("options", [{"last_for": "states"}, {"until_layer": 1}, {"ridges": "inf"}])
def test_it_is_left_out_where_it_is_not_wanted(options: dict[str, Any]) -> None:
    whole = _sharp("llama")
    report = refit(student_of(whole), whole, PLAN, rows_of(40), Refit(**options))
    assert refitting.DISTRIBUTION not in {done.form for done in report.projections}
    with pytest.raises(UsageError, match="--last-for"):
        Refit(last_for="loss").check("refit")


def test_what_does_not_gain_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _sharp("llama")
    states, both = student_of(whole), student_of(whole)
    rows = rows_of(40)
    refit(states, whole, PLAN, rows, Refit(last_for="states"))

    def worse(self: Any, parameters: Any) -> Tensor:
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        return torch.tensor(0.0)

    monkeypatch.setattr(last_module.Last, "_pulled", worse)
    report = refit(both, whole, PLAN, rows, Refit())
    assert report.projections[-1].form == "keep"
    assert all(torch.equal(value, both.state_dict()[name]) for name, value in copy.copy(states.state_dict()).items())


def test_nothing_is_computed_twice_at_one_place() -> None:
    """Each round of the solver begins where the one before ended, and asks first what is known of it."""
    place, asked = torch.nn.Parameter(torch.tensor([3.0, -2.0])), 0

    def compute() -> Tensor:
        nonlocal asked
        asked, place.grad = asked + 1, None
        with torch.enable_grad():
            found = (place.square() * torch.tensor([1.0, 4.0])).sum()
            found.backward()
        return found.detach()

    def solved(function: Any) -> Tensor:
        nonlocal asked
        place.data, asked = torch.tensor([3.0, -2.0]), 0
        solver = torch.optim.LBFGS([place], max_iter=2, line_search_fn="strong_wolfe")
        for _ in range(3):
            solver.step(function)
        return place.detach().clone()

    plain = solved(compute), asked
    remembered = solved(last_module._Remembered(compute, [place])), asked
    assert torch.equal(plain[0], remembered[0]) and remembered[1] < plain[1]
