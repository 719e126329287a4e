from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from lmprune.errors import ModelError, OutputError
from lmprune.files import check_output_file, check_output_folder, new_folder, write_json, write_text
from lmprune.models.checkpoint import Checkpoint, layer_prefix, renamed


def test_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["x.json"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_where_no_locks_are_known_somebody_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from filelock import FileLock

    from lmprune.files import locked

    def none(self: FileLock, **how: object) -> None:  # as older versions do where flock is missing
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", none)
    with locked(tmp_path / "out"):
        assert "knows no locks: start nothing else there" in caplog.text


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "all").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["all"]
    with pytest.raises(OutputError, match="not empty"), new_folder(tmp_path / "out"):
        pass


def test_paths_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for check, path in (
        (check_output_folder, tmp_path / "file"),
        (check_output_file, tmp_path),
        (check_output_file, tmp_path / "file" / "x"),
    ):
        with pytest.raises(OutputError):
            check(path)
    with pytest.raises(OutputError, match="cannot write"):
        write_text(tmp_path / "file" / "x", "y")


def _write(path: Path, tensors: dict[str, list[int]]) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, values in tensors.items():
        header[name] = {"dtype": "I64", "shape": [len(values)], "data_offsets": [at, at + 8 * len(values)]}
        at += 8 * len(values)
    raw = json.dumps(header).encode()
    data = b"".join(struct.pack(f"<{len(v)}q", *v) for v in tensors.values())
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize("target", ["nowhere", "folder"])
def test_a_link_in_the_place_of_a_folder_is_refused_before_any_work(target: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(OutputError, match="out is a link"):
        check_output_folder(tmp_path / "out")
    with pytest.raises(OutputError, match="out is a link"), new_folder(tmp_path / "out"):
        pytest.fail("it was begun")


def test_a_lock_that_cannot_be_made_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock, Timeout

    from lmprune.files import take_lock

    def never(self: FileLock, **how: object) -> None:
        raise Timeout("x")

    monkeypatch.setattr(FileLock, "acquire", never)
    with pytest.raises(OutputError, match="no file can be made there"):
        take_lock(tmp_path / "x")
    (tmp_path / ".x.lock").touch()
    with pytest.raises(OutputError, match="another run is writing"):
        take_lock(tmp_path / "x")


def test_headers_are_read_and_fingerprinted(tmp_path: Path) -> None:
    _write(tmp_path / "model.safetensors", {"a.0.w": [1, 2], "a.1.w": [3]})
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors["a.0.w"].shape == (2,) and checkpoint.bytes == 24
    before = checkpoint.fingerprint
    _write(tmp_path / "model.safetensors", {"a.0.w": [1, 2], "a.1.w": [4]})
    assert Checkpoint.open(tmp_path).fingerprint != before


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with pytest.raises(ModelError, match="no weights"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pickle"):
        Checkpoint.open(tmp_path)
    _write(file, {"a.0.w": [1, 2]})
    whole = file.read_bytes()
    for broken in (whole[:-3], whole[:5], b"", b"\xff" * 64, whole[:8] + b"?" * (len(whole) - 8), whole + b"x"):
        file.write_bytes(broken)
        with pytest.raises(ModelError, match="corrupt"):
            Checkpoint.open(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    file.write_bytes(whole)
    index.write_text(json.dumps({"weight_map": {"a.0.w": "one.safetensors"}}))
    with pytest.raises(ModelError, match="lacks the shard 'one"):
        Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a.0.w": "model.safetensors", "b": "model.safetensors"}}))
    with pytest.raises(ModelError, match="'b', which no shard holds"):
        Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a.0.w": "../model.safetensors"}}))
    with pytest.raises(ModelError, match="not a plain file name"):
        Checkpoint.open(tmp_path)
    index.write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        Checkpoint.open(tmp_path)


def test_layers_are_found_and_renamed_by_name() -> None:
    names = [
        "emb",
        *(f"model.layers.{i}.w" for i in range(4)),
        *(f"vision_tower.layers.{i}.w" for i in range(4)),
        "head.7",
    ]
    assert layer_prefix(names, 4) == "model.layers"
    assert renamed(names[:5], "model.layers", (0, 3), 4) == {
        "emb": "emb",
        "model.layers.0.w": "model.layers.0.w",
        "model.layers.3.w": "model.layers.1.w",
    }
    with pytest.raises(ModelError, match="promises 5 layers"):
        layer_prefix(names, 5)


def test_one_process_writes_a_folder_and_sweeps_what_a_kill_left(tmp_path: Path) -> None:
    (tmp_path / ".out.half-12345678").mkdir()
    (tmp_path / ".out.half-12345678" / "model.safetensors").write_text("x")
    (tmp_path / ".out.healing").mkdir()
    with new_folder(tmp_path / "out") as folder:
        assert [path.name for path in tmp_path.glob(".out.half-*")] == [folder.name]
        with pytest.raises(OutputError, match="another run is writing"), new_folder(tmp_path / "out"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.healing", "out"]


def test_old_halves_of_a_file_are_swept(tmp_path: Path) -> None:
    for name, age in ((".a.json.half-old", 9999), (".a.json.half-new", 0)):
        (tmp_path / name).write_text("{")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_json(tmp_path / "a.json", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.json.half-new", "a.json"]


def test_halves_of_what_nobody_makes_are_swept(tmp_path: Path) -> None:
    """In a cache another name may never be asked for again; what another process makes stays."""
    from lmprune.files import free_lock, scratch_folder, sweep_halves, take_lock

    for name in (".old.half-a1", ".busy.half-b2", ".out.gguf.half-c3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"x")
    (tmp_path / "whole").mkdir()
    lock = take_lock(tmp_path / "busy")
    with scratch_folder(tmp_path / "out.gguf") as made:
        assert not (tmp_path / ".out.gguf.half-c3").exists() and made.is_dir()
        sweep_halves(tmp_path)
        assert made.is_dir(), "its lock is held"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [".busy.half-b2", "whole"]
    free_lock(lock)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "sweep.json", "r.yml", "m.safetensors", "text.jsonl"]
)
def test_no_result_replaces_what_is_something_else(name: str, tmp_path: Path) -> None:
    """As `lmprune profile MODEL -o MODEL/config.json` would."""
    check_output_file(tmp_path / name)
    (tmp_path / name).write_text("of a model")
    with pytest.raises(OutputError, match="something else"):
        check_output_file(tmp_path / name)
    if name == "r.yml":
        check_output_file(tmp_path / name, (".yml",))
