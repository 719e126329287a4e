"""A deep cut of the demo model as a draft of its own base: predicted and measured.

    python -m benchmarks.draft [FOLDER] [STEPS]

Keeps 4 of 12 layers, distils them for 300 steps, or STEPS, and judges them on 30 prompts. FOLDER keeps the healed
draft between runs. Prints what `lmprune draft` prints, and measured over predicted: over what was predicted before
anything was generated, from the agreement on text and the cost of passes, and over what the rounds of these prompts
should give. All times are of the processor, on one thread, so that other work on the machine counts little.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from lmprune.benching import drafting
from lmprune.benching.draft_rows import DraftSettings
from lmprune.benching.drafting import draft
from lmprune.choosing import choose, write_recipe
from lmprune.healing import HealSettings, heal


def main(folder: Path, steps: int = 300) -> None:
    """The whole benchmark."""
    if not (folder / "draft").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe("demo", choose("demo", "deepest", drop=8), folder / "r.yml")
        how = HealSettings(method="full+distill", steps=steps, lr=1e-3, device="cpu")
        heal(folder / "r.yml", folder / "draft", how)
    drafting.now = time.process_time
    done = draft("demo", folder / "draft", DraftSettings(prompts=30, device="cpu"))
    print(
        f"greedy agreement {done.greedy:.1%}, acceptance {done.acceptance:.1%}, cost of a pass {done.costs.ratio:.2f}"
    )
    for row in done.rows:
        print(f"{row.proposed} draft tokens: {row.greedy:.2f} greedy, {row.sampling:.2f} sampling, predicted")
    found = done.measured
    assert found is not None
    before = next(row.greedy for row in done.rows if row.proposed == found.proposed)
    print(f"measured over predicted before: {found.speed_up:.2f} / {before:.2f} = {found.speed_up / before:.2f}")
    print(
        f"measured with {found.proposed}: {found.speed_up:.2f}, {found.of_predicted:.2f} of the "
        f"{found.with_host:.2f} predicted with the host's own work, {found.speed_up / found.predicted:.2f} of the "
        f"{found.predicted:.2f} predicted without; {found.same} of {found.prompts} outputs the base's own"
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch) / "draft")
