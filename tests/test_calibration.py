"""Text from every kind of source becomes the same tokens for the same seed."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmprune.errors import DataError, NetworkError, UsageError
from lmprune.text.sources import LONGEST, DataSettings, Document, read_documents, shuffled
from lmprune.text.tokens import Tokens, pack, tokenize

TEXTS = [f"document {number} speaks of {'many ' * (number % 5)}things" for number in range(20)]


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer of whole words with an end-of-text token and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<end>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} <end> {% endfor %}"
    return tokenizer


def jsonl(path: Path, rows: list[Any]) -> Path:
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def texts(source: object, **settings: Any) -> list[Document]:
    return sorted(read_documents(DataSettings(data=str(source), **settings), seed=0))


def test_importing_needs_neither_torch_nor_datasets() -> None:
    code = (
        "import sys, lmprune.text.tokens, lmprune.profiling.settings; print({'torch', 'datasets'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    paragraphs = "\n\n\n".join(TEXTS)
    (tmp_path / "a.txt").write_text(paragraphs)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(paragraphs.encode()))
    rows = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    jsonl(tmp_path / "a.jsonl", rows)
    jsonl(tmp_path / "a.jsonl.gz", rows)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert texts(tmp_path / name) == sorted(TEXTS), name
    monkeypatch.setattr(sys, "stdin", io.StringIO(paragraphs))
    assert texts("-") == sorted(TEXTS)


def test_a_dataset_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for the Hub is a folder of the id's name: datasets resolves both in the same way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    Path("maker/things").mkdir(parents=True)
    jsonl(Path("maker/things/train.jsonl"), [{"story": text} for text in TEXTS])
    jsonl(Path("maker/things/test.jsonl"), [{"story": "held out"}])
    assert texts("maker/things", column="story") == sorted(TEXTS)
    assert texts("maker/things", column="story", split="test") == ["held out"]
    with pytest.raises(DataError, match=r"no column 'text'. Choose one with --column: story"):
        texts("maker/things")
    with pytest.raises(DataError, match=r"cannot be read: .*split"):
        texts("maker/things", split="nosuch")


def test_no_network_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for source in ("c4", "maker/unreachable"):
        with pytest.raises(NetworkError, match=r"cannot be reached\. Check the network or give --data FILE$"):
            texts(source)


def test_the_seed_decides_the_order_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    settings = DataSettings(data=str(tmp_path / "a.txt"))
    first, again = (list(read_documents(settings, seed=1)) for _ in range(2))
    assert first == again != list(read_documents(settings, seed=2))
    # Written down, so that another machine or a later release must agree.
    assert [text.split()[1] for text in first[:6]] == ["0", "7", "9", "18", "5", "15"]


def test_shuffling_in_a_window_loses_nothing_and_moves_far() -> None:
    items = [str(number) for number in range(1000)]
    mixed = list(shuffled(items, seed=0, window=100))
    assert sorted(mixed) == sorted(items)
    places = {item: place for place, item in enumerate(mixed)}
    assert max(places["0"], places["1"], places["2"], places["3"]) > 100


def test_demo_is_the_default_where_the_caller_says_so() -> None:
    from lmprune.text.world import documents

    drawn = list(islice(read_documents(DataSettings(), seed=3, default="demo"), 5))
    assert drawn == list(islice(documents("calibration-3"), 5))


def test_fewer_samples_are_a_prefix(words: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    settings = DataSettings(data=str(tmp_path / "a.txt"))
    few, many = (tokenize(settings, words, samples=count, max_length=6, seed=0) for count in (5, 12))
    assert few.samples == 5 and few.hash == many.take(5).hash != many.hash
    assert all(len(row) <= 6 for row in many.rows) and many.rows[0].dtype == np.int32


def test_packing_fills_every_sample_and_ends_every_document(words: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    settings = DataSettings(data=str(tmp_path / "a.txt"), pack=True)
    packed = tokenize(settings, words, samples=100, max_length=16, seed=0)
    assert {len(row) for row in packed.rows} == {16}
    stream = " ".join(words.decode(row) for row in packed.rows)
    first = next(read_documents(settings, seed=0))
    assert stream.startswith(f"{first} <end>")
    total = sum(len(text.split()) + 1 for text in TEXTS)
    assert packed.count == total // 16 * 16
    with pytest.raises(DataError, match="does not fill even one sample of 5000 tokens"):
        tokenize(settings, words, samples=1, max_length=5000, seed=0)


def test_chat_template_takes_texts_and_conversations(words: Any, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "things"}, {"role": "assistant", "content": "many things"}]
    path = jsonl(tmp_path / "a.jsonl", [{"text": talk}])
    settings = DataSettings(data=str(path), chat_template=True)
    assert list(read_documents(settings, seed=0)) == [talk]
    row = tokenize(settings, words, samples=1, max_length=99, seed=0).rows[0]
    assert words.decode(row) == "<unk> things <end> <unk> many things <end>"
    with pytest.raises(DataError, match=r"holds conversations, not texts. Add --chat-template"):
        tokenize(DataSettings(data=str(path)), words, samples=1, max_length=99, seed=0)
    (tmp_path / "b.txt").write_text("many things")
    plain = DataSettings(data=str(tmp_path / "b.txt"), chat_template=True)
    assert words.decode(tokenize(plain, words, samples=1, max_length=99, seed=0).rows[0]) == "<unk> many things <end>"


def test_no_chat_template_is_said(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        tokenize(DataSettings(data="demo", chat_template=True), words, samples=1, max_length=9, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"  \n\n \n", "holds no text"),
        ("a.txt", b"caf\xe9", "not UTF-8 text"),
        ("a.jsonl", b'{"text": "x"}\n{"text":', "line 2: not JSON"),
        ("a.jsonl", b"[1]", "line 1: not a JSON object"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "no column 'text'. Choose one with --column: body, id"),
        ("a.jsonl", b'{"text": 3}', "the column 'text' holds int"),
        ("a.parquet", b"PAR1 no", "not a parquet file"),
        ("a.txt.gz", b"no gzip", "cannot read"),
        ("a.csv", b"x", "unknown kind of file"),
    ],
)
def test_broken_sources_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


def test_a_missing_file_is_no_dataset() -> None:
    with pytest.raises(DataError, match=r"no file 'nosuch.jsonl'"):
        texts("nosuch.jsonl")


def test_tokens_without_padding_from_either_side() -> None:
    left = Tokens.from_padded([[0, 0, 5, 6], [1, 2, 3, 4]], [[0, 0, 1, 1], [1, 1, 1, 1]])
    right = Tokens.from_padded([[5, 6, 0, 0], [1, 2, 3, 4]], [[1, 1, 0, 0], [1, 1, 1, 1]])
    assert left.hash == right.hash and [len(row) for row in left.rows] == [2, 4] and left.count == 6
    with pytest.raises(DataError, match="a sample is empty"):
        Tokens.from_padded([[5, 6]], [[0, 0]])


def test_the_hash_sees_where_samples_end() -> None:
    one, two = Tokens((np.array([1, 2, 3]),)), Tokens((np.array([1, 2]), np.array([3])))
    assert one.hash != two.hash
    assert one.hash == Tokens((np.array([1, 2, 3], dtype=np.int64),)).hash


@pytest.fixture(scope="module")
def beginning(words: Any) -> Any:
    """The same tokenizer, which puts <begin> before each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    core = words.backend_tokenizer.from_str(words.backend_tokenizer.to_str())
    core.add_special_tokens(["<begin>"])
    begin = core.token_to_id("<begin>")
    core.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", begin)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<begin>",
        eos_token="<end>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def test_every_packed_sample_begins_as_the_tokenizer_begins_a_text(beginning: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    data = DataSettings(data=str(tmp_path / "a.txt"), pack=True)
    packed = tokenize(data, beginning, samples=99, max_length=7, seed=0)
    begin, end = beginning.bos_token_id, beginning.eos_token_id
    rows = [row.tolist() for row in packed.rows]
    assert packed.unscored == begin and all(len(row) == 7 and row[0] == begin for row in rows)
    assert all(row[at - 1] == end for row in rows for at in range(1, 7) if row[at] == begin), "twice in a row"
    said = [token for row in rows for token in row if token != begin]
    plain = tokenize(replace(data, bos=False), beginning, samples=99, max_length=7, seed=0)
    without = [token for row in plain.rows for token in row.tolist()]
    assert begin not in without and plain.unscored is None
    assert said[: len(without)] == without[: len(said)], "nothing is lost between samples"
    with pytest.raises(UsageError, match="--no-bos is for samples that are joined"):
        tokenize(replace(data, pack=False, bos=False), beginning, samples=1, max_length=7, seed=0)


def test_a_token_that_ends_and_begins_texts_stands_once_and_is_scored() -> None:
    assert list(pack([[0, 5, 6], [0, 7, 8, 9]], 0, 5, bos=0)) == [[0, 5, 6, 0, 7]]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffmany things".encode())
    assert texts(tmp_path / "a.txt") == ["many things"]


def test_a_long_stretch_is_read_in_windows_and_costs_what_is_asked(
    words: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("many things " * 20_000)
    with caplog.at_level("INFO", "lmprune"):
        read = texts(tmp_path / "a.txt")
    assert len(read) == 8 and all(len(text) <= LONGEST for text in read) and "".join(read).count("things") == 20_000
    assert caplog.text.count("without a blank line") == 1
    jsonl(tmp_path / "a.jsonl", [{"text": "many things " * 20_000}])
    seen: list[int] = []
    monkeypatch.setattr(
        type(words), "__call__", lambda self, group, **_: seen.extend(map(len, group)) or {"input_ids": [[1]]}
    )
    tokenize(DataSettings(data=str(tmp_path / "a.jsonl")), words, samples=1, max_length=8, seed=0)
    assert seen == [8 * 64]


@pytest.mark.parametrize("text", ['"\\ud800"', '[{"role": "user", "content": null}]', "[]", '"x', "[" * 99_999])
def test_a_row_that_is_no_text_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": ' + text + "}\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        texts(tmp_path / "a.jsonl")
