"""What a draft is worth: the arithmetic of speculative decoding, and what was measured, as plain data. Pure.

A draft proposes g tokens, the base reads them in one pass and keeps those that it would have said itself, and one of
its own (Leviathan et al. 2023, arXiv 2211.17192). With a chance a that a token is kept, a round yields
(1 - a^(g+1)) / (1 - a) tokens (equation 1), and costs g passes of the draft and one of the base over g + 1 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from lmprune.errors import UsageError
from lmprune.settings import check_shared, device_option, dtype_option, option, seed_option
from lmprune.versions import versions


@dataclass(frozen=True)
class DraftSettings:
    """On what a draft is judged."""

    PANEL: ClassVar[str] = "Measuring"

    samples: int = option(64, "Samples of text on which the next tokens are compared.", metavar="N")
    max_length: int = option(256, "Tokens of a sample, at most.", metavar="T")
    seed: int = seed_option("Seed of the choice of samples.")
    draft_tokens: str = option("1,2,3,4,5,6,8", "Numbers of tokens that the draft proposes at once.", metavar="G,...")
    prompts: int = option(50, "Prompts on which the speed-up is measured; 0 measures none.", metavar="N")
    prompt_length: int = option(32, "Tokens of each prompt.", metavar="N")
    tokens: int = option(64, "Tokens to generate after each.", metavar="N")
    device: str = device_option()
    dtype: str = dtype_option()

    def __post_init__(self) -> None:
        for name in ("samples", "prompt_length", "tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: give at least 1")
        if self.prompts < 0:
            raise UsageError(f"--prompts {self.prompts}: give 0 to measure none, or more")
        if self.max_length < 2:
            raise UsageError(f"--max-length {self.max_length}: give at least 2, so that there is a next token")
        check_shared(self)
        _ = self.numbers

    @property
    def numbers(self) -> list[int]:
        """Numbers of draft tokens, ascending."""
        words = self.draft_tokens.split(",")
        if not all(word.strip().isdecimal() and 0 < int(word) < 100 for word in words):
            raise UsageError(f"--draft-tokens {self.draft_tokens!r}: give numbers from 1 with commas, as in 2,4,8")
        return sorted({int(word) for word in words})


def tokens_per_round(acceptance: float, proposed: int) -> float:
    """Tokens that a round yields on average.

    >>> tokens_per_round(0.5, 1), tokens_per_round(1.0, 4), tokens_per_round(0.0, 4)
    (1.5, 5.0, 1.0)
    """
    return float(sum(acceptance**i for i in range(proposed + 1)))


@dataclass(frozen=True)
class Costs:
    """Seconds of passes with a cache, on one sequence.

    Attributes:
        base, draft: of one token.
        reading: number of tokens -> of the base over so many at once.
        prompt: of both models over the prompt.
    """

    base: float
    draft: float
    reading: Mapping[int, float]
    prompt: tuple[float, float] = (0.0, 0.0)

    @property
    def ratio(self) -> float:
        """A pass of the draft over one of the base."""
        return self.draft / self.base

    def speed_up(self, acceptance: float, proposed: int) -> float:
        """How many times as fast as the base alone, with so many tokens proposed at once."""
        round_takes = proposed * self.draft + self.reading[proposed + 1]
        return tokens_per_round(acceptance, proposed) * self.base / round_takes

    def alone(self, tokens: int, host: float = 0.0) -> float:
        """Seconds of the base alone, for ``tokens`` after the prompt; ``host`` is what each takes besides."""
        return self.prompt[0] + (tokens - 1) * self.base + tokens * host

    def together(self, rounds: int, drafted: int, proposed: int, host: float = 0.0) -> float:
        """Seconds of so many rounds with ``drafted`` passes of the draft; ``host`` is what each round takes besides."""
        passes = max(0, drafted - 1) * self.draft + (rounds - 1) * self.reading[proposed + 1]
        return sum(self.prompt) + passes + rounds * host


@dataclass(frozen=True)
class DraftRow:
    """One number of draft tokens.

    Attributes:
        greedy, sampling: predicted speed-up of decoding greedily, and of sampling.
    """

    proposed: int
    greedy: float
    sampling: float


@dataclass(frozen=True)
class Measured:
    """What `generate` took, alone and with the draft, on the same prompts in turns.

    Attributes:
        proposed: tokens that the draft proposed at once.
        speed_up: seconds alone over seconds with the draft: the median of the prompts.
        predicted: the same by `Costs` alone, for the rounds that these prompts took.
        with_host: the same with ``overhead`` as well.
        overhead: seconds besides the passes of the models, which is the host's own work: of a token alone, and of a
            round; medians, found on prompts apart.
        prompts, same: how many there were, and for how many the output was the base's own, token for token.
        kept: tokens a round, the base's own included.
    """

    proposed: int
    speed_up: float
    predicted: float
    with_host: float
    overhead: tuple[float, float]
    prompts: int
    same: int
    kept: float

    @property
    def of_predicted(self) -> float:
        """Measured over predicted, with all costs that were found."""
        return self.speed_up / self.with_host


@dataclass(frozen=True)
class DraftReport:
    """All that is known of a draft.

    Attributes:
        greedy, acceptance: as of `lmprune.forward.agreement.Agreement`.
        layers: of the base and of the draft.
        rows: by number of draft tokens.
    """

    base: str
    draft: str
    layers: tuple[int, int]
    greedy: float
    acceptance: float
    compared: int
    source: str
    costs: Costs
    rows: tuple[DraftRow, ...]
    measured: Measured | None
    device: str
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def best(self) -> DraftRow:
        """The number of draft tokens of the highest predicted speed-up of greedy decoding."""
        return max(self.rows, key=lambda row: row.greedy)

    @property
    def pays(self) -> bool:
        """Whether it should make decoding faster at all, by the agreement on text and by what was measured."""
        found = self.measured
        return self.best.greedy > 1 and (found is None or max(found.speed_up, found.predicted) > 1)

    def verdict(self) -> str:
        """In one line, for people."""
        found, best = self.measured, self.best
        if self.pays:
            spoilt = found is not None and found.speed_up <= 1
            but = "; not by transformers here, whose own work takes that away" if spoilt else ""
            return f"pays with {best.proposed} draft tokens: {best.greedy:.2f} times as fast{but}"
        needed = (
            "a deeper cut" if self.costs.ratio > 0.6 else "a draft that agrees more: heal it on the base's own text"
        )
        measured = f", and {found.speed_up:.2f} when it was measured" if found is not None else ""
        return (
            f"does not pay: at best {best.greedy:.2f} times as fast by the agreement on text{measured}. A pass of it "
            f"costs {self.costs.ratio:.2f} of one of the base, and {self.greedy:.0%} of its tokens are kept. It takes "
            f"{needed}"
        )

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json`` and files."""
        data = {"format": "lmprune-draft", "version": 1, **asdict(self)}
        data["costs"]["ratio"] = self.costs.ratio
        if self.measured is not None:
            data["measured"]["of_predicted"] = self.measured.of_predicted
        return data | {"best": self.best.proposed, "pays": self.pays}
