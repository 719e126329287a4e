"""A cut in words and blocks: which layers stay, where that comes from, what it costs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lmprune.cuts.plan import Plan
from lmprune.cuts.sublayers import Sublayers
from lmprune.cuts.width import Width
from lmprune.models.runtimes import RIGHT
from lmprune.reporting.healings import account
from lmprune.sharing.subjects import Subject

KEPT, DROPPED, PARTLY = "█", "░", "▒"
PER_LINE = 32
_MOST_LINES, _LONGEST_LINE = 20, 400


def strip(plan: Plan, per_line: int = PER_LINE) -> list[str]:
    """One block a layer, numbered at both ends, and what the blocks mean.

    >>> print(*strip(Plan(12, (8, 9, 10))), sep="\\n")
     0 ████████░░░█ 11
       █ kept  ░ dropped
    """
    wide = len(str(plan.layers - 1))
    gone, partly = set(plan.dropped), part_cut(plan)
    marks = "".join(DROPPED if n in gone else PARTLY if n in partly else KEPT for n in range(plan.layers))
    lines = []
    for start in range(0, plan.layers, per_line):
        row = marks[start : start + per_line]
        lines.append(f"{start:>{wide}} {row} {start + len(row) - 1}")
    key = f"{KEPT} kept  {DROPPED} dropped" + f"  {PARTLY} without attention or MLP" * bool(partly)
    return [*lines, f"{' ' * wide} {key}"]


def part_cut(plan: Plan) -> frozenset[int]:
    """Layers that stay without their attention or their MLP."""
    parts = [part for part in plan.parts if isinstance(part, Sublayers)]
    return frozenset(layer for part in parts for layer in range(plan.layers) if part.of_layer(layer))


def narrower(plan: Plan) -> list[str]:
    """What is narrower than in the base, a line for each size."""
    return [line for part in plan.parts if isinstance(part, Width) for line in part.lines()]


def headline(subject: Subject) -> str:
    """``meta-llama/Llama-2-7b-hf: drops 9 of 32 layers: 21-29``."""
    model = _plain(subject.lineage.base.model or "a model that is not named")
    if subject.plan is None:
        return f"{model}: nothing is known to be missing"
    more = "" if subject.counted else ", if the uncut model ends where the recipe does"
    return f"{model}: {subject.plan.describe()}{more}"


def facts(subject: Subject) -> list[tuple[str, list[str]]]:
    """What is known, by a word or two: of each, its lines."""
    told = subject.lineage
    said = told.recipe.get("choice")
    choice: Mapping[str, Any] = said if isinstance(said, dict) else {}
    criterion = told.recipe.get("criterion")
    found: list[tuple[str, list[str]]] = [
        ("chosen", _lines(": ".join(str(part) for part in (criterion, choice.get("summary")) if part))),
        ("source", _lines(choice.get("source"))),
        ("counted", _lines(choice.get("indices"))),
        ("chosen on", _lines(choice.get("calibration")) or _data(choice)),
        ("measured", _lines(choice.get("measured"))),
        ("not measured", _lines(choice.get("unmeasured"))),
        ("warning", _lines(choice.get("warning"))),
        ("revision", _lines(told.base.revision)),
        ("weights", _lines(told.base.fingerprint)),
        ("written by", _lines(": ".join(part for part in (told.writer, told.writer_reason) if part))),
        ("proof", _proof(subject)),
        ("healed", _healing(told.healing)),
        ("recipe", _lines(told.recipe.get("hash"))),
        ("runs in", [", ".join(name for name, said in subject.runtimes.items() if said == RIGHT)]),
        ("wrong in", [f"{name}: it {said}" for name, said in subject.runtimes.items() if said != RIGHT]),
    ]
    return [(what, [line for line in lines if line]) for what, lines in found if any(lines)]


def _lines(value: Any) -> list[str]:
    """What a recipe says, one line each and not many."""
    values: Iterable[Any] = value if isinstance(value, list) else [value] if value else []
    return [_plain(str(one)) for one in list(values)[:_MOST_LINES]]


def _plain(text: str) -> str:
    """``text`` as a terminal may print it: a recipe may be anybody's."""
    return "".join(c if c.isprintable() else " " for c in text[:_LONGEST_LINE])


def _data(choice: Mapping[str, Any]) -> list[str]:
    if "data" not in choice:
        return []
    samples = f"{choice['samples']} samples of " if "samples" in choice else ""
    return _lines(f"{samples}{choice['data']}")


def _proof(subject: Subject) -> list[str]:
    proof, told = subject.lineage.proof, subject.lineage
    if proof is None:
        return ["none: it was not checked"] if told.stage == "prune" else []
    if differences := _lines(proof.get("differences")):
        return [f"it differs from its recipe: {differences[0]}"]
    logits = ", logits equal to the model pruned in memory" if proof.get("logits_compared") else ", logits not compared"
    return _lines(f"{proof.get('tensors')} tensors equal{logits}")


def _healing(healing: Mapping[str, Any] | None) -> list[str]:
    """What was done and closed first, since lines are not many; then how each weight was solved."""
    return [line for lines in account(healing) for line in _lines(lines)] if healing else []
