"""Healing, measured: all methods on the demo model; the speed of a step against a bare script; what a teacher costs.

    python -m benchmarks.heal methods --recipe demo.yml --out heal.jsonl     every method, several seeds
    python -m benchmarks.heal first --out first.jsonl                        a repair first, or training alone
    python -m benchmarks.heal speed                                          tokens a second, and distillation's floor
    python -m benchmarks.heal memory                                         peak memory of a step
    python -m benchmarks.heal types --model demo                             a step in bfloat16 over one in float32

Times are processor seconds of one thread (run with OMP_NUM_THREADS=1), so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import tables
from lmprune.healing.presets import TAUGHT

METHODS: dict[str, dict[str, object]] = {
    "lora, FFN": {"method": "lora"},
    "lora, all projections": {"method": "lora", "targets": "all"},
    "qlora nf4, FFN": {"method": "qlora"},
    "last 3 layers and lm_head": {"method": "last-layers", "head": "train"},
    "junction": {"method": "junction"},
    "full": {"method": "full"},
    "lora + distill": {"method": "lora+distill"},
    "full + distill": {"method": "full+distill"},
}
FIRST: dict[str, tuple[dict[str, object], int]] = {
    "full": ({"method": "full"}, 54),
    "refit, then full": ({"method": "refit+full", "fit_blocks": 64}, 46),
    "lora, all projections": ({"method": "lora", "targets": "all"}, 36),
    "refit, then lora, all projections": ({"method": "refit+lora", "targets": "all", "fit_blocks": 64}, 25),
    "the same by steps of 8 blocks": (
        {"method": "refit+lora", "targets": "all", "fit_blocks": 64, "batch_size": 8},
        62,
    ),
    "full, taught": ({"method": "full+distill", **TAUGHT}, 155),
    "refit, then full, taught": ({"method": "refit+full+distill", "fit_blocks": 64, **TAUGHT}, 105),
    "refit, then lora, all projections, taught": (
        {"method": "refit+lora+distill", "targets": "all", "fit_blocks": 64, **TAUGHT},
        82,
    ),
    "refit alone, on 256 blocks": ({"method": "refit", "fit_blocks": 256}, 0),
}
"""Each with the steps that come to about the same processor time of the whole command."""
FIRST_COLUMNS = {
    "cut": ["gone", ""],
    "method": ["method", ""],
    "steps": ["steps", "d"],
    "cpu": ["processor s", ".0f"],
    "healed": ["held-out loss", ".4f"],
    "gap_closed": ["gap closed", ".1%"],
    "facts": ["facts", ".1%"],
    "arithmetic": ["arithmetic", ".1%"],
}
TASKS = ("lmprune_demo_facts", "lmprune_demo_arithmetic")
_FEW = 4
"""Steps of a run that costs next to nothing but what every run costs: loading, evaluating, merging, proving."""


# --- every method ---------------------------------------------------------------------------------------------------


def heal_once(
    recipe: Path, name: str, steps: int, seed: int, *, score: bool, how: dict[str, object] | None = None
) -> dict[str, Any]:
    """One healing run on the demo world's text; with ``score``, the healed model's tasks as well."""
    from lmprune.evaluation.harness import evaluate
    from lmprune.healing import HealSettings, heal
    from lmprune.text.sources import DataSettings

    with tempfile.TemporaryDirectory() as scratch:
        given: dict[str, Any] = {**(how or METHODS[name]), "seed": seed}
        given |= {"steps": steps, "eval_every": max(1, steps // 4)} if steps else {}
        began = time.process_time()
        done = heal(recipe, Path(scratch) / "out", HealSettings(**given), DataSettings(data="demo"))
        row: dict[str, Any] = {
            "method": name,
            "seed": seed,
            "steps": steps,
            "cpu": time.process_time() - began,
            "original": done.original,
            "pruned": done.pruned,
            "healed": done.healed,
            "gap_closed": done.gap_closed,
            "trained": done.trained_parameters,
        }
        if score:
            row |= scores(evaluate({"pretrained": str(done.path)}, TASKS, batch_size=50))
    return row


def scores(results: dict[str, Any]) -> dict[str, float]:
    """Accuracies of both tasks."""
    found = results["results"]
    return {
        "facts": found["lmprune_demo_facts"]["acc,none"],
        "arithmetic": found["lmprune_demo_arithmetic"]["exact_match,answer"],
    }


def methods(args: argparse.Namespace) -> None:
    """Each method at equal steps and at equal processor time, for each seed; goes on where it was interrupted."""
    rows = _read(args.out)

    def once(name: str, kind: str, steps: int, seed: int) -> dict[str, Any]:
        known = next((r for r in rows if (r["method"], r["kind"], r["seed"]) == (name, kind, seed)), None)
        if known is None:
            known = heal_once(args.recipe, name, steps, seed, score=kind == "equal time") | {"kind": kind}
            rows.append(known)
            _add(args.out, known)
        return known

    for seed in args.seeds:
        for name in METHODS:
            start = once(name, "start", _FEW, 0)
            long = once(name, "equal steps", args.steps, seed)
            each = (long["cpu"] - start["cpu"]) / (args.steps - _FEW)
            once(name, "equal time", max(1, round(args.seconds / each)), seed)
            print(table(rows), flush=True)


def first(args: argparse.Namespace) -> None:
    """Training alone beside a repair and fewer steps, in about equal time of the whole command."""
    import lmprune
    from lmprune.cuts.plan import parse_layers

    rows = _read(args.out)
    with tempfile.TemporaryDirectory() as scratch:
        for layers in args.layers:
            recipe = Path(scratch) / f"{layers}.yml"
            lmprune.write_recipe("demo", lmprune.Plan(12, parse_layers(layers)), recipe)
            for name, (how, steps) in FIRST.items():
                if not any((row["cut"], row["method"]) == (layers, name) for row in rows):
                    rows.append(heal_once(recipe, name, steps, 0, score=True, how=how) | {"cut": layers})
                    _add(args.out, rows[-1])
                    print(rows[-1], flush=True)
    command = f"python -m benchmarks.heal first --layers {' '.join(args.layers)} --out {args.out.name}"
    rows = [
        row for layers in args.layers for name in FIRST for row in rows if (row["cut"], row["method"]) == (layers, name)
    ]
    tables.write(
        "heal-first", rows, FIRST_COLUMNS, command=command, note=f"The whole model's loss is {rows[0]['original']:.4f}."
    )


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _add(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds, and the spread (largest minus smallest)."""
    lines = [
        "| method | trains | at equal | steps | processor s | held-out loss | gap closed | spread | facts | sums |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"].startswith("equal"):
            groups.setdefault((row["kind"], row["method"]), []).append(row)
    for (kind, name), found in sorted(groups.items(), key=lambda item: item[0][0]):
        gaps = [row["gap_closed"] for row in found]

        def share(key: str, found: list[dict[str, Any]] = found) -> str:
            return f"{statistics.mean(row[key] for row in found):.1%}" if key in found[0] else ""

        lines.append(
            f"| {name} | {found[0]['trained']:,} | {kind.removeprefix('equal ')} | {found[0]['steps']} "
            f"| {statistics.mean(row['cpu'] for row in found):.0f} "
            f"| {statistics.mean(row['healed'] for row in found):.4f} "
            f"| {statistics.mean(gaps):.1%} | {max(gaps) - min(gaps):.1%} | {share('facts')} | {share('arithmetic')} |"
        )
    return "\n".join(lines)


# --- the speed of a step --------------------------------------------------------------------------------------------


def settled(**given: Any) -> Any:
    """Settings of the `quick` preset on the demo model, three of its twelve layers cut."""
    from lmprune.healing.presets import Facts, resolve
    from lmprune.healing.settings import HealSettings

    return resolve(HealSettings(**given), Facts("llama", 128, 2048, 12, 0.25))[0]


def speed(args: argparse.Namespace) -> None:
    """Tokens a second of our Trainer over a bare one, and a distilling step over what its layer passes cost."""
    from lmprune.cuts.plan import Plan
    from lmprune.models.loading import load_model
    from lmprune.models.locate import demo_folder

    plan = Plan(12, (2, 3, 4))

    def load(cut: Plan | None = plan) -> Any:
        model = load_model(demo_folder(), plan=cut, dtype="float32")
        model.config.use_cache = False
        return model

    words = load().config.vocab_size
    _against_bare(load, words, args)
    _against_floor(load, plan, words, args)


def _against_bare(load: Callable[..., Any], words: int, args: argparse.Namespace) -> None:
    import numpy as np
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    from lmprune.healing import training
    from lmprune.healing.student import prepare

    settings = settled(method="lora", steps=args.steps, eval_every=args.steps + 1).way
    blocks = np.random.default_rng(0).integers(2, words, (256, settings.max_length), dtype=np.int32)

    def ours(folder: str) -> Trainer:
        model, _ = prepare(load(), settings, None, 0)
        micro, accumulate = training.micro_batch(settings, None, 1)
        how = training.arguments(
            settings, Path(folder), seed=0, micro=micro, accumulate=accumulate, cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", first_run=False,
        )  # fmt: skip
        data = training.BlockData(blocks, settings.steps * settings.batch_size, seed=0)
        return training.HealTrainer(
            teacher=None, model=model, args=how, train_dataset=data, eval_dataset=training.BlockData(blocks[:4])
        )

    def bare(folder: str) -> Trainer:
        projections = ["gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=projections, task_type="CAUSAL_LM")
        how = TrainingArguments(
            folder, max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.lr,
            lr_scheduler_type="cosine", warmup_steps=settings.warmup, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in blocks]
        return Trainer(model=get_peft_model(load(), lora), args=how, train_dataset=rows)

    seconds: dict[Any, list[float]] = {ours: [], bare: []}
    for turn in range(args.turns):
        for make in (ours, bare) if turn % 2 else (bare, ours):
            with tempfile.TemporaryDirectory() as folder:
                trainer = make(folder)
                began = time.process_time()
                trainer.train()
                seconds[make].append(time.process_time() - began)
    tokens = settings.steps * settings.batch_size * settings.max_length
    speeds = {make: tokens / min(found) for make, found in seconds.items()}
    middle = statistics.median(seconds[bare]) / statistics.median(seconds[ours])
    print(
        f"lora, tokens a second: bare Trainer+PEFT script {speeds[bare]:,.0f}, ours {speeds[ours]:,.0f}, ratio "
        f"{speeds[ours] / speeds[bare]:.3f} (of medians {middle:.3f}); fastest of {args.turns} turns of {args.steps} "
        "steps and the checkpoint at their end, which only ours writes",
        flush=True,
    )


def _against_floor(load: Callable[..., Any], plan: Any, words: int, args: argparse.Namespace) -> None:
    """Floor: the student's step alone, and the teacher's forward pass, less the layers that both share."""
    import torch

    from lmprune.healing.student import prepare
    from lmprune.healing.teacher import Teacher

    torch.manual_seed(0)
    ids = torch.randint(2, words, (args.batch_size, 256))
    whole = load(None)

    def stepper(method: str) -> tuple[Callable[[], Any], Teacher | None]:
        settings = settled(method=method)
        model = load(None) if settings.lesson else load()
        teacher = settings.lesson.take_apart(model, plan) if settings.lesson else None
        student, _ = prepare(model, settings.way, plan, 0)
        if teacher is not None:
            teacher.freeze_twins(student, adapter=settings.way.adapter)
        student.train()
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5)

        def step() -> None:
            loss = teacher.loss(student, ids) if teacher else student(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step, teacher

    @torch.no_grad()
    def taught() -> Any:
        return whole(input_ids=ids, use_cache=False).logits

    for method in ("lora", "junction"):
        plain, _ = stepper(method)
        distill, teacher = stepper(f"{method}+distill")
        assert teacher is not None
        shared = teacher.shared_layers
        prefix = _prefix(load(), ids, shared)
        found: dict[Callable[[], Any], list[float]] = {plain: [], taught: [], prefix: [], distill: []}
        for turn in range(args.turns + 1):
            for work, seconds in found.items():
                one = _seconds(work)
                if turn:  # the first warms up
                    seconds.append(one)

        def ratios(of: Callable[[list[float]], float], found: Any = found) -> tuple[float, float]:
            alone, forward, below, both = (of(seconds) for seconds in found.values())
            return both / (alone + forward - below), both / alone

        floor, alone = ratios(min)
        middle, _ = ratios(statistics.median)
        forwards, backward = teacher.passes()
        print(
            f"{method}+distill: {forwards} teacher layers forward, {backward} student layers forward and back, "
            f"{shared} shared; {floor:.3f} of the floor (of medians {middle:.3f}), {alone:.2f} of {method} alone; "
            f"fastest of {args.turns} turns of {args.batch_size} blocks of 256 tokens",
            flush=True,
        )


def _prefix(model: Any, ids: Any, layers: int) -> Callable[[], Any]:
    """The student's forward pass up to the layer from which the models differ, which distillation does not repeat."""
    import torch

    decoder = model.model
    decoder.layers = decoder.layers[:layers]

    @torch.no_grad()
    def work() -> Any:
        return decoder(input_ids=ids, use_cache=False) if layers else None

    return work


def _seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


# --- memory ---------------------------------------------------------------------------------------------------------


def memory(args: argparse.Namespace) -> None:
    """Peak of a few steps in fresh processes: LoRA on the whole model, on the cut one, and with the teacher."""
    with tempfile.TemporaryDirectory() as scratch:
        _child("make", scratch)
        peaks = {what: float(_child(what, scratch)) for what in ("lora, whole", "lora, cut", "lora+distill, cut")}
    for what, peak in peaks.items():
        print(f"{what}: {peak:.0f} MB, {peak / peaks['lora, whole']:.3f} of LoRA on the whole model")


def _child(what: str, folder: str) -> str:
    command = [sys.executable, "-m", "benchmarks.heal", "memory", "--child", what, "--folder", folder]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout


def _memory_child(what: str, folder: Path) -> None:
    """Peak above the memory after all imports, in MB, of three steps on 2 blocks of 128 tokens."""
    import torch
    import transformers

    from lmprune.cuts.plan import Plan
    from lmprune.healing import run  # noqa: F401  every import before the start is measured
    from lmprune.healing.student import prepare
    from lmprune.models.loading import load_model

    if what == "make":
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16,
            num_attention_heads=16, num_key_value_heads=4,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        return
    plan = Plan(16, (9, 10, 11, 12))
    settings = settled(method=what.partition(",")[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cut = what.endswith("cut")
    model: Any = load_model(folder, plan=plan if cut and not settings.lesson else None)
    teacher = settings.lesson.take_apart(model, plan) if settings.lesson else None
    student, _ = prepare(model, settings.way, plan if cut else None, 0)
    if teacher is not None:
        teacher.freeze_twins(student, adapter=settings.way.adapter)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(2, 8000, (2, 128))
    for _ in range(3):
        loss = teacher.loss(student, ids) if teacher else student(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


# --- types ----------------------------------------------------------------------------------------------------------


def types(args: argparse.Namespace) -> None:
    """How many times as fast a pass forward and back is in bfloat16, by method; types in turns."""
    import torch

    from lmprune.forward.machine import multiplies
    from lmprune.healing.student import prepare
    from lmprune.models.loading import load_model
    from lmprune.models.locate import locate

    folder = locate(args.model).path
    for method in ("lora", "full"):
        works: dict[str, Callable[[], None]] = {}
        for name in ("float32", "bfloat16"):
            model: Any = load_model(folder, dtype=name)
            student, _ = prepare(model, settled(method=method).way, None, 0)
            student.train()
            ids = torch.randint(2, model.config.get_text_config().vocab_size, (args.batch_size, 256))

            def step(student: Any = student, ids: Any = ids, name: str = name) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
                    loss = student(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                student.zero_grad()

            works[name] = step
        seconds = {name: [_seconds(step) for step in [work] * (args.turns + 1)][1:] for name, work in works.items()}
        low, middle = (of(seconds["float32"]) / of(seconds["bfloat16"]) for of in (min, statistics.median))
        print(
            f"{method} on {args.model}: {low:.2f} times as fast in bfloat16 (of medians {middle:.2f}); fastest of "
            f"{args.turns} passes of {args.batch_size} blocks of 256 tokens; instructions: "
            f"{multiplies(torch.bfloat16)}",
            flush=True,
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("methods")
    command.add_argument("--recipe", type=Path, required=True, help="made by: lmprune recipe demo --drop 3 -o demo.yml")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--steps", type=int, default=100)
    command.add_argument("--seconds", type=float, default=100, help="processor seconds of training, at equal time")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command.set_defaults(work=methods)
    command = commands.add_parser("first")
    command.add_argument("--layers", nargs="+", default=["2-4", "4,6,7"])
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(work=first)
    command = commands.add_parser("speed")
    command.add_argument("--steps", type=int, default=10)
    command.add_argument("--batch-size", type=int, default=4)
    command.add_argument("--turns", type=int, default=8)
    command.set_defaults(work=speed)
    command = commands.add_parser("memory")
    command.add_argument("--child")
    command.add_argument("--folder", type=Path)
    command.set_defaults(work=memory)
    command = commands.add_parser("types")
    command.add_argument("--model", default="demo")
    command.add_argument("--batch-size", type=int, default=4)
    command.add_argument("--turns", type=int, default=5)
    command.set_defaults(work=types)
    args = parser.parse_args()
    if getattr(args, "child", None):
        return _memory_child(args.child, args.folder)
    from lmprune.quiet import quiet_bars, quiet_hosts

    quiet_hosts()
    quiet_bars()
    args.work(args)


if __name__ == "__main__":
    main()
