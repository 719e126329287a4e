"""A sweep against separate runs: scoring five `deepest` cuts, in one process each way, in turns.

    python -m benchmarks.sweep          a random Llama of 24 layers, --width and --words wide
    python -m benchmarks.sweep --demo   the demo model

Prints layer passes, CPU seconds and wall seconds. CPU seconds are what to trust on a busy machine. A separate run loads
its own layers, as `lm_eval --model lmprune` does; what a process costs to start is in neither number. Every model needs
its own head, so the larger the head, the less there is to share: its share of the weights in use is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lmprune.choosing import choose, write_recipe
from lmprune.evaluation.plugin import LmpruneLM
from lmprune.evaluation.shared import Cut, SharedLM
from lmprune.forward.tree import passes, walk
from lmprune.models.cut import open_cut
from lmprune.models.locate import demo_folder
from lmprune.models.stack import find_stack
from lmprune.sweeping.points import counts

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5)


def random_llama(folder: Path, width: int, words: int) -> Path:
    """24 layers of this width, with the demo model's tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=24,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(demo_folder()).save_pretrained(folder)
    return folder


def head_share(model: Any) -> float:
    """The head's share of the weights that a token is multiplied with."""
    head = model.get_output_embeddings().weight.numel()
    layers = sum(weight.numel() for weight in find_stack(model).layers.parameters())
    return float(head / (head + layers))


def requests(count: int, words: int) -> list[Any]:
    """Token requests as the harness makes them: contexts of 40 to 100 tokens, continuations of 2."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(
            2, words, (int(torch.randint(42, 102, (1,), generator=generator)),), generator=generator
        ).tolist()
        made.append((("", ""), ids[:-2], ids[-2:]))
    return made


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``work`` gives, its CPU seconds and its wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    return found, time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--words", type=int, default=16000)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        base = open_cut("demo" if options.demo else random_llama(Path(scratch) / "base", options.width, options.words))
        layers, words = base.layers, base.config["vocab_size"]
        cuts = []
        for n in counts(FRACTIONS, layers):
            made, path = choose(base, "deepest", drop=n), Path(scratch) / f"deepest-{n:02d}.yml"
            write_recipe(base, made, path)
            cuts.append(Cut(path.stem, made.plan, path))
        asked = requests(options.requests, words)

        def together() -> dict[str, Any]:
            model, found = SharedLM(base.name, cuts, device="cpu", dtype="float32", batch_size=16), {}
            for cut in cuts:
                model.use(cut.name)
                found[cut.name] = model._loglikelihood_tokens(asked)
            return found

        def apart() -> dict[str, Any]:
            found = {}
            for cut in cuts:
                model = LmpruneLM(base.name, recipe=str(cut.recipe), device="cpu", dtype="float32", batch_size=16)
                found[cut.name] = model._loglikelihood_tokens(asked, disable_tqdm=True)
            return found

        shared, separate = passes(walk({cut.name: cut.plan.kept for cut in cuts if cut.plan}))
        whole = base.load(dtype="float32")
        print(
            f"{whole.num_parameters() / 1e6:.0f} M parameters, the head {head_share(whole):.1%} of what a token meets"
        )
        del whole
        print(
            f"{layers} layers, {len(cuts)} cuts: {shared} layer passes a batch instead of {separate}, "
            f"{shared / separate:.2f}x"
        )
        cpu, wall = [], []
        for _ in range(options.repeat):
            (one, cpu_one, wall_one), (five, cpu_five, wall_five) = timed(together), timed(apart)
            assert one == five, "the numbers differ"
            cpu.append(cpu_one / cpu_five)
            wall.append(wall_one / wall_five)
            print(f"together {cpu_one:.1f} s CPU, {wall_one:.1f} s; apart {cpu_five:.1f} s CPU, {wall_five:.1f} s")
        print(
            f"same numbers; CPU time {statistics.median(cpu):.2f}x [{min(cpu):.2f}, {max(cpu):.2f}], "
            f"wall time {statistics.median(wall):.2f}x [{min(wall):.2f}, {max(wall):.2f}]"
        )


if __name__ == "__main__":
    main()
