"""What a search under a budget holds in memory: with the model and its trials there, and with their weights in files.

    OMP_NUM_THREADS=1 python -m benchmarks.narrow [--depth 8] [--width 512] [--inner 768] [--vocabulary 8192]

A random Llama, cut to 85 % by neurons and hidden size, refitted. Each way is a process of its own, which has searched a
smaller model before; the peak is of what it holds for itself (RssAnon, looked at every 5 ms), above where it started,
so that pages of files, which the system may let go of, are not in it. The last way runs under a cap on what its data
may grow by (RLIMIT_DATA), the size of the model's weights, which then take none of it. All three must choose the same,
or it fails.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAYS = {"memory": "in memory", "files": "`--stream`", "capped": "`--stream`"}


def _holds() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@contextmanager
def _watched(peak: list[int]) -> Iterator[None]:
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], _holds())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


def weighed(folder: Path, way: str, cap: int) -> None:
    """One search in this process: its peak above where it started, in bytes, its seconds, and what it chose."""
    from lmprune.budgeting.budget import BudgetSettings
    from lmprune.budgeting.run import choose_by_budget
    from lmprune.choosing import ModelEvidence
    from lmprune.criteria.settings import ChoiceSettings
    from lmprune.forward.machine import release
    from lmprune.models.cut import open_cut
    from lmprune.profiling import ProfileSettings
    from lmprune.text.sources import DataSettings

    for size in ("small", "large"):  # the first warms up
        settings = ProfileSettings(samples=8, max_length=64, stream=way != "memory")
        how = ChoiceSettings(objective="loss", loss_samples=8)
        evidence = ModelEvidence(
            open_cut(folder / size), settings, DataSettings(data=str(folder / "text.txt")), how=how,
            journal_file=folder / f"{way}-{size}.partial",
        )  # fmt: skip
        budget = BudgetSettings(params=0.85, kinds="ffn,slice", steps=1, fit_tokens=1024)
        release()
        before = _holds()
        if cap and size == "large":
            data = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmData:"))
            limit = 1024 * int(data.split()[1]) + cap
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        peak, began = [before], time.monotonic()
        with _watched(peak):
            found = choose_by_budget(budget, evidence.in_float32())
        seconds = time.monotonic() - began
        del evidence
    print(json.dumps({"peak": peak[0] - before, "seconds": seconds, "shape": found.choice.details["shape"]}))


def main() -> None:
    """Measure and print a table in Markdown."""
    import torch
    import transformers

    from lmprune.models.cut import open_cut

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("depth", 8), ("width", 512), ("inner", 768), ("vocabulary", 8192)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--weigh", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.weigh:
        weighed(Path(options.weigh[0]), options.weigh[1], int(options.weigh[2]))
        return
    beside = Path("build")  # on a disk, where a folder for temporary files may lie in memory
    beside.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside) as scratch:
        tokenizer = open_cut("demo").tokenizer()
        torch.manual_seed(0)
        for size, width, inner, depth in (
            ("small", 64, 96, 4), ("large", options.width, options.inner, options.depth)
        ):  # fmt: skip
            assert len(tokenizer) <= options.vocabulary
            config = transformers.LlamaConfig(
                hidden_size=width, intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=4,
                num_key_value_heads=4, vocab_size=options.vocabulary, tie_word_embeddings=True,
            )  # fmt: skip
            transformers.LlamaForCausalLM(config).save_pretrained(Path(scratch) / size)
            tokenizer.save_pretrained(Path(scratch) / size)
        lines = [f"line {n} holds {n * n} and {n**3} and what comes after {n + 1}." for n in range(2000)]
        Path(scratch, "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
        layer = 4 * (4 * options.width**2 + 3 * options.width * options.inner)
        ends = 4 * options.width * options.vocabulary
        weights = options.depth * layer + ends
        print(f"A layer {layer / 1e6:.1f} MB, the embedding {ends / 1e6:.1f} MB, all {weights / 1e6:.0f} MB; a Gram "
              f"matrix of a down_proj {8 * options.inner**2 / 1e6:.1f} MB.\n")  # fmt: skip
        print("| way | cap on data (MB) | search (s) | peak above a warm start (MB) | what it chose |")
        print("|---|---|---|---|---|")
        shapes: set[str] = set()
        for way, told in WAYS.items():
            cap = weights if way == "capped" else 0
            run = [sys.executable, "-m", "benchmarks.narrow", "--weigh", scratch, way, str(cap)]
            done = subprocess.run(run, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            found = json.loads(done.stdout.splitlines()[-1])
            shapes.add(found["shape"])
            said = f"{cap / 1e6:.0f}" if cap else "none"
            print(
                f"| {told} | {said} | {found['seconds']:.1f} | {found['peak'] / 1e6:.0f} | {found['shape']} |",
                flush=True,
            )
        if len(shapes) != 1:
            sys.exit("they did not choose the same")


if __name__ == "__main__":
    main()
