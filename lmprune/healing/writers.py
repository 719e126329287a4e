"""Where a layer writes to the residual stream, found by trying: what can be solved, and what is left as it is.

A layer adds to the stream in stages, as attention and then the MLP. A stage is one linear map (with a norm behind it in
Gemma 2), the experts of a layer, or a block in which these stand beside what is none of them, as a shared expert with a
gate of its own: then what the others write stays, and what can be solved makes up for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmprune.errors import ModelError
from lmprune.forward.calls import calling, entering_any, leaving, output_of, standing_in, with_output
from lmprune.forward.experts import Experts, are_experts, known_experts, packed, unpacked
from lmprune.healing.layerwise import Layerwise, close
from lmprune.models.stack import unwrapped


@dataclass(frozen=True)
class Writer:
    """A linear map whose output is added to the residual stream, or the last linear maps of a layer's experts.

    Attributes:
        path: of the linear map, or of the module of experts, in its layer.
        norm: of a norm that its output goes through first, as in Gemma 2; empty where there is none.
        factor: what it is multiplied by as it is added, as in Granite.
        experts: of a module of experts the width of the stream; 0 of a linear map.
    """

    path: str
    norm: str
    factor: float
    experts: int = 0

    @property
    def last(self) -> str:
        """The module whose output is added."""
        return self.norm or self.path

    def linear(self, layer: nn.Module) -> nn.Module:
        """The linear map of that layer, or its experts."""
        return layer.get_submodule(self.path)

    def entered(self, layer: nn.Module, take: Any) -> AbstractContextManager[None]:
        """Within the block ``take`` gets what enters it: (..., d_in), or what `packed` makes of an experts' call."""
        module = self.linear(layer)
        if not self.experts:
            return entering_any(module, take)
        return calling(module, lambda values: take(packed(values)))

    def writes(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """What it makes of its inputs, before the norm, (..., width)."""
        module = self.linear(layer)
        if not self.experts:
            output: Tensor = module(inputs)
            return output
        made = Experts(module, self.experts)(inputs.reshape(-1, inputs.shape[-1]))
        return made.view(*inputs.shape[:-1], self.experts)

    def adds(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """What is added to the stream, (..., width), for these inputs."""
        output = self.writes(layer, inputs)
        return self.factor * (layer.get_submodule(self.norm)(output) if self.norm else output)

    def changed(self, layer: nn.Module) -> dict[str, Tensor]:
        """The parameters that a solve may change, by their names in the layer."""
        names = ("down_proj", "down_proj_bias") if self.experts else ("weight", "bias")
        found = {f"{self.path}.{name}": getattr(self.linear(layer), name, None) for name in names}
        if self.norm:
            found[f"{self.norm}.weight"] = layer.get_submodule(self.norm).weight
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


@dataclass(frozen=True)
class Stage:
    """A module whose output is added to the stream.

    Attributes:
        path: of the module in the layer.
        factor: what its output is multiplied by.
        writers: what of it can be solved.
        complete: whether that is all of it.
    """

    path: str
    factor: float
    writers: tuple[Writer, ...]
    complete: bool = True

    @property
    def plain(self) -> bool:
        """Whether it is one writer and nothing else."""
        return self.complete and len(self.writers) == 1 and self.writers[0].last == self.path


@contextmanager
def writing(layer: nn.Module, left: dict[Stage, list[Tensor]]) -> Iterator[None]:
    """Within the block what ``layer`` adds to the stream by each stage goes to its list, (..., width)."""

    def take(stage: Stage, output: Tensor) -> None:
        left[stage].append((stage.factor * output).cpu())  # a new tensor: some models add to it in place

    with ExitStack() as hooks:
        for stage in left:
            hooks.enter_context(leaving(layer.get_submodule(stage.path), partial(take, stage)))
        yield


def weight_of(linear: nn.Module) -> Tensor:
    """Its weight as (d_in, d_out), then its bias as one more row, in float64 on the CPU."""
    weight: Any = linear.weight.detach().to("cpu", torch.float64)
    weight = weight if isinstance(linear, Conv1D) else weight.T
    bias: Any = linear.bias
    return weight if bias is None else torch.cat([weight, bias.detach().to("cpu", torch.float64)[None]])


def set_weight(linear: Any, weight: Tensor) -> None:
    """Put back what `weight_of` gave, changed."""
    with torch.no_grad():
        if linear.bias is not None:
            weight, bias = weight[:-1], weight[-1]
            linear.bias.copy_(bias)
        linear.weight.copy_(weight if isinstance(linear, Conv1D) else weight.T)


@torch.no_grad()
def writers_of(model: Layerwise, place: int, hidden: Tensor) -> tuple[Writer, ...]:
    """All that layer ``place`` writes with; arguments as those of `stages_of`.

    Raises:
        ModelError: something else than linear maps and experts writes as well.
    """
    probe = _Probe(model, place, hidden)
    stages = probe.stages()
    for stage in stages:
        if not stage.complete:
            raise probe.refused(f"its {stage.path} is no linear map")
    return tuple(writer for stage in stages for writer in stage.writers)


@torch.no_grad()
def stages_of(model: Layerwise, place: int, hidden: Tensor) -> tuple[Stage, ...]:
    """Where layer ``place`` writes to the residual stream, in the order in which it does.

    Found by trying: what is added to a stage's output arrives unchanged in the layer's output, once the stages after it
    are held still. Their sum must be all that the layer adds.

    Args:
        hidden: the state (1, length, width) of `Layerwise.probe` that enters it.

    Raises:
        ModelError: it writes in another way, as where a norm stands on the stream itself, or nothing can be solved.
    """
    probe = _Probe(model, place, hidden)
    stages = probe.stages()
    if not any(stage.writers for stage in stages):
        raise probe.refused(next(iter(probe.why.values()), "no linear map writes to the residual stream"))
    return stages


class _Probe:
    def __init__(self, model: Layerwise, place: int, hidden: Tensor) -> None:
        self._model, self._place, self._hidden = model, place, hidden
        self._layer = model.layers[place]
        self.why: dict[str, str] = {}
        """By what cannot be solved, the reason."""
        self._entered: dict[str, list[Any]] = {}
        self._left: dict[str, list[Any]] = {}
        parts = {name: part for name, part in self._layer.named_modules() if name}
        with ExitStack() as hooks:
            for name, part in parts.items():
                self._entered[name], self._left[name] = [], []
                if are_experts(part):
                    take = partial(lambda name, values: self._entered[name].append(packed(values)), name)
                    hooks.enter_context(calling(part, take))
                elif _is_leaf(part):
                    hooks.enter_context(entering_any(part, self._entered[name].append))
                hooks.enter_context(leaving(part, partial(self._note, name), whole=True))
            self._output = self._run()
        called = [name for name in parts if self._has_state(name)]
        self._leaves = [name for name in called if _is_leaf(parts[name]) or self._has_experts(name)]
        deepest = sorted(called, key=lambda name: -name.count("."))
        self._blocks = [name for name in deepest if name not in self._leaves]

    def _note(self, name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            output = output.clone()  # some models add to it in place
        elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            output = with_output(output, output[0].clone())
        else:
            return
        self._left[name].append(output)

    def _has_state(self, name: str) -> bool:
        if len(self._left[name]) != 1:
            return False
        left = output_of(self._left[name][0])  # OPT flattens it
        return left.shape[-1:] == self._output.shape[-1:] and left.numel() == self._output.numel()

    def _has_experts(self, name: str) -> bool:
        """Whether it is a module of experts, and we know what it does."""
        module, width = self._layer.get_submodule(name), self._output.shape[-1]
        if not are_experts(module) or len(self._entered[name]) != 1 or self._entered[name][0] is None:
            return False
        values = self._entered[name][0][:1]
        if width not in module.get_parameter("down_proj").shape[1:]:
            return False
        experts = known_experts(module, unpacked(values, width))
        wanted = output_of(self._left[name][0]).reshape(-1, width)[:1].cpu()
        return experts is not None and close(experts(values).cpu(), wanted, wanted)

    def _run(self) -> Tensor:
        return self._model.run(self._place, self._model.probe, self._hidden)

    # --- stages -----------------------------------------------------------------------------------------------------

    def stages(self) -> tuple[Stage, ...]:
        """All of them.

        Raises:
            ModelError: they are not all that the layer adds.
        """
        known, inside = self._closure({}, {}), dict[str, dict[str, float]]()
        mixed = set[str]()
        while not self._explained(known):
            block = next(self._straight(self._blocks_left(known), known), None)
            if block is None:
                raise self.refused("what it adds to the residual stream is not what linear maps write")
            name, factor = block
            mixed.add(name)
            within = {part: known.pop(part) for part in list(known) if part.startswith(f"{name}.")}
            inside[name] = {leaf: f for part, f in within.items() for leaf, f in inside.pop(part, {part: f}).items()}
            known = self._closure(known | {name: factor}, inside)
        self._join_experts(known, inside)
        ranks = {name: rank for rank, name in enumerate(self._ranked())}
        stages = []
        for name, factor in sorted(known.items(), key=lambda item: ranks[item[0]]):
            leaves = inside.get(name, {name: factor})
            writers = [self._writer(leaf, f) for leaf, f in sorted(leaves.items(), key=lambda item: ranks[item[0]])]
            solvable = tuple(writer for writer in writers if writer is not None)
            complete = name not in mixed and len(solvable) == len(leaves)
            stages.append(Stage(name, factor, solvable, complete))
        return tuple(stages)

    def _join_experts(self, known: dict[str, float], inside: dict[str, dict[str, float]]) -> None:
        """Make one stage of experts and what stands beside them in their block, which all see the same state."""
        for name in [leaf for leaf in known if are_experts(self._layer.get_submodule(leaf))]:
            block = name.rpartition(".")[0]
            within = [part for part in known if part.startswith(f"{block}.")]
            if block not in self._blocks or len(within) < 2:
                continue
            added, value = self._added(within, known), self._value(block)
            factor = float((added * value).sum() / value.square().sum())
            if close(factor * value, added, self._output):
                inside[block] = {part: known.pop(part) for part in within}
                known[block] = factor

    def _closure(self, known: dict[str, float], inside: Iterable[str]) -> dict[str, float]:
        """``known`` with all leaves that go straight to the output once those known stand still."""
        while True:
            left = [n for n in self._leaves if n not in known and not any(n.startswith(f"{b}.") for b in inside)]
            found = dict(self._straight(left, known))
            if not found:
                return known
            known = known | found

    def _blocks_left(self, known: dict[str, float]) -> list[str]:
        """Blocks that are more than what is known within them, the innermost first."""
        left = []
        for name in self._blocks:
            within = [part for part in known if part.startswith(f"{name}.")]
            if name in known or any(name.startswith(f"{part}.") for part in known):
                continue
            if not within or not close(self._added(within, known), self._value(name), self._output):
                left.append(name)
        return left

    def _value(self, name: str) -> Tensor:
        return output_of(self._left[name][0]).view_as(self._output)

    def _added(self, names: Iterable[str], known: dict[str, float]) -> Tensor:
        return sum((known[name] * self._value(name) for name in names), torch.zeros_like(self._output))

    def _explained(self, known: dict[str, float]) -> bool:
        wanted = self._output - self._hidden.to(self._output.device)
        return bool(known) and close(self._added(known, known), wanted, self._output)

    def _ranked(self) -> list[str]:
        """The parts in the order in which they are called."""
        order: list[str] = []
        with ExitStack() as hooks:
            for name in (*self._leaves, *self._blocks):
                take = partial(lambda name, _: order.append(name), name)
                hooks.enter_context(calling(self._layer.get_submodule(name), take))
            self._run()
        return order

    def _straight(self, names: Sequence[str], known: dict[str, float]) -> Iterator[tuple[str, float]]:
        """Parts whose output goes straight to the layer's, with their factors, while those ``known`` stand still."""
        generator = torch.Generator().manual_seed(0)
        size = self._output.float().square().mean().sqrt().cpu()
        for name in names:
            added = torch.randn(self._output.shape, generator=generator) * size
            added = added.to(self._output)
            try:
                moved = self._moved(name, added, known) - self._output
            except (RuntimeError, IndexError):  # what stands still is of other tokens now, as one expert among many
                continue
            factor = float((moved * added).sum() / added.square().sum())
            if abs(factor) > 1e-3 and close(moved, factor * added, moved):
                yield name, 1.0 if abs(factor - 1) < 1e-3 else factor

    def _moved(self, name: str, added: Tensor, known: Iterable[str]) -> Tensor:
        with ExitStack() as hooks:
            for still in known:
                if not still.startswith(f"{name}."):
                    hooks.enter_context(standing_in(self._layer.get_submodule(still), self._answer(still)))
            left = output_of(self._left[name][0])
            answer = self._answer(name, left + added.view_as(left))
            hooks.enter_context(standing_in(self._layer.get_submodule(name), answer))
            return self._run()

    def _answer(self, name: str, value: Tensor | None = None) -> Any:
        left = self._left[name][0]
        return with_output(left, output_of(left).clone() if value is None else value)

    # --- writers ----------------------------------------------------------------------------------------------------

    def _writer(self, name: str, factor: float) -> Writer | None:
        """The writer of that name, or that which feeds the norm of that name; None where it cannot be solved."""
        module = self._layer.get_submodule(name)
        if are_experts(module):
            return Writer(name, "", factor, experts=self._output.shape[-1])
        if is_linear(module):
            return self._solvable(Writer(name, "", factor))
        if not _is_leaf(module):
            return None
        for other in self._leaves:
            part = self._layer.get_submodule(other)
            if is_linear(part) and torch.equal(self._value(other), self._entered[name][0].view_as(self._output)):
                return self._solvable(Writer(other, name, factor))
        self.why[name] = f"its {name} is not fed by a linear map alone"
        return None

    def _solvable(self, writer: Writer) -> Writer | None:
        weight: Any = writer.linear(self._layer).weight
        if not weight.is_floating_point() or weight.dim() != 2:
            raise ModelError(f"the weights of {writer.path} are in few bits: load the model as it is stored")
        named = unwrapped(self._model.model).named_parameters(remove_duplicate=False)
        if sum(parameter is weight for _, parameter in named) > 1:
            self.why[writer.path] = f"its {writer.path} is shared with other layers"
            return None
        return writer

    def refused(self, reason: str) -> ModelError:
        """For the user."""
        kind = self._model.model.config.model_type
        return ModelError(f"{kind}: layer {self._place} cannot be refitted: {reason}. Heal it with --method lora")


def is_linear(part: nn.Module) -> bool:
    """Whether it is a linear map, GPT-2's transposed one too."""
    return isinstance(part, (nn.Linear, Conv1D))


def _is_leaf(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    norm = isinstance(weight, Tensor) and weight.dim() == 1 and not list(part.children())
    return norm or is_linear(part)
