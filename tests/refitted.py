"""Every causal language model of transformers that `prune` supports, cut, refitted, and written.

    python tests/refitted.py [TYPE ...]     measure those, or all, and write docs/architectures.md again

Tiny random models are harder to mend than trained ones: what is asked is that the repaired states are nearer to the
whole model's on text that was not fitted on, and that the checkpoint is the repaired model.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import MEMORY, _load, shortened, tiny_config, tiny_model

from lmprune.cuts.plan import Plan
from lmprune.errors import LmpruneError
from lmprune.files import write_text
from lmprune.forward.batches import Batch, Rows
from lmprune.forward.calls import decoder_of, leaving, run_decoder
from lmprune.healing.methods.refit import Refit
from lmprune.healing.refitting import refit
from lmprune.models.carrying import cut_live
from lmprune.models.stack import find_stack
from lmprune.writing import support

SUPPORTED = [row.architecture for row in support.rows() if row.prune in ("right", "some")]
DROPPED = ((3, 4, 5), (4, 5), (2, 3), (4, 5, 6, 7))
RIDGES = "1e-3,1e-1,1"


def rows_of(count: int, seed: int) -> Rows:
    """Samples of 12 to 14 tokens, so that batches are padded."""
    rng = np.random.default_rng(seed)
    return [rng.integers(4, 90, 14 - number % 3).astype(np.int32) for number in range(count)]


@torch.no_grad()
def _last(model: Any, rows: Rows) -> torch.Tensor:
    """What leaves the last layer, (tokens, width)."""
    found: list[torch.Tensor] = []
    for row in rows:
        batch = Batch.of([row], torch.device("cpu"))
        with leaving(find_stack(model).layers[-1], found.append):
            run_decoder(decoder_of(model), batch)
    return torch.cat([state[0] for state in found])


def examine(kind: str) -> dict[str, Any]:
    """What became of that type: the share of the squared error that is left, what was solved; or why not."""
    whole = tiny_model(tiny_config(kind)).float()
    layers = len(find_stack(whole).layers)
    student, plan, refused = None, None, ""
    for dropped in DROPPED:
        student, plan = copy.deepcopy(whole), Plan(layers, dropped)
        try:
            cut_live(student, plan)
            break
        except LmpruneError as exc:
            student, refused = None, str(exc)
    if student is None or plan is None:
        return {"left": None, "solved": [], "reason": refused}
    other = rows_of(12, seed=1)
    try:
        target, before = _last(whole, other), _last(student, other)
        report = refit(student, whole, plan, rows_of(64, seed=0), Refit(ridges=RIDGES, last_for="states"))
    except LmpruneError as exc:
        return {"left": None, "solved": [], "reason": str(exc).partition(". Heal")[0]}
    left = float((_last(student, other) - target).square().sum() / (before - target).square().sum())
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        try:
            student.save_pretrained(scratch)
        except RuntimeError as exc:  # Zamba 2, whose layers share a block
            assert "shared tensors" in str(exc), exc
            return {"left": None, "solved": [], "reason": "its layers share weights, which transformers does not save"}
        again = _load(Path(scratch))
        apart = float((_last(again, other) - _last(student, other)).abs().max())
    solved = sorted({done.path.rpartition(".")[2] for done in report.projections if done.form != "keep"})
    reason = report.notes[-1] if report.notes and "stays" in report.notes[-1] else ""
    return {"left": round(left, 3), "solved": solved, "apart": apart, "reason": reason}


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for kind in sys.argv[1:] or [*(k for k in SUPPORTED if k not in support.refits()), *support.refits()]:
        known = dict(support.refits())
        found = examine(kind)
        print(kind, found, flush=True)
        assert found.get("apart", 0.0) <= 1e-5, "what was written is another model"
        found["reason"] = shortened(found["reason"])
        known[kind] = {name: found[name] for name in ("left", "solved", "reason")}
        write_text(support.REFITS, json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        support.refits.cache_clear()
    write_text(Path(__file__).parent.parent / "docs" / "architectures.md", support.document())


if __name__ == "__main__":
    main()
