"""``lmprune heal``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import with_options
from lmprune.errors import UsageError
from lmprune.healing.settings import HealSettings
from lmprune.text.sources import DataSettings


@with_options(HealSettings, DataSettings)
def heal(
    settings: HealSettings,
    data: DataSettings,
    pruned: Annotated[str | None, typer.Argument(help="The pruned checkpoint; left out with --recipe.")] = None,
    out: Annotated[Path | None, typer.Argument(help="New folder for the healed checkpoint.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Heal straight from the base model of this recipe.")] = None,
    show_preset: Annotated[
        str | None, typer.Option("--show-preset", help="Print what a preset means for --model, and stop.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model for --show-preset.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a pruned model for a while, so that it closes the wound, and write a plain checkpoint."""
    if show_preset is not None:
        return _show_preset(replace(settings, preset=show_preset), model or pruned, recipe, json)
    if model is not None:
        raise UsageError("--model belongs to --show-preset. Give the pruned model as the first argument")
    if recipe is not None and out is None and pruned is not None:
        out, pruned = Path(pruned), None
    if out is None or (pruned is None) == (recipe is None):
        raise UsageError("give PRUNED and OUT, or --recipe RECIPE and OUT")
    from accelerate import PartialState

    from lmprune.healing import heal as run
    from lmprune.quiet import quiet_bars

    quiet_bars()
    done = run(pruned, out, settings, data, recipe=recipe)
    PartialState().destroy_process_group()
    closed = "" if done.gap_closed is None else f": {done.gap_closed:.1%} of the gap to {done.original:.4f} closed"
    text = (
        f"{done.method}, best of {done.steps} steps after {done.best_step}, {done.seconds:.0f} s\n"
        f"held-out loss {done.pruned:.4f} -> {done.healed:.4f}{closed}\n{done.path}"
    )
    show.result(text, asdict(done) | {"path": str(done.path)}, json)


def _show_preset(settings: HealSettings, model: str | None, recipe: str | None, json: bool) -> None:
    from lmprune.healing.presets import PRESETS, resolve
    from lmprune.healing.settings import choose
    from lmprune.healing.sources import Source
    from lmprune.models.cut import open_cut

    choose("--show-preset", settings.preset, tuple(PRESETS))
    if (model is None) == (recipe is None):
        raise UsageError(f"--show-preset {settings.preset}: for which model? Add --model MODEL or --recipe RECIPE")
    source = Source(open_cut(recipe if recipe is not None else str(model)))
    resolved, notes = resolve(settings, source.facts())
    values = resolved.to_data()
    lines = [f"# {PRESETS[settings.preset].source}", *(f"# {note}" for note in notes)]
    lines += [f"{name}: {value}" for name, value in values.items()]
    show.result("\n".join(lines), {"source": PRESETS[settings.preset].source, "notes": notes, **values}, json)
