"""From a config and the layers that stay to the config of the pruned model. Pure: no torch, no transformers.

Fields are known by name: a list that happens to have one entry per layer is not thereby per layer. `PER_LAYER`,
`LAYER_IDS` and `LEADING` are the easy ones; `RULES` holds what is more than a list: patterns that a kept set may not
fit, values that follow from the number of layers, and state that layers share. A rule that cannot be kept refuses.

Configs are *resolved* ones, `config.to_dict()` of transformers, where every default is written out. `changed_fields`
names what differs, so that a raw ``config.json`` can be mended in place by `apply_fields`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from lmprune.cuts.plan import MOST_LAYERS, spell
from lmprune.errors import ModelError, shown

Fields = Mapping[str, Any]
Rule = Callable[[Fields, int, Sequence[int]], dict[str, Any]]

SECTIONS = ("text_config",)
"""Keys under which multimodal models nest the decoder's fields."""

COUNTS = ("decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
"""Names of the layer count, the decoder's own first: in BART and its kin ``num_hidden_layers`` is the encoder's."""

PER_LAYER: dict[str, str] = {
    "layer_types": "kind of attention or mixer of each layer",
    "layers_block_type": "the older name of layer_types",
    "mlp_layer_types": "dense or sparse feed-forward of each layer",
    "no_rope_layers": "1 where the layer has rotary positions (Llama 4, SmolLM3)",
    "attention_layers": "GPT-Neo's global or local, expanded",
    "indexer_types": "full or shared index of sparse attention",
    "layer_rope_theta": "rotary base of each layer (Granite SWA)",
    "num_attention_heads_per_layer": "Laguna",
    "activation_sparsity_pattern": "Gemma 3n",
    "intermediate_size": "a list in Gemma 3n, a number elsewhere",
    "num_experts": "may be a list in Hunyuan MoE, a number elsewhere",
    "moe_topk": "may be a list in Hunyuan MoE",
    "num_shared_expert": "may be a list in Hunyuan MoE",
}
"""Lists with one entry per layer, and what an entry says. Where the field is a number it is left alone."""

LAYER_IDS: dict[str, int] = {
    "moe_layers": 0,
    "attn_layer_indices": 0,
    "full_attn_idxs": 0,
    "cross_attention_layers": 0,
    "local_layer_ids": 0,
    "hybrid_layer_ids": 0,
}
"""Lists of layer numbers, and the number of the first layer."""

LEADING: dict[str, str] = {
    "first_k_dense_replace": "so many leading layers are dense (DeepSeek, GLM, dots)",
    "num_dense_layers": "so many leading layers are dense (AFMoE, LFM2-MoE)",
}
"""How many leading layers are of another kind."""

KEEP_FIRST: dict[str, str] = {
    "modernbert-decoder": "its first layer has no norm before attention",
}
KEEP_LAST: dict[str, str] = {"gpt_neox_japanese": "its last layer alone adds a bias"}
IN_PLACE: dict[str, str] = {
    "beam": "each layer scales its residual by its own number",
    "diffllama": "each layer computes its lambda from its own number",
}
"""Models whose layers compute with their own number, which a config cannot change: only trailing layers may go."""

RULED: dict[str, str] = {
    "per_layer_config": "overrides by layer number",
    "mlp_only_layers": "ids of dense layers (Qwen MoE)",
    "decoder_sparse_step": "experts in every so many layers, folded into mlp_only_layers",
    "moe_layer_interval": "ERNIE: experts in every so many layers",
    "moe_layer_start_index": "ERNIE: first layer with experts",
    "moe_layer_end_index": "ERNIE: last layer with experts",
    "attn_layer_period": "Jamba; Zamba writes layers_block_type out",
    "attn_layer_offset": "Jamba; Zamba writes layers_block_type out",
    "expert_layer_period": "Jamba",
    "expert_layer_offset": "Jamba",
    "attention_types": "GPT-Neo: what attention_layers is expanded from",
    "block_types": "RecurrentGemma: a cycle of layer types",
    "num_kv_shared_layers": "Gemma 3n and 4: so many last layers share keys and values",
    "ple_layer_ids": "Qwen 4: layers with n-gram tables, counted from 1",
    "scale_depth": "MiniCPM3: residual scale times the root of the layer count",
    "num_nextn_predict_layers": "layers behind the last, of which nothing is kept",
    "hidden_size_per_layer_input": "Gemma 3n and 4: input embeddings of all layers in one tensor",
    "scale_attn_by_inverse_layer_idx": "GPT-2: attention divided by the layer's number",
    "n_layers_per_attn_res_block": "Inkling 2, which is refused",
    "hybrid_override_pattern": "Nemotron-H: the older spelling of layers_block_type",
    "num_layers_per_stack": "HRM, which is refused",
}
"""Fields that a rule below looks at, and what they say."""

REFUSED: dict[str, str] = {
    "blt": "it is three transformers in one, over bytes and patches",
    "hrm_text": "its layers form two stacks that are run in turns",
    "reformer": "its layers are reversible and share a buffer",
    "inkling2_text": "its layers attend to what all layers before them gave out",
    "rwkv": "it rescales the weights of later layers in place while it runs",
    "musicgen": "it is a text encoder, an audio codec and a decoder in one",
    "musicgen_melody": "it is a text encoder, an audio codec and a decoder in one",
    "moshi": "it is two transformers, one over time and one over codebooks",
    "zaya": "its layers hand their router's state on from one to the next",
    "xlm": "it keeps the parts of its layers in separate lists",
    "gemma4_assistant": "it reads the key-value cache of another model",
    "gemma4_unified_assistant": "it reads the key-value cache of another model",
}
"""Model types that cannot lose a layer, and why."""

ALIASES: tuple[tuple[str, ...], ...] = (COUNTS, ("layer_types", "layers_block_type", "hybrid_override_pattern"))
"""Fields of which a raw config may hold one and the resolved config another."""


_LAYER_NAME = re.compile(r"(?:^|\.)(layers|h|blocks)\.(\d+)(?=\.|$)")
_LAYER_PATTERN = re.compile(r"^re:.*(layers|blocks|\bh)\\?\.[(\[]?\d")

_WITHOUT_ATTENTION = frozenset({"linear_attention", "mamba", "conv", "recurrent", "mlp", "moe"})
"""Values of layer_types that leave no keys and values in the cache."""


class _Unfit(Exception):
    """The kept layers do not fit a rule; says why."""


def layer_count(config: Fields) -> int:
    """The number of decoder layers.

    Raises:
        ModelError: the config names none, or one that no model has.
    """
    inner = decoder_fields(config)
    name = _count_name(inner)
    if name is not None:
        if type(inner[name]) is not int or not 0 < inner[name] <= MOST_LAYERS:
            raise ModelError(f"the config's {name} is {shown(inner[name])}; a model has 1 to {MOST_LAYERS} layers")
        return int(inner[name])
    if isinstance(inner.get("layers_block_type"), list):
        return len(inner["layers_block_type"])
    kind = config.get("model_type")
    raise ModelError(f"the config of {kind!r} names no number of decoder layers. lmprune prunes causal language models")


def pruned_config(config: Fields, kept: Sequence[int]) -> dict[str, Any]:
    """A new resolved config in which only the layers ``kept`` are left.

    Raises:
        ModelError: no config can say so; names the reason and the nearest kept sets that would do.
    """
    return apply_fields(config, changed_fields(config, kept))


def changed_fields(config: Fields, kept: Sequence[int]) -> dict[str, Any]:
    """Dotted field -> new value for every field that pruning to ``kept`` changes.

    Raises:
        ModelError: no config can say so; names the reason and the nearest kept sets that would do.
    """
    section = decoder_section(config)
    inner = decoder_fields(config)
    for kind in (str(config.get("model_type")), str(inner.get("model_type"))):
        if kind in REFUSED:
            raise ModelError(f"{kind} cannot lose a layer: {REFUSED[kind]}")
    layers = layer_count(config)
    try:
        changes = _changes(inner, layers, kept)
    except _Unfit as exc:
        kind = inner.get("model_type", config.get("model_type"))
        raise ModelError(f"{kind}: keeping the layers {spell(kept)} of {layers} is impossible: {exc}."
                         f"{_advice(config, kept)}") from None  # fmt: skip
    named = {f"{section}.{name}" if section else name: value for name, value in changes.items()}
    return named | _quantised_modules(config, kept)


def apply_fields(config: Fields, changes: Fields) -> dict[str, Any]:
    """A copy of ``config``, raw or resolved, with the dotted fields of ``changes`` set."""
    result = copy.deepcopy(dict(config))
    for dotted, value in changes.items():
        *parents, name = dotted.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
        if name not in target:
            # The raw config says it by another name, which would now contradict the new value.
            for alias in (
                a for group in ALIASES if name in group for a in group if f"{dotted[: -len(name)]}{a}" not in changes
            ):
                target.pop(alias, None)
        target[name] = copy.deepcopy(value)
    return result


def _quantised_modules(config: Fields, kept: Sequence[int]) -> dict[str, Any]:
    """Lists of module names in ``quantization_config``: renumbered, and without those of dropped layers."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return {}
    place = {old: new for new, old in enumerate(kept)}
    changes: dict[str, Any] = {}
    for name, value in quantization.items():
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            continue
        renamed = []
        for item in value:
            if _LAYER_PATTERN.search(item):
                raise ModelError(
                    f"quantization_config.{name} names layers by the pattern {item!r}, which lmprune cannot renumber. "
                    "Prune the model before it is quantised"
                )
            match = _LAYER_NAME.search(item)
            if match is None:
                renamed.append(item)
            elif int(match[2]) in place:
                renamed.append(f"{item[: match.start(2)]}{place[int(match[2])]}{item[match.end(2) :]}")
        if renamed != list(value):
            changes[f"quantization_config.{name}"] = renamed
    return changes


def decoder_section(config: Fields) -> str | None:
    """The key under which the decoder's fields are nested; None where they are not."""
    return next((name for name in SECTIONS if isinstance(config.get(name), Mapping)), None)


def decoder_fields(config: Fields) -> Fields:
    """The decoder's fields of a resolved config."""
    section = decoder_section(config)
    return config[section] if section else config


def _count_name(inner: Fields) -> str | None:
    names = ("num_layers", *COUNTS) if inner.get("model_type") == "longcat_flash" else COUNTS
    return next((name for name in names if isinstance(inner.get(name), int)), None)


def _changes(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Field -> new value within the decoder's section."""
    changes: dict[str, Any] = {}
    for rule in RULES:
        changes |= rule(inner, layers, kept)
    return {name: value for name, value in changes.items() if inner.get(name) != value}


def fitting_sets(config: Fields, kept: Sequence[int], most: int = 2) -> list[tuple[int, ...]]:
    """The kept sets of the same size nearest to ``kept`` that the config can describe; at most ``most``."""
    inner, layers = decoder_fields(config), layer_count(config)
    fitting: list[tuple[int, ...]] = []
    for candidate in _neighbours(layers, tuple(kept)):
        try:
            _changes(inner, layers, candidate)
        except _Unfit:
            continue
        if candidate not in fitting:
            fitting.append(candidate)
        if len(fitting) == most:
            break
    return fitting


def _advice(config: Fields, kept: Sequence[int]) -> str:
    """The nearest kept sets that fit, as a sentence."""
    fitting = [spell(candidate) for candidate in fitting_sets(config, kept)]
    return (
        f" Nearest that fit: keep {' or '.join(fitting)}" if fitting else " No other layers of that number fit either"
    )


def _neighbours(layers: int, kept: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Kept sets of the same size: one layer exchanged, nearest first; then every cut in one piece."""
    gone = [layer for layer in range(layers) if layer not in kept]
    for out, into in sorted(product(kept, gone), key=lambda pair: abs(pair[0] - pair[1])):
        yield tuple(sorted({*kept, into} - {out}))
    for start in range(len(kept), -1, -1):
        yield tuple(layer for layer in range(layers) if not start <= layer < start + len(gone))


# Rules: each looks at the decoder's fields and gives the fields that it changes.


def _refusals(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    kind = str(inner.get("model_type"))
    if kind in KEEP_FIRST and 0 not in kept:
        raise _Unfit(f"layer 0 must stay, for {KEEP_FIRST[kind]}")
    if kind in KEEP_LAST and layers - 1 not in kept:
        raise _Unfit(f"layer {layers - 1} must stay, for {KEEP_LAST[kind]}")
    moved = [layer for place, layer in enumerate(kept) if place != layer]
    if moved and kind in IN_PLACE:
        raise _Unfit(f"layer {moved[0]} would change its place, but {IN_PLACE[kind]}")
    if moved and inner.get("scale_attn_by_inverse_layer_idx"):
        raise _Unfit(f"layer {moved[0]} would change its place, but each layer scales attention by its own number")
    if kind.startswith(("gemma3n", "gemma4")) and inner.get("hidden_size_per_layer_input"):
        raise _Unfit("the input embeddings of all layers lie in one tensor, which lmprune does not cut")
    return {}


def _counts(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    primary = _count_name(inner)
    if inner.get("model_type") == "longcat_flash":
        return {"num_layers": len(kept), "num_hidden_layers": 2 * len(kept)}
    if primary is None or primary == "decoder_layers":
        return {primary or "num_hidden_layers": len(kept)}
    return {name: len(kept) for name in COUNTS if inner.get(name) == layers}


def _lists(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name in PER_LAYER:
        value = inner.get(name)
        if isinstance(value, (list, tuple)):
            if len(value) != layers:
                raise _Unfit(f"{name} has {len(value)} entries for {layers} layers, so the config contradicts itself")
            changes[name] = [value[layer] for layer in kept]
    return changes


def _ids(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    place = {old: new for new, old in enumerate(kept)}
    return {
        name: [place[number - first] + first for number in inner[name] if number - first in place]
        for name, first in LAYER_IDS.items()
        if isinstance(inner.get(name), (list, tuple))
    }


def _leading(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    return {
        name: sum(layer < inner[name] for layer in kept)
        for name in LEADING
        if isinstance(inner.get(name), int) and not isinstance(inner.get("mlp_layer_types"), list)
    }


def _per_layer_overrides(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """``per_layer_config``: layer number, as a string with leading zeros, -> fields of that layer."""
    overrides = inner.get("per_layer_config")
    if not isinstance(overrides, Mapping):
        return {}
    by_layer = {int(number): fields for number, fields in overrides.items()}
    return {"per_layer_config": {str(new): by_layer[old] for new, old in enumerate(kept) if old in by_layer}}


def _sparse_step(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Qwen MoE: a layer is dense if it is listed or its number is off the step. The list alone can say all of it."""
    if not isinstance(inner.get("mlp_only_layers"), (list, tuple)):
        return {}
    step = inner.get("decoder_sparse_step") or 1
    dense = [n for n, layer in enumerate(kept) if layer in inner["mlp_only_layers"] or (layer + 1) % step]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1} if step != 1 else {"mlp_only_layers": dense}


def _ernie_experts(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    names = ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index")
    if not all(isinstance(inner.get(name), int) for name in names):
        return {}

    def sparse(layer: int, interval: int, start: int, end: int) -> bool:
        return (layer + 1) % interval == 0 and start <= layer <= end

    last = inner[names[2]] if inner[names[2]] >= 0 else layers - 1
    wanted = [sparse(layer, inner[names[0]], inner[names[1]], last) for layer in kept]
    count = len(kept)
    choices = product((inner[names[0]], *range(1, count + 1)), range(count + 1), range(count - 1, -1, -1))
    return _first_choice(names, choices, sparse, wanted, "experts every few layers")


def _jamba_periods(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Jamba: attention and experts stand at every period-th layer, and no list can say otherwise."""
    changes: dict[str, Any] = {}
    for what in ("attn_layer", "expert_layer"):
        names = (f"{what}_period", f"{what}_offset")
        if inner.get("model_type") != "jamba" or not all(isinstance(inner.get(name), int) for name in names):
            continue

        def here(layer: int, period: int, offset: int) -> bool:
            return layer % period == offset

        wanted = [here(layer, inner[names[0]], inner[names[1]]) for layer in kept]
        periods = sorted(range(1, max(layers, len(kept)) + 2), key=lambda period: period != inner[names[0]])
        choices = ((period, offset) for period in periods for offset in range(period))
        what_for = "attention" if what == "attn_layer" else "experts"
        changes |= _first_choice(names, choices, here, wanted, f"{what_for} at a fixed period")
    return changes


def _first_choice(
    names: Sequence[str], choices: Any, holds: Callable[..., bool], wanted: list[bool], what: str
) -> dict[str, Any]:
    """The first choice of values that gives the wanted pattern over the new layers."""
    for values in choices:
        if [holds(layer, *values) for layer in range(len(wanted))] == wanted:
            return dict(zip(names, values))
    raise _Unfit(f"its config can only say {what}, and these layers follow no such pattern")


def _gpt_neo_attention(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """GPT-Neo expands ``attention_types`` to ``attention_layers`` and ignores the latter when it loads."""
    if not isinstance(inner.get("attention_layers"), (list, tuple)) or "attention_types" not in inner:
        return {}
    return {"attention_types": [[[inner["attention_layers"][layer]], 1] for layer in kept]}


def _recurrent_cycle(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """RecurrentGemma repeats ``block_types``; written out for every layer it is repeated once."""
    cycle = inner.get("block_types")
    if not isinstance(cycle, (list, tuple)) or not cycle:
        return {}
    return {"block_types": [cycle[layer % len(cycle)] for layer in kept]}


def _shared_keys(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Gemma 3n and 4: the last layers read keys and values of the last earlier layer of their kind."""
    shared = inner.get("num_kv_shared_layers")
    if not shared:
        return {}
    kinds, first = inner["layer_types"], layers - shared
    for layer in kept:
        if layer < first:
            continue
        source = max((i for i in range(first) if kinds[i] == kinds[layer]), default=None)
        if source is None or source not in kept:
            raise _Unfit(f"layer {layer} reads the keys and values of layer {source}, which would go")
    return {"num_kv_shared_layers": sum(layer >= first for layer in kept)}


def _shared_index(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Sparse attention: a layer of type shared uses the index of the last full layer before it."""
    kinds = inner.get("indexer_types")
    if not isinstance(kinds, (list, tuple)):
        return {}
    for layer in kept:
        source = max((i for i in range(layer + 1) if kinds[i] == "full"), default=None)
        if source is not None and source not in kept:
            raise _Unfit(f"layer {layer} uses the index of layer {source}, which would go")
    return {}


def _shared_blocks(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Zamba: hybrid layers share blocks whose weights lie with the first of them, and take turns with several."""
    if inner.get("model_type") not in ("zamba", "zamba2"):
        return {}
    for layer, kind in enumerate(inner["layers_block_type"]):
        if kind == "hybrid" and layer not in kept:
            raise _Unfit(f"layer {layer} is a hybrid layer, whose block others share")
    return {}


def _ngram_layers(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Qwen 4: the layers listed in ``ple_layer_ids``, counted from 1, own parts of one table by their rank."""
    listed = inner.get("ple_layer_ids")
    if not isinstance(listed, (list, tuple)):
        return {}
    lost = [number - 1 for number in listed if number - 1 not in kept]
    if lost:
        raise _Unfit(f"layer {lost[0]} owns a part of a table that all n-gram layers share")
    return {"ple_layer_ids": [list(kept).index(number - 1) + 1 for number in listed]}


def _residual_scale(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """MiniCPM3 divides ``scale_depth`` by the root of the layer count; what each layer does must stay the same."""
    if inner.get("model_type") != "minicpm3":
        return {}
    return {"scale_depth": inner["scale_depth"] * math.sqrt(len(kept) / layers)}


def _some_attention(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """transformers reads the length of its cache from an attention layer and fails where a hybrid has none left."""
    kinds = inner.get("layer_types") or inner.get("layers_block_type")
    if inner.get("model_type") == "jamba":
        period, offset = inner["attn_layer_period"], inner["attn_layer_offset"]
        kinds = ["full_attention" if i % period == offset else "linear_attention" for i in range(layers)]
    elif isinstance(inner.get("attn_layer_indices"), (list, tuple)):
        kinds = ["full_attention" if i in inner["attn_layer_indices"] else "linear_attention" for i in range(layers)]
    if not isinstance(kinds, (list, tuple)):
        return {}
    attending = {layer for layer, kind in enumerate(kinds) if kind not in _WITHOUT_ATTENTION}
    if attending and attending.isdisjoint(kept):
        raise _Unfit("no attention layer would be left, and transformers cannot run such a hybrid")
    return {}


def _predicting_layers(inner: Fields, layers: int, kept: Sequence[int]) -> dict[str, Any]:
    """Layers behind the last that predict further tokens are no part of the model that transformers builds."""
    return {"num_nextn_predict_layers": 0} if inner.get("num_nextn_predict_layers") else {}


RULES: tuple[Rule, ...] = (
    _refusals,
    _counts,
    _lists,
    _ids,
    _leading,
    _per_layer_overrides,
    _sparse_step,
    _ernie_experts,
    _jamba_periods,
    _gpt_neo_attention,
    _recurrent_cycle,
    _shared_keys,
    _shared_index,
    _shared_blocks,
    _ngram_layers,
    _residual_scale,
    _some_attention,
    _predicting_layers,
)
