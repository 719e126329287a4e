"""``lmprune.json``: where the weights of a folder came from. It stands in every checkpoint and adapter of ours.

Its keys are those of `Lineage`; absent ones are not known. ``kept`` is written for people and follows from the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lmprune.cuts.beside import parts_in
from lmprune.cuts.kinds import read_parts
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import ModelError, PlanError, RecipeError, shown
from lmprune.files import read_json, write_json

LINEAGE = "lmprune.json"
_TEXT = (str, type(None))


@dataclass(frozen=True)
class Base:
    """The unpruned model: as its user calls it, its commit on the Hub, and `Checkpoint.fingerprint` of its weights."""

    model: str | None = None
    revision: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Lineage:
    """A folder's history.

    Attributes:
        stage: what wrote the folder: ``prune``, ``heal`` or ``quantize``.
        base: the unpruned model; its name is None where nothing is known of it.
        plan: what is missing from it; None where nothing is.
        recipe: hash, criterion and choice of the recipe.
        writer, writer_reason: who wrote the tensors, and why.
        proof: what was compared with what was promised, as plain data.
        healing: how it was healed, as plain data.
        quantization: in what type its weights are held, and what that did to the loss; or, of weights that were read
            from a quantised file, what they were in there.
    """

    stage: str | None = None
    base: Base = field(default_factory=Base)
    plan: Plan | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    writer: str | None = None
    writer_reason: str | None = None
    proof: Mapping[str, Any] | None = None
    healing: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_cut(cls, recipe: Recipe, base: Base, plan: Plan) -> Lineage:
        """That of ``base`` under ``recipe``."""
        said = {"hash": recipe.hash, "criterion": recipe.criterion, "choice": dict(recipe.choice)}
        return cls(base=base, plan=plan, recipe=said)

    @property
    def healed(self) -> bool:
        """Whether the weights are no longer the base's own."""
        return self.stage == "heal"

    @property
    def made(self) -> str:
        """What became of the cut: repaired by a closed form, healed by training, its type in few bits, or nothing."""
        few = str(self.quantization.get("type", "")) if self.quantization is not None else ""
        if not self.healed:
            return few
        made = "healed" if self.healing is None or self.healing.get("steps") != 0 else "repaired"
        return f"{made} {few}".strip()

    def to_data(self) -> dict[str, Any]:
        """Plain data for the file."""
        data: dict[str, Any] = {"stage": self.stage}
        if self.base.model is not None:
            data["base"] = {
                "model": self.base.model, "revision": self.base.revision, "fingerprint": self.base.fingerprint
            }  # fmt: skip
        if self.recipe:
            data["recipe"] = dict(self.recipe)
        if self.plan is not None:
            data |= {"layers": self.plan.layers, "kept": list(self.plan.kept), "dropped": list(self.plan.dropped)}
            if self.plan.parts:
                data["parts"] = {part.kind: part.to_data() for part in self.plan.parts}
        if self.writer is not None:
            data |= {"writer": self.writer, "writer_reason": self.writer_reason}
        if self.stage == "prune" or self.proof is not None:
            data["proof"] = None if self.proof is None else dict(self.proof)
        if self.healing is not None:
            data["healing"] = dict(self.healing)
        if self.quantization is not None:
            data["quantization"] = dict(self.quantization)
        return data | {"versions": dict(self.versions)}

    def write(self, folder: Path) -> None:
        """Write the file into ``folder``, and the files of tensors that its plan needs beside it."""
        here = self
        if self.plan is not None:
            here = replace(self, plan=replace(self.plan, parts=parts_in(self.plan.parts, folder)))
        write_json(folder / LINEAGE, here.to_data())

    @classmethod
    def read(cls, folder: Path, *, remedy: str = "Prune again, or remove it") -> Lineage | None:
        """What ``folder`` says; None where it says nothing.

        Raises:
            ModelError: the file cannot be read, or contradicts itself; ``remedy`` says what to do then.
        """
        path = folder / LINEAGE
        try:
            data = read_json(path, ModelError, remedy)
        except FileNotFoundError:
            return None
        try:
            return cls._from_data(data, path)
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ModelError(f"{path} does not say what was cut: {shown(exc)}. {remedy}") from exc
        except (PlanError, RecipeError) as exc:
            raise ModelError(f"{path}: {exc}. {remedy}") from exc

    @classmethod
    def _from_data(cls, data: Any, path: Path) -> Lineage:
        if not isinstance(data, dict):
            raise ValueError("it is no JSON object")
        base = data.get("base") or {}
        plan = None
        if data.get("dropped") or data.get("parts"):
            layers = _number(data["layers"])
            parts = read_parts(data.get("parts"), layers, str(path), path.absolute().parent)
            plan = Plan(layers, tuple(_number(layer) for layer in data.get("dropped", ())), parts)
            if data.get("kept", list(plan.kept)) != list(plan.kept):
                raise ValueError(f"kept is {data['kept']}, and by the layers dropped it should be {list(plan.kept)}")
        return cls(
            stage=_checked(data, "stage", _TEXT),
            base=Base(*(_checked(base, name, _TEXT) for name in ("model", "revision", "fingerprint"))),
            plan=plan,
            recipe=_checked(data, "recipe", (dict, type(None))) or {},
            writer=_checked(data, "writer", _TEXT),
            writer_reason=_checked(data, "writer_reason", _TEXT),
            proof=_checked(data, "proof", (dict, type(None))),
            healing=_checked(data, "healing", (dict, type(None))),
            quantization=_checked(data, "quantization", (dict, type(None))),
            versions=_checked(data, "versions", (dict, type(None))) or {},
        )


def _number(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is no layer")
    return value


def _checked(data: Mapping[str, Any], name: str, kinds: tuple[type, ...]) -> Any:
    value = data.get(name)
    if not isinstance(value, kinds):
        raise ValueError(f"{name} is {value!r}")
    return value
