"""`lm_eval --model lmprune` gives the numbers of `lm_eval --model hf` on the written checkpoint."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmprune.choosing import write_recipe
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import HostError, ModelError, NetworkError, RecipeError, UsageError
from lmprune.models.cut import open_cut
from lmprune.models.locate import locate
from lmprune.tasks_folder import tasks_folder
from lmprune.writing.pruning import prune

TASKS = ("--tasks", "lmprune_demo", "--include_path", str(tasks_folder()), "--limit", "12", "--batch_size", "4")


@pytest.fixture(scope="module")
def pruned(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, recipe, written checkpoint) of a Qwen3 without layers 2, 3 and 5."""
    base = tiny("qwen3")
    folder = tmp_path_factory.mktemp("evaluation")
    write_recipe(open_cut(base), Plan(8, (2, 3, 5)), folder / "recipe.yml")
    prune(Recipe.read(folder / "recipe.yml"), folder / "out")
    return base, folder / "recipe.yml", folder / "out"


def _results(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("results_*.json")
    return json.loads(file.read_text())


def _numbers(results: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{task} {name}": value
        for task, metrics in results["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float)
    }


def test_the_literal_command_equals_hf_on_the_written_checkpoint(
    pruned: tuple[Path, Path, Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    base, recipe, out = pruned
    live = ("--model", "lmprune", "--model_args", f"pretrained={base},recipe={recipe}", "--output_path", tmp_path / "a")
    run("lm_eval", *live, *TASKS)
    run("lm_eval", "--model", "hf", "--model_args", f"pretrained={out}", "--output_path", tmp_path / "b", *TASKS)
    ours, theirs = _results(tmp_path / "a"), _results(tmp_path / "b")
    assert _numbers(ours) == _numbers(theirs)
    assert len(_numbers(ours)) >= 4
    config = ours["config"]
    assert config["lmprune_recipe_hash"] == Recipe.read(recipe).hash
    assert config["lmprune_layers_kept"] == [0, 1, 4, 6, 7]
    assert config["model_num_parameters"] == theirs["config"]["model_num_parameters"]


@pytest.mark.slow
def test_our_command_needs_no_shim_and_knows_our_tasks(
    pruned: tuple[Path, Path, Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    base, recipe, _ = pruned
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "t.yaml").write_text(
        (tasks_folder() / "demo" / "lmprune_demo_facts.yaml")
        .read_text()
        .replace("lmprune_demo_facts", "my_facts")
        .replace("utils.facts", "tools.facts")
    )
    (tmp_path / "mine" / "tools.py").write_text((tasks_folder() / "demo" / "utils.py").read_text())
    os.symlink(tasks_folder() / "demo" / "data", tmp_path / "mine" / "data")
    done = run(
        "lmprune",
        "eval",
        "--model_args",
        f"pretrained={base},recipe={recipe},load_in_4bit=True",
        "--tasks",
        "lmprune_demo_facts,my_facts",
        "--include_path",
        "mine",
        "--limit",
        "4",
        "--batch_size",
        "auto",
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert "lmprune_demo_facts" in done.stdout and "my_facts" in done.stdout
    failed = run("lmprune", "eval", "--model_args", f"pretrained={base}", "--tasks", "lmprune_dmo_facts", code=2)
    assert failed.stderr.count("lmprune:") == 1 and "Traceback" not in failed.stderr


def _model(**arguments: Any) -> Any:
    from lmprune.evaluation.plugin import LmpruneLM

    return LmpruneLM(device="cpu", **arguments)


def test_only_kept_layers_are_loaded_and_the_cache_is_right(pruned: tuple[Path, Path, Path]) -> None:
    base, recipe, _ = pruned
    lm = _model(pretrained=str(base), recipe=str(recipe))
    assert [layer.self_attn.layer_idx for layer in lm.model.model.layers] == [0, 1, 2, 3, 4]
    assert len(lm.model.config.layer_types) == lm.model.config.num_hidden_layers == 5
    ids = torch.arange(2, 14)[None]
    made = [
        lm.model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    ]
    assert torch.equal(*made)


def test_parallelize_without_an_accelerator_keeps_the_weights_in_memory(pruned: tuple[Path, Path, Path]) -> None:
    base, recipe, _ = pruned
    lm = _model(pretrained=str(base), recipe=str(recipe), parallelize=True)
    assert {p.device.type for p in lm.model.parameters()} == {"cuda" if torch.cuda.is_available() else "cpu"}


def test_four_bit_layers_are_really_four_bit(pruned: tuple[Path, Path, Path]) -> None:
    import bitsandbytes

    base, recipe, _ = pruned
    lm = _model(pretrained=str(base), recipe=str(recipe), load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert isinstance(lm.model.model.layers[4].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    assert torch.isfinite(lm.model(input_ids=torch.arange(2, 14)[None]).logits).all()


def test_one_word_asks_for_few_bits_as_the_loader_makes_them(pruned: tuple[Path, Path, Path]) -> None:
    import bitsandbytes

    base, recipe, _ = pruned
    lm = _model(pretrained=str(base), recipe=str(recipe), quantization="nf4")
    layer = lm.model.model.layers[4].mlp.up_proj
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.compute_dtype == torch.bfloat16 and layer.weight.quant_type == "nf4"
    with pytest.raises(UsageError, match="Leave out load_in_4bit"):
        _model(pretrained=str(base), quantization="nf4", load_in_4bit=True)
    with pytest.raises(UsageError, match="did you mean 'nf4'"):
        _model(pretrained=str(base), quantization="nf5")


def test_nothing_of_the_hosts_is_replaced(pruned: tuple[Path, Path, Path]) -> None:
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    from torch.utils import collect_env

    from lmprune.evaluation.harness import evaluate

    def theirs() -> list[Any]:
        bars = [module.tqdm for module in (lm_eval.models.huggingface, lm_eval.api.model, lm_eval.api.task)]
        return [sys.excepthook, lm_eval.evaluator.get_git_commit_hash, collect_env.get_pretty_env_info, *bars]

    before = theirs()
    _model(pretrained=str(pruned[0]))
    assert all(now is then for now, then in zip(theirs(), before))
    evaluate({"pretrained": str(pruned[0]), "device": "cpu"}, ["lmprune_demo_facts"], limit=2)
    assert all(now is then for now, then in zip(theirs(), before))


@pytest.mark.parametrize(
    ("error", "task", "kind", "says"),
    [
        (ValueError("Tasks not found: x"), None, UsageError, "Tasks not found: x. See"),
        (ValueError("for people"), None, HostError, "lm_eval: for people"),
        (KeyError("k"), None, HostError, "lm_eval: KeyError: 'k'"),
        (ConnectionError("away"), "t", NetworkError, "task 't' needs data"),
        (RuntimeError("broken"), "t", HostError, "cannot load task 't': RuntimeError: broken"),
        (ModelError("ours"), "t", ModelError, "ours"),
    ],
)
def test_the_harness_speaks_in_our_words(error: Exception, task: str | None, kind: type, says: str) -> None:
    from lmprune.evaluation.failing import in_our_words

    with pytest.raises(kind, match=says), in_our_words(task):
        raise error


def test_an_adapter_is_attached_after_the_cut(pruned: tuple[Path, Path, Path], tmp_path: Path) -> None:
    import peft
    import transformers

    base, recipe, out = pruned
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(2, 14)[None]
    lm = _model(pretrained=str(base), recipe=str(recipe), peft=str(tmp_path / "adapter"))
    with torch.inference_mode():
        assert torch.allclose(
            lm.model(input_ids=ids).logits, adapted(input_ids=ids).logits.to(torch.bfloat16), atol=0.1
        )
        with adapted.disable_adapter():
            assert not torch.allclose(lm.model(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=0.1)
    with pytest.raises(ModelError, match="does not fit this model"):
        _model(pretrained=str(base), peft=str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match="no adapter"):
        _model(pretrained=str(base), recipe=str(recipe), peft=str(out))


def test_an_adapter_of_another_cut_is_refused(pruned: tuple[Path, Path, Path], tmp_path: Path) -> None:
    import peft
    import transformers

    base, recipe, out = pruned
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapter = tmp_path / "adapter"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    peft.get_peft_model(model, config).save_pretrained(adapter)
    lineage = json.loads((out / "lmprune.json").read_text()) | {"stage": "heal"}

    def says(**changes: Any) -> None:
        (adapter / "lmprune.json").write_text(json.dumps(lineage | changes))

    says()
    live, written = {"pretrained": str(base), "recipe": str(recipe)}, {"pretrained": str(out)}
    for arguments in (live, written):
        _model(**arguments, peft=str(adapter))
    for changes, message in (
        (
            {"kept": [0, 1, 2, 3, 7], "dropped": [4, 5, 6]},
            r"keeps layers \[0, 1, 2, 3, 7\], and this one keeps layers \[0, 1, 4, 6, 7\]",
        ),
        ({"base": {"model": "other/base", "fingerprint": "0"}}, "a cut of other/base, whose weights are not these"),
    ):
        says(**changes)
        for arguments in (live, written):
            with pytest.raises(ModelError, match=message):
                _model(**arguments, peft=str(adapter))
        with pytest.raises(ModelError, match=message):
            locate(f"{out}+{adapter}")


@pytest.mark.slow
def test_the_command_that_lists_tasks_works(run: Callable[..., Any]) -> None:
    from lmprune.evaluation import LIST_TASKS

    command = LIST_TASKS.strip("`").replace("$(lmprune tasks)", str(tasks_folder())).split()
    assert "lmprune_demo" in run(*command).stdout


def test_mistakes_in_the_arguments(pruned: tuple[Path, Path, Path], tiny: Callable[..., Path]) -> None:
    base, recipe, _ = pruned
    with pytest.raises(RecipeError, match="no recipe at"):
        _model(pretrained=str(base), recipe="missing.yml")
    with pytest.raises(RecipeError, match="other weights"):
        _model(pretrained=str(tiny("llama")), recipe=str(recipe))
    with pytest.raises(ModelError, match="no model at"):
        _model(pretrained="./nowhere", recipe=str(recipe))
    with pytest.raises(UsageError, match="delta"):
        _model(pretrained=str(base), recipe=str(recipe), delta="x")


@pytest.mark.slow
def test_the_literal_command_ends_with_our_line_and_our_command_is_nothing_else(
    pruned: tuple[Path, Path, Path], run: Callable[..., Any], tiny: Callable[..., Path]
) -> None:
    done = run(
        "lm_eval", "--model", "lmprune", "--model_args", f"pretrained={pruned[0]},recipe=missing.yml", *TASKS, code=1
    )
    assert "RecipeError: no recipe at missing.yml" in done.stderr.splitlines()[-1]
    done = run("lmprune", "eval", "--model_args", f"pretrained={pruned[0]},recipe=missing.yml", *TASKS, code=1)
    assert "lmprune: no recipe at missing.yml" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("file", sorted((tasks_folder() / "demo").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_task_loads(file: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False)
    name = file.stem.removeprefix("_")
    assert name in manager.all_tasks
    assert manager.load([name])


@pytest.mark.parametrize("name", ["demo", "world"])
def test_task_data_is_what_its_script_writes(name: str) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    try:
        script = importlib.import_module(f"make_{name}_tasks")
    finally:
        sys.path.pop(0)
    for file, text in script.files().items():
        assert (tasks_folder() / name / "data" / file).read_text(encoding="utf-8") == text


def test_the_worlds_wrong_answers_are_wrong() -> None:
    lines = (tasks_folder() / "world" / "data" / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(len(set(row["choices"])) == 4 for row in rows)
    places = [row["label"] for row in rows]
    assert max(map(places.count, range(4))) < len(rows) / 2, "one place would be guessed"
