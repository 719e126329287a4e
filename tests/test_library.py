"""The recipes that come with lmprune: each is what its table says, and each can be carried out on its architecture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmprune.cuts import library
from lmprune.cuts.recipe import Recipe
from lmprune.models.checkpoint import Checkpoint, read_config
from lmprune.models.cut import open_cut
from lmprune.models.locate import demo_folder
from lmprune.writing.pruning import prune

ROOT = Path(__file__).parent.parent
MODELS = json.loads((ROOT / "recipes" / "models.json").read_text())
LIBRARY = library.read_library()
SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def maker() -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import make_recipes
    finally:
        sys.path.pop(0)
    return make_recipes


def test_the_folder_holds_what_the_script_makes_of_the_facts(maker: Any) -> None:
    made = maker.texts()
    assert {path.stem for path in (ROOT / "recipes").glob("*.yml")} == {n[:-4] for n in made if n.endswith(".yml")}
    for name, text in made.items():
        assert (ROOT / "recipes" / name).read_text() == text, f"run scripts/make_recipes.py: {name} is stale"


def test_the_table_says_which_models_bring_their_own_code(maker: Any) -> None:
    assert set(OWN_CODE) == library.OWN_CODE
    marked = [line for line in maker.texts()["README.md"].splitlines() if line.startswith("| [") and " † |" in line]
    assert len(marked) == 4 and all("baichuan-inc/" in line or "Qwen/Qwen-" in line for line in marked)


def test_headers_offer_mergekit_where_it_was_measured_to_be_right(maker: Any) -> None:
    from lmprune.writing.support import rows

    types = {model["type"] for model in MODELS.values()}
    assert {r.architecture for r in rows() if r.architecture in types and r.plain_mergekit == "right"} == maker.PLAIN


@pytest.mark.parametrize("entry", LIBRARY, ids=lambda entry: entry.name)
def test_a_recipe_says_where_it_comes_from(entry: library.Entry) -> None:
    recipe, told = entry.recipe, entry.recipe.choice
    assert recipe.layers == MODELS[recipe.model]["layers"]
    assert all(0 <= layer < MODELS[recipe.model]["layers"] for layer in recipe.plan.dropped)
    parts = [numbers for part in recipe.parts for numbers in part.to_data().values()]
    count = 2 * len(recipe.plan.dropped) + sum(map(len, parts))
    said = f"{count}-sublayers" if parts else str(len(recipe.plan.dropped))
    assert f"-minus-{said}-" in entry.name
    assert told["summary"].startswith("published by ") and told["source"] and "from " in told["indices"]
    assert told.get("measured") or told.get("unmeasured")
    if "from 1 in the source" in told["indices"]:
        assert entry.name == "llama-3.1-8b-minus-16-minitron" and recipe.plan.dropped == tuple(range(15, 31))


def test_the_table_of_published_layers_was_typed_rightly() -> None:
    """The lists that a second source in the same papers confirms."""
    dropped = {entry.name: entry.recipe.plan.dropped for entry in LIBRARY}
    orders = {
        "llama-2-7b-minus-9-shortgpt": (27, 26, 25, 28, 24, 29, 23, 21, 22),
        "llama-2-13b-minus-10-shortgpt": (33, 31, 32, 30, 29, 34, 28, 35, 27, 26),
        "baichuan2-7b-base-minus-9-shortgpt": (26, 27, 25, 28, 24, 29, 23, 22, 30),
        "baichuan2-13b-base-minus-10-shortgpt": (32, 31, 33, 30, 34, 29, 28, 35, 27, 26),
        "llama-3.1-8b-instruct-minus-8-navigation": (26, 25, 24, 28, 27, 23, 29, 22),
        "mistral-7b-v0.1-minus-4-llm-drop": (26, 25, 24, 27),
    }
    for name, order in orders.items():
        assert dropped[name] == tuple(sorted(order)), name
    assert dropped["llama-2-7b-minus-9-shortened-taylor"] == dropped["llama-2-7b-minus-9-shortgpt"]
    assert sum("warning" in entry.recipe.choice for entry in LIBRARY) >= 3
    assert "2288" in dict((e.name, e.warning or "") for e in LIBRARY)["meta-llama-3-8b-minus-7-linearpatch"]


def test_lists_of_one_order_hold_one_another() -> None:
    """Each method's longer list of a model holds its shorter ones; a layer typed wrongly would not."""
    by_order: dict[tuple[str, str], list[set[int]]] = {}
    for entry in LIBRARY:
        origin = entry.name.rpartition("-minus-")[2].partition("-")[2]
        if origin in ("shortened-ppl", "shortened-taylor"):
            by_order.setdefault((entry.recipe.model, origin), []).append(set(entry.recipe.plan.dropped))
    assert len(by_order) == 16
    for order, sets in by_order.items():
        sets.sort(key=len)
        assert all(short < long for short, long in zip(sets, sets[1:])), order


def test_lists_of_sublayers_have_the_counts_of_their_sources() -> None:
    found: dict[str, list[tuple[str, int, int]]] = {}
    for entry in (entry for entry in LIBRARY if entry.recipe.parts):
        (part,) = entry.recipe.parts
        whole, data = len(entry.recipe.plan.dropped), part.to_data()
        counts = (whole + len(data.get("attention", ())), whole + len(data.get("mlp", ())))
        found.setdefault(entry.name.rpartition("-")[2], []).append((entry.recipe.model, *counts))
    assert all(attention == mlp for _, attention, mlp in found["evopress"]), "EvoPress drops as many of either"
    assert [mlp for _, _, mlp in sorted(found["evopress"])] == [2, 4, 6, 8, 10, 4, 8, 12, 2, 4, 6, 8, 8]
    assert sorted((a, m) for _, a, m in found["blockpruner"]) == [(7, 1), (10, 2), (11, 5), (13, 7)]


def test_a_shipped_recipe_is_used_by_its_name() -> None:
    name = "demo-minus-3-deepest"
    assert open_cut(name).plan == Recipe.read(ROOT / "recipes" / f"{name}.yml").plan
    assert open_cut("demo", recipe=name).layers == 9


def test_searching_the_library() -> None:
    assert {entry.recipe.model for entry in library.search(LIBRARY, "QWEN gromov")} == {"Qwen/Qwen-7B", "Qwen/Qwen-14B"}
    assert library.search(LIBRARY, "nothing of that name") == []


# --- every recipe on a random model of its architecture: true depth, small width -------------------------------------


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[tuple[str, int], Path] = {}

    def make(model: str) -> Path:
        if model == "demo":
            return demo_folder()
        kind, layers = MODELS[model]["type"], MODELS[model]["layers"]
        if (kind, layers) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{layers}")
            (own_code if kind in OWN_CODE else known_type)(kind, layers, folder)
            made[kind, layers] = folder
        return made[kind, layers]

    return make


def known_type(kind: str, layers: int, folder: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**SMALL, num_hidden_layers=layers, initializer_range=0.1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


OWN_CODE = {
    "baichuan": ("model.layers", ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
                 "mlp.down_proj", "input_layernorm", "post_attention_layernorm")),
    "qwen": ("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj", "ln_1", "ln_2")),
}  # fmt: skip
"""Types whose code lies on the Hub beside the weights: where their layers stand and what is in one."""


def own_code(kind: str, layers: int, folder: Path) -> None:
    """A checkpoint with the tensor names of that type, and a config class of its own in place of the Hub's."""
    from safetensors.torch import save_file

    prefix, parts = OWN_CODE[kind]
    names = [f"{prefix}.{layer}.{part}.weight" for layer in range(layers) for part in parts] + ["lm_head.weight"]
    save_file({name: torch.full((2, 2), float(i)) for i, name in enumerate(names)}, folder / "model.safetensors")
    config = {"model_type": kind, "num_hidden_layers": layers, "auto_map": {"AutoConfig": f"configuration_{kind}.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"configuration_{kind}.py").write_text(
        "from transformers import PreTrainedConfig\n\n\nclass Own(PreTrainedConfig):\n"
        f"    model_type = {kind!r}\n    num_hidden_layers: int = 1\n"
    )


QUICK = ("llama", "gemma3_text", "baichuan")
FIRST = list({kind: e for e in LIBRARY if (kind := MODELS[e.recipe.model]["type"]) in QUICK}.values())
"""One each of some architectures; all together take longer than the default run has time for."""


@pytest.mark.parametrize("entry", FIRST, ids=lambda entry: entry.name)
def test_some_recipes_are_carried_out(entry: library.Entry, base: Any, tmp_path: Path) -> None:
    carried_out(entry, base(entry.recipe.model), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("entry", [e for e in LIBRARY if e not in FIRST], ids=lambda entry: entry.name)
def test_every_other_recipe_is_carried_out(entry: library.Entry, base: Any, tmp_path: Path) -> None:
    carried_out(entry, base(entry.recipe.model), tmp_path / "out")


def carried_out(entry: library.Entry, base: Path, out: Path) -> None:
    """Prune the random ``base`` by its recipe; the logits are proven where transformers knows the architecture."""
    own = MODELS[entry.recipe.model]["type"] in OWN_CODE
    cut = open_cut(base, recipe=entry.path, trust_remote_code=own)
    done = prune(cut, out, logits=not own, trust_remote_code=own)
    assert done.plan == entry.recipe.plan and done.proof is not None and not done.proof.differences
    assert done.proof.logits_compared is not own
    kept = entry.recipe.plan.kept
    assert read_config(out)["num_hidden_layers"] == len(kept)
    if entry.recipe.plan.dropped:
        assert Checkpoint.open(out).bytes < Checkpoint.open(base).bytes
