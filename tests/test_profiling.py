"""A pass over a live model: equal to a float64 reference, whatever the padding, and nothing left behind."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from lmprune.errors import DataError, LmpruneError, ModelError, UsageError
from lmprune.forward import machine
from lmprune.models.cut import open_cut
from lmprune.models.stack import find_stack
from lmprune.profiling import ProfileSettings, profile
from lmprune.profiling.distances import pairs
from lmprune.profiling.run import profile_model
from lmprune.profiling.statistics import values_of
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens

VOCABULARY = 96
LAYERS = 6


def model_of(kind: str = "llama", **config: Any) -> Any:
    """A small random model in float32."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    } | config  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return model_of()


@pytest.fixture(scope="module")
def rows() -> list[NDArray[np.int64]]:
    """Forty samples of 1 to 24 tokens."""
    rng = np.random.default_rng(0)
    lengths = [1, 1, 2, 24, *rng.integers(1, 25, 36)]
    return [rng.integers(3, VOCABULARY, length) for length in lengths]


def reference(model: Any, rows: list[NDArray[np.int64]], token: str) -> dict[str, NDArray[np.float64]]:
    """The statistics in float64, sample by sample without padding, by the arc tangent instead of the arc cosine."""
    found: list[list[NDArray[np.float64]]] = [[], [], []]
    for row in rows:
        raw: list[torch.Tensor] = []

        def keep(_m: Any, _i: Any, out: Any, raw: list[torch.Tensor] = raw) -> None:
            raw.append(out[0] if isinstance(out, tuple) else out)

        hook = find_stack(model).layers[-1].register_forward_hook(keep)
        with torch.no_grad():
            hidden = model(torch.tensor(row)[None], output_hidden_states=True, use_cache=False).hidden_states
        hook.remove()
        states = torch.stack([*hidden[:-1], raw[0]])[:, 0].double().numpy()  # the last of HF's is after the final norm
        if token == "last":
            states = states[:, -1:]
        unit = states / np.linalg.norm(states, axis=-1, keepdims=True)
        starts, stops = pairs(len(states) - 1)
        chord = np.linalg.norm(unit[starts] - unit[stops], axis=-1)
        across = np.linalg.norm(unit[starts] + unit[stops], axis=-1)
        found[0].append((2 * np.arctan2(chord, across) / np.pi).mean(axis=1))
        found[1].append((unit[:-1] * unit[1:]).sum(axis=-1).mean(axis=1))
        added = np.linalg.norm(states[1:] - states[:-1], axis=-1)
        found[2].append((added / np.linalg.norm(states[1:], axis=-1)).mean(axis=1))
    distances, cosines, magnitudes = (np.mean(part, axis=0) for part in found)
    return {"distances": distances, "influence": 1 - cosines, "magnitude": magnitudes}


@pytest.mark.parametrize("token", ["last", "all"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_against_a_float64_reference(kind: str, token: str, rows: list[NDArray[np.int64]]) -> None:
    model = model_of(kind, **KINDS[kind])
    expected = reference(model, rows, token)
    for size in (8, 1):
        measured = profile(model, rows, token=token, batch_size=size)
        assert np.abs(measured.distances[pairs(LAYERS)] - expected["distances"]).max() < 1e-6
        assert np.abs(measured.block_influence - expected["influence"]).max() < 1e-6
        assert np.abs(measured.relative_magnitude - expected["magnitude"]).max() < 1e-6


@pytest.mark.parametrize("token", ["last", "all"])
def test_padding_and_batches_do_not_matter(llama: Any, rows: list[NDArray[np.int64]], token: str) -> None:
    width = max(map(len, rows))
    left, right, masks = (np.zeros((len(rows), width), dtype=int) for _ in range(3))
    for i, row in enumerate(rows):
        left[i, width - len(row) :], right[i, : len(row)], masks[i, : len(row)] = row, row, 1
    plain = profile(llama, rows, token=token, batch_size=8)
    from_left = profile(llama, {"input_ids": left, "attention_mask": masks[:, ::-1]}, token=token, batch_size=8)
    from_right = profile(llama, {"input_ids": torch.tensor(right), "attention_mask": torch.tensor(masks)}, token=token,
                         batch_size=8)  # fmt: skip
    assert plain.to_json() == from_left.to_json() == from_right.to_json()
    for size in (1, 3, 40):
        other = profile(llama, rows, token=token, batch_size=size)
        assert np.abs(other.distances - plain.distances).max() < 1e-6


def test_the_same_run_gives_the_same_bits(llama: Any, rows: list[NDArray[np.int64]]) -> None:
    assert profile(llama, rows, token="all").to_json() == profile(llama, rows, token="all").to_json()


@pytest.mark.parametrize("token", ["last", "all"])
@pytest.mark.parametrize("planted", [0, 3, LAYERS - 1])
def test_an_identity_layer_is_found(planted: int, token: str, rows: list[NDArray[np.int64]]) -> None:
    """A layer that adds nothing has distance 0; the last one too, since the state after it is taken before the norm."""
    model = model_of()
    layer = model.model.layers[planted]
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)
    measured = profile(model, rows, token=token)
    assert measured.best_block(1) == planted
    assert measured.distance(planted, 1) < 1e-7
    assert measured.block_influence[planted] < 1e-12 and measured.relative_magnitude[planted] < 1e-7
    assert np.delete(measured.of_size(1), planted).min() > 0.01
    assert measured.certainty(1).shares == {planted: 1.0}


def test_small_angles_are_exact() -> None:
    """In float32, arccos would make 4e-4 of this."""
    x = torch.randn(5, 4096, dtype=torch.float64)
    turn = torch.randn(5, 4096, dtype=torch.float64)
    turn -= (turn * x).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True) * x
    turn *= x.norm(dim=1, keepdim=True) / turn.norm(dim=1, keepdim=True)
    for angle in (0.0, 1e-6, 1e-4, np.pi / 2, np.pi):
        states = torch.stack([x, x * np.cos(angle) + turn * np.sin(angle)], dim=1)
        assert values_of(states)[:, 0].numpy() == pytest.approx(angle / np.pi, abs=5e-8)


def test_a_cosine_slightly_above_one_is_an_angle_of_zero() -> None:
    """Parallel states whose cosine rounds to more than 1, of which arccos would make NaN."""
    x = torch.randn(500, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = torch.stack([x, 3 * x], dim=1)
    gram = states @ states.transpose(1, 2)
    assert (gram[:, 0, 1] / (gram[:, 0, 0].sqrt() * gram[:, 1, 1].sqrt()) > 1).any(), "the test sees no such cosine"
    values = values_of(states)
    assert values.isfinite().all() and values[:, 0].max() < 1e-7


class Odd(nn.Module):
    """Wraps a layer: another way to be called or to answer."""

    def __init__(self, layer: nn.Module, form: str) -> None:
        super().__init__()
        self.layer, self.form = layer, form

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        output = (
            self.layer(hidden_states=hidden_states, **kwargs)
            if self.form == "keywords"
            else self.layer(hidden_states, **kwargs)
        )
        return (output, None) if self.form == "tuple" else output


@pytest.mark.parametrize("form", ["keywords", "tensor"])
def test_ways_to_call_a_layer(llama: Any, rows: list[NDArray[np.int64]], form: str) -> None:
    expected = profile(llama, rows)
    model = copy.deepcopy(llama)
    for i, layer in enumerate(model.model.layers):
        wrapped = Odd(layer, form)
        wrapped.attention_type = getattr(layer, "attention_type", None)
        model.model.layers[i] = wrapped
    assert profile(model, rows).to_json() == expected.to_json()


def test_layers_that_answer_with_a_tuple() -> None:
    from lmprune.forward.calls import output_of, watching

    layers = nn.ModuleList([Odd(nn.Identity(), "tuple"), Odd(nn.Linear(4, 4), "tuple")])
    taken: dict[int, torch.Tensor] = {}
    x = torch.randn(1, 2, 4)
    with watching(layers, taken.__setitem__):
        y = output_of(layers[1](hidden_states=output_of(layers[0](x))))
    assert torch.equal(taken[0], x) and torch.equal(taken[1], x) and torch.equal(taken[2], y)
    with pytest.raises(ModelError, match="returns dict"):
        output_of({})


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_behind(rows: list[NDArray[np.int64]]) -> None:
    """A model in train mode with dropout, checkpointing and one frozen part is measured in eval mode and given back."""
    model = model_of(attention_dropout=0.5)
    expected = profile(model, rows)
    model.train()
    model.gradient_checkpointing_enable()
    model.model.layers[2].eval()
    modes, hooks = {name: module.training for name, module in model.named_modules()}, hooks_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, random = model.config.to_dict(), torch.get_rng_state()
    assert profile(model, rows).to_json() == expected.to_json()
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert hooks_of(model) == hooks and model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.tensor(rows[3])[None], labels=torch.tensor(rows[3])[None]).loss.backward()


def test_nothing_is_left_behind_after_an_error(rows: list[NDArray[np.int64]]) -> None:
    model = model_of().train()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = model.model.layers[3].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        profile(model, rows)
    handle.remove()
    assert hooks_of(model) == 0 and all(module.training for module in model.modules())


@pytest.mark.parametrize("token", ["last", "all"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_named(rows: list[NDArray[np.int64]], token: str, value: float) -> None:
    model = model_of()
    poison = 5
    rows = [np.where(row == poison, poison + 1, row) for row in rows]
    rows[17] = np.array([poison])

    def spoil(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        bad = (seen[0] == poison)[..., None]
        return torch.where(bad, torch.tensor(value), output)

    seen: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _m, args: seen.__setitem__(slice(None), [args[0]]))
    model.model.layers[2].register_forward_hook(spoil)
    with pytest.raises(
        ModelError, match=r"the output of layer 2 holds NaN or infinity for sample 17\. Check the weights"
    ):
        profile(model, rows, token=token, batch_size=8)


def test_a_zero_state_is_named(rows: list[NDArray[np.int64]]) -> None:
    model = model_of()
    model.model.embed_tokens.weight.data[rows[9][-1]] = 0
    rows = [row for row in rows if rows[9][-1] not in row] + [rows[9]]
    message = (
        f"the embedding, the input of layer 0, is a zero vector, which has no direction for sample {len(rows) - 1}"
    )
    with pytest.raises(ModelError, match=message):
        profile(model, rows)


def test_running_out_of_memory_halves_the_batch(
    llama: Any, rows: list[NDArray[np.int64]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lmprune")
    expected = profile(llama, rows, batch_size=8)
    sizes: list[int] = []

    def hungry(_: nn.Module, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = llama.model.register_forward_pre_hook(hungry, with_kwargs=True)
    try:
        measured = profile(llama, rows, batch_size=8)
    finally:
        handle.remove()
    assert np.abs(measured.distances - expected.distances).max() < 1e-6
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2
    assert "out of memory with 8 samples in a batch: going on with 4" in caplog.text


def test_no_room_for_one_sample_is_said(llama: Any, rows: list[NDArray[np.int64]]) -> None:
    def hungry(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    handle = llama.model.register_forward_pre_hook(hungry)
    try:
        with pytest.raises(ModelError, match="out of memory with one sample"):
            profile(llama, rows)
    finally:
        handle.remove()


def test_other_runtime_errors_are_not_taken_for_memory(llama: Any, rows: list[NDArray[np.int64]]) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    handle = llama.model.register_forward_pre_hook(broken)
    try:
        with pytest.raises(RuntimeError, match="shapes do not match"):
            profile(llama, rows)
    finally:
        handle.remove()


def test_the_head_is_not_run(llama: Any, rows: list[NDArray[np.int64]]) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the head was run")

    handle = llama.lm_head.register_forward_pre_hook(never)
    try:
        profile(llama, rows)
    finally:
        handle.remove()


def test_a_model_inside_an_adapter_and_one_with_dropped_layers(llama: Any, rows: list[NDArray[np.int64]]) -> None:
    peft = pytest.importorskip("peft")
    from lmprune.cuts.plan import Plan
    from lmprune.models.stack import drop_layers

    model = copy.deepcopy(llama)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"]))
    assert np.allclose(profile(wrapped, rows).distances, profile(llama, rows).distances, atol=1e-9)
    dropped = copy.deepcopy(llama)
    drop_layers(dropped, Plan(LAYERS, (2, 3)))
    assert profile(dropped, rows).layers == LAYERS - 2


def test_float16_and_bfloat16_states_are_summed_in_float64(rows: list[NDArray[np.int64]]) -> None:
    model = model_of().to(torch.bfloat16)
    expected = reference(model, rows[:10], "last")["distances"]
    measured = profile(model, rows[:10], batch_size=1)
    assert np.abs(measured.distances[pairs(LAYERS)] - expected).max() < 1e-6
    assert measured.dtype == "bfloat16"


def test_until_stops_early_and_says_so(rows: list[NDArray[np.int64]], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "lmprune")
    model = model_of()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[3].get_submodule(name).weight.data *= 0.01
    many = [np.random.default_rng(i).integers(3, VOCABULARY, 12) for i in range(600)]
    full = profile(model, many)
    early = profile(model, many, until=0.95, drop=1)
    assert early.best_block(1) == full.best_block(1) == 3
    assert early.samples == 64 and early.settings["certain"] is True and early.settings["drop"] == 1
    assert early.data_hash == Tokens(tuple(np.asarray(row) for row in many[:64])).hash
    unsure = profile(model, many[:70], until=0.99, drop=2, indifference=0.0)
    if not unsure.settings["certain"]:
        assert "not certain after 70 samples" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": "first"}, "--token 'first': give last or all"),
        ({"samples": 0}, "--samples 0"),
        ({"max_length": -1}, "--max-length -1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"until": 1.0}, "--until 1.0"),
        ({"indifference": -0.1}, "--indifference"),
        ({"dtype": "float8"}, "--dtype 'float8'"),
        ({"stream": True, "quantization": "nf4"}, "--stream reads one layer at a time"),
    ],
)
def test_options_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ProfileSettings(**changes)


def test_what_cannot_be_measured(llama: Any, rows: list[NDArray[np.int64]]) -> None:
    with pytest.raises(DataError, match="empty"):
        profile(llama, [])
    with pytest.raises(DataError, match=f"token {VOCABULARY}, but the model knows 0 to {VOCABULARY - 1}"):
        profile(llama, [[VOCABULARY]])
    with pytest.raises(LmpruneError, match="this model has 6 layers"):
        profile(llama, rows, drop=LAYERS)


@pytest.mark.parametrize(("kind", "fits"), [("bert", True), ("deepseek_v4", False)])
def test_unusual_stacks_are_measured_or_refused(kind: str, fits: bool, tmp_path: Path) -> None:
    """BERT's stack takes embeddings and not ids; DeepSeek V4's layers pass on several states at once."""
    from architectures import tiny_config, tiny_model

    model = tiny_model(tiny_config(kind))
    ids = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    if fits:
        assert np.isfinite(profile(model, Tokens.from_padded(ids), ProfileSettings(samples=2)).distances).all()
    else:
        with pytest.raises(ModelError, match="not \\(samples, tokens, width\\)"):
            profile(model, Tokens.from_padded(ids), ProfileSettings(samples=2))


def test_a_config_without_a_type_takes_that_of_the_tensors(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "multiplies", lambda dtype: True)
    folder = tmp_path / "untyped"
    shutil.copytree(tiny("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    cut = open_cut(folder)
    how = [ProfileSettings(samples=4, max_length=16, stream=stream) for stream in (False, True)]
    found = [profile_model(cut, None, settings, DataSettings(data="demo")) for settings in how]
    assert cut.load().dtype == cut.dtype() == torch.bfloat16
    assert {made.dtype for made in found} == {"bfloat16"} and len({made.distance(2, 3) for made in found}) == 1


@pytest.mark.parametrize("stream", [None, True])
def test_a_cpu_that_multiplies_no_short_numbers_computes_in_float32(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, stream: bool | None
) -> None:
    cut, how = open_cut(tiny("llama")), ProfileSettings(samples=4, max_length=16, stream=stream, device="cpu")
    data, able = DataSettings(data="demo"), {"can": False}
    monkeypatch.setattr(machine, "multiplies", lambda dtype: able["can"] or dtype == torch.float32)
    made = profile_model(cut, None, how, data)
    exact = profile_model(cut, None, replace(how, dtype="float32"), data)
    assert cut.dtype() == torch.bfloat16 and made.dtype == "float32"
    assert np.array_equal(made.distances, exact.distances, equal_nan=True)
    assert profile_model(cut, None, replace(how, dtype="bfloat16"), data).dtype == "bfloat16"
    able["can"] = True
    assert profile_model(cut, None, how, data).dtype == "bfloat16"


def test_weights_stay_short_where_only_so_they_fit(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cut = open_cut(tiny("llama"))
    short = machine.weights_bytes(cut, 2)
    monkeypatch.setattr(machine, "multiplies", lambda dtype: False)
    for free, used in ((3 * short, "float32"), (2 * short, "bfloat16"), (short, "float32")):
        monkeypatch.setattr(machine, "free_memory", lambda device, free=free: free)
        assert machine.type_to_run(cut, "auto", "cpu") == used  # read layer by layer where neither fits
        assert machine.type_to_run(cut, "auto", "cpu", stream=False) == ("bfloat16" if free == short else used)
        assert machine.type_to_run(cut, "auto", "cpu", stream=True) == "float32"
        assert machine.type_to_run(cut, "float16", "cpu") == "float16"
        assert machine.type_to_run(cut, "auto", "cuda") == "auto"
