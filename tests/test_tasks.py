"""Every task that we ship loads without a network, and its numbers are what a direct computation gives."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

from lmprune.tasks_folder import tasks_folder

FILES = sorted(tasks_folder().rglob("*.yaml"))


def _name(file: Path) -> str:
    """The task or group that a file defines."""
    found = yaml.load(file.read_text().replace("!function ", ""), yaml.BaseLoader)
    return str(found.get("group") or found["task"])


NAMES = sorted(map(_name, FILES))

ROWS: dict[str, list[dict[str, Any]]] = {
    "allenai/c4": [{"text": f"Document {i} speaks of rivers and of the sea. " * (1 + 60 * i)} for i in range(4)],
    "cais/mmlu": [
        {"question": f"What is {i} + 1?", "choices": ["1", "2", "3", str(i + 1)], "answer": 3, "subject": "x"}
        for i in range(8)
    ],
    "aps/super_glue": [{"passage": f"River {i} is long.", "question": "is it long", "label": i % 2} for i in range(6)],
    "openai/gsm8k": [
        {"question": f"Ann has {i} figs. How many?", "answer": f"She has {i}.\n#### {i}"} for i in range(6)
    ],
    "SaylorTwift/bbh": [{"input": f"Close the brackets {'(' * i}", "target": ")" * i} for i in range(1, 6)],
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A Hub of a few made-up rows in the form of each dataset; how often each was asked for."""
    asked: dict[str, int] = {}

    def load_dataset(path: str, name: str | None = None, *, split: str | None = None, **_: Any) -> Any:
        asked[path] = asked.get(path, 0) + 1
        rows = datasets.Dataset.from_list(ROWS[path])
        return rows if split else datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.fixture(scope="module")
def loaded_manager(tiny: Callable[..., Path]) -> Iterator[Any]:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks_folder()), metadata={"pretrained": str(tiny("qwen3"))})


def test_the_groups_that_the_readme_names_exist() -> None:
    assert {"lmprune_demo", "lmprune_gromov", "lmprune_reasoning", "lmprune_quick"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_task_loads(name: str, hub: dict[str, int], loaded_manager: Any) -> None:
    loaded = loaded_manager.load([name])
    assert loaded["tasks"]
    for task in loaded["tasks"].values():
        assert len(list(task.eval_docs)) > 0
        assert task.aggregation() and task.higher_is_better()


def test_what_names_only_ours_reads_no_other_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own folder takes seconds, so it is read where a name, or what a group holds, is not ours."""
    from lmprune.evaluation import indexing

    class Read(Exception):
        """What reading it all would end in."""

    def everything(ours: str) -> None:
        raise Read

    monkeypatch.setattr(indexing, "_everything", everything)
    (tmp_path / "mine.yaml").write_text("group: mine\ntask: [lmprune_world_sums, {task: lmprune_demo_facts}, mine]\n")
    assert "lmprune_demo_facts" in indexing.manager_of(["lmprune_demo", "lmprune_world"]).all_tasks
    mine = indexing.manager_of(["mine"], include_path=tmp_path).all_tasks  # though it holds itself
    assert "mine" in mine and "boolq" not in mine
    for name in ("boolq", "lmprune_gromov", "lmprune_reasoning", "lmprune_dmo"):
        with pytest.raises(Read):
            indexing.manager_of(["lmprune_demo", name])


def test_chance_is_counted_over_the_documents(
    hub: dict[str, int], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmprune.evaluation.loaded import LoadedTasks

    rows = [{"sentence": f"The _ is {i} long.", "option1": "river", "option2": "sea", "answer": "1"} for i in range(3)]
    monkeypatch.setitem(ROWS, "allenai/winogrande", rows)
    names = ["winogrande", "boolq", "mmlu_anatomy", "lmprune_demo_arithmetic"]
    tasks = LoadedTasks(names, {"pretrained": str(tiny("qwen3"))}, steps="lmprune_demo_arithmetic")
    assert {name: said.get("chance") for name, said in tasks.data(2).items()} == {
        "winogrande": 0.5,
        "boolq": 0.5,
        "mmlu_anatomy": 0.25,
        "lmprune_demo_arithmetic": None,
    }


def test_gromov_is_the_papers_setting(hub: dict[str, int], loaded_manager: Any) -> None:
    tasks = loaded_manager.load(["lmprune_gromov"])["tasks"]
    shots = {name: task.config.num_fewshot for name, task in tasks.items()}
    assert len(shots) == 57 + 2
    assert {shots[name] for name in shots if name.startswith("mmlu_")} == {5}
    assert shots["boolq"] == 0


def test_quick_takes_a_fixed_part(hub: dict[str, int], loaded_manager: Any) -> None:
    tasks = loaded_manager.load(["lmprune_quick"])["tasks"]
    questions = [doc["question"] for doc in tasks["mmlu_anatomy"].eval_docs]
    assert questions == [f"What is {i} + 1?" for i in (0, 1, 3, 4, 6)]
    assert len(list(tasks["mmlu_anatomy"].fewshot_docs())) >= 5


def test_reasoning_generates(hub: dict[str, int], loaded_manager: Any) -> None:
    tasks = loaded_manager.load(["lmprune_reasoning"])["tasks"]
    assert {task.OUTPUT_TYPE for task in tasks.values()} == {"generate_until"}
    assert all(task.config.num_fewshot or "cot" in name for name, task in tasks.items())


@pytest.mark.slow
def test_every_group_runs(hub: dict[str, int], tiny: Callable[..., Path]) -> None:
    import lm_eval

    from lmprune.evaluation.loaded import LoadedTasks
    from lmprune.evaluation.plugin import LmpruneLM

    base = str(tiny("qwen3", max_position_embeddings=4096))
    for group in ("lmprune_gromov", "lmprune_quick"):
        tasks = LoadedTasks([group], {"pretrained": base}, steps="gsm8k_cot")
        assert ("gsm8k_cot" in tasks.tasks) and (tasks.added is None) == (group == "lmprune_quick")
        few = {
            name: task for name, task in tasks.tasks.items() if not name.startswith("mmlu") or name.endswith("anatomy")
        }
        for name in list(tasks.tasks):
            if name not in few or name == "gsm8k_cot":
                del tasks.tasks[name]
        found = lm_eval.evaluate(LmpruneLM(base, device="cpu", batch_size=4), {"tasks": tasks.tasks}, limit=2)[
            "results"
        ]
        assert any("loss_over_log_v,none" in values for values in found.values())


@pytest.mark.parametrize("kind", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_the_normalised_loss_equals_a_direct_computation(
    kind: str, tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    from lmprune.evaluation.harness import evaluate

    base = tiny(kind)
    found = evaluate({"pretrained": str(base), "dtype": "float32"}, ["lmprune_demo_normalised_loss"], limit=16)
    assert "Running loglikelihood" not in capfd.readouterr().err, "the harness's bars show"
    got = found["results"]["lmprune_demo_normalised_loss"]
    lines = (tasks_folder() / "demo" / "data" / "loss.jsonl").read_text(encoding="utf-8").splitlines()[:16]

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    nats = tokens = size = 0
    for text in [json.loads(line)["text"] for line in lines]:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens, size = tokens + ids.shape[1] - 1, size + len(text.encode())
    assert got["loss,none"] == pytest.approx(nats / tokens, abs=1e-4)
    assert got["loss_over_log_v,none"] == pytest.approx(nats / tokens / math.log(model.config.vocab_size), abs=1e-4)
    assert got["bits_per_byte,none"] == pytest.approx(nats / size / math.log(2), abs=1e-4)


def test_texts_are_cut_alike_for_every_tokenizer_and_fit_the_window(tiny: Callable[..., Path]) -> None:
    sys.path.insert(0, str(tasks_folder() / "gromov"))
    try:
        import utils
    finally:
        sys.path.pop(0)
        sys.modules.pop("utils", None)
    (wide,) = utils.prepared(["word " * 4000], pretrained=str(tiny("qwen3", max_position_embeddings=8192)))
    assert len(wide["text"]) == utils.CHARACTERS
    (narrow,) = utils.prepared(["word " * 4000], pretrained=str(tiny("qwen3")))
    assert 100 < narrow["tokens"] <= 512
    assert [doc["text"] for doc in utils.prepared(["", "x"], pretrained=str(tiny("qwen3")))] == ["x"]


@pytest.mark.slow
def test_the_loss_says_that_it_needs_a_tokenizer(run: Callable[..., Any], tiny: Callable[..., Path]) -> None:
    done = run(
        "lmprune", "eval", "--model_args", f"pretrained={tiny('qwen3')}", "--tasks", "lmprune_demo_normalised_loss",
        "--limit", "2", "--batch_size", "2",
    )  # fmt: skip
    assert "loss_over_log_v" in done.stdout
