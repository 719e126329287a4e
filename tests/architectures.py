"""Tiny random models of every causal language model that transformers knows, and what becomes of each when pruned."""

from __future__ import annotations

import logging
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lmprune.cuts.plan import Plan
from lmprune.errors import HostError, LmpruneError, ModelError
from lmprune.files import write_json, write_text
from lmprune.forward.calls import skipping
from lmprune.models.checkpoint import read_config
from lmprune.models.cut import open_cut
from lmprune.models.fields import REFUSED, apply_fields, changed_fields, fitting_sets, layer_count
from lmprune.models.loading import decoder_config, load_config, load_model, model_class
from lmprune.models.stack import drop_layers
from lmprune.writing.base_folder import write_base_folder
from lmprune.writing.copying import copy_checkpoint
from lmprune.writing.mergekit import run_mergekit
from lmprune.writing.support import DATA, Row, document, rows

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where the tiny checkpoints go: a file system in memory, if there is one."""

LAYERS = 8
IRREGULAR = (0, 1, 2, 6, 7)
CONTIGUOUS = (0, 1, 2, 3, 6, 7)
VOCABULARY = 96
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

COUNT_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")

SMALL: dict[str, Any] = {
    **dict.fromkeys(COUNT_NAMES, LAYERS),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_dim", "dim_model", "emb_dim", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size", "attention_hidden_size"), 32),
    **dict.fromkeys(
        ("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dff", "dim_ff", "d_inner"), 48
    ),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "feed_forward_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(
        ("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "attention_head_size", "dim_head", "d_head"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "index_head_dim", "kv_channels", "linear_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    "qk_nope_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "rotary_dim": 4,
    "index_n_heads": 2,
    "index_topk": 64,
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(
        ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), 128),
    "context_length": 128,
    "encoder_layers": LAYERS,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window_size"), 6),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "laurel_rank", "adapter_rank"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "attention_chunk_size"), 8),
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Names of sizes and the small value each takes; names that a config class lacks are left out."""


def special(model_type: str) -> dict[str, Any]:
    """What a model type needs besides the small sizes."""
    return SPECIAL.get(model_type, {})


_SAME_HEADS = {"num_key_value_heads": 4}
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "linear_attention"] * 2

_BERTS = """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl""".split()

SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _BERTS},
    **dict.fromkeys(("axk1", "axk2", "glm_moe_dsa", "dots3_note_text", "glm4_moe_lite"), _SAME_HEADS),
    "bailing_hybrid": _SAME_HEADS | {"layer_types": ["linear_attention", "full_attention"] * 4},
    "bamba": _MAMBA_HEADS | {"attn_layer_indices": [1, 4, 6]},
    "deepseek_v2": _SAME_HEADS | {"first_k_dense_replace": 1},
    "deepseek_v3": _SAME_HEADS | {"first_k_dense_replace": 1},
    "deepseek_v32": _SAME_HEADS | {"first_k_dense_replace": 1},
    "gemma3": {"vision_config": _VISION | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention", "full_attention"],
    },
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "gemma4_unified_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm4_moe": {"first_k_dense_replace": 1},
    "granitemoehybrid": _MAMBA_HEADS | {"layer_types": ["linear_attention", "full_attention"] * 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _SAME_HEADS | {"layer_types": ["linear_attention", "full_attention"] * 4},
    "longcat_flash": _SAME_HEADS | {"num_hidden_layers": 16},
    "minicpm3": _SAME_HEADS,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16},
    "youtu": _SAME_HEADS,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1, 7],
        "ple_embed_dim": 32,
        "hc_lowrank": 4,
        "ngram_vocab_size_base": 97,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 2,
        "layer_types": ["linear_attention", "indexed_attention"] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 4]]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4},
    },
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
    },
    "qwen2_moe": {"mlp_only_layers": [1, 7]},
    "qwen3_moe": {"mlp_only_layers": [1, 7]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX", "is_decoder": True},
    "zamba": {
        "layers_block_type": _HYBRID,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {"layers_block_type": _HYBRID, "num_mem_blocks": 1, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "git": {"vision_config": _VISION | {"image_size": 28, "patch_size": 14}},
    "llama4": {"vision_config": _VISION | {"image_size": 28, "patch_size": 14}},
    "emu3": {
        "vq_config": {
            "codebook_size": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [1],
            "hidden_size": 32,
        },
        "vocabulary_map": {"<image>": 90, **{f"<|visual token {i:06d}|>": 60 + i for i in range(16)}},
    },
    "mllama": {
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 32,
            "image_size": 28,
            "patch_size": 14,
            "intermediate_layers_indices": [0],
        },
        "text_config": {"cross_attention_layers": [1, 4, 6]},
        "image_token_index": 95,
    },
    "dots3_note": {
        "vision_config": _VISION
        | {
            "num_hidden_layers": 2,
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
            "moe_intermediate_size": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "mlp_layer_types": ["dense", "sparse"],
        },
        "audio_config": _VISION | {"adapter_input_size": 16, "adapter_out_dim": 32, "downsample_hidden_size": 8},
        "text_config": _SAME_HEADS,
    },
}
WITH_IMAGES = frozenset({"emu3", "mllama", "dots3_note"})
"""Types whose checkpoints always hold the image part, which their class of causal language model leaves out."""


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of that type, small enough to run anywhere, with `LAYERS` layers where the type allows."""
    cls = CONFIG_MAPPING[model_type]
    values = special(model_type) | changes
    subs = dict(getattr(cls, "sub_configs", {}))
    if "text_config" in subs:
        inner = subs["text_config"]
        if inner.__name__ == "AutoConfig":
            inner = type(cls().text_config)
        text = {k: v for k, v in SMALL.items() if _takes(inner, k)} | special(inner.model_type)
        return cls(**({"text_config": text | values.pop("text_config", {})} | values))
    return cls(**({k: v for k, v in SMALL.items() if _takes(cls, k)} | values))


def _takes(cls: Any, name: str) -> bool:
    known = getattr(cls, "__dataclass_fields__", {})
    return name in known


def tiny_model(config: Any, *, seed: int = 0) -> Any:
    """A random model of that config, with weights large enough that every layer matters."""
    torch.manual_seed(seed)
    if config.model_type in WITH_IMAGES:
        model = AutoModelForImageTextToText.from_config(config).eval()
    else:
        cls = model_class(config)
        model = cls(decoder_config(config, cls)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim >= 2:
                parameter.normal_(0.0, 0.5 / parameter.shape[-1] ** 0.5, generator=generator)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def batch() -> torch.Tensor:
    """Token ids (2, 12) within every tiny vocabulary."""
    return (torch.arange(24).view(2, 12) * 7 + 3) % (VOCABULARY - 8) + 4


RIGHT = "right"
TOLERANCE = 1e-5
WAYS = ("in_memory", "loaded", "copied")
WITHOUT_CACHE = frozenset({"fuyu", "whisper"})
"""Types whose whole tiny model already generates something else, or fails, with a cache."""


@dataclass
class Outcome:
    """What became of one architecture under one kept set: ``right``, or how it failed and the reason.

    Verdicts start with ``right``, ``refused``, ``raises`` or ``wrong``; ``untested`` where nothing was tried.
    """

    model_type: str
    kept: tuple[int, ...]
    in_memory: str = "untested"
    loaded: str = "untested"
    copied: str = "untested"
    plain_mergekit: str = "untested"
    mergekit_with_base: str = "untested"

    def set_ours(self, verdict: str) -> Outcome:
        """Give our own three ways the same verdict."""
        self.in_memory = self.loaded = self.copied = verdict
        return self

    @property
    def silently_wrong(self) -> list[str]:
        """Our own ways that gave a wrong model without a word."""
        return [f"{way}: {getattr(self, way)}" for way in WAYS if getattr(self, way).startswith(("wrong", "raises"))]


class Wrong(Exception):
    """A checkpoint that loads without an error and lacks something."""


def examine(
    model_type: str, sets: Sequence[tuple[int, ...]] = (IRREGULAR, CONTIGUOUS), *, mergekit: bool = False
) -> list[Outcome]:
    """Prune a tiny model of that type in every way, compare with the whole model whose layers are skipped.

    Where one of the kept ``sets`` is refused, the nearest that fits is tried as well.
    """
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        folder = Path(scratch) / "base"
        try:
            if model_type in REFUSED:
                raise ModelError(REFUSED[model_type])
            config = tiny_config(model_type)
            plain = config.to_dict()
            layers = layer_count(plain)
            tried = _kept_sets(plain, layers, sets)
            if not any(tried.values()):
                changed_fields(plain, IRREGULAR)
            tiny_model(config).save_pretrained(folder)
        except LmpruneError as exc:
            refused = Outcome(model_type, IRREGULAR).set_ours(f"refused: {exc}")
            if mergekit:
                refused.plain_mergekit = _merged_although_refused(model_type, folder)
            return [refused]
        except Exception as exc:  # whatever transformers raises on a config that it cannot build
            return [Outcome(model_type, IRREGULAR, in_memory=f"untested: {_line(exc)}")]
        return [_examine_one(model_type, folder, Plan.from_kept(layers, kept), mergekit) for kept in tried]


def _merged_although_refused(model_type: str, folder: Path) -> str:
    """What plain mergekit makes of a type that lmprune refuses; ``untested`` where nothing can be compared."""
    if model_type in TOO_LARGE:
        return "untested: no tiny model"
    plan = Plan.from_kept(LAYERS, IRREGULAR)
    try:
        if not folder.is_dir():
            tiny_model(tiny_config(model_type)).save_pretrained(folder)
        whole = _load(folder)
    except Exception as exc:  # whatever transformers raises on what it cannot build
        return f"untested: transformers cannot build it: {_line(exc)}"
    try:
        with skipping(whole, plan.dropped):
            wanted = _logits(whole)
    except Exception:  # its layers cannot be skipped, so only what is missing from the result can be judged
        wanted = None
    return _verdict(lambda: _merged(folder, plan, folder.with_name("plain")), wanted)


TOO_LARGE = frozenset({"blt", "inkling2_text", "moshi"})
"""Refused types of which no tiny model was made."""


def _kept_sets(config: dict[str, Any], layers: int, wanted: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], bool]:
    """The kept sets to try, and whether the config can describe each."""
    sets: dict[tuple[int, ...], bool] = {}
    for kept in wanted:
        kept = tuple(layer for layer in kept if layer < layers)
        try:
            changed_fields(config, kept)
            sets[kept] = True
        except LmpruneError:
            sets[kept] = False
            sets.update(dict.fromkeys(fitting_sets(config, kept, most=1), True))
    return sets


def _examine_one(model_type: str, folder: Path, plan: Plan, mergekit: bool) -> Outcome:
    outcome = Outcome(model_type, plan.kept)
    try:
        whole = _load(folder)
        full = _logits(whole)
        with skipping(whole, plan.dropped):
            wanted = _logits(whole)
    except LmpruneError as exc:
        return outcome.set_ours(f"refused: {exc}")
    except Exception as exc:  # whatever transformers raises when it runs a model that it could build
        return Outcome(model_type, plan.kept, in_memory=f"untested: {_line(exc)}")
    assert torch.equal(_logits(whole), full), f"{model_type}: skipping left a trace"
    assert not torch.allclose(full, wanted, atol=1e-3), f"{model_type}: the dropped layers do nothing: a blind test"
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        out = Path(scratch)
        outcome.in_memory = _verdict(lambda: _dropped(whole, plan), wanted, generate=True)
        outcome.loaded = _verdict(lambda: load_model(folder, plan=plan), wanted)
        outcome.copied = _verdict(lambda: _copied(folder, plan, out / "copy"), wanted)
        if mergekit and outcome.copied == RIGHT:
            outcome.plain_mergekit = _verdict(lambda: _merged(folder, plan, out / "plain"), wanted)
            repaired = out / "repaired"
            outcome.mergekit_with_base = _verdict(lambda: _merged(folder, plan, out / "merged", repaired), wanted)
    return outcome


def _verdict(make: Callable[[], Any], wanted: torch.Tensor | None, *, generate: bool = False) -> str:
    try:
        model = make()
        if wanted is None:
            return "untested: nothing to compare with"
        difference = (_logits(model) - wanted).abs().max().item()
        if not difference <= TOLERANCE:
            return f"wrong: logits differ by {difference:.2g}"
        return _generation(model) if generate else RIGHT
    except HostError as exc:
        return "raises: " + re.sub(r"/\S*/", "", str(exc).removeprefix("mergekit could not write this model: "))
    except LmpruneError as exc:
        return f"refused: {exc}"
    except Wrong as exc:
        return f"wrong: {exc}"
    except Exception as exc:  # whatever a host raises
        return f"raises: {_line(exc)}"


def _generation(model: Any) -> str:
    """Whether greedy generation gives the same tokens with and without a cache."""
    if not model.can_generate() or model.config.model_type in WITHOUT_CACHE:
        return RIGHT
    asked = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(batch(), use_cache=True, **asked)
    same = torch.equal(cached, model.generate(batch(), use_cache=False, **asked))
    return RIGHT if same else "wrong: the cache changes the text"


def _dropped(model: Any, plan: Plan) -> Any:
    drop_layers(model, plan)
    return model


def _copied(folder: Path, plan: Plan, out: Path) -> Any:
    copy_checkpoint(open_cut(folder).without(plan, ""), out)
    return _load(out)


def _merged(folder: Path, plan: Plan, out: Path, repaired: Path | None = None) -> Any:
    """What mergekit makes of the plan: plain, or with a base folder that holds a repaired config."""
    merge: dict[str, Any] = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(folder), "layer_range": list(piece)}]} for piece in plan.slices()],
    }
    if repaired is not None:
        whole = load_config(folder).to_dict()
        write_base_folder(folder, apply_fields(read_config(folder), changed_fields(whole, plan.kept)), repaired)
        merge["base_model"] = str(repaired)
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # tiny models have no tokenizer, of which mergekit complains at length
    try:
        run_mergekit(merge, out)
    finally:
        logging.disable(level)
    return _load(out)


def _load(folder: Path) -> Any:
    """The model as a user would load it, refusing what transformers only warns of."""
    auto = AutoModelForImageTextToText if read_config(folder)["model_type"] in WITH_IMAGES else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            example = min(map(str, info[problem]))
            raise Wrong(f"{len(info[problem])} {problem.replace('_', ' ')}, such as {example}")
    return model.eval()


@torch.inference_mode()
def _logits(model: Any) -> torch.Tensor:
    return model(input_ids=batch()).logits.float()


def _line(exc: Exception) -> str:
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(str(exc).split()))
    return f"{type(exc).__name__}: {text[:160]}"


# From outcomes to the table of `lmprune support`.


def summarise(outcomes: Sequence[Outcome]) -> Row:
    """One row of the table from all kept sets tried on one architecture."""
    mergekit_is_right = {o.mergekit_with_base for o in outcomes} - {"untested"} == {RIGHT}
    any_right = any(o.copied == RIGHT for o in outcomes)
    return Row(
        architecture=outcomes[0].model_type,
        in_memory=_joined([o.in_memory for o in outcomes]),
        plain_mergekit=_worst([o.plain_mergekit for o in outcomes]),
        prune=_joined([o.copied for o in outcomes]),
        writer="mergekit" if any_right and mergekit_is_right else "copy",
        reason=_reason(outcomes),
    )


def _joined(verdicts: Sequence[str]) -> str:
    words = {verdict.split(":")[0] for verdict in verdicts}
    return words.pop() if len(words) == 1 else "some" if words == {"right", "refused"} else "wrong"


def _worst(verdicts: Sequence[str]) -> str:
    words = {verdict.split(":")[0] for verdict in verdicts}
    return next((word for word in ("wrong", "raises", "right") if word in words), "untested")


def _reason(outcomes: Sequence[Outcome]) -> str:
    """Why something is not right: our own refusal first, then what mergekit does."""
    for verdicts in ([o.copied for o in outcomes], [o.in_memory for o in outcomes]):
        for verdict in verdicts:
            text = verdict.partition(": ")[2]
            if text:
                text = re.sub(r"^.*?: keeping the layers .*? is impossible: ", "", text)
                return re.sub(r"\. (Nearest that fit|No other layers).*$", "", text)[:160]
    for verdict in [o.plain_mergekit for o in outcomes]:
        if verdict not in (RIGHT, "untested"):
            return f"mergekit: {shortened(verdict.partition(': ')[2])}"
    return ""


SHORTER = (
    (r"^\w+ValidationError: .*?`(num_hidden_layers)` \((\d+)\) must be.*", r"\1 (\2) contradicts layer_types"),
    (r".*ignore_mismatched_sizes.*", "tensors of other shapes than the config says"),
    (r"^RuntimeError: (Tensor \S+ required but not present) in model.*", r"\1"),
    (r"^RuntimeError: (Model has multiple modules).*", r"\1"),
    (r"^(\d+) missing keys, such as", r"lacks \1 tensors, such as"),
)
"""What hosts say at length, and its gist."""


def shortened(text: str) -> str:
    """A host's complaint in a few words."""
    for pattern, gist in SHORTER:
        text = re.sub(pattern, gist, text)
    return text[:100]


def main() -> None:
    """Measure all architectures, or those named, and write ``lmprune/support.json`` and ``docs/architectures.md``."""
    torch.set_num_threads(1)
    known = {row.architecture: row for row in rows()} if sys.argv[1:] else {}
    for model_type in sys.argv[1:] or MODEL_TYPES:
        outcomes = examine(model_type, mergekit=True)
        known[model_type] = summarise(outcomes)
        print(known[model_type], [o for o in outcomes if o.silently_wrong] or "", flush=True)
    measured = {name: version(name) for name in ("transformers", "mergekit", "torch")}
    found = [known[model_type].to_data() for model_type in MODEL_TYPES]
    write_json(DATA, {"versions": measured, "kept": [IRREGULAR, CONTIGUOUS], "rows": found})
    rows.cache_clear()
    write_text(Path(__file__).parent.parent / "docs" / "architectures.md", document())


if __name__ == "__main__":
    main()
