"""The small files beside weights: what no host could read is refused before anything is written, the rest is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmprune.choosing import write_recipe
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import ModelError
from lmprune.healing import heal
from lmprune.healing.settings import HealSettings
from lmprune.models.companions import check_companions
from lmprune.models.cut import open_cut
from lmprune.text.sources import DataSettings
from lmprune.writing.pruning import prune
from lmprune.writing.quantizing import QuantizeSettings, quantize

DIGITS, DEEP = '{"top_k": ' + "9" * 5000 + "}", '{"a": ' * 20_000
BROKEN = [
    *(
        (name, text)
        for name in ("generation_config.json", "tokenizer_config.json")
        for text in (DIGITS, DEEP, "[]", "")
    ),
    *((name, "5") for name in ("special_tokens_map.json", "added_tokens.json", "preprocessor_config.json")),
    ("generation_config.json", '{"eos_token_id": "\\ud800"}'),
    ("generation_config.json", '{"watermarking_config": 5}'),
    ("processor_config.json", DEEP),
    ("chat_template.json", "null"),
    ("vocab.json", "[" * 20_000),
    ("chat_template.jinja", b"\xff\xfe"),
    ("additional_chat_templates/tools.jinja", b"\xff\xfe"),
]


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model of 8 layers whose recipe needs a base folder."""
    kinds = {"layer_types": ["full_attention", "sliding_attention"] * 4}
    base = tiny("qwen3", use_sliding_window=True, sliding_window=64, **kinds)
    return Path(shutil.copytree(base, tmp_path / "model"))


STAGES: dict[str, Callable[[Path, Path, Path], Any]] = {
    "recipe": lambda model, recipe, out: write_recipe(model, Plan(8, (2,)), out.with_suffix(".yml")),
    "prune": lambda model, recipe, out: prune(recipe, out),
    "prune by copying": lambda model, recipe, out: prune(recipe, out, writer="copy", check=False),
    "heal": lambda model, recipe, out: heal(recipe, out, HealSettings(steps=1), DataSettings(data="demo")),
    "heal by refit": lambda model, recipe, out: heal(recipe, out, HealSettings(method="refit"), DataSettings("demo")),
    "quantize": lambda model, recipe, out: quantize(model, out, "int8", QuantizeSettings(samples=0)),
}


def _write(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(("name", "content"), BROKEN)
def test_what_no_host_could_read_is_refused(name: str, content: str | bytes, tmp_path: Path) -> None:
    _write(tmp_path, name, content)
    with pytest.raises(ModelError) as said:
        check_companions(tmp_path)
    assert name in str(said.value) and len(str(said.value)) < 600 and "\n" not in str(said.value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json"])
def test_nothing_is_written_before_they_are_read(
    stage: str, name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "cut.yml"
    recipe.write_text(Recipe(str(model), tuple(Plan(8, (3,)).slices()), layers=8).to_yaml())
    _write(model, name, DIGITS)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("lmprune.files._half_folder", lambda path: pytest.fail(f"{path} was begun"))
    with pytest.raises(ModelError, match=name):
        STAGES[stage](model, recipe, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_pickles_and_adapters_are_not_converted_either(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from lmprune.models.adapters import add_lora, save_adapter
    from lmprune.models.loading import load_model

    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    live = load_model(folder)
    torch.save(live.state_dict(), tmp_path / "pytorch_model.bin")
    save_adapter(add_lora(live, rank=2, alpha=4, dropout=0.0, modules=["up_proj"], seed=0), tmp_path / "adapter")
    monkeypatch.setenv("LMPRUNE_CACHE", str(tmp_path / "cache"))
    _write(folder, "generation_config.json", DEEP)
    with pytest.raises(ModelError, match="generation_config"):
        open_cut(f"{folder}+{tmp_path / 'adapter'}")
    (folder / "model.safetensors").unlink()
    shutil.move(tmp_path / "pytorch_model.bin", folder)
    with pytest.raises(ModelError, match="generation_config"):
        open_cut(folder, allow_pickle=True)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_generation_config_that_the_host_does_not_save_is_copied(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 2's own: a temperature where nothing is drawn. Wherever a live model is saved."""
    from lmprune.models.adapters import add_lora, save_adapter
    from lmprune.models.loading import load_model

    monkeypatch.setenv("LMPRUNE_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    said = json.dumps({"temperature": 0.9, "top_p": 0.6, "do_sample": False, "eos_token_id": 0})
    _write(folder, "generation_config.json", said)
    quantize(folder, tmp_path / "small", "int8", QuantizeSettings(samples=0))
    save_adapter(
        add_lora(load_model(folder), rank=2, alpha=4, dropout=0.0, modules=["up_proj"], seed=0), tmp_path / "adapter"
    )
    joined = open_cut(f"{folder}+{tmp_path / 'adapter'}").base.path
    for out in (tmp_path / "small", joined):
        assert (out / "generation_config.json").read_text() == said
