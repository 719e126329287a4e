"""``lmprune draft``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmprune.benching.draft_rows import DraftSettings
from lmprune.cli import show
from lmprune.cli.options import MODEL, NOT_JOINED, Useless, names_of, there, with_options, without
from lmprune.sweeping.draft_search import SearchSettings
from lmprune.text.sources import DataSettings

if TYPE_CHECKING:
    from lmprune.benching.draft_rows import DraftReport
    from lmprune.sweeping.draft_search import Found


@with_options(
    DraftSettings,
    SearchSettings,
    DataSettings,
    useless=(
        NOT_JOINED,
        Useless(tuple(names_of(SearchSettings)), without("search"), "without --search"),
        Useless(("prompt_length", "tokens"), without("prompts"), "--prompts 0 measures none"),
    ),
)
def draft(
    base: Annotated[
        str, typer.Argument(help=f"{MODEL} A pruned one alone is judged as a draft of its own base."), there
    ],
    settings: DraftSettings,
    searching: SearchSettings,
    data: DataSettings,
    small: Annotated[str | None, typer.Argument(metavar="[DRAFT]", help="The draft, likewise."), there] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The draft as a recipe, instead of DRAFT.", metavar="R"), there
    ] = None,
    search: Annotated[
        Path | None,
        typer.Option(help="Look for the best cut of BASE, write it to this new folder, and judge it.", metavar="DIR"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the result there.", metavar="DRAFT.json")
    ] = None,
) -> None:
    """Judge a pruned model as the draft of its own base in speculative decoding, which changes no token of the output.

    Says how often both would say the same, what that should be worth for each number of draft tokens, and what it is
    worth by transformers' `generate`.

    Examples:
        lmprune draft pruned/
        lmprune draft demo --search draft/ --fractions 0.5,0.75 --heal-steps 100
    """
    from lmprune.benching.drafting import draft as run
    from lmprune.benching.drafting import how_to_run, pair
    from lmprune.errors import UsageError
    from lmprune.files import check_output_file, write_json
    from lmprune.quiet import quiet_bars
    from lmprune.sweeping.draft_search import search_draft

    given = [str(one) for one in (small, recipe, search) if one is not None]
    if len(given) > 1:
        raise UsageError(f"give the draft once, not {' and '.join(given)}: DRAFT, --recipe or --search")
    if output is not None:
        check_output_file(output)
    quiet_bars()
    found = search_draft(base, search, searching, settings, data) if search is not None else None
    whole, cut = pair(base, found.path if found is not None else recipe if recipe is not None else small)
    done = run(whole, cut, settings, data)
    tried = [candidate.to_data() for candidate in found.candidates] if found is not None else None
    result = done.to_data() | ({"candidates": tried} if tried is not None else {})
    if output is not None:
        write_json(output, result)
    how = how_to_run(whole, cut, done.best.proposed) if done.pays else []
    lines = [*(_candidates(found) if found is not None else []), _text(done), *([""] if how else []), *how]
    show.result("\n".join(lines), result)


def _candidates(found: Found) -> list[str]:
    from lmprune.cuts.plan import spell

    head = ("criterion", "keeps", "says the same", "a pass costs", "draft tokens", "greedy x")
    rows = [
        (
            one.criterion,
            spell(one.plan.kept),
            f"{one.greedy:.1%}",
            f"{one.ratio:.2f}",
            str(one.best.proposed),
            f"{one.best.greedy:.2f}",
        )
        for one in found.candidates
    ]
    return [show.table(head, rows, numbers=True), "", str(found.path), ""]


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
        f"measured by transformers with {found.proposed} draft tokens: {found.speed_up:.2f} times as fast, by "
        f"{found.kept:.2f} tokens a round; that is {found.of_predicted:.0%} of {found.with_host:.2f}, which these "
        f"rounds should give; {found.predicted:.2f} in a runtime without transformers' own work ({alone:.2f} ms a "
        f"token alone, {with_draft:.2f} ms a round)",
        f"the output is the base's own, token for token, for {found.same} of {found.prompts} prompts",
        "",
    ]
