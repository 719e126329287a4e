"""``lmprune draft``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmprune.benching.draft_rows import DraftSettings
from lmprune.cli import show
from lmprune.cli.options import MODEL, with_options
from lmprune.text.sources import DataSettings

if TYPE_CHECKING:
    from lmprune.benching.draft_rows import DraftReport


@with_options(DraftSettings, DataSettings)
def draft(
    base: Annotated[str, typer.Argument(help=f"{MODEL} A pruned one alone is judged as a draft of its own base.")],
    settings: DraftSettings,
    data: DataSettings,
    small: Annotated[str | None, typer.Argument(metavar="[DRAFT]", help="The draft, likewise.")] = None,
    recipe: Annotated[str | None, typer.Option(help="The draft as a recipe, instead of DRAFT.", metavar="R")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the result there.", metavar="DRAFT.json")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Judge a pruned model as the draft of its own base in speculative decoding, which changes no token of the output.

    Says how often both would say the same, what that should be worth for each number of draft tokens, and what it is
    worth by transformers' `generate`.
    """
    from lmprune.benching.drafting import draft as run
    from lmprune.benching.drafting import how_to_run, pair
    from lmprune.errors import UsageError
    from lmprune.files import check_output_file, write_json
    from lmprune.quiet import quiet_bars

    if recipe is not None and small is not None:
        raise UsageError(f"give the draft once: {small}, or --recipe {recipe}")
    if output is not None:
        check_output_file(output)
    quiet_bars()
    whole, cut = pair(base, recipe if recipe is not None else small)
    done = run(whole, cut, settings, data)
    if output is not None:
        write_json(output, done.to_data())
    how = how_to_run(whole, cut, done.best.proposed) if done.pays else []
    show.result("\n".join([_text(done), *([""] if how else []), *how]), done.to_data(), json)


def _text(done: DraftReport) -> str:
    costs = done.costs
    head = ("draft tokens", "greedy x", "sampling x", "cost of reading them")
    rows = [
        (
            str(row.proposed),
            f"{row.greedy:.2f}",
            f"{row.sampling:.2f}",
            f"{costs.reading[row.proposed + 1] / costs.base:.2f}",
        )
        for row in done.rows
    ]
    lines = [
        f"{done.draft}: {done.layers[1]} layers, as a draft of {done.base} of {done.layers[0]}",
        f"says the same in {done.greedy:.1%} of {done.compared:,} next tokens of {done.source}; "
        f"of sampled tokens {done.acceptance:.1%} would be kept",
        f"a pass costs {costs.ratio:.2f} of one of the base ({1000 * costs.base:.2f} ms, {done.device})",
        "",
        show.table(head, rows, numbers=True),
        "x: predicted times as fast as the base alone; reading them: a pass over them in passes over one",
        "",
        *_measured(done),
        done.verdict(),
    ]
    return "\n".join(lines)


def _measured(done: DraftReport) -> list[str]:
    found = done.measured
    if found is None:
        return []
    alone, with_draft = (1000 * seconds for seconds in found.overhead)
    return [
        f"measured by transformers with {found.proposed} draft tokens: {found.speed_up:.2f} times as fast; by "
        f"{found.kept:.2f} tokens a round it should be {found.with_host:.2f}, and {found.predicted:.2f} in a runtime "
        f"without transformers' own work ({alone:.2f} ms a token alone, {with_draft:.2f} ms a round)",
        f"the output is the base's own, token for token, for {found.same} of {found.prompts} prompts",
        "",
    ]
