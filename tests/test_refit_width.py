"""Neurons, directions and layers that go together, and what is left solved anew in one pass."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from toys import LAYERS, VOCABULARY, model_of

from lmprune.budgeting.lab import own_tensors
from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError, UsageError
from lmprune.forward.batches import Batch
from lmprune.forward.experts import packed
from lmprune.forward.views import pruned_view
from lmprune.healing.methods.refit import Refit
from lmprune.healing.methods.replaceme import ReplaceMe
from lmprune.healing.methods.scalar import Scalar
from lmprune.healing.readers import is_tied
from lmprune.healing.refitting import HELD, RefitReport
from lmprune.healing.refitting import refit as solve_all
from lmprune.models.width import Slicing, live_source, width_of
from lmprune.narrowing import WIDTHS
from lmprune.narrowing import orders as orders_module
from lmprune.narrowing.elimination import eliminate
from lmprune.narrowing.moments import grams, places_of
from lmprune.narrowing.orders import check_neurons, directions, neuron_orders

pytestmark = pytest.mark.usefixtures("one_thread")
NEURONS = 48
"""Of an MLP, and of an expert."""


def rows_of(count: int, seed: int = 0, length: int = 32) -> list[NDArray[np.int32]]:
    return list(np.random.default_rng(seed).integers(3, VOCABULARY, (count, length), dtype=np.int32))


def batches_of(rows: list[NDArray[np.int32]]) -> list[Batch]:
    return [Batch.of(rows[at : at + 16], torch.device("cpu")) for at in range(0, len(rows), 16)]


def plan_of(whole: Any, rows: Any, *, dropped: tuple[int, ...] = (), ffn: int = 0, hidden: int = 0) -> Plan:
    tensors: dict[str, Tensor] = {}
    if ffn:
        orders = neuron_orders(whole, batches_of(rows), WIDTHS["ffn"])
        tensors |= {each.name: each.kept(Fraction(ffn, NEURONS)) for each in orders if each.layer not in dropped}
    if hidden:
        tensors["rotation"] = directions(whole, batches_of(rows)).directions[:, :hidden].float()
    return Plan(LAYERS, dropped, (width_of(tensors, ffn=ffn or None, hidden=hidden or None),))


def student_of(whole: Any, plan: Plan) -> Any:
    return own_tensors(pruned_view(whole, plan), whole).eval()


def refit(student: Any, whole: Any, plan: Plan, rows: Any, ridges: str = "1e-4,1e-3,1e-2") -> RefitReport:
    return solve_all(student, whole, plan, rows, Refit(ridges=ridges))


def logits_of(model: Any, rows: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(np.stack(rows)).long()).logits


# --- what goes first ------------------------------------------------------------------------------------------------


def test_dead_neurons_go_first_and_cost_nothing() -> None:
    whole, rows = model_of("llama"), rows_of(24)
    for number, layer in enumerate(whole.model.layers):
        layer.mlp.down_proj.weight.data[:, [number, 20 + number]] = 0
    for found in neuron_orders(whole, batches_of(rows), WIDTHS["ffn"]):
        assert set(found.orders[0].units[:2].tolist()) == {found.layer, 20 + found.layer}
    student = student_of(whole, plan_of(whole, rows, ffn=46))
    torch.testing.assert_close(logits_of(student, rows[:4]), logits_of(whole, rows[:4]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_directions_that_nothing_uses_go_first_and_cost_nothing(tied: bool) -> None:
    whole, rows = model_of("llama", tie_word_embeddings=tied), rows_of(24)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0]
    keep = basis[:, 4:] @ basis[:, 4:].T  # four directions are never written to
    with torch.no_grad():
        whole.model.embed_tokens.weight.copy_(whole.model.embed_tokens.weight @ keep)
        for layer in whole.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(keep @ writer.weight)
    found = directions(whole, batches_of(rows))
    assert found.kept(28) == pytest.approx(1, abs=1e-6) and found.kept(27) < 1 - 1e-5
    student = student_of(whole, plan_of(whole, rows, hidden=28))
    torch.testing.assert_close(logits_of(student, rows[:4]), logits_of(whole, rows[:4]), rtol=1e-3, atol=2e-3)


def test_a_duplicate_neuron_costs_nothing_after_the_refit() -> None:
    whole, rows = model_of("llama"), rows_of(64)
    for layer in whole.model.layers:
        for reader in (layer.mlp.gate_proj, layer.mlp.up_proj):
            reader.weight.data[7] = reader.weight.data[3]
    plan = plan_of(whole, rows, ffn=47)
    student = student_of(whole, plan)
    wanted = logits_of(whole, rows[:4])
    before = float((logits_of(student, rows[:4]) - wanted).norm() / wanted.norm())
    refit(student, whole, plan, rows, "1e-8,1e-6")
    after = float((logits_of(student, rows[:4]) - wanted).norm() / wanted.norm())
    assert before > 0.02 and after < 1e-3


# --- experts --------------------------------------------------------------------------------------------------------

EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "gpt_oss": {"sliding_window": 8},  # inputs first, halves that take turns, biases
    "deepseek_v3": {
        **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8), "q_lora_rank": None,
        **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1), "moe_intermediate_size": NEURONS,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPERTS)
def test_each_expert_loses_neurons_of_its_own(kind: str) -> None:
    """Planted: four neurons of each that nobody hears, others in each; without them the model is the whole."""
    whole, rows = model_of(kind, **EXPERTS[kind]), rows_of(24)
    planted: dict[str, list[set[int]]] = {}
    for number, layer in enumerate(whole.model.layers):
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            layer.mlp.down_proj.weight.data[:, [number, 20 + number, 30, 31]] = 0
            continue
        planted[f"neurons.{number}"] = [{3 * expert + number, 30 + expert, 40, 41 + expert} for expert in range(4)]
        for expert, gone in enumerate(planted[f"neurons.{number}"]):
            one = experts.down_proj.data[expert]
            one[(sorted(gone), slice(None)) if kind == "gpt_oss" else (slice(None), sorted(gone))] = 0
        if hasattr(layer.mlp, "shared_experts"):
            planted[f"shared.{number}"] = [{1, 5, 60, 61, 70, 80, 90, 95}]
            layer.mlp.shared_experts.down_proj.weight.data[:, [1, 5, 60, 61, 70, 80, 90, 95]] = 0
    found = {each.name: each.orders for each in neuron_orders(whole, batches_of(rows), WIDTHS["ffn"])}
    for name, sets in planted.items():
        first = [set(order.units[: len(gone)].tolist()) for order, gone in zip(found[name], sets)]
        assert first == sets and len(found[name]) == len(sets)
    student = student_of(whole, plan_of(whole, rows, ffn=44))
    torch.testing.assert_close(logits_of(student, rows[:4]), logits_of(whole, rows[:4]), rtol=1e-4, atol=1e-4)


def test_what_enters_an_expert_is_gathered_by_what_it_weighs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Mixtral's formula, padding left out, in one pass or in as many as there are experts."""
    whole, rows = model_of("mixtral"), rows_of(5)
    rows[4] = rows[4][:20]
    experts, called = whole.model.layers[1].mlp.experts, list[Any]()
    with torch.no_grad():
        for row in rows:
            handle = experts.register_forward_pre_hook(lambda module, args: called.append([a.clone() for a in args]))
            whole(input_ids=torch.from_numpy(row).long()[None])
            handle.remove()
    wanted = torch.zeros(4, 48, 48, dtype=torch.float64)
    for tokens, chosen, weights in called:
        for expert in range(4):
            gate, up = (tokens @ experts.gate_up_proj[expert].detach().T).chunk(2, dim=-1)
            weigh = (weights * (chosen == expert)).sum(1, keepdim=True)
            inner = (torch.nn.functional.silu(gate) * up * weigh).double()
            wanted[expert] += inner.T @ inner
    for held in (1 << 30, 48 * 48 * 8):
        places = places_of(1, experts, 48, 4, held)
        assert len(places) == (1 if held > 1 << 20 else 4)
        found = list(grams(whole, [Batch.of(rows, torch.device("cpu"))], places, held=held))
        torch.testing.assert_close(torch.cat([each.gram for each in found]), wanted, rtol=1e-4, atol=1e-5)
        seen = [sum(int((chosen == expert).sum()) for _, chosen, _ in called) for expert in range(4)]
        assert [count for each in found for count in each.tokens] == seen and sum(seen) == 2 * (4 * 32 + 20)


@pytest.mark.parametrize("held", [1 << 30, 48 * 48 * 8])
def test_an_expert_that_nothing_goes_to_is_ordered_by_its_weights(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token goes to two of the four, which are gathered together, or one after the other."""
    monkeypatch.setattr(orders_module, "places_of", partial(places_of, held=held))
    whole = model_of("mixtral")
    experts, seen = whole.model.layers[2].mlp.experts, list[Tensor]()
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].clone()))
    found = list(neuron_orders(whole, batches_of(rows_of(1, length=1)), WIDTHS["ffn"]))
    handle.remove()
    orders = next(each.orders for each in found if each.name == "neurons.2")
    norms = experts.down_proj.detach().double().norm(dim=1)
    by_weights = [order.units.tolist() == norm.argsort().tolist() for order, norm in zip(orders, norms)]
    assert by_weights == [number not in seen[0] for number in range(4)]


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_narrower_experts_are_refitted(kind: str) -> None:
    whole, rows = model_of(kind, **EXPERTS[kind]), rows_of(96)
    plan = plan_of(whole, rows, ffn=24)
    student, unseen = student_of(whole, plan), rows_of(8, seed=1)
    experts = [layer.mlp.experts for layer in student.model.layers if hasattr(layer.mlp, "experts")]
    wanted, as_cut = logits_of(whole, unseen), [module.down_proj.clone() for module in experts]

    def apart() -> float:
        return float((logits_of(student, unseen) - wanted).norm())

    before = apart()
    refit(student, whole, plan, rows)
    after, solved = apart(), [module.down_proj.clone() for module in experts]
    assert after < before and not all(map(torch.equal, as_cut, solved))
    for module, weight in zip(experts, as_cut):
        module.down_proj.data.copy_(weight)
    assert after < apart()  # than with the experts as they were cut


def test_one_expert_is_an_expert_still() -> None:
    whole, rows = model_of("mixtral", num_local_experts=1, num_experts_per_tok=1), rows_of(8)
    student = student_of(whole, plan_of(whole, rows, ffn=32))
    assert student.model.layers[0].mlp.experts.down_proj.shape == (1, 32, 32)


def test_experts_that_are_called_otherwise_are_refused_in_one_line() -> None:
    whole = model_of("llama4_text", intermediate_size=48, intermediate_size_mlp=48)
    for asked in (
        lambda: list(neuron_orders(whole, batches_of(rows_of(2)), WIDTHS["ffn"])),
        lambda: check_neurons(whole, batches_of(rows_of(1))[0]),  # before a search pays for anything
    ):
        with pytest.raises(ModelError, match=r"layer \d+: its experts are called in a way .* Use --with depth"):
            asked()


def test_what_a_type_cannot_number_is_not_packed() -> None:
    numbers = torch.tensor([[256, 257]])
    tokens, weights = torch.ones(1, 4), torch.ones(1, 2)
    assert packed((tokens, numbers, weights)) is not None
    assert packed((tokens.bfloat16(), numbers, weights.bfloat16())) is None


# --- what is left ---------------------------------------------------------------------------------------------------


def test_the_greedy_remainder_is_what_the_refit_solves() -> None:
    generator = torch.Generator().manual_seed(0)
    g = (
        torch.randn(300, 20, generator=generator, dtype=torch.float64)
        @ torch.randn(20, 20, generator=generator).double()
    )
    down = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    found = eliminate(g.T @ g, down, 20, stop=12, ridge=1e-3)
    kept = sorted(set(range(20)) - set(found.order.tolist()))
    from lmprune.healing.solving import Sums, solve

    sums = Sums.empty(12, 6, bias=False).add(g[:, kept], g @ down)
    same = 1e-3 * float(g.square().sum(0).mean()) / float(g[:, kept].square().sum(0).mean())
    torch.testing.assert_close(found.left[kept], solve(sums, same))


class _Reference:
    """The same, naively: every layer in turn, all samples at once, each map by least squares of stacked rows."""

    def __init__(self, student: Any, whole: Any, plan: Plan, rows: list[NDArray[np.int32]], ridge: float) -> None:
        self.student, self.whole, self.plan, self.ridge = student, whole, plan, ridge
        held = [row for number, row in enumerate(rows) if number % HELD == HELD - 1]
        self.fit = [row for number, row in enumerate(rows) if number % HELD != HELD - 1]
        self.ids = torch.from_numpy(np.stack([*self.fit, *held])).long()
        self.first_held = len(self.fit) * self.ids.shape[1]

    def entering(self, model: Any, module: nn.Module) -> Tensor:
        found: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda module, args: found.append(args[0].detach().clone()))
        with torch.no_grad():
            model(input_ids=self.ids)
        handle.remove()
        return found[0].flatten(0, 1).double()

    def solve(self, linear: nn.Linear, inputs: Tensor, wanted: Tensor) -> None:
        old = linear.weight.detach().double().T

        def ridge(inputs: Tensor, wanted: Tensor, around: bool) -> Tensor:
            pull = (self.ridge * inputs.square().sum(0).mean()).sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)
            start = old if around else torch.zeros_like(old)
            return torch.linalg.lstsq(torch.cat([inputs, pull]), torch.cat([wanted, pull @ start])).solution

        some, rest = slice(0, self.first_held), slice(self.first_held, None)
        errors = {None: (inputs[rest] @ old - wanted[rest]).square().sum()}
        for around in (True, False):
            solution = ridge(inputs[some], wanted[some], around)
            errors[around] = (inputs[rest] @ solution - wanted[rest]).square().sum()
        best = min(errors, key=lambda form: float(errors[form].detach()))
        if best is not None:
            linear.weight.data.copy_(ridge(inputs, wanted, best).T)

    def run(self) -> None:
        (part,) = self.plan.parts
        stream = Slicing.of(part, live_source(self.whole)).writes.double()  # type: ignore[arg-type]
        kept = self.plan.kept
        for place, layer in enumerate(kept):
            ours, theirs = self.student.model.layers[place], self.whole.model.layers[layer]
            tensors = _tensors(part)
            neurons = tensors[f"neurons.{layer}"].long()
            attention = [
                (ours.self_attn.q_proj, theirs.self_attn.q_proj),
                (ours.self_attn.k_proj, theirs.self_attn.k_proj),
            ]
            attention.append((ours.self_attn.v_proj, theirs.self_attn.v_proj))
            for mine, other in attention:
                self.solve(
                    mine, self.entering(self.student, mine), self.entering(self.whole, other) @ other.weight.double().T
                )
            middle = self.entering(self.whole, theirs.post_attention_layernorm) @ stream
            self.solve(
                ours.self_attn.o_proj,
                self.entering(self.student, ours.self_attn.o_proj),
                middle - self.entering(self.student, ours),
            )
            for mine, other in ((ours.mlp.gate_proj, theirs.mlp.gate_proj), (ours.mlp.up_proj, theirs.mlp.up_proj)):
                wanted = self.entering(self.whole, other) @ other.weight.double().T[:, neurons]
                self.solve(mine, self.entering(self.student, mine), wanted)
            last = place + 1 == len(kept)
            after = self.whole.model.norm if last else self.whole.model.layers[kept[place + 1]]
            wanted = self.entering(self.whole, after) @ stream
            before = self.entering(self.student, ours.post_attention_layernorm)
            self.solve(ours.mlp.down_proj, self.entering(self.student, ours.mlp.down_proj), wanted - before)


def _tensors(part: Any) -> Any:
    from lmprune.models.width import tensors_of

    return tensors_of(part.beside)


def test_one_pass_for_layers_neurons_and_hidden_size_is_one_layer_after_the_other() -> None:
    whole, rows = model_of("llama", tie_word_embeddings=False), rows_of(20)
    plan = plan_of(whole, rows, dropped=(2,), ffn=40, hidden=24)
    together, apart = student_of(whole, plan), student_of(whole, plan)
    report = refit(together, whole, plan, rows, "1e-3")
    _Reference(apart, whole, plan, rows, 1e-3).run()
    assert {done.path for done in report.projections} >= {"self_attn.q_proj", "mlp.down_proj", "head"}
    for (name, ours), (_, theirs) in zip(together.named_parameters(), apart.named_parameters()):
        if not name.startswith("lm_head"):
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
        pytest.param("qwen2", {}, marks=pytest.mark.slow),
        pytest.param("gemma", {}, marks=pytest.mark.slow),
        pytest.param("granite", {}, marks=pytest.mark.slow),
    ],
)
def test_a_refit_brings_a_narrower_model_nearer_to_the_whole(kind: str, more: dict[str, Any]) -> None:
    whole, rows = model_of(kind, **more), rows_of(64)
    plan = plan_of(whole, rows, dropped=(3,), ffn=36, hidden=28)
    student = student_of(whole, plan)
    unseen = rows_of(8, seed=1)
    wanted = logits_of(whole, unseen).log_softmax(-1)

    def apart() -> float:
        found = logits_of(student, unseen).log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    before = apart()
    refit(student, whole, plan, rows)
    assert apart() < 0.8 * before


def test_the_last_layer_of_a_narrower_tied_model_is_solved_for_what_the_whole_says() -> None:
    """A head of its own is solved after it, so that there it stays with the states."""
    whole, rows, unseen = model_of("llama", tie_word_embeddings=True), rows_of(150), rows_of(30, seed=1)
    whole.get_input_embeddings().weight.data *= 4  # surer of what comes next than a random model is
    plan, wanted, apart = plan_of(whole, rows, ffn=36, hidden=28), logits_of(whole, unseen).log_softmax(-1), []
    for last_for in ("states", "distribution"):
        student = student_of(whole, plan)
        report = solve_all(student, whole, plan, rows, Refit(ridges="1e-3,1e-2", last_for=last_for))
        assert (report.projections[-1].form == "distribution") == (last_for == "distribution")
        apart.append(float((wanted.exp() * (wanted - logits_of(student, unseen).log_softmax(-1))).sum(-1).mean()))
    assert apart[1] < 0.99 * apart[0]
    untied = model_of("llama", tie_word_embeddings=False)
    report = refit(student_of(untied, plan_of(untied, rows, hidden=28)), untied, plan_of(untied, rows, hidden=28), rows)
    assert report.projections[-1].path == "head"


def test_the_norm_after_a_narrower_mlp_is_refitted_too() -> None:
    whole, rows = model_of("gemma3_text"), rows_of(48)
    plan = plan_of(whole, rows, ffn=36)
    student = student_of(whole, plan)
    wanted, unseen = logits_of(whole, rows_of(8, seed=1)), rows_of(8, seed=1)
    before = float((logits_of(student, unseen) - wanted).norm())
    refit(student, whole, plan, rows)
    assert float((logits_of(student, unseen) - wanted).norm()) < before


@pytest.mark.parametrize("method", [ReplaceMe(), Scalar()])
def test_other_repairs_refuse_a_narrower_stream(method: Any) -> None:
    whole, rows = model_of("llama"), rows_of(10)
    with pytest.raises(UsageError, match=r"the hidden size was cut too.*Use refit"):
        method.check_model(whole, plan_of(whole, rows, dropped=(3,), hidden=28))


@pytest.mark.parametrize(("tied", "sizes"), [(False, {"ffn": 40}), (False, {"hidden": 28}), (True, {"hidden": 28})])
def test_the_whole_is_untouched_and_lends_what_a_refit_leaves_alone(tied: bool, sizes: dict[str, int]) -> None:
    whole, rows = model_of("llama", tie_word_embeddings=tied), rows_of(20)
    plan = plan_of(whole, rows, **sizes)
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    student = student_of(whole, plan)
    refit(student, whole, plan, rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    shared = {id(parameter) for parameter in whole.parameters()} & {id(parameter) for parameter in student.parameters()}
    ends = {id(end.weight) for end in (whole.get_input_embeddings(), whole.get_output_embeddings())}
    assert ends <= shared if "ffn" in sizes else not ends & shared
    assert is_tied(student) == tied
