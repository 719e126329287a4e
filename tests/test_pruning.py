"""The written checkpoint is the model pruned in memory, bit for bit, whoever wrote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_cli import invoke

from lmprune.choosing import write_recipe
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import HostError, LmpruneError, ModelError, OutputError, RecipeError, VerifyError
from lmprune.forward.calls import skipping
from lmprune.models.checkpoint import read_config
from lmprune.models.cut import open_cut
from lmprune.models.fields import changed_fields
from lmprune.models.loading import load_config, load_model
from lmprune.models.locate import demo_folder
from lmprune.writing.mergekit import needs_base_folder, run_mergekit
from lmprune.writing.pruning import prune
from lmprune.writing.verify import probe_batch, verify

IRREGULAR = (3, 4, 5)
KINDS = ["llama", "mistral", "qwen3", "demo"]


def _base(kind: str, tiny: Callable[..., Path]) -> Path:
    return demo_folder() if kind == "demo" else tiny(kind)


def _recipe(base: Path, out: Path, dropped: tuple[int, ...] = IRREGULAR) -> Path:
    cut = open_cut(base)
    write_recipe(cut, Plan(cut.layers, dropped), out)
    return out


def _truth(base: Path, dropped: tuple[int, ...] = IRREGULAR) -> torch.Tensor:
    """Logits of the whole model whose dropped layers pass their input on."""
    model = load_model(base)
    with torch.inference_mode(), skipping(model, dropped):
        return model(input_ids=probe_batch(model.config.vocab_size)).logits


def _logits(folder: Path) -> torch.Tensor:
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.inference_mode():
        return model.eval()(input_ids=probe_batch(model.config.vocab_size)).logits


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in ("llama", "mistral"))) for k in KINDS]
)
def test_plain_mergekit_is_right(kind: str, tiny: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]) -> None:
    base = _base(kind, tiny)
    _recipe(base, tmp_path / "recipe.yml")
    run("mergekit-yaml", "recipe.yml", tmp_path / "out")
    assert torch.equal(_logits(tmp_path / "out"), _truth(base))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not verify(Recipe.read(tmp_path / "recipe.yml"), tmp_path / "out").differences


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", ["mergekit", "copy"])
def test_prune_is_right(kind: str, writer: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = _base(kind, tiny)
    recipe = _recipe(base, tmp_path / "recipe.yml")
    done = prune(Recipe.read(recipe), tmp_path / "out", writer=writer)
    assert done.proof and done.proof.largest_logit_difference == 0.0
    assert torch.equal(_logits(tmp_path / "out"), _truth(base))
    lineage = json.loads((tmp_path / "out" / "lmprune.json").read_text())
    assert lineage["dropped"] == [3, 4, 5] and lineage["proof"]["differences"] == []
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_only_models_that_need_it_get_a_base_folder(tiny: Callable[..., Path], tmp_path: Path) -> None:
    for kind, needed in (("llama", False), ("mistral", False), ("qwen3", True), ("opt", True)):
        folder = tiny(kind, ffn_dim=64, word_embed_proj_dim=64) if kind == "opt" else tiny(kind)
        changed = changed_fields(load_config(folder).to_dict(), (0, 1, 7))
        assert needs_base_folder(read_config(folder), changed) is needed


def test_a_recipe_for_other_weights_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.read(_recipe(tiny("llama"), tmp_path / "recipe.yml"))
    other = replace(recipe, model=str(tiny("llama", tie_word_embeddings=True)))
    with pytest.raises(RecipeError, match="other weights"):
        prune(other, tmp_path / "out")
    with pytest.raises(RecipeError, match="other weights"):
        prune(replace(recipe, model=str(tiny("mistral", hidden_size=32))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_proof_leaves_nothing(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    import lmprune.writing.pruning

    def wrong(merge: Any, out: Path, **_: Any) -> None:
        original(merge, out)
        tensors = load_file(out / "model.safetensors")
        name = next(name for name in tensors if "layers.3" in name and "down_proj" in name)
        tensors[name] += 1
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    original = lmprune.writing.pruning.run_mergekit
    monkeypatch.setattr(lmprune.writing.pruning, "run_mergekit", wrong)
    recipe = Recipe.read(_recipe(tiny("llama"), tmp_path / "recipe.yml"))
    with pytest.raises(VerifyError, match=r"layers\.3.*holds other values"):
        prune(recipe, tmp_path / "out", writer="mergekit")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yml"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("value", "holds other values"),
        ("missing", "is missing"),
        ("extra", "should not be there"),
        ("shape", "has shape"),
        ("dtype", "is F32, not BF16"),
        ("config", "config.rms_norm_eps"),
        ("layers", "config.num_hidden_layers is 8, not 5"),
        ("type to load", "config.dtype is 'float32', not 'bfloat16'"),
        ("vocabulary", "the tokenizer's vocabulary is not that of"),
        ("template", "the tokenizer's chat template is not that of"),
        ("spelling", ""),
    ],
)
def test_verify_finds_every_kind_of_difference(
    damage: str, says: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = Recipe.read(_recipe(tiny("llama"), tmp_path / "recipe.yml"))
    out = tmp_path / "out"
    prune(recipe, out, writer="copy", check=False)
    file = out / "model.safetensors"
    tensors = load_file(file)
    config = json.loads((out / "config.json").read_text())
    name = "model.layers.2.mlp.up_proj.weight"
    match damage:
        case "value":
            tensors[name][0, 0] += 1
        case "missing":
            del tensors[name]
        case "extra":
            tensors["model.layers.5.x"] = torch.zeros(1)
        case "shape":
            tensors[name] = tensors[name][:-1].contiguous()
        case "dtype":
            tensors[name] = tensors[name].float()
        case "config":
            config["rms_norm_eps"] = 0.5
        case "layers":
            config["num_hidden_layers"] = 8
        case "type to load":
            config["dtype"] = "float32"
        case "vocabulary":
            text = (out / "tokenizer.json").read_text()
            (out / "tokenizer.json").write_text(text.replace("<|pad|>", "<|pat|>"))
        case "template":
            (out / "chat_template.jinja").write_text("{{ messages }}")
        case "spelling":  # of the same tokenizer
            (out / "tokenizer.json").write_text(json.dumps(json.loads((out / "tokenizer.json").read_text())))
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, file, metadata={"format": "pt"})
    proof = verify(recipe, out)
    if not says:
        assert proof.differences == () and proof.logits_compared
        return
    assert any(says in line for line in proof.differences), proof.differences
    assert not proof.logits_compared


def test_a_hosts_error_is_one_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        run_mergekit({"slices": [], "merge_method": "nonsense"}, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_outputs_are_refused_before_any_work(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.read(_recipe(tiny("llama"), tmp_path / "recipe.yml"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        prune(recipe, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_broken_models_are_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny("llama"), broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        _recipe(broken, tmp_path / "recipe.yml")
    config = json.loads((broken / "config.json").read_text()) | {"num_hidden_layers": 9}
    shutil.copy(tiny("llama") / "model.safetensors", broken)
    (broken / "config.json").write_text(json.dumps(config))
    recipe = Recipe(str(broken), ((0, 3), (6, 9)), layers=9)
    with pytest.raises(LmpruneError, match="promises 9 layers"):
        prune(recipe, tmp_path / "out", writer="copy")
    assert not (tmp_path / "out").exists()


def test_a_stranger_in_the_place_of_the_base_folder_is_kept(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(str(Recipe.read(_recipe(tiny("qwen3"), tmp_path / "recipe.yml")).base_folder))
    assert (folder / "model.safetensors").is_symlink() and folder.name.startswith("recipe-base-")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mine").write_text("x")
    with pytest.raises(OutputError, match="no base folder"):
        _recipe(tiny("qwen3"), tmp_path / "recipe.yml")


def test_a_recipe_is_never_left_with_the_base_folder_of_another(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lmprune.cuts.recipe

    path = _recipe(tiny("qwen3"), tmp_path / "recipe.yml")
    first = Recipe.read(path)
    monkeypatch.setattr(lmprune.cuts.recipe, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _recipe(tiny("qwen3"), path, (1,))
    assert Recipe.read(path) == first and read_config(Path(str(first.base_folder)))["num_hidden_layers"] == 5
    monkeypatch.undo()
    second = Recipe.read(_recipe(tiny("qwen3"), path, (1,)))
    assert [str(folder) for folder in tmp_path.glob("recipe-base-*")] == [second.base_folder]


def test_a_recipe_from_another_machine_is_rebased(tiny: Callable[..., Path], tmp_path: Path, run: Any) -> None:
    path = _recipe(tiny("qwen3"), tmp_path / "recipe.yml")
    before = Recipe.read(path)
    shutil.rmtree(str(before.base_folder))
    text = path.read_text().replace(str(before.base_folder), "/elsewhere/recipe-base-00000000")
    path.write_text(text)
    assert "lmprune recipe RECIPE --rebase -o RECIPE" in text
    run("lmprune", "recipe", path, "--rebase", "-o", path)
    assert Recipe.read(path) == before and Path(str(before.base_folder)).is_dir()
    run("mergekit-yaml", path, "out")
    assert not verify(path, tmp_path / "out").differences


def test_mergekit_is_promised_only_where_it_is_right(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert "or: mergekit-yaml" in _recipe(tiny("llama"), tmp_path / "right.yml").read_text()
    folder = tmp_path / "a+b"
    shutil.copytree(tiny("llama"), folder)
    assert "mergekit-yaml" not in _recipe(folder, tmp_path / "plus.yml").read_text()
    assert "mergekit-yaml" not in _recipe(tiny("gpt_neox"), tmp_path / "wrong.yml").read_text()


def test_another_dtype_is_written_by_mergekit_alone(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = replace(Recipe.read(_recipe(tiny("llama"), tmp_path / "recipe.yml")), dtype="float32")
    done = prune(recipe, tmp_path / "out")
    assert done.writer == "mergekit"
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    with pytest.raises(RecipeError, match="float32"):
        prune(recipe, tmp_path / "other", writer="copy")


def test_what_cannot_be_read_is_no_difference(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.read(_recipe(tiny("llama"), tmp_path / "recipe.yml"))
    prune(recipe, tmp_path / "out", check=False)
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="corrupt"):
        verify(recipe, tmp_path / "out")


def test_old_buffers_and_the_prefix_of_the_base_are_no_difference(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Llama's old files hold rotary buffers; GPT-2's on the Hub hold masks and leave out ``transformer.``."""
    for kind, extra in (
        ("llama", "model.layers.{}.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.{}.attn.bias"),
    ):
        recipe = Recipe.read(_recipe(tiny(kind), tmp_path / f"{kind}.yml"))
        out = tmp_path / kind
        prune(recipe, out, writer="copy", check=False)
        tensors = {
            name.removeprefix("transformer."): value for name, value in load_file(out / "model.safetensors").items()
        }
        tensors |= {extra.format(layer): torch.ones(3) for layer in range(5)}
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        assert verify(recipe, out).differences == ()
        (real,) = [name for name in tensors if name.endswith(("2.attn.c_attn.bias", "2.mlp.up_proj.weight"))]
        del tensors[real]
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        assert len(verify(recipe, out).differences) == 1, "a parameter that sounds like a buffer is missed"


def test_a_tied_head_that_was_written_too_is_no_difference(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    recipe, out = tmp_path / "r.yml", tmp_path / "out"
    write_recipe(tiny("llama", tie_word_embeddings=True), Plan(8, (3,)), recipe)
    prune(recipe, out)
    tensors = load_file(out / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    for moved, said in ((0, ()), (1, ("lm_head.weight should not be there",))):
        save_file(tensors | {"lm_head.weight": head + moved}, out / "model.safetensors", metadata={"format": "pt"})
        assert verify(recipe, out, logits=False).differences == said


def test_verify_notes_its_proof_beside_the_lineage_where_asked(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.read(_recipe(tiny("llama"), tmp_path / "recipe.yml"))
    out = tmp_path / "out"
    prune(recipe, out, writer="copy", check=False)
    lineage = json.loads((out / "lmprune.json").read_text())
    assert lineage["proof"] is None
    verify(recipe, out)
    assert json.loads((out / "lmprune.json").read_text()) == lineage
    verify(recipe, out, note=True)
    after = json.loads((out / "lmprune.json").read_text())
    assert after.pop("proof")["largest_logit_difference"] == 0.0
    assert lineage | {"proof": None} == after | {"proof": None}
    (out / "lmprune.json").unlink()  # as another tool leaves it
    verify(recipe, out, logits=False, note=True)
    noted = json.loads((out / "lmprune.json").read_text())
    assert noted["writer"] == "unknown" and noted["kept"] == [0, 1, 2, 6, 7] and not noted["proof"]["logits_compared"]
    (out / "lmprune.json").write_text("{")
    with pytest.raises(ModelError, match="written anew"):
        verify(recipe, out, logits=False, note=True)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_model_larger_than_memory_is_compared_by_its_tensors(
    dtype: str | None, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lmprune.forward.machine

    recipe = replace(Recipe.read(_recipe(tiny("llama"), tmp_path / "recipe.yml")), dtype=dtype)
    monkeypatch.setattr(lmprune.forward.machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    out = tmp_path / "out"
    proof = prune(recipe, out).proof
    assert proof and not proof.logits_compared and proof.bytes_compared > 0
    assert proof.logits_skipped and "B of memory and 1.0 kB are free" in proof.logits_skipped
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.4.mlp.up_proj.weight"][3, 3] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert verify(recipe, out).differences == ("model.layers.4.mlp.up_proj.weight holds other values",)


@pytest.mark.parametrize("failure", ["error", "wrong"])
def test_where_mergekit_fails_the_tensors_are_copied(
    failure: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lmprune.writing.pruning

    def fail(merge: Any, out: Path, **_: Any) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        if failure == "error":
            raise HostError("mergekit could not write this model: KeyError")

    monkeypatch.setattr(lmprune.writing.pruning, "run_mergekit", fail)
    done = prune(Recipe.read(_recipe(tiny("llama"), tmp_path / "recipe.yml")), tmp_path / "out")
    assert done.writer == "copy" and done.reason.startswith("mergekit failed on this checkpoint")
    assert done.proof and done.proof.largest_logit_difference == 0.0


def test_verify_lists_what_plain_mergekit_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit drops the routed experts of a Qwen2-MoE with some dense layers, and reports success."""
    base = tmp_path / "base"
    tiny_model(tiny_config("qwen2_moe")).save_pretrained(base)
    recipe = _recipe(base, tmp_path / "recipe.yml")
    plain = {name: value for name, value in Recipe.read(recipe).merge(str(base)).items() if name != "base_model"}
    run_mergekit(plain, tmp_path / "out")
    code, out, err = invoke(capsys, monkeypatch, "verify", recipe, tmp_path / "out")
    lines = out.splitlines()
    assert code == 3 and err == ""
    assert lines and all(line.startswith("differs: ") for line in lines)
    assert any("mlp.experts" in line and line.endswith("is missing") for line in lines)


def test_mergekit_writes_shards_no_larger_than_the_bases(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """It holds each shard in memory until it is written."""
    base = tmp_path / "base"
    load_model(tiny("llama")).save_pretrained(base, max_shard_size="200KB")
    recipe = Recipe(str(base), ((0, 3), (6, 8)), layers=8)
    assert prune(recipe, tmp_path / "out", writer="mergekit").proof
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    written = list((tmp_path / "out").glob("*.safetensors"))
    assert len(written) > 1 and all(file.stat().st_size <= 1.1 * largest for file in written)
