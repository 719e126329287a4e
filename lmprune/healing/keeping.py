"""What a repair has solved so far, layer by layer, so that a killed one goes on, and a streamed one has a result."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmprune.errors import OutputError
from lmprune.files import read_json, write_json


@dataclass(frozen=True)
class Refitted:
    """What became of one projection.

    Attributes:
        layer: its number in the whole model.
        path: within the layer.
        form: keep, zero, around, or singular: no solution, so that it stays; and whether the norm after it was
            refitted, as in ``zero+norm``. Or together: solved with the others of the layer before the cut; before and
            after are then what those left, the last solved alone or after it, as a share of the former. Or
            distribution, or a second keep of the last projection: solved for what the whole model says; before and
            after are then the divergence from it, in nats a token on held-out text.
        before: the squared error of what it wrote, as a share of what it should have written, on held-out text.
        after: the same of what it writes now. Solved without the held-out text; then solved again with it.
        tokens: that it was solved on.
    """

    layer: int
    path: str
    form: str
    ridge: float | None
    before: float
    after: float
    tokens: int


@dataclass(frozen=True)
class KeptLayer:
    """A layer that was solved.

    Attributes:
        tensors: those that changed, by their names in the layer.
        done: what became of its projections.
        gained: whether it did.
    """

    tensors: dict[str, Tensor]
    done: tuple[Refitted, ...]
    gained: bool

    def put_into(self, layer: nn.Module) -> None:
        """Change a layer as it was changed."""
        parameters = dict(layer.named_parameters())
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                parameters[name].copy_(tensor)


class Kept:
    """Solved layers in a folder, each complete or not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _files(self, layer: int) -> tuple[Path, Path]:
        return self.folder / f"layer-{layer}.safetensors", self.folder / f"layer-{layer}.json"

    def of(self, layer: int) -> KeptLayer | None:
        """That layer, by its number in the whole model; None where it was not solved yet."""
        weights, told = self._files(layer)
        if not told.is_file():
            return None
        data = read_json(told, OutputError, f"Remove {self.folder}")
        done = tuple(Refitted(**each) for each in data["done"])
        return KeptLayer(load_file(weights) if data["names"] else {}, done, data["gained"])

    def keep(
        self, layer: int, module: nn.Module, names: Collection[str], done: Sequence[Refitted], gained: bool
    ) -> None:
        """Keep those parameters of ``module``; all of it is there once the second file is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weights, told = self._files(layer)
        changed = {name: p.detach().cpu().contiguous() for name, p in module.named_parameters() if name in names}
        if changed:
            save_file(changed, weights)
        write_json(told, {"names": sorted(changed), "done": [asdict(each) for each in done], "gained": gained})

    def keep_head(self, head: nn.Module) -> None:
        """Keep the parameters of a head that was solved."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in head.named_parameters()}, self._head)

    def head(self) -> dict[str, Tensor]:
        """Those parameters, by their names in the head; none where it stayed."""
        return load_file(self._head) if self._head.is_file() else {}

    @property
    def _head(self) -> Path:
        return self.folder / "head.safetensors"

    def names(self, layer: int) -> list[str]:
        """What was kept of that layer."""
        names: list[str] = read_json(self._files(layer)[1], OutputError, f"Remove {self.folder}")["names"]
        return names

    def layers(self) -> Iterator[int]:
        """Those that were solved."""
        for path in sorted(self.folder.glob("layer-*.json")):
            yield int(path.stem.removeprefix("layer-"))
