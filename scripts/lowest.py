"""Try the lower bounds of pyproject.toml: an environment of exactly those versions, and every stage in it.

    python scripts/lowest.py build/lowest                              # a new folder; takes minutes and the network
    python scripts/lowest.py build/lowest --pin torch==2.13.0+cpu      # where a bound cannot be had here

Each direct dependency is installed at its lower bound, what they need in turn at whatever pip finds. Then help,
profile, recipe, prune, verify, heal and eval run offline on a tiny random model. Whoever raises or lowers a bound runs
this. It says which bounds were not tried because of ``--pin``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent
MODEL = """
import pathlib, shutil, sys, torch, transformers
from lmprune.models.locate import demo_folder
torch.manual_seed(0)
folder = pathlib.Path(sys.argv[1])
config = transformers.Qwen3Config(
    vocab_size=transformers.AutoConfig.from_pretrained(demo_folder()).vocab_size, hidden_size=64, head_dim=16,
    intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
for file in demo_folder().glob("tokenizer*"):
    shutil.copy(file, folder)
"""
TEXT = ("--data", "demo", "--max-length", "32")
STEPS = {
    "help": ("lmprune", "--help"),
    "model": ("python", "-c", MODEL, "model"),
    "profile": ("lmprune", "profile", "model", "-o", "p.json", "--samples", "8", *TEXT),
    "plot": ("lmprune", "plot", "p.json", "-o", "p.png"),
    "recipe": ("lmprune", "recipe", "p.json", "-o", "r.yml", "--drop", "2"),
    "prune": ("lmprune", "prune", "r.yml", "pruned"),
    "copy": ("lmprune", "prune", "r.yml", "copied", "--writer", "copy"),
    "verify": ("lmprune", "verify", "r.yml", "pruned"),
    "heal": ("lmprune", "heal", "pruned", "healed", "--data", "demo", "--steps", "3"),
    "bench": ("lmprune", "bench", "model", "r.yml", "--prompts", "8", "--batch-sizes", "1", "--tokens", "2"),
    "eval": ("lmprune", "eval", "--model_args", "pretrained=model,recipe=r.yml", "--tasks", "lmprune_demo_facts",
             "--limit", "4"),
    "harness": ("lm_eval", "--model", "lmprune", "--model_args", "pretrained=healed", "--tasks", "lmprune_demo_facts",
                "--include_path", str(ROOT / "tasks"), "--limit", "4"),
}  # fmt: skip


def bounds(pins: Sequence[str]) -> tuple[list[str], list[str]]:
    """The requirements to install, and the bounds that ``pins`` take the place of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {pin.partition("==")[0]: pin for pin in pins}
    lowest, replaced = [], []
    for requirement in project["dependencies"]:
        name = re.match(r"[\w-]+", requirement)
        if name is None or ">=" not in requirement:
            raise SystemExit(f"{requirement}: has no lower bound")
        if name[0] in pinned:
            replaced.append(f"{requirement} (tried: {pinned[name[0]]})")
        lowest.append(pinned.pop(name[0], requirement.replace(">=", "==")))
    if pinned:
        raise SystemExit(f"--pin {next(iter(pinned))}: no dependency of that name")
    return lowest, replaced


def install(home: Path, requirements: Sequence[str]) -> Path:
    """A new environment in ``home`` with ``requirements`` and lmprune; its folder of commands."""
    venv.create(home, with_pip=True)
    commands = home / "bin"
    pip = [str(commands / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *requirements], check=True)
    subprocess.run([*pip, "--no-deps", str(ROOT)], check=True)
    return commands


def walk(commands: Path, folder: Path) -> list[str]:
    """Run `STEPS` in ``folder``; the names of those that failed."""
    folder.mkdir()
    # The sources beside this script must not be found instead of what was installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "LMPRUNE_CACHE": str(folder / "cache"), "LMPRUNE_DEBUG": "1"}
    failed = []
    for name, (command, *words) in STEPS.items():
        line = [str(commands / command), *words]
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
        print(f"{name}: {'passes' if done.returncode == 0 else 'FAILS'}", flush=True)
        if done.returncode:
            failed.append(name)
            print(done.stderr[-3000:], flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new folder for the environment and what the steps write")
    parser.add_argument("--pin", action="append", default=[], metavar="NAME==VERSION", help="instead of the bound")
    asked = parser.parse_args()
    if asked.folder.exists():
        raise SystemExit(f"{asked.folder} exists. Give a new folder")
    requirements, replaced = bounds(asked.pin)
    print("\n".join(requirements), flush=True)
    folder = asked.folder.resolve()
    failed = walk(install(folder / "env", requirements), folder / "work")
    for line in replaced:
        print(f"not tried: {line}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
