from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import RecipeError

PLAIN = """
slices:
  - sources:
      - model: org/base
        layer_range: [0, 3]
  - sources:
      - model: org/base
        layer_range: [7, 8]
merge_method: passthrough
dtype: bfloat16
"""


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    recipe = Recipe(
        model="org/base",
        ranges=((0, 3), (7, 8)),
        layers=8,
        revision="abc",
        fingerprint="sha256-4k:00",
        dtype="bfloat16",
        criterion="angular",
        choice={"start": 3, "distance": 0.25},
        base_folder="/somewhere/base",
    )
    path = tmp_path / "r.yml"
    path.write_text(recipe.to_yaml("org/base@abc"))
    again = Recipe.read(path)
    assert again == recipe
    assert again.hash == recipe.hash
    assert again.plan == Plan(8, (3, 4, 5, 6))


def test_the_file_is_plain_mergekit_with_a_header_for_people(tmp_path: Path) -> None:
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration

    text = Recipe("org/base", ((0, 3), (7, 8)), layers=8, dtype="bfloat16", criterion="deepest").to_yaml()
    assert text.startswith("# A layer-pruning recipe for org/base: drops 4 of 8 layers: 3-6 (criterion: deepest).")
    merge = MergeConfiguration.model_validate(yaml.safe_load(text))
    assert [tuple(s.sources[0].layer_range) for s in merge.slices] == [(0, 3), (7, 8)]


def test_recipes_of_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(PLAIN)
    recipe = Recipe.read(path)
    assert recipe.model == "org/base" and recipe.layers is None
    assert recipe.plan_for(8).dropped == (3, 4, 5, 6)
    with pytest.raises(RecipeError, match="outside"):
        recipe.plan_for(7)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("merge_method: passthrough", "merge_method: linear"), "passthrough"),
        (("dtype:", "dtpye:"), "did you mean 'dtype'"),
        (("layer_range: [7, 8]", "layer_range: [4, 4]"), "empty"),
        (("layer_range: [7, 8]", "layer_range: [2, 8]"), "overlaps"),
        (("layer_range: [7, 8]", "layer_range: [7]"), "two whole numbers"),
        (
            ("layer_range: [7, 8]", "layer_range: [7, 8]\n        parameters: {scale: 0}"),
            "ask for more than a choice of layers",
        ),
        (("layer_range: [7, 8]", "layer_range: [7, 8]\n      - model: b\n        layer_range: [0, 1]"), "2 sources"),
        (("- model: org/base\n        layer_range: [7", "- model: other\n        layer_range: [7"), "several models"),
        (("merge_method", "modules: {a: {}}\nmerge_method"), "'modules'"),
        (("slices:", "slces:"), "did you mean 'slices'"),
        (("dtype: bfloat16", "lmprune: {layer: 8}"), "did you mean 'layers'"),
        (("dtype: bfloat16", "lmprune: {layers: 8, dropped: [3]}"), "dropped says"),
        (("dtype: bfloat16", "lmprune: {version: 9}"), "version 9"),
        (("dtype: bfloat16", "dtype: [1]"), "not text"),
        ((PLAIN, "- 1"), "mapping"),
        ((PLAIN, "{"), "not YAML"),
        ((PLAIN, "!!python/object/apply:os.system ['true']"), "not YAML"),
    ],
)
def test_bad_recipes_say_what_is_wrong(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    text = PLAIN.replace(*change)
    assert text != PLAIN
    path = tmp_path / "r.yml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        Recipe.read(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_for_another_depth_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"8 layers .* has 12"):
        Recipe("m", ((0, 4),), layers=8).plan_for(12)


def test_missing_and_huge_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at"):
        Recipe.read(tmp_path / "none.yml")
    (tmp_path / "big.yml").write_text("#" * (1 << 20) + PLAIN)
    with pytest.raises(RecipeError, match="larger"):
        Recipe.read(tmp_path / "big.yml")


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "recipes").glob("*.yml")), ids=lambda p: p.stem)
def test_every_shipped_recipe_is_read_by_us_and_by_mergekit(path: Path) -> None:
    from mergekit.config import MergeConfiguration

    from lmprune.criteria import deepest

    recipe = Recipe.read(path)
    assert recipe.layers is not None
    if recipe.criterion == "deepest":
        bare: Any = SimpleNamespace(layers=recipe.layers, protected=frozenset())
        assert recipe.plan == deepest.choose(len(recipe.plan.dropped), bare).plan
    MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))


def test_one_base_may_be_spelled_in_two_ways(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_text(
        PLAIN.replace("- model: org/base\n        layer_range: [7", "- model: org/base/\n        layer_range: [7")
    )
    assert Recipe.read(path).model == "org/base"
    path.write_text(
        PLAIN.replace("org/base", "demo").replace("demo\n        layer_range: [7", "demo/\n        layer_range: [7")
    )
    with pytest.raises(RecipeError, match="several models"):  # the word demo, and a folder called demo
        Recipe.read(path)


@pytest.mark.parametrize("name", ["r.txt", "r", "r.json", ".yml", "r.YML"])
def test_a_recipe_that_no_command_would_know_is_not_written(name: str, tmp_path: Path) -> None:
    from lmprune.choosing import write_recipe
    from lmprune.cli import app
    from lmprune.errors import UsageError

    with pytest.raises(UsageError, match=r"must end in \.yml"):
        write_recipe("demo", Plan(12, (3,)), tmp_path / name)
    with pytest.raises(UsageError, match=r"must end in \.yml"):
        app.run(["recipe", "demo", "--layers", "3", "-o", str(tmp_path / name)])
    assert not list(tmp_path.iterdir())


def test_a_profile_that_no_command_would_know_is_not_made(tmp_path: Path) -> None:
    from lmprune.cli import app
    from lmprune.errors import UsageError

    with pytest.raises(UsageError, match=r"must end in \.json"):
        app.run(["profile", "demo", "-o", str(tmp_path / "p.txt")])


def test_a_recipe_of_a_model_that_moved_says_what_to_do(tmp_path: Path) -> None:
    from lmprune.models.cut import open_cut

    path = tmp_path / "r.yml"
    path.write_text(Recipe(str(tmp_path / "gone"), ((0, 2), (3, 8)), layers=8).to_yaml())
    with pytest.raises(RecipeError, match=r"r\.yml is of a model that is not where it says: .*--rebase -o NEW\.yml"):
        open_cut(path)


def test_parameters_of_a_recipe_by_hand_are_refused_in_its_own_words(tmp_path: Path) -> None:
    text = (
        "slices: [{sources: [{model: demo, layer_range: [0, 3], parameters: {scale: 0.5}}]}]\nmerge_method: passthrough"
    )
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(RecipeError, match="parameters of the slice of layer 0 ask for more than a choice of layers"):
        Recipe.read(tmp_path / "r.yml")
