"""The only file that imports mergekit: which models it can merge by itself, and running it on a recipe."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lmprune.errors import HostError, ModelError, shown


@cache
def known_architectures() -> frozenset[str]:
    """Class names that mergekit describes by a JSON file of its own; the others it has to guess.

    Read from the package's data without importing it, which would take seconds.
    """
    spec = importlib.util.find_spec("mergekit")
    if spec is None or not spec.submodule_search_locations:
        raise HostError("mergekit is not installed. Install it with: pip install mergekit")
    names: set[str] = set()
    for file in Path(spec.submodule_search_locations[0], "_data", "architectures").glob("*.json"):
        names.update(json.loads(file.read_text(encoding="utf-8")).get("architectures", ()))
    return frozenset(names)


def needs_base_folder(config: Mapping[str, Any], changed: Mapping[str, Any]) -> bool:
    """Whether plain mergekit would write a wrong config: it sets only the layer count, and not even that everywhere.

    Args:
        config: the base model's ``config.json``.
        changed: the fields that pruning changes, by dotted name.
    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ModelError(f"config.json: architectures is {shown(architectures)} and no list of names. Mend it")
    known = bool(architectures) and all(name in known_architectures() for name in architectures)
    return not known or len(changed) > 1


def run_mergekit(merge: Mapping[str, Any], out: Path, *, shard_bytes: int | None = None) -> None:
    """Run mergekit's API on the merge and write ``out``, without its model card, which needs the network.

    Raises:
        HostError: mergekit failed; its reason is given.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options: dict[str, Any] = {"copy_tokenizer": True, "write_model_card": False, "quiet": True}
    if shard_bytes:
        options["out_shard_size"] = shard_bytes
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # mergekit empties the slices of the configuration it is given, so each run gets its own.
        run_merge(MergeConfiguration.model_validate(dict(merge)), str(out), MergeOptions(**options))
    except Exception as exc:  # the host raises bare RuntimeError, KeyError, pydantic and huggingface_hub errors
        line = " ".join(str(exc).split())
        raise HostError(f"mergekit could not write this model: {type(exc).__name__}: {line[:400]}") from exc
    finally:
        logging.disable(level)
