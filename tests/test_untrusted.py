"""Files that come from elsewhere: refused in one line, at a bounded price, and never followed out of their folder."""

from __future__ import annotations

import copy
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
    with pytest.raises(ModelError, match=r"a link out of the model's folder|is no regular file"):
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
        {"a": tensor(0, 8, (2,), "f32")},
        {"a": tensor(0, 8, (2,), "F99")},
        {"a": tensor(0, 8, (2,), "F4")},
        {"a": tensor(0, 1, (1,), "F4")},
        {"": tensor(0, 8)},
        {"a\0": tensor(0, 8)},
        {"\x1b[2J": tensor(0, 8)},
        {"\ud800": tensor(0, 8)},
        {"a": tensor(0, 8), "__metadata__": 5},
        {"a": tensor(0, 8), "__metadata__": {"format": {"x": 1}}},
    ],
)
def test_headers_that_contradict_themselves_are_refused(tensors: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    size = max(
        (n for t in tensors.values() if isinstance(t, dict) for n in t.get("data_offsets", []) if isinstance(n, int)),
        default=8,
    )
    file.write_bytes(header(tensors, size))
    with pytest.raises(ModelError, match="corrupt"):
        read_header(file)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_headers_of_another_encoding_are_refused(encoding: str, tmp_path: Path) -> None:
    """Python's reader of JSON would take them, and no other."""
    text = json.dumps({"a": tensor(0, 8)}).encode(encoding)
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ModelError, match="corrupt"):
        read_header(tmp_path / "x")


def test_headers_that_say_a_thing_twice_are_refused(tmp_path: Path) -> None:
    one = json.dumps({"a": tensor(0, 8)})
    for text in (one[:-1] + ", " + one[1:], one.replace('"dtype"', '"dtype": "I32", "dtype"'), "  " + one):
        (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(8))
        with pytest.raises(ModelError, match="corrupt"):
            read_header(tmp_path / "x")


def test_types_that_share_bytes_are_counted_in_bits(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(header({"a": tensor(0, 2, (4,), "F4"), "b": tensor(2, 5, (2, 2), "F6_E2M3")}, 5))
    assert [entry.stop - entry.start for entry in read_header(tmp_path / "x").values()] == [2, 3]


@pytest.mark.parametrize("number", ["00", "\u0660", "\u00b2", "-1", ""])
def test_layers_that_are_numbered_as_nobody_does_are_refused(
    number: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Else they would be read as another layer, or kept beside it."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.{number}.mlp.up_proj.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is of no layer that this model has"):
        prune(Recipe(str(folder), tuple(Plan(8, (3,)).slices()), layers=8), tmp_path / "out", logits=False)


@pytest.mark.parametrize(
    "text", ["0-999999", ",".join(map(str, range(20_000))), "1," * 50_000 + "1", "9" * 6000, "\u0663"]
)
def test_a_list_of_layers_takes_no_time(text: str) -> None:
    from lmprune.cuts.plan import parse_layers, parse_numbers
    from lmprune.errors import PlanError, UsageError
    from lmprune.sweeping.settings import SweepSettings

    began = time.process_time()
    with pytest.raises(PlanError) as said:
        parse_layers(text)
    assert len(str(said.value)) < 300
    with pytest.raises(PlanError):
        parse_numbers(f"{text}x", "--protect")
    if "," in text:
        with pytest.raises(UsageError):
            SweepSettings(points=f"{text},0").names("points"), SweepSettings(points=f"{text},").names("points")
    assert time.process_time() - began < 2


def test_a_point_of_more_layers_than_any_model_has_is_none() -> None:
    from lmprune.sweeping.points import Point

    data = Point("angular-02", "angular", 12, (2, 3)).to_data()
    for layers in (10**400, 10_001, 0, -5):
        with pytest.raises(ValueError, match=r"more layers than any model has|not there"):
            Point.from_data(data | {"layers": layers, "dropped": [layers - 1]})


def test_no_message_moves_a_terminals_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever forgot to show a value shortly: names of files and folders are in most messages."""
    from lmprune.cli import _fail

    assert _fail("a\x1b[2J\u202e b\nc é ⚠", 1) == 1
    assert capsys.readouterr().err == "lmprune: a\\x1b[2J\\u202e b\\nc é ⚠\n"


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


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_weights_that_compute_no_numbers_are_called_that(
    factor: float, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """And not a fault of what was merged or written."""
    from safetensors.torch import load_file, save_file

    from lmprune.healing import HealSettings, heal
    from lmprune.text.sources import DataSettings
    from lmprune.writing.quantizing import QuantizeSettings, quantize

    shutil.copytree(tiny("llama"), tmp_path / "model")
    broken = {name: tensor * factor for name, tensor in load_file(tiny("llama") / "model.safetensors").items()}
    save_file(broken, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    write_recipe(tmp_path / "model", Plan(8, (3,)), tmp_path / "r.yml")
    settings = HealSettings(steps=1, batch_size=1, max_length=16, eval_blocks=1, device="cpu")
    with pytest.raises(ModelError, match="its weights are broken"):
        heal(tmp_path / "r.yml", tmp_path / "out", settings, DataSettings(data="demo"))
    with pytest.raises(ModelError, match="its weights are broken"):
        quantize(tmp_path / "model", tmp_path / "out", "nf4", QuantizeSettings(samples=0))
    assert not (tmp_path / "out").exists()


def test_logits_that_all_agree_are_no_distance_apart() -> None:
    """As those of a model of zeros, whose spread is nothing to divide by."""
    import torch

    from lmprune.healing.writing import relative_distance

    same, other = torch.ones(1, 4, 4), torch.eye(4)[None]
    assert (relative_distance(same, same), relative_distance(other, same)) == (0.0, float("inf"))


def test_a_file_without_tensors_is_no_model(tiny: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(header({}, 0))
    with pytest.raises(ModelError, match="holds no tensors"):
        write_recipe(tmp_path / "model", Plan(8, (3,)), tmp_path / "r.yml")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("num_hidden_layers", 0, r"/model: the config's num_hidden_layers is 0"),
        ("intermediate_size", 96, r"weight, which is \[64, 128\] where the config says \[64, 96\]$"),
    ],
)
def test_a_config_that_is_wrong_is_named_with_its_sizes(
    name: str, value: int, said: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ModelError, match=said):
        open_cut(tmp_path / "model").load()


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


def test_memory_of_a_step_follows_vocabulary_and_memory() -> None:
    """The defaults of a model of 270M parameters and 262,144 tokens, with 8 and 60 GB free; and few tokens."""
    from types import SimpleNamespace

    from lmprune.healing.methods.lora import Lora
    from lmprune.healing.training import block_bytes, micro_batch

    method = Lora(batch_size=16, max_length=512)

    def micro(vocabulary: int, memory: int, *, taught: bool = False, recomputed: bool = False, layers: int = 18) -> int:
        config = SimpleNamespace(
            vocab_size=vocabulary, hidden_size=640, intermediate_size=2048, num_hidden_layers=layers
        )
        block = block_bytes(config, method.max_length, itemsize=4, taught=taught, recomputed=recomputed)
        return micro_batch(method, None, 1, block=block, memory=memory)[0]

    assert micro(262_144, 8 << 30) == 1
    assert micro(262_144, 60 << 30) == 8 and micro(262_144, 60 << 30, taught=True) == 4
    assert micro(1000, 8 << 30) == 4 and micro(1000, 8 << 30, recomputed=True) == 8
    assert micro(1000, 1 << 20) == 1


def test_one_block_that_does_not_fit_is_refused_before_the_first_step(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU memory is not refused but taken, until the system ends the process."""
    from lmprune.errors import LmpruneError
    from lmprune.healing import heal, learning
    from lmprune.healing.settings import HealSettings
    from lmprune.text.sources import DataSettings

    recipe = tmp_path / "r.yml"
    write_recipe(tiny("llama"), Plan(8, (3,)), recipe)
    monkeypatch.setattr(learning, "free_memory", lambda device: 1_000_000)
    with pytest.raises(LmpruneError, match=r"one block of 64 tokens of a vocabulary of 320 .*Use --max-length \d+ or"):
        heal(
            recipe, tmp_path / "out", HealSettings(steps=1, max_length=64, eval_blocks=2, device="cpu"),
            DataSettings(data="demo"),
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["r.yml"]


@pytest.mark.parametrize(("free", "batches"), [(1 << 40, [4]), (4 * 4 * 15 * 320 * 2, [2, 2]), (0, [1, 1, 1, 1])])
def test_held_out_losses_take_what_memory_has_room_for(
    free: int, batches: list[int], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.forward import loss

    model = open_cut(tiny("llama")).load(dtype="float32")
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args, given: seen.append(len(given["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(loss, "free_memory", lambda device: free)
    loss.held_out_losses(model, np.full((4, 15), 7, np.int32), batch=16)
    assert seen == batches


@pytest.mark.slow
def test_healing_with_a_large_vocabulary_stays_within_little_memory(tmp_path: Path) -> None:
    """262,144 tokens at the default settings, in a process that may have 4 GB besides what libraries take."""
    import os
    import subprocess
    import sys

    resource = pytest.importorskip("resource")
    from toys import model_of

    from lmprune.models.locate import demo_folder

    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    model_of("llama", vocab_size=1 << 18, max_position_embeddings=512, **small).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_folder() / name, tmp_path / "model" / name)
    write_recipe(tmp_path / "model", Plan(6, (3,)), tmp_path / "r.yml")
    most = 4 << 30
    words = ["-m", "lmprune", "heal", "r.yml", "out", "--data", "demo", "--steps", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (most, most)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10 < most


def test_losses_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from lmprune.forward.objectives import loss

    torch.manual_seed(0)
    logits, ids = torch.randn(2, 9, 11), torch.randint(11, (2, 9))
    whole = loss.summed(logits, ids, ids != 3)
    monkeypatch.setattr(loss, "_PIECE_BYTES", 1)
    torch.testing.assert_close(loss.summed(logits, ids, ids != 3), whole, rtol=1e-6, atol=0)


# --- chat templates ---------------------------------------------------------------------------------------------


def test_a_template_is_rendered_as_the_host_does(tokenizer: Any) -> None:
    from lmprune.text.talks import talk_ids

    tokenizer = copy.deepcopy(tokenizer)  # which other tests use too
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talk = [{"role": "user", "content": " hé ☃\n"}, {"role": "assistant", "content": "no"}]
    for ask in (False, True):
        wanted = tokenizer.apply_chat_template(talk, add_generation_prompt=ask, return_dict=False)
        assert talk_ids(talk, tokenizer, ask=ask) == wanted


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "too much time or memory"),
        ("{{ 9 ** (9 ** 9) }}", "too much time or memory|digits"),
        ("{{ 'a' * 10**11 }}", "MemoryError|memory"),
        ("{{ '%9999999999d' % 3 }}", "memory|MemoryError|big"),
        ("{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(0) }}", "recursion"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|access"),
        ("{% include '/etc/hostname' %}", "no loader"),
        ("{{ 'a' * 40000000 }}", "40,000,000 characters"),
    ],
)
def test_a_template_cannot_take_all_time_and_memory(
    template: str, said: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.errors import DataError
    from lmprune.text import talks

    monkeypatch.setattr(talks, "SECONDS", 1)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"(?s)chat template cannot write .*'hello'.*({said})"):
        talks.talk_ids([{"role": "user", "content": "hello"}], tokenizer)


# --- tokenizers and text ----------------------------------------------------------------------------------------


def _tokenizer_with(part: dict[str, Any], folder: Path) -> Path:
    from lmprune.models.locate import demo_folder

    folder = Path(shutil.copytree(demo_folder(), folder))
    data = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(data | part))
    return folder


def test_a_tokenizers_pattern_that_gives_up_is_one_line(tmp_path: Path) -> None:
    """The host panics, which is no Exception of Python's."""
    from lmprune.models.loading import load_tokenizer
    from lmprune.text.sources import DataSettings
    from lmprune.text.tokens import encode

    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = load_tokenizer(_tokenizer_with({"pre_tokenizer": pattern}, tmp_path / "model"))
    with pytest.raises(ModelError, match=r"cannot read this text: .*retry"):
        list(encode(["a" * 40 + "!"], tokenizer, DataSettings()))


GIVES_UP = {"type": "Split", "pattern": {"Regex": r"(?:\w+\s?)+(?!.|\s|$)"}, "behavior": "Isolated", "invert": False}


def _words(words: str, tmp_path: Path) -> list[str]:
    """A command on a model whose tokenizer panics on every longer text."""
    folder = _tokenizer_with({"pre_tokenizer": GIVES_UP}, tmp_path / "model")
    write_recipe(folder, Plan(12, (3,)), tmp_path / "r.yml")
    text = "many words of no use " * 9
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": [{"role": "user", "content": text}]}) + "\n")
    places = {"MODEL": folder, "RECIPE": tmp_path / "r.yml", "TEXT": tmp_path / "a.txt", "TALKS": tmp_path / "a.jsonl"}
    return [str(places.get(word, word)) for word in words.split()]


def test_a_panic_of_the_tokenizer_is_our_one_line(run: Callable[..., Any], tmp_path: Path) -> None:
    """Rust prints its own lines before Python hears of anything."""
    done = run("lmprune", *_words("profile MODEL -o p.json --data TEXT --samples 2", tmp_path), code=1)
    assert len(done.stderr.splitlines()) == 1 and "the model's tokenizer cannot read this text" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "heal RECIPE out --data TEXT --steps 1 --max-length 16",
        "heal RECIPE out --data TEXT --steps 1 --max-length 16 --self-data",
        "compare MODEL --drop 1 --criteria deepest --objective task:lmprune_demo_facts --data TEXT",
        pytest.param(
            "sweep MODEL -o run --fractions 0.1 --criteria deepest --tasks lmprune_demo_facts --limit 2 --agree 0",
            marks=pytest.mark.slow,
        ),
        "profile MODEL -o p.json --data TALKS --chat-template --samples 2",
    ],
)
def test_no_panic_of_the_tokenizer_is_printed(words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from lmprune.cli import app
    from lmprune.errors import LmpruneError

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(LmpruneError, match=r"cannot read this text|chat template"),
    ):
        patch.chdir(tmp_path)
        app.run(_words(words, tmp_path))
    assert "panicked" not in capfd.readouterr().err


def test_what_is_written_where_nothing_panics_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    """A warning, or the lines before another error; and what is written within such a block within another."""
    import os

    from lmprune.quiet import panics_unsaid

    panic = type("PanicException", (BaseException,), {})
    for error, shown_ in ((None, True), (KeyError, True), (panic, False)):
        try:
            with panics_unsaid(), panics_unsaid():
                os.write(2, b"from below\n")
                if error is not None:
                    raise error("x")
        except BaseException as exc:
            assert type(exc) is error
        os.write(2, b"after\n")
        assert capfd.readouterr().err == ("from below\nafter\n" if shown_ else "after\n")


def test_a_tokenizer_that_makes_much_of_little_is_refused(tmp_path: Path) -> None:
    from lmprune.models.loading import load_tokenizer

    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
    folder = _tokenizer_with({"normalizer": {"type": "Sequence", "normalizers": [step] * 5}}, tmp_path / "model")
    with pytest.raises(ModelError, match="more than 4,096 letters of one"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["a/" + "b" * 100_000, "~nobody-is-called-so/x", "a" * 300, "/".join("ab" * 4000)])
def test_names_that_no_file_can_have_are_one_line(name: str) -> None:
    from lmprune.errors import LmpruneError

    with pytest.raises(LmpruneError) as said:
        open_cut(name)
    assert len(str(said.value)) < 400


def test_a_sparse_file_is_not_copied(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    with (folder / "notes.txt").open("wb") as file:
        file.truncate(1 << 38)
    with pytest.raises(ModelError, match=r"notes\.txt is larger than 256 MiB"):
        prune(Recipe(str(folder), tuple(Plan(8, (3,)).slices()), layers=8), tmp_path / "out")


@pytest.mark.parametrize("name", ["tokenizer.json", "notes.txt"])
def test_what_is_no_regular_file_is_no_companion(name: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    import os

    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name} is no regular file"):
        prune(Recipe(str(folder), tuple(Plan(8, (3,)).slices()), layers=8), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_little_that_unpacks_to_very_much_is_no_text(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from lmprune.errors import DataError
    from lmprune.text.sources import DataSettings, read_documents

    bomb = pyarrow.table({"text": ["a" * (1 << 27)]})
    pyarrow.parquet.write_table(bomb, tmp_path / "bomb.parquet", compression="zstd")
    with pytest.raises(DataError, match=r"unpacks \d+ KiB to 128 MiB in 1 rows"):
        next(read_documents(DataSettings(data=str(tmp_path / "bomb.parquet")), seed=0))
