"""What one pass over calibration text says about the layers of a model. Pure: numpy, no torch.

State l is the input of layer l; state L is the output of the last layer, before the final norm. The block of n layers
that starts at l is [l, l+n), and its angular distance (arXiv 2403.17887, equation 7) is

    d(l, l+n) = arccos(cos(state l, state l+n)) / pi        in [0, 1], averaged over samples.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmprune.cuts.plan import MOST_LAYERS
from lmprune.errors import PlanError, RecipeError, check_keys, line_of, shown
from lmprune.files import parse_json, read_text, write_text

FORMAT = "lmprune-profile"
VERSION = 1
GROUP_BYTES = 2 << 20
"""Upper bound of the values kept for the bootstrap: two bytes for each pair of states and group."""
MOST_GROUPS = 1000
LEVEL = 0.95
RESAMPLES = 2000
LEAST_SAMPLES = 64
"""Samples below which nothing is said to be certain.

What one text in twenty would say otherwise is absent from 59 samples by a chance of one in twenty, and the bootstrap
cannot draw what is absent: of one sample it makes an interval without width. Whole windows of samples give 64.
"""

_ALIKE = 1e-6
Array = NDArray[np.float64]


class Certainty(NamedTuple):
    """How sure the best block of ``n`` layers is: the share of bootstrap resamples that choose each start."""

    n: int
    shares: dict[int, float]
    """Start -> share, the most frequent first; starts that no resample chooses are absent."""
    samples: int
    differ: bool = True
    """Whether the samples do."""

    @property
    def start(self) -> int:
        """The start chosen by most resamples."""
        return next(iter(self.shares))

    @property
    def share(self) -> float:
        """Its share."""
        return self.shares[self.start]

    @property
    def runner_up(self) -> int | None:
        """The start with the next largest share."""
        return next(iter(list(self.shares)[1:]), None)

    def describe(self) -> str:
        """``start 21: 97 % of resamples; runner-up 22 (3 %)``; of too few samples, that they are."""
        if self.samples < LEAST_SAMPLES:
            few = f"{self.samples} sample{'s say' if self.samples > 1 else ' says'}"
            return f"{few} nothing of how certain that is; {LEAST_SAMPLES} would"
        if not self.differ:
            return f"{self.samples} samples that are all alike say nothing of how certain that is"
        text = f"start {self.start}: {self.share:.0%} of resamples".replace("%", " %")
        if self.runner_up is None:
            return text
        return text + f"; runner-up {self.runner_up} ({self.shares[self.runner_up]:.0%})".replace("%", " %")


def pairs(layers: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Every (l, m) with 0 <= l < m <= ``layers``, row by row: the order of the values in `Groups`."""
    return np.triu_indices(layers + 1, k=1)


@dataclass(frozen=True)
class Groups:
    """Means of the distances over groups of samples, as the file holds them: what the bootstrap draws from.

    Up to `MOST_GROUPS` samples a group is one sample. Beyond, or where that would pass `GROUP_BYTES`, neighbouring
    samples share one: the bootstrap of group means estimates the same spread.

    Attributes:
        sizes: (groups,) the samples of each group.
        mean, scale: (pairs,) the middle of a pair's values, and the largest deviation from it.
        steps: (groups, pairs) deviations in steps of scale / 32767.
    """

    sizes: NDArray[np.int64]
    mean: Array
    scale: Array
    steps: NDArray[np.int16]

    @classmethod
    def of(cls, samples: Array) -> Groups:
        """From the distances of every sample, of shape (samples, pairs)."""
        count, width = samples.shape
        limit = max(2, min(MOST_GROUPS, GROUP_BYTES // (2 * width)))
        parts = np.array_split(samples, min(count, limit))
        values = np.stack([part.mean(axis=0) for part in parts])
        mean = values.mean(axis=0)
        scale = np.abs(values - mean).max(axis=0)
        steps = np.divide(values - mean, scale, out=np.zeros_like(values), where=scale > 0)
        return cls(np.array([len(part) for part in parts]), mean, scale, np.round(steps * 32767).astype(np.int16))

    @property
    def differ(self) -> bool:
        """Whether samples do, by more than the order of sums makes of one: of copies of one, nothing is drawn anew."""
        return bool(self.scale.max(initial=0.0) > _ALIKE * np.abs(self.mean).max(initial=0.0))

    def resampled_means(self, columns: NDArray[np.intp], resamples: int = RESAMPLES, seed: int = 0) -> Array:
        """Bootstrap means of the given columns, of shape (resamples, columns)."""
        values = self.mean[columns] + self.scale[columns] * (self.steps[:, columns] / 32767)
        groups = len(self.sizes)
        rng = np.random.Generator(np.random.PCG64(seed))
        counts = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples) * self.sizes
        means: Array = counts @ values / counts.sum(axis=1, keepdims=True)
        return means


@dataclass(frozen=True, repr=False)
class Profile:
    """The mean angular distance of every block of layers, per-layer statistics, and what it takes to repeat them.

    Attributes:
        layers: L, the number of layers.
        distances: (L+1, L+1); entry [l, m] with l < m is d(l, m), zero elsewhere.
        low, high: the bounds of the 95 % bootstrap interval of each distance, laid out likewise.
        block_influence: (L,); 1 - E cos(state l, state l+1) (ShortGPT, arXiv 2403.03853, equation 1).
        relative_magnitude: (L,); E |state l+1 - state l| / |state l+1|: what a layer adds, as a share of its output.
        norms: (L+1,); E |state l|.
        groups: what the bootstrap draws from.
        token: ``last`` (the last token of each sample) or ``all`` (the mean over a sample's tokens).
        model, revision, fingerprint, dtype: which weights, in which type they were run.
        source, data_hash, samples, tokens, seed: which text. The hash is that of the tokens that were used.
        settings: the remaining options of the run, as plain data.
        versions: package -> version.
    """

    layers: int
    distances: Array
    low: Array
    high: Array
    block_influence: Array
    relative_magnitude: Array
    norms: Array
    groups: Groups
    token: str
    model: str
    revision: str | None
    fingerprint: str | None
    dtype: str
    source: str
    data_hash: str
    samples: int
    tokens: int
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def distance(self, start: int, n: int) -> float:
        """d(start, start+n): the mean angular distance over the block [start, start+n), in units of pi."""
        self._check(n)
        if not 0 <= start <= self.layers - n:
            raise PlanError(f"no block of {n} layers starts at {start}: give a start from 0 to {self.layers - n}")
        return float(self.distances[start, start + n])

    def of_size(self, n: int) -> Array:
        """The distances of all blocks of ``n`` layers by start, of shape (L-n+1,)."""
        self._check(n)
        return np.diagonal(self.distances, n)

    def best_block(self, n: int) -> int:
        """The start of the block of ``n`` layers with the smallest distance; the lowest of equals."""
        return int(np.argmin(self.of_size(n)))

    def certainty(self, n: int, resamples: int = RESAMPLES) -> Certainty:
        """How often each start is best among ``resamples`` bootstrap resamples of the samples."""
        self._check(n)
        starts, stops = pairs(self.layers)
        means = self.groups.resampled_means(np.flatnonzero(stops - starts == n), resamples)
        wins = np.bincount(means.argmin(axis=1), minlength=self.layers - n + 1) / resamples
        # Equal shares: the block of the smaller distance first, so that the order is the same everywhere.
        order = sorted(np.flatnonzero(wins).tolist(), key=lambda start: (-wins[start], self.distance(start, n)))
        return Certainty(n, {start: float(wins[start]) for start in order}, self.samples, self.groups.differ)

    @property
    def certain(self) -> bool:
        """Whether there are samples enough to say how certain a distance is."""
        return self.samples >= LEAST_SAMPLES and self.groups.differ

    def interval(self, start: int, n: int) -> tuple[float, float] | None:
        """The 95 % bootstrap interval of d(start, start+n); None where there are too few samples for one."""
        self.distance(start, n)
        if not self.certain:
            return None
        return float(self.low[start, start + n]), float(self.high[start, start + n])

    def __repr__(self) -> str:
        return f"<Profile of {self.model}: {self.layers} layers, {self.samples} samples of {self.source}>"

    def _repr_html_(self) -> str:
        """The best blocks as a table, for a notebook."""
        from html import escape

        sizes = sorted({max(1, round(self.layers * share)) for share in (0.125, 0.25, 0.5)})
        rows = "".join(
            f"<tr><td>{n}</td><td>{self.best_block(n)}</td><td>{self.distance(self.best_block(n), n):.4f}</td>"
            f"<td>{escape(self.certainty(n).describe())}</td></tr>"
            for n in sizes
        )
        head = "<tr><th>n</th><th>best start</th><th>angular distance</th><th>certainty of the distance</th></tr>"
        return f"<div>{escape(repr(self)[1:-1])}</div><table>{head}{rows}</table>"

    def plot(self, sizes: Sequence[int] | None = None) -> Any:
        """The picture of `lmprune plot`, as a matplotlib figure, which a notebook shows."""
        from lmprune.drawing import maps

        return maps.figure(self, sizes or maps.default_sizes(self.layers))

    def _check(self, n: int) -> None:
        if not 0 < n <= self.layers:
            raise PlanError(f"no block of {n} layers: this model has {self.layers}, so give 1 to {self.layers}")

    # --- the file ---------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The file's text. Matrices are written as rows l of d(l, l+1) .. d(l, L)."""
        groups = self.groups
        packed = {name: _b64(getattr(groups, name)) for name in ("mean", "scale", "steps")}
        data = {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
            **{name: _ragged(getattr(self, name)) for name in _MATRICES},
            **{name: getattr(self, name).tolist() for name in _VECTORS},
            "groups": {"sizes": groups.sizes.tolist(), **packed},
        }
        return json.dumps(data, indent=1, ensure_ascii=False, default=dict) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "profile") -> Profile:
        """Read `to_json`'s text.

        Raises:
            RecipeError: it is not such a text: broken, of another kind or version, with unknown or missing keys, or
                with values that contradict one another.
        """
        try:
            data = parse_json(text)
        except (ValueError, RecursionError) as exc:
            raise RecipeError(f"{where} is not JSON: {line_of(exc, 120)}. Make it with `lmprune profile`") from exc
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise RecipeError(f"{where} is not a profile. Make one with `lmprune profile MODEL -o profile.json`")
        if data.get("version") != VERSION:
            raise RecipeError(
                f"{where} is a profile of version {shown(data.get('version'))}; this lmprune reads {VERSION}. Make it "
                "again"
            )
        known = ("format", "version", *_PLAIN, *_MATRICES, *_VECTORS, "groups")
        check_keys(data, known, where, RecipeError)
        for key in known:
            if key not in data:
                raise RecipeError(f"{where}: the key {key!r} is missing. Make the profile again")
        try:
            return cls._from_checked(data)
        except (ValueError, TypeError, KeyError, OverflowError, MemoryError, zlib.error) as exc:
            raise RecipeError(f"{where} is damaged: {line_of(exc)}. Make the profile again") from exc

    @classmethod
    def _from_checked(cls, data: Mapping[str, Any]) -> Profile:
        for name, kinds in _PLAIN.items():
            if not isinstance(data[name], kinds) or isinstance(data[name], bool):
                raise ValueError(f"the value of {name!r} is {shown(data[name])}")
        layers, groups = data["layers"], data["groups"]
        if not 1 <= layers <= MOST_LAYERS or data["token"] not in ("last", "all") or not isinstance(groups, dict):
            raise ValueError("layers, token or groups is out of range")
        check_keys(groups, ("sizes", "mean", "scale", "steps"), "groups", RecipeError)
        sizes, width = np.array(groups["sizes"], dtype=np.int64), layers * (layers + 1) // 2
        if sizes.ndim != 1 or sizes.sum() != data["samples"] or (sizes < 1).any():
            raise ValueError("the groups do not add up to the samples")
        mean, scale = (_unb64(groups[key], np.dtype("<f8"), (width,)) for key in ("mean", "scale"))
        steps = _unb64(groups["steps"], np.dtype("<i2"), (len(sizes), width))
        shapes = {"block_influence": layers, "relative_magnitude": layers, "norms": layers + 1}
        fields: dict[str, Any] = {name: data[name] for name in _PLAIN}
        fields |= {name: _square(data[name], layers, name) for name in _MATRICES}
        fields |= {name: _numbers(data[name], shapes[name], name) for name in _VECTORS}
        return cls(**fields, groups=Groups(sizes, mean, scale, steps))

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Profile:
        """Read a file that `write` made; errors as `from_json`."""
        try:
            return cls.from_json(read_text(path, RecipeError, "Make the profile again"), str(path))
        except FileNotFoundError as exc:
            raise RecipeError(f"no profile at {path}. Make one with `lmprune profile MODEL -o {path}`") from exc


_OPTIONAL_TEXT = (str, type(None))
_PLAIN: dict[str, Any] = {
    "model": str,
    "revision": _OPTIONAL_TEXT,
    "fingerprint": _OPTIONAL_TEXT,
    "dtype": str,
    "layers": int,
    "token": str,
    "source": str,
    "data_hash": str,
    "samples": int,
    "tokens": int,
    "seed": int,
    "settings": Mapping,
    "versions": Mapping,
}
_MATRICES = ("distances", "low", "high")
_VECTORS = ("block_influence", "relative_magnitude", "norms")


def _ragged(matrix: Array) -> list[list[float]]:
    return [matrix[row, row + 1 :].tolist() for row in range(len(matrix) - 1)]


def _square(rows: Any, layers: int, name: str) -> Array:
    matrix = np.zeros((layers + 1, layers + 1))
    if not isinstance(rows, list) or len(rows) != layers:
        raise ValueError(f"{name!r} has not {layers} rows")
    for row, values in enumerate(rows):
        matrix[row, row + 1 :] = _numbers(values, layers - row, f"{name}[{row}]")
    return matrix


def _numbers(values: Any, count: int, name: str) -> Array:
    array = np.array(values, dtype=np.float64)
    if array.shape != (count,) or not np.isfinite(array).all():
        raise ValueError(f"{name} is not {count} finite numbers")
    return array


def _b64(array: NDArray[Any]) -> str:
    little = array.astype(array.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(little.tobytes(), 9)).decode("ascii")


def _unb64(text: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    size, unpacked = dtype.itemsize * math.prod(shape), zlib.decompressobj()
    raw = unpacked.decompress(base64.b64decode(text, validate=True), size + 1)  # and no more, whatever it holds
    if len(raw) != size or unpacked.unconsumed_tail:
        raise ValueError(f"the groups hold not {size} bytes")
    return np.frombuffer(raw, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="))


def square(values: Array, layers: int) -> Array:
    """Values in the order of `pairs` as an (L+1, L+1) upper triangle."""
    matrix = np.zeros((layers + 1, layers + 1))
    matrix[pairs(layers)] = values
    return matrix


def summarise(distances: Array, cosines: Array, magnitudes: Array, norms: Array, **provenance: Any) -> Profile:
    """A profile from per-sample values.

    Args:
        distances: (samples, pairs) in the order of `pairs`.
        cosines: (samples, L), cos(state l, state l+1).
        magnitudes: (samples, L), as ``relative_magnitude``.
        norms: (samples, L+1).
        provenance: the remaining fields of `Profile`.
    """
    layers = cosines.shape[1]
    groups = Groups.of(distances)
    means = groups.resampled_means(np.arange(distances.shape[1]))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    return Profile(
        layers=layers,
        distances=square(distances.mean(axis=0), layers),
        low=square(low, layers),
        high=square(high, layers),
        block_influence=1 - cosines.mean(axis=0),
        relative_magnitude=magnitudes.mean(axis=0),
        norms=norms.mean(axis=0),
        groups=groups,
        samples=len(distances),
        **provenance,
    )
