"""What is pushed: the folder, its card, its results in the Hub's forms, and nothing of this machine."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from measured_run import write_run
from test_plotting import some_profile

from lmprune import cli
from lmprune.choosing import write_recipe
from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import OutputError, RecipeError, UsageError
from lmprune.models.cut import open_cut
from lmprune.profiling.distances import Profile
from lmprune.reporting.collect import Collected
from lmprune.reporting.words import in_markdown
from lmprune.sharing import private
from lmprune.sharing.bundle import Bundle
from lmprune.sharing.card import Card
from lmprune.sharing.pushing import push
from lmprune.sharing.results import Measured
from lmprune.sharing.subjects import Subject, look, with_runtimes
from lmprune.sharing.telling import facts, strip
from lmprune.writing.pruning import prune

BASE = "org/base"
DATASETS = {"facts": "cais/mmlu", "sums": "openai/gsm8k", "loss": "allenai/c4"}


@pytest.fixture(scope="module")
def run_folder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tiny("qwen3"), tmp_path_factory.mktemp("measured") / "run", datasets=DATASETS)


@pytest.fixture(scope="module")
def shared(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that would be pushed for a measured cut of a local base."""
    return pushed_dry(run_folder, tmp_path_factory.mktemp("shared") / "out")


def pushed_dry(run: Path, out: Path) -> Path:
    done = push(run / "recipes" / "angular-02.yml", "ada/pruned", results=run, base=BASE, dry_run=out)
    assert sorted(done.files) == sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    return out


@pytest.mark.slow
def test_a_real_sweep_is_shared_as_well(sweep_folder: Path, tmp_path: Path) -> None:
    out = pushed_dry(sweep_folder, tmp_path / "out")
    assert "At most 4 documents of each task were asked" in (out / "README.md").read_text()
    assert not (out / ".eval_results").exists(), "a limited run claims no benchmark"


def test_the_folder_holds_recipe_profile_map_report_and_card(shared: Path, run_folder: Path) -> None:
    for name in ("README.md", "recipe.yml", "profile.json", "report.md", "pictures/layers.png", "pictures/map.png"):
        assert (shared / name).is_file(), name
    report = (shared / "report.md").read_text()
    for picture in (shared / "report-pictures").iterdir():
        assert f"(report-pictures/{picture.name})" in report
    assert "Layer pruning of org/base" in report and "- model: org/base" in report
    ours, theirs = Recipe.read(shared / "recipe.yml"), Recipe.read(run_folder / "recipes" / "angular-02.yml")
    assert ours.model == BASE and ours.base_folder is None and ours.plan == theirs.plan
    assert ours.fingerprint == theirs.fingerprint and ours.choice == theirs.choice


def test_nothing_of_this_machine_is_in_it(shared: Path, tiny: Callable[..., Path], run_folder: Path) -> None:
    for file in (path for path in shared.rglob("*") if path.is_file()):
        for text in private.texts(file):
            assert str(tiny("qwen3")) not in text and str(run_folder) not in text and "/tmp/" not in text, file


def test_the_card_is_one_that_the_hub_reads(shared: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(shared / "README.md")
    assert card.data.base_model == BASE and card.data.library_name == "lmprune"
    assert {"lmprune", "mergekit"} <= set(card.data.tags)
    scores = {result.dataset_name: result for result in card.data.eval_results}
    assert scores["sums"].metric_value == 20.0 and scores["sums"].metric_args == {"stderr": 4.0}
    assert scores["loss"].metric_value == 0.75


def test_the_first_screen_tells_what_matters(shared: Path) -> None:
    text = (shared / "README.md").read_text()
    body = text.split("---\n", 2)[2]
    order = ["drops 2 of 8 layers", "█ kept", "pictures/layers.png", "## What it costs", "## Size and speed",
             "## Three commands", "## Not measured", "## Where it comes from"]  # fmt: skip
    places = [body.index(part) for part in order]
    assert places == sorted(places)
    assert "keeps 97 ± 6 % of its knowledge and 25 ± 5 % of its reasoning: do not use it where steps" in body
    assert "| sums (exact match) | 80.0 ± 4.0 % | 20.0 ± 4.0 % | -60.0 ± 5.7 |" in body
    assert "| decode, tokens/s | 10.0 | 10.0 (1.33 times, 1.00 to 1.50) |" in body and "some processor" in body
    commands = body[body.index("```sh") :].split("```")[1].split("\n")[1:4]
    assert commands[1] == "lmprune prune ada/pruned OUT"
    assert commands[2].startswith(
        "lmprune eval --model_args pretrained=org/base,recipe=ada/pruned --tasks facts,sums,loss"
    )


def test_scores_of_benchmarks_take_the_hubs_newer_form(shared: Path) -> None:
    parse_eval_result_entries = getattr(huggingface_hub, "parse_eval_result_entries", None)
    if parse_eval_result_entries is None:
        pytest.skip("this client does not know the form yet")
    files = sorted((shared / ".eval_results").iterdir())
    assert [file.name for file in files] == ["cais--mmlu.yaml", "openai--gsm8k.yaml"], "a loss is no benchmark"
    entries = [parse_eval_result_entries(yaml.safe_load(file.read_text()))[0] for file in files]
    assert [(e.dataset_id, e.task_id, e.value) for e in entries] == [
        ("cais/mmlu", "facts", 88.0), ("openai/gsm8k", "gsm8k", 20.0)
    ]  # fmt: skip
    assert entries[1].notes == "exact_match, standard error 4.0, 0 examples, 2 of 8 layers dropped"


def test_a_limited_run_claims_no_benchmark(tiny: Callable[..., Path], tmp_path: Path) -> None:
    run = Collected.read(write_run(tiny("qwen3"), tmp_path / "run", limit=4, datasets=DATASETS))
    measured = Measured.of(run, Plan(8, (3, 4)), None, made="")
    assert measured.limited and measured.eval_files("2026-01-01") == {}
    assert len(measured.model_index("pruned")[0]["results"]) == 3


def test_weights_are_pushed_with_their_history(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, out, dry = tiny("llama"), tmp_path / "out", tmp_path / "dry"
    write_recipe(base, Plan(8, (3, 4)), tmp_path / "r.yml")
    prune(tmp_path / "r.yml", out, logits=False)
    files = push(tmp_path / "r.yml", "ada/pruned", weights=out, base=BASE, dry_run=dry).files
    assert {"model.safetensors", "config.json", "lmprune.json", "tokenizer.json", "recipe.yml", "README.md"} <= set(
        files
    )
    assert (dry / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert not (dry / "model.safetensors").is_symlink()
    assert json.loads((dry / "lmprune.json").read_text())["base"]["model"] == BASE
    assert (dry / "mergekit_config.yml").read_text() == (dry / "recipe.yml").read_text()
    assert "library_name: transformers" in (dry / "README.md").read_text()
    assert open_cut(dry).layers == 6
    other = tmp_path / "other.yml"
    write_recipe(base, Plan(8, (5,)), other)
    with pytest.raises(RecipeError, match="drops 2 of 8 layers: 3-4, and the recipe drops 1 of 8 layers: 5"):
        push(other, "ada/pruned", weights=out, base=BASE, dry_run=tmp_path / "no")


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"repository": "ada"}, UsageError, "'ada' is no name of a repository"),
        ({"repository": "ada/../x"}, UsageError, "is no name of a repository"),
        ({"repository": "ada/" + "x" * 200}, UsageError, "is no name of a repository"),
        ({"base": None}, UsageError, "which is a folder of this machine. Say what others call it"),
        ({"base": "./here"}, UsageError, "--base ./here: give the base's name on the Hub"),
        ({"recipe": "other"}, RecipeError, r"has no cut without the layers 5.*angular-02"),
        ({"results": "nowhere"}, RecipeError, "holds no sweep.json"),
        ({"results": "unmeasured"}, RecipeError, "has not measured angular-02 yet"),
        ({"recipe": "foreign"}, RecipeError, "measured .* with the weights"),
    ],
)
def test_mistakes_are_one_line(
    how: dict[str, Any], error: type[Exception], says: str, run_folder: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = run_folder / "recipes" / "angular-02.yml"
    if how.get("recipe"):
        recipe = tmp_path / "r.yml"
        write_recipe(tiny("qwen3" if how["recipe"] == "other" else "llama"), Plan(8, (5,)), recipe)
    if how.get("results") == "unmeasured":
        shutil.copytree(run_folder, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "results" / "angular-02")
        how = how | {"results": tmp_path / "run"}
    given = {"base": BASE, "results": run_folder} | {k: v for k, v in how.items() if k in ("base", "results")}
    with pytest.raises(error, match=says) as caught:
        push(recipe, how.get("repository", "ada/pruned"), dry_run=tmp_path / "dry", **given)
    assert "\n" not in str(caught.value) and not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    "text",
    [
        "model: /home/somebody/models/x",
        "on /lustre/project/x",
        "C:\\Users\\somebody",
        "token: hf_" + "a" * 34,
        "Authorization: Bearer abcdefghijklmnopqrstuvwxyz",
        "made by somebody-else-entirely",
    ],
)
def test_what_tells_of_this_machine_stops_the_push(
    text: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "_user", lambda: "somebody-else-entirely")
    recipe = tmp_path / "r.yml"
    write_recipe(tiny("llama"), Plan(8, (3,)), recipe)
    recipe.write_text(recipe.read_text() + "  choice: " + json.dumps({"summary": text}) + "\n")
    with pytest.raises(OutputError, match="Nothing was pushed") as caught:
        push(recipe, "ada/pruned", base=BASE, dry_run=tmp_path / "dry")
    assert "hf_aaaa" not in str(caught.value) and not (tmp_path / "dry").exists()


def test_of_a_file_of_calibration_text_only_its_name_is_told(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe, dry = tmp_path / "r.yml", tmp_path / "dry"
    write_recipe(tiny("llama"), Plan(8, (3,)), recipe)
    text = recipe.read_text() + f"  choice: {{summary: why, data: {tmp_path}/mine.txt, samples: 4}}\n"
    recipe.write_text(text)
    found = replace(some_profile(8), source=f"{tmp_path}/mine.txt", fingerprint=Recipe.read(recipe).fingerprint)
    found.write(tmp_path / "r.profile.json")
    push(recipe, "ada/pruned", base=BASE, dry_run=dry)
    assert Recipe.read(dry / "recipe.yml").choice["data"] == "mine.txt"
    assert Profile.read(dry / "profile.json").source == "mine.txt"
    assert "4 samples of mine.txt" in (dry / "README.md").read_text()


def test_the_metadata_of_pictures_is_looked_through(tmp_path: Path) -> None:
    from PIL import Image, PngImagePlugin

    for packed in (False, True):
        note = PngImagePlugin.PngInfo()
        note.add_text("Comment", "drawn in /home/ada/work", zip=packed)
        Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=note)
        with pytest.raises(OutputError, match=r"a\.png holds '/home/ada/work'"):
            private.check(tmp_path)
    note = PngImagePlugin.PngInfo()
    note.add_itxt("Comment", "drawn in /home/ada/work", zip=True)
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=note)
    with pytest.raises(OutputError):
        private.check(tmp_path)


def test_an_adapter_is_pushed_with_the_cut_it_was_trained_on(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter, dry = tiny("llama"), tmp_path / "adapter", tmp_path / "dry"
    write_recipe(base, Plan(8, (3, 4)), tmp_path / "r.yml")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"})
    )
    shutil.copyfile(base / "model.safetensors", adapter / "adapter_model.safetensors")
    replace(open_cut(tmp_path / "r.yml").lineage, stage="heal", healing={"method": "lora", "steps": 9}).write(adapter)
    push(tmp_path / "r.yml", "ada/adapter", weights=adapter, base=BASE, dry_run=dry)
    assert json.loads((dry / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    assert (dry / "adapter_model.safetensors").is_file() and str(base) not in (dry / "lmprune.json").read_text()
    text = (dry / "README.md").read_text()
    assert "library_name: peft" in text and "lora, 9 steps" in text and "were healed after the cut" in text


def test_what_training_closed_is_told_after_however_long_a_repair() -> None:
    solved = [{"layer": n, "path": "mlp.down_proj", "form": "around", "ridge": 0.1} for n in range(100)]
    first = {"repair": {"projections": solved}}
    healing = {"method": "lora", "first": first, "losses": {"pruned": 1.5, "healed": 0.5}, "gap_closed": 0.9}
    told = dict(facts(Subject("x", "checkpoint", None, Lineage(stage="heal", healing=healing))))["healed"]
    assert told[:2] == ["lora", "held-out loss 1.5000 -> 0.5000, 90.0% of the gap closed"]
    assert told[2] == "layer 0 mlp.down_proj: around, ridge 0.1" and len(told) < 30


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama-2-7b-minus-9-shortgpt", "hf download ada/x recipe.yml --local-dir . && mergekit-yaml recipe.yml OUT"),
        ("qwen3-0.6b-minus-7-deepest", "lmprune recipe ada/x --rebase -o recipe.yml && mergekit-yaml"),
        ("demo-minus-3-angular", "recipe=ada/x --tasks lmprune_demo\n```\n\n## Not"),
    ],
)
def test_a_recipe_of_the_library_is_shared_with_what_its_source_measured(name: str, says: str) -> None:
    bundle = Bundle.of(name, "ada/x")
    text = Card("ada/x", bundle.subject, plain=bundle.plain).text()
    assert says in text and "was measured" in text
    assert all(in_markdown(line) in text for line in bundle.subject.lineage.recipe["choice"].get("measured", ()))


# --- showing ---------------------------------------------------------------------------------------------------------


def test_layers_are_drawn() -> None:
    assert strip(Plan(40, (0, 31, 32, 39))) == [
        " 0 ░██████████████████████████████░ 31",
        "32 ░██████░ 39",
        "   █ kept  ░ dropped",
    ]


def test_sublayers_are_drawn_as_half_gone() -> None:
    told = look("llama-2-7b-minus-4-sublayers-evopress")
    assert told.plan is not None and strip(told.plan) == [
        " 0 ███████████▒░████████████▒██████ 31",
        "   █ kept  ░ dropped  ▒ without attention or MLP",
    ]
    assert told.to_data()["parts"] == {"sublayers": {"attention": [25], "mlp": [11]}}


def test_a_cut_is_told_alike_whoever_wrote_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The round trip: recipe, mergekit's own command, and what the checkpoint then says of itself."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    recipe, ours, theirs = tmp_path / "r.yml", tmp_path / "ours", tmp_path / "theirs"
    write_recipe(tiny("llama"), Plan(8, (3, 4)), recipe)
    prune(recipe, ours, logits=False)
    text = recipe.read_text()
    merge = MergeConfiguration.model_validate(yaml.safe_load(text))
    run_merge(merge, str(theirs), MergeOptions(quiet=True), config_source=text)
    told = [look(str(what)) for what in (recipe, ours, theirs)]
    assert [subject.kind for subject in told] == ["recipe", "checkpoint", "checkpoint"]
    for subject in told[1:]:
        assert subject.lineage.base == told[0].lineage.base and subject.plan == told[0].plan
        assert subject.lineage.recipe == told[0].lineage.recipe
    assert dict(facts(told[1]))["proof"] and "proof" not in dict(facts(told[2]))


PRUNEME = """
slices:
  - sources: [{model: BASE, layer_range: [0, 1]}]
  - sources: [{model: BASE, layer_range: [1, 2]}]
  - sources: [{model: BASE, layer_range: [2, 3]}]
  - sources: [{model: BASE, layer_range: [6, 8]}]
merge_method: passthrough
dtype: bfloat16
"""


def test_a_recipe_by_hand_is_taken_everywhere(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, old, new = tiny("llama"), tmp_path / "old.yml", tmp_path / "new.yml"
    old.write_text(PRUNEME.replace("BASE", str(base)))
    assert look(str(old)).plan == Plan(8, (3, 4, 5)), "the base's config says how many layers there are"
    prune(old, tmp_path / "out", logits=False)
    assert look(str(tmp_path / "out")).plan == Plan(8, (3, 4, 5))
    write_recipe(base, Plan(8, (3, 4, 5)), new)
    assert Recipe.read(new).ranges == Recipe.read(old).ranges, "slices of one layer each mean the same"
    old.write_text(PRUNEME.replace("BASE", "org/nobody"))
    subject = look(str(old))
    assert subject.plan == Plan(8, (3, 4, 5)) and not subject.counted


def test_a_mergekit_file_by_hand_gets_what_is_missing(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lmprune", "recipe", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    (tmp_path / "old.yml").write_text(PRUNEME.replace("BASE", str(tiny("llama"))))
    code, out, _ = call("--from-yaml", tmp_path / "old.yml", "-o", tmp_path / "new.yml")
    assert code == 0 and "drops 3 of 8 layers: 3-5" in out
    new = Recipe.read(tmp_path / "new.yml")
    assert new.layers == 8 and new.fingerprint == open_cut(tiny("llama")).checkpoint.fingerprint
    code, _, err = call("-o", tmp_path / "x.yml", "--drop", "1")
    assert code == 2 and "give a MODEL, a PROFILE.json or --from-yaml" in err
    code, _, err = call("demo", "--from-yaml", tmp_path / "old.yml", "-o", tmp_path / "x.yml")
    assert code == 2 and "and only one" in err


def test_runtimes_that_would_run_another_model_are_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    write_recipe(tiny("gemma3_text", head_dim=16), Plan(8, (0,)), tmp_path / "r.yml")
    told = dict(facts(with_runtimes(look(str(tmp_path / "r.yml")))))
    assert "transformers" in told["runs in"][0] and any("llama.cpp: it " in line for line in told["wrong in"])


def test_what_others_wrote_is_no_command_to_the_terminal(tmp_path: Path) -> None:
    text = PRUNEME.replace("BASE", "org/base") + 'lmprune: {criterion: "a\\e[2J", choice: {measured: "b\\e[1mc"}}\n'
    (tmp_path / "r.yml").write_text(text)
    said = facts(look(str(tmp_path / "r.yml")))
    assert "\x1b" not in str(said).replace("\\x1b", "\x1b") and dict(said)["measured"] == ["b [1mc"]


@pytest.mark.parametrize("odd", [5, "x", [1], {"a": [2]}, None, [{"b": 1}], "\x1b[2J"])
def test_any_history_is_told(odd: Any, tmp_path: Path) -> None:
    told = {"stage": "prune", "layers": 4, "dropped": [2], "base": {"model": "org/base"}}
    choice = {name: odd for name in ("summary", "source", "measured", "data", "samples", "warning")}
    for recipe in ({"choice": odd}, {"choice": choice, "criterion": odd, "hash": odd}):
        told |= {"recipe": recipe, "proof": {"tensors": odd, "differences": odd}, "healing": {"method": odd}}
        (tmp_path / "lmprune.json").write_text(json.dumps(told))
        subject = look(str(tmp_path))
        assert subject.plan == Plan(4, (2,))
        text = str([line for _, lines in facts(subject) for line in lines])
        assert "\\x1b" not in text and json.dumps(subject.to_data())
        assert Card("ada/x", subject).text().startswith("---")
