"""``lmprune heal``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmprune.cli import show
from lmprune.cli.options import MODEL, Useless, given, names_of, refuse, there, with_options
from lmprune.errors import UsageError
from lmprune.healing.facts import ANY, Facts
from lmprune.healing.methods import Repairing
from lmprune.healing.presets import PRESETS, resolve
from lmprune.healing.settings import HealSettings
from lmprune.text.sources import DataSettings

_TRAINING = ("micro_batch_size", "patience", "gradient_checkpointing", "report_to")
_RUNNING = (
    *_TRAINING,
    *names_of(DataSettings),
    "eval_data",
    "resume",
    "as_adapter",
    "keep_adapter",
    "stream",
    "self_data",
    "dtype",
)
_USELESS = (
    Useless((*_RUNNING, "device"), given("show_preset"), "--show-preset runs nothing"),
    Useless(("pack",), given("pack"), "healing always joins its text"),
)


@with_options(HealSettings, DataSettings, useless=_USELESS)
def heal(
    settings: HealSettings,
    data: DataSettings,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL), there] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="New folder for the healed checkpoint.")] = None,
    show_preset: Annotated[
        bool, typer.Option("--show-preset", help="Print what --preset and all other options mean for MODEL, and stop.")
    ] = False,
) -> None:
    """Repair a pruned model, or train it for a while, so that it closes the wound; write a plain checkpoint.

    Examples:
        lmprune heal recipe.yml healed/
        lmprune heal recipe.yml repaired/ --method refit
        lmprune heal recipe.yml healed/ --method refit+lora --steps 200 --data text.jsonl
    """
    if show_preset:
        return _show_preset(settings, model, out)
    if model is None or out is None:
        raise UsageError("give MODEL and OUT: a recipe or a pruned checkpoint, and a new folder")
    resolved, _ = resolve(settings, ANY)  # what makes no sense for any model is said before anything is imported
    if isinstance(resolved.way, Repairing):
        refuse(_TRAINING, f"--method {resolved.method} trains nothing")
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
    show.result(text, done.to_data())


def _show_preset(settings: HealSettings, model: str | None, out: Path | None) -> None:
    from lmprune.models.cut import open_cut

    resolve(settings, ANY)
    if model is None:
        raise UsageError("--show-preset: for which model? Give MODEL")
    if out is not None:
        raise UsageError(f"--show-preset writes nothing: leave {out} out")
    cut = open_cut(model)
    empty = cut.empty()
    resolved, notes = resolve(settings, Facts.of(cut), lambda part: part.check_model(empty, cut.origin.plan))
    values = resolved.to_data()
    lines = [f"# {PRESETS[settings.preset].source}", *(f"# {note}" for note in notes)]
    lines += [f"{name}: {value}" for name, value in values.items()]
    show.result("\n".join(lines), {"source": PRESETS[settings.preset].source, "notes": notes, **values})
