"""The shim for lm-eval 0.4.13 can break nobody: not torch, not lm_eval, not with lmprune gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SHIM = Path(__file__).parent.parent / "shim"


def _python(code: str, *paths: Path, isolated: bool = False) -> subprocess.CompletedProcess[str]:
    inserts = "".join(f"sys.path.insert(0, {str(path)!r});" for path in paths)
    flags = ["-S"] if isolated else []
    return subprocess.run(
        [sys.executable, *flags, "-c", f"import sys;{inserts}{code}"], capture_output=True, text=True, timeout=120
    )


def test_the_entry_points_are_declared_and_the_shim_is_installed_as_a_file() -> None:
    from importlib.metadata import entry_points
    from importlib.util import find_spec

    (backend,) = [e for e in entry_points(group="torch.backends") if e.name == "lmprune"]
    (model,) = [e for e in entry_points(group="lm_eval.models") if e.name == "lmprune"]
    assert backend.value == "_lmprune_lm_eval:register"
    assert model.value == "lmprune.evaluation.plugin:LmpruneLM"
    spec = find_spec("_lmprune_lm_eval")
    # not a link into the source tree, which may move away and would then break `import torch`
    assert spec and spec.origin and "site-packages" in spec.origin and not Path(spec.origin).is_symlink()


def test_the_shim_does_nothing_without_lm_eval() -> None:
    done = _python(
        "import _lmprune_lm_eval as s; s.register(); print(sorted(m for m in sys.modules if 'lm' in m))", SHIM
    )
    assert done.stdout.strip() == "['_lmprune_lm_eval']", done.stderr


def test_the_shim_survives_anything(tmp_path: Path) -> None:
    """A broken lm_eval, a missing lmprune, a file that shadows it: register() returns."""
    broken = tmp_path / "broken"
    (broken / "lm_eval").mkdir(parents=True)
    (broken / "lm_eval" / "__init__.py").write_text("")
    (broken / "lm_eval" / "api.py").write_text("raise SystemError('broken')")
    code = "import lm_eval; import _lmprune_lm_eval as s; s.register(); print('alive')"
    assert _python(code, SHIM, broken, isolated=True).stdout.strip() == "alive"
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "lmprune.py").write_text("raise SystemError('shadow')")
    done = _python("import torch; print('alive')", shadow)
    assert done.stdout.strip() == "alive", done.stderr


def test_the_shim_leaves_a_discovering_lm_eval_alone(tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    (newer / "lm_eval" / "api").mkdir(parents=True)
    (newer / "lm_eval" / "models").mkdir()
    (newer / "lm_eval" / "__init__.py").write_text("")
    (newer / "lm_eval" / "models" / "__init__.py").write_text("raise SystemError('must not be imported')")
    (newer / "lm_eval" / "api" / "__init__.py").write_text("")
    (newer / "lm_eval" / "api" / "registry.py").write_text(
        "model_registry = {}\ndef load_plugins(group, registry): return []\n"
    )
    code = (
        "import lm_eval; import _lmprune_lm_eval as s; s.register();"
        "print('lm_eval.models' in sys.modules, sys.modules['lm_eval.api.registry'].model_registry)"
    )
    assert _python(code, SHIM, newer, isolated=True).stdout.strip() == "False {}"


def test_registering_keeps_the_hosts_own_models() -> None:
    code = (
        "import lm_eval, torch; from lm_eval.api.registry import model_registry as r;"
        "print('lmprune' in r, 'hf' in r, 'lmprune.evaluation' in sys.modules)"
    )
    assert _python(code).stdout.strip() == "True True False"
