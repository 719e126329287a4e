"""From a settings class to command-line options: type, default and help stand on the field and nowhere else.

    @dataclass(frozen=True)
    class ProfileSettings:
        samples: int = option(1000, "Documents to read.")
        data: str | None = option(None, "Where the text comes from.", metavar="SRC")

    @with_options(ProfileSettings)
    def profile(model: Model, settings: ProfileSettings) -> None: ...

gives ``profile MODEL [--samples N] [--data SRC] [--json]`` and calls the function with a ``ProfileSettings``.
A parameter that the function declares itself takes the place of a field of the same name and also fills it.

What holds of every command is done here, before the command imports anything: ``--json``, the refusal of options that
have no effect, and files that must be there.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from lmprune.cli import show
from lmprune.errors import LmpruneError, UsageError, shown
from lmprune.files import as_path
from lmprune.settings import Useless as Useless
from lmprune.settings import flag_of
from lmprune.settings import given as given
from lmprune.settings import without as without

MODEL = "A recipe, a checkpoint, BASE+ADAPTER, org/model or org/model@revision, or the word demo."
"""What may stand in a model's place, everywhere."""
RECIPE = (
    "A recipe: a .yml file, the name of one that comes with lmprune, or a folder or Hub repository with a recipe.yml."
)
"""What may stand in a recipe's place, everywhere."""


def there(name: Any) -> None:
    """Make sure that what stands in a model's place can be one, before anything heavy is imported to open it."""
    from lmprune.models.cut import check_name

    for each in name if isinstance(name, (list, tuple)) else [name]:
        if each is not None:
            check_name(str(each))


def readable(path: str | Path | None) -> None:
    """Make sure that a file or a folder that is to be read is there."""
    if path is not None and not Path(path).expanduser().exists():
        raise LmpruneError(f"no file or folder {str(path)!r}")


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL), there]
Drop = Annotated[int | None, typer.Option(help="Number of layers to drop.", metavar="N")]
Fraction = Annotated[float | None, typer.Option(help="Share of the layers to drop.", metavar="F")]
Protect = Annotated[
    str | None, typer.Option(help="Layers that must stay, such as 0,1,-1; -1 is the last.", metavar="L,...")
]
Criterion = Annotated[
    str, typer.Option(help="How layers are chosen; see docs/choosing.md for what each does.", metavar="C")
]
Tasks = Annotated[
    str | None, typer.Option(help="Tasks or groups of the harness that every cut is evaluated on.", metavar="T,...")
]
Limit = Annotated[int | None, typer.Option(help="Documents of each task, at most; for trials.", metavar="N")]
IncludePath = Annotated[
    str | None, typer.Option("--include_path", help="A folder with tasks of your own.", metavar="FOLDER"), readable
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Convert weights that are there only as pickles (.bin).")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")]
NOT_JOINED = Useless(("bos",), without("pack"), "without --pack")
"""Of commands that join text only where they are told to."""
NOT_WALKED = Useless(("states", "abreast"), given("stream"), "--stream runs every layer once for all cuts")
"""Of commands that walk over many cuts."""
_JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON; see docs/json.md.")]

# --- options without effect -------------------------------------------------------------------------------------------

_typed: ContextVar[Mapping[str, str]] = ContextVar("typed")


def refuse(names: typing.Iterable[str], why: str) -> None:
    """Refuse those of the options that stand on the command line, with whatever value: they have no effect.

    Raises:
        UsageError: naming the first.
    """
    for name, flag in _typed.get({}).items():
        if name in set(names):
            raise UsageError(f"{flag} has no effect{'' if why.startswith('without') else ':'} {why}. Leave it out")


def names_of(*bundles: type) -> set[str]:
    """The options of settings classes."""
    return {field.name for bundle in bundles for field in dataclasses.fields(bundle)}


def _typed_options(context: typer.Context, values: Mapping[str, Any]) -> dict[str, str]:
    """Those that stand on the command line, and how each is spelled there."""
    found = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if parameter.param_type_name != "option" or source is None or source.name != "COMMANDLINE":
            continue
        off = parameter.secondary_opts if values.get(name) is False else ()
        found[name] = max((*off,) or parameter.opts, key=len)
    return found


# --- commands ---------------------------------------------------------------------------------------------------------


def with_options(
    *classes: type, useless: tuple[Useless, ...] = (), leave_out: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make an option of each field of ``classes`` where a parameter is annotated with one, and add ``--json``.

    Args:
        useless: what is refused, besides options whose field says ``needs``.
        leave_out: fields that mean nothing to this command, and keep their defaults.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
        bundles = {name: hints[name] for name in signature.parameters if hints.get(name) in classes}
        parameters = [
            parameter.replace(annotation=hints[name])
            for name, parameter in signature.parameters.items()
            if name not in bundles
        ]
        own = {parameter.name for parameter in parameters}
        checks = {name: check for name in own for check in getattr(hints[name], "__metadata__", ()) if callable(check)}
        rules = [*useless]
        for cls in bundles.values():
            fields = [
                field for field in dataclasses.fields(cls) if field.name not in own and field.name not in leave_out
            ]
            parameters += [_parameter(cls, field) for field in fields]
            rules += [_needed(field) for field in fields if field.metadata.get("needs")]
            rules += getattr(cls, "USELESS", ())
        parameters += [
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_JSON),
            inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        ]

        @functools.wraps(function)
        def call(*, as_json: bool, context: typer.Context, **values: Any) -> Any:
            typed = _typed_options(context, values)
            token = _typed.set(typed)
            try:
                with show.answering(str(context.info_name), as_json):
                    _check_values(typed, values)
                    for rule in rules:
                        if rule.when(values):
                            refuse(rule.options, rule.why)
                    settings = {name: _settings(cls, values) for name, cls in bundles.items()}
                    for name, check in checks.items():
                        check(values[name])
                    return function(**{name: values[name] for name in own}, **settings)
            finally:
                _typed.reset(token)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del call.__wrapped__
        return call

    return decorate


def _check_values(typed: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Refuse what nothing can be: numbers that nothing counts to, and names that no file has.

    Raises:
        UsageError: naming the first.
    """
    for name, value in values.items():
        if type(value) is int and abs(value) > sys.maxsize:
            raise UsageError(f"{typed.get(name, name)} {shown(value)}: give a smaller number")
        if isinstance(value, Path):
            as_path(value)


def _settings(cls: type, values: Mapping[str, Any]) -> Any:
    """One of ``cls`` with what was given, checked."""
    made = cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})
    if hasattr(made, "check"):
        made.check()
    return made


def _needed(field: dataclasses.Field[Any]) -> Useless:
    wanted = field.metadata["needs"]
    return Useless((field.name,), without(wanted), f"without {flag_of(wanted)}")


def _parameter(cls: type, field: dataclasses.Field[Any]) -> inspect.Parameter:
    hint: Any = typing.get_type_hints(cls)[field.name]
    meta = field.metadata
    names = [meta["flag"]] if "flag" in meta else []
    panel = meta.get("panel") or getattr(cls, "PANEL", None)
    annotation = Annotated[
        hint, typer.Option(*names, help=meta["help"], metavar=meta.get("metavar"), rich_help_panel=panel)
    ]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
