"""The cut of a model that should be worth most as its draft: deep cuts by several criteria, judged side by side.

Every candidate is a view of one loaded model. The best by predicted speed-up becomes a recipe, and, where that is asked
for, is healed by distillation on text that the base wrote itself, since it is the base's words that it must guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from lmprune.benching.draft_rows import DraftRow, DraftSettings
from lmprune.choosing import ModelEvidence, choose, write_recipe
from lmprune.criteria import CRITERIA, Choice
from lmprune.cuts.plan import Plan, count_of_fraction
from lmprune.errors import PlanError, UsageError
from lmprune.files import check_output_folder
from lmprune.models.cut import Cut, open_cut
from lmprune.profiling.settings import ProfileSettings
from lmprune.settings import option, words_of
from lmprune.text.sources import DataSettings

RECIPE, DRAFT = "recipe.yml", "draft"
"""What a search leaves in its folder: the best cut, and the healed checkpoint where one was asked for."""


@dataclass(frozen=True)
class SearchSettings:
    """Which cuts are tried, and how long the best is healed."""

    PANEL: ClassVar[str] = "Search"

    fractions: str = option("0.75,0.67,0.5", "Shares of the layers to drop.", metavar="F,...")
    criteria: str = option("deepest,segment,greedy", "How layers are chosen.", metavar="C,...")
    heal_steps: int = option(0, "Steps of distillation of the best on the base's own text; 0 heals none.", metavar="N")

    def __post_init__(self) -> None:
        _ = self.shares
        for name in self.names:
            CRITERIA.find(name)
        if self.heal_steps < 0:
            raise UsageError(f"--heal-steps {self.heal_steps}: give 0 to heal none, or more")

    @property
    def shares(self) -> list[float]:
        """Shares of the layers that go."""
        try:
            found = [float(word) for word in self.fractions.split(",")]
        except ValueError:
            found = [0.0]
        if not all(0 < share < 1 for share in found):
            raise UsageError(f"--fractions {self.fractions!r}: give shares between 0 and 1 with commas, as in 0.5,0.75")
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """The criteria."""
        return words_of("--criteria", self.criteria)


@dataclass(frozen=True)
class Candidate:
    """One cut as a draft.

    Attributes:
        greedy: share of next tokens that it says as the base does.
        ratio: what a pass costs, in passes of the base.
        best: the number of draft tokens of the highest predicted speed-up, and that.
    """

    criterion: str
    plan: Plan
    greedy: float
    acceptance: float
    ratio: float
    best: DraftRow

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "plan": {"layers": self.plan.layers, "dropped": list(self.plan.dropped)}}


@dataclass(frozen=True)
class Found:
    """All candidates, the best first, and where that one was written: a recipe, or a healed checkpoint."""

    candidates: tuple[Candidate, ...]
    path: Path


def search_draft(
    base: str | Path | Cut,
    out: str | Path,
    search: SearchSettings | None = None,
    settings: DraftSettings | None = None,
    data: DataSettings | None = None,
) -> Found:
    """Try deep cuts of ``base`` as its drafts, and write the best to the new folder ``out``.

    Raises:
        UsageError, PlanError: settings that make no sense for this model.
        OutputError: ``out`` is not empty.
        ModelError, DataError, NetworkError, HostError: as the stages.
    """
    search, settings, data = search or SearchSettings(), settings or DraftSettings(), data or DataSettings()
    out = Path(out)
    check_output_folder(out)
    whole = open_cut(base)
    choices = list(_choices(whole, search, settings, data))
    candidates = sorted(_judged(whole, choices, settings, data), key=lambda found: -found.best.greedy)
    best = next(choice for choice in choices if choice.plan == candidates[0].plan)
    out.mkdir(parents=True, exist_ok=True)
    path = write_recipe(whole, best, out / RECIPE).path
    if search.heal_steps:
        path = _healed(path, out / DRAFT, search, settings, data)
    return Found(tuple(candidates), path)


def _choices(whole: Cut, search: SearchSettings, settings: DraftSettings, data: DataSettings) -> Iterator[Choice]:
    """What the criteria choose at each depth, each plan once."""
    measured = ProfileSettings(
        samples=settings.samples, max_length=settings.max_length, device=settings.device, dtype=settings.dtype
    )
    evidence = ModelEvidence(whole, measured, data)
    seen: set[Plan] = set()
    todo = [(share, name) for share in search.shares for name in search.names]
    for share, name in tqdm(todo, "criteria", leave=False, disable=None):
        try:
            made = choose(whole, name, drop=count_of_fraction(share, whole.layers), evidence=evidence)
        except PlanError:
            if share == search.shares[0]:
                raise
            continue
        if made.plan not in seen:
            seen.add(made.plan)
            yield made


def _judged(whole: Cut, choices: list[Choice], settings: DraftSettings, data: DataSettings) -> Iterator[Candidate]:
    from lmprune.benching.drafting import costs_of, predicted, texts
    from lmprune.forward.agreement import agreement
    from lmprune.forward.machine import pick_device
    from lmprune.forward.views import pruned_view

    compared, _ = texts(whole, settings, data)
    model = whole.load(dtype=settings.dtype, device=str(pick_device(settings.device)))
    for made in tqdm(choices, "drafts", leave=False, disable=None):
        view = pruned_view(model, made.plan)
        agreed, costs = agreement(model, view, compared), costs_of(model, view, settings)
        rows = predicted(costs, agreed.greedy, agreed.acceptance, settings)
        best = max(rows, key=lambda row: row.greedy)
        yield Candidate(made.criterion or "", made.plan, agreed.greedy, agreed.acceptance, costs.ratio, best)


def _healed(recipe: Path, out: Path, search: SearchSettings, settings: DraftSettings, data: DataSettings) -> Path:
    from lmprune.healing import HealSettings, heal

    how = HealSettings(
        method="lora+distill", steps=search.heal_steps, self_data=True, device=settings.device, seed=settings.seed
    )
    return heal(recipe, out, how, data).path
