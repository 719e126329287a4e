"""Sublayers: left out of a live model, zeroed in a checkpoint, said to mergekit; and the criteria that choose them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from architectures import tiny_config, tiny_model

from lmprune.choosing import choose, write_recipe
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.cuts.sublayers import Sublayers, plan_of
from lmprune.errors import ModelError, RecipeError
from lmprune.forward.loss import losses
from lmprune.forward.tree import passes, paths_of, walk
from lmprune.forward.views import pruned_view
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model
from lmprune.models.stack import find_stack
from lmprune.profiling.settings import ProfileSettings
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens
from lmprune.writing.pruning import prune

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = Plan(8, (5,), (Sublayers(attention=(0, 3), mlp=(2, 6)),))
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"head_dim": 12, "sliding_window": 4},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
}
OTHERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "gpt2": ({"n_embd": 64, "n_layer": 8, "n_head": 4}, r"attn\.c_proj", r"mlp\.c_proj"),
    "mixtral": ({"num_local_experts": 4}, "o_proj", r"mlp\.experts\.down_proj"),
    "gpt_neox": ({}, r"attention\.dense", "dense_4h_to_h"),
    "falcon": ({}, r"self_attention\.dense", "dense_4h_to_h"),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, "out_proj", "fc2"),
}
"""Architectures of other names: how the projections at the end of attention and of the MLP are called in memory."""


def zeroed(model: Any, plan: Plan) -> Any:
    """The model with zeros in the last projections, and nothing skipped: a rendering of its own."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            place = name.split(".layers.")[-1].split(".")[0]
            for part in plan.parts:
                assert isinstance(part, Sublayers)
                if "o_proj" in name and int(place) in part.attention:
                    weight.zero_()
                if "down_proj" in name and int(place) in part.mlp:
                    weight.zero_()
    return pruned_view(model, Plan(plan.layers, plan.dropped))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_skipped_equals_what_is_zeroed(kind: str, tiny: Callable[..., Path]) -> None:
    folder = tiny(kind, **KINDS[kind])
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    want = logits(zeroed(load_model(folder), PLAN), ids)
    cut = load_model(folder, plan=PLAN)
    assert torch.equal(logits(cut, ids), want), "loaded"
    ran: list[str] = []
    for name, module in cut.named_modules():
        if name.endswith(("o_proj", "down_proj", "experts")):
            module.register_forward_hook(lambda *_, name=name: ran.append(name.split(".layers.")[1]))
    assert torch.equal(logits(pruned_view(load_model(folder), PLAN), ids), want), "a view of the whole"
    assert torch.equal(logits(cut, ids), want)
    assert {name.split(".")[0] for name in ran if "attn" in name} == {"1", "2", "4", "5", "6"}, "0 and 3 are not run"
    assert {name.split(".")[0] for name in ran if "mlp" in name} == {"0", "1", "3", "4", "6"}, "2 and 6 are not run"


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_generation_keeps_its_place_without_the_first_attention(kind: str, tiny: Callable[..., Path]) -> None:
    folder = tiny(kind, **KINDS[kind])
    how: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    ids = torch.randint(4, 300, (1, 7), generator=torch.Generator().manual_seed(1))
    want = zeroed(load_model(folder, dtype="float32"), PLAN).generate(ids, **how)
    assert torch.equal(load_model(folder, dtype="float32", plan=PLAN).generate(ids, **how), want)


@pytest.mark.parametrize("writer", ["copy", "mergekit"])
def test_the_checkpoint_is_the_live_cut(writer: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("llama")
    written = write_recipe(folder, PLAN, tmp_path / "r.yml")
    again = open_cut(tmp_path / "r.yml")
    assert again.plan == PLAN and Recipe.read(tmp_path / "r.yml").hash == written.recipe.hash
    assert "mergekit-yaml" in (tmp_path / "r.yml").read_text()
    done = prune(tmp_path / "r.yml", tmp_path / "out", writer=writer)
    assert done.writer == writer and done.proof is not None and done.proof.logits_compared
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(load_model(tmp_path / "out"), ids), logits(again.load(), ids))
    assert done.plan.describe() == "drops 1 of 8 layers: 5; the attention of 0,3; the MLP of 2,6"


def test_the_recipe_is_what_mergekit_itself_runs(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from lmprune.writing.mergekit import run_mergekit

    write_recipe(tiny("llama"), PLAN, tmp_path / "r.yml")
    data = yaml.safe_load((tmp_path / "r.yml").read_text())
    data.pop("lmprune")
    run_mergekit(data, tmp_path / "out")
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(load_model(tmp_path / "out"), ids), logits(load_model(tiny("llama"), plan=PLAN), ids))


def test_cuts_of_sublayers_share_what_comes_before(tiny: Callable[..., Path]) -> None:
    plans = {f"{layer}{name}": plan_of(8, [(layer, name)]) for layer in range(8) for name in ("attention", "mlp")}
    shared, separate = passes(walk(paths_of({"whole": Plan(8), **plans})))
    assert separate == 17 * 8 and shared == 8 + 2 * sum(range(1, 9))
    rng = np.random.default_rng(0)
    tokens = Tokens(tuple(rng.integers(4, 60, length).astype(np.int32) for length in (9, 12, 5)))
    model, some = load_model(tiny("qwen3"), dtype="float32"), [PLAN, Plan(8), *plans.values()]
    together = losses(model, some, tokens, progress=False).values
    assert np.array_equal(together, losses(model, some, tokens, share=False, progress=False).values)


def test_a_layer_without_both_is_dropped() -> None:
    plan = plan_of(6, [(1, "mlp"), (4, "attention"), (1, "attention"), (0, "mlp")])
    assert plan == Plan(6, (1,), (Sublayers((4,), (0,)),)) and plan_of(6, [(2, "mlp"), (2, "attention")]).parts == ()


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"mlp": [9]}, "list layers from 0 to 7"),
        ({"mlp": [3, 3]}, "ascending"),
        ({"mlps": [3]}, "did you mean 'mlp'"),
        ({"mlp": []}, "names no layer"),
        ([3], "not a mapping of attention, mlp"),
        ({"mlp": [2]}, "by lmprune.parts the slice"),
    ],
)
def test_wrong_parts_are_one_line(parts: Any, said: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    write_recipe(tiny("llama"), PLAN, tmp_path / "r.yml")
    data = yaml.safe_load((tmp_path / "r.yml").read_text())
    data["lmprune"]["parts"] = {"sublayers": parts}
    with pytest.raises(RecipeError, match=said):
        Recipe.from_data(data)


# --- projections of other names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(OTHERS))
def test_projections_of_other_names_are_found(kind: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Skipping, zeroed weights and biases, lmprune's checkpoint and mergekit's: one model."""
    from lmprune.writing.mergekit import run_mergekit

    how, attention, mlp = OTHERS[kind]
    folder = biased(tiny(kind, **how), tmp_path / "biased")
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = load_model(folder, dtype="float32")
    skipped = logits(pruned_view(whole, PLAN), ids)
    silenced = 0
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
            gone = [
                (attention, layer in PLAN.parts[0].attention),  # type: ignore[attr-defined]
                (mlp, layer in PLAN.parts[0].mlp),  # type: ignore[attr-defined]
            ]
            if any(go and re.search(rf"{end}(\.|$)", name) for end, go in gone):
                weight.zero_()
                silenced += 1
    assert silenced >= 4
    assert torch.equal(skipped, logits(pruned_view(whole, Plan(8, (5,))), ids)), "zeroed"
    written = write_recipe(folder, PLAN, tmp_path / "r.yml")
    assert Recipe.read(tmp_path / "r.yml").hash == written.recipe.hash
    done = prune(tmp_path / "r.yml", tmp_path / "out")
    assert done.proof is not None and done.proof.logits_compared
    assert torch.equal(logits(load_model(tmp_path / "out", dtype="float32"), ids), skipped), "the checkpoint"
    if written.mergekit:
        data = yaml.safe_load((tmp_path / "r.yml").read_text())
        data.pop("lmprune")
        run_mergekit(data, tmp_path / "by-mergekit")
        assert torch.equal(logits(load_model(tmp_path / "by-mergekit", dtype="float32"), ids), skipped), "mergekit"
    assert written.mergekit == (kind in ("gpt2", "mixtral", "opt"))  # for the others lmprune copies, as of whole layers


def biased(folder: Path, out: Path) -> Path:
    """The same model with biases that are not zero, where it has some."""
    model = load_model(folder, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.1, generator=generator)
    model.save_pretrained(out)
    for file in folder.glob("*token*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize(("kind", "criterion"), [("gpt2", "finercut"), ("mixtral", "block-pruner")])
def test_what_a_criterion_chooses_there_goes_the_whole_way(
    kind: str, criterion: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny(kind, **OTHERS[kind][0])
    few = ProfileSettings(samples=8, max_length=16)
    chosen = choose(open_cut(folder), criterion, drop=1, settings=few, data=DataSettings("demo"))
    (part,) = chosen.plan.parts
    assert len(part.attention) + len(part.mlp) == 2 and not chosen.plan.dropped
    write_recipe(folder, chosen.plan, tmp_path / "r.yml")
    done = prune(tmp_path / "r.yml", tmp_path / "out")
    assert done.proof is not None and done.proof.logits_compared
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(load_model(tmp_path / "out"), ids), logits(open_cut(tmp_path / "r.yml").load(), ids))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_generation_keeps_its_place_under_other_names(kind: str, tiny: Callable[..., Path]) -> None:
    folder = tiny(kind, **OTHERS[kind][0])
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = torch.randint(4, 300, (1, 7), generator=torch.Generator().manual_seed(1))
    cut = load_model(folder, dtype="float32", plan=PLAN)
    anew = ids
    for _ in range(8):
        anew = torch.cat([anew, logits(cut, anew)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cut.generate(ids, **how), anew)


def test_ends_that_are_not_the_models_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    write_recipe(tiny("gpt2", **OTHERS["gpt2"][0]), PLAN, tmp_path / "r.yml")
    text = (tmp_path / "r.yml").read_text()
    (tmp_path / "r.yml").write_text(text.replace("attn.c_proj", "attn.c_attn"))
    with pytest.raises(ModelError, match=r"what is called .* is not the end of its attention, which is"):
        open_cut(tmp_path / "r.yml").load()
    (tmp_path / "r.yml").write_text(text.replace("attn.c_proj", "attn c_proj"))
    with pytest.raises(RecipeError, match="list what names of projections hold"):
        open_cut(tmp_path / "r.yml")


def test_a_layer_without_attention_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model(tiny_config("jamba"))
    model.save_pretrained(tmp_path / "jamba")
    mamba = next(i for i, layer in enumerate(find_stack(model).layers) if not hasattr(layer, "self_attn"))
    with pytest.raises(ModelError, match="its attention does not end in a projection that lmprune knows"):
        write_recipe(tmp_path / "jamba", Plan(8, (), (Sublayers(attention=(mamba,)),)), tmp_path / "r.yml")
    assert not (tmp_path / "r.yml").exists()
    with pytest.raises(ModelError, match=f"layer {mamba} has no module called self_attn"):
        pruned_view(model, Plan(8, (), (Sublayers(attention=(mamba,)),)))


def test_a_sublayer_that_adds_more_than_its_projection_is_refused(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    honest = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: honest(self, x) + x)
    cut = pruned_view(load_model(tiny("llama")), PLAN)
    with pytest.raises(ModelError, match=r"layer 2: its MLP .* adds more than its last projection writes"):
        logits(cut, torch.tensor([[5, 6, 7]]))
