"""How near the speed of a pruned model comes to the ideal L/(L-n): a random Llama of 24 layers, batch 1, in turns.

    python -m benchmarks.speed [--width W] [--words V] [--drop N] [--device D]

The head is not pruned, so the ideal is never quite reached: the line "weights" says what reading all weights once a
token, which bounds decoding at batch 1, allows. By default the head holds 2.6 % of those weights; in Llama-2 7B it
holds 2.0 %.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import transformers

from lmprune.benching.measuring import Subject, measure
from lmprune.benching.settings import BenchSettings
from lmprune.choosing import choose
from lmprune.models.cut import open_cut

LAYERS = 24


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--words", type=int, default=8000)
    parser.add_argument("--drop", type=int, default=6)
    parser.add_argument("--device")
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=options.words,
            hidden_size=options.width,
            intermediate_size=options.width * 8 // 3,
            num_hidden_layers=LAYERS,
            num_attention_heads=options.width // 64,
            num_key_value_heads=options.width // 64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(scratch)
        base = open_cut(scratch)
        plan = choose(base, "deepest", drop=options.drop).plan
        asked = BenchSettings(
            prompts="64", batch_sizes="1", tokens=16, runs=options.runs, device=options.device, dtype="float32"
        )
        whole, pruned = measure([Subject("whole", base), Subject("pruned", base.without(plan, "pruned"))], asked).rows
    print(
        f"{whole.parameters / 1e6:.0f} M parameters, the head {options.words * options.width / whole.parameters:.1%}; "
        f"{options.drop} of {LAYERS} layers dropped: ideal {pruned.ideal:.3f}"
    )
    for kind, ratio in (("prefill", pruned.prefill_ratio), ("decode", pruned.decode_ratio)):
        share = ratio.median / pruned.ideal
        print(f"{kind}: {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] times as fast, {share:.3f} of ideal")
    # The embedding is looked up, not read; tied, it is the head, which is.
    print(f"weights: {whole.parameters / pruned.parameters / pruned.ideal:.3f} of ideal if reading them were all")


if __name__ == "__main__":
    main()
