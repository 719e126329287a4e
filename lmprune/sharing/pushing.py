"""From a recipe to a repository on the Hub, or to the folder that would become one."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from lmprune import hub
from lmprune.files import check_output_folder, new_folder
from lmprune.sharing.bundle import Bundle


@dataclass(frozen=True)
class Shared:
    """What was pushed, or would be: its files, and where they went."""

    files: tuple[str, ...]
    folder: Path | None = None
    pushed: hub.Pushed | None = None


def push(
    recipe: str | Path,
    repository: str,
    *,
    results: str | Path | None = None,
    weights: str | Path | None = None,
    base: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    dry_run: str | Path | None = None,
) -> Shared:
    """Share ``recipe`` as the repository ``repository`` on the Hub.

    Args:
        results: the folder of a sweep that measured this cut.
        weights: the checkpoint or adapter to push with it.
        base: what others call the base, where the recipe names a folder of this machine.
        private: make a new repository private.
        create_pr: propose the change instead of making it.
        dry_run: write the files into this new folder, and push nothing.

    Raises:
        UsageError: the repository's name, or there is no token, or the base has no name that others know.
        RecipeError: the results or weights are of another recipe.
        OutputError: something tells of this machine, or the folder cannot be written.
        HostError, NetworkError: the Hub refuses, or cannot be reached.
    """
    if dry_run is not None:
        check_output_folder(Path(dry_run))
    bundle = Bundle.of(
        str(recipe), repository, results=Path(results) if results else None, weights=Path(weights) if weights else None,
        base=base,
    )  # fmt: skip
    if dry_run is not None:
        with new_folder(Path(dry_run)) as folder:
            files = bundle.write(folder, copy=True)
        return Shared(tuple(files), folder=Path(dry_run))
    with tempfile.TemporaryDirectory(prefix="lmprune-") as scratch:
        files = bundle.write(Path(scratch), copy=False)
        plan = bundle.subject.plan
        message = f"lmprune: {plan.describe()}" if plan is not None else "lmprune"
        pushed = hub.push(Path(scratch), files, repository, message=message, private=private, create_pr=create_pr)
    return Shared(tuple(files), pushed=pushed)
