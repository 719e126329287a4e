"""Pictures: what is drawn is what the profile says, and the file is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmprune.drawing.maps import blocks, default_sizes, draw, figure
from lmprune.errors import PlanError, UsageError
from lmprune.profiling.distances import Profile, pairs, summarise


def some_profile(layers: int, samples: int = 20) -> Profile:
    starts, stops = pairs(layers)
    means = 0.02 * (stops - starts) * (1 + ((starts + stops) / 2 - 0.6 * layers) ** 2 / layers**2)
    distances = means + 0.002 * np.random.default_rng(0).standard_normal((samples, len(means)))
    statistics = (np.full((samples, layers), 0.9), np.full((samples, layers), 0.2), np.ones((samples, layers + 1)))
    weights = {"model": "m", "revision": None, "fingerprint": None, "dtype": "float32"}
    text = {"token": "last", "source": "demo", "data_hash": "h", "tokens": 9, "seed": 0}
    return summarise(distances, *statistics, **weights, **text)


def test_rows_are_block_sizes_and_columns_starts() -> None:
    profile = some_profile(6)
    raw, rescaled = (blocks(profile, rescaled=which) for which in (False, True))
    assert raw[1, 3] == profile.distance(3, 2)
    assert np.isnan(raw[1, 5]) and np.isnan(raw[5, 1])
    for n in range(1, 6):
        assert np.nanmin(rescaled[n - 1]) == 0 and np.nanmax(rescaled[n - 1]) == 1
        assert np.nanargmin(rescaled[n - 1]) == profile.best_block(n)
    assert rescaled[5, 0] == 0


def test_the_axes_are_named_and_the_chosen_blocks_marked() -> None:
    picture = figure(some_profile(12), (2, 3))
    text = [label for axes in picture.axes for label in (axes.get_xlabel(), axes.get_ylabel(), axes.get_title())]
    assert text.count("first layer of the block, l (from 0)") == 3
    assert "layers in the block, n" in text and "layer (from 0)" in text
    profile = some_profile(12)
    frames = picture.axes[0].patches
    assert [(round(f.get_x() + 0.5), round(f.get_y() + 0.5)) for f in frames] == [
        (profile.best_block(n), n) for n in (2, 3)
    ]


@pytest.mark.parametrize("layers", [1, 2, 80])
def test_any_depth_can_be_drawn(layers: int, tmp_path: Path) -> None:
    draw(some_profile(layers, 4), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


def test_the_same_profile_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(some_profile(8), tmp_path / name, sizes=(2,))
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown kind of picture '.jpg'"):
        draw(some_profile(4), tmp_path / "a.jpg")
    with pytest.raises(PlanError, match="no block of 9 layers"):
        draw(some_profile(4), tmp_path / "a.png", sizes=(9,))
    with pytest.raises(UsageError, match="too many"):
        draw(some_profile(8), tmp_path / "a.png", sizes=range(1, 8))
    assert list(tmp_path.iterdir()) == []


def test_default_sizes() -> None:
    assert default_sizes(1) == (1,) and default_sizes(12) == (2, 3, 6)


@pytest.mark.parametrize(
    "names", [["angular", "deepest"], ["block_influence", "taylor-by-a-long-name", "oracle", "best"]]
)
def test_a_legend_covers_nothing_and_no_mark_is_cut(names: list[str]) -> None:
    from lmprune.drawing.canvas import MARKS
    from lmprune.drawing.curves import Curve, Labels, Spot, against, amounts, ratios

    spots = [Spot(0, 4.5, 0.5, 0.5), Spot(3, 3.4, 2.5, 1.0)]
    curves, labels = [Curve(name, spots) for name in names], Labels("Memory of the weights", "weights, MB", 12)
    for drawn in (amounts(curves, 4.5, labels), ratios(curves, [(3, 1.3)], labels), against(curves, labels, "x")):
        drawn.draw_without_rendering()
        (axes,), (legend,) = drawn.axes, drawn.legends
        place, frame = legend.get_window_extent(), axes.get_tightbbox()
        assert frame is not None and not place.overlaps(frame)
        assert place.x0 >= 0 and place.x1 <= drawn.bbox.x1 and place.y0 >= 0
        assert axes.get_ylim()[0] <= 0.9 and axes.get_ylim()[1] >= 5.0, "whiskers"
        marks = [line for line in axes.lines if line.get_marker() in MARKS and len(line.get_xdata())]
        assert marks and not any(line.get_clip_on() for line in marks)
