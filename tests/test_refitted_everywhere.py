"""Every causal language model that `prune` supports, refitted: nearer to the whole one, or a reason."""

from __future__ import annotations

import pytest
from refitted import SUPPORTED, examine

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
