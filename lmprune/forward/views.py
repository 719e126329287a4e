"""Several pruned models of one loaded model, which compute the layers that they have in common once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lmprune.cuts.plan import Plan
from lmprune.forward.calls import leaving, standing_in
from lmprune.forward.kept import Kept
from lmprune.forward.machine import out_of_memory
from lmprune.forward.tree import Kinds, Prefix, Turn, paths_of, walk, worth_keeping
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

    For every batch, call `begin`, then take the turns that it gives in order, each within `turn`: a view's first layers
    hand on the state that an earlier turn left, or an earlier walk, instead of computing it again. The numbers are
    those of separate passes, which `prove` finds out for the architecture at hand.

    Args:
        model: the whole model; a view that drops nothing is a copy of its modules too.
        plans: what is left out of each view, by name.
        share: whether layers in common are computed once.
        most: states of a batch that are kept at once, if not all that are of use.
        kept: what earlier walks have left, and where this one leaves states for later ones; for proven models only.
        kinds: as of `paths_of`, the same for all walks that share ``kept``.

    Attributes:
        turns: the walk over all views where no earlier walk has left anything.
        share: as given, until `prove` finds that it would change numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        plans: Mapping[str, Plan],
        *,
        share: bool = True,
        most: int | None = None,
        kept: Kept | None = None,
        kinds: Kinds | None = None,
    ) -> None:
        self._whole = model
        self._views: dict[str, Any] = {}
        self._layers: dict[str, list[nn.Module]] = {}
        self._states: dict[int, Any] = {}
        self._proven = False
        self.plans = dict(plans)
        self.share, self._most, self._kept, self._kinds = share, most, kept, kinds
        self._paths = paths_of(plans, kinds)
        self._samples: Sequence[int] = ()
        self._wanted: dict[int, frozenset[Prefix]] = {}
        self.turns: list[Turn] = walk(self._paths, most)

    def view(self, name: str) -> Any:
        """The view of that name in eval mode, built when it is first asked for."""
        if name not in self._views:
            view = self._views[name] = pruned_view(self._whole, self.plans[name]).eval()
            self._layers[name] = list(find_stack(view).layers)  # finding them costs as much as running a small one
        return self._views[name]

    def begin(self, samples: Sequence[int] = ()) -> list[Turn]:
        """Forget the states of the batch before; the turns over the next, which holds these samples."""
        self._states.clear()
        self._samples = samples
        if not samples or not self._keeps:
            return self.turns
        assert self._kept is not None
        self._kept.make_room(samples, self._paths.values(), self._left)
        known = {name: self._kept.deepest(samples, path) for name, path in self._paths.items()}
        return walk(self._paths, self._most, known)

    @property
    def _keeps(self) -> bool:
        return self.share and self._kept is not None and bool(self._kept.proven)

    @property
    def _left(self) -> frozenset[Prefix]:
        """The states that are left for later walks."""
        room = self._kept.room if self._kept is not None else 0
        if room not in self._wanted:
            self._wanted[room] = worth_keeping(walk(self._paths), room)
        return self._wanted[room]

    def let_go(self) -> bool:
        """Forget all states, and leave none from now on, where memory runs out; whether that frees any."""
        self.begin()
        return self._kept is not None and self._kept.close()

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
        for depth in [depth for depth in states if depth > turn.common]:
            del states[depth]
        kept = self._kept if self._samples else None
        start = kept.state(self._samples, turn.path[: turn.start]) if kept and turn.known else states.get(turn.start)
        left = self._left if kept else ()
        with ExitStack() as undo:
            for layer in layers[: turn.start]:
                undo.enter_context(standing_in(layer, start))
            for depth in turn.saves:
                undo.enter_context(leaving(layers[depth - 1], partial(states.__setitem__, depth), whole=True))
            for depth in range(turn.start + 1, len(turn.path) + 1):
                if kept and (prefix := turn.path[:depth]) in left:
                    keep = partial(kept.put, self._samples, prefix)
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
        if self.share and self._kept is not None and self._kept.proven is None:
            self._kept.proven = self._same_from_anywhere(call)
        if self._kept is not None and self._kept.proven:  # which holds for all plans of the model
            self._proven = True
        if self.share and not self._proven:
            self.begin()
            self.share = all(self._same(turn, call) for turn in self.turns)
            self.begin()
        self._proven = True
        return self.share

    def _same_from_anywhere(self, call: Callable[[Any], Tensor]) -> bool:
        """Whether the whole model may start behind any layer, and a cut one from the whole one's state.

        The last layer first, in a copy that has not run: so nothing is there that a layer before the start has left.
        """
        whole, left = pruned_view(self._whole, None).eval(), dict[int, Any]()
        with ExitStack() as undo:
            for depth, layer in enumerate(find_stack(whole).layers, 1):
                undo.enter_context(leaving(layer, partial(left.__setitem__, depth), whole=True))
            full = call(whole)

        def started(view: Any, depth: int) -> Tensor:
            with ExitStack() as undo:
                for layer in find_stack(view).layers[:depth]:
                    undo.enter_context(standing_in(layer, left[depth]))
                return call(view)

        fresh = pruned_view(self._whole, None).eval()
        cut = next((plan for plan in self.plans.values() if plan.dropped and plan.dropped[0]), None)
        try:
            if not all(torch.equal(started(fresh, depth), full) for depth in range(len(left) - 1, 0, -1)):
                return False
            if cut is None:
                return True
            view = pruned_view(self._whole, Plan(cut.layers, cut.dropped)).eval()
            return torch.equal(started(view, cut.dropped[0]), call(view))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as exc:
            if out_of_memory(exc):
                raise
            return False

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
        some = self._of(names)
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
            part = self._of(names[first : first + most])
            yield part
            self.share = part.share

    def _of(self, names: Collection[str]) -> Views:
        plans = {name: self.plans[name] for name in names}
        return Views(self._whole, plans, share=self.share, most=self._most, kept=self._kept, kinds=self._kinds)
