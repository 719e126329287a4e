"""Tables and pictures of README and docs, from the result files that commands wrote.

    python scripts/figures.py            render them all
    python scripts/figures.py --check    say which are stale, and exit with 1 if any is

A table stands between ``<!-- figure: NAME -->`` and ``<!-- end -->`` in a Markdown file. NAME is
``benchmarks/results/NAME.csv``; ``NAME.json`` beside it holds the command, the date, the versions and how columns are
shown: ``"columns": {"facts": ["title", ".1%"]}``. ``columns=a,b`` shows those alone, ``rows=COLUMN:VALUE|VALUE`` those
rows alone. ``caption`` shows the command, the day and the note without the table: below a picture.

A picture carries the SHA-256 of the result files that it was drawn from.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figure: (?P<name>[\w.-]+)(?P<how>[^>]*?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
DRAWN_FROM = "lmprune-source"
SCHEMES = {"light": "#1f2328", "dark": "#e6edf3"}


@dataclass(frozen=True)
class Result:
    """A result file: its rows as text, and what its command says of it."""

    name: str
    rows: Sequence[Mapping[str, str]]
    about: Mapping[str, Any]

    @classmethod
    def read(cls, name: str) -> Result:
        """Raises: FileNotFoundError, where no such result is committed."""
        with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return cls(name, rows, json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))

    def table(self, columns: Sequence[str] = (), only: str = "") -> str:
        """The rows as Markdown, numbers to the right, and below them the command and the day."""
        shown = {name: self.about["columns"][name] for name in columns or self.about["columns"]}
        where, _, values = only.partition(":")
        rows = [row for row in self.rows if not only or row[where] in values.split("|")]
        assert rows, f"{self.name}: no row has {only}"
        lines = [[title for title, _ in shown.values()], ["--:" if how else "---" for _, how in shown.values()]]
        lines += [[_shown(row[name], how) for name, (_, how) in shown.items()] for row in rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{self.caption()}"

    def caption(self) -> str:
        """The command, the day, and the note."""
        day = datetime.date.fromisoformat(self.about["date"])
        return f"`{self.about['command']}`, {day.day} {day:%B %Y}." + f" {self.about.get('note') or ''}".rstrip() + "\n"


def _shown(value: str, how: str) -> str:
    """A cell: ``0.956`` as ``.1%`` is ``95.6 %``."""
    if not value or not how:
        return value
    number = format(int(float(value)) if how.endswith("d") else float(value), how)
    return number.replace("%", " %")


def rendered(text: str) -> str:
    """A Markdown file's text with its tables rendered anew."""

    def render(found: re.Match[str]) -> str:
        words = dict(word.partition("=")[::2] for word in found["how"].split())
        columns = words["columns"].split(",") if "columns" in words else ()
        result = Result.read(found["name"])
        inside = result.caption() if "caption" in words else result.table(columns, words.get("rows", ""))
        return f"{found[1]}\n{inside}\n{found['end']}"

    return BLOCK.sub(render, text)


def pages() -> list[Path]:
    """Where tables may stand."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# --- pictures ---------------------------------------------------------------------------------------------------------


def cuts(results: Sequence[Result], ink: str) -> Any:
    """Facts and arithmetic that are left, by the share of the parameters that is left.

    Lines are cuts of a sweep; single marks, the two models of the walk in which something was done about the cut, and
    those of which layers, neurons and width went under one budget.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from lmprune.drawing.canvas import COLOURS, GREY, MARKS

    sweep, walk, sizes = results
    ways = {
        "angular": ("the paper's cut", 1, "--"),
        "angular, repaired": ("the paper's cut, refitted", 5, "--"),
        "best": ("best cut", 4, "-"),
        "best, repaired": ("best cut, refitted", 0, "-"),
    }
    models = {row["model"]: row for row in walk.rows}
    whole = next(row for row in sweep.rows if row["curve"] == "nothing")
    single = (
        (models["healed"], "the paper's cut, trained", COLOURS[3], "D"),
        (models["repaired"], "without layers 4, 6, 7, refitted", COLOURS[2], "*"),
        *(
            (row, "_" * number + "layers, neurons and width, refitted", COLOURS[2], "^")
            for number, row in enumerate(sizes.rows)
        ),
    )
    paint = {name: ink for name in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    with matplotlib.rc_context(paint):
        figure = Figure(figsize=(8.6, 3.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, title in zip(
            panels, ("facts", "arithmetic"), ("facts known", "sums of four steps, written out")
        ):
            for curve, (label, look, line) in ways.items():
                rows = [whole, *(row for row in sweep.rows if row["curve"] == curve)]
                across, up = ([100 * float(row[name]) for row in rows] for name in ("parameters", key))
                axes.plot(
                    across, up, line, marker=MARKS[look], color=COLOURS[look], label=label, linewidth=1.8, clip_on=False
                )
            for row, label, colour, mark in single:
                left = 100 * float(row["parameters"]) / float(models["original"]["parameters"])
                how: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 15 if mark == "*" else 10}
                axes.plot(left, 100 * float(row[key]), label=label, linestyle="", zorder=4, clip_on=False, **how)
            axes.set(xlabel="parameters left, %", ylim=(0, 100))
            axes.set_title(f"{title}, %", fontsize=10, loc="left")
            axes.grid(alpha=0.25, color=GREY)
            axes.spines[["top", "right"]].set_visible(False)
            axes.invert_xaxis()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


PICTURES: Mapping[str, tuple[Sequence[str], Callable[[Sequence[Result], str], Any]]] = {
    "cuts": (("demo-sweep", "demo-walk", "demo-sizes"), cuts)
}
"""Name of a picture in docs/figures -> the results that it is drawn from, and how."""
TAKEN: Mapping[str, Sequence[str]] = {"report": ("demo-sweep",)}
"""Pictures that `scripts/picture.py` takes -> the result file of the same sweep."""


def picture(scheme: str, name: str) -> Path:
    """``docs/figures/cuts-dark.png``."""
    return ROOT / "docs" / "figures" / f"{name}-{scheme}.png"


def hash_of(names: Sequence[str]) -> str:
    """Of the rows of these results alone: a picture does not change with a command's words."""
    return hashlib.sha256(b"".join((RESULTS / f"{name}.csv").read_bytes() for name in names)).hexdigest()


def draw(name: str) -> None:
    """Draw a picture for light and for dark pages."""
    from lmprune.drawing.canvas import render

    sources, how = PICTURES[name]
    results = [Result.read(source) for source in sources]
    for scheme, ink in SCHEMES.items():
        stamp(
            picture(scheme, name), render(how(results, ink), "png", name, dpi=170, transparent=True), hash_of(sources)
        )


def stamp(path: Path, png: bytes, source: str) -> None:
    """Write a picture that carries what it was made from."""
    from PIL import Image, PngImagePlugin

    about = PngImagePlugin.PngInfo()
    about.add_text(DRAWN_FROM, source)
    path.parent.mkdir(exist_ok=True)
    Image.open(io.BytesIO(png)).save(path, pnginfo=about, optimize=True)


def stamped(path: Path) -> str | None:
    """What a picture was made from."""
    from PIL import Image

    with Image.open(path) as found:
        return found.info.get(DRAWN_FROM)


def stale() -> list[str]:
    """What the result files no longer say, one line each."""
    found = [
        f"{page.relative_to(ROOT)}: its tables" for page in pages() if rendered(text := page.read_text("utf-8")) != text
    ]
    for name, sources in {**{name: sources for name, (sources, _) in PICTURES.items()}, **TAKEN}.items():
        for path in (picture(scheme, name) for scheme in SCHEMES):
            if not path.is_file() or stamped(path) != hash_of(sources):
                found.append(f"{path.relative_to(ROOT)}: of other results than {', '.join(sources)}")
    return found


def main() -> int:
    """Render, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    if parser.parse_args().check:
        for line in (wrong := stale()):
            print(f"stale: {line}. Run `python scripts/figures.py`, or scripts/picture.py", file=sys.stderr)
        return int(bool(wrong))
    for page in pages():
        page.write_text(rendered(page.read_text("utf-8")), "utf-8")
    for name in PICTURES:
        draw(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
