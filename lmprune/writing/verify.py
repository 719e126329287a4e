"""Proof that a checkpoint is its base model without the dropped layers: names, types, bytes, config and logits.

Trusts no writer: it reads back what lies on disk, whoever wrote it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import ModelError, RecipeError, VerifyError, shown, sized
from lmprune.models.carrying import Change, cut_names, require_stock, tensor_changes
from lmprune.models.checkpoint import Checkpoint, TensorEntry, read_config, stored_dtype
from lmprune.models.companions import TOKENIZER, companions
from lmprune.models.cut import Cut, open_cut
from lmprune.models.dtypes import SHORT, WIDTH
from lmprune.versions import versions
from lmprune.writing.support import is_measured

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
    model: str | Path | Recipe | Cut,
    out: str | Path,
    *,
    logits: bool = True,
    note: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Proof:
    """Compare the checkpoint ``out``, whoever wrote it, with what ``model``, a recipe or a cut, promises.

    With ``note`` the proof is written into the ``lmprune.json`` of ``out``, beside what stands there.

    Raises:
        RecipeError: the recipe is for another model, or ``model`` leaves nothing out.
        ModelError: there is no checkpoint, or its base is unreadable.
    """
    out = Path(out)
    cut = open_cut(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    require_plan(cut)
    if not out.is_dir():
        raise ModelError(f"no checkpoint at {out}. Write it with `lmprune prune RECIPE {out}`")
    proof = compare(out, cut, logits=logits)
    if note:
        told = Lineage.read(out, remedy="Remove it to have it written anew")
        if told is None:
            found = replace(cut.lineage, stage="prune", versions=versions())
            told = replace(found, writer="unknown", writer_reason="verified afterwards")
        replace(told, proof=proof.to_data()).write(out)
    return proof


def require_plan(cut: Cut) -> Plan:
    """What ``cut`` leaves out.

    Raises:
        RecipeError: it is a whole model, of which there is nothing to prune or to prove.
        UsageError: no stock checkpoint can hold it.
    """
    if cut.plan is None:
        raise RecipeError(
            f"{cut.name} is a model and no recipe, so there is nothing to drop. Write one with `lmprune recipe "
            f"{cut.name} -o recipe.yml --drop N`"
        )
    require_stock(cut.plan, cut.name)
    return cut.plan


def compare(out: Path, cut: Cut, *, logits: bool = True) -> Proof:
    """Compare the checkpoint in ``out`` with ``cut``, which has a plan.

    Where the recipe asks for the type that is stored, tensors are compared byte for byte. With ``logits`` both are also
    loaded and their logits compared on a fixed batch; that needs memory for one pruned model at a time, and for the
    whole base where nobody has measured its architecture. It is left out, with the reason, where this machine cannot.
    """
    differences: list[str] = []
    tensors, compared = 0, 0
    dtype = cut.recipe.dtype if cut.recipe else None
    for line, size in _compare_tensors(Checkpoint.open(out), cut, dtype):
        tensors += line is None
        compared += size
        if line:
            differences.append(line)
    differences += [*_compare_config(out, cut), *_compare_dtype(out, cut, dtype), *_compare_tokenizer(out, cut)]
    largest, skipped = None, None
    if logits and not differences:
        # Of a part there is no other rendering than the one in memory.
        measured = is_measured(str(cut.config.get("model_type"))) or bool(require_plan(cut).parts)
        skipped = _obstacle(cut, out if measured else cut.base.path, dtype)
        if skipped is None:
            largest, spread = _logit_difference(out, cut, dtype, measured)
            if largest > (_ROUNDED * spread if _is_computed(cut) else 0.0):
                truth = "the model pruned in memory" if measured else "the base whose dropped layers do nothing"
                differences.append(f"logits differ by up to {largest:.3g} from {truth}")
    return Proof(tensors, compared, largest is not None, largest, tuple(differences), skipped)


def _compare_tensors(written: Checkpoint, cut: Cut, dtype: str | None) -> Iterator[tuple[str | None, int]]:
    """A difference or None for every tensor, with the bytes that were compared."""
    source, alike = cut.checkpoint.tensors, _Names(cut)
    names = cut_names(source, cut.plan)
    wanted = {alike(new): (new, source[old]) for old, new in names.items()}
    got = {alike(name): (name, entry) for name, entry in written.tensors.items()}
    changed = tensor_changes(source, cut.plan, cut.whole_config.to_dict())
    changes = {alike(names[old]): change for old, change in changed.items()}
    tied = bool(cut.config.get("tie_word_embeddings"))
    for key in sorted({*got, *wanted}):
        name = (got.get(key) or wanted[key])[0]
        if key not in wanted:
            if not (tied and _is_twin(got[key][1], wanted)) and not alike.ignores(name):
                yield f"{name} should not be there", 0
        elif key not in got:
            if not (tied and name.endswith("lm_head.weight")) and not alike.ignores(name):
                yield f"{name} is missing", 0
        elif key in changes:
            yield _compare_changed(name, got[key][1], wanted[key][1], changes[key], _is_computed(cut))
        else:
            yield _compare_one(name, got[key][1], wanted[key][1], dtype)


def _is_twin(head: TensorEntry, wanted: Mapping[str, tuple[str, TensorEntry]]) -> bool:
    """Whether it is the embeddings once more, as some write a head that is tied to them."""
    return any(
        entry.shape == head.shape and _compare_one("", head, entry, None)[0] is None
        for name, (_, entry) in wanted.items()
        if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight"))
    )


class _Names:
    """Which names of tensors mean the same to the model's class, and which buffers it computes by itself."""

    def __init__(self, cut: Cut) -> None:
        from lmprune.models.loading import model_class

        self._prefix, self._ignored = "", [_BUFFERS[0]]
        try:
            cls = model_class(cut.whole_config, trust_remote_code=cut.trust_remote_code)
        except ModelError:  # nothing is known of it, so names are compared as they are
            return
        self._prefix = f"{cls.base_model_prefix}." if cls.base_model_prefix else ""
        ignored = cls._keys_to_ignore_on_load_unexpected or ()
        self._ignored += [buffer for buffer in _BUFFERS[1:] if any(name in buffer for name in ignored)]

    def __call__(self, name: str) -> str:
        """``name`` without the base model's prefix, which GPT-2's files on the Hub leave out."""
        return name.removeprefix(self._prefix)

    def ignores(self, name: str) -> bool:
        """Whether it names such a buffer. The class's own patterns would match ``attn.c_attn.bias`` as well."""
        return name.endswith(tuple(self._ignored))


_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".crossattention.bias",
)
"""What older releases of transformers saved: the first of Llama and its kin, the others of GPT-2's and GPT-NeoX's."""


def _compare_changed(
    name: str, got: TensorEntry, want: TensorEntry, change: Change, computed: bool
) -> tuple[str | None, int]:
    """As `_compare_one`, where the plan promises another tensor than the base's; up to rounding where that is due."""
    import torch

    from lmprune.models.tensors import read_tensor

    found, before = read_tensor(got), read_tensor(want)
    promised = change(before).to(before.dtype).to(found.dtype)
    same = torch.equal(found, promised)
    if computed and not same and found.shape == promised.shape and found.is_floating_point():
        largest = float(promised.abs().max())
        slack = 2 * torch.finfo(found.dtype).eps
        same = torch.allclose(found.float(), promised.float(), rtol=slack, atol=slack * 0.01 * largest)
    return (None, got.stop - got.start) if same else (f"{name} is not what its part of the plan makes of it", 0)


def _compare_one(name: str, got: TensorEntry, want: TensorEntry, dtype: str | None) -> tuple[str | None, int]:
    if got.shape != want.shape:
        return f"{name} has shape {list(got.shape)}, not {list(want.shape)}", 0
    if got.dtype == want.dtype:
        same = _digest(got) == _digest(want)
    elif dtype is not None and got.dtype == SHORT.get(dtype) and want.dtype in SHORT.values():
        same = _equal_as(got, want)
    else:
        return f"{name} is {got.dtype}, not {want.dtype}", 0
    return (None, got.stop - got.start) if same else (f"{name} holds other values", 0)


def _equal_as(got: TensorEntry, want: TensorEntry) -> bool:
    """Whether ``want``, converted to the type of ``got``, is ``got``."""
    import torch

    from lmprune.models.tensors import read_tensor

    new = read_tensor(got)
    return torch.equal(read_tensor(want).to(new.dtype), new)


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


def _compare_config(out: Path, cut: Cut) -> list[str]:
    from lmprune.models.loading import load_config

    got, expected = load_config(out, trust_remote_code=cut.trust_remote_code).to_dict(), cut.config
    names = sorted((set(got) | set(expected)) - _FREE_FIELDS)
    return [
        f"config.{name} is {got.get(name)!r}, not {expected.get(name)!r}"
        for name in names
        if got.get(name) != expected.get(name)
    ]


def _compare_dtype(out: Path, cut: Cut, dtype: str | None) -> Iterator[str]:
    """What transformers loads the weights in is what the config says, whatever they are stored in."""
    got, wanted = stored_dtype(read_config(out)), dtype or stored_dtype(read_config(cut.base.path))
    if got is not None and wanted is not None and got != wanted:
        yield f"config.dtype is {shown(got)}, not {shown(wanted)}"


def _compare_tokenizer(out: Path, cut: Cut) -> Iterator[str]:
    """Whether text becomes the same tokens, and a conversation the same text; files may differ in what says nothing.

    A checkpoint without a tokenizer, as mergekit writes it when told so, promises none.
    """
    from lmprune.models.loading import load_tokenizer

    ours, theirs = ({f.name: f.read_bytes() for f in companions(at)} for at in (cut.base.path, out))
    said = {name for name in (*TOKENIZER, *ours, *theirs) if "token" in name or "template" in name or name in TOKENIZER}
    if not any(name in theirs for name in TOKENIZER) or all(ours.get(name) == theirs.get(name) for name in said):
        return
    try:
        base = load_tokenizer(cut.base.path, trust_remote_code=cut.trust_remote_code)
    except ModelError:  # the base's own does not work, so nothing is promised
        return
    written = load_tokenizer(out, trust_remote_code=cut.trust_remote_code)
    for what, of in _OF_TOKENIZERS.items():
        if of(base) != of(written):
            yield f"the tokenizer's {what} is not that of {cut.base.name}"


_OF_TOKENIZERS: dict[str, Callable[[Any], Any]] = {
    "vocabulary": lambda tokenizer: tokenizer.get_vocab(),
    "way to split text": lambda tokenizer: tokenizer.is_fast and tokenizer.backend_tokenizer.to_str(),
    "special tokens": lambda tokenizer: tokenizer.special_tokens_map,
    "chat template": lambda tokenizer: tokenizer.chat_template,
}


def probe_batch(vocabulary: int) -> Any:
    """The fixed batch: token ids (2, 24), spread over the vocabulary, the same for every model of that size."""
    import torch

    count = PROBE_SHAPE[0] * PROBE_SHAPE[1]
    ids = (torch.arange(count, dtype=torch.long) * 7919 + 11) % vocabulary
    return ids.view(PROBE_SHAPE)


def _obstacle(cut: Cut, largest: Path, dtype: str | None) -> str | None:
    """Why this machine cannot run the models that are to be compared, the larger of which is ``largest``; or None."""
    from lmprune.forward.machine import free_memory
    from lmprune.models.loading import lacking

    missing = lacking(cut.whole_config)
    if missing is not None:
        return missing
    widened = 1.0
    if dtype is not None:
        widened = WIDTH[dtype] / WIDTH.get(stored_dtype(read_config(cut.base.path)) or dtype, WIDTH[dtype])
    needed, free = _SPARE * widened * Checkpoint.open(largest).bytes, free_memory()
    if needed > free:
        return f"the model needs {sized(needed)} of memory and {sized(free)} are free"
    return None


_SPARE = 1.1


def _is_computed(cut: Cut) -> bool:
    """Whether numbers are computed, of which another machine may round the last digit otherwise."""
    return any(getattr(part, "computed", False) for part in require_plan(cut).parts)


_ROUNDED = 0.01
"""Of the spread of logits: what the last digit of computed weights may do to them."""


def _logit_difference(out: Path, cut: Cut, dtype: str | None, measured: bool) -> tuple[float, float]:
    """Largest absolute difference of logits between ``out`` and ``cut`` in memory, and their standard deviation.

    NaN counts as infinite.

    Of an architecture that was never ``measured`` nobody knows whether its config is repaired rightly, which would
    make both wrong in the same way. There the whole base runs, and its dropped layers hand on their input.
    """
    import torch

    from lmprune.forward.calls import skipping

    written = replace(cut, base=replace(cut.base, path=out), plan=None)
    whole = replace(cut, plan=None)
    results = []
    for side, dropped in ((written, ()), (cut, ()) if measured else (whole, require_plan(cut).dropped)):
        model = side.load(dtype=dtype or "auto")
        if _is_computed(cut):  # what the last digit of a weight does must not drown in rounding
            model = model.float()
        text = model.config.get_text_config()
        with torch.inference_mode(), skipping(model, dropped) if dropped else nullcontext():
            results.append(model(input_ids=probe_batch(text.vocab_size).to(model.device)).logits.float().cpu())
        del model
    difference = (results[0] - results[1]).abs().max().item()
    return difference if difference == difference else float("inf"), results[1].std().item()
