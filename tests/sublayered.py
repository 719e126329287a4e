"""Every causal language model of transformers that `prune` supports, without one attention, and without one MLP.

    python tests/sublayered.py [TYPE ...]     measure those, or all, and write docs/architectures.md again

Right means that the live model that skips the sublayer, and the whole one with zeros where a checkpoint gets them, give
the same logits, and others than the whole model.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from architectures import shortened, tiny_config, tiny_model
from refitted import SUPPORTED, rows_of

from lmprune.cuts.plan import Plan
from lmprune.cuts.sublayers import PROJECTIONS, Sublayers
from lmprune.errors import LmpruneError
from lmprune.files import write_text
from lmprune.forward.batches import Batch
from lmprune.forward.calls import run_decoder
from lmprune.models.carrying import cut_live
from lmprune.models.stack import find_stack
from lmprune.models.sublayers import changes
from lmprune.models.width import live_source
from lmprune.writing import support

LAYERS = range(2, 6)
RIGHT = "right"


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    batch = Batch.of(rows_of(3, seed=0), torch.device("cpu"))
    logits: torch.Tensor = run_decoder(model.eval(), batch).logits
    return logits


def _zeroed(whole: Any, part: Sublayers, plan: Plan) -> Any:
    """The whole model with zeros in the tensors that a checkpoint without the sublayer has them in."""
    source, model = live_source(whole), copy.deepcopy(whole)
    zeros = changes(part, plan, source)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in zeros:
                tensor.copy_(zeros[name](tensor))
    return model


def examine(kind: str, sublayer: str) -> str:
    """`RIGHT`, or why not: of the first layer in the middle that has such a sublayer."""
    whole = tiny_model(tiny_config(kind)).float()
    layers, said = len(find_stack(whole).layers), ""
    for layer in LAYERS:
        part = Sublayers(**{sublayer: (layer,)})
        plan = Plan(layers, (), (part,))
        try:
            wanted = _logits(_zeroed(whole, part, plan))
            live = copy.deepcopy(whole)
            cut_live(live, plan)
            found = _logits(live)
        except LmpruneError as exc:
            said = str(exc)
            continue
        except Exception as exc:
            return f"wrong: {type(exc).__name__}: {exc}"
        if torch.allclose(wanted, _logits(whole), rtol=1e-6, atol=1e-6):
            return "wrong: nothing is missing, so this tells nothing"
        apart = (found - wanted).abs().max().item()
        return RIGHT if apart <= 1e-5 * max(1.0, wanted.abs().max().item()) else f"wrong: logits differ by {apart:.2g}"
    return said


def gist(verdict: str) -> str:
    """Why something is refused, without the type and the layer, and what to do instead."""
    text = re.sub(r"^(\w[\w-]*: )?layer [\d,-]+:? ", "", verdict)
    return shortened(re.sub(r", so (it|its \w+) cannot be left out alone|\. Drop whole layers.*$", "", text))


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    known = dict(support.sublayers()) if sys.argv[1:] else {}
    for kind in sys.argv[1:] or SUPPORTED:
        known[kind] = {name: RIGHT if (told := examine(kind, name)) == RIGHT else gist(told) for name in PROJECTIONS}
        print(kind, known[kind], flush=True)
        write_text(support.SUBLAYERS, json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    support.sublayers.cache_clear()
    write_text(Path(__file__).parent.parent / "docs" / "architectures.md", support.document())


if __name__ == "__main__":
    main()
