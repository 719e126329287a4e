"""How near the speed of a pruned model comes to the ideal L/(L-n): a random Llama of over 100 M parameters, batch 1.

    python -P benchmarks/speed.py [--drop N] [--device D]

The head and the embedding are not pruned, so the ideal is never quite reached: the line "weights" says what reading all
weights once a token, which bounds decoding at batch 1, allows.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import transformers

from lmprune.bench import BenchSettings, Subject, measure
from lmprune.criteria import criterion
from lmprune.models.locate import locate

LAYERS = 24


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop", type=int, default=6)
    parser.add_argument("--device")
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=16000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=LAYERS,
            num_attention_heads=12,
            num_key_value_heads=12,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(scratch)
        base = locate(scratch)
        cut = criterion("deepest").choose(LAYERS, options.drop, None)
        asked = BenchSettings(
            prompts="64", batches="1", tokens=16, runs=options.runs, device=options.device, dtype="float32"
        )
        whole, pruned = measure([Subject.whole(base, "whole"), Subject.cut(base, cut, "pruned")], asked).rows
    print(
        f"{whole.parameters / 1e6:.0f} M parameters, {options.drop} of {LAYERS} layers dropped: "
        f"ideal {pruned.ideal:.3f}"
    )
    for kind, ratio in (("prefill", pruned.prefill_ratio), ("decode", pruned.decode_ratio)):
        share = ratio.median / pruned.ideal
        print(f"{kind}: {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] times as fast, {share:.3f} of ideal")
    # The embedding is looked up, not read; tied, it is the head, which is.
    print(f"weights: {whole.parameters / pruned.parameters / pruned.ideal:.3f} of ideal if reading them were all")


if __name__ == "__main__":
    main()
