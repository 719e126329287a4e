"""PEFT adapters: attached to a model that was already cut, or merged into one before it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmprune.errors import ModelError
from lmprune.models.checkpoint import Checkpoint, read_config
from lmprune.models.converted import cached_folder


def attach_adapter(model: Any, adapter: str) -> Any:
    """``model`` with the adapter in the folder or Hub repository ``adapter``, ready for inference.

    Raises:
        ModelError: there is no such adapter, or it was made for a model of another shape.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    if Path(adapter).is_dir() and not (Path(adapter) / "adapter_config.json").is_file():
        raise ModelError(
            f"{adapter} holds no adapter_config.json, so it is no adapter. Write one with `lmprune heal --keep-adapter`"
        )
    try:
        attached = PeftModel.from_pretrained(model, adapter)
    except (ValueError, OSError, RuntimeError) as exc:
        raise ModelError(f"the adapter {adapter} does not fit this model: {' '.join(str(exc).split())[:300]}") from exc
    # The host only warns when an adapter has weights for layers that do not exist; it would then be half applied.
    stored, used = set(load_peft_weights(adapter, device="cpu")), set(get_peft_model_state_dict(attached))
    if stored != used:
        odd = sorted(stored ^ used)[0]
        raise ModelError(
            f"the adapter {adapter} does not fit this model: {odd} is on one side only. "
            "Adapters belong to the pruned model that they were trained on"
        )
    return attached.eval()


def merged_folder(base: Path, adapter: Path) -> Path:
    """A cached copy of the model in ``base`` with the adapter in ``adapter`` merged into its weights.

    Raises:
        ModelError: it is no adapter, does not fit the model, or cannot be merged into weights.
    """
    from lmprune.copying import copy_companions
    from lmprune.models.loading import load_model

    if read_config(base).get("quantization_config"):
        raise ModelError(f"{base} is quantised, and an adapter cannot be merged exactly into quantised weights")
    sources = [*Checkpoint.open(base).files, base / "config.json", *adapter.glob("adapter_*")]

    def write(out: Path) -> None:
        attached = attach_adapter(load_model(base), str(adapter))
        if not hasattr(attached, "merge_and_unload"):
            raise ModelError(f"{adapter} is a {attached.peft_type} adapter, which cannot be merged into weights")
        attached.merge_and_unload(safe_merge=True).save_pretrained(out)
        copy_companions(base, out, code=True)  # nothing runs it here

    return cached_folder(sources, write)
