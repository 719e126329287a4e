"""Repair without training: what closed forms claim, on tiny random models and on the demo model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from toys import LAYERS, VOCABULARY, model_of
from toys import student_of as cut_of

from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, ModelError, PlanError, UsageError, UselessRepair
from lmprune.forward.batches import Batch
from lmprune.forward.experts import Experts, packed
from lmprune.forward.loss import held_out_loss
from lmprune.healing.experts import ExpertsSolver
from lmprune.healing.fitting import fitted
from lmprune.healing.keeping import Kept
from lmprune.healing.layerwise import Layerwise, OnDisk
from lmprune.healing.low_rank import write_low_rank
from lmprune.healing.methods.laco import Laco, merge
from lmprune.healing.methods.refit import Refit
from lmprune.healing.methods.streamline import Streamline
from lmprune.healing.norms import Norm
from lmprune.healing.refitting import RefitReport
from lmprune.healing.refitting import refit as solve_all
from lmprune.healing.repairing import Repair
from lmprune.healing.replaceme import replaceme
from lmprune.healing.solving import Candidate, Sums, candidates, solve, solve_as
from lmprune.healing.together import solve_together
from lmprune.healing.writers import Stage, Writer, stages_of, writers_of
from lmprune.models.cut import Cut, open_cut
from lmprune.text.blocks import Blocks, read_blocks, read_held_out
from lmprune.text.sources import DataSettings

pytestmark = pytest.mark.usefixtures("one_thread")


def refit(student: Any, whole: Any, plan: Plan, rows: Any, options: Refit | None = None, **how: Any) -> RefitReport:
    """By default for states alone, so that the last layer's are measured as the others'."""
    return solve_all(student, whole, plan, rows, options or Refit(last_for="states"), **how)


PLAN = Plan(LAYERS, (2, 3))


def student_of(whole: Any, plan: Plan = PLAN) -> Any:
    return cut_of(whole, plan)


def rows_of(count: int, seed: int = 0) -> list[NDArray[np.int32]]:
    """Samples of different lengths, so that batches are padded."""
    generator = np.random.default_rng(seed)
    lengths = [32 if number % 3 else 20 + number % 7 for number in range(count)]
    return [generator.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]


def last_states(model: Any, rows: list[NDArray[np.int32]]) -> Tensor:
    """What leaves the last layer, before the final norm, (tokens, width)."""
    layerwise = Layerwise(model, [Batch.of([row], torch.device("cpu")) for row in rows])
    layerwise.begin()
    for place in range(len(layerwise.layers)):
        layerwise.pass_on(place)
    return torch.cat([state[0] for state in layerwise.states])


# --- the solve ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("around", [False, True])
def test_a_solve_from_sums_is_ridge_regression_on_all_tokens(bias: bool, around: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = (torch.randn(200, width, generator=generator, dtype=torch.float64) for width in (10, 4))
    old = torch.randn(10 + bias, 4, generator=generator, dtype=torch.float64) if around else None
    sums = Sums.empty(10, 4, bias=bias)
    for start in range(0, 200, 64):
        sums = sums.add(inputs[start : start + 64], wanted[start : start + 64])

    found = solve(sums, 0.05, around=old)

    # The same as least squares with a row for each weight that pulls it to where it was.
    whole = torch.cat([inputs, torch.ones(200, 1)], dim=1) if bias else inputs
    pull = (0.05 * inputs.square().sum() / 10).sqrt() * torch.eye(10 + bias, dtype=torch.float64)
    if bias:
        pull[-1, -1] = 0
    start_at = old if old is not None else torch.zeros(10 + bias, 4, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([whole, pull]), torch.cat([wanted, pull @ start_at])).solution
    torch.testing.assert_close(found, expected)
    error = (whole @ found - wanted).square().sum() / wanted.square().sum()
    assert sums.error(found) == pytest.approx(float(error))


@pytest.mark.parametrize("bias", [False, True])
def test_sums_in_float32_keep_what_they_round_off(bias: bool) -> None:
    """What is gathered on a GPU, here on the CPU: as near to float64 as the single products are, not as a long sum."""
    generator = torch.Generator().manual_seed(0)
    inputs, wanted = 1 + torch.randn(40_000, 6, generator=generator), torch.randn(40_000, 3, generator=generator)
    weights = torch.rand(40_000, 1, generator=generator)
    exact, kept = (Sums.empty(6, 3, bias=bias) for _ in range(2))
    plain = torch.zeros(6, 6)
    for start in range(0, 40_000, 100):
        part = slice(start, start + 100)
        exact = exact.add(inputs[part], wanted[part], weights[part])
        kept = kept.add_compensated(inputs[part], wanted[part], weights[part])
        plain += (inputs[part] * weights[part]).T @ (inputs[part] * weights[part])
    found = kept.settled()
    assert found.gram.dtype == torch.float64 and found.tokens == exact.tokens == 40_000

    def apart(gram: Tensor) -> float:
        return float((gram[:6, :6].double() - exact.gram[:6, :6]).abs().max() / exact.gram.abs().max())

    assert apart(found.gram) < 2e-7 and apart(found.gram) < 0.3 * apart(plain)
    torch.testing.assert_close(found.cross, exact.cross, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(solve(found, 1e-3), solve(exact, 1e-3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_solving_in_the_place_of_the_sums_leaves_them_as_they_were(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a loop over candidates is left half-way, and in several blocks of rows and outputs."""
    monkeypatch.setattr("lmprune.healing.solving._ROWS", 3)
    monkeypatch.setattr("lmprune.healing.solving._OUTPUTS", 3)
    inputs, wanted = torch.randn(50, 10).double(), torch.randn(50, 4).double()
    sums = Sums.empty(10, 4, bias=bias).add(inputs, wanted)
    old = torch.randn(10 + bias, 4).double()
    sums.gram.copy_(sums.gram.triu() + sums.gram.triu(1).T)  # a product's two halves may differ in the last bit
    gram = sums.gram.clone()
    for around in (None, old):
        damped = gram + torch.diag_embed(torch.tensor([0.1 * float(gram.diagonal()[:10].mean())] * 10 + [0.0] * bias))
        start = torch.zeros_like(old) if around is None else around
        expected = start + torch.linalg.solve(damped, sums.cross - gram @ start)
        torch.testing.assert_close(solve(sums, 0.1, around=around), expected)
        assert torch.equal(sums.gram, gram)
    found = list(candidates(sums, old, [0.1, 10.0]))
    assert [(each.form, each.ridge) for each in found] == [
        (form, ridge) for ridge in (0.1, 10.0) for form in ("around", "zero")
    ]
    torch.testing.assert_close(found[2].weight, solve(sums, 10.0, around=old))
    torch.testing.assert_close(found[3].weight, solve(sums, 10.0))
    next(candidates(sums, old, [1.0]))
    assert torch.equal(sums.gram, gram)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_has_no_solution(wrong: float) -> None:
    inputs, old = torch.randn(50, 10).double(), torch.randn(10, 4).double()
    inputs[7, 3] = wrong
    sums = Sums.empty(10, 4, bias=False).add(inputs, torch.randn(50, 4).double())
    assert torch.equal(solve(sums, 1e-2, around=old), old) and not list(candidates(sums, old, [1e-2]))


def test_a_solution_that_all_text_lacks_stays_as_it_was_judged() -> None:
    best = Candidate("zero", 1e-300, torch.ones(4, 3).double())
    singular = Sums.empty(4, 3, bias=False).add(torch.ones(5, 4), torch.randn(5, 3))
    assert solve_as(best, singular, torch.zeros(4, 3).double()) is best


def test_sums_of_a_gpu_are_solved_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are float32 with what was rounded off, here on the CPU, and stay so: more is added to them later."""
    inputs, wanted, old = torch.randn(200, 10), torch.randn(200, 4), torch.randn(10, 4).double()
    exact = Sums.empty(10, 4, bias=False).add(inputs, wanted)
    there = Sums.empty(10, 4, bias=False).add_compensated(inputs, wanted)
    assert there.low is not None and there.gram.dtype == torch.float32
    before = there.gram.clone()
    torch.testing.assert_close(solve(there, 1e-3), solve(exact, 1e-3), rtol=1e-5, atol=1e-6)
    for one, other in zip(candidates(there, old, [1e-3]), candidates(exact, old, [1e-3])):
        torch.testing.assert_close(one.weight, other.weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(there.gram, before)
    here = fitted(lambda held: iter([(inputs[held::2], wanted[held::2])]), old, [1e-3, 1.0], bias=False)
    monkeypatch.setattr(Sums, "add", Sums.add_compensated)
    found = fitted(lambda held: iter([(inputs[held::2], wanted[held::2])]), old, [1e-3, 1.0], bias=False)
    assert (found.form, found.ridge, found.tokens) == (here.form, here.ridge, here.tokens)
    torch.testing.assert_close(found.weight, here.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_what_does_best_on_held_out_text_is_then_solved_on_all(bias: bool) -> None:
    """As by Gram matrices of both parts, which are not kept."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs, old, ridges = draw(90, 10), draw(10 + bias, 4), (1e-3, 1e-1, 10.0)
    wanted = inputs @ (old[:10] + draw(10, 4)) + 0.5 * draw(90, 4)
    asked: list[bool] = []

    def parts(held: bool) -> Iterator[tuple[Tensor, Tensor]]:
        asked.append(held)
        for start in (60, 75) if held else (0, 20, 40):
            rows = slice(start, start + (15 if held else 20))
            yield inputs[rows], wanted[rows]

    found = fitted(parts, old, ridges, bias=bias)
    fit, held, every = (
        Sums.empty(10, 4, bias=bias).add(inputs[rows], wanted[rows])
        for rows in (slice(60), slice(60, 90), slice(0, 90))
    )
    best = min(candidates(fit, old, ridges), key=lambda candidate: held.error(candidate.weight))
    assert (found.form, found.ridge) == (best.form, best.ridge) and found.tokens == 90
    assert found.before == pytest.approx(held.error(old)) and found.after == pytest.approx(held.error(best.weight))
    torch.testing.assert_close(found.weight, solve(every, best.ridge, around=old if best.form == "around" else None))
    assert asked.count(False) == 1
    alone = fitted(parts, old, ridges, bias=bias, all_text=False)
    torch.testing.assert_close(alone.weight, best.weight)
    stays = fitted(parts, best.weight, [float("inf")], bias=bias)
    assert (stays.form, stays.ridge, stays.tokens) == ("keep", None, 90) and torch.equal(stays.weight, best.weight)


def test_fewer_tokens_than_inputs_are_carried_by_the_ridge() -> None:
    inputs, wanted = torch.randn(5, 10), torch.randn(5, 4)
    sums = Sums.empty(10, 4, bias=False).add(inputs, wanted)
    assert solve(sums, 1e-4).isfinite().all()
    assert torch.equal(Sums.empty(10, 4, bias=False).add(inputs * 0, wanted).cross, torch.zeros(10, 4).double())


def test_a_singular_system_gives_no_candidate() -> None:
    inputs, old = torch.ones(5, 4), torch.zeros(4, 3, dtype=torch.float64)
    sums = Sums.empty(4, 3, bias=False).add(inputs, torch.randn(5, 3))
    assert not list(candidates(sums, old, [1e-300])) and torch.equal(solve(sums, 1e-300, around=old + 2), old + 2)
    assert len(list(candidates(sums, old, [1e-2]))) == 2


def test_a_weight_that_nothing_could_be_solved_for_is_told_from_one_that_is_best() -> None:
    old, wanted = torch.randn(4, 3).double(), torch.randn(20, 3)
    alike, varied = torch.ones(20, 4), torch.randn(20, 4)
    for inputs, aim, ridges, form in (
        (alike, wanted, [1e-300], "singular"),
        (alike, wanted, [float("inf")], "keep"),
        (varied, varied @ old.float(), [10.0], "keep"),
    ):
        found = fitted(lambda held, x=inputs, y=aim: iter([(x, y)]), old, ridges, bias=False)
        assert (found.form, found.ridge, found.weight) == (form, None, old)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_refit_that_could_solve_nothing_is_refused(kind: str) -> None:
    whole, same = model_of(kind), [np.full(20, 5, dtype=np.int32)] * 12
    student = student_of(whole)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(UselessRepair, match=r"layer 1 mlp\.\w+: 240 tokens leave the solve singular"):
        refit(student, whole, PLAN, same, Refit(ridges="1e-20", last_for="states"))
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert refit(student, whole, PLAN, same, Refit(ridges="1e-20,1e-2", last_for="states")).projections
    normed = model_of("gemma2")
    report = refit(student_of(normed), normed, PLAN, same, Refit(ridges="1e-20", last_for="states"))
    assert {done.form for done in report.projections} == {"singular+norm"}, "its norms have a solution"


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo2", "glm4"])
def test_a_norms_gain_is_what_its_output_is_multiplied_by(kind: str) -> None:
    layer = model_of(kind).model.layers[0]
    module = layer.post_attention_layernorm if kind != "glm4" else layer.post_self_attn_layernorm
    norm, states = Norm(module), torch.randn(7, 32)
    torch.testing.assert_close(module(states), norm.unit(states) * norm.gain.float())
    gain = torch.linspace(-1, 2, 32).double()
    norm.set_gain(gain)
    torch.testing.assert_close(module(states), norm.unit(states) * gain.float())
    wanted = module(2 * states) * 3
    torch.testing.assert_close(module(norm.undone(states, wanted)).sign(), wanted.sign())


@pytest.mark.parametrize("bias", [False, True])
def test_projections_solved_together_are_ridge_regression_on_all_their_inputs(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = torch.nn.ModuleDict({"a": torch.nn.Linear(6, 4, bias=bias), "b": torch.nn.Linear(9, 4, bias=bias)}).double()
    writers = [Writer("a", "", 1.0), Writer("b", "", 1.0)]
    inputs, wanted = [draw(300, 6), draw(300, 9)], draw(300, 4) + 3
    wanted = wanted + inputs[0] @ draw(6, 4) + inputs[1] @ draw(9, 4)
    old = torch.cat([layer[name].weight.detach().T for name in "ab"])
    before = layer["a"].bias.detach().clone() if bias else torch.zeros(4).double()
    both = torch.cat(inputs, dim=1)

    def parts(held: bool) -> Iterator[tuple[list[Tensor], Tensor]]:
        rows = slice(200, 300) if held else slice(200)
        yield [each[rows] for each in inputs], wanted[rows]

    assert solve_together(layer, writers, parts, [1e-2]) == ("around", 1e-2)

    pull = (1e-2 * both.square().sum() / 15).sqrt() * torch.eye(15 + bias, dtype=torch.float64)
    start, entered = old, both
    if bias:
        pull[-1, -1], entered = 0, torch.cat([both, torch.ones(300, 1)], dim=1)
        start = torch.cat([old, torch.zeros(1, 4)])
    expected = torch.linalg.lstsq(torch.cat([entered, pull]), torch.cat([wanted - before, pull @ start])).solution
    found = torch.cat([layer[name].weight.detach().T for name in "ab"])
    torch.testing.assert_close(found, expected[:15])
    if bias:
        torch.testing.assert_close(layer["b"].bias.detach(), expected[15])
        assert torch.equal(layer["a"].bias.detach(), before)
    before_weights = {name: layer[name].weight.detach().clone() for name in "ab"}
    assert solve_together(layer, writers, parts, [float("inf")]) is None
    assert all(torch.equal(layer[name].weight, weight) for name, weight in before_weights.items())


def test_before_the_cut_all_projections_are_solved_together_where_that_helps() -> None:
    whole = model_of("llama")
    plan = Plan(LAYERS, (2, 3))
    both, alone = student_of(whole, plan), student_of(whole, plan)
    report = refit(both, whole, plan, rows_of(200), Refit(until_layer=1))
    refit(alone, whole, plan, rows_of(200), Refit(until_layer=1, what="down"))
    first, last = report.projections
    assert (first.layer, first.path, first.form) == (1, "self_attn.o_proj", "together") and first.after < first.before
    assert last.path == "mlp.down_proj"
    assert not torch.equal(both.model.layers[1].self_attn.o_proj.weight, whole.model.layers[1].self_attn.o_proj.weight)
    rows = rows_of(20, seed=1)
    wanted = _entering(whole, 4, rows)
    assert (_entering(both, 2, rows) - wanted).square().sum() < (_entering(alone, 2, rows) - wanted).square().sum()


def _entering(model: Any, layer: int, rows: list[NDArray[np.int32]]) -> Tensor:
    """What enters that layer, (tokens, width)."""
    layerwise = Layerwise(model, [Batch.of([row], torch.device("cpu")) for row in rows])
    layerwise.begin()
    for place in range(layer):
        layerwise.pass_on(place)
    return torch.cat([state[0] for state in layerwise.states])


# --- where layers write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        ("llama", ("self_attn.o_proj", "mlp.down_proj")),
        ("gpt2", ("attn.c_proj", "mlp.c_proj")),
        ("gpt_neox", ("attention.dense", "mlp.dense_4h_to_h")),
        ("phi", ("self_attn.dense", "mlp.fc2")),
        ("opt", ("self_attn.out_proj", "fc2")),
        ("bloom", ("self_attention.dense", "mlp.dense_4h_to_h")),
        ("falcon", ("self_attention.dense", "mlp.dense_4h_to_h")),
        ("mamba", ("mixer.out_proj",)),
    ],
)
def test_what_writes_to_the_stream_is_found_by_trying(kind: str, paths: tuple[str, ...]) -> None:
    assert tuple(writer.path for writer in _writers(model_of(kind))) == paths


def test_norms_after_a_projection_and_factors_are_found() -> None:
    found = _writers(model_of("gemma2"))
    assert [writer.norm for writer in found] == ["post_attention_layernorm", "post_feedforward_layernorm"]
    assert [writer.factor for writer in found] == [1.0, 1.0]
    found = _writers(model_of("granite", residual_multiplier=0.25))
    assert [writer.factor for writer in found] == pytest.approx([0.25, 0.25], rel=1e-4)


def _writers(model: Any) -> tuple[Writer, ...]:
    layerwise = Layerwise(model, [Batch.of(rows_of(2), torch.device("cpu"))])
    layerwise.begin()
    return writers_of(layerwise, 0, layerwise.states[0][:1, : layerwise.probe.ids.shape[1]])


def test_what_no_linear_map_writes_is_refused() -> None:
    whole = model_of("bert", is_decoder=True)
    student = student_of(whole)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ModelError, match=r"bert: layer 1 .*not what linear maps write"):
        refit(student, whole, PLAN, rows_of(10))
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


# --- experts --------------------------------------------------------------------------------------------------------


def _stages(model: Any, place: int = 1) -> tuple[Stage, ...]:
    layerwise = Layerwise(model, [Batch.of(rows_of(2), torch.device("cpu"))])
    layerwise.begin()
    for before in range(place):
        layerwise.pass_on(before)
    return stages_of(layerwise, place, layerwise.states[0][:1, : layerwise.probe.ids.shape[1]])


def shared_of(kind: str) -> tuple[str, list[str], bool]:
    """The last stage of a layer."""
    small = dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank"), 8)
    experts = {"n_shared_experts": 1, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    model = model_of(kind, moe_intermediate_size=24, first_k_dense_replace=1, **experts, **small)
    stage = _stages(model)[-1]
    return stage.path, [writer.path for writer in stage.writers], stage.complete


def test_experts_are_a_stage_with_what_stands_beside_them() -> None:
    plain, routed = _stages(model_of("mixtral"))
    assert plain.plain and plain.writers[0].path == "self_attn.o_proj"
    assert routed.plain and routed.writers == (Writer("mlp.experts", "", 1.0, experts=32),)
    assert shared_of("deepseek_v3") == ("mlp", ["mlp.experts", "mlp.shared_experts.down_proj"], True)
    _, shared = _stages(model_of("qwen2_moe", shared_expert_intermediate_size=48, moe_intermediate_size=24))
    assert shared.path == "mlp" and [writer.path for writer in shared.writers] == ["mlp.experts"] and not shared.plain


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_what_enters_an_experts_last_projection_is_asked_of_it(kind: str) -> None:
    """Mixtral stores outputs first; GPT-OSS inputs first, with biases, and square here."""
    whole = model_of(kind, **({"intermediate_size": 32} if kind == "gpt_oss" else {}))
    module = whole.model.layers[1].mlp.experts
    experts, tokens = Experts(module, 32), torch.randn(7, 32)
    untouched = copy.deepcopy(module.state_dict())
    chosen = torch.tensor([[0, 1]] * 4 + [[3, 2]] * 3)
    weights = torch.rand(7, 2)
    with torch.no_grad():
        wanted = module(tokens, chosen, weights)
        made = torch.zeros(7, 32)
        for number in range(4):
            inner, weight = experts.entering(number, tokens), experts.weight_of(number).float()
            alone = inner @ weight[: experts.inner] + (weight[-1] if experts.bias else 0)
            made += alone * (weights * (chosen == number)).sum(1, keepdim=True)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(untouched[name], value) for name, value in module.state_dict().items())


def test_each_expert_is_the_regression_on_the_tokens_that_go_to_it_and_rare_ones_stay_near() -> None:
    """Against float64 least squares; an expert that no token goes to is left as it was, bit for bit."""
    whole = model_of("mixtral")
    module = whole.model.layers[1].mlp.experts
    experts, generator = Experts(module, 32), torch.Generator().manual_seed(1)
    tokens = torch.randn(300, 32, generator=generator)
    chosen = torch.tensor([[0, 1]] * 297 + [[1, 2]] * 3)
    weights = torch.rand(300, 2, generator=generator) + 0.1
    values = packed((tokens, chosen, weights))
    assert values is not None
    with torch.no_grad():
        wanted = experts(values) + torch.randn(300, 32, generator=generator)
        old = [experts.weight_of(number) for number in range(4)]
        inner = [experts.entering(number, tokens).double() for number in range(4)]
        missing = (wanted - experts(values)).double() / weights.double().sum(1, keepdim=True)
        # What is held out is what is fitted, so that every ridge is better than none.
        solver = ExpertsSolver(experts, lambda held: iter([(values, wanted)]), [1e-2])
        form, ridge, before, after, counted = solver.solve()
    assert (form, ridge, counted) == ("around", 1e-2, 600) and after < before
    routed = [(chosen == number).nonzero(as_tuple=True) for number in range(4)]
    rows = [(inner[n] * 1)[r] * weights.double()[r, c, None] for n, (r, c) in enumerate(routed)]
    scale = sum(float(each.square().sum()) / 48 for each in rows) / 4
    moved = []
    for number, (r, c) in enumerate(routed):
        weigh = weights.double()[r, c, None]
        target = missing[r] * weigh
        pull = (1e-2 * 2 * scale) ** 0.5 * torch.eye(48, dtype=torch.float64)
        twice = torch.cat([rows[number], rows[number], pull])
        zeros = torch.zeros(48, 32, dtype=torch.float64)
        change = torch.linalg.lstsq(twice, torch.cat([target, target, zeros])).solution
        torch.testing.assert_close(experts.weight_of(number), old[number] + change, atol=1e-4, rtol=1e-3)
        moved.append(float(change.norm() / old[number].norm()))
        assert len(weigh) == len(r)
    assert moved[2] < 0.6 * moved[0] and moved[3] == 0 and torch.equal(experts.weight_of(3), old[3])


# --- the refit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_a_planted_linear_change_is_recovered(kind: str) -> None:
    """The layers that go do nothing, so that the whole model's own weight is the answer to one that was spoilt."""
    whole = model_of(kind)
    for layer in PLAN.dropped:
        for writer in _writers(whole):
            linear = writer.linear(Layerwise(whole, [Batch.of(rows_of(1), torch.device("cpu"))]).layers[layer])
            torch.nn.init.zeros_(linear.weight)
            if linear.bias is not None:
                torch.nn.init.zeros_(linear.bias)
    student = student_of(whole)
    last = _writers(whole)[-1]
    layers = Layerwise(student, [Batch.of(rows_of(1), torch.device("cpu"))]).layers
    spoilt = last.linear(layers[1])
    true = spoilt.weight.detach().clone()
    with torch.no_grad():
        spoilt.weight += 0.1 * torch.randn(spoilt.weight.shape, generator=torch.Generator().manual_seed(1))

    report = refit(student, whole, PLAN, rows_of(60), Refit(ridges="1e-8", until_layer=1))

    assert report.projections[-1].before > 0.05
    assert report.projections[-1].after < 1e-6
    torch.testing.assert_close(spoilt.weight.detach(), true, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_infinite_ridge_leaves_every_weight_as_it_is(kind: str) -> None:
    whole = model_of(kind)
    student = student_of(whole)
    before = copy.deepcopy(student.state_dict())
    report = refit(student, whole, PLAN, rows_of(10), Refit(ridges="inf"))
    assert {done.form for done in report.projections} == {"keep"}
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_refit_is_the_regression_on_every_token_that_is_no_padding(kind: str) -> None:
    """Against float64 least squares on samples that went through the models one by one."""
    whole = model_of(kind)
    student, rows = student_of(whole), rows_of(60)
    untouched = copy.deepcopy(student)
    report = refit(student, whole, PLAN, rows, Refit(ridges="1e-2", what="down", until_layer=1))
    (done,) = report.projections
    assert done.tokens == sum(map(len, rows))
    assert done.form in ("around", "zero")

    layers = (lambda m: m.model.layers) if kind == "llama" else (lambda m: m.transformer.h)
    linear = (lambda m: layers(m)[1].mlp.down_proj) if kind == "llama" else (lambda m: layers(m)[1].mlp.c_proj)
    entered: list[Tensor] = []
    written: list[Tensor] = []
    left: list[Tensor] = []
    targets: list[Tensor] = []
    hooks = [
        linear(untouched).register_forward_hook(lambda _, args, out: entered.append(args[0][0]) or written.append(out)),
        layers(untouched)[1].register_forward_hook(lambda _, args, out: left.append(_state(out)[0])),
        layers(whole)[4].register_forward_pre_hook(lambda _, args: targets.append(args[0][0])),
    ]
    with torch.no_grad():
        for row in rows:
            ids = torch.from_numpy(row.astype(np.int64))[None]
            untouched(input_ids=ids)
            whole(input_ids=ids)
    for hook in hooks:
        hook.remove()
    inputs = torch.cat(entered).double()
    wanted = (torch.cat(targets) - torch.cat(left)).double() + torch.cat([out[0] for out in written]).double()
    pull = (1e-2 * inputs.square().sum() / inputs.shape[1]).sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)
    if kind == "gpt2":
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        pull = torch.nn.functional.pad(pull, (0, 1))
    old = _as_solved(linear(untouched), kind)
    start = old if done.form == "around" else torch.zeros_like(old)
    expected = torch.linalg.lstsq(torch.cat([inputs, pull]), torch.cat([wanted, pull @ start])).solution
    torch.testing.assert_close(_as_solved(linear(student), kind), expected, atol=1e-5, rtol=1e-4)


def _state(output: Any) -> Tensor:
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


def _as_solved(linear: Any, kind: str) -> Tensor:
    weight: Tensor = linear.weight.detach().double()
    return torch.cat([weight, linear.bias.detach().double()[None]]) if kind == "gpt2" else weight.T


@pytest.mark.parametrize(
    "kind",
    [
        *("llama", "gpt2", "gpt_neox", "phi", "gemma2", "gemma3_text", "olmo2", "opt", "mamba", "mixtral"),
        pytest.param("qwen2_moe", marks=pytest.mark.slow),
    ],
)
def test_the_last_states_come_nearer_to_the_whole_models_on_other_text(kind: str) -> None:
    whole = model_of(kind)
    student, other = student_of(whole), rows_of(20, seed=1)
    target, before = last_states(whole, other), last_states(student, other)
    report = refit(student, whole, PLAN, rows_of(100))
    after = last_states(student, other)
    assert (after - target).square().sum() < 0.97 * (before - target).square().sum()
    assert all(done.after <= done.before for done in report.projections)
    assert report.to_data()["tokens"] == sum(map(len, rows_of(100)))


def test_inputs_that_do_not_fit_in_memory_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model_of("gemma2")
    kept, again = student_of(whole), student_of(whole)
    refit(kept, whole, PLAN, rows_of(20))
    monkeypatch.setattr("lmprune.healing.refitting.KEPT_BYTES", 0)
    refit(again, whole, PLAN, rows_of(20))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in kept.state_dict().items())


def test_layers_may_go_at_either_end() -> None:
    whole = model_of("llama")
    for plan in (Plan(LAYERS, (0,)), Plan(LAYERS, (5,)), Plan(LAYERS, (1, 4))):
        student = student_of(whole, plan)
        report = refit(student, whole, plan, rows_of(60))
        assert report.projections[0].after < report.projections[0].before


def test_a_student_that_was_trained_is_not_taken_for_the_whole_model() -> None:
    whole = model_of("llama")
    student = student_of(whole)
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight *= 0.5
    target, before = last_states(whole, rows_of(20, seed=1)), last_states(student, rows_of(20, seed=1))
    report = refit(student, whole, PLAN, rows_of(100))
    assert report.projections[0].before > 0
    after = last_states(student, rows_of(20, seed=1))
    assert (after - target).square().sum() < (before - target).square().sum()


@pytest.mark.parametrize(("count", "dropped"), [(10, (2, 3)), (40, (4, 5, 6))])
def test_it_ends_once_two_layers_in_a_row_gain_nothing(count: int, dropped: tuple[int, ...]) -> None:
    whole, rows = model_of("llama", num_hidden_layers=12), rows_of(count)
    plan = Plan(12, dropped)
    ended, bounded, further = (student_of(whole, plan) for _ in range(3))
    gained = _gains(refit(ended, whole, plan, rows))
    *_, third, second, last = gained
    assert gained[third] and not gained[second] and not gained[last] and last < 9
    refit(bounded, whole, plan, rows, Refit(last_for="states", until_layer=last))
    assert all(torch.equal(value, bounded.state_dict()[name]) for name, value in ended.state_dict().items())
    # It is no matter of where the model ends.
    assert [*_gains(refit(further, whole, plan, rows, Refit(last_for="states", until_layer=11)))][-1] == 11


def _gains(report: RefitReport) -> dict[int, bool]:
    """By layer, whether what any of its weights writes is nearer by more than a hundredth."""
    found: dict[int, bool] = {}
    for done in report.projections:
        found[done.layer] = found.get(done.layer, False) or done.after < 0.99 * done.before
    return found


def test_too_few_tokens_are_said() -> None:
    whole = model_of("llama")
    report = refit(student_of(whole), whole, PLAN, [*rows_of(1), np.arange(3, 8, dtype=np.int32)])
    assert report.notes == ("25 tokens for the 48 inputs of mlp.down_proj: the ridge carries it; 192 would do",)
    enough = refit(student_of(whole), whole, PLAN, [np.arange(3, 51, dtype=np.int32)] * 4)
    assert enough.tokens == 192 and enough.notes == ()


def test_bad_input_is_one_line() -> None:
    whole = model_of("llama")
    with pytest.raises(DataError, match="at least 2 samples"):
        refit(student_of(whole), whole, PLAN, rows_of(1))
    with pytest.raises(UsageError, match="--until-layer 0: this cut is refitted from layer 1 to 5"):
        refit(student_of(whole), whole, PLAN, rows_of(2), Refit(until_layer=0))
    with pytest.raises(UsageError, match="drops no layer"):
        refit(copy.deepcopy(whole), whole, Plan(LAYERS), rows_of(2))
    with pytest.raises(UsageError, match="--ridges"):
        Refit(ridges="small").check("refit")
    with pytest.raises(UsageError, match="--what"):
        Refit(what="up").check("refit")


# --- ReplaceMe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_replaceme_folds_the_least_squares_map_into_the_projection_before_the_cut(kind: str) -> None:
    whole = model_of(kind)
    student = student_of(whole)
    old = copy.deepcopy(student)
    report = replaceme(student, whole, PLAN, rows_of(60))
    (done,) = report.projections
    assert done.after < done.before
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, old.state_dict()[name])]
    assert all(".1.mlp." in name for name in changed)
    linear = "model.layers.1.mlp.down_proj" if kind == "llama" else "transformer.h.1.mlp.c_proj"
    new, before = (_as_solved(model.get_submodule(linear), kind) for model in (student, old))
    folded = torch.linalg.lstsq(before, new).solution  # what the old output is multiplied by
    torch.testing.assert_close(before @ folded, new, atol=1e-4, rtol=1e-4)
    target, other = last_states(whole, rows_of(20, seed=1)), rows_of(20, seed=1)
    after, cut = last_states(student, other), last_states(old, other)
    assert (after - target).square().sum() < (cut - target).square().sum()


def test_replaceme_refuses_what_it_cannot_fold() -> None:
    whole = model_of("llama")
    with pytest.raises(PlanError, match="starts at layer 0"):
        replaceme(student_of(whole, Plan(LAYERS, (0, 3))), whole, Plan(LAYERS, (0, 3)), rows_of(10))
    whole = model_of("gemma2")
    with pytest.raises(ModelError, match=r"a norm follows mlp\.down_proj"):
        replaceme(student_of(whole), whole, PLAN, rows_of(10))


# --- one layer at a time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["llama", "gpt_oss", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt2", "gemma3_text"))]
)
def test_a_repair_that_reads_one_layer_at_a_time_is_that_in_memory(kind: str, tmp_path: Any) -> None:
    """To the bit, with states that wait on disk; and what is written is what was solved."""
    from lmprune.healing.one_by_one import one_by_one, streamed_losses, write_changed
    from lmprune.models.locate import ModelFolder

    whole = model_of(kind, **({"initializer_range": 0.2} if kind == "gpt_oss" else {}))
    whole.save_pretrained(tmp_path / "whole")
    base = open_cut(tmp_path / "whole")
    cut = base.without(PLAN, "cut")
    student, kept = student_of(whole), Kept(tmp_path / "solved")
    options, rows = Refit(ridges="1e-2"), rows_of(40)
    memory = refit(student, whole, PLAN, rows, options)
    streamed = refit(one_by_one(cut, "cpu"), one_by_one(base, "cpu"), PLAN, rows, options, kept=kept)
    assert streamed.projections == memory.projections and streamed.passes <= 3
    (tmp_path / "out").mkdir()
    write_changed(cut, kept, tmp_path / "out")
    out = ModelFolder(tmp_path / "out", str(tmp_path / "out"))
    again = Cut(out).load(dtype="float32")
    assert again.state_dict().keys() == student.state_dict().keys()
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())
    held_out = np.stack([row[:20] for row in rows_of(6, seed=3)])
    loss = held_out_loss(again, held_out, batch=4)
    assert float(streamed_losses(Cut(out), held_out, "cpu", batch=4).mean()[0]) == pytest.approx(loss, rel=1e-6)
    assert not list((tmp_path / "solved" / "states").iterdir())


def test_a_killed_repair_goes_on_after_its_last_layer(tmp_path: Any, monkeypatch: Any) -> None:
    from lmprune.healing import refitting

    whole, rows = model_of("llama"), rows_of(60)
    straight, killed = student_of(whole), student_of(whole)
    wanted = refit(straight, whole, PLAN, rows, Refit())
    solved: list[int] = []
    solve_one = refitting._Refit._projection

    def dies(self: Any, layer: int, *more: Any, **how: Any) -> Any:
        if layer == 5:
            raise KeyboardInterrupt
        solved.append(layer)
        return solve_one(self, layer, *more, **how)

    with monkeypatch.context() as patched:
        patched.setattr(refitting._Refit, "_projection", dies)
        with pytest.raises(KeyboardInterrupt):
            refit(killed, whole, PLAN, rows, Refit(), kept=Kept(tmp_path))
    assert set(solved) == {1, 4}
    monkeypatch.setattr(refitting._Refit, "_projection", lambda *a, **how: solved.append(a[1]) or solve_one(*a, **how))
    again = student_of(whole)
    report = refit(again, whole, PLAN, rows, Refit(), kept=Kept(tmp_path))
    assert set(solved[3:]) == {5}
    assert report.projections == wanted.projections
    assert all(torch.equal(value, straight.state_dict()[name]) for name, value in again.state_dict().items())


def test_states_wait_on_disk_as_they_are(tmp_path: Any) -> None:
    shelf = OnDisk(tmp_path)
    tensors = [torch.randn(2, 3, 4), torch.randn(1, 5, 4).bfloat16()]
    for tensor in tensors:
        shelf.append(tensor)
    shelf[0] = tensors[0] + 1
    assert len(shelf) == 2 and all(map(torch.equal, shelf, [tensors[0] + 1, tensors[1]]))
    del shelf
    assert not list(tmp_path.iterdir())


# --- LaCo and LLM-Streamline ----------------------------------------------------------------------------------------


def test_laco_is_the_papers_formula_or_what_its_code_does() -> None:
    """Four layers of one number each, 10, 11, 13 and 17, of which three go: 10 + 1 + 3 + 7 = 21; the code gives 17."""
    for rule, wanted in (("formula", 21.0), ("code", 17.0)):
        into = {"w": torch.full((1, 1), 10.0)}
        merge(into, [{"w": torch.full((1, 1), number)} for number in (11.0, 13.0, 17.0)], rule, "layers")
        assert float(into["w"]) == wanted
    with pytest.raises(ModelError, match="layers are of several kinds"):
        merge({"w": torch.zeros(1, 2)}, [{"w": torch.zeros(1, 3)}], "formula", "layers")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_laco_changes_the_linear_maps_before_the_cut_and_nothing_else(kind: str) -> None:
    whole = model_of(kind)
    student = student_of(whole)
    before = copy.deepcopy(student.state_dict())
    blocks = np.zeros((0, 8), dtype=np.int32)
    noted = Laco().repair(Repair(student, whole, PLAN, blocks, blocks))
    assert noted == {"merged": [{"into": 1, "layers": [2, 3]}]}
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(".1." in name and "norm" not in name and "ln_" not in name for name in changed)
    name = min(changed)
    old, gone = before[name], [whole.state_dict()[name.replace(".1.", f".{n}.")] for n in (2, 3)]
    torch.testing.assert_close(student.state_dict()[name], old + (gone[0] - old) + (gone[1] - old))
    with pytest.raises(UsageError, match="starts at layer 0"):
        Laco().check_model(student, Plan(LAYERS, (0, 1)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_streamline_trains_one_layer_to_stand_for_its_block(kind: str) -> None:
    whole = model_of(kind)
    student = student_of(whole)
    before = copy.deepcopy(student.state_dict())
    noted = Streamline(layer_epochs=15, layer_batch_size=4).repair(
        Repair(student, whole, PLAN, [row[:20] for row in rows_of(40)], np.zeros((0, 8), dtype=np.int32))
    )
    (layer,) = noted["layers"]
    assert layer["layer"] == 1 and layer["stands_for"] == [1, 2, 3] and layer["after"] < 0.9 * layer["before"]
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and all(".1." in name for name in changed)
    rows = rows_of(20, seed=1)
    wanted, cut = _entering(whole, 4, rows), student_of(whole)
    assert (_entering(student, 2, rows) - wanted).norm() < (_entering(cut, 2, rows) - wanted).norm()
    with pytest.raises(UsageError, match="starts at layer 0"):
        Streamline().check_model(student, Plan(LAYERS, (0, 1)))


# --- the demo model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Blocks]:
    """The demo model and about 15,000 tokens of its text."""
    cut = open_cut("demo")
    tokenizer = cut.tokenizer()
    held_out = read_held_out(DataSettings(), tokenizer, blocks=32, length=256, default="demo")
    blocks = read_blocks(DataSettings(), tokenizer, held_out, train=59, length=256, seed=0, default="demo")
    return cut.load(dtype="float32"), blocks


@pytest.mark.slow
@pytest.mark.parametrize(("dropped", "share"), [((2, 3, 4), 0.80), ((4, 7, 9), 0.90)])
def test_the_demos_gap_is_closed(demo: tuple[Any, Blocks], dropped: tuple[int, ...], share: float) -> None:
    whole, blocks = demo
    plan = Plan(12, dropped)
    student = student_of(whole, plan)
    original, pruned = (held_out_loss(model, blocks.held_out, batch=8) for model in (whole, student))
    refit(student, whole, plan, blocks.train, Refit())
    repaired = held_out_loss(student, blocks.held_out, batch=8)
    assert (pruned - repaired) / (pruned - original) > share


# --- as methods of `lmprune heal` -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "closed"), [("refit", 0.5), ("replaceme", 0.3), ("scalar", 0.0)])
def test_a_repair_writes_a_plain_checkpoint(method: str, closed: float, tmp_path: Any) -> None:
    import json

    import lmprune

    lmprune.write_recipe("demo", lmprune.Plan(12, (2, 3, 4)), tmp_path / "cut.yml")
    settings = lmprune.HealSettings(method=method, fit_blocks=16, eval_blocks=8)
    done = lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", settings)
    assert done.original < done.healed < done.pruned and done.gap_closed > closed and done.steps == 0
    told = json.loads((tmp_path / "out" / "lmprune.json").read_text())["healing"]
    assert told["repair"] and told["merged_distance"] <= told["tolerance"] and told["data"]["train_blocks"] == 16
    # What was written is what was measured: any runtime loads it.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    assert model.config.num_hidden_layers == 9


@pytest.mark.slow
def test_a_repair_that_does_not_help_is_not_written(tmp_path: Any) -> None:
    import lmprune

    lmprune.write_recipe("demo", lmprune.Plan(12, (4, 7, 9)), tmp_path / "cut.yml")
    with pytest.raises(lmprune.LmpruneError, match="scalar does not help this cut: held-out loss"):
        lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", lmprune.HealSettings(method="scalar", eval_blocks=32))
    assert not (tmp_path / "out").exists()
    lmprune.write_recipe("demo", lmprune.Plan(12, (0, 1)), tmp_path / "first.yml")
    with pytest.raises(UsageError, match="starts at layer 0"):
        lmprune.heal(tmp_path / "first.yml", tmp_path / "out", lmprune.HealSettings(method="replaceme"))


def test_a_repair_comes_before_training_and_each_part_is_told(tmp_path: Any) -> None:
    import json

    import lmprune

    lmprune.write_recipe("demo", lmprune.Plan(12, (2, 3, 4)), tmp_path / "cut.yml")
    small = {"max_length": 64, "eval_blocks": 8, "fit_blocks": 32}
    settings = lmprune.HealSettings(method="refit+full", steps=2, batch_size=4, **small)
    done = lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", settings)
    assert done.method == "refit+full" and done.steps == 2
    assert done.original < done.healed < done.repaired < done.pruned
    assert 0.2 < done.repair_closed < done.gap_closed
    told = json.loads((tmp_path / "out" / "lmprune.json").read_text())
    first = told["healing"]["first"]
    assert (
        first["repair"]["projections"] and first["losses"]["healed"] == done.repaired and told["dropped"] == [2, 3, 4]
    )
    # The repair is that of `--method refit` on the same text.
    alone = lmprune.heal(tmp_path / "cut.yml", tmp_path / "alone", lmprune.HealSettings(method="refit", **small))
    assert alone.healed == done.repaired


def test_a_run_killed_after_its_repair_trains_from_what_was_repaired(tmp_path: Any, monkeypatch: Any) -> None:
    import lmprune
    from lmprune.healing import learning

    lmprune.write_recipe("demo", lmprune.Plan(12, (2, 3, 4)), tmp_path / "cut.yml")
    settings = lmprune.HealSettings(
        method="refit+last-layers", last=1, steps=2, batch_size=2, max_length=64, eval_blocks=8, fit_blocks=16
    )

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(learning.Learning, "_trained", killed)
        with pytest.raises(KeyboardInterrupt):
            lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", settings)
    monkeypatch.setattr(learning.Learning, "_repaired", killed)
    done = lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", settings)
    assert done.steps == 2 and done.repaired < done.pruned
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_heal_goes_on_from_the_layer_where_it_was(tmp_path: Any, monkeypatch: Any, stream: bool) -> None:
    import json

    import lmprune
    from lmprune.healing import refitting
    from lmprune.sharing.telling import _healing

    lmprune.write_recipe("demo", lmprune.Plan(12, (2, 3, 4)), tmp_path / "cut.yml")
    small = {
        "method": "refit",
        "fit_blocks": 16,
        "eval_blocks": 4,
        "max_length": 64,
        "ridges": "1e-2",
        "dtype": "float32",
    }
    settings = lmprune.HealSettings(**small, stream=stream)
    seen: list[int] = []
    solve_one = refitting._Refit._projection

    def watched(self: Any, layer: int, *more: Any) -> Any:
        if layer == 6 and 5 in seen and 6 not in seen:
            seen.append(6)
            raise KeyboardInterrupt
        seen.append(layer)
        return solve_one(self, layer, *more)

    monkeypatch.setattr(refitting._Refit, "_projection", watched)
    with pytest.raises(KeyboardInterrupt):
        lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    before = len(seen)
    done = lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", settings)
    assert min(seen[before:]) == 6
    straight = lmprune.heal(tmp_path / "cut.yml", tmp_path / "straight", lmprune.HealSettings(**small, stream=False))
    assert done.healed == pytest.approx(straight.healed, abs=1e-6)
    ours, theirs = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "straight"))
    assert ours[ours.index(b"}}") + 2 :].strip() == theirs[theirs.index(b"}}") + 2 :].strip() or stream
    told = json.loads((tmp_path / "out" / "lmprune.json").read_text())["healing"]
    assert told["repair"]["passes"] <= 3 and told["repair"]["tokens"] == 16 * 64
    lines = _healing(told)
    assert (
        lines[0] == "refit, quick" and "of the gap closed" in lines[1] and lines[2].startswith("fitted on 1024 tokens")
    )
    assert any("ridge 0.01" in line for line in lines[3:])


def test_what_cannot_be_repaired_is_one_line_and_leaves_nothing(tmp_path: Any) -> None:
    import json
    import shutil

    import lmprune
    from lmprune.models.locate import demo_folder

    lmprune.write_recipe("demo", lmprune.Plan(12, (2, 3, 4)), tmp_path / "cut.yml")
    for given, said in (
        ({"method": "lora", "stream": True}, "--stream: --method lora needs the whole model"),
        ({"method": "refit", "stream": True, "as_adapter": 4}, "--stream writes a checkpoint"),
        ({"method": "laco", "merge_rule": "sum"}, "--merge-rule 'sum'"),
        ({"method": "streamline", "layer_epochs": 0}, "--layer-epochs 0"),
    ):
        with pytest.raises(UsageError, match=said):
            lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", lmprune.HealSettings(**given))
    shutil.copytree(demo_folder(), tmp_path / "few")
    config = json.loads((tmp_path / "few" / "config.json").read_text())
    few = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "few" / "config.json").write_text(json.dumps(few))
    lmprune.write_recipe(tmp_path / "few", lmprune.Plan(12, (2, 3, 4)), tmp_path / "few.yml")
    with pytest.raises(UsageError, match=r"stored in few bits\. Repair the unquantised model"):
        lmprune.heal(tmp_path / "few.yml", tmp_path / "out", lmprune.HealSettings(method="refit"))
    lmprune.write_recipe("demo", lmprune.Plan(12, (0, 1)), tmp_path / "first.yml")
    for method in ("laco", "streamline"):
        with pytest.raises(UsageError, match="starts at layer 0"):
            lmprune.heal(tmp_path / "first.yml", tmp_path / "out", lmprune.HealSettings(method=method))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_of_full_rank_is_the_repair(kind: str, tmp_path: Any) -> None:
    from lmprune.models.adapters import attach_adapter

    whole = model_of(kind)
    cut, repaired = student_of(whole), student_of(whole)
    paths = ("model.layers.1.mlp.down_proj",) if kind == "llama" else ("transformer.h.1.mlp.c_proj",)
    with torch.no_grad():
        for path in paths:
            weight = repaired.get_submodule(path).weight
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(3, 23)[None]
    shares, apart = [], []
    for rank in (1, 8, 32):
        shares.append(write_low_rank(repaired, copy.deepcopy(cut), rank, tmp_path / str(rank)))
        attached = attach_adapter(copy.deepcopy(cut), str(tmp_path / str(rank)), tmp_path)
        with torch.no_grad():
            apart.append(float((attached(ids).logits - repaired(ids).logits).abs().max()))
    assert shares == sorted(shares) and shares[0] < 0.5 and shares[-1] == pytest.approx(1)
    assert apart[0] > 0.01 and apart[-1] < 1e-4


def test_what_no_adapter_holds_is_said(tmp_path: Any) -> None:
    whole = model_of("llama")
    cut, repaired = student_of(whole), student_of(whole)
    with pytest.raises(UsageError, match="changes nothing"):
        write_low_rank(repaired, cut, 4, tmp_path / "a")
    with torch.no_grad():
        repaired.model.norm.weight += 1
    with pytest.raises(ModelError, match=r"changes model\.norm\.weight, which no LoRA holds"):
        write_low_rank(repaired, cut, 4, tmp_path / "a")


def test_a_repair_is_written_as_an_adapter_for_its_recipe(tmp_path: Any) -> None:
    import json

    import lmprune

    lmprune.write_recipe("demo", lmprune.Plan(12, (2, 3, 4)), tmp_path / "cut.yml")
    settings = lmprune.HealSettings(
        method="refit", as_adapter=16, fit_blocks=16, eval_blocks=8, max_length=64, dtype="float32"
    )
    done = lmprune.heal(tmp_path / "cut.yml", tmp_path / "out", settings)
    told = json.loads((tmp_path / "out" / "lmprune.json").read_text())["healing"]["adapter"]
    assert told["rank"] == 16 and 0.2 < told["kept"] < 1 and done.healed < done.pruned
    assert not (tmp_path / "out" / "model.safetensors").exists()
    opened = lmprune.open_cut(f"{tmp_path / 'cut.yml'}+{tmp_path / 'out'}")
    held_out = read_held_out(DataSettings(), opened.tokenizer(), blocks=8, length=64, default="demo")
    assert held_out_loss(opened.load(dtype="float32"), held_out.blocks, batch=8) == pytest.approx(done.healed, abs=1e-4)
    with pytest.raises(UsageError, match="--as-adapter: --method lora trains"):
        lmprune.heal(tmp_path / "cut.yml", tmp_path / "b", lmprune.HealSettings(method="lora", as_adapter=4))
