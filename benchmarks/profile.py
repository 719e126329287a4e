"""What profiling costs: side by side, on the same tokens and batches, in one run.

    python -m benchmarks.profile cost    [--layers 24 --width 768 --samples 16 --length 256 --batch-size 4 --repeats 3]
    python -m benchmarks.profile scaling
    python -m benchmarks.profile stream  [--layers 24 --width 1536 --samples 16 --length 128 --batch-size 4]
    python -m benchmarks.profile until MODEL [--drop N] [--data SRC] [--samples 10000] [--max-length T]

From the root of the repository, and as a module: as a script, this file would stand in for Python's own ``profile``.

``cost`` compares with a bare forward pass of the decoder, with a rendering of PruneMe's loop (all hidden states and
logits, one block size a run; https://github.com/arcee-ai/PruneMe, 4-bit loading off), and with short-transformers 1.0.0
where it is installed (``pip install --no-deps short-transformers==1.0.0 seaborn``; it works at batch 1, so it is
compared with a bare pass at batch 1). Ways take turns within each repetition, and the median ratio to the bare pass of
the same repetition is reported, so that a slow minute of the machine slows all of them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import gc
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lmprune.forward.batches import Batch, batches_of
from lmprune.forward.calls import run_decoder
from lmprune.models.cut import open_cut
from lmprune.models.loading import load_model
from lmprune.models.stack import find_stack
from lmprune.profiling import ProfileSettings, profile
from lmprune.profiling.measuring import LiveModel, StreamedModel

VOCABULARY = 32_000


def random_llama(layers: int, width: int, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of random weights."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_rows(samples: int, length: int) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Samples of exactly ``length`` tokens."""
    return list(np.random.default_rng(0).integers(0, VOCABULARY, (samples, length), dtype=np.int32))


def synchronised(work: Callable[[], Any], device: str) -> float:
    """Seconds that ``work`` takes: by the clock on a GPU, of processor time on the CPU, which others may use too."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def bare(model: Any, rows: Any, batch: int, device: str) -> None:
    """The decoder stack over the same batches, and nothing else."""
    decoder = find_stack(model).owner
    with torch.no_grad():
        for numbers in batches_of([len(row) for row in rows], batch):
            run_decoder(decoder, Batch.of([rows[i] for i in numbers], torch.device(device)))


def pruneme(model: Any, rows: Any, batch: int, device: str, n: int) -> dict[int, list[float]]:
    """PruneMe's loop for one block size: logits, every hidden state, the last token's angle for each start and batch.

    Start i is behind layer i.
    """
    sums: dict[int, list[float]] = {}
    with torch.no_grad():
        for numbers in batches_of([len(row) for row in rows], batch):
            ids = Batch.of([rows[i] for i in numbers], torch.device(device)).ids
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states[
                1:
            ]
            for start in range(len(hidden) - n):
                a, b = hidden[start][:, -1], hidden[start + n][:, -1]
                cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
                sums.setdefault(start, []).append((torch.arccos(cosine.clamp(-1, 1)) / torch.pi).mean().item())
    return sums


def short_transformers(model: Any, kind: str) -> Any:
    """A copy of the model that short-transformers 1.0.0 watches.

    Its wrapper takes ``result[0]`` of a layer, which was the hidden state before transformers 5; so the layers give it
    a tuple, which is opened again outside.
    """
    from short_transformers import ShortTransformer
    from short_transformers import dist as distances

    watched = copy.deepcopy(model)
    layers = watched.model.layers
    for layer in layers:
        layer.forward = functools.partial(lambda inner, *args, **kwargs: (inner(*args, **kwargs),), layer.forward)
    watched = ShortTransformer.from_model(watched, distance=getattr(distances, f"angular_distance_{kind}"))
    for layer in layers:
        layer.forward = functools.partial(lambda outer, *args, **kwargs: outer(*args, **kwargs)[0], layer.forward)
    return watched


def short_transformers_pass(watched: Any, rows: Any, device: str) -> None:
    """Its loop: one sample at a time, by the decoder alone (its own loop computes logits as well)."""
    watched.clear_memory()
    bare(watched, rows, 1, device)
    assert watched.memory.result.any(), "short-transformers measured nothing"


def cost(options: argparse.Namespace) -> None:
    """Ratios to a bare forward pass."""
    device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    model = random_llama(options.layers, options.width, torch.bfloat16 if device == "cuda" else torch.float32).to(
        device
    )
    rows = random_rows(options.samples, options.length)
    settings = ProfileSettings(batch_size=options.batch_size, max_length=options.length)
    ways: dict[str, Callable[[], Any]] = {
        "bare decoder forward": lambda: bare(model, rows, options.batch_size, device),
        "lmprune, last token, whole matrix": lambda: profile(model, rows, settings),
        "lmprune, all tokens, whole matrix": lambda: profile(model, rows, settings, token="all"),
        "PruneMe's loop, one block size": lambda: pruneme(model, rows, options.batch_size, device, options.layers // 4),
    }
    alone = {}
    if importlib.util.find_spec("short_transformers"):
        alone["bare decoder forward, batch 1"] = lambda: bare(model, rows, 1, device)
        alone["lmprune, last token, batch 1"] = lambda: profile(model, rows, settings, batch_size=1)
        alone["lmprune, all tokens, batch 1"] = lambda: profile(model, rows, settings, token="all", batch_size=1)
        for kind in ("last_token", "all_tokens"):
            watched = short_transformers(model, kind)
            alone[f"short-transformers, {kind.replace('_', ' ')}, batch 1"] = functools.partial(
                short_transformers_pass, watched, rows, device
            )
    ways |= alone
    times: dict[str, list[float]] = {name: [] for name in ways}
    bare(model, rows[: options.batch_size], options.batch_size, device)
    for _ in range(options.repeats):
        for name, work in ways.items():
            times[name].append(synchronised(work, device))
    first = times["bare decoder forward"]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"\n{_machine(device)}")
    print(
        f"random Llama, {options.layers} layers of width {options.width}, {parameters:.0f} M parameters, {model.dtype}"
    )
    print(
        f"{options.samples} samples of {options.length} tokens, batches of {options.batch_size}, "
        f"{options.repeats} turns"
    )
    print("\n| way | seconds (CPU: of processor time) | ratio to bare (median; min-max) |\n|---|---|---|")
    for name, taken in times.items():
        against = times["bare decoder forward, batch 1"] if name in alone else first
        ratios = [t / f for t, f in zip(taken, against)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        print(f"| {name} | {statistics.median(taken):.2f} | {spread} |")
    once = statistics.median(times["PruneMe's loop, one block size"])
    ours = statistics.median(times["lmprune, last token, whole matrix"])
    print(f"\nPruneMe's loop for every n from 1 to {options.layers - 1}, extrapolated from one n: ", end="")
    print(f"{(options.layers - 1) * once / ours:.1f} times the time of lmprune for the same matrix")


def scaling(options: argparse.Namespace) -> None:
    """Seconds against samples and against layers."""
    print(f"\n{_machine('cpu')}\n\n| layers | samples | seconds | ms a sample and layer |\n|---|---|---|---|")
    for layers, samples in ((6, 16), (12, 16), (24, 16), (12, 32), (12, 64)):
        model = random_llama(layers, 256)
        rows = random_rows(samples, 128)
        profile(model, rows[:8])
        taken = min(synchronised(lambda: profile(model, rows), "cpu") for _ in range(3))  # noqa: B023
        print(f"| {layers} | {samples} | {taken:.2f} | {1000 * taken / layers / samples:.2f} |")


def stream(options: argparse.Namespace) -> None:
    """Seconds and peak memory of --stream under a cap of a quarter of the model, beside the pass in memory."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = random_llama(options.layers, options.width, torch.bfloat16)
        model.save_pretrained(folder)
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        layer = sum(p.numel() * p.itemsize for p in find_stack(model).layers[0].parameters())
        embeddings = model.get_input_embeddings().weight.nbytes
        del model
        gc.collect()
        start = time.perf_counter()
        for path in Path(folder).glob("*.safetensors"):
            _read(path)
        read = time.perf_counter() - start
        states = options.samples * options.length * options.width * 2
        print(
            f"\n{_machine('cpu')}\nmodel {size / 1e6:.0f} MB in bfloat16, layer {layer / 1e6:.1f} MB, embeddings",
            end=" ",
        )
        print(f"{embeddings / 1e6:.1f} MB, waiting states {states / 1e6:.1f} MB, one read of the file {read:.2f} s")
        print("\n| way | cap on data (MB) | load (s) | measure (s) | peak above a warm start (MB) |")
        print("|---|---|---|---|---|")
        sums = set()
        for way, cap in (("memory", 0), ("stream", 0), ("stream", size // 4)):
            sizes = ("--length", options.length, "--batch-size", options.batch_size, "--samples", options.samples)
            command = [sys.executable, "-m", "benchmarks.profile", "one-pass", folder, way, "--cap", cap, *sizes]
            done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            sums.add(found["sum"])
            seconds = f"{found['load']:.2f} | {found['measure']:.2f}"
            print(f"| {way} | {cap / 1e6:.0f} | {seconds} | {found['peak'] / 1e6:.0f} |")
        print(f"\nthe sums of all values agree bit for bit: {len(sums) == 1}")


def one_pass(options: argparse.Namespace) -> None:
    """What `stream` runs in a process of its own: one pass, its seconds and its peak memory, as JSON."""
    rows = random_rows(options.samples, options.length)
    batches = [rows[i : i + options.batch_size] for i in range(0, len(rows), options.batch_size)]
    # The libraries' own code and buffers are paged in by their first use and are no part of the model.
    warm = random_llama(1, 64, torch.bfloat16)
    bare(warm, rows[:1], 1, "cpu")
    del warm
    before = _status("VmRSS")
    if options.cap:
        most = _status("VmData") + options.cap
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    start = time.perf_counter()
    measurer: Any
    if options.way == "stream":
        cpu = torch.device("cpu")
        measurer = StreamedModel(open_cut(options.folder), "last", dtype="auto", device=cpu, at_once=len(batches))
    else:
        measurer = LiveModel(load_model(Path(options.folder)), "last", print)
    loaded = time.perf_counter()
    values = measurer.measure(batches)
    measured = time.perf_counter() - loaded
    total = float(sum(value.sum() for value in values))
    peak = _status("VmHWM") - before
    print(json.dumps({"load": loaded - start, "measure": measured, "peak": peak, "sum": total}))


def _status(key: str) -> int:
    """A size in bytes out of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _read(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def until(options: argparse.Namespace) -> None:
    """Samples and seconds to a certain choice, beside a fixed number of samples."""
    from lmprune.profiling import profile_model
    from lmprune.text.sources import DataSettings

    print(f"\n{_machine('cpu')}\n{options.model}, blocks of {options.drop}, {options.data}\n")
    print("| token | samples | seconds | best start | share of resamples |\n|---|---|---|---|---|")
    base = ProfileSettings(samples=options.samples, max_length=options.max_length, drop=options.drop)
    for token in ("last", "all"):
        for level in (0.95, None):
            settings = dataclasses.replace(base, token=token, until=level)
            start = time.perf_counter()
            made = profile_model(options.model, None, settings, DataSettings(data=options.data), progress=False)
            taken = time.perf_counter() - start
            best = made.best_block(options.drop)
            share = made.certainty(options.drop).shares.get(best, 0.0)
            ended = f"{made.samples} (--until {level})" if level else f"{made.samples} (fixed)"
            print(f"| {token} | {ended} | {taken:.1f} | {best} | {share:.3f} |", flush=True)


def _machine(device: str) -> str:
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{torch.get_num_threads()} threads of {platform.machine()}"
    )
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {name}"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function, defaults in (
        ("cost", cost, {"layers": 24, "width": 768, "samples": 16, "length": 256, "batch_size": 4, "repeats": 3}),
        ("scaling", scaling, {}),
        ("stream", stream, {"layers": 24, "width": 1536, "samples": 16, "length": 128, "batch_size": 4}),
        ("one-pass", one_pass, {"samples": 16, "length": 128, "batch_size": 4, "cap": 0}),
        ("until", until, {"drop": 3, "samples": 10_000, "max_length": 128}),
    ):
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(run=function)
        for key, value in defaults.items():
            command.add_argument(f"--{key.replace('_', '-')}", type=int, default=value)
        if name == "cost":
            command.add_argument("--cpu", action="store_true", help="the CPU also where there is a GPU")
        if name == "stream":
            command.add_argument("--folder", default=None, help="where the model is written for the while")
        if name == "one-pass":
            command.add_argument("folder")
            command.add_argument("way", choices=("memory", "stream"))
        if name == "until":
            command.add_argument("model")
            command.add_argument("--data", default="demo")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    options.run(options)


if __name__ == "__main__":
    main()
