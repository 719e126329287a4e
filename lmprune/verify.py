"""Proof that a checkpoint is its base model without the dropped layers: names, types, bytes, config and logits.

Trusts no writer: it reads back what lies on disk, whoever wrote it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from lmprune.errors import ModelError, VerifyError
from lmprune.models.checkpoint import Checkpoint, TensorEntry, layer_prefix, read_config, renamed, stored_dtype
from lmprune.plan import LayerPlan
from lmprune.support import is_measured

PROBE_SHAPE = (2, 24)
"""Sequences and tokens of the fixed batch whose logits are compared."""
SHOWN = 8
_CHUNK = 1 << 24
_FREE_FIELDS = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"}


@dataclass(frozen=True)
class Proof:
    """What was compared, and every difference found."""

    tensors: int
    bytes_compared: int
    logits_compared: bool
    largest_logit_difference: float | None
    differences: tuple[str, ...]
    logits_skipped: str | None = None
    """Why the logits were not compared although that was asked for."""

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``lmprune.json``."""
        return asdict(self) | {"differences": list(self.differences)}

    def require(self, out: Path) -> None:
        """Raise what differs.

        Raises:
            VerifyError: anything differs.
        """
        if self.differences:
            shown = "; ".join(self.differences[:SHOWN])
            more = f"; and {len(self.differences) - SHOWN} more" if len(self.differences) > SHOWN else ""
            raise VerifyError(f"{out} is not what its recipe promises: {shown}{more}")


def verify(
    out: Path,
    base: Path,
    plan: LayerPlan,
    *,
    expected_config: Mapping[str, Any],
    dtype: str | None = None,
    logits: bool = True,
    trust_remote_code: bool = False,
) -> Proof:
    """Compare the checkpoint ``out`` with the model ``base`` under ``plan``.

    Args:
        expected_config: the repaired config as resolved plain data (`models.fields.pruned_config`).
        dtype: the type the recipe asks for; where it equals the stored one, tensors are compared byte for byte.
        logits: also load both and compare logits on a fixed batch; needs memory for one pruned model at a time, and
            for the whole base where nobody has measured its architecture. Left out, with the reason, where this
            machine cannot do it.
    """
    differences: list[str] = []
    tensors, compared = 0, 0
    try:
        written = Checkpoint.open(out)
        for line, size in _compare_tensors(written, Checkpoint.open(base), plan, expected_config, dtype):
            tensors += line is None
            compared += size
            if line:
                differences.append(line)
        differences += _compare_config(out, expected_config, trust_remote_code)
    except ModelError as exc:
        differences.append(str(exc))
    largest, skipped = None, None
    if logits and not differences:
        measured = is_measured(str(expected_config.get("model_type")))
        skipped = _obstacle(base, out if measured else base, dtype, trust_remote_code)
        if skipped is None:
            largest = _logit_difference(out, base, plan, dtype, trust_remote_code, measured)
            if largest != 0.0:
                truth = "the model pruned in memory" if measured else "the base whose dropped layers do nothing"
                differences.append(f"logits differ by up to {largest:.3g} from {truth}")
    return Proof(tensors, compared, largest is not None, largest, tuple(differences), skipped)


def _compare_tensors(
    written: Checkpoint, source: Checkpoint, plan: LayerPlan, config: Mapping[str, Any], dtype: str | None
) -> Iterator[tuple[str | None, int]]:
    """A difference or None for every tensor, with the bytes that were compared."""
    prefix = layer_prefix(source.tensors, plan.layers)
    wanted = {new: source.tensors[old] for old, new in renamed(source.tensors, prefix, plan.kept, plan.layers).items()}
    tied = bool(config.get("tie_word_embeddings"))
    for name in sorted(set(written.tensors) | set(wanted)):
        if name not in wanted:
            yield f"{name} should not be there", 0
        elif name not in written.tensors:
            if not (tied and name.endswith("lm_head.weight")):
                yield f"{name} is missing", 0
        else:
            yield _compare_one(name, written.tensors[name], wanted[name], dtype)


def _compare_one(name: str, got: TensorEntry, want: TensorEntry, dtype: str | None) -> tuple[str | None, int]:
    if got.shape != want.shape:
        return f"{name} has shape {list(got.shape)}, not {list(want.shape)}", 0
    if got.dtype == want.dtype:
        same = _digest(got) == _digest(want)
    elif dtype is not None and got.dtype == _SHORT.get(dtype) and want.dtype in _SHORT.values():
        same = _equal_as(got, want)
    else:
        return f"{name} is {got.dtype}, not {want.dtype}", 0
    return (None, got.stop - got.start) if same else (f"{name} holds other values", 0)


_SHORT = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


def _equal_as(got: TensorEntry, want: TensorEntry) -> bool:
    """Whether ``want``, converted to the type of ``got``, is ``got``."""
    import torch

    types = {short: getattr(torch, name) for name, short in _SHORT.items()}
    old, new = (
        torch.frombuffer(bytearray(b"".join(_blocks(entry))), dtype=types[entry.dtype]) for entry in (want, got)
    )
    return torch.equal(old.to(new.dtype), new)


def _digest(entry: TensorEntry) -> bytes:
    digest = hashlib.blake2b()
    for block in _blocks(entry):
        digest.update(block)
    return digest.digest()


def _blocks(entry: TensorEntry) -> Iterator[bytes]:
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        left = entry.stop - entry.start
        while left and (block := file.read(min(left, _CHUNK))):
            yield block
            left -= len(block)


def _compare_config(out: Path, expected: Mapping[str, Any], trust_remote_code: bool) -> list[str]:
    from lmprune.models.loading import load_config

    read_config(out)
    got = load_config(out, trust_remote_code=trust_remote_code).to_dict()
    names = sorted((set(got) | set(expected)) - _FREE_FIELDS)
    return [
        f"config.{name} is {got.get(name)!r}, not {expected.get(name)!r}"
        for name in names
        if got.get(name) != expected.get(name)
    ]


def probe_batch(vocabulary: int) -> Any:
    """The fixed batch: token ids (2, 24), spread over the vocabulary, the same for every model of that size."""
    import torch

    count = PROBE_SHAPE[0] * PROBE_SHAPE[1]
    ids = (torch.arange(count, dtype=torch.long) * 7919 + 11) % vocabulary
    return ids.view(PROBE_SHAPE)


def _obstacle(base: Path, largest: Path, dtype: str | None, trust_remote_code: bool) -> str | None:
    """Why this machine cannot run the models that are to be compared, the larger of which is ``largest``; or None."""
    from lmprune.models.loading import lacking, load_config

    missing = lacking(load_config(base, trust_remote_code=trust_remote_code))
    if missing is not None:
        return missing
    widened = _WIDTH[dtype] / _WIDTH.get(stored_dtype(read_config(base)) or dtype, _WIDTH[dtype]) if dtype else 1
    needed, free = _SPARE * widened * Checkpoint.open(largest).bytes, psutil.virtual_memory().available
    if needed > free:
        return f"the model needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
    return None


_WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_SPARE = 1.1


def _logit_difference(
    out: Path, base: Path, plan: LayerPlan, dtype: str | None, trust_remote_code: bool, measured: bool
) -> float:
    """Largest absolute difference of logits between ``out`` and ``base`` pruned in memory; NaN counts as infinite.

    Of an architecture that was never ``measured`` nobody knows whether its config is repaired rightly, which would
    make both wrong in the same way. There the whole base runs, and its dropped layers hand on their input.
    """
    import torch

    from lmprune.models.loading import load_model
    from lmprune.models.stack import skipping

    results = []
    for folder, cut in ((out, None), (base, plan)):
        loaded = cut if measured else None
        model = load_model(folder, plan=loaded, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
        text = model.config.get_text_config()
        with torch.inference_mode(), skipping(model, cut.dropped) if cut and not measured else nullcontext():
            results.append(model(input_ids=probe_batch(text.vocab_size).to(model.device)).logits.float().cpu())
        del model
    difference = (results[0] - results[1]).abs().max().item()
    return difference if difference == difference else float("inf")
