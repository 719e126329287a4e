"""From a settings class to command-line options: type, default and help stand on the field and nowhere else.

    @dataclass(frozen=True)
    class ProfileSettings:
        samples: int = option(1000, "Documents to read.")
        data: str | None = option(None, "Where the text comes from.", metavar="SRC")

    @with_options(ProfileSettings)
    def profile(model: Annotated[str, ...], settings: ProfileSettings) -> None: ...

gives ``profile MODEL [--samples N] [--data SRC]`` and calls the function with a ``ProfileSettings``.
A parameter that the function declares itself takes the place of a field of the same name and also fills it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

__all__ = ["MODEL", "AllowPickle", "TrustRemoteCode", "with_options"]

MODEL = "A recipe, a checkpoint, BASE+ADAPTER, org/model or org/model@revision, or the word demo."
"""What may stand in a model's place, everywhere."""

AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Convert weights that are there only as pickles (.bin).")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")]


def with_options(*classes: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Expand parameters whose annotation is one of ``classes`` into an option for each of its fields."""

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
        for cls in bundles.values():
            parameters += [_parameter(cls, field) for field in dataclasses.fields(cls) if field.name not in own]

        @functools.wraps(function)
        def call(**given: Any) -> Any:
            settings = {
                name: cls(**{field.name: given[field.name] for field in dataclasses.fields(cls)})
                for name, cls in bundles.items()
            }
            return function(**{name: given[name] for name in own}, **settings)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del call.__wrapped__
        return call

    return decorate


def _parameter(cls: type, field: dataclasses.Field[Any]) -> inspect.Parameter:
    hint: Any = typing.get_type_hints(cls)[field.name]
    meta = field.metadata
    names = [meta["flag"]] if "flag" in meta else []
    annotation = Annotated[hint, typer.Option(*names, help=meta["help"], metavar=meta.get("metavar"))]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
