"""Attaching a PEFT adapter to a model that was already cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmprune.errors import ModelError


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
