"""Points for several machines: as commands to print, or as processes of Accelerate, one for each GPU."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from lmprune.errors import HostError, UsageError
from lmprune.sweeping.points import Point
from lmprune.sweeping.settings import SweepSettings
from lmprune.text.sources import DataSettings

_NOT_PASSED = ("launcher", "processes", "points", "bench", "agree")


def shares(points: Sequence[Point], processes: int) -> list[list[Point]]:
    """``points`` in as many parts: cuts of one criterion stay together, since they have layers in common.

    A repaired or healed point goes with its cut, where that is among them.
    """
    names = {p.name for p in points}
    made = [p for p in points if p.made and p.unhealed in names]
    cuts = sorted((p for p in points if p not in made), key=lambda p: (p.criterion or "", p.n))
    size = -(-len(cuts) // min(processes, len(cuts)))
    parts = [cuts[first : first + size] for first in range(0, len(cuts), size)]
    return [[*part, *(p for p in made if p.unhealed in {cut.name for cut in part})] for part in parts]


def arguments(model: str, out: Path, settings: SweepSettings, data: DataSettings, points: Sequence[Point]) -> list[str]:
    """The command line of the sweep of ``points`` alone, after ``lmprune``."""
    words = ["sweep", model, "-o", str(out), "--points", ",".join(point.name for point in points)]
    for bundle in (settings, data):
        for field in fields(bundle):
            value = getattr(bundle, field.name)
            if field.name in _NOT_PASSED or value == field.default:
                continue
            flag = field.metadata.get("flag") or f"--{field.name.replace('_', '-')}"
            words += [flag.split("/")[0 if value else 1]] if isinstance(value, bool) else [flag, str(value)]
    return words


def shell_lines(lines: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The commands as a person pastes them."""
    return tuple(shlex.join(["lmprune", *words]) for words in lines)


def gpus() -> int:
    """Number of GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def run_all(lines: Sequence[Sequence[str]]) -> None:
    """Run the commands side by side by Accelerate, each on a GPU of its own, or on the CPU where there is none.

    Raises:
        UsageError: more processes than GPUs.
        HostError: one of them failed; the others run to their end, and their results stay.
    """
    count = gpus()
    if count and len(lines) > count:
        raise UsageError(f"--processes {len(lines)}: torch sees {count} GPUs here. Give at most {count}")
    running = []
    for number, words in enumerate(lines):
        place = ["--gpu_ids", str(number)] if count else ["--cpu"]
        # A port of 0 lets every launch find its own.
        launch = [
            "-m",
            "accelerate.commands.launch",
            "--num_processes",
            "1",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
        ]
        launch += ["--dynamo_backend", "no", "--main_process_port", "0", *place]
        running.append(subprocess.Popen([sys.executable, *launch, "-m", "lmprune", *words], stdout=sys.stderr))
    codes = [process.wait() for process in running]
    if any(codes):
        number = next(i for i, code in enumerate(codes) if code)
        raise HostError(
            f"process {number} of {len(lines)} ended with code {codes[number]}; what it said stands above. "
            "Run the same command again to go on"
        )
