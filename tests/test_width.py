"""Width: neurons, groups and hidden size left out of a model that is written, read or live."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import widths
from torch import Tensor
from toys import LAYERS, model_of

from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError, RecipeError
from lmprune.forward.views import pruned_view
from lmprune.models.width import SLICED, width_of
from lmprune.writing import support

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(4, 90, (2, 20), generator=torch.Generator().manual_seed(0))
WIDTH, NEURONS = 32, 48
TABLE = {row["architecture"]: row for row in support.widths()}


def rotation(size: int, seed: int = 0) -> Tensor:
    """(32, size) with orthonormal columns."""
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)))[0][:, :size]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def uneven(model: Any) -> Any:
    """The model with norms that weigh."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.8, 1.2)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "deepseek_v2"])
def test_each_form_of_mlp_is_the_whole_with_its_neurons_masked(kind: str) -> None:
    assert widths.examine(kind, ("ffn",)).ffn == "right"


@pytest.mark.parametrize("kind", ["qwen2"])
def test_groups_and_hidden_size_are_exact(kind: str) -> None:
    found = widths.examine(kind, ("groups", "hidden"))
    assert (found.groups, found.hidden) == ("right", "right")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", widths.MODEL_TYPES)
def test_every_architecture_is_narrowed_rightly_or_refused(model_type: str) -> None:
    """As the table of docs/architectures.md says; `python tests/widths.py` writes it."""
    found = widths.examine(model_type)
    for verdict in (found.ffn, found.groups, found.hidden):
        assert verdict == "right" or verdict.startswith("refused"), found
    told = TABLE[model_type]
    assert "untested" in told.values() or widths.row(found) == told


def test_the_table_is_of_every_architecture_and_nothing_in_it_is_wrong() -> None:
    assert [row["architecture"] for row in support.widths()] == list(widths.MODEL_TYPES), "run `python tests/widths.py`"
    for row in support.widths():
        verdicts = {row[what] for what in ("ffn", "groups", "hidden")}
        assert verdicts <= {"right", "refused", "untested"} and ("refused" not in verdicts or row["reason"])
    assert {row["architecture"] for row in support.widths() if row["hidden"] == "right"} <= SLICED


def test_all_of_it_is_the_whole_model() -> None:
    whole = uneven(model_of("llama", tie_word_embeddings=False))
    all_of_it = {f"neurons.{layer}": torch.arange(NEURONS).int() for layer in range(LAYERS)}
    all_of_it |= {f"groups.{layer}": torch.arange(4).int() for layer in range(LAYERS)}
    plan = Plan(LAYERS, (), (width_of(all_of_it, ffn=NEURONS, groups=4),))
    assert torch.equal(logits(pruned_view(whole, plan)), logits(whole))
    plan = Plan(LAYERS, (), (width_of(all_of_it | {"rotation": rotation(WIDTH)}, ffn=NEURONS, hidden=WIDTH),))
    assert torch.allclose(logits(pruned_view(whole, plan)), logits(whole), atol=2e-5)


def test_tied_equals_untied_at_full_size_but_for_the_norm_of_tokens() -> None:
    """Where the last norm weighs unevenly, a tied model's logits and its layers' inputs are scaled token by token."""
    tied = uneven(model_of("llama", tie_word_embeddings=True, num_hidden_layers=1))
    for name, weight in tied.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()  # so that the state is the embedding, and only the last norm tells
    part = width_of({"rotation": rotation(WIDTH)}, hidden=WIDTH)
    got, want = logits(pruned_view(tied, Plan(1, (), (part,)))), logits(tied)
    gain = tied.model.norm.weight.detach()
    state = tied.model.embed_tokens(IDS)
    scaled = state.norm(dim=-1) / (state * (gain / gain.mean()).sqrt()).norm(dim=-1)
    assert not torch.allclose(got, want, atol=1e-3)
    assert torch.allclose(got, want * scaled[..., None], atol=2e-5)


def test_a_view_leaves_the_whole_model_alone() -> None:
    whole = uneven(model_of("llama"))
    before = logits(whole)
    held = {f"neurons.{layer}": torch.arange(20).int() for layer in range(LAYERS)} | {"rotation": rotation(24)}
    view = pruned_view(whole, Plan(LAYERS, (2,), (width_of(held, ffn=20, hidden=24),)))
    assert (view.config.hidden_size, view.config.intermediate_size, view.config.num_hidden_layers) == (24, 20, 5)
    assert view.config.head_dim == 8 and view.model.layers[0].mlp.up_proj.out_features == 20
    assert torch.equal(logits(whole), before) and whole.config.hidden_size == WIDTH


@pytest.mark.parametrize(
    ("held", "sizes", "said"),
    [
        ({}, {"ffn": 20}, "lacks neurons.0"),
        ({"neurons.0": torch.arange(21)}, {"ffn": 20}, "neurons.0 of this width is torch.int64 of shape"),
        ({"neurons.0": torch.arange(20).flip(0)}, {"ffn": 20}, "does not name neurons of layer 0 from 0 to 47"),
        ({"neurons.0": torch.arange(20) + 40}, {"ffn": 20}, "does not name neurons of layer 0 from 0 to 47"),
        ({"neurons.0": torch.arange(96)}, {"ffn": 96}, "ffn 96 is more than the model has: intermediate_size is 48"),
        ({"groups.0": torch.arange(9)}, {"groups": 9}, "groups 9 is more than the model has: key-value groups: 4"),
        ({"rotation": rotation(24)}, {"hidden": 64}, "hidden 64 is more than the model has: hidden_size is 32"),
        ({"rotation": rotation(24)}, {"hidden": 16}, "rotation of this width is torch.float32 of shape"),
        ({"rotation": 2 * rotation(24)}, {"hidden": 24}, "columns are not orthonormal"),
        ({"rotation": rotation(24) * torch.nan}, {"hidden": 24}, "columns are not orthonormal"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(held: Any, sizes: Any, said: str) -> None:
    whole = model_of("llama")
    before = logits(whole)
    with pytest.raises((ModelError, RecipeError), match=said) as raised:
        pruned_view(whole, Plan(LAYERS, (), (width_of(held or {"x": torch.ones(1)}, **sizes),)))
    assert "\n" not in str(raised.value) and torch.equal(logits(whole), before)


def test_weights_of_a_tied_norm_that_have_no_root_are_refused() -> None:
    whole = model_of("llama", tie_word_embeddings=True)
    whole.model.norm.weight.data[3] = -0.5
    with pytest.raises(ModelError, match=r"model\.norm\.weight has weights that are not positive"):
        pruned_view(whole, Plan(LAYERS, (), (width_of({"rotation": rotation(24)}, hidden=24),)))


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        ("gpt2", {"hidden": 24}, "LayerNorm"),
        ("bloom", {"ffn": 24}, "no field for the width"),
        ("gemma3_text", {"hidden": 24}, "norms stand behind"),
    ],
)
def test_an_architecture_that_cannot_is_refused_with_the_reason(kind: str, sizes: Any, said: str) -> None:
    held = {f"neurons.{layer}": torch.arange(24).int() for layer in range(LAYERS)} | {"rotation": rotation(24)}
    with pytest.raises(ModelError, match=said):
        pruned_view(model_of(kind), Plan(LAYERS, (), (width_of(held, **sizes),)))
