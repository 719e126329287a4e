"""Lists of removed layers that others published, as facts: who, where, how the numbering is known, what was measured.

Read from papers, model cards and the data files of repositories; no file of theirs is copied. `scripts/make_recipes.py`
writes ``recipes/`` from this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One list.

    Attributes:
        model: the base's id on the Hub; its layers stand in ``recipes/models.json``.
        dropped: layers from 0, both ends included: ``21-29``; empty where only sublayers go.
        origin: the last part of the recipe's name.
        by, source: who published it, and where.
        indices: how its source counts, and how that is known.
        criterion: the nearest of lmprune's criteria; None where it is none of them.
        measured: what was measured by whoever published it, or others that are named, and on what.
        unmeasured: what nobody measured, as far as is known here.
        warning: why nobody should use it as it stands.
        attention, mlp: layers whose attention, or whose MLP, goes; those in both go as a whole.
    """

    model: str
    dropped: str
    origin: str
    by: str
    source: str
    indices: str
    criterion: str | None = None
    measured: tuple[str, ...] = ()
    unmeasured: tuple[str, ...] = ("reasoning by generation",)
    calibration: str | None = None
    warning: str | None = None
    attention: str = ""
    mlp: str = ""


L2_7B, L2_13B, L2_70B = (f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b"))
L3_8B, MISTRAL_3 = "meta-llama/Meta-Llama-3-8B", "mistralai/Mistral-7B-v0.3"
V7B, V13B, GEMMA_2B, GEMMA_7B = "lmsys/vicuna-7b-v1.3", "lmsys/vicuna-13b-v1.3", "google/gemma-2b", "google/gemma-7b"
NOTHING = ("loss, knowledge and reasoning: no number is known here",)


def _shortgpt() -> list[Published]:
    by, source = "Men et al., ShortGPT, 2024", "arXiv 2403.03853, Table 9"
    indices = (
        "from 0: its Table 10 says that the process starts with layer 0, and an independent run of the method that "
        "counts from 0 gives the same set for Llama-2-7B"
    )
    common: dict[str, Any] = {
        "by": by,
        "source": source,
        "indices": indices,
        "criterion": "block-influence",
        "calibration": "PG19",
    }
    return [
        Published(
            L2_7B, "21-29", "shortgpt",
            measured=(
                "mean of 13 tasks 47.78 -> 41.22", "MMLU 45.39 -> 43.96", "PIQA 77.91 -> 66.43", "C3 43.56 -> 39.62",
                "XSum 19.40 -> 0.67: it hardly writes any more",
                "the 4-bit model (GPTQ): perplexity 8.03 -> 40.78, MMLU 43.17 -> 43.35, 1.19 times as fast",
            ),
            unmeasured=("reasoning in steps",), **common,
        ),
        Published(L2_13B, "26-35", "shortgpt", unmeasured=NOTHING, **common),
        Published("baichuan-inc/Baichuan2-7B-Base", "22-30", "shortgpt", unmeasured=NOTHING, **common),
        Published(
            "baichuan-inc/Baichuan2-13B-Base", "26-35", "shortgpt", measured=("mean of 13 tasks 62.31 -> 54.43",),
            unmeasured=("reasoning in steps",), **common,
        ),
    ]  # fmt: skip


_SHORTENED = (
    (L2_7B, ("7,8,11,12,21,24", "7-12,18,21,24", "7-12,14,18,21,24,27"), ("24-29", "21-29", "19-29")),
    (L3_8B, ("8-11,23,25", "8-12,23,25,26"), ("23-26,28,29", "22-29")),
    (
        "huggyllama/llama-7b",
        ("10,13,24-27", "9,10,13,14,22,24-27", "9,10,12-14,22,24-27,29"),
        ("24-29", "21-29", "19-29"),
    ),
    (V7B, ("10,11,20,24,25,27", "6,8,10,11,20,24,25,27,29", "5,6,8,10,11,20,24-27,29"), ("24-29", "21-29", "19-29")),
    (
        V13B,
        ("12,20,24,26,32,34-36", "9,12,13,20,24,26,31,32,34-36", "9,12-14,20,21,24-27,31,32,34-36"),
        ("30-37", "27-37", "23-37"),
    ),
    (GEMMA_2B, ("6-9",), ("8-11",)),
    (GEMMA_7B, ("7,13-15,18",), ("13-16,22",)),
    ("rishiraj/CatPPT-base", ("9,11,12,14,15,25",), ("24-29",)),
)
"""Model, the lists by perplexity, those by Taylor+."""


def _shortened_llama() -> list[Published]:
    found = []
    for model, *lists in _SHORTENED:
        for how, criterion, sets in zip(("ppl", "taylor"), ("one-shot", "taylor"), lists):
            for dropped in sets:
                token = "; each text began with the BOS token" if "gemma" in model else ""
                found.append(
                    Published(
                        model, dropped, f"shortened-{how}", criterion=criterion,
                        by="Kim et al., Shortened LLaMA, 2024",
                        source="arXiv 2402.02834; block_order.csv in the repository Nota-NetsPresso/shortened-llm",
                        indices="from 0: the column removed_block is what Python's enumerate gives",
                        calibration=f"10 texts of BookCorpus, 128 tokens each{token}. Layers 0 to 3 and the last two "
                        "were never candidates",
                        unmeasured=("what this list costs: the numbers were not read for this library",),
                    )
                )  # fmt: skip
    return found


_EVOPRESS_BLOCKS = (
    "13,24", "11-13,27", "8,13,14,22,25,27", "8-10,14,15,22,24-27", "8-11,13,14,21,22,24,26,28,30",
    "3,10-15,21-25,28,31",
)  # fmt: skip
"""Whole blocks of Mistral-7B-v0.3."""
_EVOPRESS = (
    (L2_7B, "12,25", "11,12"),
    (L2_7B, "12,23-25", "11,12,23,25"),
    (L2_7B, "10,11,23-25,27", "9-11,22,23,25"),
    (L2_7B, "10,12-14,23-25,27", "9-13,22,23,25"),
    (L2_7B, "10-14,21,23-25,27", "9-13,18,23,25-27"),
    (L3_8B, "9,26", "8,9"),
    (L3_8B, "9,20,26,27", "8,9,25,26"),
    (L3_8B, "9-11,19,26,27", "8-10,22,25,26"),
    (L3_8B, "4,9,11,19,20,25-27", "4,8-10,19,25,26,28"),
    ("meta-llama/Llama-3.1-8B", "10,11,26,27", "8-10,26"),
    ("meta-llama/Llama-3.1-8B", "10-12,19,20,25-27", "8-11,19,25,26,28"),
    ("meta-llama/Llama-3.1-8B", "3,9-12,19,20,23-27", "3,7-11,18,22,23,25,26,28"),
    (MISTRAL_3, "13,14,22-26,28", "8,11-13,23-25,27"),
)
"""Model, layers whose attention goes, layers whose MLP goes."""


def _evopress() -> list[Published]:
    unread = ("what this list costs: the numbers were not read for this library",)
    common: dict[str, Any] = {
        "by": "Sieberling et al., EvoPress, 2024", "criterion": "evolve", "unmeasured": unread,
        "source": "arXiv 2410.14649; drop_configs in the repository IST-DASLab/EvoPress",
        "indices": "from 0: line k of the file is layer k", "calibration": "FineWeb-Edu",
    }  # fmt: skip
    last = "it drops the last layer, which other methods keep"
    blocks = [
        Published(MISTRAL_3, dropped, "evopress", warning=last if dropped.endswith("31") else None, **common)
        for dropped in _EVOPRESS_BLOCKS
    ]
    return blocks + [Published(model, "", "evopress", attention=a, mlp=m, **common) for model, a, m in _EVOPRESS]


_BLOCKPRUNER = (
    ("8,23-25,27-29", "7"),
    ("8,19,21,23-25,27-30", "7,22"),
    ("8,18,19,21,23-25,27-30", "7,11,21,22,27"),
    ("8,12,14,18,19,21,23-25,27-30", "7,11,14,21,22,24,27"),
)
"""Of Llama-2-7B: layers whose attention goes, layers whose MLP goes."""


def _block_pruner() -> list[Published]:
    return [
        Published(
            L2_7B, "", "blockpruner", by="Zhong et al., BlockPruner, 2024", criterion="block-pruner",
            source="arXiv 2406.10594; ppls in its repository", indices="from 0: indices of the module list",
            calibration="64 samples of Alpaca; a run on 32 orders the first picks otherwise",
            unmeasured=("what this list costs: the numbers were not read for this library",), attention=a, mlp=m,
        )
        for a, m in _BLOCKPRUNER
    ]  # fmt: skip


_BEFORE_COLLAPSE = (
    (L2_7B, 32, 14, "45 to 55 %"), (L2_13B, 40, 17, "45 to 55 %"), (L2_70B, 80, 35, "45 to 55 %"),
    ("mistralai/Mistral-7B-v0.1", 32, 11, "35 %"), ("microsoft/phi-2", 32, 7, "25 %"),
    ("Qwen/Qwen-7B", 32, 6, "20 %"), ("Qwen/Qwen-14B", 40, 7, "20 %"),
)  # fmt: skip
"""Model, layers, the largest count below the share at which its answers fall to guessing, that share."""


def _deepest() -> list[Published]:
    return [
        Published(
            model, f"{layers - 1 - count}-{layers - 2}", "gromov", criterion="deepest",
            by="Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, 2024",
            source="arXiv 2403.17887: the simpler heuristic",
            indices=f"its L-n to L-1 counts from 1; from 0 they are {layers - 1 - count} to {layers - 2}, so that the "
            "last layer stays",
            measured=(
                f"with healing, cuts of this model fall to guessing at {share} of its layers; this list is "
                f"{100 * count / layers:.0f} %",
            ),
            unmeasured=("this very count", "reasoning by generation"),
            warning="it was measured with healing; without, this choice collapses much earlier",
        )
        for model, layers, count, share in _BEFORE_COLLAPSE
    ]  # fmt: skip


def _others() -> list[Published]:
    return [
        Published(
            "meta-llama/Llama-3.1-8B", "15-30", "minitron", by="NVIDIA, Llama-3.1-Minitron-4B-Depth, 2024",
            source="docstring of scripts/llm/gpt_prune.py in NVIDIA/NeMo: --drop_layers 16 ... 31",
            indices="from 1 in the source, which says so; from 0 they are 15 to 30 and the last layer stays",
            unmeasured=(
                "whether the released model dropped exactly these: the docstring is an example with its 16 layers",
                "this cut before its distillation",
            ),
            warning="made to be distilled on billions of tokens; as it stands, half of the layers are gone",
        ),
        Published(
            "mistralai/Mistral-7B-Instruct-v0.2", "21-28", "arcee", criterion="angular",
            by="Arcee, PruneMe, 2024",
            source="slice.yaml of arcee-ai/PruneMe; model arcee-ai/Mistral-7B-Instruct-v0.2-sliced-24-layer",
            indices="from 0: the ranges [0, 21] and [29, 32] of its mergekit file",
            measured=("its card says that the text is coherent",), unmeasured=("knowledge", "reasoning", "loss"),
        ),
        Published(
            "meta-llama/Llama-3.1-8B", "23-27", "na0s", by="Na0s, Llama-3.1-8B-Pruned-4-Layers, 2024",
            source="card of Na0s/Llama-3.1-8B-Pruned-4-Layers",
            indices="from 0: the ranges [0, 23] and [28, 32] of its mergekit file",
            measured=("MMLU-Pro without examples 26.42",), unmeasured=("reasoning by generation", "loss"),
            warning="the repository's name says 4 layers; its mergekit file drops 5",
        ),
        Published(
            "meta-llama/Meta-Llama-3-70B-Instruct", "56-63", "pruneme", criterion="angular",
            by="a user of PruneMe, 2024", source="arcee-ai/PruneMe issue 4: best block of 8 layers, 56 to 64",
            indices="PruneMe leaves out the first hidden state, so its 56 to 64 are layers 56 to 63 from 0",
            measured=("angular distance 0.1385",), unmeasured=("loss", "knowledge", "reasoning"),
        ),
        Published(
            L2_7B, "23-29", "linearpatch", by="Chen et al., LinearPatch, 2025",
            source="README of the repository of arXiv 2505.24680: equal rows for Taylor+, ShortGPT and LLM-Streamline",
            indices="from 0, by inference: both ShortGPT's and Taylor+'s orders give 23 to 29 for 7 layers",
            measured=(
                "perplexity of WikiText-2 18.45, C4 20.99, PTB 62.18", "mean of its question tasks 69.98 -> 60.59",
            ),
        ),
        Published(
            L3_8B, "23-29", "linearpatch", by="Chen et al., LinearPatch, 2025",
            source="README of the repository of arXiv 2505.24680: the rows of Taylor+ and LLM-Streamline agree",
            indices="from 0, by inference: Taylor+'s order gives 23 to 29 for 7 layers",
            measured=("perplexity of WikiText-2 2288; of another 7 layers, by block influence, 57.76",),
            warning="never use it unhealed: perplexity 2288 on WikiText-2",
        ),
        Published(
            L3_8B, "8-12,24-26", "navigation", criterion="one-shot",
            by="Lu et al., Reassessing Layer Pruning, 2024",
            source="arXiv 2411.15558; prune_llm.py of yaolu-zjut/Navigation-LLM-layer-pruning",
            indices="from 0: the list is compared with range(layers)", unmeasured=NOTHING,
        ),
        Published(
            "meta-llama/Llama-3.1-8B-Instruct", "22-29", "navigation", criterion="taylor",
            by="Lu et al., Reassessing Layer Pruning, 2024",
            source="arXiv 2411.15558; the first 8 of the Taylor order in prune_llm.py",
            indices="from 0: the list is compared with range(layers)", unmeasured=NOTHING,
        ),
        Published(
            "meta-llama/Llama-3.1-8B-Instruct", "24-31", "navigation-tail",
            by="Lu et al., Reassessing Layer Pruning, 2024",
            source="arXiv 2411.15558; models YaoLuzjut/Llama-3.1-6.3B-It-Alpaca and -Dolly",
            indices="from 0: the list is compared with range(layers)",
            unmeasured=("this cut before its fine-tuning",),
            warning="it drops the last layer, which other methods keep; made to be fine-tuned",
        ),
        Published(
            "Qwen/Qwen1.5-7B", "1,3,4,9-12,14", "navigation-magnitude", criterion="magnitude",
            by="Lu et al., Reassessing Layer Pruning, 2024",
            source="arXiv 2411.15558; the l1 list in prune_llm.py",
            indices="from 0: the list is compared with range(layers)", unmeasured=NOTHING,
        ),
        Published(
            "mistralai/Mistral-7B-v0.1", "24-27", "llm-drop", by="He et al., LLM-Drop, 2024",
            source="README of CASE-Lab-UMD/LLM-Drop: block 26, 25, 24, 27",
            indices="from 0: indices of its module list", unmeasured=NOTHING,
        ),
        *(
            Published(
                "mistralai/Mistral-7B-v0.1", "", f"llm-drop-{what}", by="He et al., LLM-Drop, 2024",
                source=f"README of CASE-Lab-UMD/LLM-Drop: {what} {order}", indices="from 0: indices of its module list",
                unmeasured=NOTHING, **{what: layers},  # type: ignore[arg-type]
            )
            for what, order, layers in (("attention", "25, 26, 24, 22", "22,24-26"), ("mlp", "26, 27, 25, 24", "24-27"))
        ),
        Published(
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "3-5,9-12", "lobotomy",
            by="Molchanov, Neural Network Lobotomy, 2026",
            source="the article on dev.to of 9 January 2026: Removed 7 Layers from an LLM - It Became 30% Faster",
            indices="from 0: it calls the first layer #0 and the middle one of 22 #11",
            measured=(
                "59 -> 77 tokens a second on MPS, the mean of 10 runs after 5 that do not count",
                "perplexity 1.82 -> about 1.87, on one text of its own; the loss of quality is given as 2.5 % there, "
                "and as 32 % in a second table, whose columns seem to be exchanged",
            ),
            unmeasured=(
                "which TinyLlama 1.1B it was: the article does not say, and the chat model is a guess",
                "knowledge and reasoning; perplexity on a public text",
            ),
            warning="a perplexity of 1.82 is that of a very easy text: what this cut costs elsewhere is not known",
        ),
        Published(
            "google/gemma-3-270m", "8,9,14,16", "optipfair", by="peremartra, optipfair, 2025",
            source="issue 20 of peremartra/optipfair: LAYERS 8, 9, 14, 16 of 18",
            indices="from 0: indices of the module list", unmeasured=NOTHING,
            warning="an example of a bug report on configs with one entry per layer, not a recommendation",
        ),
    ]  # fmt: skip


def published() -> list[Published]:
    """All of them, by model."""
    lists = (_shortgpt, _shortened_llama, _evopress, _block_pruner, _deepest, _others)
    return sorted((one for make in lists for one in make()), key=lambda one: (one.model.lower(), one.origin))
