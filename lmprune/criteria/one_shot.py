"""Switch off each layer in turn, and drop those without which the loss rises least.

The layer ablation of "Neural Network Lobotomy", and Shortened LLaMA's criterion PPL (Kim et al. 2024, arXiv
2402.02834): every layer is judged in the otherwise whole model, so two that stand in for each other both look cheap.
"""

from __future__ import annotations

import statistics

from lmprune.criteria.evidence import Choice, Evidence, cheapest, may_go, rounded
from lmprune.cuts.plan import Plan, spell
from lmprune.errors import PlanError

OBJECTIVE = "loss"
"""Unless another is asked for."""


def costs(evidence: Evidence, layers: tuple[int, ...]) -> dict[int, float]:
    """Layer -> nats a token that the loss rises by without it."""
    whole = Plan(evidence.layers)
    found = evidence.losses([whole, *(Plan(evidence.layers, (layer,)) for layer in layers)]).mean()
    return {layer: float(loss - found[0]) for layer, loss in zip(layers, found[1:])}


def critical(rise: dict[int, float]) -> tuple[int, ...]:
    """Layers without which the loss rises by more than ten times what it does without the median layer."""
    usual = statistics.median(abs(value) for value in rise.values())
    return tuple(layer for layer, value in rise.items() if value > 10 * usual)


def choose(count: int, evidence: Evidence) -> Choice:
    """The ``count`` layers of the smallest cost, each judged alone."""
    rise = costs(evidence, may_go(evidence, count))
    return _choice(evidence, rise, cheapest(rise, count))


def below(limit: float, evidence: Evidence) -> Choice:
    """Every layer that alone costs less than ``limit`` nats a token.

    Raises:
        PlanError: that is none of them, or all.
    """
    rise = costs(evidence, may_go(evidence, 1))
    gone = tuple(layer for layer, value in rise.items() if value < limit)
    if not gone or len(gone) == evidence.layers:
        least, most = min(rise.values()), max(rise.values())
        raise PlanError(
            f"--max-increase {limit:g}: {'every' if gone else 'no'} layer costs less. Alone, they cost {least:.4f} to "
            f"{most:.4f} nats a token"
        )
    return _choice(evidence, rise, gone)


def _choice(evidence: Evidence, rise: dict[int, float], gone: tuple[int, ...]) -> Choice:
    vital = critical(rise)
    reason = f"alone, each of {spell(gone)} costs at most {max(rise[layer] for layer in gone):.4f} nats a token"
    if vital:
        reason += f"; critical: {spell(vital)}"
    return Choice(Plan(evidence.layers, gone), reason, {"costs": rounded(rise), "critical": list(vital)})
