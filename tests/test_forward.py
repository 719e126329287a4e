"""Plans over batches: shared layers change no bit, states and gradients are the model's, runs have an identity."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import tiny_config, tiny_model
from torch import nn

from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, LmpruneError, ModelError, OutputError, UsageError
from lmprune.forward import machine
from lmprune.forward.batches import Batch, batches_of
from lmprune.forward.calls import given, leaving, run_decoder, skipping, standing_in
from lmprune.forward.journal import Journal, changed
from lmprune.forward.loss import Losses, LossTable, losses
from lmprune.forward.machine import Halving, free_memory, pick_device
from lmprune.forward.objectives.loss import summed
from lmprune.forward.processes import Processes
from lmprune.forward.run import run
from lmprune.forward.states import gradients, states
from lmprune.forward.tree import passes, paths_of, walk
from lmprune.forward.views import Views, pruned_view
from lmprune.models.loading import load_model
from lmprune.models.stack import find_stack
from lmprune.text.tokens import Tokens

LAYERS = 8
PLANS = [Plan(LAYERS), *(Plan(LAYERS, gone) for gone in ((3, 4), (3, 4, 5), (7,), (0, 7), (6,), (5, 6)))]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"head_dim": 12, "sliding_window": 4},
    "gpt2": {"n_embd": 64, "n_layer": LAYERS, "n_head": 4},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    """Eleven samples of 1 to 12 tokens."""
    rng = np.random.default_rng(0)
    return Tokens(
        tuple(rng.integers(4, 60, length).astype(np.int32) for length in (5, 12, 1, 9, 7, 12, 3, 2, 8, 11, 4))
    )


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Path]) -> Any:
    return load_model(tiny("llama"), dtype="float32")


# --- plans over batches -----------------------------------------------------------------------------------------------


def separate(folder: Path, plan: Plan, tokens: Tokens, size: int) -> Any:
    """The mean loss of each sample of the model that loading with ``plan`` gives, batch by batch."""
    model = load_model(folder, plan=plan if plan.dropped else None)
    found = np.zeros(tokens.samples)
    for samples in batches_of([len(row) for row in tokens.rows], size):
        batch = Batch.of([tokens.rows[i] for i in samples], torch.device("cpu"))
        with torch.no_grad():
            found[samples] = summed(run_decoder(model, batch).logits, batch.ids, batch.mask).numpy()
    return found / np.maximum([len(row) - 1 for row in tokens.rows], 1)


@pytest.mark.parametrize("kind", list(KINDS))
def test_shared_layers_change_no_bit(kind: str, tiny: Callable[..., Path], tokens: Tokens) -> None:
    """The losses of many plans of one model are those of each plan's own model, and of passes that share nothing."""
    folder = tiny(kind, **KINDS[kind])
    model = load_model(folder)
    shared = losses(model, PLANS, tokens, batch_size=4, progress=False)
    apart = losses(model, PLANS, tokens, batch_size=4, share=False, progress=False)
    assert shared.values.shape == (len(PLANS), tokens.samples) and np.array_equal(shared.values, apart.values)
    for number, plan in enumerate(PLANS):
        assert np.array_equal(shared.values[number], separate(folder, plan, tokens, 4)), plan
    assert len({float(mean) for mean in shared.mean()}) == len(PLANS)


@pytest.mark.parametrize("kind", ["jamba", "zamba2"])
def test_layers_of_several_kinds_are_shared(kind: str, tmp_path: Path, tokens: Tokens) -> None:
    tiny_model(tiny_config(kind)).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    plans = [plan for plan in PLANS if fits(model, plan)]
    assert len(plans) > 1, "no plan fits this architecture"
    shared = losses(model, plans, tokens, batch_size=4, progress=False)
    for number, plan in enumerate(plans):
        assert np.array_equal(shared.values[number], separate(tmp_path, plan, tokens, 4)), plan


def fits(model: Any, plan: Plan) -> bool:
    try:
        pruned_view(model, plan)
    except ModelError:
        return False
    return True


@pytest.mark.parametrize("way", ["other numbers", "an error"])
def test_sharing_is_refused_where_it_is_not_exact(
    way: str, tiny: Callable[..., Path], tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that leave something for later ones beside the state, which nobody hands on."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    honest = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = honest(self, hidden_states, *args, **kwargs)
        left = self.self_attn.config.__dict__.setdefault("left", {})
        left[self.self_attn.layer_idx] = output.mean()
        return output + (left[0] if way == "an error" else left.get(0, 0))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    model, plans = load_model(tiny("llama")), PLANS[:4]
    views = Views(model, {str(plan.dropped): plan for plan in plans})
    assert not views.prove(lambda view: view(input_ids=torch.arange(4, 12)[None], use_cache=False).logits)
    assert not views.share
    found = losses(model, plans, tokens, batch_size=4, progress=False)
    for number, plan in enumerate(plans):
        alone = losses(model, [plan], tokens, batch_size=4, progress=False)
        assert np.array_equal(found.values[number], alone.values[0])


def test_a_whole_model_that_cannot_lose_a_layer_has_a_loss(tokens: Tokens) -> None:
    model = tiny_model(tiny_config("gemma4_text", hidden_size_per_layer_input=8)).eval()
    assert np.isfinite(losses(model, [Plan(LAYERS)], tokens, progress=False).mean()).all()


def test_layers_in_common_run_once(llama: Any, tokens: Tokens) -> None:
    plans = {str(n): Plan(LAYERS, tuple(range(7 - n, 7))) for n in (1, 2, 3, 4)}
    views, ran = Views(llama, plans), []
    assert views.prove(lambda view: view(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits)
    for name in plans:
        for layer in find_stack(views.view(name)).layers:
            layer.mlp.register_forward_hook(lambda *_: ran.append(1))
    for turn in views.turns:
        with views.turn(turn) as view:
            view(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert len(ran) == passes(views.turns)[0] == 10 and passes(views.turns)[1] == 22


def test_few_states_are_kept_where_that_is_asked_and_no_bit_changes(llama: Any, tokens: Tokens) -> None:
    plans = [Plan(LAYERS), *(Plan(LAYERS, (layer,)) for layer in range(LAYERS))]
    paths = paths_of({str(i): plan for i, plan in enumerate(plans)})
    every, counts = LossTable(llama, tokens, progress=False), {}
    for most in (None, 4, 2, 1, 0):
        turns, held, worst = walk(paths, most), set(), 0
        for turn in turns:
            assert turn.start == 0 or turn.start in held
            held = {depth for depth in held if depth <= turn.start} | set(turn.saves)
            worst = max(worst, len(held))
        counts[most], separate = passes(turns)
        assert most is None or worst <= most
        few = LossTable(llama, tokens, states=most, progress=False)
        assert np.array_equal(few.losses(plans).values, every.losses(plans).values)
    assert counts[None] < counts[4] < counts[2] < counts[1] <= counts[0] == separate


def test_only_some_views_are_held_at_once(llama: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hundred plans and room for three views, never more than three are there, and the losses are the same."""
    from lmprune.forward import views as module

    plans = [Plan(LAYERS, (a, b)) for a in range(LAYERS) for b in range(a + 1, LAYERS)]
    expected = losses(llama, plans, tokens, batch_size=4, progress=False)
    monkeypatch.setattr(module, "MODULES_HELD", 3 * sum(1 for _ in llama.modules()))
    held: list[int] = []
    taken = Views(llama, {str(number): plan for number, plan in enumerate(plans)})
    for part in taken.parts():
        held.append(len(part.turns))
    assert max(held) == 3 and sum(held) == len(plans)
    assert np.array_equal(losses(llama, plans, tokens, batch_size=4, progress=False).values, expected.values)


def test_every_output_comes_to_the_collector(llama: Any, tokens: Tokens) -> None:
    came: dict[tuple[str, int], int] = {}

    def collect(name: str, samples: Any, batch: Batch, output: Any) -> None:
        assert output.logits.shape[:2] == batch.ids.shape
        came.update({(name, sample): len(tokens.rows[sample]) for sample in samples})

    done: list[int] = []
    batches = batches_of([len(row) for row in tokens.rows], 4)
    run(Views(llama, {"a": PLANS[0], "b": PLANS[1]}), list(tokens.rows), batches, collect, did=done.append)
    assert came.keys() == {(name, sample) for name in "ab" for sample in range(tokens.samples)}
    assert sum(done) == 2 * tokens.samples


def test_short_memory_halves_the_batch_and_changes_little(llama: Any, tokens: Tokens) -> None:
    expected = losses(llama, PLANS[:2], tokens, batch_size=4, progress=False)

    def hungry(module: nn.Module, args: Any, kwargs: Any) -> None:
        if len(args[0] if args else kwargs["hidden_states"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = find_stack(llama).layers[6].register_forward_pre_hook(hungry, with_kwargs=True)
    try:
        halved = losses(llama, PLANS[:2], tokens, batch_size=4, progress=False)
    finally:
        handle.remove()
    assert np.abs(halved.values - expected.values).max() < 1e-4


def test_samples_of_one_token_predict_nothing(llama: Any, tokens: Tokens) -> None:
    found = losses(llama, PLANS[:2], tokens, progress=False)
    assert found.tokens[2] == 0 and (found.values[:, 2] == 0).all() and found.values.dtype == np.float64
    kept = [i for i in range(tokens.samples) if i != 2]
    weighted = (found.values[:, kept] * found.tokens[kept]).sum(1) / found.tokens[kept].sum()
    assert found.mean() == pytest.approx(weighted)
    with pytest.raises(DataError, match="every sample is one token long"):
        losses(llama, PLANS, Tokens((np.array([3], dtype=np.int32),)), progress=False)
    assert losses(llama, [], tokens, progress=False).values.shape == (0, tokens.samples)


def test_the_whole_models_loss_is_the_hosts_own(llama: Any, tokens: Tokens) -> None:
    ids = torch.from_numpy(tokens.rows[1].astype(np.int64))[None]
    with torch.no_grad():
        theirs = float(llama(input_ids=ids, labels=ids).loss)
    one = Tokens((tokens.rows[1],))
    assert losses(llama, [Plan(LAYERS)], one, progress=False).mean()[0] == pytest.approx(theirs, rel=1e-6)


def test_models_of_other_parts_share_nothing() -> None:
    class Half:
        kind, mergekit = "half", False

    plans = {"a": Plan(3), "b": Plan(3, parts=(Half(),)), "c": Plan(3, (2,))}
    paths = paths_of(plans)  # type: ignore[arg-type]
    assert paths["a"][:2] == paths["c"] and not {*paths["a"]} & {*paths["b"]}
    assert passes(walk(paths)) == (6, 8)


# --- how a layer is called --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tensor", "tuple"])
@pytest.mark.parametrize("by_name", [True, False])
def test_inputs_are_replaced_and_layers_stood_in_for(form: str, by_name: bool) -> None:
    class Layer(nn.Module):
        extra = 7

        def forward(self, hidden_states: torch.Tensor) -> Any:
            return (hidden_states + 1, "more") if form == "tuple" else hidden_states + 1

    layer, x, other = Layer(), torch.zeros(1, 2, 4), torch.full((1, 2, 4), 5.0)
    heard: list[Any] = []
    with given(layer, other), leaving(layer, heard.append):
        _ = layer(hidden_states=x) if by_name else layer(x)
    assert torch.equal(heard[0], other + 1)
    with standing_in(layer, other):
        assert layer(x) is other and layer.extra == 7
    assert not layer._forward_hooks and not layer._forward_pre_hooks and "forward" not in layer.__dict__


def test_a_skipped_layer_hands_its_input_on(llama: Any, tokens: Tokens) -> None:
    taken: list[torch.Tensor] = []
    ids = torch.from_numpy(tokens.rows[1].astype(np.int64))[None]
    before, skipped = find_stack(llama).layers[2:4]
    with torch.no_grad(), skipping(llama, [3]), leaving(before, taken.append), leaving(skipped, taken.append):
        llama(input_ids=ids, use_cache=False)
    assert torch.equal(taken[0], taken[1])


# --- states and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [None, Plan(LAYERS, (2, 5))])
def test_states_are_those_of_the_host_without_padding(llama: Any, tokens: Tokens, plan: Plan | None) -> None:
    model = llama if plan is None else pruned_view(llama, plan)
    places = (0, 3, len(find_stack(model).layers))
    order = [sample for batch in batches_of([len(row) for row in tokens.rows], 4) for sample in batch]
    found = list(states(llama, tokens, places, plan=plan, batch_size=4))
    assert len(found) == 3 and found[0].keys() == set(places)
    for place in places:
        ours = np.concatenate([part[place] for part in found])
        assert ours.shape == (tokens.count, 64) and ours.dtype == np.float32
        theirs = []
        for sample in order:
            with torch.no_grad():
                out = model.model(
                    torch.from_numpy(tokens.rows[sample].astype(np.int64))[None], output_hidden_states=True
                )
            theirs.append(out.hidden_states[place][0].float().numpy())
        if place == places[-1]:  # theirs is after the final norm
            norm = model.model.norm
            ours = norm(torch.from_numpy(ours)).detach().numpy()
        assert np.abs(ours - np.concatenate(theirs)).max() < 1e-4


def test_a_state_that_is_not_there_is_refused(llama: Any, tokens: Tokens) -> None:
    with pytest.raises(UsageError, match="no state 9: this model has states 0 to 8"):
        next(states(llama, tokens, [9]))


def test_gradients_are_those_of_the_mean_loss(llama: Any, tokens: Tokens) -> None:
    """Compared with one backward pass over every sample; and the model is left as it was."""
    llama.model.layers[1].requires_grad_(False)
    asked = [weight.requires_grad for weight in llama.parameters()]
    weights = {
        (number, name): w for number, part in enumerate(llama.model.layers) for name, w in part.named_parameters()
    }
    found = {}
    for layer, name, weight, gradient in gradients(llama, tokens, batch_size=4):
        assert np.array_equal(weight, weights[layer, name].detach()) and gradient.dtype == np.float32
        found[layer, name] = gradient
    assert asked == [weight.requires_grad for weight in llama.parameters()]
    assert all(weight.grad is None for weight in llama.parameters())
    llama.requires_grad_(True)
    loss = sum(
        nn.functional.cross_entropy(llama(ids[None], use_cache=False).logits[0, :-1].float(), ids[1:], reduction="sum")
        for ids in (torch.from_numpy(row.astype(np.int64)) for row in tokens.rows if len(row) > 1)
    )
    (loss / sum(len(row) - 1 for row in tokens.rows)).backward()  # type: ignore[union-attr]
    expected = {key: weight.grad for key, weight in weights.items()}
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert np.allclose(gradient, expected[key], rtol=1e-3, atol=1e-6), key
    llama.zero_grad(set_to_none=True)


def test_an_expert_without_tokens_has_a_gradient_of_zero(tiny: Callable[..., Path], tokens: Tokens) -> None:
    model = load_model(tiny("mixtral", **KINDS["mixtral"]), dtype="float32")
    found = [gradient for *_, gradient in gradients(model, Tokens((tokens.rows[7],)))]
    assert all(np.isfinite(gradient).all() for gradient in found)


def test_quantised_weights_have_no_gradient(llama: Any, tokens: Tokens) -> None:
    view = pruned_view(llama, None)
    view.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UsageError, match="quantised weights have no gradient"):
        next(gradients(view, tokens))


# --- the machine ------------------------------------------------------------------------------------------------------


def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    assert free_memory() == free_memory(torch.device("cpu")) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 3_000_000


def test_pages_of_files_that_were_read_are_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("4500000\n")
    (tmp_path / "memory.stat").write_text(
        "anon 500000\nfile 4000000\nactive_file 1000000\ninactive_file 2300000\nfile_dirty 300000\n"
    )
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    assert free_memory() == 3_500_000


def test_verify_loads_nothing_that_a_control_group_has_no_room_for(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.choosing import write_recipe
    from lmprune.writing.pruning import prune
    from lmprune.writing.verify import verify

    write_recipe(str(tiny("llama")), PLANS[1], tmp_path / "r.yml")
    prune(tmp_path / "r.yml", tmp_path / "pruned")
    (tmp_path / "memory.max").write_text("1000")
    (tmp_path / "memory.current").write_text("0")
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    proof = verify(tmp_path / "r.yml", tmp_path / "pruned")
    assert not proof.logits_compared and "1.0 kB are free" in str(proof.logits_skipped) and not proof.differences


def test_a_machine_without_ulimit_has_no_such_limit() -> None:
    """As Windows, which has no module ``resource``."""
    code = (
        "import sys; import psutil; sys.modules['resource'] = None\nfrom lmprune.forward.machine import free_memory\n"
    )
    subprocess.run([sys.executable, "-c", code + "assert free_memory() > 0"], check=True, timeout=120)


def test_the_device_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="--device 'abacus' is no device"):
        pick_device("abacus")
    for count, name, message in (
        (0, "cuda", "--device cuda: torch sees no CUDA device here. Use --device cpu"),
        (2, "cuda:2", "--device cuda:2: torch sees 2 CUDA devices here. Choose another"),
        (0, "mps", "--device mps: torch sees no such device here"),
    ):
        with_gpus(monkeypatch, count)
        with pytest.raises(UsageError, match=message):
            pick_device(name)
    with_gpus(monkeypatch, 2)
    assert [pick_device(name, rank) for name, rank in (("auto", 0), ("auto", 3), ("cuda:1", 0))] == [
        torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda", 1)
    ]  # fmt: skip
    with_gpus(monkeypatch, 0)
    assert pick_device() == torch.device("cpu")


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """As on a machine with so many GPUs, and not of Apple's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_work_is_halved_until_it_fits() -> None:
    tried: list[int] = []

    def work(items: list[int]) -> int:
        tried.append(len(items))
        if len(items) > 2:
            raise MemoryError
        return sum(items)

    said: list[str] = []
    halving = Halving(work, lambda item: ModelError(f"no room for {item}"), said.append)
    assert halving(range(8)) == [1, 5, 9, 13] and tried == [8, 4, 2, 2, 2, 2]
    assert halving([1, 2, 3]) == [3, 3] and tried[6:] == [2, 1], "it remembers"
    assert said[0] == "out of memory with 8 samples in a batch: going on with 4"

    def never(items: list[int]) -> int:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(LmpruneError, match="no room for 7"):
        Halving(never, lambda item: ModelError(f"no room for {item}"))([7, 8])


# --- the journal ------------------------------------------------------------------------------------------------------


def test_a_journal_keeps_whole_lines_only(tmp_path: Path) -> None:
    """Arrays come back bit for bit, what a kill cut short is gone, and what comes after it is whole."""
    path, rows = tmp_path / "j", np.array([[1 / 3, np.pi], [np.nan, -0.0]])
    with Journal(path, {"a": 1}) as journal:
        journal.put(0, {"samples": [1, 2], "values": rows})
        journal.put("text", "plain")
    whole = path.read_bytes()
    for cut in (b'{"key": 1, "val', b"\x00\x00\n", b'{"key": 1}\n', b"17\n"):
        path.write_bytes(whole + cut)
        with Journal(path, {"a": 1}) as again:
            assert len(again) == 2 and set(again) == {0, "text"} and not again.stale and not again.has(1)
            assert again.get(0)["values"].tobytes() == rows.tobytes() and again.get("text") == "plain"
            again.put(1, np.float64(0.1))
        assert path.read_bytes().startswith(whole)
        with Journal(path, {"a": 1}) as third:
            assert third.get(1) == 0.1 and len(third) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["j"]


def test_the_later_of_two_records_counts(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {}) as journal:
        journal.put(0, "first")
        journal.put(0, "then")
    with Journal(tmp_path / "j", {}) as again:
        assert again.get(0) == "then" and len(again) == 1
        again.remove()
    assert list(tmp_path.iterdir()) == []


def test_another_runs_journal_is_overwritten(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {"a": 1}) as journal:
        journal.put(0, "one")
    with Journal(tmp_path / "j", {"a": 2}) as other:
        assert other.stale and len(other) == 0
        other.put(0, "two")
    with Journal(tmp_path / "j", {"a": 2}, resume=False) as fresh:
        assert not fresh.stale and len(fresh) == 0
    with Journal(None, {"a": 1}) as in_memory:
        in_memory.put("key", [1])
        assert in_memory.get("key") == [1]
    with pytest.raises(KeyError):
        in_memory.get("nothing")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, {"a": 1}) as journal:
        with pytest.raises(OutputError, match=f"another run is writing {path}. Wait for its end"):
            Journal(path, {"a": 1})
        journal.put(0, "still good")
    with Journal(path, {"a": 1}) as again:
        assert again.get(0) == "still good"
    with pytest.raises(OutputError, match="cannot write"):
        Journal(Path("/proc/nothing/j"), {})


def test_what_differs_is_named() -> None:
    mine = {"seed": 0, "layers": (1, 2), "gone": 1, "same": {"a": [1]}}
    theirs = {"seed": 1, "layers": [1, 2], "new": 2, "same": {"a": (1,)}}
    assert changed(mine, theirs) == ["gone", "new", "seed"]
    assert changed({"a": None}, {}) == []


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_process_alone_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes.join(cpu=True)
    assert alone.main and (alone.rank, alone.size, alone.local_rank, alone.state) == (0, 1, 0, None)
    assert alone.gather("mine") == ["mine"] and alone.from_main("value") == "value"
    alone.wait(), alone.leave()


@pytest.mark.slow
@pytest.mark.parametrize("cpu", [True, False])
def test_processes_tell_one_another(tmp_path: Path, cpu: bool) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "import json, pathlib, sys\n"
        "from lmprune.forward.processes import Processes\n"
        "p = Processes.join(cpu=CPU)\n"
        "assert Processes.join(cpu=CPU).rank == p.rank\n"
        "told = {'gathered': p.gather([p.rank] * (p.rank + 1)), 'main': p.from_main(f'from {p.rank}')}\n"
        "told |= {'rank': p.rank, 'size': p.size, 'local': p.local_rank, 'speaks': p.main}\n"
        "pathlib.Path(sys.argv[1], f'{p.rank}.json').write_text(json.dumps(told))\n"
        "p.wait()\np.leave()\n".replace("CPU", str(cpu))
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(tmp_path)]
    subprocess.run(launch, check=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for rank in (0, 1):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told == {
            "gathered": [[0], [1, 1]], "main": "from 0", "rank": rank, "size": 2, "local": rank, "speaks": rank == 0
        }  # fmt: skip


def test_the_error_of_a_rise_is_that_of_the_samples_own_differences() -> None:
    """Against draws: the spread of means over resamples of weighted samples."""
    draw = np.random.default_rng(0)
    whole = draw.normal(3, 1, 400)
    rise = draw.normal(0.2, 0.1, 400)
    found = Losses(np.stack([whole, whole + rise]), draw.integers(5, 50, 400))
    means = []
    for _ in range(500):
        picked = draw.integers(0, 400, 400)
        mean = Losses(found.values[:, picked], found.tokens[picked]).mean()
        means.append(mean[1] - mean[0])
    assert found.errors()[0] == 0 and found.errors()[1] == pytest.approx(np.std(means), rel=0.15)
    assert np.isnan(Losses(found.values[:, :1], found.tokens[:1]).errors()).all()
