"""Rotary bases in ``config.json`` where runtimes look for them that do not read it as transformers 5 writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lmprune.files import write_json
from lmprune.models.checkpoint import read_config
from lmprune.models.readings import RotaryBase
from lmprune.models.runtimes import rules_for


def name_rotary(folder: Path) -> None:
    """Add ``rope_theta`` and its like to a ``config.json`` that has them within ``rope_parameters`` alone.

    Only for families of which a runtime reads them there.

    transformers writes ``rope_parameters`` and reads either.
    """
    config = read_config(folder)
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else config
    readers = [rule.how for rule in rules_for(config, "mlx") if isinstance(rule.how, RotaryBase)]
    missing = {name: value for how in readers for name, value in how.named(inner).items() if name not in inner}
    if missing:
        named = {**inner, **missing}
        write_json(folder / "config.json", named if inner is config else {**config, "text_config": named})
