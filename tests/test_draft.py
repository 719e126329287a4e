"""A pruned model as the draft of its base: the arithmetic, the agreement, and that the output stays the base's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import LAYERS, model_of, student_of
from transformers import GenerationConfig

from lmprune.benching.draft_rows import Costs, DraftReport, DraftRow, DraftSettings, Measured, tokens_per_round
from lmprune.benching.drafting import _generated, _propose, _Run, commands, draft, how_to_run
from lmprune.choosing import write_recipe
from lmprune.cli import app
from lmprune.cuts.plan import Plan
from lmprune.errors import ModelError, OutputError, UsageError
from lmprune.forward.agreement import Mean, agreement, said
from lmprune.forward.loss import losses
from lmprune.forward.views import Views
from lmprune.models.cut import open_cut
from lmprune.sweeping.draft_search import SearchSettings, search_draft
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens

TOKENS = Tokens(tuple(np.random.default_rng(0).integers(3, 96, n, dtype=np.int32) for n in (9, 14, 1, 12)))


def test_agreement_counts_next_tokens_and_what_sampling_would_keep() -> None:
    whole = model_of("llama")
    cut = student_of(whole, Plan(6, (2, 3)))
    same = accepted = count = 0.0
    for row in TOKENS.rows:
        ids = torch.from_numpy(row.astype(np.int64))[None]
        with torch.no_grad():
            p, q = (model(input_ids=ids).logits[0, :-1].softmax(-1) for model in (whole, cut))
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        # What is kept of tokens sampled from the draft: sum_x q(x) min(1, p(x)/q(x)).
        accepted += float((q * (p / q).clamp(max=1)).sum())
        count += len(row) - 1
    for batch_size in (1, 4):
        found = agreement(whole, cut, TOKENS, batch_size=batch_size)
        assert found.tokens == count == 32
        assert found.greedy == pytest.approx(same / count) and 0 < found.greedy < 1
        assert found.acceptance == pytest.approx(accepted / count, abs=1e-5)
    alike = agreement(whole, whole, TOKENS)
    assert alike.greedy == 1.0 and alike.acceptance == pytest.approx(1.0, abs=1e-5)


def test_what_many_cuts_say_is_what_each_says_alone() -> None:
    whole = model_of("llama")
    plans = {"whole": Plan(6), "a": Plan(6, (2, 3)), "b": Plan(6, (3,))}
    found = said(Views(whole, plans), TOKENS)
    wanted = losses(whole, list(plans.values()), TOKENS)
    for place, (name, plan) in enumerate(plans.items()):
        alone = agreement(whole, student_of(whole, plan), TOKENS)
        same = found[name].same_as(found["whole"])
        assert (same.value, same.stderr) == pytest.approx((alone.greedy, alone.stderr))
        assert found[name].loss.value == pytest.approx(float(wanted.mean()[place]), rel=1e-6)
    assert found["whole"].same_as(found["whole"]) == Mean(1.0, 0.0)


def test_the_noise_of_an_agreement_is_that_of_drawing_other_samples() -> None:
    rng = np.random.default_rng(0)

    def draw() -> tuple[Mean, float]:  # texts differ among themselves more than tokens within one do
        counts = rng.integers(5, 60, 40)
        same = rng.binomial(counts, rng.beta(4, 2, 40))
        return Mean.of(same.astype(float), counts), same.sum() / counts.sum()

    draws = [draw() for _ in range(800)]
    spread = float(np.std([value for _, value in draws]))
    said_error = float(np.mean([mean.stderr for mean, _ in draws]))
    by_tokens = float(np.mean([np.sqrt(v * (1 - v) / (40 * 32)) for _, v in draws]))
    assert said_error == pytest.approx(spread, rel=0.1) and by_tokens < 0.6 * spread


def test_agreement_needs_one_vocabulary() -> None:
    with pytest.raises(ModelError, match="vocabularies are of 96 and 64 tokens"):
        agreement(model_of("llama"), model_of("llama", vocab_size=64), TOKENS)


def test_the_arithmetic_is_that_of_the_paper() -> None:
    for chance in (0.2, 0.6, 0.9):
        for proposed in (1, 3, 8):
            closed = (1 - chance ** (proposed + 1)) / (1 - chance)
            assert tokens_per_round(chance, proposed) == pytest.approx(closed)
    # Leviathan et al., theorem 3.8, where reading several tokens costs as much as reading one.
    costs = Costs(base=1.0, draft=0.25, reading={n: 1.0 for n in range(1, 10)})
    assert costs.speed_up(0.8, 4) == pytest.approx((1 - 0.8**5) / (0.2 * (4 * 0.25 + 1)))
    dear = Costs(base=1.0, draft=0.25, reading={5: 2.0})
    assert dear.speed_up(0.8, 4) == pytest.approx(costs.speed_up(0.8, 4) * 2 / 3)


def test_what_is_expected_of_a_generation_counts_all_passes() -> None:
    costs = Costs(2.0, 1.0, {1: 2.0, 4: 3.0}, (5.0, 4.0))
    assert costs.alone(10) == 5 + 9 * 2 and costs.alone(10, host=0.5) == 28
    # The prompt by both, the other rounds' readings, and the draft's passes but the one that read the prompt.
    assert costs.together(4, 12, 3) == 9 + 3 * 3 + 11 * 1 and costs.together(4, 12, 3, host=1.0) == 33


def report(ratio: float, greedy: float, measured: Measured | None = None) -> DraftReport:
    costs = Costs(1.0, ratio, {n: 1.0 for n in range(1, 10)})
    rows = tuple(DraftRow(g, costs.speed_up(greedy, g), 0.0) for g in (1, 4))
    return DraftReport("base", "cut", (12, 9), greedy, greedy, 100, "text", costs, rows, measured, "cpu")


def test_it_says_plainly_whether_a_draft_pays() -> None:
    light = report(0.75, 0.7)
    assert not light.pays and "does not pay" in light.verdict() and "a deeper cut" in light.verdict()
    weak = report(0.33, 0.2)
    assert not weak.pays and "heal it on the base's own text" in weak.verdict()
    good = report(0.25, 0.8)
    assert good.pays and good.best.proposed == 4 and "pays with 4 draft tokens: 1.68" in good.verdict()


def test_what_was_measured_counts_for_whether_it_pays() -> None:
    def measured(speed_up: float, predicted: float) -> Measured:
        return Measured(4, speed_up, predicted, speed_up, (0.0, 0.0), 10, 10, 2.0)

    slow = report(0.75, 0.95, measured(0.88, 0.96))
    assert not slow.pays and slow.best.greedy > 1 and not slow.to_data()["pays"]
    assert "does not pay: at best 1.13 times" in slow.verdict() and "0.88 when it was measured" in slow.verdict()
    host = report(0.25, 0.8, measured(0.9, 1.5))
    assert host.pays and host.verdict().endswith("not by transformers here, whose own work takes that away")
    assert report(0.25, 0.8, measured(1.4, 1.5)).verdict() == "pays with 4 draft tokens: 1.68 times as fast"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft") / "cut.yml"
    write_recipe(open_cut("demo"), Plan(12, (3, 4, 5, 6, 7, 8)), path)
    return path


QUICK = DraftSettings(samples=4, max_length=48, draft_tokens="1,3", prompts=3, prompt_length=8, tokens=8, device="cpu")


def test_the_output_is_the_bases_own(recipe: Path, one_thread: None) -> None:
    done = draft("demo", recipe, QUICK)
    assert done.measured is not None
    assert (done.layers, done.measured.prompts, done.measured.same) == ((12, 6), 3, 3)
    assert 0 < done.greedy < 1 and 0 < done.acceptance < 1 and done.costs.ratio > 0
    assert [row.proposed for row in done.rows] == [1, 3]
    assert done.measured.with_host > 0 and done.measured.predicted > 0 and min(done.measured.overhead) > 0
    assert 1 <= done.measured.kept <= done.measured.proposed + 1
    data = json.loads(json.dumps(done.to_data()))
    assert data["format"] == "lmprune-draft" and data["best"] == done.best.proposed
    assert data["measured"]["of_predicted"] == pytest.approx(done.measured.speed_up / done.measured.with_host)


def test_decoding_goes_by_no_penalties_of_the_makers() -> None:
    """With them the two models would say what neither ranks first, and a cut be judged by that."""
    base, small = model_of("llama"), student_of(model_of("llama"), Plan(LAYERS, (2, 3)))
    prompt = list(range(3, 9))
    plain = _generated(base, prompt, 6)[0]
    ids = torch.tensor([prompt])
    for _ in range(6):
        ids = torch.cat([ids, base(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert plain == ids[0].tolist()
    for model in (base, small):
        model.generation_config = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1, eos_token_id=95)
    makers = base.generation_config
    _propose(small, 2)
    assert _generated(base, prompt, 6)[0] == plain == _generated(base, prompt, 6, small)[0]
    assert base.generation_config is makers
    # The output is the base's whatever a draft proposes, so count what is kept: all that the base itself proposes.
    copy = student_of(base, Plan(LAYERS, ()))
    _propose(copy, 2)
    assert _Run.of(base, prompt, 6, copy).passes == 2


@pytest.mark.slow
def test_fifty_prompts_and_a_prediction_that_holds(recipe: Path, one_thread: None) -> None:
    settings = DraftSettings(
        samples=16, draft_tokens="2", prompts=50, prompt_length=16, tokens=24, device="cpu", dtype="float32"
    )
    done = draft("demo", recipe, settings)
    # After one of these prompts two tokens' logits are 11.00001 and 11.000006: there rounding may decide, and reading
    # several tokens at once rounds otherwise than reading one.
    assert done.measured is not None and done.measured.same >= 49
    # As many tokens a round as the agreement on text lets one expect.
    assert done.measured.kept == pytest.approx(tokens_per_round(done.greedy, 2), rel=0.25)


def test_a_checkpoint_alone_finds_its_base_and_mistakes_are_one_line(
    tiny: Callable[..., Path], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny("llama")
    with pytest.raises(ModelError, match="has a vocabulary of 320 tokens and demo one of 1271: a draft needs the same"):
        draft("demo", other, QUICK)
    with pytest.raises(ModelError, match=r"is not a pruned model of lmprune\. Give the base"):
        draft(other, None, QUICK)
    with pytest.raises(UsageError, match="--draft-tokens '0'"):
        DraftSettings(draft_tokens="0")
    with pytest.raises(UsageError, match="pass the window of 512"):
        draft("demo", recipe, DraftSettings(prompt_length=500, tokens=64, device="cpu"))
    words = [
        *("draft", str(recipe), "--samples", "2", "--max-length", "24", "--prompts", "0", "--device", "cpu"),
        *("--draft-tokens", "2", "-o", str(tmp_path / "d.json")),
    ]
    assert app.run(words) == 0
    assert "6 layers, as a draft of demo of 12" in capsys.readouterr().out
    assert json.loads((tmp_path / "d.json").read_text())["measured"] is None


def test_another_tokenizer_of_the_same_size(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny("llama"), other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(ModelError, match="has another tokenizer than"):
        draft(tiny("llama"), other, QUICK, DataSettings(data="demo"))


def test_commands_name_both_models() -> None:
    for command in commands("base", "small", 4).values():
        assert "base" in command or "model.generate" in command
        assert "small" in command or "draft.gguf" in command
        assert "4" in command


def test_only_runtimes_that_are_right_are_advised(tiny: Callable[..., Path], tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
    base = open_cut(tiny("gemma3_text", head_dim=16, query_pre_attn_scalar=16, layer_types=kinds, sliding_window=16))
    write_recipe(base, Plan(8, (0, 1, 2, 3)), tmp_path / "r.yml")
    first, *others = how_to_run(base, open_cut(tmp_path / "r.yml"), 2)
    said = dict(line.split(": ", 1) for line in others)
    assert first.startswith("lmprune prune") and "assistant_model" in said["transformers"]
    assert said["vllm"].startswith("vllm serve")
    assert said["llama.cpp"].startswith("not with these: it takes every 6th layer to be full attention")


def test_search_writes_the_cut_of_the_best_prediction(tmp_path: Path, one_thread: None) -> None:
    found = search_draft("demo", tmp_path / "s", SearchSettings(fractions="0.75,0.5", criteria="deepest"), QUICK)
    speeds = [one.best.greedy for one in found.candidates]
    assert speeds == sorted(speeds, reverse=True) and len(found.candidates) == 2
    assert {len(one.plan.kept) for one in found.candidates} == {3, 6}
    assert open_cut(found.path).plan == found.candidates[0].plan
    with pytest.raises(OutputError, match="is not empty"):
        search_draft("demo", tmp_path / "s", settings=QUICK)


@pytest.mark.slow
def test_search_heals_on_the_bases_own_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        *("draft", "demo", "--search", str(tmp_path / "s"), "--fractions", "0.67", "--criteria", "deepest"),
        *("--heal-steps", "20", "--samples", "16", "--prompts", "3", "--tokens", "8", "--device", "cpu", "--json"),
    ]
    assert app.run(words) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["draft"] == str(tmp_path / "s" / "draft") and done["measured"]["same"] == 3
    assert done["greedy"] > done["candidates"][0]["greedy"]


@pytest.mark.parametrize(
    "wrong", [{"fractions": "0.5,1"}, {"fractions": "half"}, {"criteria": "gready"}, {"heal_steps": -1}]
)
def test_bad_searches(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"--(fractions|criterion|heal-steps)"):
        SearchSettings(**wrong)  # type: ignore[arg-type]
