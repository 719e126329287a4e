"""From a recipe to a smaller checkpoint, proven to be what the recipe says before it appears."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import HostError, ModelError, RecipeError, UsageError, VerifyError
from lmprune.files import check_output_folder, new_folder
from lmprune.models.carrying import cut_fields
from lmprune.models.checkpoint import Checkpoint, read_config, stored_dtype
from lmprune.models.companions import check_companions, copy_companions
from lmprune.models.cut import Cut, open_cut
from lmprune.models.fields import apply_fields
from lmprune.models.locate import MERGED, RECIPE
from lmprune.models.rotary import name_rotary
from lmprune.versions import versions
from lmprune.writing.base_folder import write_base_folder
from lmprune.writing.copying import copy_checkpoint
from lmprune.writing.mergekit import needs_base_folder, run_mergekit
from lmprune.writing.support import best_writer
from lmprune.writing.verify import Proof, compare, require_plan

Writer = Literal["auto", "mergekit", "copy"]


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What `prune` wrote; ``proof`` is None when the check was switched off."""

    path: Path
    plan: Plan
    writer: str
    reason: str
    proof: Proof | None
    bytes_before: int
    bytes_after: int


def prune(
    model: str | Path | Recipe | Cut,
    out: str | Path,
    *,
    writer: Writer = "auto",
    check: bool = True,
    logits: bool = True,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> PrunedCheckpoint:
    """Write the checkpoint of ``model``, a recipe or a cut, to the new folder ``out`` and prove it.

    A failed proof leaves no ``out``.

    Raises:
        ModelError: the base is unreadable, or cannot lose these layers.
        RecipeError: the recipe is for another model, or ``model`` leaves nothing out.
        OutputError: ``out`` cannot be written or is not empty.
        HostError: mergekit failed.
        VerifyError: what was written differs from the base model pruned in memory.
    """
    out = Path(out)
    check_output_folder(out)
    cut = open_cut(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    plan = require_plan(cut)
    if cut.adapter is not None:
        raise UsageError(f"{cut.name}: prune writes the base's own weights. Merge the adapter with `lmprune heal`")
    recipe = cut.recipe or Recipe.of(cut.base.name, plan, revision=cut.base.revision)
    raw = read_config(cut.base.path)
    cut_fields(cut.whole_config.to_dict(), plan)  # refused before anything is written
    chosen, reason = _choose_writer(writer, raw, recipe)
    check_companions(cut.base.path, code=cut.trust_remote_code)

    def write(folder: Path) -> Proof | None:
        _write(chosen, cut, recipe, folder)
        _read_back(folder, chosen)
        name_rotary(folder)
        return _proven(folder, cut, out, logits=logits) if check else None

    with new_folder(out) as folder:
        try:
            proof = write(folder)
        except (HostError, VerifyError) as exc:
            if writer != "auto" or chosen == "copy" or _changes_dtype(recipe, raw):
                raise
            chosen, reason = "copy", f"mergekit failed on this checkpoint, so the kept tensors are copied: {exc}"
            shutil.rmtree(folder)
            folder.mkdir()
            proof = write(folder)
        for name in (RECIPE, *([MERGED] if chosen == "mergekit" else [])):  # as its own command does
            recipe.write(folder / name)
        said = proof.to_data() if proof else None
        lineage = replace(cut.lineage, stage="prune", writer=chosen, writer_reason=reason, proof=said)
        replace(lineage, versions=versions()).write(folder)
    return PrunedCheckpoint(out, plan, chosen, reason, proof, cut.checkpoint.bytes, Checkpoint.open(out).bytes)


def _write(writer: str, cut: Cut, recipe: Recipe, folder: Path) -> None:
    if writer == "copy":
        copy_checkpoint(cut, folder)
        return
    raw, changed = read_config(cut.base.path), cut_fields(cut.whole_config.to_dict(), require_plan(cut))
    _merge(recipe, cut, apply_fields(raw, changed), needs_base_folder(raw, changed), folder)
    copy_companions(cut.base.path, folder, code=cut.trust_remote_code)


def _read_back(folder: Path, writer: str) -> None:
    """Believe no host."""
    try:
        read_config(folder)
        Checkpoint.open(folder)
    except ModelError as exc:
        raise VerifyError(f"what {writer} wrote cannot be read back: {exc}") from exc


def _proven(folder: Path, cut: Cut, out: Path, *, logits: bool) -> Proof:
    """The proof of what was written to ``folder``; errors name ``out``, where it would have appeared."""
    proof = compare(folder, cut, logits=logits)
    proof.require(out)
    return proof


def _choose_writer(writer: Writer, config: dict[str, Any], recipe: Recipe) -> tuple[str, str]:
    """The writer and why it was taken."""
    if writer not in ("auto", "mergekit", "copy"):
        raise UsageError(f"--writer {writer!r} does not exist. Choose from auto, mergekit, copy")
    best, reason = best_writer(config)
    unknown = [part for part in recipe.parts if not part.mergekit]
    if unknown:
        best, reason = "copy", f"mergekit cannot cut {unknown[0].describe()}, so tensors are copied"
        if writer == "mergekit":
            raise UsageError(f"--writer mergekit: mergekit cannot cut {unknown[0].describe()}. Use --writer copy")
    chosen = best if writer == "auto" else writer
    if chosen == "mergekit" and config.get("quantization_config"):
        raise UsageError("--writer mergekit: mergekit does not know quantised weights. Use --writer copy")
    if chosen == "copy" and _changes_dtype(recipe, config):
        raise RecipeError(
            f"this recipe asks for {recipe.dtype}, but the weights are {stored_dtype(config)} and copying does not "
            "change them. Remove dtype from the recipe"
        )
    return chosen, reason if writer == "auto" else "asked for"


def _changes_dtype(recipe: Recipe, config: dict[str, Any]) -> bool:
    return recipe.dtype is not None and recipe.dtype != (stored_dtype(config) or recipe.dtype)


def _merge(recipe: Recipe, cut: Cut, config: dict[str, Any], with_base_folder: bool, out: Path) -> None:
    base = cut.base.path
    merge = recipe.merge(str(base))
    merge.pop("base_model", None)
    # Beside what is written, where the next run finds what a kill leaves.
    with tempfile.TemporaryDirectory(prefix=f"{out.name}-", dir=out.parent) as scratch:
        if with_base_folder:
            # The recipe's own base folder may be stale or on another machine; this one is made for this run.
            write_base_folder(base, config, Path(scratch) / "base")
            merge["base_model"] = str(Path(scratch) / "base")
        # mergekit holds a whole shard of the result in memory, by default 5 GB; the base's own size is enough.
        largest = max(file.stat().st_size for file in cut.checkpoint.files)
        run_mergekit(merge, out, shard_bytes=None if _changes_dtype(recipe, config) else largest)
