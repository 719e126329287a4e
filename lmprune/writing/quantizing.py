"""From a model, pruned or not, to a checkpoint in few bits that transformers loads as it is, with its loss beside.

bitsandbytes quantises every linear layer but the head by itself, so that what a layer becomes does not hang on which
others stay: to prune and then to quantise gives the same tensors as to quantise and then to prune. What can differ is
which layers a criterion chooses, and what is healed in between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lmprune.cuts.recipe import Recipe
from lmprune.errors import ModelError, UsageError, VerifyError
from lmprune.files import check_output_folder, new_folder
from lmprune.models.carrying import require_stock
from lmprune.models.checkpoint import Checkpoint
from lmprune.models.companions import check_companions
from lmprune.models.cut import Cut, open_cut
from lmprune.models.dtypes import check_quantization
from lmprune.models.locate import RECIPE
from lmprune.models.saving import save_beside
from lmprune.settings import Quantization, check_shared, device_option, option, seed_option
from lmprune.text.sources import DataSettings
from lmprune.versions import versions

if TYPE_CHECKING:
    from lmprune.forward.loss import Losses
    from lmprune.text.tokens import Tokens


@dataclass(frozen=True)
class QuantizeSettings:
    """On what the loss before and after is measured, and where."""

    PANEL: ClassVar[str] = "Loss before and after"

    samples: int = option(32, "Samples of text for the loss before and after; 0 measures none.", metavar="N")
    max_length: int = option(256, "Tokens of a sample, at most.", metavar="T")
    seed: int = seed_option("Seed of the choice of samples.")
    device: str = device_option()

    def __post_init__(self) -> None:
        check_shared(self)


@dataclass(frozen=True)
class Quantized:
    """What `quantize` wrote. Losses are nats a token on the same text; None where none was asked for.

    Attributes:
        errors: standard errors over samples: of the loss before, of that after, and of how much it rose.
    """

    path: Path
    quantization: Quantization
    bytes_before: int
    bytes_after: int
    loss_before: float | None
    loss_after: float | None
    errors: tuple[float | None, float | None, float | None] = (None, None, None)

    @property
    def rise(self) -> float | None:
        """Nats a token that the few bits cost."""
        return None if self.loss_before is None or self.loss_after is None else self.loss_after - self.loss_before

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "out": str(self.path), "quantization": self.quantization, "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "losses": {
                "before": {"value": self.loss_before, "error": self.errors[0]},
                "after": {"value": self.loss_after, "error": self.errors[1]},
            },
            "rise": {"value": self.rise, "error": self.errors[2]},
        }  # fmt: skip


def quantize(
    model: str | Path | Recipe | Cut,
    out: str | Path,
    quantization: str,
    settings: QuantizeSettings | None = None,
    data: DataSettings | None = None,
) -> Quantized:
    """Write ``model`` to the new folder ``out`` with its linear layers in ``nf4`` or ``int8``.

    Args:
        model: whatever `open_cut` opens; a recipe is cut while it is read.

    Raises:
        UsageError: there is no such type, or an adapter would be lost.
        ModelError: the model is quantised already, cannot be loaded, or has a file that cannot be read.
        OutputError: ``out`` is not empty.
        VerifyError: what was written does not load as what was quantised.
    """
    settings, out = settings or QuantizeSettings(), Path(out)
    wanted = check_quantization(quantization)
    if wanted is None:
        raise UsageError("give --quantization nf4 or int8")
    check_output_folder(out)
    cut = open_cut(model)
    require_stock(cut.plan, cut.name)
    check_companions(cut.base.path, code=cut.trust_remote_code)
    if cut.config.get("quantization_config"):
        raise ModelError(f"{cut.name} is quantised already. Give the model that it was made from")
    if cut.adapter is not None:
        raise UsageError(f"{cut.name}: an adapter cannot be quantised with its base. Merge it with `lmprune heal`")
    tokens = _text(cut, settings, data or DataSettings()) if settings.samples else None
    before = _loss(cut, None, tokens, settings)
    with new_folder(out) as folder:
        after = _write(cut, wanted, tokens, settings, folder)
        losses, errors = _compared(before, after)
        said = {"type": wanted, "loss_before": losses[0], "loss_after": losses[1]}
        lineage = replace(cut.lineage, quantization=said, versions=versions())
        replace(lineage, stage=lineage.stage or ("prune" if cut.plan is not None else "quantize")).write(folder)
        if cut.recipe is not None:
            cut.recipe.write(folder / RECIPE)
    return Quantized(out, wanted, cut.checkpoint.bytes, Checkpoint.open(out).bytes, *losses, errors)


def _text(cut: Cut, settings: QuantizeSettings, data: DataSettings) -> Tokens:
    from lmprune.text.tokens import tokenize

    length = min(settings.max_length, cut.window or settings.max_length)
    return tokenize(
        data, cut.tokenizer(), samples=settings.samples, max_length=length, seed=settings.seed, default=cut.default_data
    )


def _loaded(cut: Cut, to: Quantization | None, settings: QuantizeSettings) -> Any:
    from lmprune.forward.machine import pick_device

    return cut.load(quantization=to, device=str(pick_device(settings.device)))


def _loss(cut: Cut, to: Quantization | None, tokens: Tokens | None, settings: QuantizeSettings) -> Losses | None:
    return None if tokens is None else _loss_of(_loaded(cut, to, settings), tokens)


def _loss_of(model: Any, tokens: Tokens) -> Losses:
    from lmprune.cuts.plan import Plan
    from lmprune.forward.loss import losses
    from lmprune.models.fields import layer_count

    return losses(model, [Plan(layer_count(model.config.to_dict()))], tokens)


def _compared(
    before: Losses | None, after: Losses | None
) -> tuple[tuple[float | None, float | None], tuple[float | None, float | None, float | None]]:
    """Both losses; and the standard errors of both and of their difference, None of one sample."""
    if before is None or after is None:
        return (None, None), (None, None, None)
    from lmprune.forward.loss import Losses

    both = Losses(np.concatenate([before.values, after.values]), before.tokens)
    known = [float(error) if np.isfinite(error) else None for error in (*both.own_errors(), both.errors()[1])]
    return (float(both.mean()[0]), float(both.mean()[1])), (known[0], known[1], known[2])


def _write(
    cut: Cut, to: Quantization, tokens: Tokens | None, settings: QuantizeSettings, folder: Path
) -> Losses | None:
    """The quantised checkpoint, proven to load as what was quantised; its losses."""
    from lmprune.models.loading import require_numbers

    model = _loaded(cut, to, settings)
    save_beside(model, cut.base.path, folder, code=cut.trust_remote_code)
    wanted = _probe(model)
    require_numbers(wanted, cut.name)
    after = _loss_of(model, tokens) if tokens is not None else None
    del model
    found = _probe(_loaded(open_cut(folder), None, settings))
    if not bool((found == wanted).all()):
        raise VerifyError(f"what was written differs from what was quantised by {float((found - wanted).abs().max())}")
    return after


def _probe(model: Any) -> Any:
    """Logits on a few tokens."""
    import torch

    words = model.config.get_text_config().vocab_size
    ids = torch.randint(words, (1, 16), generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.inference_mode():
        return model(input_ids=ids).logits.float().cpu()
