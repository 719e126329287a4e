"""For the API pages: the help of a settings field stands in its `option`, so that is the field's docstring."""

from __future__ import annotations

import ast
from typing import Any

from griffe import Attribute, Docstring, Expr, ExprCall, Extension


class Options(Extension):
    """Reads ``name: type = option(default, "help")``."""

    def on_attribute_instance(self, *, attr: Attribute, **kwargs: Any) -> None:
        """Give the attribute its help as docstring, and its default as value."""
        made = attr.value
        if not isinstance(made, ExprCall) or not str(made.function).endswith("option") or attr.docstring:
            return
        given = [argument for argument in made.arguments if not str(argument).startswith(("metavar=", "flag="))]
        words = [text for argument in given if isinstance(text := _constant(argument), str)]
        if helped := [text for text in words if text.endswith((".", ")")) and " " in text]:
            attr.docstring = Docstring(helped[-1], parent=attr)
        attr.value = given[0] if len(given) > 1 else None


def _constant(value: str | Expr) -> Any:
    try:
        return ast.literal_eval(str(value))
    except (ValueError, SyntaxError):
        return None
