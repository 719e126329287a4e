"""The healing methods, a file each.

A method is one file with a class of the kinds in `base` and one line in `METHODS`; other packages add theirs by an
entry point in the group ``lmprune.methods`` that names such a class. Its name and its options stand nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, fields, make_dataclass
from typing import Any, NamedTuple, get_type_hints

from lmprune.errors import HostError, UsageError
from lmprune.healing.methods.base import Method, Options, Patching, Repairing, Teaching, Training
from lmprune.healing.methods.distill import Distill
from lmprune.healing.methods.full import Full
from lmprune.healing.methods.ghost import Ghost
from lmprune.healing.methods.junction import Junction
from lmprune.healing.methods.laco import Laco
from lmprune.healing.methods.last_layers import LastLayers
from lmprune.healing.methods.linear_patch import LinearPatch
from lmprune.healing.methods.lora import Lora
from lmprune.healing.methods.qlora import Qlora
from lmprune.healing.methods.refit import Refit
from lmprune.healing.methods.replaceme import ReplaceMe
from lmprune.healing.methods.scalar import Scalar
from lmprune.healing.methods.streamline import Streamline
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
        "linear-patch": LinearPatch,
        "ghost": Ghost,
        "laco": Laco,
        "streamline": Streamline,
    },
    needs=("check", "one_process", "needs_base"),
)


class Found(NamedTuple):
    """What a user's ``--method`` names.

    Attributes:
        name: its words in the order in which they are done: ``refit+lora``, ``full+distill``.
        way: the method; the one that trains, where a repair comes first.
        lesson: what is joined to it.
        first: the repair that comes first.
    """

    name: str
    way: type[Method]
    lesson: type[Teaching] | None = None
    first: type[Repairing] | None = None


def find_method(words: str) -> Found:
    """A method, with what is joined to it.

    >>> find_method("distill").name, find_method("distill+full").name, find_method("lora+refit").name
    ('lora+distill', 'full+distill', 'refit+lora')

    Raises:
        UsageError: one of the words does not exist, or they cannot be joined.
        HostError: it is another package's, and cannot be loaded, or an option of it bears the name of another.
    """
    found, declared = {word: METHODS.find(word) for word in words.split("+")}, _options()
    for word, way in found.items():
        for each in fields(way):
            if declared[each.name] is not _declaring(way, each.name):
                raise HostError(
                    f"--method {word}: another method has an option --{each.name.replace('_', '-')} already"
                )
    repairs, trainings, lessons = ([w for w in found if issubclass(found[w], kind)] for kind in _KINDS)
    if lessons and not trainings:
        trainings = [found[lessons[0]].alone]  # type: ignore[attr-defined]
    if len(found) < words.count("+") + 1 or max(map(len, (repairs, trainings, lessons))) > 1:
        raise UsageError(
            f"--method {words!r}: join one of {_names(Training)} with {_names(Teaching, ' or ')}, as in full+distill, "
            f"or put one of {_names(Repairing)} before it, as in refit+lora"
        )
    if repairs and trainings and issubclass(found[repairs[0]], Patching):
        raise UsageError(
            f"--method {words!r}: {repairs[0]} makes a recipe with a patch. Train that in a call of its own, as "
            "`lmprune heal PATCHED OUT --method lora --keep-adapter`"
        )
    order = [*repairs, *trainings, *lessons]
    if repairs and not trainings:
        return Found(order[0], found[repairs[0]])  # type: ignore[arg-type]
    return Found(
        "+".join(order),
        METHODS.find(trainings[0]),  # type: ignore[arg-type]
        found[lessons[0]] if lessons else None,  # type: ignore[arg-type]
        found[repairs[0]] if repairs else None,  # type: ignore[arg-type]
    )


_KINDS = (Repairing, Training, Teaching)


def _names(kind: type[Options], comma: str = ", ") -> str:
    return comma.join(name for name, way in _known() if issubclass(way, kind))


def method_options() -> type:
    """A dataclass of the options of all methods, each once; None, their default, leaves a value to the preset."""
    declared = [(name, get_type_hints(way)[name] | None, _left_open(way, name)) for name, way in _options().items()]
    return make_dataclass("MethodOptions", declared, frozen=True)


def described() -> str:
    """The help of ``--method``."""
    return (
        f"What trains: {_names(Training)}; or {_names(Teaching)}, alone or joined as in full+distill; or what is "
        f"solved: {_names(Repairing)}, alone or before what trains, as in refit+full."
    )


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
    return field(
        default=None, metadata={**about, "help": said, "panel": _PANELS.get(_declaring(way, option), "Method")}
    )


_PANELS: dict[type[Options], str] = {Method: "Text", Training: "What trains", Repairing: "What is solved"}
"""Headings of the help for options that several methods share."""
