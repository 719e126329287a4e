"""The text of a healing run: blocks to train or to fit on, and held-out ones, read once and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lmprune.healing.self_data import Writer
from lmprune.healing.settings import HealSettings, Resolved
from lmprune.models.cut import Cut
from lmprune.models.locate import ModelFolder
from lmprune.text.blocks import Blocks, read_blocks, read_held_out, training_split
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import between, check_known


def blocks_of(
    cut: Cut,
    base: ModelFolder | None,
    settings: HealSettings,
    resolved: Resolved,
    data: DataSettings,
    path: Path,
    *,
    device: str,
    dtype: str,
) -> Blocks:
    """The blocks kept in ``path``, or those that are read now and kept there, for a resumed run and other processes.

    Args:
        base: the unpruned model, which writes the text where the user wants its own.
    """
    if path.is_file():
        return Blocks.load(path)
    tokenizer, default = cut.tokenizer(), cut.default_data
    data = training_split(data, default)
    wanted, length = resolved.blocks, resolved.way.max_length
    held_out = read_held_out(
        data, tokenizer, blocks=resolved.way.eval_blocks, length=length, default=default, eval_data=settings.eval_data
    )
    if base is not None:
        # What is measured stays real text; only what trains is the model's own.
        data = Writer(
            base.path,
            data,
            held_out,
            blocks=wanted,
            length=length,
            seed=resolved.seed,
            default=default,
            device=device,
            dtype=dtype,
        ).write()
    blocks = read_blocks(
        data,
        tokenizer,
        held_out,
        train=wanted,
        length=length,
        seed=resolved.seed,
        default=default,
        written=base is not None,
    )
    vocabulary = cut.whole_config.get_text_config().vocab_size
    check_known((blocks.train, blocks.held_out), vocabulary, blocks.source)
    if settings.document_mask:
        blocks = replace(blocks, mark=between(tokenizer, data.bos))
    half = path.with_suffix(".half")
    blocks.save(half)
    half.replace(path)
    return blocks
