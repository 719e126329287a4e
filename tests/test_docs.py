"""README and docs: links lead somewhere, tables and pictures say what was measured, and commands parse."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.main import get_command

import lmprune
from lmprune.cli import app as command_line

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md", ROOT / "recipes/README.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


figures, site = script("figures"), script("make_docs")


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = site.CODE.sub("", page.read_text(encoding="utf-8"))
    found = [(match["to"], match["anchor"]) for match in site.LINK.finditer(text)]
    for to, anchor in found:
        if re.match(r"[a-z]+:", to):
            continue
        target = (page.parent / to).resolve() if to else page
        assert target.exists(), to
        assert not anchor or anchor[1:] in anchors(target), to + anchor


def test_the_site_has_every_page_and_no_dead_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "PAGES", tmp_path)
    assert site.gather() == []
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = set(re.findall(r"[\w-]+\.md", json.dumps(nav)))
    assert listed == {path.name for path in site.PAGES.glob("*.md")} - set(site.UNLISTED)
    assert "<math" in (site.PAGES / "method.md").read_text() and "$" not in (site.PAGES / "method.md").read_text()


def test_a_dead_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "PAGES", tmp_path / "pages")
    turned, dead = site._turned("[a](choosing.md) [b](nothing.md#x) `[c](code.md)`", ROOT / "docs/x.md", site.sources())
    assert dead == ["nothing.md"] and "[c](code.md)" in turned
    turned, dead = site._turned("[a](docs/choosing.md#criteria)", ROOT / "CONTRIBUTING.md", site.sources())
    assert not dead and turned == "[a](choosing.md#criteria)"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text('<a href="../b/">b</a><a href="#here">x</a><p id="here"></p>')
    assert site.dead_links(tmp_path) == ["a/index.html: no page ../b/"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<a href="../a/#there">a</a>')
    assert site.dead_links(tmp_path) == ["b/index.html: no anchor ../a/#there"]


@pytest.mark.slow
def test_the_site_is_built() -> None:
    pytest.importorskip("zensical")
    done = subprocess.run([sys.executable, ROOT / "scripts/make_docs.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (site.SITE / "api" / "index.html").read_text(encoding="utf-8")
    assert "Samples to measure, at most." in page, "an option's help stands on the page"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_no_figure_is_stale() -> None:
    assert figures.stale() == []


def test_a_stale_figure_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(figures.RESULTS, tmp_path / "results")
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    assert figures.stale() == []
    for name, now in (("demo-walk", "README.md: its tables"), ("demo-sweep", "docs/figures/cuts-dark.png")):
        table = tmp_path / "results" / f"{name}.csv"
        before = table.read_text()
        table.write_text(before.replace("0.9", "0.8"))
        assert any(now in line for line in figures.stale()), name
        table.write_text(before)


def test_a_table_shows_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    (tmp_path / "x.csv").write_text("way,n,share\na,1000,0.125\nb,2,\n")
    about = {"command": "make x", "date": "2026-11-03", "columns": {"way": ["way", ""], "n": ["n", ",d"],
             "share": ["share", ".1%"]}}  # fmt: skip
    (tmp_path / "x.json").write_text(json.dumps(about))
    text = "<!-- figure: x -->\nold\n<!-- end -->"
    assert figures.rendered(text) == (
        "<!-- figure: x -->\n\n| way | n | share |\n| --- | --: | --: |\n| a | 1,000 | 12.5 % |\n| b | 2 |  |\n\n"
        "`make x`, 3 November 2026.\n\n<!-- end -->"
    )
    picked = figures.rendered("<!-- figure: x columns=way rows=n:2 -->\n<!-- end -->")
    assert "| b |" in picked and "| a |" not in picked and "share" not in picked
    with pytest.raises(FileNotFoundError):
        figures.rendered("<!-- figure: y -->\n<!-- end -->")


def test_every_result_tells_its_command() -> None:
    for table in figures.RESULTS.glob("*.csv"):
        about = json.loads(table.with_suffix(".json").read_text())
        assert about["command"] and about["versions"] and figures.Result.read(table.stem).table()


def test_the_numbers_in_the_readme_are_those_that_were_measured() -> None:
    """What sentences say, beside the files that hold it."""
    walk = {row["model"]: row for row in figures.Result.read("demo-walk").rows}
    for model in ("repaired", "pruned", "original"):
        assert f"{100 * float(walk[model]['facts']):.1f}".removesuffix(".0") in README
        assert f"{100 * float(walk[model]['arithmetic']):.1f}".removesuffix(".0") in README
    sweep = {(row["curve"], row["gone"]): row for row in figures.Result.read("demo-sweep").rows}
    for cut, said in (
        (("best", "3 (4,7,9)"), "{facts} % of the facts are left without them, and {arithmetic} % of the sums"),
        (("angular", "3 (2-4)"), "2 to 4, it is {facts} and {arithmetic} %"),
    ):
        values = {key: f"{100 * float(sweep[cut][key]):.1f}" for key in ("facts", "arithmetic")}
        assert said.format(**values) in " ".join(README.split())
    beside = figures.Result.read("peers-gemma-3-270m").rows
    ours, pruneme, short, width = (
        next(f"{float(row['rise']):+.3f}" for row in beside if row["kind"].startswith(job) and who in row["by"])
        for job, who in (("all", "refit"), ("distances", "PruneMe"), ("distances", "short"), ("all", "width"))
    )
    assert f"loss rises by | {ours} | raises | {pruneme} | {short} | {width} | not run |" in README
    support = (ROOT / "docs" / "architectures.md").read_text()
    ((right, some, refused),) = re.findall(r"`lmprune prune`: (\d+) right, (\d+) some, (\d+) refused", support)
    ((alone, raises, wrong, untested),) = re.findall(
        r"mergekit by itself: (\d+) right, (\d+) raises, (\d+) wrong, (\d+) untested", support
    )
    of_all = sum(map(int, (right, some, refused)))
    assert of_all == sum(map(int, (alone, raises, wrong, untested)))
    for page in (README, (ROOT / "docs" / "peers.md").read_text()):
        words = " ".join(page.split())
        assert f"{alone} right, {wrong} silently wrong" in words
        assert re.search(
            rf"Of {of_all} .*right for {alone}, raises for {raises} and writes another model for {wrong}", words
        )
    assert f"right for {right}, by their logits" in " ".join(README.split())
    assert f"{refused} architectures are refused and {some} only in part" in README
    measured = (ROOT / "benchmarks" / "README.md").read_text()
    for page in (measured, README):
        assert "takes 27.8 times as long" in " ".join(page.split())
    assert "lmprune, last token, whole matrix | 3.14 | 1.005" in measured and "1.005 times" in README
    assert figures.Result.read("demo").about["command"] in " ".join(measured.replace("\\\n", "").split())
    gemma = figures.Result.read("gemma-3-270m").rows
    cut, healed, fewer = (
        next(row for row in gemma if (row["drop"], row["by"], row["stage"]) == key)
        for key in (("4", "best", "cut"), ("4", "best", "healed"), ("2", "deepest", "cut"))
    )
    back, left = 1 - float(healed["rise"]) / float(cut["rise"]), float(fewer["sums"])
    assert f"take back {100 * back:.0f} % of the loss" in " ".join(README.split())
    assert f"{100 * left:.0f} % of those are left" in " ".join(README.split())
    width = (ROOT / "docs" / "width.md").read_text()
    half = next(r for r in figures.Result.read("budget-demo").rows if r["asked"] == "0.5" and r["way"] == "lmprune")
    facts, sums = (f"{100 * float(half[key]):.0f}" for key in ("facts", "arithmetic"))
    assert f"half of all parameters go, and {facts} and {sums} % stay" in " ".join(README.split())
    *_, row = figures.Result.read("demo-sizes").rows
    facts, sums = (f"{100 * float(row[key]):.1f}" for key in ("facts", "arithmetic"))
    assert f"{facts} % of the facts and {sums} % of the arithmetic" in width
    recipes = len([path for path in (ROOT / "recipes").glob("*.yml")])
    assert f"{recipes} published cuts" in README
    from lmprune.criteria import OWN

    assert f"{len(OWN)} criteria side by side" in README


def test_the_numbers_beside_the_paper_are_those_that_were_measured() -> None:
    page = " ".join((ROOT / "docs" / "paper.md").read_text(encoding="utf-8").split())
    demo, gemma = figures.Result.read("demo").rows, figures.Result.read("gemma-3-270m").rows

    def of(rows: list[dict[str, Any]], drop: int, stage: str, by: str) -> dict[str, float]:
        keys = (("drop", str(drop)), ("kind", "depth" if drop else "whole"), ("stage", stage), ("by", by))
        (row,) = (row for row in rows if all(row[key] == value for key, value in keys))
        return {key: float(row[key]) for key in ("rise", "agreement", "facts", "arithmetic", "sums") if row.get(key)}

    def span(rows: list[dict[str, Any]], drop: int, key: str, scale: int, digits: int) -> str:
        """The least and the most of what criteria chose, those by chance left out."""
        found = [row for row in rows if row["drop"] == str(drop) and (row["kind"], row["stage"]) == ("depth", "cut")]
        values = [scale * float(row[key]) for row in found if not row["by"].startswith("random")]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    def shares(key: str, *rows: dict[str, float]) -> list[str]:
        return [f"{100 * row[key]:.0f}" for row in rows]

    sweep = {(row["curve"], row["gone"]): row for row in figures.Result.read("demo-sweep").rows}
    distance, best = (
        f"{100 * float(sweep[key]['facts']):.0f}" for key in (("angular", "4 (2-5)"), ("best", "4 (2,4,7,9)"))
    )
    angular, deepest = ([of(gemma, drop, "cut", by) for drop in (2, 4)] for by in ("angular", "deepest"))
    cut, refit = ([of(gemma, drop, stage, "best") for drop in (2, 4)] for stage in ("cut", "refit"))
    healed = [of(gemma, 2, "healed", "angular"), of(gemma, 4, "healed", "best")]
    ours = [of(demo, 3, stage, by) for stage, by in (("cut", "angular"), ("cut", "one-shot"), ("refit", "one-shot"))]
    by_loss = [of(gemma, 4, "cut", by)["sums"] for by in ("one-shot", "greedy", "segment", "best")]
    rises = [[f"{row['rise']:.2f}" for row in rows] for rows in (cut, refit, healed)]
    assert f"{span(gemma, 4, 'facts', 100, 0)} % (24 questions), whichever of six criteria chose" in page
    assert f"The demo at 25 %: {span(demo, 3, 'facts', 100, 0)} % by the criterion" in page
    assert f"at 33 % {distance} % by distance and {best} % by `best`" in page
    assert f"Gemma at 22 %: the loss rises by {span(gemma, 4, 'rise', 1, 1)} nats" in page
    assert f"they fall to {shares('facts', of(gemma, 1, 'cut', 'random 0'))[0]} % with one layer" in page
    assert f"a rise of {deepest[0]['rise']:.2f} nats against {angular[0]['rise']:.2f} by distance" in page
    assert f"at 22 % {deepest[1]['rise']:.1f} against {angular[1]['rise']:.1f}" in page
    assert f"at 25 % of the demo {of(demo, 3, 'cut', 'deepest')['rise']:.2f} against {ours[0]['rise']:.2f}" in page
    assert f"{100 * of(gemma, 0, 'cut', '')['sums']:.0f} % whole: {100 * angular[0]['sums']:.0f} % without 8-9" in page
    assert f"{100 * deepest[0]['sums']:.0f} % without 15-16" in page
    assert f"{100 * angular[1]['sums']:.0f} % without 14-17, the distance's" in page
    assert f"{100 * deepest[1]['sums']:.0f} % without 13-16" in page
    assert f"{100 * min(by_loss):.0f} to {100 * max(by_loss):.0f} % without what four ways by loss choose" in page
    whole, left = of(demo, 0, "cut", "")["arithmetic"], ours[0]["arithmetic"]
    assert f"worked sums: {100 * whole:.1f} % whole, {100 * left:.1f} % without 2-4" in page
    assert round(ours[0]["rise"] / ours[2]["rise"]) == 38 and "leaves a thirty-eighth of the damage" in page
    said = f"{ours[0]['rise']:.2f} nats by distance, {ours[1]['rise']:.2f} by one-shot loss, and {ours[2]['rise']:.3f}"
    assert said in page
    (a, b), (c, d), (e, f) = rises
    assert (
        f"a rise of {a} to {c} at 11 %, and of {b} to {d} at 22 %; 20 steps of LoRA after it come to {e} and {f}"
        in page
    )
    (a, b), (c, d) = shares("agreement", *healed), shares("agreement", *refit)
    assert f"({a} for {c} %, {b} for {d} %)" in page
    assert f"({max(shares('sums', *refit, *healed), key=int)} % at most;" in page


# --- commands ---------------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """The lines of ``lmprune`` in blocks of code, with the page that they stand in."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                for part in line.removeprefix("$ ").split(" && "):
                    if part.startswith("lmprune ") and "..." not in part and "[" not in part:
                        found.append((str(page.relative_to(ROOT)), part))
    return found


def test_commands_parse() -> None:
    known: dict[str, Any] = dict(get_command(command_line.app).commands)  # type: ignore[attr-defined]
    assert len(commands()) > 40
    wrong = []
    for page, line in commands():
        words = shlex.split(line, comments=True)
        if words[1] not in known:
            assert words[1].startswith("-") or words[1] == "eval", (page, line)
            continue
        try:
            known[words[1]].make_context(words[1], words[2:])
        except Exception as exc:  # of the parser or of a setting, whatever it is: every one is told
            wrong.append(f"{page}: {line}: {exc}")
    assert wrong == []


def test_the_readme_names_what_a_newcomer_needs() -> None:
    top = README[: README.index("## Three commands")]
    assert "make demo" in top and "make test" in top and "## Two commands" in top
    for command in ("pip install lmprune", "lmprune recipe", "mergekit-yaml recipe.yml", "lm_eval --model lmprune"):
        assert command in README
    assert len(README.split()) < 2000, "a minute, and tables with their commands"


@pytest.mark.slow
def test_the_three_commands_work_as_written(tmp_path: Path) -> None:
    block = README.partition("## Three commands\n")[2].partition("```\n")[2].partition("```")[0]
    commands = [line for line in block.replace("\\\n", " ").splitlines() if line and not line.startswith("pip ")]
    assert [line.split()[0] for line in commands] == ["lmprune", "mergekit-yaml", "lm_eval"]
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (tmp_path / "pruned" / "model.safetensors").is_file() or list((tmp_path / "pruned").glob("*.safetensors"))
    assert "lmprune_demo_arithmetic" in done.stdout


# --- versions ---------------------------------------------------------------------------------------------------------


def test_one_version_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == lmprune.__version__ and cited["license"] == "Apache-2.0"
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first is not None and first[1].rstrip(",") == lmprune.__version__
