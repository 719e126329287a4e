"""Every causal language model of transformers, pruned in every way: right or refused, never silently wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import IRREGULAR, MODEL_TYPES, examine

from lmprune.writing import support

NAMED = (
    "llama mistral ministral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5_text gemma gemma2 gemma3_text "
    "gemma3n_text gemma4_text phi phi3 olmo2 olmo3 olmoe granite granitemoe granitemoehybrid stablelm starcoder2 glm4 "
    "glm4_moe apertus arcee exaone4 smollm3 gpt2 gpt_neo gpt_neox gpt_oss opt bloom mpt falcon falcon_h1 llama4_text "
    "bamba jamba zamba zamba2 recurrent_gemma nemotron hunyuan_v1_dense hunyuan_v1_moe seed_oss cohere cohere2 "
    "deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe minimax lfm2 mamba emu3 mllama"
).split()
ROWS = {row.architecture: row for row in support.rows()}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model_type", NAMED)
def test_named_architectures_are_right_or_refused(model_type: str) -> None:
    for outcome in examine(model_type, (IRREGULAR,)):
        assert not outcome.silently_wrong, outcome
        assert outcome.copied == "right" or outcome.copied.startswith("refused"), outcome
        if outcome.copied == "right":
            assert ROWS[model_type].prune in ("right", "some")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_all_architectures_are_right_or_refused(model_type: str) -> None:
    for outcome in examine(model_type):
        assert not outcome.silently_wrong, outcome
        assert not outcome.in_memory.startswith("untested"), outcome


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [row.architecture for row in support.rows() if row.writer == "mergekit"])
def test_mergekit_is_right_where_prune_uses_it(model_type: str) -> None:
    for outcome in examine(model_type, (IRREGULAR,), mergekit=True):
        # It is tried on the kept sets that we can express, and on no others.
        assert outcome.mergekit_with_base == ("right" if outcome.copied == "right" else "untested"), outcome


def test_every_architecture_of_transformers_was_measured() -> None:
    missing = set(MODEL_TYPES) - set(ROWS)
    assert not missing, f"new in this version of transformers: run `python tests/architectures.py`: {sorted(missing)}"


def test_nothing_is_wrong_in_the_table() -> None:
    for row in support.rows():
        assert row.in_memory in ("right", "some", "refused"), row
        assert row.prune in ("right", "some", "refused"), row
        assert row.plain_mergekit != "untested" or row.prune == "refused", row
        assert row.prune == "right" or row.reason, f"{row.architecture} is {row.prune} without a reason"


def test_the_document_is_current() -> None:
    document = Path(__file__).parent.parent / "docs" / "architectures.md"
    assert document.read_text(encoding="utf-8") == support.document(), "run `python tests/architectures.py`"


def test_unknown_architectures_are_copied() -> None:
    assert support.writer_for("no_such_model") == "copy"
    assert support.writer_for("llama") == "mergekit"
    assert support.writer_for("deepseek_v3") == "copy"
