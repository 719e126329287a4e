"""Several pruned models of one loaded model, which compute the layers that they have in common once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmprune.cuts.plan import Plan
from lmprune.forward.calls import leaving, standing_in
from lmprune.forward.machine import out_of_memory
from lmprune.forward.tree import Turn, paths_of, walk
from lmprune.models.carrying import cut_live
from lmprune.models.dtypes import packed_tensors
from lmprune.models.stack import find_stack

MODULES_HELD = 1 << 15
"""Modules of all views that are held together: about 200 MB of Python objects beside the weights, which are shared."""


def pruned_view(model: nn.Module, plan: Plan | None) -> Any:
    """A model of its own modules and config, and of ``model``'s tensors, without the layers that ``plan`` drops."""
    held = [*packed_tensors(model), *model.parameters(), *model.buffers()]
    tensors = {id(tensor): tensor for tensor in held}
    view = copy.deepcopy(model, tensors)
    if plan is not None and (plan.dropped or plan.parts):
        cut_live(view, plan)
    return view


class Views:
    """Pruned views of one loaded model by name, and the walk in which they share what they have in common.

    For every batch, call `begin`, then take the `turns` in order, each within `turn`: a view's first layers hand on the
    state that an earlier turn left, instead of computing it again. The numbers are those of separate passes, which
    `prove` finds out for the architecture at hand.

    Args:
        model: the whole model; a view that drops nothing is a copy of its modules too.
        plans: what is left out of each view, by name.
        share: whether layers in common are computed once.
        most: states of a batch that are kept at once, if not all that are of use.

    Attributes:
        turns: the walk over all views.
        share: as given, until `prove` finds that it would change numbers.
    """

    def __init__(
        self, model: nn.Module, plans: Mapping[str, Plan], *, share: bool = True, most: int | None = None
    ) -> None:
        self._whole = model
        self._views: dict[str, Any] = {}
        self._layers: dict[str, list[nn.Module]] = {}
        self._states: dict[int, Any] = {}
        self._proven = False
        self.plans = dict(plans)
        self.share, self._most = share, most
        self.turns: list[Turn] = walk(paths_of(plans), most)

    def view(self, name: str) -> Any:
        """The view of that name in eval mode, built when it is first asked for."""
        if name not in self._views:
            view = self._views[name] = pruned_view(self._whole, self.plans[name]).eval()
            self._layers[name] = list(find_stack(view).layers)  # finding them costs as much as running a small one
        return self._views[name]

    def begin(self) -> None:
        """Forget the states of the batch before."""
        self._states.clear()

    @contextmanager
    def turn(self, turn: Turn) -> Iterator[Any]:
        """Within the block, a pass of the view, which is given, starts from the state kept for it, and leaves others.

        A block is good for one pass, over the batch that the turns before ran on.
        """
        view = self.view(turn.name)
        if not self.share:
            yield view
            return
        states, layers = self._states, self._layers[turn.name]
        for depth in [depth for depth in states if depth > turn.start]:
            del states[depth]
        with ExitStack() as undo:
            for layer in layers[: turn.start]:
                undo.enter_context(standing_in(layer, states[turn.start]))
            for depth in turn.saves:

                def keep(output: Any, depth: int = depth) -> None:
                    states[depth] = output

                undo.enter_context(leaving(layers[depth - 1], keep, whole=True))
            yield view

    def believe(self, proven: Collection[int]) -> None:
        """Take sharing for proven where every turn starts behind a layer behind which sharing was exact before.

        ``proven`` are such layers of the same model; `starts` are those of these views.
        """
        self._proven = self._proven or self.starts <= set(proven)

    @property
    def starts(self) -> set[int]:
        """The layers, as `paths_of` numbers them, behind which some turn starts."""
        return {turn.path[turn.start - 1] for turn in self.turns if turn.start}

    def prove(self, call: Callable[[Any], Tensor]) -> bool:
        """Whether sharing changes nothing, told by what ``call`` gives for each view with and without; asked once.

        Some architectures hand more than a state from layer to layer. From then on nothing is shared by them.
        """
        if self.share and not self._proven:
            self.begin()
            self.share = all(self._same(turn, call) for turn in self.turns)
            self.begin()
        self._proven = True
        return self.share

    def _same(self, turn: Turn, call: Callable[[Any], Tensor]) -> bool:
        try:
            with self.turn(turn) as view:
                shared = call(view)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as exc:
            # A layer misses what one of those that were stood in for would have left beside the state.
            if not turn.start or out_of_memory(exc):
                raise
            return False
        return not turn.start or torch.equal(shared, call(view))

    def only(self, names: Collection[str]) -> Views:
        """The same with these views alone, of which those that are built already are not built again."""
        some = Views(self._whole, {name: self.plans[name] for name in names}, share=self.share, most=self._most)
        some._views, some._layers, some._proven = self._views, self._layers, self._proven
        return some

    def parts(self) -> Iterator[Views]:
        """These views in parts, few enough to be held together; each is gone when the next comes.

        Neighbours in the walk stay together, since they have most in common.
        """
        most = max(1, MODULES_HELD // sum(1 for _ in self._whole.modules()))
        names = [turn.name for turn in self.turns]
        if len(names) <= most:
            yield self
            return
        for first in range(0, len(names), most):
            part = Views(
                self._whole,
                {name: self.plans[name] for name in names[first : first + most]},
                share=self.share,
                most=self._most,
            )
            yield part
            self.share = part.share
