"""The page, and the same in Markdown with pictures for a model card."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from lmprune.cuts.plan import spell
from lmprune.drawing.canvas import Picture
from lmprune.errors import UsageError
from lmprune.evaluation.gate import Gate
from lmprune.files import check_output_file, write_bytes, write_text
from lmprune.reporting import pictures
from lmprune.reporting.collect import Collected
from lmprune.reporting.healings import Account, account
from lmprune.reporting.words import (
    agreement_text,
    bench_rows,
    fenced,
    gate_text,
    in_markdown,
    markdown_table,
    published,
    quantizations_table,
    reason,
    score_text,
    strip,
    summary,
    table,
    task_text,
)
from lmprune.sweeping.points import BASELINE
from lmprune.versions import versions

_FOLDER = Path(__file__).resolve().parent


def report(run: str | Path, out: str | Path, gate: Gate | None = None) -> list[Path]:
    """Make a page of the sweep in the folder ``run``; the files written, the page first.

    Args:
        out: the page; beside it ``OUT.md`` and its pictures.
        gate: when reasoning is said to have fallen.

    Raises:
        UsageError: ``out`` is no name of a page.
        RecipeError: ``run`` is no run folder, lacks the baseline, or its numbers do not belong in one curve.
        OutputError: the page cannot be written.
    """
    out = check_page(Path(out))
    return write_report(Collected.read(Path(run), gate).alike(), out)


def check_page(out: Path) -> Path:
    """``out`` if a page can be written there.

    Raises:
        UsageError, OutputError: it cannot.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{out}: a report is a page; end its name in .html")
    check_output_file(out)
    return out


def write_report(run: Collected, out: Path) -> list[Path]:
    """Write the page to ``out``, and ``OUT.md`` with its pictures in ``OUT-pictures/``; the files written, page first.

    Raises:
        OutputError: they cannot be written.
    """
    quality, speed, map_ = pictures.quality(run), pictures.speed(run), pictures.distances(run)
    drawn = [*([map_] if map_ else []), *quality, *speed]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    values = _values(run) | {"pictures": quality, "speed": speed, "map": map_}
    page = environment.get_template("page.html.j2").render(**values, data=_script_data(run, drawn))
    files = _write_markdown(run, values, drawn, out.with_suffix(".md"))
    write_text(out, page)
    return [out, *files]


def write_markdown(run: Collected, out: Path) -> list[Path]:
    """Only ``OUT.md`` and its pictures; the files written, the text first.

    Raises:
        OutputError: they cannot be written.
    """
    map_ = pictures.distances(run)
    drawn = [*([map_] if map_ else []), *pictures.quality(run), *pictures.speed(run)]
    return _write_markdown(run, _values(run), drawn, out)


def _write_markdown(run: Collected, values: dict[str, Any], drawn: list[Picture], out: Path) -> list[Path]:
    folder = out.with_name(f"{out.stem}-pictures")
    files = [out]
    for picture in drawn:
        files.append(folder / f"{picture.name}.png")
        write_bytes(files[-1], picture.png())
    write_text(out, _markdown(run, values, folder.name, drawn))
    return files


def _values(run: Collected) -> dict[str, Any]:
    head, rows = table(run)
    few_head, few_rows = quantizations_table(run)
    best = run.recommended()
    cuts = run.cuts()
    good = {point.unhealed for point in cuts if not run.rejects(point)}
    offered = [point for point in cuts if not point.made and point.name in good]
    raw = run.results[BASELINE].raw
    return {
        "run": run,
        "model": _short(str(run.sweep.model["name"])),
        "summary": summary(run),
        "warnings": run.warnings(),
        "gate": gate_text(run),
        "head": head,
        "rows": rows,
        "agreement": agreement_text(run),
        "few_head": few_head,
        "few_rows": few_rows,
        "warned": {point.name for points in run.curves().values() for point in points if run.verdict(point).warns},
        "cuts": cuts,
        "best": best or (cuts[0] if cuts else None),
        "offered": sorted(offered, key=lambda point: best is None or point.name != best.unhealed),
        "reasons": {point.name: reason(run, point) for point in cuts},
        "recipes": {point.name: published(run, run.recipe(point) or "") for point in offered},
        "spell": spell,
        "bench": bench_rows(run),
        "healings": _healings(run),
        "samples": run.samples(),
        "provenance": _provenance(run, raw),
        "data_table": [
            [
                task,
                published(run, str(entry.get("dataset") or "local")),
                entry.get("documents"),
                entry.get("shots"),
                entry.get("version"),
                entry.get("hash"),
            ]
            for task, entry in run.results[BASELINE].data.items()
        ],
        "now": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _healings(run: Collected) -> dict[str, Account]:
    """How each repaired or healed point was made, by name."""
    found = {name: account(healing) for name, healing in run.healings().items()}
    return {
        name: Account(*([published(run, line) for line in lines] for lines in said)) for name, said in found.items()
    }


def _provenance(run: Collected, raw: Any) -> dict[str, str]:
    """What it takes to repeat the numbers."""
    model, hardware, settings = run.sweep.model, run.sweep.hardware, run.sweep.settings
    found = {
        "Model": _short(str(model["name"])),
        "Weights": str(model["fingerprint"]),
        "Layers": str(run.layers),
        "Tasks": ", ".join(run.sweep.tasks),
        "Harness": f"lm-evaluation-harness {raw.get('lm_eval_version')}",
        "Commit": str(raw.get("git_hash") or "not in a repository"),
        "Seed": str(settings.get("seed")),
        "Documents": f"at most {settings['limit']} of each task" if settings.get("limit") else "all",
        "Quantizations": str(settings.get("quantizations") or "none"),
        "Repair": str(settings.get("repair") or "none"),
        "Healing": f"{settings['heal']}, {settings.get('heal_steps') or 'preset'} steps"
        if settings.get("heal")
        else "none",
        "Hardware": ", ".join(str(value) for key, value in hardware.items() if value and key != "gpu_memory"),
        "Versions": ", ".join(f"{name} {version}" for name, version in run.sweep.versions.items()),
        "Layer passes": "{} a batch instead of {}, by shared states".format(
            *(run.sweep.passes.get(name, "-") for name in ("shared", "separate"))
        ),
        "Report": f"lmprune {versions()['lmprune']}",
    }
    if model.get("revision"):
        found["Revision"] = str(model["revision"])
    if run.profile is not None:
        found["Profile"] = (
            f"{run.profile.samples} samples, {run.profile.tokens} tokens of {published(run, run.profile.source)}, "
            f"{run.profile.token} token, seed {run.profile.seed}, data {run.profile.data_hash[:23]}"
        )
    return found


def _script_data(run: Collected, drawn: list[Picture]) -> str:
    """What the page's script knows, as JSON that may stand in a script element."""
    by_size: dict[int, Any] = {}
    if run.profile is not None:
        for n in range(1, run.layers):
            start = run.profile.best_block(n)
            by_size[n] = {
                "start": start,
                "distance": round(run.profile.distance(start, n), 4),
                "certainty": run.profile.certainty(n).describe(),
                "row": [round(float(d), 4) for d in run.profile.of_size(n)],
            }
    measured: dict[int, list[str]] = {}
    for points in run.curves().values():
        for point in points:
            scores = run.results[point.name].scores
            said = ", ".join(
                f"{task_text(run.base[task])} {score_text(scores[task])}" for task in run.base if task in scores
            )
            measured.setdefault(point.n, []).append(
                f"{point.name} ({point.plan.describe() if point.plan else 'whole'}): {said}"
            )
    data = {
        "layers": run.layers,
        "sizes": by_size,
        "measured": measured,
        "marks": {f"{picture.name}-{mark}": text for picture in drawn for mark, text in picture.marks.items()},
        "mapRows": pictures.map_rows(run),
    }
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")


def _markdown(run: Collected, values: dict[str, Any], folder: str, drawn: list[Picture]) -> str:
    parts = [f"# Layer pruning of {in_markdown(values['model'])}"]
    parts += ["> " * (line in values["warnings"]) + in_markdown(line) for line in values["summary"]]
    parts += [values["gate"], markdown_table(values["head"], values["rows"])]
    parts += [in_markdown(values["agreement"])] if values["agreement"] else []
    if values["few_rows"]:
        parts += ["In fewer bits:", markdown_table(values["few_head"], values["few_rows"])]
    lines = [f"{strip(point)} {point.name}" for point in values["cuts"] if not point.made]
    parts.append("Layers kept (■) and dropped (□):\n\n" + fenced("\n".join(lines), ""))
    parts += [f"![{in_markdown(picture.title)}]({quote(folder)}/{quote(picture.name)}.png)" for picture in drawn]
    if values["bench"]:
        head = [
            "model",
            "layers",
            "weights, MB",
            "prefill tokens/s",
            "decode tokens/s",
            "times as fast (decode)",
            "ideal",
        ]
        rows = [
            [
                row["name"],
                str(row["layers"]),
                f"{row['weight_bytes'] / 1e6:,.1f}",
                f"{row['prefill_tokens_per_second']:,.0f}",
                f"{row['decode_tokens_per_second']:,.1f}",
                "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["decode_ratio"]),
                f"{row['ideal']:.2f}",
            ]
            for row in values["bench"]
        ]
        parts.append(markdown_table(head, rows))
    best = values["offered"][0] if values["offered"] else None
    if best is not None and (recipe := values["recipes"][best.name]):
        said = in_markdown(f"The recipe of {best.name}, {values['reasons'][best.name]}:")
        parts.append(f"{said}\n\n{fenced(recipe, 'yaml')}")
    if values["healings"]:
        parts += ["How cuts were repaired and healed:", "\n".join(map(_made, *zip(*values["healings"].items())))]
    parts.append("\n".join(f"- {name}: {in_markdown(text)}" for name, text in values["provenance"].items()))
    return "\n\n".join(parts) + "\n"


def _made(name: str, said: Account) -> str:
    """A point's line, at whose end the ridges are folded away."""
    line = f"- {name}: {in_markdown('; '.join(said.lines))}"
    solved = "<br>".join(map(in_markdown, said.solved))
    return f"{line} <details><summary>weight by weight</summary>{solved}</details>" if solved else line


def _short(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name
