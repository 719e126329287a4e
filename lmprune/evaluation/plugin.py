"""``lm_eval --model lmprune``: the harness's own Hugging Face model, cut down to what a recipe keeps.

Everything but the loading is the harness's: batching, chat templates, parallelism, scoring and generation.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from lmprune.errors import ModelError, UsageError, told_as
from lmprune.models.adapters import attach_adapter
from lmprune.models.cut import open_cut, read_recipe
from lmprune.models.dtypes import check_quantization
from lmprune.models.dtypes import quantization_config as few_bits
from lmprune.quiet import panics_unsaid

_NOT_HERE = ("delta", "autogptq", "gptqmodel", "gguf_file", "subfolder", "tp_plan")
_TOKENIZER_FAILS = "the model's tokenizer cannot read this text"
_BNB = ("load_in_4bit", "load_in_8bit")


@register_model("lmprune")
class LmpruneLM(HFLM):
    """A base model pruned in memory by a recipe, loading only the layers that it keeps.

    Args:
        pretrained: the base model: a folder, a Hub id, or the word ``demo``.
        recipe: the recipe's file, or a Hub repository that holds a ``recipe.yml``; without it the model is whole.
        revision: commit of the base model; the recipe's own where it names one.
        peft: an adapter trained on the *pruned* model; it is attached after the cut.
        quantization: ``nf4`` or ``int8``: the base's linear layers in few bits, as everywhere in lmprune.
        **kwargs: everything that ``--model hf`` takes.
    """

    def __init__(self, pretrained: str, recipe: str | None = None, **kwargs: Any) -> None:
        if not isinstance(pretrained, str):
            raise UsageError("pretrained must be a model's name or folder; a model in memory has nothing left to prune")
        for name in _NOT_HERE:
            if kwargs.get(name):
                raise UsageError(
                    f"{name} does not go with --model lmprune. Write the checkpoint with `lmprune prune` first"
                )
        read = read_recipe(recipe) if recipe else None
        revision = kwargs.pop("revision", None)
        if revision in (None, "main"):
            revision = read.revision if read is not None else None
        trust = bool(kwargs.get("trust_remote_code"))
        self.lmprune_cut = open_cut(pretrained, revision, recipe=read, trust_remote_code=trust)
        self.lmprune_recipe_path = recipe or (pretrained if self.lmprune_cut.recipe else None)
        if kwargs.get("parallelize") and not torch.accelerator.is_available():
            # With nothing to spread over, the host's memory map is empty and every layer would go to disk.
            kwargs["parallelize"] = False
        super().__init__(pretrained=str(self.lmprune_cut.base.path), **kwargs)
        self.revision = self.lmprune_cut.base.revision or "main"

    def _create_model(
        self,
        pretrained: str,
        *,
        dtype: Any = "auto",
        trust_remote_code: bool | None = False,
        parallelize: bool | None = False,
        gpus: int | None = None,
        max_memory_per_gpu: int | str | None = None,
        max_cpu_memory: int | str | None = None,
        offload_folder: str | None = "./offload",
        peft: str | None = None,
        quantization_config: Any = None,
        quantization: str | None = None,
        **kwargs: Any,
    ) -> None:
        for name in (*_NOT_HERE, "revision"):
            kwargs.pop(name, None)
        # The host passes these on to from_pretrained, where transformers 5 no longer knows them.
        bnb = {
            key: kwargs.pop(key) for key in list(kwargs) if key in _BNB or key.startswith(("bnb_4bit_", "llm_int8_"))
        }
        if (few := check_quantization(quantization, "quantization")) is not None:
            if quantization_config is not None or any(bnb.get(key) for key in _BNB):
                raise UsageError(f"quantization={few} says it all. Leave out load_in_4bit and the like")
            quantization_config = few_bits(few)
        elif any(bnb.get(key) for key in _BNB):
            quantization_config = transformers.BitsAndBytesConfig(**bnb)
        placed = self._get_accelerate_args(
            parallelize=parallelize,
            device_map=kwargs.pop("device_map", None),
            max_memory_per_gpu=max_memory_per_gpu,
            max_cpu_memory=max_cpu_memory,
            offload_folder=offload_folder,
            gpus=gpus,
        )
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        cut = self.lmprune_cut
        self._model = cut.load(dtype=str(dtype).removeprefix("torch."), **placed, **kwargs)
        self._config = self._model.config
        if peft:
            self._model = attach_adapter(self._model, peft, cut.base.path, cut.plan)

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **kwargs: Any) -> None:
        with told_as(ModelError, f"the tokenizer of {self.lmprune_cut.name} cannot be loaded"), panics_unsaid():
            super()._create_tokenizer(pretrained, tokenizer, **kwargs)

    def tok_encode(self, *args: Any, **kwargs: Any) -> Any:
        """The harness's own; a tokenizer that fails is one line."""
        with told_as(ModelError, _TOKENIZER_FAILS), panics_unsaid():
            return super().tok_encode(*args, **kwargs)

    def tok_batch_encode(self, *args: Any, **kwargs: Any) -> Any:
        """As `tok_encode`."""
        with told_as(ModelError, _TOKENIZER_FAILS), panics_unsaid():
            return super().tok_batch_encode(*args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """The harness's own facts, and which layers of which base model were kept."""
        info: dict[str, Any] = super().get_model_info()
        cut = self.lmprune_cut
        info["lmprune_base"] = cut.base.name
        info["lmprune_base_fingerprint"] = cut.checkpoint.fingerprint
        if cut.recipe is not None and cut.plan is not None:
            info["lmprune_recipe"] = self.lmprune_recipe_path
            info["lmprune_recipe_hash"] = cut.recipe.hash
            info["lmprune_layers_kept"] = list(cut.plan.kept)
            info["lmprune_layers_dropped"] = list(cut.plan.dropped)
            if cut.plan.parts:
                info["lmprune_parts"] = {part.kind: part.to_data() for part in cut.plan.parts}
        return info
