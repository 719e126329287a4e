"""The recipe: which layers of which model are kept, as YAML that plain mergekit runs. Pure: no torch, no models.

A recipe is a mergekit ``passthrough`` of slices of one model. What lmprune knows beyond that (the base model as its
user calls it, its fingerprint, where the choice came from) stands under the key ``lmprune``, which mergekit keeps
and ignores. Recipes without that key, written by hand or by others, are read as well.

Cuts of other kinds than whole layers stand under ``lmprune: parts:``, by kind, with the uncut model's layer numbers:

- ``sublayers: {attention: [3], mlp: [5, 6]}``; to mergekit the slices say the same by ``parameters: {scale: [{filter:
  o_proj, value: 0.0}, {value: 1.0}]}``, which zeroes what such a sublayer adds;
- ``width: {ffn: N, hidden: K, groups: G, file: F.width.safetensors, sha256: HEX}`` with one of the sizes at least,
  where the file beside the recipe (`lmprune.cuts.beside`) says what stays, as `lmprune.cuts.width` tells. mergekit
  cannot narrow a model, and refuses ``merge_method: lmprune``.

Whatever of these a version cannot carry out it refuses by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import normpath
from pathlib import Path
from typing import Any

import yaml

from lmprune.cuts.beside import parts_in
from lmprune.cuts.compensation import scales_of
from lmprune.cuts.kinds import read_parts
from lmprune.cuts.plan import MOST_LAYERS, Part, Plan, is_stock
from lmprune.errors import PlanError, RecipeError, check_keys, nearest, shown
from lmprune.files import read_yaml, write_text

SIZE_LIMIT = 1 << 20
SUFFIXES = (".yml", ".yaml")
"""How the name of a recipe's file ends, by which every command knows it."""
DTYPES = ("float32", "float16", "bfloat16", "float64")
_TOP_KEYS = (
    "slices",
    "merge_method",
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "chat_template",
    "lmprune",
)
_NOT_CARRIED_OUT = {"tokenizer_source": "another tokenizer", "chat_template": "another chat template"}
_OTHER_MERGES = ("models", "modules", "parameters", "tokenizer")
_OWN_KEYS = ("version", "model", "revision", "fingerprint", "layers", "dropped", "criterion", "choice", "parts")
_METHOD, _OWN_METHOD = "passthrough", "lmprune"
_VERSION = 1


@dataclass(frozen=True)
class Recipe:
    """One base model and the ranges of layers to keep.

    Attributes:
        model: the base as its user calls it: ``demo``, a Hub id or a folder.
        ranges: half-open ranges of kept layers, in order.
        layers: the base model's number of layers; None in a recipe that does not say.
        revision: commit of the base on the Hub.
        fingerprint: `Checkpoint.fingerprint` of the base's weights.
        dtype: the type to write, as torch spells it; None keeps the base's.
        criterion: how the layers were chosen.
        choice: what the choice rests on (profile, distance, certainty), as plain data.
        base_folder: folder with a repaired config that mergekit needs for this architecture.
        parts: what is cut besides whole layers.
    """

    model: str
    ranges: tuple[tuple[int, int], ...]
    layers: int | None = None
    revision: str | None = None
    fingerprint: str | None = None
    dtype: str | None = None
    criterion: str | None = None
    choice: Mapping[str, Any] = field(default_factory=dict)
    base_folder: str | None = None
    parts: tuple[Part, ...] = ()

    @classmethod
    def of(cls, model: str, plan: Plan, **more: Any) -> Recipe:
        """The recipe of ``plan`` on the model that a user calls ``model``; ``more`` are the other attributes."""
        return cls(model, tuple(plan.slices()), plan.layers, parts=plan.parts, **more)

    @property
    def plan(self) -> Plan:
        """The plan, for a recipe that says how many layers its model has."""
        if self.layers is None:
            raise RecipeError("this recipe does not say how many layers its model has; read the model's config first")
        return self.plan_for(self.layers)

    def plan_for(self, layers: int) -> Plan:
        """The plan on a model of ``layers`` layers.

        Raises:
            RecipeError: the recipe was made for a model of another depth, or its ranges do not fit.
        """
        if self.layers is not None and self.layers != layers:
            raise RecipeError(
                f"this recipe is for a model of {self.layers} layers ({self.model}), but the model has {layers}. "
                "Make a recipe for this model with `lmprune recipe`"
            )
        try:
            return replace(Plan.from_slices(layers, self.ranges), parts=self.parts)
        except PlanError as exc:
            raise RecipeError(f"this recipe does not fit a model of {layers} layers: {exc}") from exc

    @cached_property
    def hash(self) -> str:
        """A hash of what the recipe does: base model, kept ranges and parts, not comments or provenance."""
        does: list[Any] = [self.fingerprint or self.model, self.ranges, self.dtype]
        # Only where there are any, so that recipes of whole layers keep the hash that results name.
        text = json.dumps([*does, _does(self.parts)] if self.parts else does)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def merge(self, model_path: str | None = None) -> dict[str, Any]:
        """The mergekit part as plain data; ``model_path`` replaces the base's name, for mergekit to open."""
        model = model_path or self.model
        merge: dict[str, Any] = {
            "slices": [{"sources": [{"model": model, **source}]} for source in self._sources()],
            "merge_method": _METHOD if all(part.mergekit for part in self.parts) else _OWN_METHOD,
        }
        if self.base_folder:
            merge["base_model"] = self.base_folder
        if self.dtype:
            merge["dtype"] = self.dtype
        return merge

    def _sources(self) -> list[dict[str, Any]]:
        """The ranges as mergekit wants them, in pieces where parts scale tensors of neighbours differently."""
        found: list[dict[str, Any]] = []
        for first, stop in self.ranges:
            for layer in range(first, stop):
                at = {"layer_range": [layer, layer + 1]} | self._parameters(layer)
                if layer > first and found[-1].get("parameters") == at.get("parameters"):
                    found[-1]["layer_range"][1] = layer + 1
                else:
                    found.append(at)
        return found

    def _parameters(self, layer: int) -> dict[str, Any]:
        """Those of mergekit for a slice of that layer."""
        ends = {"first": layer == self.ranges[0][0], "last": layer == self.ranges[-1][1] - 1}
        scales = scales_of(self.parts, layer, **ends)
        return {"parameters": {"scale": scales}} if scales else {}

    def to_yaml(self, model_path: str | None = None, *, mergekit: bool = True) -> str:
        """The whole file, with a header for people; ``mergekit`` says whether that is known to write it rightly."""
        own: dict[str, Any] = {"version": _VERSION, "model": self.model}
        if self.revision:
            own["revision"] = self.revision
        if self.fingerprint:
            own["fingerprint"] = self.fingerprint
        if self.layers is not None:
            own |= {"layers": self.layers, "dropped": list(self.plan.dropped)}
        if self.criterion:
            own["criterion"] = self.criterion
        if self.choice:
            own["choice"] = dict(self.choice)
        if self.parts:
            own["parts"] = {part.kind: part.to_data() for part in self.parts}
        what = self.plan.describe() if self.layers is not None else f"keeps layers {list(self.ranges)}"
        chosen = f" (criterion: {self.criterion})" if self.criterion else ""
        mergekit = mergekit and all(part.mergekit for part in self.parts)
        header = [
            f"A layer-pruning recipe for {' '.join(self.model.split())}: {what}{chosen}.",
            "Layers are counted from 0; a layer_range [a, b] keeps a .. b-1.",
            "Write the smaller model with: lmprune prune RECIPE OUT" + "   or: mergekit-yaml RECIPE OUT" * mergekit
            if all(map(is_stock, self.parts))
            else "No checkpoint can hold it. Use it with: lm_eval --model lmprune --model_args pretrained=M,recipe=R",
        ]
        if not all(part.mergekit for part in self.parts):
            header.append("mergekit cannot carry it out, and refuses its merge_method.")
        if self.base_folder:
            header += [
                "base_model holds the repaired config that mergekit needs for this architecture. On another machine it",
                "is made by: lmprune recipe RECIPE --rebase -o RECIPE",
            ]
        data = self.merge(model_path) | {"lmprune": own}
        return "".join(f"# {line}\n" for line in header) + yaml.dump(
            data, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
        )

    def write(self, path: Path, model_path: str | None = None, *, mergekit: bool = True) -> Recipe:
        """Write the file, and the files that it needs beside it: first those, so that a kill leaves the old recipe.

        Returns:
            The recipe as it lies there.

        Raises:
            RecipeError: a file beside it is missing, or another.
            OutputError: it cannot be written.
        """
        written = replace(self, parts=parts_in(self.parts, path.parent))
        write_text(path, written.to_yaml(model_path, mergekit=mergekit))
        return written

    @classmethod
    def read(cls, path: Path | str) -> Recipe:
        """Read a recipe file.

        Raises:
            RecipeError: the file is missing, is not YAML, or is not a passthrough of one model.
        """
        path = Path(path)
        try:
            data = read_yaml(path, RecipeError, "Give a recipe's .yml file", limit=SIZE_LIMIT)
        except FileNotFoundError as exc:
            raise RecipeError(f"no recipe at {path}. Write one with `lmprune recipe MODEL -o {path}`") from exc
        return cls.from_data(data, str(path), path.absolute().parent)

    @classmethod
    def from_data(cls, data: Any, where: str = "recipe", folder: Path | None = None) -> Recipe:
        """Read a recipe, which lies in ``folder``, from parsed YAML, strictly; files beside it are not opened."""
        data = _checked(data, where)
        models, ranges, scaled = _read_slices(data.get("slices"), where)
        own = _own_of(data, where)
        # In BASE@REVISION+ADAPTER the revision belongs to the name.
        name, _, revision = (models[0], "", "") if "+" in models[0] else models[0].partition("@")
        recipe = cls(
            model=own.get("model") or name,
            ranges=_joined(ranges),
            layers=own.get("layers"),
            revision=own.get("revision") or revision or None,
            fingerprint=own.get("fingerprint"),
            dtype=_dtype(data, where),
            criterion=own.get("criterion"),
            choice=own.get("choice") or {},
            base_folder=_text(data, "base_model", where),
            parts=read_parts(own.get("parts"), own.get("layers"), f"{where}: lmprune", folder),
        )
        recipe._require_agreement(data["merge_method"], own, where)
        recipe._require_parameters(scaled, where)
        return recipe

    def _require_parameters(self, given: Mapping[tuple[int, int], Any], where: str) -> None:
        """What the slices scale must be what the parts say, layer by layer, however the slices are divided."""
        found = {layer: parameters for pair, parameters in given.items() for layer in range(*pair)}
        for layer in (layer for first, stop in self.ranges for layer in range(first, stop)):
            wanted = self._parameters(layer).get("parameters")
            if wanted != found.get(layer):
                if not self.parts:
                    raise RecipeError(
                        f"{where}: the parameters of the slice of layer {layer} ask for more than a choice of layers, "
                        "which lmprune cannot do. Remove them"
                    )
                raise RecipeError(
                    f"{where}: by lmprune.parts the slice of layer {layer} should have the parameters {shown(wanted)}, "
                    f"not {shown(found.get(layer))}. Write the recipe again with `lmprune recipe`"
                )

    def _require_agreement(self, method: str, own: Mapping[str, Any], where: str) -> None:
        """What the file says twice must be the same."""
        if method != self.merge()["merge_method"]:
            raise RecipeError(
                f"{where}: merge_method is {method!r}, and by its parts it should be {self.merge()['merge_method']!r}"
            )
        if self.layers is None:
            try:
                Plan.from_slices(max(stop for _, stop in self.ranges) + 1, self.ranges)
            except PlanError as exc:
                raise RecipeError(f"{where}: {exc}") from exc
        elif list(self.plan.dropped) != own.get("dropped", list(self.plan.dropped)):
            raise RecipeError(
                f"{where}: lmprune.dropped says {shown(own['dropped'])}, but the slices drop "
                f"{list(self.plan.dropped)}. Change both, or remove the key 'lmprune'"
            )


def _does(parts: Sequence[Part]) -> dict[str, Any]:
    """What the parts do: of a file beside the recipe what it holds, and not what it is called."""
    said = {part.kind: part.to_data() for part in parts}
    for part in parts:
        if part.beside is not None:
            said[part.kind] = {key: value for key, value in said[part.kind].items() if key != "file"}
    return said


def _checked(data: Any, where: str) -> dict[str, Any]:
    """``data`` as the mapping of a merge that lmprune can do."""
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a YAML mapping with the key 'slices'")
    for key in _OTHER_MERGES:
        if data.get(key):
            raise RecipeError(
                f"{where}: the key {key!r} asks for more than a choice of layers, which lmprune cannot do"
            )
    check_keys([k for k in data if k not in _OTHER_MERGES], _TOP_KEYS, where, RecipeError)
    for key, what in _NOT_CARRIED_OUT.items():
        if data.get(key) is not None:
            raise RecipeError(f"{where}: {key} asks for {what}, which lmprune does not write. Remove it")
    if data.get("merge_method") not in (_METHOD, _OWN_METHOD):
        raise RecipeError(
            f"{where}: merge_method is {shown(data.get('merge_method'))}; a recipe that only drops layers has "
            "merge_method: passthrough"
        )
    return data


def _own_of(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What stands under ``lmprune:``, each value of the type that it should be."""
    own = data.get("lmprune") if data.get("lmprune") is not None else {}
    if not isinstance(own, dict):
        raise RecipeError(f"{where}: 'lmprune' is not a mapping")
    check_keys(own, _OWN_KEYS, f"{where}: lmprune", RecipeError)
    if own.get("version", _VERSION) != _VERSION:
        raise RecipeError(
            f"{where}: written for version {shown(own['version'])} of the format; this lmprune reads {_VERSION}"
        )
    for key, kind in (("model", str), ("revision", str), ("fingerprint", str), ("layers", int), ("criterion", str)):
        if own.get(key) is not None and (not isinstance(own[key], kind) or isinstance(own[key], bool)):
            raise RecipeError(f"{where}: lmprune.{key} is {shown(own[key])}, which is not {kind.__name__}")
    if own.get("layers") is not None and not 0 < own["layers"] <= MOST_LAYERS:
        raise RecipeError(f"{where}: lmprune.layers is {shown(own['layers'])}; a model has 1 to {MOST_LAYERS}")
    for key, kinds in (("choice", dict), ("dropped", list)):
        if own.get(key) is not None and not isinstance(own[key], kinds):
            raise RecipeError(f"{where}: lmprune.{key} is {shown(own[key])}, which is not a {kinds.__name__}")
    return own


def _text(data: Mapping[str, Any], key: str, where: str) -> str | None:
    value = data.get(key)
    if value is not None and not isinstance(value, str):
        raise RecipeError(f"{where}: {key} is {shown(value)}, which is not text")
    return value


def _dtype(data: Mapping[str, Any], where: str) -> str | None:
    """The type to write: mergekit computes in ``dtype`` and writes ``out_dtype``, or else the same."""
    found = {key: _text(data, key, where) for key in ("dtype", "out_dtype")}
    for key, name in found.items():
        if name is not None and name not in DTYPES:
            raise RecipeError(f"{where}: {key} {shown(name)} is no type{nearest(name, DTYPES)}: {', '.join(DTYPES)}")
    compute, out = found["dtype"], found["out_dtype"]
    if out is not None and compute not in (None, out, "float32"):
        # Rounded twice: no one type says what comes out.
        raise RecipeError(f"{where}: dtype is {compute} and out_dtype {out}. Give the one that should be written")
    return out or compute


def _joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges that continue one another as one: slices of one layer each mean the same, and hash the same.

    >>> _joined([(0, 1), (1, 2), (5, 8)])
    ((0, 2), (5, 8))
    """
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and start == found[-1][1] and stop > start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


_Ranges = tuple[tuple[int, int], ...]


def _read_slices(slices: Any, where: str) -> tuple[list[str], _Ranges, dict[tuple[int, int], Any]]:
    """Model names and ranges of all slices, which must be of one model and one source each, and their parameters."""
    if not isinstance(slices, list) or not slices:
        raise RecipeError(f"{where}: no 'slices', so there is nothing to keep")
    models: list[str] = []
    scaled: dict[tuple[int, int], Any] = {}
    ranges: list[tuple[int, int]] = []
    for i, item in enumerate(slices):
        at = f"{where}: slices[{i}]"
        if not isinstance(item, dict):
            raise RecipeError(f"{at} is not a mapping with the key 'sources'")
        check_keys(item, ("sources",), at, RecipeError)
        sources = item.get("sources")
        if not isinstance(sources, list) or len(sources) != 1:
            count = len(sources) if isinstance(sources, list) else 0
            raise RecipeError(f"{at} has {count} sources; pruning takes one each. Give every range its own slice")
        source = sources[0]
        if not isinstance(source, dict):
            raise RecipeError(f"{at}: the source is not a mapping with 'model' and 'layer_range'")
        check_keys(source, ("model", "layer_range", "parameters"), at, RecipeError)
        pair = source.get("layer_range")
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(n) is int for n in pair):
            raise RecipeError(f"{at}: layer_range is {shown(pair)}; write two whole numbers, as in [0, 8]")
        if not all(abs(n) <= MOST_LAYERS for n in pair):
            raise RecipeError(f"{at}: layer_range is {shown(pair)}; no model has more than {MOST_LAYERS} layers")
        if not isinstance(source.get("model"), str):
            raise RecipeError(f"{at}: model is {shown(source.get('model'))}, which is not a name")
        models.append(source["model"])
        ranges.append((pair[0], pair[1]))
        if source.get("parameters"):
            scaled[pair[0], pair[1]] = source["parameters"]
    if len({(model == "demo", normpath(model)) for model in models}) > 1:
        raise RecipeError(
            f"{where}: slices of several models ({', '.join(map(shown, sorted(set(models))[:3]))}); pruning takes one"
        )
    return [min(models, key=len)], tuple(ranges), scaled


def is_recipe_file(name: str | Path) -> bool:
    """Whether it is called as recipes are."""
    return Path(name).suffix in SUFFIXES
