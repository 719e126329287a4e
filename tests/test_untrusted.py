"""Files that come from elsewhere: refused in one line, at a bounded price, and never followed out of their folder."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmprune.choosing import write_recipe
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import ModelError, RecipeError, shown
from lmprune.models.checkpoint import read_header
from lmprune.models.cut import open_cut
from lmprune.writing.pruning import prune

GOOD = """
slices:
  - sources: [{model: org/base, layer_range: [0, 3]}]
merge_method: passthrough
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


def read(text: str, folder: Path) -> Recipe:
    (folder / "r.yml").write_bytes(text.encode("utf-8", "surrogatepass"))
    return Recipe.read(folder / "r.yml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases are not read here"),
        (GOOD + "merge_method: passthrough\n", "stands twice"),
        (GOOD.replace("[0, 3]", "[0, 3], model: other"), "stands twice"),
        (GOOD + "chat_template: chatml\n", "another chat template, which lmprune does not write"),
        (GOOD + "tokenizer_source: union\n", "another tokenizer, which lmprune does not write"),
        (GOOD + "dtype: 2001-99-99\n", "r.yml is no plain YAML"),
        (GOOD + "dtype: 2001-01-01\n", "r.yml is no plain YAML"),
        (GOOD + "dtype: bfloat17\n", "did you mean 'bfloat16'"),
        (GOOD + "dtype: bfloat16\nout_dtype: float32\n", "Give the one that should be written"),
        (GOOD + "lmprune: {layers: " + "9" * 5000 + "}\n", "r.yml is no"),
        (GOOD + "lmprune: {layers: 0x" + "f" * 5000 + "}\n", "r.yml is no"),
        (GOOD + "lmprune: {layers: 1000000}\n", "a model has 1 to 10000"),
        (GOOD + "lmprune: {layers: true}\n", "which is not int"),
        (GOOD + "lmprune: {layers: 8, choice: 5}\n", "choice is 5, which is not a dict"),
        (GOOD + "lmprune: []\n", "'lmprune' is not a mapping"),
        (GOOD.replace("[0, 3]", "[0, 100000]"), "no model has more than 10000 layers"),
        (GOOD.replace("org/base", "'" + "x" * 100_000 + "', layer_rage: 1"), "unknown key 'layer_rage'"),
        (GOOD + 'dtype: "\\uD800"\n', "r.yml is no plain YAML"),
        ("[" * 20_000, "r.yml is no"),
        ("\x00", "r.yml is no"),
        ("", "a YAML mapping"),
        ("? {a: 1}\n: 2\n", "r.yml is no"),
        (GOOD + "base_model: ../elsewhere\n", None),
    ],
)
def test_recipes(text: str, said: str | None, tmp_path: Path) -> None:
    began = time.monotonic()
    if said is None:
        assert read(text, tmp_path).base_folder == "../elsewhere", "told once the base is known"
    else:
        with pytest.raises(RecipeError, match=said) as caught:
            read(text, tmp_path)
        assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert time.monotonic() - began < 5


def test_what_is_no_regular_file_is_not_read() -> None:
    with pytest.raises(RecipeError, match="/dev/zero is no file"):
        Recipe.read("/dev/zero")


@pytest.mark.parametrize(
    ("extra", "written"), [("dtype: float32\nout_dtype: bfloat16\n", "bfloat16"), ("out_dtype: float16\n", "float16")]
)
def test_the_type_is_what_mergekit_writes(extra: str, written: str, tmp_path: Path) -> None:
    assert read(GOOD + extra, tmp_path).dtype == written


def test_a_base_model_with_another_tokenizer_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, other = tiny("qwen3"), tmp_path / "other"
    shutil.copytree(base, other)
    path = tmp_path / "r.yml"
    write_recipe(base, Plan(8, (3,)), path)
    assert open_cut(path).plan == Plan(8, (3,)), "the base folder that we wrote has the base's own tokenizer"
    path.write_text(path.read_text().replace(str(Recipe.read(path).base_folder), str(other)))
    assert open_cut(path).layers == 7
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 7}))
    with pytest.raises(RecipeError, match=r"whose tokenizer_config\.json is not that of"):
        open_cut(path)


def test_two_sets_of_weights_in_a_folder_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from lmprune.models.loading import load_model

    model = load_model(tiny("llama"))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shutil.copyfile(tiny("llama") / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="may be two models"):
        _ = open_cut(tmp_path).checkpoint


def test_a_layer_count_that_was_lowered_by_hand_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 6}))
    with pytest.raises(ModelError, match="promises 6 layers, but the weights are of 8"):
        write_recipe(folder, Plan(6, (3,)), tmp_path / "r.yml")


@pytest.mark.parametrize("target", ["/etc/hostname", "/dev/zero"])
def test_links_out_of_a_models_folder_are_not_followed(target: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    write_recipe(folder, Plan(8, (3,)), tmp_path / "r.yml")
    (folder / "notes.txt").symlink_to(target)
    if target == "/dev/zero":  # no regular file, so it does not belong to the model
        prune(tmp_path / "r.yml", tmp_path / "out", logits=False)
        assert not (tmp_path / "out" / "notes.txt").exists()
        return
    with pytest.raises(ModelError, match="a link out of the model's folder"):
        prune(tmp_path / "r.yml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def header(tensors: dict[str, Any], size: int) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def tensor(start: Any, stop: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": tensor(0, 8), "b": tensor(4, 12)},
        {"a": tensor(0, 8), "b": tensor(9, 17)},
        {"a": tensor(4, 12)},
        {"a": tensor(0, 8, (3,))},
        {"a": tensor(0, 8, (2,), "F64")},
        {"a": tensor(8, 0)},
        {"a": tensor(0, 8, (-2,))},
        {"a": tensor(0, 8, (2.0,))},
        {"a": tensor(0, True, (2,))},
        {"a": tensor(0, 8, (1 << 70,))},
        {"a": tensor(0, 8, "2")},
        {"a": tensor(0, 8, (2,), None)},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"a": 5},
    ],
)
def test_headers_that_contradict_themselves_are_refused(tensors: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    size = max(
        (n for t in tensors.values() if isinstance(t, dict) for n in t["data_offsets"] if isinstance(n, int)), default=8
    )
    file.write_bytes(header(tensors, size))
    with pytest.raises(ModelError, match="corrupt"):
        read_header(file)


def test_values_are_shown_short() -> None:
    assert shown("x" * 10**6) == "'" + "x" * 76 + "..."
    assert shown("\x1b[2J\n") == repr("\x1b[2J\n")
    assert shown(10**6000) == "a number of very many digits"
    assert "\ud800" not in shown("\ud800")


@pytest.fixture
def adapter(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    from lmprune.models.adapters import add_lora, save_adapter
    from lmprune.models.loading import load_model

    live = load_model(tiny("llama"))
    save_adapter(add_lora(live, rank=2, alpha=4, dropout=0.0, modules=["up_proj"], seed=0), tmp_path / "adapter")
    return tmp_path / "adapter"


def attach(adapter: Path, base: Path) -> None:
    from lmprune.models.adapters import attach_adapter
    from lmprune.models.loading import load_model

    attach_adapter(load_model(base), str(adapter), base)


def test_an_adapters_pattern_is_not_run_for_ever(
    adapter: Path, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmprune.models.patterns.SECONDS", 1.0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key, value in (("target_modules", r"(\w+\.?)+\d+x"), ("rank_pattern", {r"(\w+\.?)+\d+x": 3})):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ModelError, match="takes too long"):
            attach(adapter, tiny("llama"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": r".*\.mlp\.(up)_proj"}))
    attach(adapter, tiny("llama"))


def test_a_pickled_adapter_is_not_loaded(adapter: Path, tiny: Callable[..., Path]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("it was run",))

    import pickle

    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError, match=r"only adapter_model\.bin, a pickle"):
        attach(adapter, tiny("llama"))


def test_names_in_foreign_files_are_not_looked_up(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from lmprune.cuts.lineage import Base, Lineage
    from lmprune.models.locate import locate_here

    asked: list[Any] = []

    def download(name: str, **how: Any) -> str:
        asked.append(how["local_files_only"])
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = tiny("llama", num_hidden_layers=7)
    told = Lineage(stage="prune", base=Base("evil/tracker", None, "f"), plan=Plan(8, (3,)))
    monkeypatch.setattr(Lineage, "read", classmethod(lambda cls, *_, **__: told))
    origin = open_cut(folder).origin
    assert origin.base is None and "not on this machine" in str(origin.problem)
    assert asked == [True] and locate_here(str(folder)).path == folder


def test_a_config_of_another_size_takes_no_memory(tiny: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": 1 << 33}))
    with pytest.raises(ModelError, match=r"which is of [\d,]{16,} parameters"):
        open_cut(tmp_path / "model").load()


def test_a_profile_unpacks_no_more_than_it_promises() -> None:
    import base64
    import zlib

    from lmprune.profiling.distances import _unb64

    bomb = base64.b64encode(zlib.compress(bytes(1 << 24))).decode()
    with pytest.raises(ValueError, match="hold not 80 bytes"):
        _unb64(bomb, np.dtype("<f8"), (10,))


def test_memory_of_losses_follows_the_vocabulary() -> None:
    """The defaults of a model of 262,144 tokens, on a machine of 16 GB and on one of 80."""
    from lmprune.healing.methods.lora import Lora
    from lmprune.healing.training import micro_batch

    method = Lora(batch_size=16, max_length=512)
    assert micro_batch(method, None, 1, vocabulary=262_144, memory=16 << 30)[0] == 1
    assert micro_batch(method, None, 1, vocabulary=262_144, memory=80 << 30)[0] == 4
    assert micro_batch(method, None, 1, vocabulary=32_000, memory=16 << 30)[0] == 8


def test_losses_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from lmprune.forward.objectives import loss

    torch.manual_seed(0)
    logits, ids = torch.randn(2, 9, 11), torch.randint(11, (2, 9))
    whole = loss.summed(logits, ids, ids != 3)
    monkeypatch.setattr(loss, "_PIECE_BYTES", 1)
    assert torch.equal(loss.summed(logits, ids, ids != 3), whole)
