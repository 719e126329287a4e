"""``lmprune push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lmprune.cli import show
from lmprune.cli.options import Useless, given, readable, there, with_options
from lmprune.errors import UsageError


@with_options(useless=(Useless(("private", "create_pr"), given("dry_run"), "--dry-run pushes nothing"),))
def push(
    recipe: Annotated[
        str, typer.Argument(help="The recipe: a .yml file, or the name of one that comes with lmprune."), there
    ],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the Hub.")],
    results: Annotated[
        Path | None, typer.Option(help="A folder of `lmprune sweep` that measured this cut.", metavar="RUN/"), readable
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Push this checkpoint or adapter as well.", metavar="OUT/"), readable
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="What others call the base, where it is a folder here.", metavar="ORG/MODEL")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the change as a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder to -o DIR and push nothing.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="New folder, with --dry-run.", metavar="DIR")
    ] = None,
) -> None:
    """Share a recipe on the Hub: its file, what was measured, pictures and a card.

    Nothing is pushed that names a path, a user or a token of this machine.

    Examples:
        lmprune push recipe.yml user/cut --results sweep/ --dry-run -o card/
        lmprune push recipe.yml user/cut --private
    """
    from lmprune.sharing.pushing import push as run

    if dry_run != (output is not None):
        raise UsageError("--dry-run goes with -o DIR, the folder that would be pushed, and -o with --dry-run")
    done = run(
        recipe, repository, results=results, weights=weights, base=base, private=private, create_pr=create_pr,
        dry_run=output,
    )  # fmt: skip
    data: dict[str, Any] = {"files": list(done.files)}
    if done.pushed is None:
        text = "\n".join([*(f"{done.folder}/{name}" for name in done.files), f"nothing was pushed to {repository}"])
        return show.result(text, data | {"out": done.folder})
    pushed = done.pushed
    data |= {"url": pushed.url, "commit": pushed.commit, "pull_request": pushed.pull_request, "changed": pushed.changed}
    said = pushed.pull_request or (pushed.url if pushed.changed else f"{pushed.url} (nothing has changed)")
    show.result(f"{len(done.files)} files\n{said}", data)
