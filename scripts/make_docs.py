"""The docs as a site in build/site: `python scripts/make_docs.py`, which is `make docs`. A dead link is exit status 1.

The pages are those of docs/, and those that stand elsewhere for readers of the repository; links among them are turned
to where they are on the site. Formulas become MathML, so that a page needs no script and nothing from elsewhere. The
API page is made of docstrings.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
PAGES, SITE = ROOT / "build" / "pages", ROOT / "build" / "site"
ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "measurements.md",
    "recipes/README.md": "recipes.md",
    "lmprune/demo/model/README.md": "demo-model.md",
}
UNLISTED = ("demo-model.md",)
LINK = re.compile(r"(?P<before>\]\(|(?:src|srcset|href)=\")(?P<to>[^)\s\"#]*)(?P<anchor>#[^)\s\"]*)?(?P<after>[)\"])")
CODE = re.compile(r"(^(```|~~~).*?^\2|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
MATH = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\w$])\$(?P<inline>[^$\s](?:[^$]*[^$\s])?)\$(?![\w$])", re.DOTALL)


def sources() -> dict[Path, Path]:
    """Every page's file -> its place on the site."""
    found = {page: Path(page.name) for page in sorted((ROOT / "docs").glob("*.md"))}
    return found | {ROOT / name: Path(place) for name, place in ELSEWHERE.items()}


def gather() -> list[str]:
    """Write the pages to build/pages; the links that lead nowhere, one line each."""
    shutil.rmtree(PAGES, ignore_errors=True)
    (PAGES / "figures").mkdir(parents=True)
    places, wrong = sources(), []
    for page, place in places.items():
        text, dead = _turned(page.read_text("utf-8"), page, places)
        wrong += [f"{page.relative_to(ROOT)}: {link}" for link in dead]
        (PAGES / place).write_text(_formulas(text.removeprefix(_head(text))), "utf-8")
    (PAGES / "api.md").write_text("\n".join(_api()), "utf-8")
    return wrong


def _head(text: str) -> str:
    """What stands between two lines of dashes before a model's card."""
    found = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
    return found[0] if found else ""


def _turned(text: str, page: Path, places: dict[Path, Path]) -> tuple[str, list[str]]:
    """A page with its links turned, and the dead ones. Files that are no pages are copied beside the pages."""
    dead: list[str] = []

    def turn(found: re.Match[str]) -> str:
        to = found["to"]
        if not to or re.match(r"[a-z]+:", to):
            return found[0]
        target = (page.parent / to).resolve()
        if target == ROOT / "README.md":
            target = ROOT / "docs" / "index.md"
        if target in places:
            new = places[target].as_posix()
        elif target.is_file() and target.is_relative_to(ROOT):
            under = target.relative_to(ROOT / "docs" if target.is_relative_to(ROOT / "docs") else ROOT)
            (PAGES / under).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, PAGES / under)
            new = under.as_posix()
        else:
            dead.append(to)
            return found[0]
        return f"{found['before']}{new}{found['anchor'] or ''}{found['after']}"

    return _outside_code(text, LINK, turn), dead


def _formulas(text: str) -> str:
    from latex2mathml.converter import convert

    def formula(found: re.Match[str]) -> str:
        if found["block"]:
            return convert(found["block"].strip(), display="block")
        # Within a span, or a line that begins with it would be taken for a block.
        return f"<span>{convert(found['inline'])}</span>"

    return _outside_code(text, MATH, formula) if "$$" in text else text


def _outside_code(text: str, pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str]) -> str:
    parts = CODE.split(text)  # text, code, its fence or nothing, text, ...
    return "".join(
        pattern.sub(replace, part) if number % 3 == 0 else part for number, part in enumerate(parts) if number % 3 != 2
    )


def _api() -> Iterator[str]:
    """A page of all public names: functions, their options, and what they give."""
    import lmprune

    names = [name for name in lmprune.__all__ if not name.startswith("_")]
    functions = [name for name in names if name.islower()]
    options = [name for name in names if name.endswith("Settings")]
    yield "# Python API\n\nEvery public name of `lmprune`. [From Python](python.md) shows them at work.\n"
    for title, some in (
        ("Functions", functions),
        ("Options", options),
        ("What they take and give", [name for name in names if name not in (*functions, *options)]),
    ):
        yield f"## {title}\n"
        yield from (f"::: lmprune.{name}\n" for name in some)


# --- the site that was built ------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """The ids of a page, and where it leads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("id", "name"):
                self.ids.add(value)
            elif value and name in ("href", "src", "srcset"):
                self.links.add(value)


def dead_links(site: Path) -> list[str]:
    """Links, pictures and anchors of the pages of a site that are not there, one line each."""
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    wrong = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            missing = target in pages and parts.fragment and unquote(parts.fragment) not in pages[target].ids
            if missing and not parts.fragment.startswith("__"):
                wrong.append(f"{path.relative_to(site)}: no anchor {link}")
            elif not target.exists():
                wrong.append(f"{path.relative_to(site)}: no page {link}")
    return wrong


def missing_names(site: Path) -> list[str]:
    """Public names that the API page lacks: what cannot be read is left out without a word."""
    import lmprune

    ids = _Page(site / "api" / "index.html").ids
    names = [name for name in lmprune.__all__ if not name.startswith("_")]
    return [f"api/index.html: lacks lmprune.{name}" for name in names if not _stands(name, ids)]


def _stands(name: str, ids: set[str]) -> bool:
    return any(found == f"lmprune.{name}" or found.endswith(f".{name}") for found in ids)


def main() -> int:
    """Gather, build, and look at what was built."""
    if importlib.util.find_spec("zensical") is None:
        print("the site needs Python 3.11 and `pip install 'lmprune[docs]'`, or `make docs`", file=sys.stderr)
        return 1
    wrong = gather()
    if not wrong:
        shutil.rmtree(SITE, ignore_errors=True)
        build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
        built = subprocess.run(build, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True)
        if built.returncode:
            print(built.stdout + built.stderr, file=sys.stderr)
            return 1
        wrong = dead_links(SITE) + missing_names(SITE)
    for line in wrong:
        print(f"dead: {line}", file=sys.stderr)
    print(f"{len(sources()) + 1} pages in {SITE.relative_to(ROOT)}" if not wrong else f"{len(wrong)} dead links")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
