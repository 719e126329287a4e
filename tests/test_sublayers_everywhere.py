"""Every causal language model that `prune` supports, without one attention and without one MLP: exact, or a reason."""

from __future__ import annotations

import pytest
from sublayered import RIGHT, SUPPORTED, examine, gist

from lmprune.cuts.sublayers import PROJECTIONS
from lmprune.writing import support

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ("llama", "gemma2", "mamba", "longcat_flash", "hy_v4")


@pytest.mark.parametrize(
    "kind", [kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow) for kind in SUPPORTED]
)
def test_what_is_skipped_is_what_is_zeroed_or_refused(kind: str) -> None:
    for sublayer in PROJECTIONS:
        told = examine(kind, sublayer)
        assert (told if told == RIGHT else gist(told)) == support.sublayers()[kind][sublayer]


def test_the_table_has_every_type_and_nothing_wrong() -> None:
    assert support.sublayers().keys() == set(SUPPORTED)
    assert not [
        kind for kind, row in support.sublayers().items() if any(told.startswith("wrong") for told in row.values())
    ]
