"""How a stage's settings are declared: a frozen dataclass whose fields carry their own help. Pure.

The command line makes its options from these fields and the Python API takes the same object, so a type, a default
and a help text each stand in one place. What several stages can be told stands here, so that it is called the same,
takes the same values and is refused in the same words everywhere: a device, a type, a seed, few bits.

An option that takes one value has a singular name (``--criterion``, ``--fraction``), one that takes several with commas
a plural one (``--criteria``, ``--fractions``, ``--quantizations``).
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from lmprune.errors import UsageError, nearest, shown

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What ``--dtype`` may say where a model is run as it is."""
DEVICES = ("auto", "cpu", "cuda", "cuda:1", "mps")
"""What ``--device`` may say; of GPUs each by its number."""
Quantization = Literal["nf4", "int8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("nf4", "int8")
FEW_BITS = "Load the weights in few bits by bitsandbytes: nf4 or int8."
ALSO_FEW_BITS = "Also measure each model with its weights in few bits: nf4, int8 or both (bitsandbytes)."
SEEDS = 1 << 32


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    flag: str | None = None,
    needs: str | None = None,
    panel: str | None = None,
) -> Any:
    """A dataclass field with a default and a help text.

    Args:
        flag: the option's spelling, where it is not that of the name.
        needs: the option without which this one has no effect, and is refused.
        panel: the heading of the help under which it stands, where it is not that of its class.
    """
    said = {"help": help, "metavar": metavar, "flag": flag, "needs": needs, "panel": panel}
    metadata = {name: value for name, value in said.items() if value is not None or name == "metavar"}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(name: str, metadata: Mapping[str, Any] | None = None) -> str:
    """How an option is typed.

    >>> flag_of("max_length"), flag_of("pack", {"flag": "--pack/--no-pack"})
    ('--max-length', '--pack')
    """
    return str((metadata or {}).get("flag") or f"--{name.replace('_', '-')}").partition("/")[0]


class Useless(NamedTuple):
    """Options that have no effect where ``when`` says so of all values, whether or not they were given another value
    than they have by themselves; ``why`` follows "has no effect: "."""

    options: tuple[str, ...]
    when: Callable[[Mapping[str, Any]], Any]
    why: str


def without(name: str) -> Callable[[Mapping[str, Any]], bool]:
    """Where an option is not given, or is 0, or off."""
    return lambda given: not given[name]


def given(name: str) -> Callable[[Mapping[str, Any]], bool]:
    """Where an option is given, and not 0 or off."""
    return lambda values: bool(values[name])


# --- what several stages can be told ----------------------------------------------------------------------------------


def device_option(help: str = "cpu, cuda, cuda:1, mps, or auto: the fastest there is.") -> Any:
    """Where a stage computes."""
    return option("auto", help, metavar="D")


AS_MEASURED = "float32, bfloat16, float16, or auto: the checkpoint's, or float32 on a CPU that multiplies no such."
"""What ``--dtype`` means where a model is measured and not timed."""


def dtype_option(help: str = "float32, bfloat16, float16, or auto: that of the checkpoint.") -> Any:
    """In which type a stage computes."""
    return option("auto", help, metavar="TYPE")


def seed_option(help: str, default: int = 0) -> Any:
    """What a stage draws."""
    return option(default, help, metavar="S")


_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def seconds_of(budget: str) -> float:
    """What ``--budget`` says of time.

    >>> seconds_of("5m"), seconds_of("1h30m"), seconds_of("90")
    (300.0, 5400.0, 90.0)

    Raises:
        UsageError: it is no time.
    """
    found = _TIME.fullmatch(budget.strip().lower())
    seconds = sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1))) if found else 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--budget {budget[:40]!r} is no time. Give one such as 90s, 5m or 1h30m")
    return seconds


def check_choice(flag: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a word that is none of ``known``.

    Raises:
        UsageError: naming the nearest.
    """
    if value not in known:
        raise UsageError(f"{flag} {value!r} does not exist{nearest(str(value), known)}. Choose from {', '.join(known)}")


def check_device(name: str) -> None:
    """Refuse what is no device's name, wherever it may be.

    Raises:
        UsageError: naming it.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", str(name)):
        raise UsageError(f"--device {name!r} is no device{nearest(str(name), DEVICES)}. Give {', '.join(DEVICES)}")


def words_of(option: str, text: str | None) -> tuple[str, ...]:
    """The words of a comma-separated option, none of them empty or twice; none for None.

    Raises:
        UsageError: one is.
    """
    words = tuple(word.strip() for word in text.split(",")) if text is not None else ()
    for word, count in Counter(words).items():
        if not word or count > 1:
            what = f"{shown(word)} is named twice" if word else "a name is empty"
            raise UsageError(f"{option} {shown(text)}: {what}")
    return words


def several_quantizations(value: str | None) -> tuple[Quantization, ...]:
    """What ``--quantizations`` names, in one order.

    Raises:
        UsageError: one does not exist, or stands twice.
    """
    words = words_of("--quantizations", value)
    for word in words:
        if word in DTYPES or word == "bf16":
            raise UsageError(f"--quantizations {word}: the model's own type is always measured. Give nf4, int8 or both")
        check_choice("--quantizations", word, QUANTIZATIONS)
    return tuple(kind for kind in QUANTIZATIONS if kind in words)


def check_shared(settings: Any, *, dtypes: tuple[str, ...] = DTYPES) -> None:
    """Make sure of the values of those of the shared options that ``settings`` has.

    Raises:
        UsageError: naming the first that makes no sense.
    """
    for name in (each.name for each in dataclasses.fields(settings)):
        value = getattr(settings, name)
        if name == "device":
            check_device(value)
        elif name == "dtype":
            check_choice("--dtype", value, dtypes)
        elif name == "quantization" and value is not None:
            check_choice("--quantization", value, QUANTIZATIONS)
        elif name == "quantizations":
            several_quantizations(value)
        elif name == "seed" and not 0 <= value < SEEDS:
            raise UsageError(f"--seed {value}: give a number from 0 to {SEEDS - 1}")
