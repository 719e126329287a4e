"""Published healing settings, each with its source, and how options override them. Pure: no torch.

A preset says what its source says, by the names of the options. What the source leaves open are the methods' defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lmprune.errors import LmpruneError, UsageError
from lmprune.healing.facts import Facts
from lmprune.healing.methods import Found, Method, Teaching, find_method, method_options, option_names, users
from lmprune.healing.settings import HealSettings, Resolved
from lmprune.settings import check_choice


@dataclass(frozen=True)
class Preset:
    """Where it comes from, and what it says for a model.

    Attributes:
        methods: what is done, the best first, each with settings of its own. The first is taken that the model allows
            and that uses all options which the user gave.
        values: settings whatever is done, and remarks that a user should read.
    """

    source: str
    methods: Callable[[Facts], list[tuple[str, dict[str, Any]]]]
    values: Callable[[Facts], tuple[dict[str, Any], list[str]]] = lambda facts: ({}, [])


GROMOV_MODELS: dict[tuple[str, int, int, int], tuple[str, int, float, int]] = {
    ("llama", 4096, 32, 32000): ("Llama-2 7B", 2, 3e-4, 2048),
    ("llama", 5120, 40, 32000): ("Llama-2 13B", 64, 3e-4, 4096),
    ("llama", 8192, 80, 32000): ("Llama-2 70B", 8, 3e-5, 4096),
    ("qwen", 4096, 32, 151936): ("Qwen 7B", 64, 3e-4, 2048),
    ("qwen", 5120, 40, 151936): ("Qwen 14B", 64, 3e-4, 4096),
    ("mistral", 4096, 32, 32000): ("Mistral 7B", 4, 3e-6, 2048),
    ("phi", 2560, 32, 51200): ("Phi-2 2.7B", 64, 2e-4, 2048),
}
"""(model type, hidden size, layers, vocabulary) -> name, LoRA rank, peak learning rate, tokens per block."""

REVIEW_ROWS: tuple[tuple[float, int, float, int, int, int], ...] = (
    (0.2, 8, 1e-4, 4, 150, 10),
    (0.3, 8, 5e-5, 4, 250, 20),
    (0.4, 16, 5e-5, 4, 400, 30),
    (0.5, 16, 2e-5, 2, 500, 40),
)
"""Share pruned below which the row holds -> rank, learning rate, batch, steps, warm-up; of a range, its upper end."""


TAUGHT = {"hard": 0.0, "kl": 1.0, "states": 80.0, "lr": 2e-3, "batch_size": 4}
"""How a small model is taught: by the unpruned one's distribution and states alone."""


def _quick(facts: Facts) -> list[tuple[str, dict[str, Any]]]:
    """What closes most of the gap in equal time (benchmarks/README.md, Healing), where it can be done.

    The unpruned model, which a repair needs too, also teaches a small one: its distribution, and its states, which say
    of every layer at every token what it should hand on. So taught, larger rates and smaller batches do better than the
    next token bears. Of a model that was made for text at large that undid the repair. A large model's weights with
    their gradients and AdamW's means hardly fit anywhere: there LoRA trains. Where it cannot sit on experts, it sits on
    attention.
    """
    lora: list[tuple[str, dict[str, Any]]] = [("lora", {"targets": "all"}), ("lora", {"targets": "attention"})]
    alone = lora if facts.large else [("full", {}), *lora]
    if not facts.repairable:
        return alone
    text = {} if facts.large else {"fit_blocks": 64}  # solves take most of the time of a small model's repair
    if not facts.grown:
        alone.insert(0, ("full+distill", TAUGHT))
    return [*((f"refit+{name}", text | own) for name, own in alone), *alone]


def _only(method: str) -> Callable[[Facts], list[tuple[str, dict[str, Any]]]]:
    return lambda facts: [(method, {})]


def _gromov(facts: Facts) -> tuple[dict[str, Any], list[str]]:
    common = {
        "steps": 5000,
        "batch_size": 16,
        "warmup": 100,
        "schedule": "cosine",
        "dropout": 0.05,
        "targets": "ffn",
    }
    known = GROMOV_MODELS.get((facts.model_type, facts.hidden, facts.layers, facts.vocabulary))
    if known:
        name, rank, rate, length = known
        return common | {"rank": rank, "lr": rate, "max_length": length}, [f"the paper's row for {name}"]
    rest = {"rank": 64, "lr": 3e-4, "max_length": 2048}
    return common | rest, [
        "this model is not in the paper's table: its protocol starts at rank 64, and lowers it if healing hurts MMLU"
    ]


def _review(facts: Facts) -> tuple[dict[str, Any], list[str]]:
    row = next((row for row in REVIEW_ROWS if facts.share < row[0]), REVIEW_ROWS[-1])
    _, rank, rate, batch, steps, warmup = row
    notes = [f"the row for {facts.share:.0%} of the layers"]
    if not 0.1 <= facts.share <= 0.5:
        notes = [f"the table covers 10 to 50 % pruned, and this cut is {facts.share:.0%}: the nearest row"]
    values = {"rank": rank, "lr": rate, "batch_size": batch, "steps": steps, "warmup": warmup}
    return values, notes


def _reassessing(facts: Facts) -> tuple[dict[str, Any], list[str]]:
    values = {
        "last": 3,
        "head": "train",
        "lr": 1e-5,
        "batch_size": 64,
        "steps": 1600,
        "warmup": 100,
    }
    return values, [
        "their 2 epochs of alpaca-cleaned are 1600 steps of 64; give that data set with --data for their setting"
    ]


PRESETS: dict[str, Preset] = {
    "quick": Preset("lmprune: a repair, then the training that wins in equal time; rates are not yet swept", _quick),
    "gromov": Preset(
        "Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887, appendix A",
        _only("qlora"),
        _gromov,
    ),
    "review": Preset("Zhou, technical review of arXiv 2403.17887 (1 April 2026), table 13.2", _only("qlora"), _review),
    "reassessing": Preset(
        "Reassessing Layer Pruning in LLMs (ICLR 2026): lm_head and the last three layers",
        _only("last-layers"),
        _reassessing,
    ),
}


Check = Callable[[Method | Teaching], None]
"""Raises an `LmpruneError` where a method, or what is joined to it, does not fit the model."""


def resolve(settings: HealSettings, facts: Facts, fits: Check | None = None) -> tuple[Resolved, list[str]]:
    """Settle every choice: the user's, else the preset's, else the method's. Also what the user should be told.

    Args:
        fits: what tells whether the model allows a method that a preset would choose; None where no model is at hand.

    Raises:
        UsageError: the preset or the method does not exist, a value makes no sense, or the method does not use it.
        LmpruneError: by ``fits``, of the preset's first method, where none fits.
    """
    check_choice("--preset", settings.preset, tuple(PRESETS))
    preset, given = PRESETS[settings.preset], _given(settings)
    if settings.method is not None:
        ways: list[tuple[str, dict[str, Any]]] = [(settings.method, {})]
    else:
        ways = preset.methods(facts)
        using = [(name, own) for name, own in ways if given.keys() <= _used(find_method(name))] or ways[:1]
        ways = [(name, own) for name, own in using if _goes(find_method(name), settings, given)] or using[:1]
    refused: list[LmpruneError] = []
    for name, own in ways:
        values, notes = preset.values(facts)
        try:
            found = _settled(settings, find_method(name), facts, values | own, given, notes)
            for part in found.parts:
                if fits is not None and settings.method is None:
                    fits(part)
            if found.first is not None and not found.asked and settings.repair_first:
                instead = resolve(replace(settings, repair_first=False), facts, fits)[0]
                found = replace(found, alone=instead if instead.first is None else None)
        except LmpruneError as exc:
            refused.append(exc)
            continue
        targets = "".join(f", --targets {own[name]}" for name in own.keys() & {"targets"})
        why = [f"{found.method}{targets}, since {str(refused[0]).partition('. ')[0]}"] if refused else []
        return found, [*why, *notes]
    raise refused[0]


def _settled(
    settings: HealSettings,
    found: Found,
    facts: Facts,
    chosen: Mapping[str, Any],
    given: Mapping[str, Any],
    notes: list[str],
) -> Resolved:
    """One method with its options; ``notes`` are added to."""
    for name in (name for name in given if name not in _used(found)):
        flag = f"--{name.replace('_', '-')}"
        raise UsageError(
            f"{flag} {given[name]}: --method {found.name} does not use it. {' and '.join(users(name))} would"
        )
    values = {**found.way.defaults(facts), **chosen, **given}
    length = values["max_length"] = values.get("max_length", found.way.max_length)
    if facts.positions and length > facts.positions:
        if "max_length" in given:
            raise UsageError(f"--max-length {length}: this model reads {facts.positions} tokens at most")
        notes.append(f"blocks of {facts.positions} tokens, all that this model reads, instead of {length}")
        values["max_length"] = facts.positions
    way, lesson, first = (
        None if part is None else part(**{name: value for name, value in values.items() if name in option_names(part)})
        for part in (found.way, found.lesson, found.first)
    )
    asked = settings.method is not None or _for_repair(found, settings, given)
    return Resolved(settings.preset, found.name, way, lesson, settings.seed, first, asked).check()  # type: ignore[arg-type]


def _used(found: Found) -> set[str]:
    """The names of its options."""
    return set().union(*(option_names(way) for way in (found.way, found.lesson, found.first) if way is not None))


def _for_repair(found: Found, settings: HealSettings, given: Mapping[str, Any]) -> bool:
    """Whether an option is given that a repair alone uses."""
    return bool(settings.stream or given.keys() - set().union(*map(option_names, filter(None, found[1:3]))))


def _goes(found: Found, settings: HealSettings, given: Mapping[str, Any]) -> bool:
    """Whether a method goes with the options of the run; ``given`` are those of methods, which it has."""
    if found.first is None:
        return not settings.stream and (found.way.adapter or not settings.keep_adapter)
    if (
        settings.keep_adapter or settings.document_mask or not settings.repair_first
    ):  # documents are not kept apart in it
        return False
    return not settings.budget or _for_repair(found, settings, given)  # how long it takes is not known before


def _given(settings: HealSettings) -> dict[str, Any]:
    """The methods' options that the user gave a value."""
    values = {each.name: getattr(settings, each.name, None) for each in fields(method_options())}
    return {name: value for name, value in values.items() if value is not None}
