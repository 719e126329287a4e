"""What a cut is judged by: objectives against naive renderings, races that keep their promise, searches that go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from lmprune.choosing import ModelEvidence, choose
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import Plan
from lmprune.errors import DataError, UsageError
from lmprune.forward.calls import generating
from lmprune.forward.loss import Losses, LossTable
from lmprune.forward.measures import Measures
from lmprune.forward.objectives import kl, parse_objective
from lmprune.forward.objectives.answers import Lost, first_lines, sure_ones
from lmprune.forward.objectives.written import Agreement, write
from lmprune.forward.run import run
from lmprune.forward.states import gradients
from lmprune.forward.views import pruned_view
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model
from lmprune.profiling import ProfileSettings
from lmprune.profiling.sequential import Race
from lmprune.text.prompts import PROMPT, prompts_of
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 8
PLANS = [Plan(LAYERS), Plan(LAYERS, (3, 4)), Plan(LAYERS, (7,)), Plan(LAYERS, (0, 7))]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Any:
    return load_model(tiny("llama"), dtype="float32")


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    rng = np.random.default_rng(0)
    return Tokens(tuple(rng.integers(4, 60, length).astype(np.int32) for length in (5, 12, 2, 9, 7, 12, 30, 2, 8)))


def log_probabilities(model: Any, plan: Plan, row: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = pruned_view(model, plan)(input_ids=torch.tensor(np.asarray(row, dtype=np.int64)[None])).logits
    return torch.log_softmax(logits[0, :-1].double(), -1)


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_a_mix_is_a_weighted_mean() -> None:
    one, other = Losses(np.array([[1.0, 3.0]]), np.array([3, 1])), Losses(np.array([[5.0]]), np.array([7]))
    mixed = Losses.mixed({"one": one, "other": other}, [0.75, 0.25])
    assert mixed.mean() == pytest.approx(0.75 * 1.5 + 0.25 * 5) and mixed.values.shape == (1, 3)
    assert [(t.name, t.argument, t.share) for t in parse_objective("loss + 3*task:gsm8k")] == [
        ("loss", "", 0.25),
        ("task", "gsm8k", 0.75),
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("los", "no objective 'los' \\(did you mean 'loss'"),
        ("task", "write task:NAME"),
        ("kl:x", "write kl"),
        ("loss+loss", "named twice"),
        ("0*loss", "a weight is above 0"),
        ("", "no objective ''"),
    ],
)
def test_what_is_no_objective_is_one_line(asked: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_objective(asked)


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [3, 320])
def test_divergence_is_that_of_the_formula(model: Any, tokens: Tokens, top: int) -> None:
    """KL over the whole model's likeliest tokens and the rest as one outcome; over all tokens it is the full one."""
    found = LossTable(model, tokens, kl.Divergence(tokens, top), progress=False).losses(PLANS)
    assert not found.values[0].any(), "the whole model does not diverge from itself"
    for number, plan in enumerate(PLANS):
        for sample, row in enumerate(tokens.rows):
            p, q = log_probabilities(model, Plan(LAYERS), row), log_probabilities(model, plan, row)
            kept = p.topk(top).indices
            p, q = p.gather(-1, kept).exp(), q.gather(-1, kept).exp()
            naive = (p * (p / q).log()).sum(-1)
            if top < 320:
                rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
                naive += rest_p * (rest_p / rest_q).log()
            # Batched and single rows round otherwise in float32, on some processors beyond 1e-6 of the value.
            assert found.values[number, sample] == pytest.approx(float(naive.mean()), rel=2e-6, abs=2e-6)


def test_only_answers_count(model: Any, tokens: Tokens) -> None:
    starts = tuple(max(1, len(row) // 2) for row in tokens.rows)
    answers = Tokens(tokens.rows, starts=starts)
    found = LossTable(model, answers, progress=False).losses(PLANS)
    for number, plan in enumerate(PLANS):
        for sample, (row, start) in enumerate(zip(tokens.rows, starts)):
            ids = torch.tensor(row[1:].astype(np.int64))[:, None]
            each = -log_probabilities(model, plan, row).gather(-1, ids)[start - 1 :, 0]
            assert found.values[number, sample] == pytest.approx(float(each.mean()), abs=1e-5)
            assert found.tokens[sample] == len(each)


def test_gradients_are_those_of_the_answers(model: Any, tokens: Tokens) -> None:
    starts = tuple(max(1, len(row) - 2) for row in tokens.rows)
    found = {(layer, name): value for layer, name, _, value in gradients(model, Tokens(tokens.rows, starts=starts))}
    weight = model.model.layers[2].mlp.up_proj.weight
    total = torch.zeros(())
    for row, start in zip(tokens.rows, starts):
        ids = torch.tensor(row.astype(np.int64)[None])
        lost = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total = total + lost[start - 1 :].sum()
    count = sum(len(row) - start for row, start in zip(tokens.rows, starts))
    naive = torch.autograd.grad(total / count, weight)[0].numpy()
    assert np.abs(found[2, "mlp.up_proj.weight"] - naive).max() < 1e-6


def test_what_the_model_writes_is_its_own_greedy_text(model: Any, tokens: Tokens) -> None:
    made = write(model, tokens, end=0, longest=12)
    assert made.starts is not None and made.samples == tokens.samples
    for prompt, row, start in zip(tokens.rows, made.rows, made.starts):
        ids = torch.tensor(prompt.astype(np.int64)[None])
        for _ in range(len(row) - start):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert start == len(prompt) and ids[0].tolist() == row.tolist()
        assert len(row) - start == 12 or row[-1] == 0


def test_makers_settings_change_nothing_of_what_is_written(model: Any, tokens: Tokens) -> None:
    made, before = write(model, tokens, end=0, longest=12), model.generation_config
    model.generation_config = makers = GenerationConfig(repetition_penalty=9.0, no_repeat_ngram_size=1)
    try:
        assert [row.tolist() for row in write(model, tokens, end=0, longest=12).rows] == [r.tolist() for r in made.rows]
        assert model.generation_config is makers
        with generating(model, do_sample=False):
            assert model.generation_config.repetition_penalty != 9.0
    finally:
        model.generation_config = before


def test_agreement_is_exact_match_of_what_the_cut_model_would_write(model: Any) -> None:
    rng = np.random.default_rng(1)
    prompts = Tokens(tuple(rng.integers(4, 60, 9).astype(np.int32) for _ in range(40)))
    plans = [Plan(LAYERS), Plan(LAYERS, (6,)), Plan(LAYERS, (4,))]
    answers = write(model, prompts, end=0, longest=2)
    found = LossTable(model, answers, Agreement(answers), progress=False).losses(plans)
    wrong = np.rint(found.values * found.tokens)
    assert not wrong[0].any() and 0 < wrong[1:].mean() < 1, "the whole model repeats itself; the cuts do at times"
    for number, plan in enumerate(plans):
        again = write(pruned_view(model, plan), prompts, end=0, longest=2)
        same = [mine.tolist() == its.tolist() for mine, its in zip(answers.rows, again.rows)]
        assert [not value for value in wrong[number]] == same


def test_only_the_sure_first_lines_of_answers_count_and_each_counts_the_same(model: Any) -> None:
    class Letters:
        eos_token_id = 0

        @staticmethod
        def decode(token: int) -> str:
            return "\n" if token == 9 else "x"

    rows = [[5, 6, 7, 8, 9, 7], [5, 6, 9, 7], [5, 6, 7, 0], [5, 6, 7, 8, 7, 8, 7]]
    written = Tokens(tuple(np.array(row, np.int32) for row in rows), starts=(2, 2, 2, 2))
    lines = first_lines(written, Letters)
    assert [row.tolist() for row in lines.rows] == [rows[0][:4], rows[2][:3], rows[3]] and lines.starts == (2, 2, 2)
    with pytest.raises(DataError, match="sure of 1 of its 3 answers"):
        sure_ones(lines, np.array([0.6, 0.8, 9.0]))
    many = Tokens(tuple(row for row in lines.rows for _ in range(8)), starts=(2,) * 24)
    sure = sure_ones(many, np.array([0.1] * 12 + [0.7] * 12))
    assert sure.samples == 12 and sure.starts == (2,) * 12
    found = LossTable(model, sure, Lost(sure), progress=False).losses(PLANS)
    right = LossTable(model, sure, Agreement(sure), progress=False).losses(PLANS)
    assert found.mean() == pytest.approx((right.values * right.tokens).mean(1))


def test_prompts_are_first_lines_or_first_tokens() -> None:
    tokenizer = open_cut("demo").tokenizer()
    texts = [
        "Who has the lamp?\nTom has it.",
        "There was an old lamp in the hall, and Tom carried the lamp to the attic.",
    ]
    rows = tuple(np.array(tokenizer(text)["input_ids"], np.int32) for text in [*texts, "Tom."])
    found = prompts_of(Tokens(rows), tokenizer, seed=0, first=0, default="demo")
    assert tokenizer.decode(found.rows[0]) == "Who has the lamp?\n"
    assert found.samples == 2 and found.rows[1].tolist() == rows[1][:PROMPT].tolist()
    with pytest.raises(DataError, match="no sample can be a prompt"):
        prompts_of(Tokens(rows[2:]), tokenizer, seed=0, first=0, default="demo")


# --- right answers of tasks -------------------------------------------------------------------------------------------


def test_right_answers_are_those_of_the_training_split() -> None:
    """One test, since the harness takes seconds to read the index of its tasks."""
    from lmprune.evaluation.gold import gold_answers

    tokenizer = open_cut("demo").tokenizer()
    found = gold_answers("lmprune_demo_arithmetic", tokenizer, samples=6, max_length=256, seed=0)
    assert found.starts is not None and found.samples == 6
    tasks = Path(__file__).parent.parent / "tasks" / "demo" / "data"
    tested, trained = ((tasks / f"arithmetic{name}.jsonl").read_text() for name in ("", "_train"))
    for row, start in zip(found.rows, found.starts):
        question, answer = tokenizer.decode(row[:start]).strip(), tokenizer.decode(row[start:])
        assert question in trained and question not in tested
        assert answer.startswith(("M", "T", "W", "S", "F")) and "Answer: " in answer, "with the worked steps"
    facts = gold_answers("lmprune_demo_facts", tokenizer, samples=2, max_length=256, seed=0)
    assert facts.starts is not None and tokenizer.decode(facts.rows[0][: facts.starts[0]]).endswith("Answer:")
    for name, said in (
        ("lmprune_demo_loss", "no training or validation split"),
        ("lmprune_demo_fact", "did you mean 'lmprune_demo_facts'"),
    ):
        with pytest.raises(UsageError, match=said):
            gold_answers(name, tokenizer, samples=6, max_length=256, seed=0)
    with pytest.raises(DataError, match="no answer fits into 8 tokens"):
        gold_answers("lmprune_demo_arithmetic", tokenizer, samples=6, max_length=8, seed=0)


# --- races ------------------------------------------------------------------------------------------------------------


def test_a_race_keeps_its_promise() -> None:
    """Of 400 races between near-equal plans, at most 5 % drop the one that is best on all samples."""
    rng, lost, seen = np.random.default_rng(5), 0, []
    for _ in range(400):
        difficulty = rng.gamma(2.0, 1.0, 512)
        means = np.array([0.0, 0.02, 0.05, 0.1, 0.3, 0.6])
        values = difficulty + means[:, None] + rng.standard_t(4, (6, 512)) * 0.5
        alive, best = list(range(6)), int(values.mean(1).argmin())
        for look, samples in enumerate((32, 64, 96, 128, 160, 224, 288, 384), 1):
            out = Race(0.95).losers([values[alive, :samples]], [512], 6, look)
            alive = [plan for row, plan in enumerate(alive) if row not in out]
            seen.append(len(alive))
        lost += best not in alive
    assert lost <= 0.05 * 400
    assert np.mean(seen) < 5, "plans that are surely worse see less"


def test_a_race_that_has_seen_all_is_over() -> None:
    values = np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.1], [1.0, 2.0, 3.0]])
    assert set(Race().losers([values], [3], 3, 1)) == {1}


def measures(model: Any, rows: int, gold: Any = None) -> Measures:
    """On what the model itself writes, which its cuts lose; of random tokens a random model knows nothing."""
    rng = np.random.default_rng(2)
    prompts = Tokens(tuple(rng.integers(4, 60, 4).astype(np.int32) for _ in range(rows + 8)))
    made = Tokens(write(model, prompts, end=None, longest=8).rows)
    return Measures(model, None, (made.part(0, rows), made.part(rows)), gold)


def test_racing_finds_the_same_best_with_less(model: Any) -> None:
    plans = [Plan(LAYERS, (layer,)) for layer in range(LAYERS)]
    exact, raced = measures(model, 128), measures(model, 128)
    every, found = exact.losses("loss", plans).mean(), raced.ranked("loss", plans, Race().losers)
    assert found.argmin() == every.argmin() and raced.passes < 0.8 * exact.passes
    assert np.array_equal(exact.ranked("loss", plans, None), every)
    assert (found >= found.min()).all() and found.min() == pytest.approx(every.min(), abs=0.2)


def test_objectives_of_one_mix_race_together(model: Any, tokens: Tokens) -> None:
    answers = Tokens(tokens.rows, starts=tuple(max(1, len(row) - 3) for row in tokens.rows))
    mixed = measures(model, 64, lambda name, samples: answers)
    plans = [Plan(LAYERS, (layer,)) for layer in range(LAYERS)]
    every = mixed.losses("loss+task:any", plans).mean()
    assert mixed.ranked("loss+task:any", plans, Race().losers).argmin() == every.argmin()
    parts = [mixed.losses(name, plans).mean() for name in ("loss", "task:any")]
    assert every == pytest.approx((parts[0] + parts[1]) / 2)


# --- choosing by them -------------------------------------------------------------------------------------------------


SETTINGS = ProfileSettings(samples=12, max_length=112)


def test_each_criterion_has_an_objective_of_its_own() -> None:
    evidence = ModelEvidence(open_cut("demo"), SETTINGS)
    asked: list[str] = []
    evidence.by = lambda name, judging: asked.append(name) or evidence  # type: ignore[method-assign,func-returns-value]
    for name in ("greedy", "segment"):
        choose(evidence.cut, name, drop=1, evidence=evidence)
    assert asked == ["loss", "kl"]


@pytest.mark.slow
def test_the_objective_decides(tmp_path: Path) -> None:
    """By text alone another layer goes than by worked sums."""
    found = {
        name: choose("demo", "one-shot", drop=1, settings=SETTINGS, how=ChoiceSettings(objective=name)).plan.dropped
        for name in ("loss", "task:lmprune_demo_arithmetic")
    }
    assert found == {"loss": (7,), "task:lmprune_demo_arithmetic": (4,)}


def test_what_measures_no_loss_refuses_an_objective() -> None:
    with pytest.raises(
        UsageError, match="--objective kl: angular does not measure what a cut costs; these do: one-shot"
    ):
        choose("demo", "angular", drop=1, settings=SETTINGS, how=ChoiceSettings(objective="kl"))
    with pytest.raises(UsageError, match="does not diverge from itself"):
        choose("demo", "taylor", drop=1, settings=SETTINGS, how=ChoiceSettings(objective="kl+loss"))
    with pytest.raises(UsageError, match="it counts, so it has no gradient"):
        choose("demo", "taylor", drop=1, settings=SETTINGS, how=ChoiceSettings(objective="answers+loss"))


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_same_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(file: Path | None) -> Any:
        how = ChoiceSettings(objective="self")
        few = ProfileSettings(samples=4, max_length=48, batch_size=1)
        evidence = ModelEvidence(open_cut("demo"), few, DataSettings(), how=how, journal_file=file)
        try:
            return choose(evidence.cut, "greedy", drop=1, evidence=evidence)
        finally:
            kept.append(len(file.read_bytes()) if file else 0)
            evidence.close(done=bool(limit == 0))

    ran: list[int] = []
    kept: list[int] = []

    def counting(*args: Any, **how: Any) -> Any:
        ran.append(1)
        if len(ran) == limit:
            raise KeyboardInterrupt
        return run(*args, **how)

    monkeypatch.setattr("lmprune.forward.loss.run", counting)
    limit = 0
    whole = search(None)
    total, file = len(ran), tmp_path / "losses.partial"
    ran.clear()
    limit = total // 2
    with pytest.raises(KeyboardInterrupt):
        search(file)
    ran.clear()
    limit = 0
    assert search(file) == whole and 0 < len(ran) <= total - total // 2 + 1
    assert kept[2] > kept[1] > 0 and not file.exists()
