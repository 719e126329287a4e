"""Choosing only among cuts that a runtime runs rightly."""

from __future__ import annotations

from dataclasses import replace

from lmprune.choosing.evidence import ModelEvidence
from lmprune.criteria.evidence import Choice
from lmprune.cuts.plan import spell
from lmprune.errors import PlanError
from lmprune.models.fitting import fits, nearest_fitting


def kept_to(runtime: str, made: Choice, evidence: ModelEvidence) -> Choice:
    """What a criterion chose, or the best of the nearest plans that ``runtime`` runs rightly, and what that costs.

    Raises:
        PlanError: it chose sublayers, and what it drops whole does not fit.
    """
    config = evidence.cut.config
    if fits(config, made.plan, runtime):
        return replace(made, details={**made.details, "runtime": {"name": runtime}})
    if made.plan.parts:
        raise PlanError(
            f"{runtime} would run another model without layers {spell(made.plan.dropped)}, and cuts of sublayers are "
            "not mended for it. Use a criterion of whole layers, such as greedy"
        )
    plans = nearest_fitting(config, made.plan, runtime, evidence.protected)
    plan = plans[int(evidence.losses(plans).mean().argmin())]
    free, kept = evidence.judged([made.plan, plan]).mean()
    said = (
        f"of the {len(plans)} cuts that keep {runtime}'s pattern and are nearest to {spell(made.plan.dropped)} "
        f"({made.reason}) the one of the lowest loss; that costs {kept - free:+.4f} nats a token on unseen text"
    )
    why = {"name": runtime, "instead_of": list(made.plan.dropped), "cost": round(float(kept - free), 6)}
    return replace(made, plan=plan, reason=said, details={**made.details, "runtime": why})
