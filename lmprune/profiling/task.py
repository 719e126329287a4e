"""What a profiling run is to measure: everything that is known before the first forward pass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lmprune.cuts.plan import check_count
from lmprune.errors import ModelError
from lmprune.forward.batches import batches_of, window_of
from lmprune.profiling.distances import Profile, pairs, summarise
from lmprune.profiling.sequential import Rule, looks
from lmprune.profiling.settings import ProfileSettings
from lmprune.profiling.statistics import Values, first_bad, split, width
from lmprune.text.tokens import Tokens
from lmprune.versions import versions


@dataclass(frozen=True)
class Subject:
    """Which weights are measured, for the record."""

    model: str
    revision: str | None
    fingerprint: str | None
    dtype: str


def rule_of(settings: ProfileSettings, layers: int) -> Rule | None:
    """The rule of ``--until``, or None.

    Raises:
        PlanError: the model has no blocks of that size.
    """
    count = settings.drop or max(1, round(layers / 4))
    check_count(count, layers)
    return None if settings.until is None else Rule(layers, count, settings.until, settings.indifference)


@dataclass(frozen=True)
class Task:
    """One profiling run.

    Attributes:
        size: samples in a forward pass.
        rule: when it may stop early.
        device: the kind of device, on which the bits depend.
    """

    settings: ProfileSettings
    subject: Subject
    layers: int
    tokens: Tokens
    size: int
    rule: Rule | None
    device: str

    @cached_property
    def batches(self) -> list[list[int]]:
        """The samples that are measured together, in order."""
        return batches_of([len(row) for row in self.tokens.rows], self.size)

    @cached_property
    def looks(self) -> list[int]:
        """The numbers of samples at which the rule looks."""
        return looks(self.tokens.samples, window_of(self.size)) if self.rule else []

    def identity(self) -> dict[str, Any]:
        """All that the values of a batch depend on, for the journal."""
        return {
            **dataclasses.asdict(self.subject),
            "tokens": self.tokens.hash,
            "token": self.settings.token,
            "batch_size": self.size,
            "device": self.device,
            "lmprune": versions().get("lmprune"),
        }

    def record(self, number: int, values: Values) -> dict[str, Any]:
        """What the journal keeps of a batch."""
        return {"samples": self.batches[number], "values": values}

    def values_in(self, number: int, record: Any) -> Values | None:
        """The values in a `record`, if it is one of that very batch."""
        batch = self.batches[number]
        if not isinstance(record, dict) or record.get("samples") != batch:
            return None
        values = record.get("values")
        right = isinstance(values, np.ndarray) and values.shape == (len(batch), width(self.layers))
        return values if right else None

    def check(self, number: int, values: Values) -> None:
        """Refuse values that say that a state was no vector with a direction.

        Raises:
            ModelError: names the layer and the sample.
        """
        bad = first_bad(values, self.layers)
        if bad is None:
            return
        row, state, problem = bad
        where = f"the output of layer {state - 1}" if state else "the embedding, the input of layer 0,"
        remedy = "Try --dtype float32 or bfloat16" if self.subject.dtype == "float16" else "Check the weights"
        raise ModelError(f"{where} {problem} for sample {self.batches[number][row]}. {remedy}")

    def settled(self, values: list[Values]) -> bool:
        """Whether the rule is content with the values of the first batches."""
        samples = sum(map(len, values))
        if self.rule is None or samples not in self.looks:
            return False
        starts, ends = pairs(self.layers)
        columns = np.flatnonzero(ends - starts == self.rule.n)
        return self.rule.settled(np.concatenate(values)[:, columns], self.looks.index(samples) + 1)

    def profile(self, values: list[Values], certain: bool) -> Profile:
        """The result, from the values of the first batches."""
        numbers, rows = np.concatenate(self.batches[: len(values)]), np.concatenate(values)
        in_order = np.empty_like(rows)
        in_order[numbers] = rows  # so that sums do not depend on how samples were batched
        tokens = self.tokens.take(len(rows))
        settings = self._options()
        return summarise(
            *split(in_order, self.layers),
            **dataclasses.asdict(self.subject),
            token=self.settings.token,
            source=tokens.source,
            data_hash=tokens.hash,
            tokens=tokens.count,
            seed=self.settings.seed,
            settings=settings if self.rule is None else {**settings, "certain": certain},
            versions=versions(),
        )

    def is_done_by(self, known: Profile) -> bool:
        """Whether ``known`` is the profile that this run would end with."""
        options = {name: value for name, value in known.settings.items() if name != "certain"}
        return (
            (known.fingerprint, known.dtype, known.token)
            == (self.subject.fingerprint, self.subject.dtype, self.settings.token)
            and options == self._options()
            and (known.samples == self.tokens.samples or (self.rule is not None and bool(known.settings["certain"])))
            and known.data_hash == self.tokens.take(known.samples).hash
        )

    def _options(self) -> dict[str, Any]:
        """The options that the result depends on and that have no place of their own in a profile."""
        asked = self.tokens.settings
        data = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)}
        options = {
            "max_length": self.settings.max_length,
            "batch_size": self.size,
            **{name: value for name, value in data.items() if value},
        }
        if self.rule is not None:
            options |= {"until": self.rule.level, "drop": self.rule.n, "indifference": self.rule.indifference}
        return options
