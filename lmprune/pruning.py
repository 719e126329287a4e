"""From a recipe to a smaller checkpoint, proven to be what the recipe says before it appears."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lmprune.base_folder import write_base_folder
from lmprune.copying import copy_checkpoint, copy_companions
from lmprune.errors import HostError, ModelError, RecipeError, UsageError, VerifyError
from lmprune.files import check_output_folder, new_folder, write_json, write_text
from lmprune.merge import needs_base_folder, run_mergekit
from lmprune.models.applying import plan_for
from lmprune.models.checkpoint import Checkpoint, read_config, stored_dtype
from lmprune.models.fields import apply_fields, changed_fields, pruned_config
from lmprune.models.lineage import LINEAGE, cut_lineage, read_lineage
from lmprune.models.loading import load_config
from lmprune.models.locate import ModelFolder, locate
from lmprune.plan import LayerPlan
from lmprune.recipe import Recipe
from lmprune.support import best_writer
from lmprune.verify import Proof, verify
from lmprune.versions import versions

Writer = Literal["auto", "mergekit", "copy"]


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What `prune` wrote; ``proof`` is None when the check was switched off."""

    path: Path
    plan: LayerPlan
    writer: str
    reason: str
    proof: Proof | None
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class _Case:
    """A recipe with the model that it is applied to; ``config`` is the base's, resolved."""

    recipe: Recipe
    base: ModelFolder
    config: dict[str, Any]
    plan: LayerPlan
    trust_remote_code: bool

    @classmethod
    def open(cls, recipe: Recipe, *, trust_remote_code: bool, allow_pickle: bool) -> _Case:
        """Find the base and see that the recipe is for it.

        Raises:
            RecipeError: the recipe is for another model.
            ModelError: the base is missing or unreadable.
        """
        base = locate(recipe.model, recipe.revision, allow_pickle=allow_pickle)
        config = load_config(base.path, trust_remote_code=trust_remote_code).to_dict()
        return cls(recipe, base, config, plan_for(recipe, base, config), trust_remote_code)

    def compare(self, folder: Path, logits: bool) -> Proof:
        """`verify` of the checkpoint in ``folder``."""
        return verify(
            folder,
            self.base.path,
            self.plan,
            expected_config=pruned_config(self.config, self.plan.kept),
            dtype=self.recipe.dtype,
            logits=logits,
            trust_remote_code=self.trust_remote_code,
        )


def prune(
    recipe: Recipe,
    out: Path,
    *,
    writer: Writer = "auto",
    check: bool = True,
    logits: bool = True,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> PrunedCheckpoint:
    """Write the pruned checkpoint to the new folder ``out`` and prove it; a failed proof leaves no ``out``.

    Raises:
        ModelError: the base is unreadable, or cannot lose these layers.
        RecipeError: the recipe is for another model.
        OutputError: ``out`` cannot be written or is not empty.
        HostError: mergekit failed.
        VerifyError: what was written differs from the base model pruned in memory.
    """
    check_output_folder(out)
    case = _Case.open(recipe, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    base, plan = case.base, case.plan
    raw = read_config(base.path)
    changed = changed_fields(case.config, plan.kept)
    chosen, reason = _choose_writer(writer, raw, recipe)

    def write(folder: Path) -> Proof | None:
        if chosen == "mergekit":
            _merge(recipe, base, apply_fields(raw, changed), needs_base_folder(raw, changed), folder)
            copy_companions(base.path, folder, code=trust_remote_code)
        else:
            copy_checkpoint(base.path, plan, folder, trust_remote_code=trust_remote_code)
        if not check:
            return None
        proof = case.compare(folder, logits)
        proof.require(out)
        return proof

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
        write_text(folder / "recipe.yml", recipe.to_yaml())
        write_json(folder / LINEAGE, _lineage(recipe, base, plan, chosen, reason, proof))
    before, after = Checkpoint.open(base.path).bytes, Checkpoint.open(out).bytes
    return PrunedCheckpoint(out, plan, chosen, reason, proof, before, after)


def verify_folder(
    recipe: Recipe, out: Path, *, logits: bool = True, trust_remote_code: bool = False, allow_pickle: bool = False
) -> Proof:
    """Compare the checkpoint ``out``, whoever wrote it, with what ``recipe`` promises.

    The proof is noted in the ``lmprune.json`` of ``out``, beside what stands there, unless the folder is read-only.

    Raises:
        RecipeError: the recipe is for another model.
        ModelError: there is no checkpoint, or its base is unreadable.
    """
    case = _Case.open(recipe, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if not out.is_dir():
        raise ModelError(f"no checkpoint at {out}. Write it with `lmprune prune RECIPE {out}`")
    proof = case.compare(out, logits)
    if os.access(out, os.W_OK):
        lineage = read_lineage(out, remedy="Remove it to have it written anew") or _lineage(
            recipe, case.base, case.plan, "unknown", "verified afterwards", None
        )
        write_json(out / LINEAGE, lineage | {"proof": proof.to_data()})
    return proof


def _choose_writer(writer: Writer, config: dict[str, Any], recipe: Recipe) -> tuple[str, str]:
    """The writer and why it was taken."""
    if writer not in ("auto", "mergekit", "copy"):
        raise UsageError(f"--writer {writer!r} does not exist. Choose from auto, mergekit, copy")
    best, reason = best_writer(config)
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


def _merge(recipe: Recipe, base: ModelFolder, config: dict[str, Any], with_base_folder: bool, out: Path) -> None:
    merge = recipe.merge(str(base.path))
    merge.pop("base_model", None)
    with tempfile.TemporaryDirectory(prefix="lmprune-") as scratch:
        if with_base_folder:
            # The recipe's own base folder may be stale or on another machine; this one is made for this run.
            write_base_folder(base.path, config, Path(scratch) / "base")
            merge["base_model"] = str(Path(scratch) / "base")
        # mergekit holds a whole shard of the result in memory, by default 5 GB; the base's own size is enough.
        largest = max(file.stat().st_size for file in Checkpoint.open(base.path).files)
        run_mergekit(merge, out, shard_bytes=None if _changes_dtype(recipe, config) else largest)


def _lineage(
    recipe: Recipe, base: ModelFolder, plan: LayerPlan, writer: str, reason: str, proof: Proof | None
) -> dict[str, Any]:
    return {
        "stage": "prune",
        **cut_lineage(recipe, base, plan),
        "writer": writer,
        "writer_reason": reason,
        "proof": proof.to_data() if proof else None,
        "versions": versions(),
    }
