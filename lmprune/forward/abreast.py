"""Several cuts in one pass: at each layer, all that keep it are one larger batch.

Walked one by one, cuts that part early take a pass each, however few samples there are. Side by side they are one pass
of a model that has all their layers, whose batch grows where they part. A larger batch may be summed in another order,
so that last digits differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmprune.forward.calls import computing, hidden_of, output_of, with_hidden, with_output
from lmprune.forward.tree import Prefix

ROUNDING = 64
"""Steps of its type's rounding, at the largest logit, within which a logit is called the same."""


class Abreast:
    """The states of a batch behind the kept layers of several cuts, which drop whole layers of one model.

    Within `over`, run a model that has all their layers once on the batch. Its own output means nothing.

    Args:
        paths: the kept layers of each cut.
        known: states that are there already, by the layers that made them.
        keep: besides those at the ends of paths, the states that stay.

    Attributes:
        most: cuts that some layer runs on at once, at most.
        states: what there is, by the layers that made it: those at the ends of paths, and those to be kept.
        ran: layers that were run, of one batch each.
    """

    def __init__(self, paths: Iterable[Prefix], known: Mapping[Prefix, Any], keep: Iterable[Prefix] = ()) -> None:
        self.states, self.ran = dict(known), 0
        self._begun = False
        self._makes: dict[int, dict[Prefix, None]] = {}
        self._needs: dict[Prefix, int] = {}
        ends = {*paths}
        stay = ends | {*keep}
        for path in sorted(ends):
            start = next((depth for depth in range(len(path), 0, -1) if path[:depth] in known), 0)
            for depth in range(start, len(path)):
                self._makes.setdefault(path[depth], {})[path[: depth + 1]] = None
                self._needs[path[:depth]] = max(path[depth], self._needs.get(path[:depth], 0))
        self.most = max(map(len, self._makes.values()), default=0)
        self._gone: dict[int, list[Prefix]] = {}
        for prefix, layer in self._needs.items():
            if prefix not in stay:
                self._gone.setdefault(layer, []).append(prefix)

    @contextmanager
    def over(self, layers: Mapping[int, nn.Module]) -> Iterator[None]:
        """Within the block, a pass over ``layers`` computes the states; their numbers are those in the paths."""
        with ExitStack() as undo:
            for number, layer in layers.items():
                undo.enter_context(computing(layer, lambda honest, *given, at=number: self._at(at, honest, *given)))
            yield

    def _at(self, layer: int, honest: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arrives = hidden_of(args, kwargs)
        if not self._begun:
            self.states[()], self._begun = arrives, True
        makes = list(self._makes.get(layer, ()))
        if makes:
            given = [output_of(self.states[prefix[:-1]]) for prefix in makes]
            args, kwargs = (repeated(value, len(arrives), len(given)) for value in (args, kwargs))
            args, kwargs = with_hidden(args, kwargs, torch.cat(given))
            output = honest(*args, **kwargs)
            parts = output_of(output).split(len(arrives))
            self.states |= {prefix: with_output(output, part) for prefix, part in zip(makes, parts, strict=True)}
            self.ran += len(makes)
        for prefix in self._gone.get(layer, ()):
            del self.states[prefix]
        # The decoder around the layers wants something of this shape; what, does not matter.
        return next((state for prefix, state in self.states.items() if prefix), arrives)


def repeated(value: Any, samples: int, times: int) -> Any:
    """``value`` with all tensors in it that have a row for each of several samples repeated, one after the other."""
    if isinstance(value, Tensor):
        rows = value.dim() > 1 and len(value) == samples > 1
        return value.repeat(times, *[1] * (value.dim() - 1)) if rows else value
    if isinstance(value, dict):
        return {key: repeated(each, samples, times) for key, each in value.items()}
    return type(value)([repeated(each, samples, times) for each in value]) if type(value) in (tuple, list) else value


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether logits differ by no more than the order of sums explains."""
    off = (found.float() - wanted.float()).abs().max()
    return bool(off <= ROUNDING * torch.finfo(wanted.dtype).eps * wanted.float().abs().max())
