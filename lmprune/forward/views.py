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
from lmprune.forward.abreast import Abreast, same
from lmprune.forward.calls import leaving, output_of, standing_in, with_output
from lmprune.forward.kept import Kept
from lmprune.forward.machine import out_of_memory
from lmprune.forward.tree import Kinds, Prefix, Turn, common, paths_of, walk, worth_keeping
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
        abreast: how many views `side_by_side` runs in one pass, at most.

    Attributes:
        turns: the walk over all views where no earlier walk has left anything.
        share: as given, until `prove` finds that it would change numbers.
        abreast: as given; 1 once memory ran out, or where it would change numbers by more than rounding.
        abreast_proven: whether it is known to change none.
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
        abreast: int = 1,
    ) -> None:
        self._whole = model
        self.abreast, self.abreast_proven = abreast, False
        self._union: tuple[Plan, Any] | None = None
        self._ends: dict[Prefix, Any] = {}
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
        self._ends.clear()
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
        """Where memory runs out: run one view after the other, or else forget all states, and leave none from now on.

        Whether that frees any.
        """
        self.begin()
        return self.part_ways() or (self._kept is not None and self._kept.close())

    def part_ways(self) -> bool:
        """Run one view after the other from now on; whether several ran at once."""
        together, self.abreast = self.goes_abreast, 1
        self.begin()
        return together

    @property
    def goes_abreast(self) -> bool:
        """Whether several views run in one pass: those that drop whole layers only."""
        whole_layers = not any(plan.parts for plan in self.plans.values())
        return self.share and self.abreast > 1 and len(self.turns) > 1 and whole_layers

    def groups(self, turns: Sequence[Turn]) -> list[Sequence[Turn]]:
        """Neighbours of the walk that run in one pass."""
        size = self.abreast if self.goes_abreast else 1
        return [turns[first : first + size] for first in range(0, len(turns), size)]

    def side_by_side(self, turns: Sequence[Turn], call: Callable[[Any], Any], then: Sequence[Turn] = ()) -> int:
        """Compute the states behind the last layers of several turns in one pass, which `turn` then starts from.

        Args:
            call: a pass of the batch through a view.
            then: the turns of the next such pass.

        Returns:
            How many layers were run.
        """
        kept, known = self._kept if self._samples else None, dict(self._ends)
        for turn in turns:
            if kept and turn.known:
                known[turn.path[: turn.start]] = kept.state(self._samples, turn.path[: turn.start])
        left = self._left if kept else frozenset[Prefix]()
        ends = {turn.path for turn in turns}
        nexts = {turn.path[: common(turn.path, turns[-1].path)] for turn in then} - {()}
        states = Abreast(ends, known, left | nexts)
        plan, view = self._with_layers_of([self.plans[turn.name] for turn in turns])
        with states.over(dict(zip(plan.kept, find_stack(view).layers, strict=True))):
            call(view)
        for prefix in left & states.states.keys() - known.keys():
            state = states.states[prefix]
            assert kept is not None
            kept.put(self._samples, prefix, with_output(state, output_of(state).clone()))
        self._ends = {prefix: state for prefix, state in states.states.items() if prefix in ends | nexts}
        return states.ran

    def _with_layers_of(self, plans: Sequence[Plan]) -> tuple[Plan, Any]:
        """A view with all layers that any of ``plans`` keeps, and its plan."""
        plan = Plan(plans[0].layers, tuple(set.intersection(*({*plan.dropped} for plan in plans))))
        if self._union is None or self._union[0] != plan:
            self._union = plan, pruned_view(self._whole, plan).eval()
        return self._union

    @contextmanager
    def turn(self, turn: Turn) -> Iterator[Any]:
        """Within the block, a pass of the view, which is given, starts from the state kept for it, and leaves others.

        A block is good for one pass, over the batch that the turns before ran on.
        """
        view = self.view(turn.name)
        if not self.share:
            yield view
            return
        if turn.path in self._ends:
            with ExitStack() as undo:
                for layer in self._layers[turn.name]:
                    undo.enter_context(standing_in(layer, self._ends[turn.path]))
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

    def prove_abreast(self, call: Callable[[Any], Tensor]) -> None:
        """Find out whether several views in one pass give what each gives alone, but for rounding; asked once."""
        if self.abreast_proven or not self.goes_abreast:
            return
        self.begin()
        # The widest: neighbours that part at their last layers share all that could tell.
        turns = max(self.groups(self.turns), key=lambda turns: Abreast((turn.path for turn in turns), {}).most)
        try:
            self.side_by_side(turns, call)
            found = {}
            for turn in turns:
                with self.turn(turn) as view:
                    found[turn.name] = call(view)
            right = all(same(found[turn.name], call(self.view(turn.name))) for turn in turns)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError):
            right = False
        self.begin()
        self.abreast_proven, self.abreast = right, self.abreast if right else 1

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
        some.abreast_proven, some._union = self.abreast_proven, self._union
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
            self.share, self.abreast, self.abreast_proven = part.share, part.abreast, part.abreast_proven

    def _of(self, names: Collection[str]) -> Views:
        plans = {name: self.plans[name] for name in names}
        return Views(
            self._whole,
            plans,
            share=self.share,
            most=self._most,
            kept=self._kept,
            kinds=self._kinds,
            abreast=self.abreast,
        )
