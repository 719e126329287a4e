"""Models whose weights wait in files: the numbers of those in memory, and nothing left on the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from architectures import MEMORY, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_streaming_everywhere import LAST_DIGIT

from lmprune.budgeting.lab import own_tensors
from lmprune.cuts.plan import Plan
from lmprune.cuts.width import Width
from lmprune.errors import ModelError, OutputError
from lmprune.forward.batches import Batch
from lmprune.forward.streaming import StreamedModel
from lmprune.forward.views import pruned_view
from lmprune.models import in_files
from lmprune.models.cut import open_cut
from lmprune.models.in_files import Files
from lmprune.models.loading import load_model
from lmprune.models.width import width_of
from lmprune.writing import support

SUPPORTED = [row.architecture for row in support.rows() if row.prune in ("right", "some")]
FEW = ("llama", "gpt2", "gemma3_text", "mixtral", "jamba")
"""Types for the default run: tied and untied, with buffers, transposed, with experts, of several kinds of layers."""
SHARED = ("zamba", "zamba2")
"""Types whose layers share weights."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _every_tensor_gets_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_files, "_LEAST", 1)
    monkeypatch.setattr(in_files, "_in_memory", lambda folder: False)  # tests may run there


def filed(folder: Path, files: Path) -> Any:
    """The model of ``folder``, its weights in ``files``."""
    return StreamedModel(open_cut(str(folder)), dtype="float32", device=torch.device("cpu")).in_files(Files(files))


def wait_in_files(model: Any) -> bool:
    return all(parameter.untyped_storage().filename is not None for parameter in model.parameters())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(4, 28).view(2, 12)
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def check_kind(kind: str) -> None:
    """That its logits in files are those in memory, and that all weights wait there."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        folder, files = Path(scratch) / "model", Path(scratch) / "files"
        tiny_model(tiny_config(kind)).save_pretrained(folder)
        live, model = load_model(folder, dtype="float32"), filed(folder, files)
        assert wait_in_files(model) and not list(files.iterdir())
        assert type(model) is type(live)
        assert {name for name, _ in model.named_parameters()} == {name for name, _ in live.named_parameters()}
        if kind in LAST_DIGIT:
            assert torch.allclose(logits(model), logits(live), atol=1e-5)
        else:
            assert torch.equal(logits(model), logits(live))


@pytest.mark.parametrize("kind", FEW)
def test_weights_in_files_are_the_models_own(kind: str) -> None:
    check_kind(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind not in (*FEW, *SHARED)])
def test_every_architecture_runs_from_files(kind: str) -> None:
    check_kind(kind)


def test_layers_that_share_weights_are_refused(tmp_path: Path) -> None:
    tiny_model(tiny_config("zamba2")).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="shared between layers"):
        filed(tmp_path / "model", tmp_path / "files")


def test_a_narrower_view_waits_in_files_too_and_changes_nothing_of_the_whole(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = filed(tiny("llama"), tmp_path)
    before = logits(model)
    kept = {f"neurons.{layer}": torch.arange(64, dtype=torch.int32) for layer in range(8) if layer != 3}
    plan = Plan(8, (3,), (width_of(kept, ffn=64),))
    assert isinstance(plan.parts[0], Width)
    view = own_tensors(pruned_view(model, plan), model)
    assert wait_in_files(view)
    same = own_tensors(pruned_view(load_model(tiny("llama"), dtype="float32"), plan), model)
    assert torch.equal(logits(view), logits(same))
    with torch.no_grad():
        for parameter in view.model.layers.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), before)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_in_one_line(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"cannot wait in a file of .*: No space left on device. Write to another"):
        filed(tiny("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_the_system_does_not_map_is_told_in_one_line(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **how: Any) -> None:
        raise RuntimeError("unable to mmap 4096 bytes from file <f>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "from_file", refused)
    with pytest.raises(OutputError, match=r"cannot wait in a file of .*: .*Cannot allocate memory \(12\)\. .*ulimit"):
        filed(tiny("llama"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_lies_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    parts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="tmpfs")]
    monkeypatch.setattr(in_files.psutil, "disk_partitions", lambda all: parts)
    with pytest.raises(OutputError, match=r"lies in memory itself.* --no-stream"):
        Files(tmp_path / "below")
    parts.append(SimpleNamespace(mountpoint=str(tmp_path / "disk"), fstype="ext4"))
    Files(tmp_path / "disk")


@pytest.mark.parametrize("shape", [None, (7, 3)])
def test_a_head_that_is_missing_or_another_is_no_random_one(
    shape: tuple[int, int] | None, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama", tie_word_embeddings=False), folder)
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    if shape is not None:
        tensors["lm_head.weight"] = head.new_zeros(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not fit its config: (missing|mismatched) tensor 'lm_head.weight'"):
        filed(folder, tmp_path / "files")
    streamed = StreamedModel(open_cut(str(folder)), dtype="float32", device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"tensor 'lm_head.weight'"):
        streamed.logits([Batch.of([np.arange(4, 12)], torch.device("cpu"))], [Plan(8)], lambda *found: None)


def test_an_adapter_is_not_left_out_in_silence(tiny: Callable[..., Path], tmp_path: Path) -> None:
    cut = replace(open_cut(str(tiny("llama"))), adapter=tmp_path)
    with pytest.raises(ModelError, match=r"has an adapter, which is not read layer by layer. Use --no-stream"):
        StreamedModel(cut, dtype="float32", device=torch.device("cpu"))
