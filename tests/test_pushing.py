"""Pushing to, and using from, a server that speaks the Hub's API: what arrives, what is sent again, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN
from hub_server import Hub, Repository

from lmprune import hub as client
from lmprune.choosing import write_recipe
from lmprune.cuts.plan import Plan
from lmprune.cuts.recipe import Recipe
from lmprune.errors import HostError, LmpruneError, ModelError, NetworkError, RecipeError, UsageError
from lmprune.models.cut import open_cut, read_recipe
from lmprune.sharing.pushing import push
from lmprune.sharing.subjects import look
from lmprune.writing.pruning import prune
from lmprune.writing.verify import verify

DEMO = Plan(12, (8, 9, 10))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, and this process's client turned to it with a cache of its own."""
    from huggingface_hub import constants

    with Hub().serving() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setattr(client.time, "sleep", lambda seconds: served.log.append(f"waited {seconds:.0f}"))
        yield served


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_recipe("demo", DEMO, tmp_path / "r.yml")
    return tmp_path / "r.yml"


def test_a_recipe_is_pushed_and_used(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    done = push(recipe, "ada/small")
    assert done.pushed is not None and done.pushed.changed and done.pushed.url == f"{hub.url}/ada/small"
    assert set(hub.files("ada/small")) == {*done.files, ".gitattributes"}
    assert read_recipe("ada/small").plan == DEMO
    assert open_cut("ada/small").layers == 9 and open_cut("demo", recipe="ada/small").plan == DEMO
    commit = hub.repositories["ada/small"].refs["main"]
    assert open_cut("ada/small").name == f"ada/small@{commit}" and open_cut(f"ada/small@{commit}").plan == DEMO
    prune("ada/small", tmp_path / "out", logits=False)
    assert not verify("ada/small", tmp_path / "out", logits=False).differences
    assert look("ada/small").plan == DEMO
    assert client.tagged("small") == [{"id": "ada/small", "downloads": 3, "models": []}]
    assert client.tagged("other") == []


def test_a_second_push_changes_what_changed(hub: Hub, recipe: Path) -> None:
    first = push(recipe, "ada/small").pushed
    hub.log.clear()
    again = push(recipe, "ada/small").pushed
    assert first and again and again.commit == first.commit and not again.changed
    assert not any("/commit/" in line for line in hub.log)
    hub.repositories["ada/small"].commit(hub.files("ada/small") | {"report.md": b"old", "notes.md": b"a person's"})
    write_recipe("demo", Plan(12, (8, 9)), recipe)
    assert push(recipe, "ada/small").pushed.changed  # type: ignore[union-attr]
    assert "report.md" not in hub.files("ada/small") and hub.files("ada/small")["notes.md"] == b"a person's"
    assert read_recipe("ada/small").plan == Plan(12, (8, 9))


def test_weights_go_as_large_files_and_only_once(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    prune(recipe, tmp_path / "out", logits=False)
    push(recipe, "ada/small", weights=tmp_path / "out")
    assert sum(line.startswith("PUT /large/") for line in hub.log) == 1
    assert hub.files("ada/small")["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    hub.log.clear()
    assert read_recipe("ada/small").plan == DEMO
    assert not any("safetensors" in line for line in hub.log), "no weights are fetched for a recipe"
    assert open_cut("ada/small").layers == 9 and open_cut("ada/small").plan is None
    subject = look("ada/small")
    assert subject.kind == "checkpoint" and subject.plan == DEMO and subject.lineage.base.model == "demo"
    with pytest.raises(UsageError, match=r"holds weights \(model\.safetensors\). Give --weights again"):
        push(recipe, "ada/small")


def test_a_hub_without_xet_takes_large_files_by_lfs(
    hub: Hub, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    prune(recipe, tmp_path / "out", logits=False)
    push(recipe, "ada/small", weights=tmp_path / "out")
    assert sum("/xet-write-token/" in line for line in hub.log) == 1, "Xet is asked for first, and once"
    assert sum(line.startswith("PUT /large/") for line in hub.log) == 1
    assert "model.safetensors" in hub.files("ada/small") and constants.HF_HUB_DISABLE_XET is False


def test_private_and_proposed(hub: Hub, recipe: Path) -> None:
    push(recipe, "ada/hidden", private=True)
    assert hub.repositories["ada/hidden"].private
    hub.repositories["bob/open"] = Repository()
    hub.repositories["bob/open"].commit({"README.md": b"---\ntags: [other]\n---\n"})
    with pytest.raises(HostError, match="may not write to bob/new"):
        push(recipe, "bob/new")
    done = push(recipe, "bob/open", create_pr=True).pushed
    assert done and done.pull_request == f"{hub.url}/bob/open/discussions/1"
    assert "recipe.yml" in hub.files("bob/open", "refs/pr/1") and "recipe.yml" not in hub.files("bob/open")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small folder as it is pushed: a card, a recipe and a large file."""
    out = tmp_path / "folder"
    out.mkdir()
    (out / "README.md").write_text("---\ntags: [lmprune]\n---\n# small\n")
    (out / "recipe.yml").write_text("slices: []\n")
    (out / "model.safetensors").write_bytes(b"\0" * 5000)
    return out


FILES = ("README.md", "model.safetensors", "recipe.yml")


def push_folder(folder: Path) -> client.Pushed:
    return client.push(folder, FILES, "ada/small", message="lmprune: a test")


@pytest.mark.parametrize(
    ("match", "status", "how", "waits"),
    [
        ("POST /api/repos/create", 503, {}, ["waited 1"]),
        ("POST .*/commit/", 429, {"headers": {"Retry-After": "7"}}, ["waited 7"]),
        ("POST .*/commit/", 500, {"times": 2}, ["waited 1", "waited 2"]),
        ("POST .*/commit/", 0, {}, ["waited 1"]),
        ("PUT /large/", 0, {}, None),
        ("POST .*/preupload/", 0, {}, None),
    ],
)
def test_what_passes_is_waited_for(
    match: str, status: int, how: dict[str, Any], waits: list[str] | None, hub: Hub, folder: Path
) -> None:
    hub.fail(match, status, **how)
    push_folder(folder)
    assert set(hub.files("ada/small")) == {*FILES, ".gitattributes"}
    if waits is not None:  # the others are the client's own
        assert [line for line in hub.log if line.startswith("waited")] == waits


@pytest.mark.parametrize(
    ("match", "status", "message", "error", "says"),
    [
        ("POST /api/repos/create", 401, "no such token hf_writer", HostError, "does not take your token"),
        ("POST /api/repos/create", 403, "storage is full", HostError, r"may not write to ada/small \(.*is full"),
        ("POST .*/commit/", 409, "", HostError, "was changed by someone else meanwhile"),
        ("POST .*/commit/", 412, "", HostError, "was changed by someone else meanwhile"),
        ("POST .*/commit/", 404, "", HostError, "no repository ada/small that your token may see"),
        ("POST .*/commit/", 400, "too many files", HostError, "refuses to write ada/small: 400 .*too many files"),
        ("POST .*/commit/", 429, "", NetworkError, "keeps asking to wait"),
        ("POST .*/commit/", 502, "", NetworkError, "answers 502 again and again"),
        ("POST .*/commit/", 0, "", NetworkError, "broke 5 times.*completes what is missing"),
    ],
)
def test_what_is_refused_is_one_line_and_leaves_nothing_half(
    match: str, status: int, message: str, error: type[LmpruneError], says: str, hub: Hub, folder: Path
) -> None:
    hub.fail(match, status, message=message, times=99)
    with pytest.raises(error, match=says) as caught:
        push_folder(folder)
    assert "\n" not in str(caught.value) and "hf_writer" not in str(caught.value)
    if "ada/small" in hub.repositories:
        assert set(hub.files("ada/small")) == {".gitattributes"}
    hub.faults.clear()
    push_folder(folder)
    assert set(hub.files("ada/small")) == {*FILES, ".gitattributes"}, "the same call completes it"


def test_mistakes(hub: Hub, recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.card_error = '"tags" must be an array of strings'
    with pytest.raises(HostError, match=r'does not take the card: .*"tags" must be an array'):
        push(recipe, "ada/small")
    hub.card_error = None
    hub.repositories["ada/taken"] = Repository()
    hub.repositories["ada/taken"].commit({"README.md": b"---\ntags: [other]\n---\n", "model.bin": b"x"})
    with pytest.raises(UsageError, match=r"ada/taken exists and holds 'README\.md', which is not of lmprune"):
        push(recipe, "ada/taken")
    push(recipe, "ada/open")
    with pytest.raises(UsageError, match="ada/open exists and is public"):
        push(recipe, "ada/open", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HostError, match="your token may not write to ada/other"):
        push(recipe, "ada/other")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(client, "tokens", lambda: ())
    with pytest.raises(UsageError, match="no token for the Hub"):
        push(recipe, "ada/other")


def test_what_the_hub_does_not_give(hub: Hub, recipe: Path) -> None:
    push(recipe, "ada/small")
    repository = hub.repositories["ada/small"]
    repository.commit(hub.files("ada/small"), "stable")
    with pytest.raises(RecipeError, match=r"no revision 'stabel' on the Hub \(did you mean 'stable'\?\)"):
        read_recipe("ada/small@stabel")
    with pytest.raises(ModelError, match="no such repository on the Hub"):
        open_cut("ada/nothing")
    repository.gated = True
    with pytest.raises(ModelError, match="gated on the Hub"):
        open_cut("ada/small@other")


@pytest.mark.parametrize("name", ["recipe.yml", "config.json"])
def test_a_small_file_that_is_large_is_not_fetched(name: str, hub: Hub, recipe: Path) -> None:
    push(recipe, "ada/small")
    files = hub.files("ada/small")
    hub.repositories["ada/small"].commit(files | {name: b"#" * (client.SMALL + 1)})
    for use in (read_recipe, open_cut, look, lambda given: open_cut("demo", recipe=given)):
        hub.log.clear()
        with pytest.raises(
            LmpruneError, match=rf"{name} is 4\.2 MB, and such a file is at most 4\.2 MB. It was not fetched"
        ):
            use("ada/small")  # type: ignore[operator]
        assert not [line for line in hub.log if line.startswith("GET") and line.endswith(name)]


def test_a_file_that_is_larger_than_was_said_is_left_there(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    push(recipe, "ada/small")
    hub.lies["recipe.yml"] = b"#" * (16 * client.SMALL)
    with pytest.raises(RecipeError, match=r"recipe\.yml or .* sends more than it says"):
        read_recipe("ada/small")
    taken = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert taken <= 3 * client.SMALL
    hub.lies.clear()
    assert read_recipe("ada/small").plan == DEMO


def test_what_was_fetched_is_there_without_the_network(hub: Hub, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    push(recipe, "ada/small")
    first = read_recipe("ada/small")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_recipe("ada/small") == first


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace("model: demo", "model: /etc"), "names the model '/etc'"),
        (lambda text: text.replace("model: demo", "model: ../../secret"), "names the model '../../secret'"),
        (lambda text: text.replace("model: demo", "model: org/.."), r"names the model 'org/\.\.'"),
        (
            lambda text: text.replace("model: demo", "model: org/base+/home/ada/adapter"),
            "names the model '/home/ada/adapter'",
        ),
        (lambda text: text + "base_model: ./here\n", "names the base_model './here'"),
    ],
)
def test_a_recipe_from_the_hub_names_nothing_on_this_machine(
    change: Callable[[str], str], says: str, hub: Hub, recipe: Path
) -> None:
    push(recipe, "ada/small")
    repository = hub.repositories["ada/small"]
    files = hub.files("ada/small")
    repository.commit(files | {"recipe.yml": change(files["recipe.yml"].decode()).encode()})
    for use in (read_recipe, open_cut, look, lambda name: open_cut("demo", recipe=name)):
        with pytest.raises(RecipeError, match=says):
            use("ada/small")  # type: ignore[operator]


def test_the_history_of_a_model_from_the_hub_names_nothing_on_this_machine(
    hub: Hub, recipe: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    prune(recipe, tmp_path / "out", logits=False)
    push(recipe, "ada/small", weights=tmp_path / "out")
    assert open_cut("ada/small").origin.base is not None
    files = hub.files("ada/small")
    told = json.loads(files["lmprune.json"])
    told["base"]["model"] = str(tiny("llama"))
    hub.repositories["ada/small"].commit(files | {"lmprune.json": json.dumps(told).encode()})
    origin = open_cut("ada/small").origin
    assert origin.base is None and "which is not on the Hub" in str(origin.problem)


def test_a_base_that_changed_is_refused_with_what_differs(hub: Hub, recipe: Path, tiny: Callable[..., Path]) -> None:
    other = write_recipe(tiny("llama"), Plan(8, (3,)), recipe.with_name("other.yml")).recipe
    push(recipe.with_name("other.yml"), "ada/small", base="org/base")
    base = hub.repositories["org/base"] = Repository()
    base.commit({file.name: file.read_bytes() for file in tiny("llama").iterdir()})
    assert open_cut("ada/small").layers == 7
    base.commit(
        {file.name: file.read_bytes() for file in tiny("llama", rope_theta=5.0, initializer_range=0.1).iterdir()}
    )
    with pytest.raises(RecipeError, match=rf"org/base: {other.fingerprint} then, sha256-4k:\w+ now"):
        open_cut("ada/small")


def test_the_base_is_pinned_to_the_revision_of_the_recipe(hub: Hub, tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = hub.repositories["org/base"] = Repository()
    first = base.commit({file.name: file.read_bytes() for file in tiny("llama").iterdir()})
    write_recipe("org/base", Plan(8, (3,)), tmp_path / "r.yml")
    push(tmp_path / "r.yml", "ada/small")
    base.commit({"README.md": b"---\ntags: []\n---\n"})
    assert f"model: org/base@{first}" in hub.files("ada/small")["recipe.yml"].decode()
    assert Recipe.read(tmp_path / "r.yml").revision == first
    shutil.rmtree(tmp_path / "cache")
    assert open_cut("ada/small").base.revision == first


def test_the_command_says_where_it_went(hub: Hub, recipe: Path, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    import sys

    from lmprune import cli

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lmprune", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    code, out, _ = call("push", recipe, "ada/small", "--json")
    assert code == 0 and json.loads(out)["url"] == f"{hub.url}/ada/small"
    assert "(nothing has changed)" in call("push", recipe, "ada/small")[1]
    assert call("push", recipe, "ada/small", "--dry-run")[0] == 2
    assert "nothing was pushed" in call("push", recipe, "ada/small", "--dry-run", "-o", tmp_path / "dry")[1]
    code, out, err = call("recipes", "--search", "small")
    assert code == 0 and "ada/small" in out and err == ""
    code, out, _ = call("show", "ada/small")
    assert code == 0 and "████████░░░█" in out
    hub.fail("GET /api/models", 500, times=99)
    code, out, err = call("recipes", "--search", "demo")
    assert code == 0 and "demo-minus-3-deepest" in out and "cannot be reached" in err


@pytest.mark.slow
def test_share_it_in_the_docs_works_as_written(hub: Hub, run: Any, tmp_path: Path) -> None:
    """Letter for letter, after a sweep of a few documents; each command with a cache of its own."""
    text = (Path(__file__).parent.parent / "docs" / "sharing.md").read_text(encoding="utf-8")
    block = text.partition("## Share it\n")[2].partition("```\n")[2].partition("```")[0]
    commands = block.replace("\\\n", " ").strip().splitlines()
    assert len(commands) == 5
    run("lmprune", "sweep", "demo", "-o", "demo-sweep", "--fractions", "0.2", "--limit", "4", "--agree", "8")
    said = []
    for number, command in enumerate(commands):
        environment = {
            "PATH": f"{BIN}:{os.environ['PATH']}", "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / f"cache{number}"),
            "HF_TOKEN": "hf_you" if "push" in command else "",
        }  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True,
            timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "hf_you" not in done.stdout + done.stderr
        said.append(done.stdout)
    assert "llama-2-7b-minus-9-shortgpt" in said[0] and "21-29" in said[1]
    look_at_it, pushed = tmp_path / "look", hub.files("you/demo-small")
    assert {p.relative_to(look_at_it).as_posix() for p in look_at_it.rglob("*") if p.is_file()} <= {*pushed}
    assert "says the same as the unpruned model" in pushed["README.md"].decode()
    for name, content in pushed.items():
        assert str(tmp_path).encode() not in content and b"hf_you" not in content, name
    assert f"{hub.url}/you/demo-small" in said[3] and "lmprune_demo_facts" in said[4]


@pytest.mark.slow
def test_the_whole_way_by_commands(hub: Hub, run: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Pushed here; evaluated, pruned and merged by others, each with a cache of its own."""
    from lmprune.tasks_folder import tasks_folder

    here = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    run("lmprune", "recipe", "demo", "--drop", "3", "--criterion", "deepest", "-o", "r.yml", **here)
    run("lmprune", "push", "r.yml", "ada/small", HF_TOKEN="hf_writer", **here)
    model = ("--model", "lmprune", "--model_args", "pretrained=demo,recipe=ada/small")
    arguments = (*model, "--tasks", "lmprune_demo_facts", "--include_path", tasks_folder(), "--limit", "8")
    assert "lmprune_demo_facts" in run("lm_eval", *arguments, **here, HF_HOME=str(tmp_path / "other")).stdout
    run("lmprune", "prune", "ada/small@main", "out", **here, HF_HOME=str(tmp_path / "third"))
    assert "proof" in run("lmprune", "show", "out").stdout

    base = hub.repositories["org/base"] = Repository()
    base.commit({file.name: file.read_bytes() for file in tiny("llama").iterdir()})
    run("lmprune", "recipe", "org/base", "--layers", "3,4", "-o", "llama.yml", **here)
    run("lmprune", "push", "llama.yml", "ada/llama", HF_TOKEN="hf_writer", **here)
    (tmp_path / "plain.yml").write_bytes(hub.files("ada/llama")["recipe.yml"])
    run("mergekit-yaml", "plain.yml", "merged", **here, HF_HOME=str(tmp_path / "fourth"))
    assert not verify("ada/llama", tmp_path / "merged", logits=False).differences
    assert look(str(tmp_path / "merged")).lineage.base == look("ada/llama").lineage.base
