"""How `Width` is carried out: rows and columns of projections left out, and the stream turned and cut (SliceGPT).

Neurons: rows of what reads and columns of what writes. What is left equals the model whose outputs' columns of dropped
neurons are zero. Groups: a key and a value head, and the query heads that ask them, likewise.

Hidden size (Ashkboos et al. 2024, arXiv 2401.15024, with one rotation for all layers, so that the checkpoint stays
stock): norms' weights g are folded into what reads them and become 1; with Q (d, k) the embedding becomes E Q, what
writes W becomes Q^T W, and what reads becomes W diag(g) Q sqrt(d/k), since the smaller norm yields sqrt(k) x_k/|x_k|
where sqrt(d) x_k/|x| is wanted; the norms' epsilon grows by d/k. At k = d it is the whole model.

Tied embeddings keep one matrix: with D = sqrt(g/mean(g)) of the last norm the stream is Q^T D x, the embedding E D Q is
the head as well, what reads begins with D^-1, and the last norm's weights are mean(g) sqrt(d/k). At k = d this differs
from the whole model by |D x|/|x| of each token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from lmprune.cuts.beside import Beside
from lmprune.cuts.plan import Plan
from lmprune.cuts.width import Width
from lmprune.errors import ModelError, RecipeError, told_as
from lmprune.models.fields import Fields, decoder_fields, decoder_section
from lmprune.models.mlps import HALVES, OUT, TIMES, WITH, Mlp, Projection, Source, mlps, narrowed, neuron_field

if TYPE_CHECKING:
    from torch import Tensor, nn

Change = Callable[["Tensor"], "Tensor"]

HEADS, GROUPS = "num_attention_heads", "num_key_value_heads"
SLICED = frozenset(
    """arcee aria_text cwm dots1 ernie4_5 gemma glm glm4_moe gpt_oss granite granite_swa internlm3 iquestcoder llama
    mellum ministral ministral3 mistral mixtral phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3
    solar_open""".split()
)
"""Types of which it was measured that a smaller hidden size is exact at k = d, and where directions are empty."""
READS_HEAD_DIM = SLICED | frozenset(
    """cohere cohere2 cohere2_moe cohere_compass_text ernie4_5_moe exaone4 exaone_moe falcon_h1 gemma2 gemma3_text glm4
    granitemoe hy_v3 hyperclovax llama4_text nanochat nemotron phimoe starcoder2 vaultgemma""".split()
)
"""Types of which it was measured that their class reads head_dim where the config says it, and whose groups can go."""
COMPUTES_HEAD_DIM = frozenset({"helium", "stablelm"})
"""Types of which it was measured that their class does not."""
_POST_NORM = "norms stand behind its sublayers as well, and what they multiply by cannot be turned"
NOT_SLICED: dict[str, str] = dict.fromkeys(
    ("gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "olmo2", "olmo3",
     "flex_olmo", "glm4", "exaone4", "afmoe", "vaultgemma", "beam", "hyperclovax"), _POST_NORM)  # fmt: skip
"""Types of which it is known why not."""
MINUS_ONE = frozenset({"gemma"})
"""Types that store a norm's weights minus one."""
SCALED = frozenset({"gemma"})
"""Types that multiply embeddings by the root of the hidden size."""
_EPSILON = "rms_norm_eps"
_READS_INPUT = re.compile(r"self_attn\.(q|k|v|qkv)_proj\.weight")
_READS_MIDDLE = re.compile(r"(mlp|block_sparse_moe)\.(gate|router|shared_expert_gate)\.weight")
_WRITES = re.compile(r"self_attn\.o_proj\.(weight|bias)")
_STAYS = re.compile(
    r"self_attn\.((q|k)_norm\.weight|(q|k|v|qkv)_proj\.bias|sinks)|.*(gate\.e_score_correction_bias|router\.bias)"
)
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


# --- the file ---------------------------------------------------------------------------------------------------------


def width_of(
    tensors: Mapping[str, Tensor], *, ffn: int | None = None, hidden: int | None = None, groups: int | None = None
) -> Width:
    """The part of those sizes with the file of ``tensors``, named as `lmprune.cuts.width` says, in memory."""
    from safetensors.torch import save

    held = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    return Width(Beside.made(save(held), Width.kind), ffn=ffn, hidden=hidden, groups=groups)


@lru_cache(4)
def tensors_of(beside: Beside) -> Mapping[str, Tensor]:
    """What the file of a part holds, read once; errors as `lmprune.models.tensors.tensors_beside`."""
    from lmprune.models.tensors import tensors_beside

    return tensors_beside(beside)


def _indices(held: Mapping[str, Tensor], name: str, shape: tuple[int, ...], below: int, what: str) -> Tensor:
    """Numbers from the file, each row ascending.

    Raises:
        RecipeError: they are missing, or do not fit.
    """
    import torch

    found = held.get(name)
    if found is None:
        raise RecipeError(f"the file of this width lacks {name}, which the plan needs. Make the recipe again")
    if tuple(found.shape) != shape or found.dtype.is_floating_point:
        raise RecipeError(
            f"{name} of this width is {found.dtype} of shape {list(found.shape)}, and {what} needs whole numbers of "
            f"shape {list(shape)}. Make the recipe again"
        )
    found = found.long()
    rising = bool((found.diff(dim=-1) > 0).all()) if shape[-1] > 1 else True
    if not rising or int(found.min()) < 0 or int(found.max()) >= below:
        raise RecipeError(f"{name} of this width does not name {what} from 0 to {below - 1}, ascending")
    return found.to(torch.int64)


# --- config -----------------------------------------------------------------------------------------------------------


def fields(part: Width, plan: Plan, config: Fields) -> dict[str, Any]:
    """The sizes; head_dim is written out, since a class would compute it from sizes that are others now.

    Raises:
        ModelError: the config has no field for them, or they are larger than what is there.
    """
    inner = decoder_fields(config)
    kind = str(inner.get("model_type"))
    if config.get("quantization_config"):
        raise ModelError("a quantised model cannot be narrowed: its numbers share scales. Narrow first, then quantise")
    changes: dict[str, Any] = {}
    if part.ffn is not None:
        experts = any(
            tensors_of(part.beside)[name].dim() == 2 for name in tensors_of(part.beside) if "neurons." in name
        )
        name = neuron_field(config, experts)
        if name is None:
            raise ModelError(f"{kind}: its config has no field for the width of its MLPs. Drop layers instead")
        if isinstance(inner.get(name), int) and kind not in WITH:
            _check_size(f"ffn {part.ffn}", part.ffn * TIMES.get(kind, 1), inner[name], f"{name} is")
        changes |= {name: part.ffn * TIMES.get(kind, 1), **WITH.get(kind, {})}
    if part.hidden is not None:
        check_slicing(config)
    if part.groups is not None or part.hidden is not None:
        changes["head_dim"] = _head_dim(inner)
    if part.groups is not None:
        heads, groups = _heads(inner)
        _check_size(f"groups {part.groups}", part.groups, groups, "key-value groups:")
        changes |= {HEADS: heads // groups * part.groups, GROUPS: part.groups}
    if part.hidden is not None:
        size, k = inner["hidden_size"], part.hidden
        _check_size(f"hidden {k}", k, size, "hidden_size is")
        heads = part.groups * (_heads(inner)[0] // _heads(inner)[1]) if part.groups is not None else inner[HEADS]
        if k % heads:
            raise ModelError(
                f"hidden {k}: transformers wants a multiple of the {heads} heads. Give one, as {k - k % heads or heads}"
            )
        epsilon = inner[_EPSILON] if kind in SCALED else inner[_EPSILON] * size / k
        changes |= {"hidden_size": k, _EPSILON: epsilon}
    section = decoder_section(config)
    return {f"{section}.{name}" if section else name: value for name, value in changes.items()}


def _check_size(said: str, size: int, most: int, what: str) -> None:
    if size > most:
        raise ModelError(f"{said} is more than the model has: {what} {most}. Give a smaller width")


def _heads(inner: Fields) -> tuple[int, int]:
    """Query heads and key-value groups."""
    kind, heads = inner.get("model_type"), inner.get(HEADS)
    groups = inner.get(GROUPS)
    if type(heads) is not int or type(groups) is not int or not 0 < groups <= heads or heads % groups:
        raise ModelError(f"{kind}: its config does not say how many key-value groups there are. Drop layers instead")
    return heads, groups


def _head_dim(inner: Fields) -> int:
    """The width of a head, which the class must read from the config."""
    found, kind = inner.get("head_dim"), inner.get("model_type")
    if kind in COMPUTES_HEAD_DIM:
        raise ModelError(
            f"{kind}: transformers computes its head_dim from other sizes, so that heads would change with them. "
            "Narrow its MLPs, or drop layers"
        )
    if kind not in READS_HEAD_DIM:
        raise ModelError(
            f"{kind}: its key-value groups cannot be cut: it was not measured to be exact there. Narrow its MLPs, or "
            "drop layers"
        )
    if type(found) is int and found > 0:
        return found
    return int(inner["hidden_size"]) // int(inner[HEADS])


def check_slicing(config: Fields) -> None:
    """Refuse a type whose hidden size cannot be cut.

    Raises:
        ModelError: with the reason.
    """
    inner = decoder_fields(config)
    kind = str(inner.get("model_type"))
    if kind in SLICED:
        return
    if kind in NOT_SLICED:
        reason = NOT_SLICED[kind]
    elif not any(name in inner for name in (_EPSILON, "norm_eps")):
        reason = "its norms are LayerNorm, which takes the mean off, and directions cannot be turned under it"
    else:
        reason = "it was not measured to be exact there"
    raise ModelError(f"{kind}: its hidden size cannot be cut: {reason}. Narrow its MLPs, or drop layers")


# --- tensors ----------------------------------------------------------------------------------------------------------


def changes(part: Width, plan: Plan, source: Source) -> dict[str, Change]:
    """By name in the uncut model, what becomes of each tensor that changes.

    Raises:
        ModelError: this architecture cannot be narrowed so; says why.
        RecipeError: the part's file does not fit the model.
    """
    found: dict[str, Change] = {}
    for each in (_of_neurons, _of_groups, _of_hidden):
        for name, change in each(part, plan, source):
            found[name] = _both(found[name], change) if name in found else change
    return {name: _typed(change) for name, change in found.items()}


def _both(first: Change, then: Change) -> Change:
    return lambda tensor: then(first(tensor))


def _typed(change: Change) -> Change:
    """The result in the type that the tensor had, so that a live model is the one that is written."""
    return lambda tensor: change(tensor).to(tensor.dtype).contiguous()


def _of_neurons(part: Width, plan: Plan, source: Source) -> Iterator[tuple[str, Change]]:
    if part.ffn is None:
        return
    found = narrowed(source)
    each = min(mlp.neurons for mlp in found if not mlp.shared)
    for mlp in found:
        if mlp.layer in plan.dropped:
            continue
        kept = kept_neurons(part, mlp, each)
        for name, projection in mlp.tensors.items():
            if projection.axis is not None:
                yield name, _selecting(kept, projection, mlp)


def kept_neurons(part: Width, mlp: Mlp, each: int) -> Tensor:
    """The neurons that stay of an MLP: (n,), or (experts, n); ``each`` is how many those have that are not shared.

    Raises:
        RecipeError: the file does not say it, or says what does not fit.
    """
    assert part.ffn is not None
    name, size = f"neurons.{mlp.layer}", part.ffn
    if mlp.shared:
        name, size = f"shared.{mlp.layer}", part.ffn * (mlp.neurons // each)
    shape = (size,) if mlp.experts is None else (mlp.experts, size)
    return _indices(tensors_of(part.beside), name, shape, mlp.neurons, f"neurons of layer {mlp.layer}")


def _selecting(kept: Tensor, projection: Projection, mlp: Mlp) -> Change:
    """Only what belongs to the neurons ``kept``; a half of twice as many lies behind the other, or between."""
    import torch

    if projection.expert is not None:
        kept = kept[projection.expert]
    if projection.role == HALVES and projection.interleaved:
        kept = torch.stack([2 * kept, 2 * kept + 1], -1).flatten(-2)
    elif projection.role == HALVES:
        kept = torch.cat([kept, kept + mlp.neurons], -1)
    axis = projection.axis
    assert axis is not None

    def change(tensor: Tensor) -> Tensor:
        if kept.dim() == 1:
            return tensor.index_select(axis, kept.to(tensor.device))
        return torch.stack([each.index_select(axis, row.to(tensor.device)) for each, row in zip(tensor, kept)])

    return change


_ATTENTION = re.compile(r"self_attn\.(?:(q|k|v|qkv|o)_proj\.(weight|bias)|(sinks))")


def _of_groups(part: Width, plan: Plan, source: Source) -> Iterator[tuple[str, Change]]:
    if part.groups is None:
        return
    inner = decoder_fields(source.config)
    (heads, groups), size = _heads(inner), _head_dim(inner)
    seen: dict[int, set[str]] = {}
    for name, (layer, rest) in source.within.items():
        match = _ATTENTION.fullmatch(rest)
        if layer in plan.dropped or not rest.startswith(("self_attn.", "attn", "attention")):
            continue
        if match is None:
            if rest not in ("self_attn.q_norm.weight", "self_attn.k_norm.weight") or source.shapes[name] != (size,):
                raise ModelError(f"{source.type}: lmprune does not know what {name} does, so heads stay. Drop layers")
            continue
        kept = _indices(tensors_of(part.beside), f"groups.{layer}", (part.groups,), groups, f"groups of layer {layer}")
        what = match[1] or match[3]
        seen.setdefault(layer, set()).add(what)
        if what == "o" and match[2] == "bias":
            continue
        yield name, _keeping_heads(what, kept, heads, groups, size)
    for layer in plan.kept:
        if not {"o"} < seen.get(layer, set()):
            raise ModelError(
                f"{source.type}: layer {layer} has no attention of the usual names, so its groups cannot be left out. "
                "Drop layers instead"
            )


def _keeping_heads(what: str, kept: Tensor, heads: int, groups: int, size: int) -> Change:
    """Only the heads of the groups ``kept``: rows of what reads and of biases, columns of what writes."""
    import torch

    asks = (kept[:, None] * (heads // groups) + torch.arange(heads // groups)).flatten()
    places = {"q": asks, "o": asks, "sinks": asks, "k": kept, "v": kept}
    places["qkv"] = torch.cat([asks, heads + kept, heads + groups + kept])
    wanted = places[what]
    rows = wanted if what == "sinks" else (wanted[:, None] * size + torch.arange(size)).flatten()
    axis = -1 if what == "o" else 0
    return lambda tensor: tensor.index_select(axis, rows.to(tensor.device))


# --- hidden size ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slicing:
    """The maps of one cut of the hidden size, from d to k directions.

    Attributes:
        rotation: Q (d, k).
        source: the uncut model's tensors.
    """

    rotation: Tensor
    source: Source

    @classmethod
    def of(cls, part: Width, source: Source) -> Slicing:
        """That of a part.

        Raises:
            RecipeError: its rotation is none, or does not fit.
        """
        import torch

        size = int(decoder_fields(source.config)["hidden_size"])
        found = tensors_of(part.beside).get("rotation")
        if found is None or tuple(found.shape) != (size, part.hidden) or not found.dtype.is_floating_point:
            what = "none" if found is None else f"{found.dtype} of shape {list(found.shape)}"
            raise RecipeError(f"the rotation of this width is {what} and not of shape {[size, part.hidden]}")
        rotation = found.double()
        if not torch.allclose(rotation.T @ rotation, torch.eye(rotation.shape[1], dtype=torch.float64), atol=1e-3):
            raise RecipeError("the rotation's columns are not orthonormal. Make the recipe again")
        return cls(found.float(), source)

    @property
    def grown(self) -> float:
        """sqrt(d/k)."""
        return float((self.rotation.shape[0] / self.rotation.shape[1]) ** 0.5)

    @cached_property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.source.config.get("tie_word_embeddings"))

    def weights(self, name: str) -> Tensor:
        """A norm's weights, as it multiplies by them, in float32."""
        return self.source.read(name).float() + (1.0 if self.source.type in MINUS_ONE else 0.0)

    @cached_property
    def stream(self) -> Tensor:
        """D (d,), by which the stream is scaled before it is turned: ones where nothing is tied.

        Raises:
            ModelError: a weight of the last norm is not positive, so that it has no root.
        """
        final = self.weights(self.final)
        if not self.tied:
            return final.new_ones(final.shape)
        if not bool((final > 0).all()):
            raise ModelError(
                f"{self.source.type}: its hidden size cannot be cut: its embeddings are tied, and {self.final} has "
                "weights that are not positive. Narrow its MLPs, or drop layers"
            )
        return (final / final.mean()).sqrt()

    @cached_property
    def final(self) -> str:
        """The name of the last norm's weights."""
        names = [name for name in self.source.shapes if re.search(r"(^|\.)norm\.weight$", name)]
        names = [name for name in names if name not in self.source.within]
        if len(names) != 1:
            raise ModelError(f"{self.source.type}: lmprune does not find its last norm, so its hidden size stays")
        return names[0]

    @property
    def written(self) -> float:
        """What writers grow by: embeddings that are scaled by sqrt(hidden size) make the whole stream smaller."""
        return 1 / self.grown if self.source.type in SCALED else 1.0

    def reads(self, norm: str | None) -> Tensor:
        """(d, k): what stands behind the weights of what reads the norm of that name."""
        gain = self.weights(norm) if norm is not None else self.stream.new_ones(self.stream.shape)
        return (gain / self.stream)[:, None] * self.rotation * self.grown

    @cached_property
    def writes(self) -> Tensor:
        """(d, k): D Q, what the stream's coordinates are multiplied with."""
        return self.stream[:, None] * self.rotation


def _of_hidden(part: Width, plan: Plan, source: Source) -> Iterator[tuple[str, Change]]:
    if part.hidden is None:
        return
    check_slicing(source.config)
    maps = Slicing.of(part, source)
    maps.stream  # noqa: B018 - refused before anything is read
    in_mlps = {name: projection for mlp in mlps(source) for name, projection in mlp.tensors.items()}
    for name in source.shapes:
        if name not in source.within:
            yield name, _outside(name, maps)
            continue
        layer, rest = source.within[name]
        if layer in plan.dropped:
            continue
        stem = name.removesuffix(rest)
        if rest in _NORMS:
            yield name, _filled(maps, 1.0, part.hidden)
        elif _READS_INPUT.fullmatch(rest):
            yield name, _reading(maps, stem + _NORMS[0])
        elif _READS_MIDDLE.fullmatch(rest):
            yield name, _reading(maps, stem + _NORMS[1])
        elif _WRITES.fullmatch(rest):
            yield name, _writing(maps, -1 if rest.endswith("bias") else -2)
        elif name in in_mlps:
            yield from _in_mlp(name, in_mlps[name], maps, stem)
        elif not _STAYS.fullmatch(rest):
            raise ModelError(
                f"{source.type}: lmprune does not know what {name} does with the hidden state, so its size stays. "
                "Narrow its MLPs, or drop layers"
            )


def _in_mlp(name: str, projection: Projection, maps: Slicing, stem: str) -> Iterator[tuple[str, Change]]:
    # The stream's coordinates lie along the axis that is not the neurons'; of a bias, along the last.
    axis = -2 if projection.axis == -1 else -1
    if projection.role == OUT:
        yield name, _writing(maps, axis)
    elif not name.endswith("bias"):
        yield name, _reading(maps, stem + _NORMS[1], axis)


def _outside(name: str, maps: Slicing) -> Change:
    """What becomes of a tensor that is no layer's."""
    if name == maps.final:
        # The head cannot take them where it is the embedding.
        value = float(maps.weights(name).mean()) * maps.grown if maps.tied else 1.0
        return _filled(maps, value, maps.rotation.shape[1])
    if re.search(r"(^|\.)embed_tokens\.weight$", name) or (maps.tied and name.endswith("lm_head.weight")):
        return lambda tensor: _along(tensor, maps.writes, -1)
    if name.endswith("lm_head.weight"):
        return _reading(maps, maps.final)
    raise ModelError(
        f"{maps.source.type}: lmprune does not know what {name} does with the hidden state, so its size stays. "
        "Narrow its MLPs, or drop layers"
    )


def _filled(maps: Slicing, value: float, size: int) -> Change:
    stored = value - (1.0 if maps.source.type in MINUS_ONE else 0.0)
    return lambda tensor: tensor.new_full((size,), stored)


def _reading(maps: Slicing, norm: str, axis: int = -1) -> Change:
    """W diag(g) D^-1 Q sqrt(d/k), for W with the stream's coordinates along ``axis``."""
    if norm not in maps.source.shapes:
        raise ModelError(f"{maps.source.type}: there is no {norm}, so its hidden size stays. Narrow its MLPs")
    return lambda tensor: _along(tensor, maps.reads(norm), axis)


def _writing(maps: Slicing, axis: int) -> Change:
    """Q^T D W, for W, or a bias, with the stream's coordinates along ``axis``."""
    return lambda tensor: _along(tensor, maps.writes * maps.written, axis)


def _along(tensor: Tensor, turn: Tensor, axis: int) -> Tensor:
    """``tensor`` with (d, k) applied along one axis, in float32."""
    return (tensor.float().movedim(axis, -1) @ turn.to(tensor.device)).movedim(-1, axis)


# --- the live model ---------------------------------------------------------------------------------------------------


def live(part: Width, plan: Plan, model: nn.Module) -> None:
    """Narrow a live model, which has lost the dropped layers already, in place and for good.

    Tensors that do not change stay the model's own. What modules remember of sizes is read off an empty model of the
    narrowed config.

    Raises:
        ModelError: it cannot be narrowed; then it is as it was.
    """
    import torch
    from torch import nn

    from lmprune.models.in_files import placed
    from lmprune.models.stack import decoder_configs, find_stack, set_field, unwrapped

    inner = unwrapped(model)
    if inner is not model:
        raise ModelError("a model with an adapter around it cannot be narrowed. Merge the adapter first")
    if getattr(inner, "hf_quantizer", None) is not None or any(p.is_meta for p in inner.parameters()):
        raise ModelError("only a model that is in memory as a whole, and not quantised, can be narrowed while it lives")
    source, names = _live_source(inner, plan, find_stack(inner).path)
    wanted = [(config, fields(part, plan, config.to_dict())) for config in decoder_configs(inner)]
    narrow = changes(part, plan, source)
    with torch.no_grad():
        made = {names[old]: placed(inner, change(source.read(old))) for old, change in narrow.items()}
    before = [(config, name, getattr(config, name, None)) for config, found in wanted for name in found]
    try:
        for config, found in wanted:
            for name, value in found.items():
                set_field(config, name, value)
        with torch.device("meta"), told_as(ModelError, "no model can be made of the narrowed config"):
            like = type(inner)(inner.config)
    except ModelError:
        for config, name, value in before:
            set_field(config, name, value)
        raise
    for name, tensor in made.items():
        path, _, leaf = name.rpartition(".")
        grad = inner.get_parameter(name).requires_grad
        setattr(inner.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=grad))
    _remember(inner, like)
    inner.tie_weights()


def live_source(model: Any) -> Source:
    """The parameters of a live model that nothing is cut from."""
    from lmprune.models.stack import find_stack

    stack = find_stack(model)
    return _live_source(model, Plan(len(stack.layers)), stack.path)[0]


def _live_source(model: Any, plan: Plan, path: str) -> tuple[Source, dict[str, str]]:
    """The model's parameters under the uncut model's numbers, and what they are called here."""
    names, within = {}, {}
    for name, _ in model.named_parameters():
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        if name.startswith(f"{path}."):
            layer = plan.kept[int(number)]
            within[old := f"{path}.{layer}.{rest}"] = (layer, rest)
        else:
            old = name
        names[old] = name
    shapes = {old: tuple(model.get_parameter(name).shape) for old, name in names.items()}
    read = lambda old: model.get_parameter(names[old]).detach()  # noqa: E731
    return Source(model.config.to_dict(), shapes, read, within), names


_PLAIN = (bool, int, float, str, tuple)


def _remember(model: Any, like: nn.Module) -> None:
    """Have each module remember of sizes what its twin in ``like`` remembers."""
    for path, twin in like.named_modules():
        module = model.get_submodule(path)
        for name, value in twin.__dict__.items():
            mine = module.__dict__.get(name)
            if name != "training" and isinstance(value, _PLAIN) and type(mine) is type(value) and mine != value:
                setattr(module, name, value)
        if "embed_scale" in module._buffers and hasattr(module, "scalar_embed_scale"):
            module.embed_scale = module.embed_scale.new_tensor(module.scalar_embed_scale)
