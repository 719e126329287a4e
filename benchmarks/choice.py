"""What the criteria and objectives choose, what that costs, and what choosing costs.

    python -m benchmarks.choice demo      facts, arithmetic and loss by objective and number of layers
    python -m benchmarks.choice oracle    greedy and best against the exhaustive search
    python -m benchmarks.choice cost      one-shot, blocks and greedy against naive loops, on a random model
    python -m benchmarks.choice passes    layers that greedy runs, by how many states stay, over random orders
    python -m benchmarks.choice abreast   one-shot with several cuts in one pass, by samples in a batch
    python -m benchmarks.choice skipped   a recipe of sublayers in lmprune's loader, and the checkpoint with zeros

Run it with OMP_NUM_THREADS=1 for one thread. Loss is nats a token on text that nothing was chosen on. Facts are the
demo task's shares of questions whose right answer is the likeliest of four; arithmetic is the share of its problems
whose worked solution is right to the last token, teacher-forced. Time is that of the processor.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmprune.choosing import ModelEvidence, choose, write_recipe
from lmprune.criteria.settings import ChoiceSettings
from lmprune.cuts.plan import Plan, spell
from lmprune.cuts.sublayers import Sublayers
from lmprune.forward.batches import Batch, batches_of
from lmprune.forward.calls import run_decoder
from lmprune.forward.loss import CHUNK, LossTable
from lmprune.forward.measures import Measures
from lmprune.forward.objectives.loss import summed
from lmprune.forward.objectives.written import Agreement, write
from lmprune.forward.run import run
from lmprune.forward.tree import passes, paths_of, walk, worth_keeping
from lmprune.forward.views import Views
from lmprune.models.cut import open_cut
from lmprune.models.stack import find_stack
from lmprune.profiling.sequential import Race
from lmprune.profiling.settings import ProfileSettings
from lmprune.quiet import quiet_bars, quiet_hosts
from lmprune.text import world
from lmprune.text.sources import DataSettings
from lmprune.text.tokens import Tokens
from lmprune.writing.pruning import prune

OBJECTIVES = ("loss", "kl", "self", "loss+self", "task:lmprune_demo_arithmetic", "loss+task:lmprune_demo_arithmetic")
SEED = "tasks"
"""Of the demo tasks' test split."""


# --- the demo ---------------------------------------------------------------------------------------------------------


class Tested:
    """Facts and arithmetic of the demo tasks, by teacher forcing."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        questions = list(world.questions(SEED))
        problems = list(itertools.islice(world.problems(SEED), 200))
        facts = [(world.question_prompt(q.text), f" {a}") for q in questions for a in (q.answer, *q.wrong)]
        self._facts = LossTable(model, _pairs(tokenizer, facts))
        worked = _pairs(tokenizer, [(world.problem_prompt(item), item.solution) for item in problems])
        self._worked = LossTable(model, worked, Agreement(worked))

    def shares(self, plans: Sequence[Plan]) -> list[tuple[float, float]]:
        """Facts and arithmetic of each plan, in per cent."""
        facts, worked = self._facts.losses(plans), self._worked.losses(plans)
        best = (facts.values * facts.tokens).reshape(len(plans), -1, 4).argmin(-1)
        right = 1 - (worked.values * worked.tokens).mean(1)
        return [(100 * float((b == 0).mean()), 100 * float(r)) for b, r in zip(best, right)]


def _pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Tokens:
    rows, starts = [], []
    for prompt, answer in pairs:
        first = tokenizer(prompt)["input_ids"]
        rows.append(np.array(tokenizer(prompt + answer)["input_ids"], np.int32))
        starts.append(len(first))
    return Tokens(tuple(rows), starts=tuple(starts))


def demo(samples: int, max_length: int) -> None:
    """Print what each objective keeps."""
    evidence = ModelEvidence(open_cut("demo"), ProfileSettings(samples=samples, max_length=max_length), DataSettings())
    evidence.prepare()
    tested = Tested(evidence._lab.model, evidence.cut.tokenizer())
    rows: list[tuple[str, Plan]] = [("whole", Plan(12))]
    for count in (1, 2, 3):
        rows.append(("angular", choose(evidence.cut, "angular", drop=count, evidence=evidence).plan))
        for name, objective in (*(("greedy", objective) for objective in OBJECTIVES), ("best", "loss+self")):
            asking = evidence.by(objective)
            asking.how = ChoiceSettings(objective=objective)
            rows.append((f"{name}, {objective}", choose(evidence.cut, name, drop=count, evidence=asking).plan))
    rows += [("all there are", Plan(12, (layer,))) for layer in range(12)]
    plans = list(dict.fromkeys(plan for _, plan in rows))
    shares, loss = dict(zip(plans, tested.shares(plans))), dict(zip(plans, evidence.by("loss").judged(plans).mean()))
    whole = loss[Plan(12)]
    print("| layers | found by | gone | loss rises by | facts % | arithmetic % |\n|---|---|---|---|---|---|")
    for found_by, plan in rows:
        facts, worked = shares[plan]
        rise = f"{loss[plan] - whole:.4f}"
        gone = spell(plan.dropped)
        print(f"| {len(plan.dropped)} | {found_by} | {gone} | {rise} | {facts:.1f} | {worked:.1f} |", flush=True)


def oracle(samples: int, max_length: int) -> None:
    """Print how near to the exhaustive search greedy and best come, on text that nothing was chosen on."""
    evidence = ModelEvidence(open_cut("demo"), ProfileSettings(samples=samples, max_length=max_length), DataSettings())
    head = ("layers", "objective", "oracle", "greedy", "best", "oracle rises by", "greedy", "best")
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for objective, count in itertools.product(("loss", "loss+self"), (3, 1, 2, 4)):
        asking = evidence.by(objective)
        asking.how = ChoiceSettings(objective=objective)
        chosen = [choose(evidence.cut, name, drop=count, evidence=asking).plan for name in ("oracle", "greedy", "best")]
        found = asking.judged([Plan(12), *chosen]).mean()
        rises = found[1:] - found[0]
        ratios = " | ".join(f"{rise / rises[0]:.3f}x" for rise in rises[1:])
        gone = " | ".join(spell(plan.dropped) for plan in chosen)
        print(f"| {count} | {objective} | {gone} | {rises[0]:.4f} | {ratios} |", flush=True)


# --- what choosing costs ----------------------------------------------------------------------------------------------


def cost(layers: int, width: int, samples: int, length: int, gone: int, *, greedy: bool) -> None:
    """Print processor time of our searches over naive loops that leave the layers out of the list."""
    model = _random_llama(layers, width)
    prompts = np.random.default_rng(0).integers(3, 1000, (samples + 8, 4)).astype(np.int32)
    # The model's own words, since of random ones a random model knows nothing that a cut could lose.
    text = Tokens(write(model, Tokens(tuple(prompts)), end=None, longest=length - 4).rows)
    plans = [Plan(layers, (layer,)) for layer in range(layers)]
    blocks = [Plan(layers, tuple(range(at, at + gone))) for at in range(layers - gone + 1)]
    print(f"{layers} layers of width {width}, {samples} samples of {length} tokens, {gone} layers to drop\n")
    print("| search | ours (s) | naive loop (s) | ratio | passes | ratio | same choice | gone |\n" + "|---" * 8 + "|")

    def fresh() -> Measures:
        return Measures(model, None, (text.part(0, samples), text.part(samples)), lambda name, count: text)

    def loop(asked: Sequence[Plan]) -> Any:
        return np.array([_naive(model, text.part(0, samples), plan) for plan in asked])

    for name, asked in (("one-shot", plans), (f"all blocks of {gone}", blocks)):
        measures = fresh()
        found, ours = _timed(partial(measures.losses, "loss", asked))
        naive, theirs = _timed(partial(loop, asked))
        same = np.array_equal(found.mean().argsort(), naive.argsort())
        alone = sum(len(plan.kept) for plan in asked) / layers
        _row(name, ours, theirs, measures.passes, alone, f"{same} |")
    if not greedy:
        return
    theirs_path, theirs = _timed(partial(_greedy, gone, layers, loop))
    for name, losers in (("greedy", None), ("greedy, racing", Race().losers)):
        measures = fresh()
        path, ours = _timed(partial(_greedy, gone, layers, partial(measures.ranked, "loss", losers=losers)))
        alone = sum(left * (left - 1) for left in range(layers, layers - gone, -1)) / layers
        order = ", ".join(map(str, path))
        _row(name, ours, theirs, measures.passes, alone, f"{path == theirs_path} | {order}")


def _row(name: str, ours: float, theirs: float, passes: float, alone: float, rest: str) -> None:
    times = f"{ours:.1f} | {theirs:.1f} | {ours / theirs:.3f}"
    print(f"| {name} | {times} | {passes:.1f} | {passes / alone:.2f} | {rest} |", flush=True)


def _greedy(count: int, layers: int, losses: Callable[[list[Plan]], Any]) -> list[int]:
    path: list[int] = []
    for _ in range(count):
        left = [layer for layer in range(layers) if layer not in path]
        path.append(left[int(losses([Plan(layers, (*path, layer)) for layer in left]).argmin())])
    return path


@torch.no_grad()
def _naive(model: Any, text: Tokens, plan: Plan) -> float:
    """SLEB's way: the blocks that are turned off are not in the list, and every candidate sees all of the text."""
    stack = find_stack(model)
    setattr(stack.owner, stack.name, torch.nn.ModuleList([stack.layers[layer] for layer in plan.kept]))
    count, model.config.num_hidden_layers = model.config.num_hidden_layers, len(plan.kept)
    try:
        total = 0.0
        for samples in batches_of([len(row) for row in text.rows], 8, CHUNK):
            batch = Batch.of([text.rows[sample] for sample in samples], torch.device("cpu"))
            total += float(summed(run_decoder(model, batch).logits, batch.ids, batch.mask).sum())
        return total / int(text.predicted.sum())
    finally:
        setattr(stack.owner, stack.name, stack.layers)
        model.config.num_hidden_layers = count


def count_passes(orders: int, seed: int) -> None:
    """Print how many layers greedy runs, in those of SLEB's loop: means over random orders in which layers go."""
    print("| layers | gone | states of a batch that stay | mean | at most |\n" + "|---" * 5 + "|")
    for layers, gone in ((12, 3), (24, 6), (32, 8)):
        for room in (0, 16, 64, layers**2):
            rng = np.random.default_rng(seed)
            found = [_share(layers, rng.permutation(layers)[:gone].tolist(), room) for _ in range(orders)]
            said = room if room < layers**2 else "all"
            print(f"| {layers} | {gone} | {said} | {np.mean(found):.3f} | {max(found):.3f} |", flush=True)


def _share(layers: int, order: Sequence[int], room: int) -> float:
    """Of the layers that separate passes run, those that greedy's walks run when layers go in that ``order``."""
    kept, ran, naive = frozenset[tuple[int, ...]](), 0, 0
    for step in range(len(order)):
        gone = order[:step]
        paths = paths_of({str(n): Plan(layers, (*gone, n)) for n in range(layers) if n not in gone})
        known = {name: next((d for d in range(len(p), 0, -1) if p[:d] in kept), 0) for name, p in paths.items()}
        turns = walk(paths, None, known)
        ran, naive = ran + passes(turns)[0], naive + passes(turns)[1]
        made = {turn.path[:depth] for turn in turns for depth in range(turn.start + 1, len(turn.path) + 1)}
        kept = worth_keeping(walk(paths), room) & (kept | made)
    return ran / naive


def abreast(layers: int, width: int, length: int, turns: int) -> None:
    """Print the processor time of one-shot with several cuts in one pass, in that of cuts one by one."""
    model = _random_llama(layers, width)
    plans = {str(layer): Plan(layers, (layer,)) for layer in range(layers)}
    print(f"{layers} layers of width {width}, batches of samples of {length} tokens; least of {turns} turns each\n")
    print("| samples | cuts in one pass | seconds | in those of one by one |\n" + "|---" * 4 + "|")
    for samples in (1, 2, 8):
        rows = list(np.random.default_rng(0).integers(3, 1000, (samples, length)).astype(np.int32))
        ways = {way: Views(model, plans, abreast=way) for way in (1, 4, layers)}
        seconds: dict[int, list[float]] = {way: [] for way in ways}
        for turn, (way, views) in itertools.product(range(turns + 1), ways.items()):
            _, took = _timed(partial(run, views, rows, [range(samples)], lambda *_: None))
            if turn:  # the first builds and proves
                seconds[way].append(took)
        least = {way: min(found) for way, found in seconds.items()}
        for way in ways:
            print(f"| {samples} | {way} | {least[way]:.2f} | {least[way] / least[1]:.2f} |", flush=True)


def _random_llama(layers: int, width: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, initializer_range=0.2 * (64 / width) ** 0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def skipped(layers: int, width: int, turns: int) -> None:
    """Print the speed of a recipe without a third of the attentions and MLPs, and of the checkpoint with zeros."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    third = layers // 3
    plan = Plan(layers, (), (Sublayers(tuple(range(2, 2 + third)), tuple(range(third, 2 * third))),))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "whole")
        write_recipe(folder / "whole", plan, folder / "r.yml")
        prune(folder / "r.yml", folder / "zeros", writer="mergekit")
        ways = {
            "whole": open_cut(folder / "whole").load(dtype="float32"),
            "recipe, by lmprune's loader: skipped": open_cut(folder / "r.yml").load(dtype="float32"),
            "checkpoint that mergekit wrote: zeros": open_cut(folder / "zeros").load(dtype="float32"),
        }
        sizes = {"whole": "whole", "checkpoint that mergekit wrote: zeros": "zeros"}
        written = {
            name: sum(f.stat().st_size for f in (folder / at).glob("*.safetensors")) for name, at in sizes.items()
        }
    ids = torch.randint(3, 1000, (4, 128), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    with torch.no_grad():
        for _, (name, model) in itertools.product(range(turns + 1), ways.items()):
            output, took = _timed(lambda model=model: model(input_ids=ids, use_cache=False).logits)
            seconds[name].append(took)
            outputs[name] = output
    assert torch.equal(*list(outputs.values())[1:]), "they say the same"
    print("| model | processor time of a pass (s) | times as fast | MB |\n|---|---|---|---|")
    best = {name: min(found[1:]) for name, found in seconds.items()}
    for name, took in best.items():
        size = f"{written[name] / 1e6:.0f}" if name in written else "that of the whole"
        print(f"| {name} | {took:.3f} | {best['whole'] / took:.2f} | {size} |")


def naive_greedy(model: Any, text: Tokens, count: int) -> list[int]:
    """SLEB's loop: the layers in the order in which they go."""

    def loop(asked: Sequence[Plan]) -> Any:
        return np.array([_naive(model, text, plan) for plan in asked])

    return _greedy(count, len(find_stack(model).layers), loop)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    since = time.process_time()
    found = work()
    return found, time.process_time() - since


def main() -> None:
    """Measure and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "oracle", "cost", "passes", "abreast", "skipped"))
    parser.add_argument("--drop", type=int)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--no-greedy", action="store_true")
    parser.add_argument("--max-length", type=int)
    options = parser.parse_args()
    quiet_hosts(), quiet_bars()
    if options.what in ("demo", "oracle"):
        measure = demo if options.what == "demo" else oracle
        measure(options.samples or 128, options.max_length or 128)
    elif options.what == "passes":
        count_passes(options.samples or 50, 0)
    elif options.what == "abreast":
        abreast(options.layers, options.width, options.max_length or 64, options.turns)
    elif options.what == "skipped":
        skipped(options.layers, options.width, options.turns)
    else:
        cost(
            options.layers,
            options.width,
            options.samples or 128,
            options.max_length or 64,
            options.drop or 6,
            greedy=not options.no_greedy,
        )


if __name__ == "__main__":
    main()
