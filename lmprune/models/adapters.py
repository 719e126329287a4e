"""PEFT adapters: made, attached to a model that was already cut, or merged into weights. The only importer of PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmprune.cuts.lineage import Base, Lineage
from lmprune.cuts.plan import Plan
from lmprune.errors import HostError, ModelError, shown, told_as
from lmprune.files import read_json
from lmprune.models.checkpoint import Checkpoint, read_config
from lmprune.models.companions import check_companions
from lmprune.models.converted import cached_folder
from lmprune.models.patterns import check_patterns
from lmprune.models.saving import save_beside

_REMEDY = "Remove it to go on without its word on the cut"


def attach_adapter(model: Any, adapter: str, base: Path, plan: Plan | None = None) -> Any:
    """``model`` with the adapter in the folder or Hub repository ``adapter``, ready for inference.

    Args:
        base: the folder that the model was loaded from.
        plan: what was dropped while loading.

    Raises:
        ModelError: there is no such adapter, or it was made for a model of another shape, or for another cut.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise ModelError(
            f"{adapter} holds no adapter_config.json, so it is no adapter. Write one with `lmprune heal --keep-adapter`"
        )
    _check_cut(Path(adapter), base, plan)
    _check_files(Path(adapter), model)
    with told_as(ModelError, f"the adapter {adapter} does not fit this model"):
        attached = PeftModel.from_pretrained(model, adapter)
    # The host only warns when an adapter has weights for layers that do not exist; it would then be half applied.
    stored, used = (
        set(load_peft_weights(adapter, device="cpu")),
        set(get_peft_model_state_dict(attached, save_embedding_layers=False)),
    )
    if stored != used:
        odd = sorted(stored ^ used)[0]
        raise ModelError(
            f"the adapter {adapter} does not fit this model: {shown(odd)} is on one side only. "
            "Adapters belong to the pruned model that they were trained on"
        )
    return attached.eval()


def _check_files(adapter: Path, model: Any) -> None:
    """Refuse an adapter's files that PEFT should not be given.

    Raises:
        ModelError: its weights are a pickle or broken, or a pattern in its config cannot be matched in reasonable time.
    """
    if not adapter.is_dir():  # PEFT fetches it
        return
    path = adapter / "adapter_config.json"
    config = read_json(path, ModelError, "Train the adapter again")
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object. Train the adapter again")
    if not (adapter / "adapter_model.safetensors").is_file() and (adapter / "adapter_model.bin").is_file():
        raise ModelError(
            f"{adapter} holds only adapter_model.bin, a pickle. Convert it to safetensors where you trust it"
        )
    Checkpoint.of_files(adapter, sorted(adapter.glob("*.safetensors")))
    found = [config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern", "target_parameters")]
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ModelError(f"{path}: {key} is {shown(config[key])} and no mapping. Train the adapter again")
        found += config.get(key) or {}
    patterns = [pattern for pattern in found if isinstance(pattern, str)]
    check_patterns(patterns, (name for name, _ in model.named_modules()), str(path))


def add_lora(model: Any, *, rank: int, alpha: float, dropout: float, modules: list[str], seed: int) -> Any:
    """``model`` within a new LoRA adapter on all modules whose names end so; the adapter alone trains, in float32."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, task_type="CAUSAL_LM")
    torch.manual_seed(seed)
    return get_peft_model(model, config)


def save_adapter(adapted: Any, folder: Path) -> None:
    """Write the adapter of ``adapted`` alone."""
    # Looking up the embeddings of the base would need the Hub; they do not train.
    adapted.save_pretrained(folder, save_embedding_layers=False)


def merged(attached: Any, adapter: str = "this") -> Any:
    """The model itself with the adapter around it merged into its weights, in their own type.

    Args:
        adapter: what the user calls it.

    Raises:
        ModelError: the adapter's kind cannot be merged.
        HostError: PEFT found weights that are no numbers.
    """
    if not hasattr(attached, "merge_and_unload"):
        raise ModelError(f"{adapter} is a {attached.peft_type} adapter, which cannot be merged into weights")
    try:
        return attached.merge_and_unload(safe_merge=True)
    except ValueError as exc:
        raise HostError(f"PEFT cannot merge the adapter: {exc}") from exc


def _check_cut(adapter: Path, base: Path, plan: Plan | None) -> None:
    """Refuse an adapter whose history names another cut than this model's; names and shapes may still agree."""
    made = Lineage.read(adapter, remedy=_REMEDY)
    if plan is not None:
        used: Lineage | None = Lineage(base=Base(fingerprint=Checkpoint.open(base).fingerprint), plan=plan)
    else:
        used = Lineage.read(base, remedy=_REMEDY)
    if made is None or used is None:
        return
    if made.plan is not None and used.plan is not None and made.plan != used.plan:
        ours, theirs = (
            (f"keeps layers {list(plan.kept)}" if made.plan.kept != used.plan.kept else plan.describe())
            for plan in (used.plan, made.plan)
        )
        raise ModelError(
            f"the adapter {adapter} does not fit this model: it was trained on the cut that {theirs}, and this one "
            f"{ours}. Give the recipe that it was healed with"
        )
    weights = made.base.fingerprint, used.base.fingerprint
    if all(weights) and weights[0] != weights[1]:
        raise ModelError(
            f"the adapter {adapter} does not fit this model: it was trained on a cut of "
            f"{made.base.model or 'another model'}, whose weights are not these. Give that base"
        )


def merged_folder(base: Path, adapter: Path) -> Path:
    """A cached copy of the model in ``base`` with the adapter in ``adapter`` merged into its weights.

    Raises:
        ModelError: it is no adapter, does not fit the model, or cannot be merged into weights.
    """
    from lmprune.models.loading import load_model

    if read_config(base).get("quantization_config"):
        raise ModelError(f"{base} is quantised, and an adapter cannot be merged exactly into quantised weights")
    _check_cut(adapter, base, None)
    check_companions(base, code=True)
    sources = [*Checkpoint.open(base).files, base / "config.json", *adapter.glob("adapter_*")]

    def write(out: Path) -> None:
        whole = merged(attach_adapter(load_model(base), str(adapter), base), str(adapter))
        save_beside(whole, base, out, code=True)  # nothing runs it here

    return cached_folder(sources, write)
