"""Ways in which a runtime reads a config, each of which knows where it would go wrong. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmprune.cuts.plan import spell
from lmprune.models.fields import Fields, layer_count


@dataclass(frozen=True)
class Fault:
    """Why a config is not read rightly.

    Attributes:
        layers: the new numbers of the layers that are taken for others.
        keys: GGUF keys that would mend it.
        loads: False where the runtime says so itself, and loads nothing.
        advice: what to do instead.
    """

    why: str
    layers: tuple[int, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
    loads: bool = True
    advice: str = ""


class How(Protocol):
    """A way in which a runtime reads a config."""

    def fault(self, config: Fields) -> Fault | None:
        """What it would get wrong; None where nothing."""

    def describe(self) -> str:
        """What the runtime does, for the table."""


PATTERN = "Choose the layers again with `lmprune recipe --runtime`"
SIZES = "Narrow its MLPs or drop layers instead"

# --- kinds of layers --------------------------------------------------------------------------------------------------


def _listed(name: str, special: Callable[[Any], bool]) -> Callable[[Fields], list[bool] | None]:
    def kinds(config: Fields) -> list[bool] | None:
        value = config.get(name)
        return [special(item) for item in value] if isinstance(value, (list, tuple)) else None

    return kinds


def _experts(config: Fields) -> list[bool] | None:
    """Dense layers among layers of experts, of a config that lists the latter (Llama 4)."""
    listed = config.get("moe_layers")
    return [i not in listed for i in range(layer_count(config))] if isinstance(listed, (list, tuple)) else None


KINDS: dict[str, tuple[Callable[[Fields], list[bool] | None], str, str]] = {
    "layer_types": (_listed("layer_types", lambda kind: kind != "full_attention"), "local", "full attention"),
    "no_rope_layers": (_listed("no_rope_layers", bool), "rotary", "without rotary positions"),
    "moe_layers": (_experts, "dense", "of experts"),
}
"""By the field that says it: whether each layer is of the usual kind, and the names of that and of the other kind."""


@dataclass(frozen=True)
class Period:
    """Every ``every``-th layer is of the other kind, the last of each group or, with ``first``, the first.

    Attributes:
        of: the field of `KINDS` that says what each layer really is.
        every: the period that is built in.
        named: a config field that gives another period, as a number or as a string such as ``LLLG``.
        key: the GGUF key of one number that gives another period.
        listed: the GGUF key of an array, one entry a layer, that is read instead.
        effect: what is wrong in a layer of the wrong kind.
        loads: whether it loads with layers of the wrong kind.
    """

    of: str
    every: int
    effect: str
    named: str | None = None
    key: str | None = None
    listed: str | None = None
    first: bool = False
    loads: bool = True

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        kinds = KINDS[self.of][0](config)
        if kinds is None or kinds == (taken := self.pattern(config, len(kinds))):
            return None
        wrong = tuple(i for i, (is_so, is_taken) in enumerate(zip(kinds, taken)) if is_so != is_taken)
        usual, other = KINDS[self.of][1:]
        here = usual if taken[wrong[0]] else other
        every = _nth(self._period(config))
        why = f"takes every {every} layer to be {other}: layer {wrong[0]} would be {here}, {self.effect}"
        return Fault(why, wrong, self._mending(kinds), self.loads, PATTERN)

    def pattern(self, config: Fields, layers: int) -> list[bool]:
        """Which of so many layers the runtime takes to be of the usual kind."""
        said = config.get(self.named) if self.named else None
        if isinstance(said, str) and said:
            return [said[i % len(said)] == "L" for i in range(layers)]
        return _every(self._period(config), layers, self.first)

    def _period(self, config: Fields) -> int:
        said = config.get(self.named) if self.named else None
        return said if isinstance(said, int) and said > 0 else self.every

    def _mending(self, kinds: Sequence[bool]) -> dict[str, Any]:
        if self.listed is not None:
            return {self.listed: list(kinds)}
        if self.key is not None:
            for period in range(1, len(kinds) + 2):
                if _every(period, len(kinds), self.first) == list(kinds):
                    return {self.key: period}
        return {}

    def describe(self) -> str:
        """See `How`."""
        which = f"`{self.named}`, or {self.every}" if self.named else str(self.every)
        other = KINDS[self.of][2]
        order = ", the first of each group" if self.first else ""
        mended = ""
        if self.listed or self.key:
            mended = f"; `lmprune export` writes `{self.listed or self.key}` where that makes it right"
        return f"ignores `{self.of}`: every n-th layer is {other}, n = {which}{order}{mended}"


def _every(period: int, layers: int, first: bool) -> list[bool]:
    other = 0 if first else period - 1
    return [i % period != other for i in range(layers)]


def _nth(number: int) -> str:
    return {1: "single", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")


@dataclass(frozen=True)
class Reads:
    """The runtime reads what the config says of each layer."""

    what: str

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        return None

    def describe(self) -> str:
        """See `How`."""
        return f"reads {self.what}"


@dataclass(frozen=True)
class Alike:
    """All layers are alike to the runtime, whatever lists say."""

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        kinds = KINDS["layer_types"][0](config)
        if kinds is None or len(set(kinds)) == 1:
            return None
        odd = tuple(i for i, local in enumerate(kinds) if local)
        return Fault(
            "knows no windows in this family: these layers would attend to everything",
            odd,
            advice="Keep layers of one kind",
        )

    def describe(self) -> str:
        """See `How`."""
        return "all layers are alike"


@dataclass(frozen=True)
class HeadSize:
    """A head's size is the width over the number of heads, whatever ``head_dim`` says."""

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        if (sizes := _head_sizes(config)) is None or sizes.width // sizes.heads == sizes.said:
            return None
        taken = sizes.width // sizes.heads
        why = f"takes {sizes.width} / {sizes.heads} = {taken} for the size of a head, which is {sizes.said}"
        return Fault(f"{why}, so that it will not load", loads=False, advice=SIZES)

    def describe(self) -> str:
        """See `How`."""
        return "ignores `head_dim`: it is hidden_size / num_attention_heads"


@dataclass(frozen=True)
class SquareHeads:
    """All heads together must be as wide as the model."""

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        if (sizes := _head_sizes(config)) is None or sizes.heads * sizes.said == sizes.width:
            return None
        why = f"expects heads as wide as the model: {sizes.heads} of {sizes.said} are not {sizes.width}"
        return Fault(f"{why}, so that it will not load", loads=False, advice=SIZES)

    def describe(self) -> str:
        """See `How`."""
        return "expects num_attention_heads x head_dim to be hidden_size"


@dataclass(frozen=True)
class _HeadSizes:
    width: int
    heads: int
    said: int


def _head_sizes(config: Fields) -> _HeadSizes | None:
    width, heads, said = (config.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if not (isinstance(width, int) and isinstance(heads, int) and isinstance(said, int)) or heads < 1:
        return None
    return _HeadSizes(width, heads, said)


@dataclass(frozen=True)
class EachKind:
    """There must be a layer of each of these kinds."""

    kinds: tuple[str, ...]

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        said = config.get("layer_types")
        missing = [kind for kind in self.kinds if kind not in said] if isinstance(said, (list, tuple)) else []
        if not missing:
            return None
        return Fault(f"will not load it without a layer of {' and of '.join(missing)}", loads=False, advice=PATTERN)

    def describe(self) -> str:
        """See `How`."""
        return f"needs a layer of {' and of '.join(self.kinds)}"


@dataclass(frozen=True)
class AtLeast:
    """There must be so many layers, or as many as the field ``named`` says."""

    layers: int
    named: str

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        said, count = config.get(self.named), layer_count(config)
        needed = said if type(said) is int else self.layers
        if count >= needed:
            return None
        return Fault(f"fails at the first token with fewer than {needed} layers", loads=False, advice=PATTERN)

    def describe(self) -> str:
        """See `How`."""
        return f"needs as many layers as `{self.named}` says, or {self.layers}"


@dataclass(frozen=True)
class Gone:
    """The runtime no longer has this family."""

    since: str

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        return Fault(f"has no such family since {self.since}, and will not load it", loads=False)

    def describe(self) -> str:
        """See `How`."""
        return f"has none of these since {self.since}"


@dataclass(frozen=True)
class RotaryBase:
    """Reads ``rope_theta`` and ``rope_scaling`` beside the other fields, and not within ``rope_parameters``.

    Attributes:
        usual: the base where there is no ``rope_theta``; None where that will not load.
        sliding: whether sliding layers have a base of their own, ``rope_local_base_freq``.
        usual_sliding: that base where the field is missing; None where that will not load.
    """

    usual: float | None
    sliding: bool = False
    usual_sliding: float | None = None

    def named(self, config: Fields) -> dict[str, Any]:
        """The fields that it reads, as `old_rotary` has them."""
        found = old_rotary(config)
        return {name: value for name, value in found.items() if self.sliding or name != LOCAL}

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        wanted = old_rotary(config)
        if not wanted:
            return None
        advice = "Copy the bases from rope_parameters to the other fields of config.json, as `lmprune prune` does"
        bases = [("rope_theta", "rope_theta", self.usual, "")]
        if "sliding_attention" in (config.get("layer_types") or ()):
            field, base = (LOCAL, self.usual_sliding) if self.sliding else ("rope_theta", self.usual)
            bases.append((LOCAL, field, base, " of sliding layers"))
        for name, read, usual, where in bases:
            taken = config.get(read, usual)
            if name in wanted and taken is None:
                return Fault(f"will not load it: config.json has no {read}", loads=False, advice=advice)
            if name in wanted and taken != wanted[name]:
                why = f"does not read rope_parameters and takes {taken:g} for the rotary base{where}, which is"
                can = advice if read == name else ""
                return Fault(f"{why} {wanted[name]:g}: every token differs", advice=can)
        if "rope_scaling" in wanted and not config.get("rope_scaling"):
            return Fault("does not read rope_parameters, and rotary positions are not scaled", advice=advice)
        return None

    def describe(self) -> str:
        """See `How`."""

        def without(usual: float | None) -> str:
            return "it does not load" if usual is None else f"{usual:,.0f}"

        said = "reads `rope_theta` beside the other fields alone, not within `rope_parameters`; without: "
        said += without(self.usual)
        return said + (
            f"; likewise `{LOCAL}` for sliding layers: {without(self.usual_sliding)}" if self.sliding else ""
        )


LOCAL = "rope_local_base_freq"


def old_rotary(config: Fields) -> dict[str, Any]:
    """``rope_theta``, ``rope_scaling`` and `LOCAL` as they stood before transformers 5, of ``rope_parameters``."""
    said = config.get("rope_parameters")
    if not isinstance(said, Mapping):
        return {}
    whole, local = said.get("full_attention"), said.get("sliding_attention")
    said = whole if isinstance(whole, Mapping) else said
    theta = _number(said.get("rope_theta"))
    if theta is None:
        return {}
    found: dict[str, Any] = {"rope_theta": theta}
    if said.get("rope_type", "default") != "default":
        found["rope_scaling"] = {name: value for name, value in said.items() if name != "rope_theta"}
    if isinstance(local, Mapping) and (base := _number(local.get("rope_theta"))) is not None:
        found[LOCAL] = base
    return found


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class AttentionScale:
    """The scale of attention hangs on the number of layers: with ``layers`` of them it is by width over heads."""

    layers: int

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        count, said = layer_count(config), config.get("query_pre_attn_scalar")
        if said is None:
            return None
        by_width = count == self.layers
        taken = config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]
        if taken == said:
            return None
        why = f"at {count} layers divides attention by the root of {taken}, and not of {said}"
        return Fault(why, advice="Drop another number of layers")

    def describe(self) -> str:
        """See `How`."""
        return (
            f"ignores `query_pre_attn_scalar`: at {self.layers} layers it is hidden_size / heads, else the head's size"
        )


@dataclass(frozen=True)
class WindowsAt:
    """There are windows at exactly ``layers`` layers, and none in a model of any other depth."""

    layers: int

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        kinds = KINDS["layer_types"][0](config) or []
        if layer_count(config) == self.layers or not any(kinds):
            return None
        odd = tuple(i for i, local in enumerate(kinds) if local)
        return Fault(
            f"knows windows only in a model of {self.layers} layers: here it would have none",
            odd,
            advice="Run it elsewhere",
        )

    def describe(self) -> str:
        """See `How`."""
        return f"has windows only at {self.layers} layers"


@dataclass(frozen=True)
class OwnKeys:
    """So many first layers have keys and values of their own, however deep the model is."""

    layers: int

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        own = layer_count(config) - (config.get("num_kv_shared_layers") or 0)
        if own == self.layers:
            return None
        why = f"takes the first {self.layers} layers to have keys and values of their own, and it is {own}"
        return Fault(why, advice=PATTERN)

    def describe(self) -> str:
        """See `How`."""
        return f"ignores `num_kv_shared_layers`: the first {self.layers} layers have keys and values of their own"


@dataclass(frozen=True)
class LiteAt:
    """Queries are not compressed in models of these depths, and are in all others."""

    layers: tuple[int, ...]

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        count, compressed = layer_count(config), config.get("q_lora_rank") is not None
        if (count in self.layers) != compressed:
            return None
        why = f"at {count} layers expects queries {'un' if compressed else ''}compressed, and will not load it"
        return Fault(why, loads=False, advice="Drop another number of layers")

    def describe(self) -> str:
        """See `How`."""
        return f"ignores `q_lora_rank`: queries are uncompressed at {spell(self.layers)} layers and in no other model"


@dataclass(frozen=True)
class MixedRefused:
    """Layers of several kinds are refused unless ``max_window_layers`` is the number of layers."""

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        kinds = config.get("layer_types") or []
        count = layer_count(config)
        if len(set(kinds)) < 2 or config.get("max_window_layers") == count:
            return None
        why = f"will not load it: max_window_layers is {config.get('max_window_layers')} of {count} layers"
        return Fault(why, loads=False, advice="Keep layers of one kind")

    def describe(self) -> str:
        """See `How`."""
        return "refuses layers of several kinds unless `max_window_layers` is the number of layers"
