"""A report says what the results say, and refuses results that do not belong together."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from measured_run import write_run

from lmprune.errors import ModelError, RecipeError
from lmprune.evaluation.gate import Gate
from lmprune.reporting.collect import Collected
from lmprune.reporting.healings import account
from lmprune.reporting.page import write_report
from lmprune.reporting.pictures import quality
from lmprune.reporting.words import published, quantizations_table, summary, table

CRITERIA = ("angular", "deepest")


@pytest.fixture
def copy(sweep_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(sweep_folder, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def _change(copy: Path, point: str, change: Callable[[dict[str, Any]], None]) -> None:
    (file,) = (copy / "results" / point).glob("results_*.json")
    raw = json.loads(file.read_text())
    for count in raw["n-samples"].values():  # what these tests write of scores is not of four documents
        count["effective"] = 9000
    change(raw)
    file.write_text(json.dumps(raw))


def test_the_page_holds_everything_and_asks_for_nothing(sweep_folder: Path, tmp_path: Path) -> None:
    run = Collected.read(sweep_folder)
    files = write_report(run, tmp_path / "report.html")
    page = files[0].read_text(encoding="utf-8")
    for text in (
        "angular-02",
        "deepest-04",
        "ideal",
        "layer_range",
        "Right answer",
        run.sweep.model["fingerprint"],
        "seed 7",
    ):
        assert text in page, text
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert len(page) < 1_500_000
    markdown = files[1].read_text(encoding="utf-8")
    assert "| baseline | none |" in markdown and "```yaml" in markdown
    for picture in files[2:]:
        assert picture.read_bytes().startswith(b"\x89PNG") and f"({picture.parent.name}/{picture.name})" in markdown
    assert len(files) == 2 + 1 + len(run.base) + 3


def test_one_model_gives_one_page(sweep_folder: Path, tmp_path: Path) -> None:
    run = Collected.read(sweep_folder)
    pages = [write_report(run, tmp_path / f"{i}" / "r.html")[0].read_text() for i in range(2)]
    first, second = (re.sub(r"\d\d:\d\d UTC", "", page) for page in pages)
    assert first == second


def test_without_profile_and_speed(copy: Path, tmp_path: Path) -> None:
    (copy / "profile.json").unlink()
    (copy / "bench.json").unlink()
    page = write_report(Collected.read(copy), tmp_path / "r.html")[0].read_text()
    assert "distance map" not in page and "What each cut gains" not in page and "repaired and healed" not in page


def test_an_unfinished_sweep_is_reported_as_such(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "results" / "angular-02")
    run = Collected.read(copy)
    assert "1 of 5 points are not measured yet." in summary(run)
    assert "angular-02" not in [row[0] for row in table(run)[1]]
    write_report(run, tmp_path / "r.html")


def test_the_gate_speaks_on_the_page_in_the_card_and_in_the_table(copy: Path, tmp_path: Path) -> None:
    def knows(raw: dict[str, Any]) -> None:
        raw["results"]["lmprune_demo_facts"] |= {"acc,none": 0.9, "acc_stderr,none": 0.01}
        raw["results"]["lmprune_demo_arithmetic"] |= {"exact_match,answer": 0.8, "exact_match_stderr,answer": 0.01}

    for point in ("baseline", "angular-02", "angular-04", "deepest-02", "deepest-04"):
        _change(copy, point, knows)
    _change(
        copy, "angular-02", lambda raw: raw["results"]["lmprune_demo_arithmetic"].update({"exact_match,answer": 0.2})
    )
    run = Collected.read(copy)
    sentence = (
        "Dropping 2 of 8 layers (angular) keeps 100 ± 2 % of its knowledge and 25 ± 1 % of its reasoning: do not use "
        "it where steps must be worked out."
    )
    assert run.warnings() == [sentence]
    best = run.recommended()
    (row,) = (" ".join(row) for row in table(run)[1] if row[0] == "angular-02")
    assert row.endswith("⚠") and best is not None and best.n == 4
    assert sentence in summary(run), "the command prints the summary under the table"
    page, markdown, *_ = write_report(run, tmp_path / "r.html")
    assert sentence in page.read_text() and f"> {sentence}" in markdown.read_text()
    assert Collected.read(copy, Gate(falls=0.2)).warnings() == []


def test_few_bits_and_agreement_have_a_table_and_columns(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_run(tiny("qwen3"), tmp_path / "run", quantizations=("int8", "nf4"), agreed=True)
    run = Collected.read(folder)
    head, rows = table(run)
    assert head[:4] == ["model", "layers dropped", "loss", "says the same"]
    assert [row[0] for row in rows] == ["baseline", "angular-02", "deepest-02"], "few bits are no curves"
    assert rows[0][2:4] == ["0.500 ± 0.020", "all"] and rows[1][2:4] == ["2.500 ± 0.020", "75.0 ± 1.0 %"]
    head, rows = quantizations_table(run)
    assert (
        head[:5] == ["model", "quantization", "weights, MB", "loss", "says the same"] and head[-1] == "decode tokens/s"
    )
    assert [row[:2] for row in rows[:6]] == [
        [name + tail, kind]
        for name in ("baseline", "angular-02")
        for tail, kind in (("", "float32"), ("-int8", "int8"), ("-nf4", "nf4"))
    ]
    assert rows[0][4] == "all" and rows[1][4] == "100.0 ± 1.0 %" and len(rows) == 9
    files = write_report(run, tmp_path / "report.html")
    page, markdown = (file.read_text(encoding="utf-8") for file in files[:2])
    for text in (page, markdown):
        assert "In fewer bits" in text and "angular-02-nf4" in text and "1,234 tokens of text.txt" in text
    assert markdown.count("| angular-02 |") == 3, "scores, types and speed, once each"
    plain = Collected.read(write_run(tiny("qwen3"), tmp_path / "plain"))
    assert quantizations_table(plain) == ([], []) and table(plain)[0][2] == "facts (acc)"


REPAIRED: dict[str, Any] = {
    "settings": {"method": "refit", "preset": "quick", "max_length": 64},
    "losses": {"original": 0.5, "pruned": 1.5, "healed": 0.6},
    "gap_closed": 0.9,
    "data": {"source": "/home/ada/text.txt", "train_blocks": 16},
    "repair": {
        "tokens": 1024,
        "projections": [
            {"layer": 5, "path": "mlp.down_proj", "form": "around", "ridge": 0.001},
            {"layer": 5, "path": "self_attn.o_proj", "form": "keep", "ridge": None},
            {"layer": 7, "path": "mlp.down_proj", "form": "distribution", "ridge": None, "before": 0.5, "after": 0.25},
        ],
    },
    "steps": 0,
}
HEALED: dict[str, Any] = {
    "settings": {"method": "lora", "max_length": 128},
    "losses": {"original": 0.5, "pruned": 1.5, "healed": 0.55},
    "gap_closed": 0.95,
    "data": {"source": "ada/talks", "train_blocks": 320},
    "repair": None,
    "first": REPAIRED,
    "steps": 20,
}


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose cuts were repaired and healed, with few pictures to draw."""
    folder = tmp_path_factory.mktemp("made") / "run"
    write_run(tiny("qwen3"), folder, made={"repaired": REPAIRED, "healed": HEALED})
    for name in ("profile.json", "bench.json"):
        (folder / name).unlink()
    return folder


def test_page_and_text_say_how_a_point_was_repaired_and_healed(made: Path, tmp_path: Path) -> None:
    page, markdown, *_ = (file.read_text() for file in write_report(Collected.read(made), tmp_path / "r.html")[:2])
    for repaired, healed in (
        re.findall(r"<dt>angular-02-(?:repaired|healed)</dt><dd>(.*?)</dd>", page, re.DOTALL),
        re.findall(r"^- angular-02-(?:repaired|healed): (.*)$", markdown.replace("\\", ""), re.MULTILINE),
    ):
        lines, _, solved = unescape(repaired).partition("<details>")
        assert lines.rstrip().split("; ") == [
            "refit, quick",
            "held-out loss 1.5000 -> 0.6000, 90.0% of the gap closed",
            "fitted on 1024 tokens of text.txt",
        ]
        assert (
            "layer 5 mlp.down_proj: around, ridge 0.001<br>layer 7 mlp.down_proj: for the distribution, 0.5" in solved
        )
        assert "o_proj" not in solved, "what was kept has no ridge"
        lines, _, again = unescape(healed).partition("<details>")
        assert lines.rstrip().split("; ") == [
            "lora, 20 steps",
            "repaired first: held-out loss 1.5000 -> 0.6000, 90.0% of the gap closed",
            "fitted on 1024 tokens of text.txt",
            "held-out loss 1.5000 -> 0.5500, 95.0% of the gap closed",
            "trained on 320 blocks of at most 128 tokens of ada/talks",
        ]
        assert again == solved


def test_a_point_whose_checkpoint_is_gone_or_foreign_says_little(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    run = Collected.read(tmp_path / "run")
    shutil.rmtree(run.folder / "repaired")
    history = run.folder / "healed" / "deepest-02" / "lmprune.json"
    history.write_text('{"healing": {"repair": 7, "data": [], "first": "x"}}')
    assert set(run.healings()) == {"angular-02-healed", "deepest-02-healed"}
    assert account(run.healings()["deepest-02-healed"]) == (["yes"], [])
    history.write_text("[")
    with pytest.raises(ModelError, match=r"lmprune\.json is not JSON.*Remove its folder"):
        run.healings()
    history.unlink()
    history.symlink_to(made / "healed" / "deepest-02" / "lmprune.json")
    with pytest.raises(RecipeError, match="is a link that leaves"):
        run.healings()


def test_a_name_of_the_hub_is_no_place_on_this_machine(made: Path) -> None:
    said = "2 tokens/s on cais/mmlu, /home/ada/a.txt and ~/b.txt"
    assert published(Collected.read(made), said) == "2 tokens/s on cais/mmlu, a.txt and b.txt"


def test_a_picture_shows_the_cut_the_repaired_and_the_healed_model(made: Path) -> None:
    picture = next(picture for picture in quality(Collected.read(made)) if picture.title.startswith("facts"))
    curves = ["angular", "deepest", *(f"{name}, {how}" for how in ("repaired", "healed") for name in CRITERIA)]
    assert re.findall(r"[.;] ([a-z, ]+): 8\d\.\d ± 3\.0 % at 2", picture.alt) == curves
    drawing = picture.svg()
    assert all(f">{curve}</text>" in drawing for curve in curves), "the legend names each"
    points = [f"{name}-02{made}" for made in ("", "-repaired", "-healed") for name in CRITERIA]
    assert set(picture.marks) == {f"quality0-{name}" for name in points}
    assert all(drawing.count(f'id="{picture.name}-{mark}"') == 1 for mark in picture.marks)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format="x"),
        lambda data: data.pop("points"),
        lambda data: data["points"]["baseline"].update(same="much"),
        lambda data: data["points"]["baseline"].update(loss=float("nan")),
        lambda data: data.update(tokens="many"),
    ],
)
def test_a_foreign_agreement_is_named(
    change: Callable[[dict[str, Any]], Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_run(tiny("qwen3"), tmp_path / "run", agreed=True) / "agreement.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match=r"agreement\.json"):
        Collected.read(tmp_path / "run")


def test_a_verdict_within_the_noise_is_none(copy: Path) -> None:
    """All of eight documents right against seven of eight."""

    def scores(steps: float) -> Callable[[dict[str, Any]], None]:
        def change(raw: dict[str, Any]) -> None:
            raw["results"]["lmprune_demo_facts"] |= {"acc,none": 0.9, "acc_stderr,none": 0.001}
            raw["results"]["lmprune_demo_arithmetic"] |= {"exact_match,answer": steps, "exact_match_stderr,answer": 0.0}
            raw["n-samples"]["lmprune_demo_arithmetic"]["effective"] = 8

        return change

    for point in ("baseline", "angular-02", "angular-04", "deepest-02", "deepest-04"):
        _change(copy, point, scores(7 / 8 if point == "baseline" else 1.0))
    run = Collected.read(copy)
    assert run.recommended() is None and run.warnings() == []
    assert "no verdict" in summary(run)[0] and "114 ± " in summary(run)[0]


def test_cuts_of_the_same_layers_are_one(copy: Path) -> None:
    same: list[int] = []

    def alike(data: dict[str, Any]) -> None:
        points = {point["name"]: point for point in data["points"]}
        same[:] = points["angular-02"]["dropped"]
        points["deepest-02"]["dropped"] = same

    _sweep_json(copy, alike)
    _change(copy, "deepest-02", lambda raw: raw["lmprune"]["point"].update(dropped=same))
    run = Collected.read(copy)
    assert len(run.cuts()) == 3 and sum(map(len, run.curves().values())) == 4
    assert "(angular and deepest)" in run.describe(run.point("angular-02"))


def test_no_place_on_this_machine_is_published(sweep_folder: Path, tmp_path: Path) -> None:
    page, markdown, *_ = write_report(Collected.read(sweep_folder), tmp_path / "r.html")
    for file in (page, markdown):
        text = file.read_text(encoding="utf-8")
        assert str(sweep_folder.parent) not in text and "/tmp" not in text and str(Path.home()) not in text
    assert "layer_range" in page.read_text() and "layer_range" in markdown.read_text()


def test_a_rejected_cut_is_not_offered(copy: Path, tmp_path: Path) -> None:
    def scores(steps: float) -> Callable[[dict[str, Any]], None]:
        def change(raw: dict[str, Any]) -> None:
            raw["results"]["lmprune_demo_facts"] |= {"acc,none": 0.9, "acc_stderr,none": 0.01}
            raw["results"]["lmprune_demo_arithmetic"] |= {
                "exact_match,answer": steps,
                "exact_match_stderr,answer": 0.01,
            }

        return change

    for point in ("baseline", "angular-02", "angular-04", "deepest-02", "deepest-04"):
        _change(copy, point, scores(0.8 if point in ("baseline", "deepest-02") else 0.2))
    page, markdown, *_ = write_report(Collected.read(copy), tmp_path / "r.html")
    assert set(re.findall('id="recipe-([^"]*)"', page.read_text())) == {"deepest-02"}
    assert "The recipe of deepest-02" in markdown.read_text()
    _change(copy, "deepest-02", scores(0.2))
    page, markdown, *_ = write_report(Collected.read(copy), tmp_path / "r.html")
    assert "The recipe" not in page.read_text() and "```yaml" not in markdown.read_text()


def test_markdown_from_files_is_text(copy: Path, tmp_path: Path) -> None:
    evil = "<img src=x>[a](b)|`*\n# c"
    _sweep_json(copy, lambda data: data["model"].update(name=evil))
    with (copy / "recipes" / "angular-02.yml").open("a") as file:
        file.write("# ```\n# <b>\n")
    _, markdown, *_ = write_report(Collected.read(copy), tmp_path / "r r.html")
    text = markdown.read_text()
    said = r"&lt;img src=x&gt;\[a\](b)\|\`\* \# c"
    assert f"# Layer pruning of {said}" in text and f"- Model: {said}" in text and "<img" not in text
    assert "\n````yaml\n" in text and "# ```\n# <b>\n````\n" in text and "(r%20r-pictures/" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(lm_eval_version="0.4.9"), "measured by lm_eval 0.4.9"),
        (
            lambda raw: raw["lmprune"]["data"]["lmprune_demo_facts"].update(hash="0"),
            "another hash of lmprune_demo_facts",
        ),
        (lambda raw: raw["config"].update(limit=9), "with limit 9"),
        (lambda raw: raw.update(lm_eval_version="\x1b[2J\n"), r"measured by lm_eval \x1b[2J"),
        (lambda raw: raw["config"].update(random_seed=1), "with seed 1"),
        (lambda raw: raw.pop("lmprune"), "not made by `lmprune sweep`"),
        (lambda raw: raw["lmprune"]["base"].update(fingerprint="x"), "a cut of another model"),
        (lambda raw: raw["lmprune"]["point"].update(dropped=[1]), "other layers dropped"),
    ],
)
def test_results_that_differ_are_not_mixed(
    copy: Path, change: Callable[[dict[str, Any]], Any], says: str, run: Callable[..., Any]
) -> None:
    _change(copy, "angular-02", change)
    assert any(says in problem for problem in Collected.read(copy).problems)


def test_check_and_mistakes(copy: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    assert "5 of 5 points" in run("lmprune", "report", copy, "--check").stdout
    _change(copy, "angular-02", lambda raw: raw.update(lm_eval_version="0.4.9"))
    for words in (("--check",), ("-o", "r.html")):
        failed = run("lmprune", "report", copy, *words, code=1)
        assert "do not belong in one curve" in failed.stderr and failed.stderr.count("\n") == 1
    assert not (tmp_path / "r.html").exists()
    assert "end its name in .html" in run("lmprune", "report", copy, "-o", "r.pdf", code=2).stderr


def test_missing_and_foreign_files(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds no sweep\.json"):
        Collected.read(tmp_path)
    (copy / "results" / "mine").mkdir()
    with pytest.raises(RecipeError, match="belongs to no point"):
        Collected.read(copy)
    (copy / "results" / "mine").rmdir()
    (file,) = (copy / "results" / "angular-02").glob("results_*.json")
    file.write_text("{}")
    with pytest.raises(RecipeError, match="not a results file of lm_eval"):
        Collected.read(copy)
    file.unlink()
    with pytest.raises(RecipeError, match="holds no results_"):
        Collected.read(copy)
    shutil.rmtree(copy / "results" / "angular-02")
    shutil.rmtree(copy / "results" / "baseline")
    with pytest.raises(RecipeError, match="no results of the unpruned model"):
        Collected.read(copy)


def _sweep_json(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((copy / "sweep.json").read_text())
    change(data)
    (copy / "sweep.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data["points"][1].update(name="/../../x"), "'/../../x' is no point's name"),
        (lambda data: data["points"][1].update(name="../x-02"), "no point's name"),
        (lambda data: data["points"][1].update(name="*-02"), "no point's name"),
        (lambda data: data["points"][1].update(name=".x-02"), "no point's name"),
        (lambda data: data["points"][1].update(name="x-02\n"), "no point's name"),
        (lambda data: data["points"][1].update(name=5), "no point's name"),
        (lambda data: data["points"][1].update(dropped=["x"]), "of another type"),
        (lambda data: data["points"][1].update(dropped=[8]), "layers that are not there"),
        (lambda data: data["points"][1].update(layers=9), "contradict one another"),
        (lambda data: data["points"].append(data["points"][1]), "contradict one another"),
        (lambda data: data["points"][1].update(healed=True), "otherwise than its name"),
        (lambda data: data.update(points=None), "points cannot be read"),
        (lambda data: data.update(model=[]), "the key 'model' is no dict"),
    ],
)
def test_names_from_files_are_never_paths(copy: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    _sweep_json(copy, change)
    with pytest.raises(RecipeError) as refused:
        Collected.read(copy)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("what", ["recipes/angular-02.yml", "results/angular-02", "results", "bench.json"])
def test_a_link_out_of_the_run_folder_is_refused(copy: Path, what: str, tmp_path: Path) -> None:
    (copy / what).rename(tmp_path / "outside")
    (copy / what).symlink_to(tmp_path / "outside")
    with pytest.raises(RecipeError, match="is a link that leaves"):
        Collected.read(copy)


def test_broken_samples_and_speed_are_named(copy: Path) -> None:
    (file,) = (copy / "results" / "baseline").glob("samples_lmprune_demo_arithmetic_*.jsonl")
    file.write_text('{"doc_id": 0}\n')
    with pytest.raises(RecipeError, match="row 1, is no sample"):
        Collected.read(copy).samples()
    (copy / "bench.json").write_text("[" * 100_000)
    with pytest.raises(RecipeError, match=r"bench\.json is not JSON"):
        Collected.read(copy)
