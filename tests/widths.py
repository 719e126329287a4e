"""What becomes of tiny random models of every type when they are narrowed, against the whole model that is masked."""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import torch
from architectures import (
    MEMORY,
    MODEL_TYPES,
    REFUSED,
    RIGHT,
    TOLERANCE,
    WITH_IMAGES,
    _kept_sets,
    _line,
    _load,
    _logits,
    tiny_config,
)
from torch import Tensor

from lmprune.cuts.plan import Plan
from lmprune.cuts.width import Width
from lmprune.errors import LmpruneError, ModelError
from lmprune.files import write_json, write_text
from lmprune.forward.calls import skipping
from lmprune.models import width
from lmprune.models.carrying import cut_fields, cut_live
from lmprune.models.checkpoint import Checkpoint
from lmprune.models.cut import open_cut
from lmprune.models.fields import layer_count
from lmprune.models.loading import load_config, load_model
from lmprune.models.mlps import NO_WIDTH, Source, narrowed
from lmprune.writing.copying import copy_checkpoint
from lmprune.writing.support import WIDTHS, document, widths

HIDDEN, KEPT = 32, 24
_OUTPUTS = re.compile(
    r"(mlp|feed_forward|ffn|ff|mixer|moe|experts?|shared_\w+|layers\.\d+|layer\.\d+|output|mlps\.\d|mlp_block)\."
    r"(down_proj|w2|output_linear|Wo|w_out|fc2|c_proj|fc_out|dense_4h_to_h|output\.dense|dense|output|layer_2|2)"
    r"(\.weight)?$"
)
"""What writes an MLP's output, as modules call it: of this file, and not of lmprune."""
_WRITERS = re.compile(r"\.(down_proj|w2|output_linear|o_proj|out_proj|fc2|dense)(\.weight|\.bias|_bias)?$")


@dataclass
class Narrowed:
    """What became of one type: ``right``, or ``refused``, ``raises`` or ``wrong`` and the reason."""

    model_type: str
    ffn: str = "untested"
    groups: str = "untested"
    hidden: str = "untested"


def examine(model_type: str, asked: Sequence[str] = ("ffn", "groups", "hidden")) -> Narrowed:
    """Narrow a tiny model of that type in every way: written, read and live equal the whole model, masked."""
    found = Narrowed(model_type)
    judges = {"ffn": _ffn, "groups": _groups, "hidden": _hidden}
    for name, judge in ((name, judges[name]) for name in asked):
        with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
            setattr(found, name, _told(lambda judge=judge, scratch=scratch: judge(model_type, Path(scratch))))
    return found


def _told(judge: Callable[[], str]) -> str:
    try:
        return judge()
    except LmpruneError as exc:
        return f"refused: {exc}"
    except Exception as exc:  # whatever transformers raises
        return f"raises: {_line(exc)}"


def _made(model_type: str, folder: Path, change: Callable[[Any], None] | None = None, **config: Any) -> Any:
    """A tiny model of that type in ``folder``, changed; errors as those of the host."""
    if model_type in REFUSED:
        raise ModelError(REFUSED[model_type])
    model = architectures.tiny_model(tiny_config(model_type, **config))
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder)
    return _load(folder)


def source_of(folder: Path) -> Source:
    """The tensors in ``folder``."""
    return Source.stored(load_config(folder).to_dict(), Checkpoint.open(folder).tensors)


def some_neurons(source: Source, share: float = 0.5, seed: int = 0) -> tuple[dict[str, Tensor], int]:
    """A random choice of neurons of each MLP that can be narrowed, as a file holds it, and their number."""
    generator, held, size = torch.Generator().manual_seed(seed), {}, 0
    found = narrowed(source)
    base = min(mlp.neurons for mlp in found if not mlp.shared)
    for mlp in found:
        count = round(share * base) * (mlp.neurons // base)
        rows = [torch.randperm(mlp.neurons, generator=generator)[:count].sort()[0] for _ in range(mlp.experts or 1)]
        kept = torch.stack(rows).int() if mlp.experts is not None else rows[0].int()
        held[f"{'shared' if mlp.shared else 'neurons'}.{mlp.layer}"] = kept
        size = count if not mlp.shared else size
    return held, size


def _ffn(model_type: str, folder: Path) -> str:
    if model_type in NO_WIDTH:
        raise ModelError(f"{model_type}: its MLPs cannot be narrowed: {NO_WIDTH[model_type]}")
    whole = _made(model_type, folder / "base")
    source = source_of(folder / "base")
    held, size = some_neurons(source)
    return _same(folder, width.width_of(held, ffn=size), whole, lambda model: mask_neurons(model, held, source))


def mask_neurons(model: Any, held: Mapping[str, Tensor], source: Source) -> None:
    """Zeros in place of what neurons that go would write: found by their size alone."""
    sizes = {(mlp.layer, mlp.shared): mlp.neurons for mlp in narrowed(source)}
    masked = set()
    for name, weight in model.named_parameters():
        match = re.search(r"(?:layers|h|layer|blocks|block)\.(\d+)\.", name)
        if match is None or not _OUTPUTS.search(name) or re.search(r"attention\.output|vision|audio|adapter", name):
            continue
        layer, shared = int(match[1]), "shared" in name
        kept, neurons = held.get(f"{'shared' if shared else 'neurons'}.{layer}"), sizes.get((layer, shared))
        if kept is None or neurons not in weight.shape or (kept.dim() == 2) != (weight.dim() == 3):
            continue
        for expert in range(len(kept) if kept.dim() == 2 else 1):
            part, stays = (weight[expert], kept[expert]) if kept.dim() == 2 else (weight, kept)
            mask = torch.ones(neurons, dtype=torch.bool)
            mask[stays.long()] = False
            part[(slice(None), mask) if part.shape[-1] == neurons else (mask, slice(None))] = 0
        masked.add((layer, shared))
    assert masked == set(sizes), f"masked {sorted(masked)} of {sorted(sizes)}"


def _refused_by_config(model_type: str, **sizes: int) -> None:
    """Raise what the config alone says against it, before a model is made."""
    if model_type in REFUSED:
        raise ModelError(REFUSED[model_type])
    plain = tiny_config(model_type).to_dict()
    cut_fields(plain, Plan(layer_count(plain), (), (width.width_of({"none": torch.ones(1)}, **sizes),)))


def _groups(model_type: str, folder: Path) -> str:
    _refused_by_config(model_type, groups=1)
    whole = _made(model_type, folder / "base")
    inner = whole.config.get_text_config()
    heads, groups = inner.num_attention_heads, getattr(inner, "num_key_value_heads", None) or 0
    layers = layer_count(whole.config.to_dict())
    held = {f"groups.{layer}": torch.tensor([layer % max(groups, 1)], dtype=torch.int32) for layer in range(layers)}

    def mask(model: Any) -> None:
        for name, weight in model.named_parameters():
            match = re.search(r"layers\.(\d+)\.self_attn\.o_proj\.weight$", name)
            if match is not None:
                stays, each = int(match[1]) % groups, weight.shape[1] // groups
                assert weight.shape[1] % heads == 0
                weight[:, : stays * each] = 0
                weight[:, (stays + 1) * each :] = 0

    return _same(folder, width.width_of(held, groups=1), whole, mask)


def _hidden(model_type: str, folder: Path) -> str:
    """Exact at k = d, and where a part of the hidden state's directions is empty."""
    _refused_by_config(model_type, hidden=KEPT)
    verdicts = []
    generator = torch.Generator().manual_seed(1)
    for tied in (False, True):
        turn = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=generator))[0]
        for name, size in (("whole", HIDDEN), ("empty", KEPT)):
            at = folder / f"{name}-{tied}"
            whole = _made(model_type, at / "base", _planted(turn[:, :size], tied), tie_word_embeddings=tied)
            rotation = turn[:, :size] @ torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
            part = width.width_of({"rotation": rotation}, hidden=size)
            verdicts.append(_same(at, part, whole, None))
    return next((verdict for verdict in verdicts if verdict != RIGHT), RIGHT)


def _planted(basis: Tensor, tied: bool) -> Callable[[Any], None]:
    """What makes a model write into these directions alone, and into all where there are as many as it has."""

    def change(model: Any) -> None:
        project = basis @ basis.T
        for name, weight in model.named_parameters():
            if re.search(r"(^|\.)norm\.weight$", name) and tied:
                weight.fill_(float(weight.mean()))  # a tied head is exact where these are one number
            if basis.shape[0] == basis.shape[1]:
                continue
            if re.search(r"(embed_tokens|wte)\.weight$", name):
                weight.copy_(weight @ project)
            elif _WRITERS.search(name):
                axis = 0 if weight.dim() == 1 else -2 if weight.shape[-2] == HIDDEN else -1
                weight.copy_(torch.tensordot(weight, project, ([axis], [0])).movedim(-1, axis))

    return change


def _same(folder: Path, part: Width, whole: Any, mask: Callable[[Any], None] | None) -> str:
    """Whether the narrowed model is the masked one: live, read and written, with and without dropped layers."""
    base = folder / "base"
    plain = load_config(base).to_dict()
    layers = layer_count(plain)
    sets = _kept_sets(plain, layers, [(0, 1, 2, 3, 6, 7)])
    kept = next((kept for kept, fits in sets.items() if fits), tuple(range(layers)))
    load_model(base, plan=Plan(layers, (), (part,)), dtype="float32")  # refused here
    masked = copy.deepcopy(whole)
    if mask is not None:
        with torch.no_grad():
            mask(masked)
        assert not torch.allclose(_logits(masked), _logits(whole), atol=1e-3), "the mask does nothing: a blind test"
    for number, dropped in enumerate({(), tuple(set(range(layers)) - set(kept))}):
        plan = Plan(layers, dropped, (part,))
        with skipping(masked, dropped):
            wanted = _logits(masked)
        live = copy.deepcopy(whole)
        ways: dict[str, Callable[[], Any]] = {
            "read": lambda plan=plan: load_model(base, plan=plan, dtype="float32"),
            "written": lambda plan=plan, number=number: _copied(base, plan, folder / f"out-{number}"),
            "live": lambda plan=plan, live=live: cut_live(live, plan) or live,
        }
        if whole.config.model_type in WITH_IMAGES:
            ways.pop("live")
        for way, make in ways.items():
            difference = (_logits(make()) - wanted).abs().max().item()
            if not difference <= 2 * TOLERANCE * max(1.0, wanted.abs().max().item()):
                return f"wrong: {way} without layers {dropped}: logits differ by {difference:.2g}"
    return RIGHT


def _copied(base: Path, plan: Plan, out: Path) -> Any:
    copy_checkpoint(open_cut(base).without(plan, ""), out)
    return _load(out)


def row(found: Narrowed) -> dict[str, str]:
    """What the table says of a type."""
    verdicts = {name: getattr(found, name).partition(":")[0] for name in ("ffn", "groups", "hidden")}
    reasons = [_gist(getattr(found, name)) for name in ("ffn", "groups", "hidden") if verdicts[name] != RIGHT]
    return {"architecture": found.model_type, **verdicts, "reason": "; ".join(dict.fromkeys(filter(None, reasons)))}


def _gist(verdict: str) -> str:
    """Why something is refused, without the type's name and what to do instead."""
    text = re.sub(r"^\w+: (\S+: )?(its (MLPs|hidden size|key-value groups) cannot be \w+: )?", "", verdict)
    return re.sub(r"\. (Drop layers|Narrow its).*$", "", text)[:160]


def main() -> None:
    """Measure all types, or those named, and write ``lmprune/writing/widths.json`` and ``docs/architectures.md``."""
    torch.set_num_threads(1)
    known = {found["architecture"]: found for found in widths()} if sys.argv[1:] else {}
    for model_type in sys.argv[1:] or MODEL_TYPES:
        known[model_type] = row(examine(model_type))
        print(known[model_type], flush=True)
        write_json(WIDTHS, {"rows": [known[name] for name in MODEL_TYPES if name in known]})
    widths.cache_clear()
    write_text(Path(__file__).parent.parent / "docs" / "architectures.md", document())


if __name__ == "__main__":
    main()
