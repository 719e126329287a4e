"""What plans of one live model cost by any objective, on the text that is chosen on and on that which is judged on.

Tables of losses are made when they are first asked for, and kept; `Measures.ranked` races plans against one another, so
that most of them never see most of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, UsageError
from lmprune.forward.journal import Journal
from lmprune.forward.loss import CHUNK, Losses, LossTable, spelled
from lmprune.forward.objectives import Term, parse_objective
from lmprune.forward.objectives.answers import first_lines, sure_ones
from lmprune.forward.objectives.written import write
from lmprune.forward.processes import Processes
from lmprune.forward.streaming import StreamedModel
from lmprune.models.stack import find_stack
from lmprune.text.prompts import prompts_of
from lmprune.text.tokens import Tokens

GROWTH = 1.25
"""A race is looked at again when there are this many times the samples of the look before."""

Gold = Callable[[str, int], Tokens]
"""``gold(task, samples)``: right answers of a task of the harness."""
Losers = Callable[[Sequence[NDArray[np.float64]], Sequence[int], int, int], dict[int, float]]
"""``losers(parts, totals, rivals, look)``: which rows of (plans, samples) are surely worse than the best, and by how
much. Each of ``parts`` is of one objective, weighted so that a row's means sum to its loss; ``totals`` are the samples
that there are of each, ``rivals`` how many plans began, and looks count from 1."""


@dataclass(frozen=True)
class Half:
    """`Sources` of one half of the samples: ``first`` of the source came before them."""

    model: Any
    tokenizer: Any
    tokens: Tokens
    first: int
    seed: int
    default: str
    gold: Callable[[str], Tokens]
    journal: Journal
    name: str
    processes: Processes

    def text(self) -> Tokens:
        """See `Sources`."""
        return self.tokens

    def written(self) -> Tokens:
        """See `Sources`."""
        if isinstance(self.model, StreamedModel):
            raise UsageError(
                "a model that is read layer by layer writes nothing, so nothing is measured on its own answers. Use "
                "--objective loss, kl or task:NAME, or --quantization nf4"
            )
        prompts = prompts_of(self.tokens, self.tokenizer, seed=self.seed, first=self.first, default=self.default)
        key = f"written {self.name}"
        if not self.journal.has(key):
            made = write(self.model, prompts, end=self.tokenizer.eos_token_id, processes=self.processes)
            self.journal.put(key, {"rows": list(made.rows), "starts": list(made.starts or ()), "source": made.source})
        kept = self.journal.get(key)
        return Tokens(tuple(kept["rows"]), kept["source"], prompts.settings, tuple(kept["starts"]))

    def sure(self) -> Tokens:
        """See `Sources`."""
        lines = first_lines(self.written(), self.tokenizer)
        whole = Plan(len(find_stack(self.model).layers))
        table = LossTable(self.model, lines, journal=self.journal, name=f"lines {self.name}", processes=self.processes)
        return sure_ones(lines, table.losses([whole]).values[0] * lines.predicted)


@dataclass
class _Tally:
    """What was asked for, and what that took."""

    asked: int = 0
    passes: float = 0.0


class Measures:
    """The losses of plans of ``model``.

    Args:
        halves: the samples that are chosen on, and those that are judged on.
        gold: where right answers of tasks come from.
        seed: by which the samples were drawn from the source, or from ``default`` where none is named.
        journal: where everything is kept as it comes.
        batch_size: samples in one forward pass.
        states, abreast, processes: as of `LossTable`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        halves: tuple[Tokens, Tokens],
        gold: Gold,
        *,
        seed: int = 0,
        default: str = "c4",
        journal: Journal | None = None,
        batch_size: int | None = None,
        states: int | None = None,
        abreast: int = 1,
        processes: Processes | None = None,
    ) -> None:
        self._processes = processes or Processes()
        self._model, self._tokenizer, self._halves, self._gold = model, tokenizer, halves, gold
        self._seed, self._default, self._batch_size = seed, default, batch_size
        self._states, self._abreast = states, abreast
        self._journal = journal if journal is not None else Journal(None, {})
        self._tables: dict[str, LossTable] = {}
        self._tokens: dict[str, Tokens] = {}
        self._golden: dict[str, Tokens] = {}
        self._base: Plan | None = None
        self._runs: Callable[[], Any] | None = None
        self._name = ""
        self._tally = _Tally()

    def fresh(self, journal: Journal | None = None) -> Measures:
        """The same of the same model and texts, with nothing measured yet."""
        other = Measures(
            self._model,
            self._tokenizer,
            self._halves,
            self._gold,
            seed=self._seed,
            default=self._default,
            journal=journal,
            batch_size=self._batch_size,
            states=self._states,
            abreast=self._abreast,
            processes=self._processes,
        )
        other._tokens, other._golden = self._tokens, self._golden
        return other

    def on(self, base: Plan, runs: Callable[[], Any], name: str) -> Measures:
        """The same of a changed model that is left without what ``base`` drops: all plans asked of it drop that too.

        Args:
            runs: gives that model, once there is something to measure.
            name: what was done to it, for the journal.
        """
        other = self.fresh(self._journal)
        other._base, other._runs, other._name = base, runs, f"{name} {spelled(base)}: "
        other._tally = self._tally  # and nothing else is held of it: the model goes with who asked for it
        return other

    @property
    def asked(self) -> int:
        """Plans whose loss was asked for, also of changed models."""
        return self._tally.asked

    @property
    def passes(self) -> float:
        """Layers computed so far, of changed models too, in passes of the whole one over the text that is chosen on."""
        return self._tally.passes

    @contextmanager
    def _counting(self, plans: Sequence[Plan], tables: Sequence[LossTable]) -> Iterator[None]:
        """Count what is asked for, and the layers that are computed within the block."""
        share = len(self._base.kept) / self._base.layers if self._base is not None else 1.0
        self._tally.asked += len(plans)
        before = sum(table.passes for table in tables)
        try:
            yield
        finally:
            self._tally.passes += (sum(table.passes for table in tables) - before) * share / self._halves[0].samples

    def _left(self, plans: Sequence[Plan]) -> list[Plan]:
        """``plans`` in the numbers of the model that is measured."""
        return [plan.within(self._base) for plan in plans] if self._base is not None else list(plans)

    # --- losses ---------------------------------------------------------------------------------------------------

    def losses(
        self, objective: str, plans: Sequence[Plan], *, judged: bool = False, samples: int | None = None
    ) -> Losses:
        """Of each of ``plans`` by ``objective``, on about so many samples, if not on all.

        Errors as `parse_objective`, `Sources` and `LossTable`.
        """
        terms, left = parse_objective(objective), self._left(plans)
        tables = [self._table(term, judged) for term in terms]
        with self._counting(plans, tables):
            each = {term.spelled: table.losses(left, samples) for term, table in zip(terms, tables)}
            return Losses.mixed(each, [term.share for term in terms])

    def ranked(self, objective: str, plans: Sequence[Plan], losers: Losers | None) -> NDArray[np.float64]:
        """(plans,) losses, for finding the lowest: of plans that are surely worse, and see no more text, an estimate.

        Args:
            losers: by which plans drop out; None measures all of them on all of the text.
        """
        if losers is None or len(plans) < 2:
            return self.losses(objective, plans).mean()
        terms, mine = parse_objective(objective), self._left(plans)
        tables = [self._table(term, False) for term in terms]
        with self._counting(plans, tables):
            return _raced(tables, terms, mine, losers)

    def has(self, objective: str) -> bool:
        """Whether the text that is judged on has something to measure of all its terms."""
        try:
            for term in parse_objective(objective):
                self.tokens(term, True)
        except DataError:
            return False
        return True

    # --- tokens ---------------------------------------------------------------------------------------------------

    def tokens(self, term: Term, judged: bool) -> Tokens:
        """What an objective is measured on."""
        key = f"{term.spelled} {judged}"
        if key not in self._tokens:
            self._tokens[key] = term.tokens(self._half(judged))
        return self._tokens[key]

    def _half(self, judged: bool) -> Half:
        first = self._halves[0].samples if judged else 0
        return Half(
            self._model,
            self._tokenizer,
            self._halves[judged],
            first,
            self._seed,
            self._default,
            lambda task: self._gold_half(task, judged),
            self._journal,
            "judged" if judged else "chosen",
            self._processes,
        )

    def _gold_half(self, task: str, judged: bool) -> Tokens:
        if task not in self._golden:
            self._golden[task] = self._gold(task, sum(half.samples for half in self._halves))
        found = self._golden[task]
        first = max(1, found.samples * self._halves[0].samples // sum(half.samples for half in self._halves))
        return found.part(first) if judged and found.samples > first else found.part(0, first)

    def _table(self, term: Term, judged: bool) -> LossTable:
        key = f"{self._name}{term.spelled} {'judged' if judged else 'chosen'}"
        if key not in self._tables:
            tokens = self.tokens(term, judged)
            self._tables[key] = LossTable(
                self._model,
                tokens,
                term.score(tokens),
                batch_size=self._batch_size,
                journal=self._journal,
                name=key,
                states=self._states,
                abreast=self._abreast,
                runs=self._runs,
                keep=not judged and self._runs is None,  # where searches ask step by step
                processes=self._processes,
            )
        return self._tables[key]


def _raced(
    tables: Sequence[LossTable], terms: Sequence[Term], plans: Sequence[Plan], losers: Losers
) -> NDArray[np.float64]:
    """See `Measures.ranked`."""
    alive, behind = list(range(len(plans))), [0.0] * len(plans)
    left: list[tuple[int, int]] = []  # who dropped out, and who was the best then
    most = max(table.samples for table in tables)
    for look, samples in enumerate(_looks(most), 1):
        parts = [
            _weighted(table, term, [plans[i] for i in alive], min(samples, table.samples))
            for table, term in zip(tables, terms)
        ]
        means = np.sum([part.mean(1) for part in parts], axis=0)
        if samples == most:
            break
        best = alive[int(means.argmin())]
        out = losers(parts, [table.samples for table in tables], len(plans), look)
        for row, worse in out.items():
            behind[alive[row]] = worse
            left.append((alive[row], best))
        alive = [i for row, i in enumerate(alive) if row not in out]
        if len(alive) == 1:
            means = np.sum([part.mean(1)[list(set(range(len(part))) - set(out))] for part in parts], axis=0)
            break
    found = np.zeros(len(plans))
    found[alive] = means
    for plan, then_best in reversed(left):
        found[plan] = found[then_best] + behind[plan]
    return found


def _weighted(table: LossTable, term: Term, plans: Sequence[Plan], samples: int) -> NDArray[np.float64]:
    """(plans, samples) what each sample adds to a mix: over all samples the means are the loss's share."""
    found = table.losses(plans, samples)
    weighted: NDArray[np.float64] = found.values * (found.tokens * (term.share / table.counts.mean()))
    return weighted


def _looks(most: int) -> list[int]:
    """Numbers of samples, in whole chunks, each `GROWTH` times the one before; the last is all of them.

    >>> _looks(200)
    [32, 64, 96, 128, 160, 200]
    """
    found: list[int] = []
    for samples in range(CHUNK, most, CHUNK):
        if not found or samples >= GROWTH * found[-1]:
            found.append(samples)
    return [*found, most]
