"""The healing methods, a file each.

A method is one file with a class of the kinds in `base` and one line in `METHODS`; other packages add theirs by an
entry point in the group ``lmprune.methods`` that names such a class. Its name and its options stand nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, fields, make_dataclass
from typing import Any, get_type_hints

from lmprune.errors import HostError, UsageError
from lmprune.healing.methods.base import Method, Options, Repairing, Teaching, Training
from lmprune.healing.methods.distill import Distill
from lmprune.healing.methods.full import Full
from lmprune.healing.methods.junction import Junction
from lmprune.healing.methods.last_layers import LastLayers
from lmprune.healing.methods.lora import Lora
from lmprune.healing.methods.qlora import Qlora
from lmprune.healing.methods.refit import Refit
from lmprune.healing.methods.replaceme import ReplaceMe
from lmprune.healing.methods.scalar import Scalar
from lmprune.plugins import Table

__all__ = ["METHODS", "Method", "Repairing", "Teaching", "Training", "find_method", "method_options"]

METHODS: Table[type[Options]] = Table(
    "--method",
    "lmprune.methods",
    {
        "lora": Lora,
        "qlora": Qlora,
        "last-layers": LastLayers,
        "full": Full,
        "junction": Junction,
        "distill": Distill,
        "refit": Refit,
        "replaceme": ReplaceMe,
        "scalar": Scalar,
    },
    needs=("check", "one_process", "needs_base"),
)


def find_method(words: str) -> tuple[str, type[Method], type[Teaching] | None]:
    """A method, what is joined to it, and the two as they are written: ``full+distill``.

    >>> find_method("distill")[0], find_method("distill+full")[0], find_method("qlora")[0]
    ('lora+distill', 'full+distill', 'qlora')

    Raises:
        UsageError: one of the words does not exist, or they cannot be joined.
        HostError: it is another package's, and cannot be loaded, or an option of it bears the name of another.
    """
    found = {word: METHODS.find(word) for word in words.split("+")}
    for word, way in found.items():
        for each in fields(way):
            if _options()[each.name] is not _declaring(way, each.name):
                raise HostError(
                    f"--method {word}: another method has an option --{each.name.replace('_', '-')} already"
                )
    methods = {word: way for word, way in found.items() if issubclass(way, Method)}
    teaching = {word: way for word, way in found.items() if issubclass(way, Teaching)}
    if not methods and len(teaching) == 1:
        alone = next(iter(teaching.values())).alone
        methods = {alone: METHODS[alone]}  # type: ignore[dict-item]
    trains = all(issubclass(way, Training) for way in methods.values())
    if len(methods) != 1 or len(teaching) > 1 or (teaching and not trains) or len(found) < words.count("+") + 1:
        joined = ", ".join(name for name, way in _known() if issubclass(way, Training))
        others = " or ".join(name for name, way in _known() if issubclass(way, Teaching))
        raise UsageError(f"--method {words!r}: join one of {joined} with {others}, as in full+distill")
    (name, way), lesson = methods.popitem(), next(iter(teaching.items()), None)
    if lesson is None:
        return name, way, None
    return f"{name}+{lesson[0]}", way, lesson[1]


def method_options() -> type:
    """A dataclass of the options of all methods, each once; None, their default, leaves a value to the preset."""
    declared = [(name, get_type_hints(way)[name] | None, _left_open(way, name)) for name, way in _options().items()]
    return make_dataclass("MethodOptions", declared, frozen=True)


def described() -> str:
    """The help of ``--method``."""
    alone = [name for name, way in _known() if issubclass(way, Method)]
    joined = [name for name, way in _known() if issubclass(way, Teaching)]
    return f"What trains: {', '.join(alone)}; or {', '.join(joined)}, alone or joined as in full+distill."


def users(option: str) -> list[str]:
    """The methods that have an option of that name."""
    return [name for name, way in _known() if option in option_names(way)]


def option_names(way: type[Options]) -> set[str]:
    """The options of a method."""
    return {each.name for each in fields(way)}


def _known() -> Iterator[tuple[str, type[Options]]]:
    """All that can be loaded; what cannot says so when it is asked for."""
    for name in METHODS:
        try:
            yield name, METHODS[name]
        except HostError:
            continue


def _options() -> dict[str, type[Options]]:
    """By each option, the class that declares it; of two methods with one name for two things, the first counts."""
    found: dict[str, type[Options]] = {}
    for _, way in _known():
        for each in fields(way):
            found.setdefault(each.name, _declaring(way, each.name))
    return found


def _declaring(way: type[Options], option: str) -> type[Options]:
    """The class that declares an option of ``way``; those between the two may have changed its default."""
    return [cls for cls in way.__mro__ if option in getattr(cls, "__dataclass_fields__", {})][-1]


def _left_open(way: type[Options], option: str) -> Any:
    about = next(each.metadata for each in fields(way) if each.name == option)
    said = about["help"] if "Default:" in about["help"] else f"{about['help']} Default: the preset's."
    return field(default=None, metadata={**about, "help": said})
