"""GGUF files: what their headers say, keys added to them, and models made from them. The header's reader is pure.

The format is little-endian: magic, version, counts; keys with typed values; names, shapes, types and offsets of
tensors; and their data, aligned (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3).
"""

from __future__ import annotations

import logging
import math
import mmap
import re
import shutil
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmprune.cuts.lineage import Lineage
from lmprune.errors import ModelError, line_of, shown
from lmprune.models.converted import cached_folder
from lmprune.models.fields import layer_count
from lmprune.models.rotary import name_rotary
from lmprune.quiet import no_load_report
from lmprune.versions import versions

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_MOST = 1 << 24
"""Keys, tensors and entries of an array at most: a vocabulary has up to a few hundred thousand."""
_ALIGNMENT = "general.alignment"
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"
}  # fmt: skip
_STRING, _ARRAY, _UINT32, _BOOL = 8, 9, 4, 7

TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""ggml's types of tensors, by number."""
PACKED = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8), "I8": (1, 1), "I16": (1, 2), "I32": (1, 4),
    "I64": (1, 8), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ3_XXS": (256, 98), "IQ1_S": (256, 50), "IQ4_NL": (32, 18),
    "IQ3_S": (256, 110), "IQ2_S": (256, 82), "IQ4_XS": (256, 136), "IQ1_M": (256, 56), "TQ1_0": (256, 54),
    "TQ2_0": (256, 66), "MXFP4": (32, 17),
}  # fmt: skip
"""Numbers in a block of a type, and its bytes."""
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}  # fmt: skip
"""What ``general.file_type`` means."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's shape, the innermost side first as ggml has it, its type, and where its numbers begin in the data."""

    shape: tuple[int, ...]
    type: str
    offset: int = 0

    @property
    def numbers(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """What they take in the file."""
        numbers, size = PACKED[self.type]
        return self.numbers // numbers * size


@dataclass(frozen=True)
class Gguf:
    """What a file's header says.

    Attributes:
        data: where the tensors' data begin, in bytes.
    """

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: int

    @classmethod
    def read(cls, path: Path) -> Gguf:
        """The header of ``path``.

        Raises:
            ModelError: it is no GGUF file, or a broken one.
        """
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content).header(path)
        except OSError as exc:
            raise ModelError(f"cannot read {path}: {exc.strerror or exc}") from exc
        except (struct.error, ValueError, KeyError, UnicodeDecodeError, IndexError) as exc:
            raise ModelError(f"{path} is no GGUF file, or a broken one: {shown(str(exc))}. Download it again") from exc

    @property
    def architecture(self) -> str:
        """As llama.cpp calls it."""
        return str(self.keys.get("general.architecture"))

    def of_model(self, name: str) -> Any:
        """The key ``name`` of the architecture; None where there is none."""
        return self.keys.get(f"{self.architecture}.{name}")

    @property
    def layers(self) -> int | None:
        """Decoder layers, by the key."""
        count = self.of_model("block_count")
        return count if isinstance(count, int) else None

    @property
    def quantization(self) -> str:
        """What the file calls its type, or the type of most of its numbers."""
        named = FILE_TYPES.get(self.keys.get("general.file_type", -1))
        if named is not None:
            return named
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.type] += tensor.numbers
        return sizes.most_common(1)[0][0] if sizes else "nothing"


class _Reader:
    def __init__(self, content: Any) -> None:
        self._content, self._at = content, 0

    def header(self, path: Path) -> Gguf:
        if self._content[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known")
        tensors, keys = self._count(), self._count()
        said = {}
        for _ in range(keys):
            name = self._text()
            said[name] = self._value(self._number("<I"))
        found = {}
        for _ in range(tensors):
            name = self._text()
            shape = tuple(self._number("<Q") for _ in range(self._number("<I")))
            kind = self._number("<I")
            if kind not in TENSOR_TYPES:
                raise ValueError(f"the tensor {name[:60]} is of type {kind}, which is not known")
            found[name] = GgufTensor(shape, TENSOR_TYPES[kind], self._number("<Q"))
        return Gguf(path, said, found, _aligned(self._at, said))

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._content, self._at)
        self._at += struct.calcsize(code)
        return value

    def _count(self) -> int:
        count: int = self._number("<Q")
        if count > _MOST:
            raise ValueError(f"it promises {count} entries")
        return count

    def _text(self) -> str:
        length = self._count()
        text = self._content[self._at : self._at + length]
        if len(text) < length:
            raise ValueError("it ends within a text")
        self._at += length
        return str(text, "utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(_SCALARS[kind])
        inner, count = self._number("<I"), self._count()
        if inner == _STRING:
            return [self._text() for _ in range(count)]
        code = f"<{count}{_SCALARS[inner][1]}"
        values = struct.unpack_from(code, self._content, self._at)
        self._at += struct.calcsize(code)
        return list(values)


def _aligned(at: int, keys: Mapping[str, Any]) -> int:
    step = keys.get(_ALIGNMENT, 32)
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"its alignment is {step!r}")
    return at + -at % step


# --- keys that are added ----------------------------------------------------------------------------------------------


def add_keys(path: Path, out: Path, keys: Mapping[str, int | list[bool]]) -> None:
    """Copy the GGUF file ``path`` to ``out`` with ``keys``, which take the place of those of the same names.

    Raises:
        ModelError: the file is broken.
    """
    known = Gguf.read(path)
    with path.open("rb") as source, out.open("wb") as target:
        head = source.read(known.data)
        spans = _key_spans(head)
        kept = [head[start:stop] for name, (start, stop) in spans.items() if name not in keys]
        after = max((stop for _, stop in spans.values()), default=24)
        (tensors,) = struct.unpack_from("<Q", head, 8)
        infos = head[after : _end_of_tensors(head, after, tensors)]
        body = b"".join([*kept, *(_encoded(name, value) for name, value in keys.items()), infos])
        start = head[:16] + struct.pack("<Q", len(kept) + len(keys)) + body
        target.write(start + b"\0" * (_aligned(len(start), known.keys) - len(start)))
        shutil.copyfileobj(source, target, 1 << 23)


def _key_spans(head: bytes) -> dict[str, tuple[int, int]]:
    """Where each key with its value lies."""
    reader = _Reader(head)
    reader._at = 16
    spans = {}
    for _ in range(reader._count()):
        start = reader._at
        name = reader._text()
        reader._value(reader._number("<I"))
        spans[name] = (start, reader._at)
    return spans


def _end_of_tensors(head: bytes, at: int, count: int) -> int:
    reader = _Reader(head)
    reader._at = at
    for _ in range(count):
        reader._text()
        for _ in range(reader._number("<I")):
            reader._number("<Q")
        reader._number("<I")
        reader._number("<Q")
    return reader._at


def _encoded(name: str, value: int | list[bool]) -> bytes:
    text = name.encode()
    head = struct.pack("<Q", len(text)) + text
    if isinstance(value, list):
        return head + struct.pack(f"<IIQ{len(value)}?", _ARRAY, _BOOL, len(value), *value)
    return head + struct.pack("<II", _UINT32, value)


# --- a model made from a file -----------------------------------------------------------------------------------------


def from_gguf(path: Path) -> Path:
    """The folder of a plain bfloat16 checkpoint of the model in a GGUF file, made once and kept in the cache.

    Raises:
        ModelError: the file is split or broken, or transformers cannot read it; or the package gguf is not here.
    """
    header = Gguf.read(path)
    if header.keys.get("split.count", 0) > 1:
        raise ModelError(
            f"{path} is one of {header.keys['split.count']} parts. Join them with `llama-gguf-split --merge` first"
        )

    check_contents(header)

    def write(out: Path) -> None:
        logging.getLogger("lmprune").info(
            f"{path.name} is {header.architecture} in {header.quantization}: read once, and kept in bfloat16"
        )
        _write(path, header, out)
        said = {"type": header.quantization, "file": path.name}
        Lineage(quantization=said, versions=versions()).write(out)

    return cached_folder([path], write)


def check_contents(header: Gguf) -> None:
    """Refuse a file that ends too early, or whose layers are not as many as it says, before anything is built of it.

    Raises:
        ModelError: naming what is missing.
    """
    there = header.path.stat().st_size
    needed = header.data + max((one.offset + one.bytes for one in header.tensors.values()), default=0)
    if needed > there:
        raise ModelError(f"{header.path} ends too early: {needed - there:,} bytes are missing. Download it again")
    numbers = {int(name.split(".")[1]) for name in header.tensors if re.match(r"blk\.\d+\.", name)}
    if numbers and header.layers != (count := max(numbers) + 1):
        said = f"says that it has {header.layers} layers" if header.layers is not None else "does not say how many"
        raise ModelError(
            f"{header.path}, of architecture {header.architecture!r}, {said}, and holds {count}. Download it again, or "
            "give the original model"
        )


def _write(path: Path, header: Gguf, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how: dict[str, Any] = {"gguf_file": path.name}
    try:
        with no_load_report():
            model, told = AutoModelForCausalLM.from_pretrained(
                path.parent,
                dtype=torch.bfloat16,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **how,
                **_dequantised(),
            )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **how)
    except ImportError as exc:
        raise ModelError(f"{path} needs the package gguf. Install it with pip install 'lmprune[gguf]'") from exc
    except (ValueError, KeyError, RuntimeError, OSError, TypeError, AttributeError) as exc:  # a file may hold anything
        said = line_of(exc, 200).rstrip(".")
        raise ModelError(
            f"transformers cannot read {path} of architecture {header.architecture!r}: {said}. Give the original model"
        ) from exc
    _check_whole(path, header, layer_count(model.config.to_dict()), told)
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(out)
    name_rotary(out)
    tokenizer.save_pretrained(out)


def _check_whole(path: Path, header: Gguf, layers: int, told: Mapping[str, Any]) -> None:
    """Refuse a file whose tensors are not those of its own architecture: transformers makes up what is missing.

    Raises:
        ModelError: naming one.
    """
    odd = sorted(told["missing_keys"]) or sorted(str(key[0]) for key in told["mismatched_keys"])
    if odd or (header.layers is not None and header.layers != layers):
        what = f"{len(odd)} tensors such as {odd[0]}" if odd else f"{header.layers} layers, which became {layers}"
        raise ModelError(
            f"{path} is not a whole model of architecture {header.architecture!r}: it lacks {what}. "
            "Download it again, or give the original model"
        )


def _dequantised() -> dict[str, Any]:
    """What newer transformers need to be told, which else keep the weights packed."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
