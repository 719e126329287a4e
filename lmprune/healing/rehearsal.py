"""Before the first step: all that could stop the end of a run, done with as few layers as will do, and no training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lmprune.cuts.beside import LARGEST
from lmprune.cuts.plan import Plan
from lmprune.drawing.losses import draw_losses
from lmprune.errors import LmpruneError, OutputError, UsageError, VerifyError, line_of, sized
from lmprune.files import check_room
from lmprune.forward.machine import free_memory, out_of_memory, release, weights_bytes
from lmprune.healing.keeping import Kept
from lmprune.healing.methods.base import Method, Patching
from lmprune.healing.one_by_one import streamed_losses, write_changed
from lmprune.healing.patching import gaps_of, write_patched
from lmprune.healing.student import live_where_it_fits, prepare
from lmprune.healing.writing import Merger, probe_logits, relative_distance, write_checkpoint
from lmprune.models.carrying import finish_live
from lmprune.models.cut import Cut
from lmprune.models.dtypes import WIDTH
from lmprune.models.loading import require_numbers
from lmprune.models.patches import CHANGE, DIAGONAL

_IDS = 8


def require_room(cut: Cut, out: Path, *, copies: int) -> None:
    """Make sure that what is written has room: so many checkpoints, or an adapter alone.

    Raises:
        OutputError: it has not.
    """
    check_room(out, copies * weights_bytes(cut, _width(cut)), "the healed model")


def rehearse(cut: Cut, method: Method, seed: int, work: Path, *, device: str, compute: str) -> None:
    """Merge, prove, write and read back what ``method`` makes of a few layers of ``cut``, within ``work``, untrained.

    Raises:
        OutputError: something in the model's folder cannot be written.
        VerifyError: the proof of a model that learnt nothing fails.
        LmpruneError: whatever else the end would raise.
    """
    small = _shortest(cut, method)
    if weights_bytes(small, 3 * WIDTH[compute]) > free_memory(device):
        return  # the end loads one model after the other; here the few layers are there three times
    with _trial(cut, work) as folder:
        _end(small, method, seed, folder, device, compute)


def rehearse_streamed(cut: Cut, method: Method, work: Path, *, device: str) -> None:
    """Write a few layers of ``cut`` as they are, tensor by tensor, and read them back layer by layer; within ``work``.

    Raises:
        As `rehearse`.
    """
    small = _shortest(cut, method)
    with _trial(cut, work) as folder:
        write_changed(small, Kept(folder / "solved"), folder)
        vocabulary = small.whole_config.get_text_config().vocab_size
        ids = (np.arange(_IDS, dtype=np.int32) % vocabulary)[None]
        streamed_losses(Cut(replace(cut.base, path=folder)), ids, device, batch=1)
        replace(cut.lineage, writer=None, writer_reason=None, proof=None).write(folder)


def rehearse_patch(cut: Cut, plan: Plan, name: str, method: Patching, work: Path) -> None:
    """Write a patch that changes nothing at the first cut of ``plan``, and put it into a model without weights.

    Args:
        name: that of the method.

    Raises:
        OutputError: all maps together are too large for a file beside a recipe.
        LmpruneError: as `rehearse`.
    """
    base = cut.origin.base
    assert base is not None, "the method needs it"
    gaps, width = gaps_of(plan), Cut(base).whole_config.get_text_config().hidden_size
    if (size := 4 * len(gaps) * width**method.numbers) > LARGEST:
        raise OutputError(
            f"--method {name}: the maps of {len(gaps)} cuts in states of width {width} are {sized(size)}, and a "
            f"file beside a recipe is at most {sized(LARGEST)}. Use --method refit"
        )
    first = Plan(plan.layers, tuple(range(gaps[0].first, gaps[0].next)))
    what, value = (CHANGE, 0.0) if method.numbers == 2 else (DIAGONAL, 1.0)
    maps = {f"{gaps[0].after}.{what}": torch.full((width,) * method.numbers, value)}
    with _trial(cut, work) as folder:
        patched = write_patched(replace(cut, plan=first, recipe=None, adapter=None), first, name, maps, folder)
        finish_live(patched.empty(), patched.plan)
        cut.lineage.write(folder)


@contextmanager
def _trial(cut: Cut, work: Path) -> Iterator[Path]:
    """A folder in ``work`` for what is tried within the block, in which whatever else is raised becomes one line."""
    folder = work / "rehearsal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    except (LmpruneError, MemoryError):
        raise
    except Exception as exc:
        if out_of_memory(exc):
            return
        raise OutputError(
            f"{cut.name or cut.base.name} could be healed, but not written: {line_of(exc)}. Nothing was trained; mend "
            "the model's folder first"
        ) from exc
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release()


@torch.no_grad()
def check_apart(cut: Cut, device: str) -> None:
    """Make sure that ``cut`` reads nothing of a document before the one whose places begin anew.

    Models of attention take their mask from the places; one with a state, or with a class of its own, may not.

    Raises:
        UsageError: it does.
    """
    model = live_where_it_fits(cut, dtype="float32", device=device)
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, 2 * _IDS), generator=draws).to(model.device)
    at = torch.arange(2 * _IDS, device=model.device)[None] % _IDS
    alone = probe_logits(model, ids[:, _IDS:])
    try:
        joined: torch.Tensor = model(input_ids=ids, position_ids=at, use_cache=False).logits[:, _IDS:].float().cpu()
        apart = relative_distance(joined, alone) < _SAME
    except TypeError:  # it takes no places
        apart = False
    del model
    release()
    if not apart:
        raise UsageError(
            f"--document-mask: {cut.name or cut.base.name} reads one document of a block from another all the same. "
            "Leave it out"
        )


_SAME = 1e-3
"""Relative distance of logits of one document, alone and behind another: far above what order of sums does to them."""


def _end(cut: Cut, method: Method, seed: int, folder: Path, device: str, compute: str) -> None:
    model = live_where_it_fits(cut, dtype=compute, device=device)
    ids = (torch.arange(_IDS) % model.config.get_text_config().vocab_size)[None]
    require_numbers(probe_logits(model, ids), cut.name or cut.base.name)
    student, _ = prepare(model, method, cut.plan, seed)
    merging = Merger(cut, method, seed, ids, folder / "adapter", compute, device)
    if method.adapter:
        merging.keep(student)
    merged, agreement = method.merge(None if method.adapter else student, merging)
    del student, model
    try:
        agreement.require("it was not trained")
    except VerifyError as exc:
        raise VerifyError(f"before training already, {exc}. Please report it") from exc
    written = folder / "written"
    written.mkdir()
    write_checkpoint(merged, cut.base.path, ids, written)
    draw_losses(written / "losses.png", [(1, 1.0)], [(0, 1.0), (1, 0.9)], 1.0, None)
    replace(cut.lineage, writer=None, writer_reason=None, proof=None).write(written)


def _width(cut: Cut) -> int:
    """Bytes of a number in the result."""
    named = cut.recipe.dtype if cut.recipe else None
    stored = named or str(cut.whole_config.dtype or "float32").removeprefix("torch.")
    return WIDTH.get(stored, 2)


def _shortest(cut: Cut, method: Method) -> Cut:
    """``cut`` less most of its layers: as few as a config can describe and the method can work on."""
    plan = cut.plan or Plan(cut.layers)
    few = 1
    while few < len(plan.kept):
        kept = plan.kept[:few]
        small = replace(cut, plan=Plan.from_kept(plan.layers, kept), recipe=None, adapter=None)
        try:
            method.check_model(small.empty(), small.plan)
            return replace(small, recipe=cut.recipe)
        except LmpruneError:
            few *= 2
    return replace(cut, adapter=None)
