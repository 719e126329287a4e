"""Quantised checkpoints load as they are, and what is pruned before or after is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmprune.choosing import write_recipe
from lmprune.cli import app
from lmprune.cuts.lineage import Lineage
from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError, UsageError
from lmprune.models.checkpoint import Checkpoint
from lmprune.models.cut import open_cut
from lmprune.models.tensors import read_tensor
from lmprune.text.sources import DataSettings
from lmprune.writing.pruning import prune
from lmprune.writing.quantizing import QuantizeSettings, quantize

NONE = QuantizeSettings(samples=0, device="cpu")


@pytest.fixture(scope="module")
def recipe(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "cut.yml"
    write_recipe(open_cut(tiny("llama")), Plan(8, (2, 3)), path)
    return path


def tensors(folder: Path) -> dict[str, Any]:
    return {name: read_tensor(entry) for name, entry in Checkpoint.open(folder).tensors.items()}


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_it_loads_in_plain_transformers_and_order_does_not_matter(
    tiny: Callable[..., Path], recipe: Path, tmp_path: Path, to: str
) -> None:
    from transformers import AutoModelForCausalLM

    done = quantize(recipe, tmp_path / "q", to, QuantizeSettings(samples=4, max_length=32, device="cpu"),
                    DataSettings(data="demo"))  # fmt: skip
    assert done.bytes_after < done.bytes_before and done.loss_before is not None and done.loss_after is not None
    # The tiny model is random: few bits change its loss by little, but do change it.
    assert 0 < abs(done.loss_after - done.loss_before) < 0.2 * done.loss_before
    said = done.to_data()
    assert said["rise"]["value"] == done.loss_after - done.loss_before
    assert said["rise"]["error"] > 0 and said["losses"]["before"]["error"] > 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "q").eval()
    assert plain.config.num_hidden_layers == 6 and plain.config.quantization_config is not None
    ours = open_cut(recipe).load(quantization=to, device="cpu")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, ours(input_ids=ids).logits)
    told = Lineage.read(tmp_path / "q")
    assert told is not None and told.plan == Plan(8, (2, 3)) and told.quantization is not None
    assert told.quantization["type"] == to and told.quantization["loss_after"] == done.loss_after

    quantize(tiny("llama"), tmp_path / "whole", to, NONE)
    write_recipe(open_cut(tmp_path / "whole"), Plan(8, (2, 3)), tmp_path / "later.yml")
    prune(tmp_path / "later.yml", tmp_path / "later", logits=False)
    first, second = tensors(tmp_path / "q"), tensors(tmp_path / "later")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_mistakes(tiny: Callable[..., Path], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"--quantization 'nf5' does not exist \(did you mean 'nf4'\?\)"):
        quantize(recipe, tmp_path / "q", "nf5", NONE)
    assert (
        app.run(
            [
                "quantize",
                str(recipe),
                str(tmp_path / "q"),
                "--quantization",
                "int8",
                "--samples",
                "0",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith("int8: ")
    with pytest.raises(ModelError, match="is quantised already"):
        quantize(tmp_path / "q", tmp_path / "r", "nf4", NONE)
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_the_harness_loads_it_as_any_model(run: Callable[..., Any], tmp_path: Path) -> None:
    quantize("demo", tmp_path / "q", "nf4", NONE)
    tasks = run("lmprune", "tasks").stdout.strip()
    done = run(
        "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'q'}", "--tasks", "lmprune_demo_facts",
        "--limit", 8, "--include_path", tasks, "--device", "cpu",
    )  # fmt: skip
    assert "lmprune_demo_facts" in done.stdout


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_views_of_a_quantised_model_leave_it_and_one_another_as_they_are(tiny: Callable[..., Path], to: Any) -> None:
    from lmprune.forward.views import pruned_view

    cut, ids = open_cut(tiny("llama")), torch.arange(24)[None]
    plan = Plan(8, (2, 3))

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=ids).logits

    wanted = logits(cut.load(quantization=to, device="cpu"))
    shorter = logits(cut.without(plan, "cut").load(quantization=to, device="cpu"))
    model = cut.load(quantization=to, device="cpu")
    views = [pruned_view(model, plan), pruned_view(model, plan)]  # made before anything has run
    for view in views:
        assert torch.equal(logits(view), shorter)
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(pruned_view(model, plan)), shorter)
    first, second = (view.model.layers[0].mlp.up_proj.weight for view in views)
    assert first is second is model.model.layers[0].mlp.up_proj.weight
