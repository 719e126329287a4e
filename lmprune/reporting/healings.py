"""What a repair or a training says of itself in ``lmprune.json``, for pages and cards. Pure.

Nothing in it is trusted: a folder may be anybody's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Account(NamedTuple):
    """In lines: what was done, what it closed of the gap and on which text; and how each weight was solved."""

    lines: list[str]
    solved: list[str]


def account(healing: Mapping[str, Any]) -> Account:
    """Of a healing, and of the repair that came first."""
    settings = healing.get("settings")
    said = settings if isinstance(settings, Mapping) else healing
    parts = [str(said[key]) for key in ("method", "preset") if said.get(key)]
    parts += [f"{healing['steps']} steps"] if healing.get("steps") else []
    found = Account([", ".join(parts) or "yes"], [])
    first = healing.get("first")
    for each, start in ((first, "repaired first: "), (healing, "")):
        if isinstance(each, Mapping):
            found.lines.extend(_measured(each, start))
            found.solved.extend(_solved(each))
    return found


def _measured(healing: Mapping[str, Any], start: str) -> Iterator[str]:
    """What it closed, and on what it was fitted or trained."""
    losses, data, repair = (healing.get(key) for key in ("losses", "data", "repair"))
    if isinstance(losses, Mapping) and isinstance(closed := healing.get("gap_closed"), float):
        before, after = losses.get("pruned"), losses.get("healed")
        yield f"{start}held-out loss {_number(before)} -> {_number(after)}, {closed:.1%} of the gap closed"
    if not isinstance(data, Mapping):
        return
    if isinstance(repair, Mapping) and "tokens" in repair:
        yield f"fitted on {repair['tokens']} tokens of {data.get('source')}"
    settings = healing.get("settings")
    if healing.get("steps") and isinstance(settings, Mapping):
        blocks, length = data.get("train_blocks"), settings.get("max_length")
        yield f"trained on {blocks} blocks of at most {length} tokens of {data.get('source')}"


def _solved(healing: Mapping[str, Any]) -> Iterator[str]:
    """The ridges of a refit, and what the last layer's solve for the distribution gave."""
    repair = healing.get("repair")
    projections = repair.get("projections") if isinstance(repair, Mapping) else None
    for each in projections if isinstance(projections, list) else []:
        if isinstance(each, Mapping) and isinstance(each.get("ridge"), float):
            yield f"layer {each.get('layer')} {each.get('path')}: {each.get('form')}, ridge {each['ridge']:g}"
        elif isinstance(each, Mapping) and each.get("form") == "distribution":
            nats = f"{_number(each.get('before'))} -> {_number(each.get('after'))} nats a token from the whole model's"
            yield f"layer {each.get('layer')} {each.get('path')}: for the distribution, {nats}"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "?"
