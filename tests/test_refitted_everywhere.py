"""Every causal language model that `prune` supports, refitted: nearer to the whole one, or a reason."""

from __future__ import annotations

import pytest
from refitted import DROPPED, RIDGES, SUPPORTED, examine, rows_of

from lmprune.healing.methods.refit import Refit
from lmprune.writing import support

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUPPORTED)
def test_repaired_states_are_nearer_and_the_checkpoint_is_the_repaired_model(kind: str) -> None:
    found = examine(kind)
    assert found["reason"] if found["left"] is None else found["left"] < 1 and found["apart"] <= 1e-5


def test_nothing_was_made_worse_in_the_table() -> None:
    for kind, row in support.refits().items():
        assert row["reason"] if row["left"] is None else row["left"] < 1, kind


def test_the_table_says_how_it_was_made() -> None:
    said = " ".join(support.document().partition("## Refit")[2].split())
    given, own = (ridges.split(",") for ridges in (RIDGES, Refit.ridges))
    assert f"ridges {', '.join(given[:-1])} or {given[-1]} (the command's are {own[0]} to {own[-1]})" in said
    fitted = rows_of(64, seed=0)
    assert f"on {sum(map(len, fitted))} tokens in {len(fitted)} samples" in said
    assert f"without layers {DROPPED[0][0]}-{DROPPED[0][-1]}, or the nearest cut" in said
