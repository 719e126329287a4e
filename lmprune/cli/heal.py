"""``lmprune heal``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import MODEL, with_options
from lmprune.errors import UsageError
from lmprune.healing.settings import HealSettings
from lmprune.text.sources import DataSettings


@with_options(HealSettings, DataSettings)
def heal(
    settings: HealSettings,
    data: DataSettings,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL)] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="New folder for the healed checkpoint.")] = None,
    show_preset: Annotated[
        str | None, typer.Option("--show-preset", help="Print what a preset means for --model, and stop.")
    ] = None,
    named: Annotated[str | None, typer.Option("--model", help="The model for --show-preset.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Repair a pruned model, or train it for a while, so that it closes the wound; write a plain checkpoint."""
    if show_preset is not None:
        return _show_preset(replace(settings, preset=show_preset), named or model, json)
    if named is not None:
        raise UsageError("--model belongs to --show-preset. Give the model as the first argument")
    if model is None or out is None:
        raise UsageError("give MODEL and OUT: a recipe or a pruned checkpoint, and a new folder")
    from accelerate import PartialState

    from lmprune.healing import heal as run
    from lmprune.quiet import quiet_bars

    quiet_bars()
    done = run(model, out, settings, data)
    PartialState().destroy_process_group()
    closed = "" if done.gap_closed is None else f": {done.gap_closed:.1%} of the gap to {done.original:.4f} closed"
    steps = f"best of {done.steps} steps after {done.best_step}, " if done.steps else ""
    between = "" if done.repaired is None else f"{done.repaired:.4f} (repaired: {done.repair_closed or 0:.1%}) -> "
    text = (
        f"{done.method}, {steps}{done.seconds:.0f} s\n"
        f"held-out loss {done.pruned:.4f} -> {between}{done.healed:.4f}{closed}\n{done.path}"
    )
    show.result(text, asdict(done) | {"path": str(done.path)}, json)


def _show_preset(settings: HealSettings, model: str | None, json: bool) -> None:
    from lmprune.healing.facts import Facts
    from lmprune.healing.methods.base import choose
    from lmprune.healing.presets import PRESETS, resolve
    from lmprune.models.cut import open_cut

    choose("--show-preset", settings.preset, tuple(PRESETS))
    if model is None:
        raise UsageError(f"--show-preset {settings.preset}: for which model? Add --model MODEL")
    resolved, notes = resolve(settings, Facts.of(open_cut(model)))
    values = resolved.to_data()
    lines = [f"# {PRESETS[settings.preset].source}", *(f"# {note}" for note in notes)]
    lines += [f"{name}: {value}" for name, value in values.items()]
    show.result("\n".join(lines), {"source": PRESETS[settings.preset].source, "notes": notes, **values}, json)
