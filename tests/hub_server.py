"""A server on this machine that speaks the part of the Hub's API that lmprune's client uses, and fails when told to.

    python tests/hub_server.py 8123      then HF_ENDPOINT=http://127.0.0.1:8123 HF_TOKEN=hf_writer HF_HUB_DISABLE_XET=1

Repositories live in memory. Large files go the LFS way; ``hf_writer`` may write to ``ada/``, ``hf_reader`` may not.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors",)
OWNERS = {"hf_writer": "ada", "hf_you": "you", "hf_reader": None}


@dataclass
class Repository:
    """Commits by id, each a mapping of path -> content; and what names point to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add a commit; its id."""
        oid = hashlib.sha1(repr((len(self.commits), sorted(files), ref)).encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def at(self, revision: str) -> str | None:
        """The commit that a branch or an id names."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """What happens instead, to so many requests of which method and path match."""

    match: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""


class Hub:
    """The server's state. ``log`` holds method and path of every request.

    ``lies`` holds what a path sends, whatever was said of its size before.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.card_error: str | None = None
        self.lies: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.url = ""

    def fail(self, match: str, status: int, **how: Any) -> None:
        """Answer the next requests that match ``METHOD path`` by ``status``; 0 cuts the connection."""
        self.faults.append(Fault(match, status, **how))

    def fault(self, request: str) -> Fault | None:
        """What goes wrong with this request."""
        for fault in self.faults:
            if fault.times and re.search(fault.match, request):
                fault.times -= 1
                return fault
        return None

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        repository = self.repositories[name]
        return repository.commits[str(repository.at(revision))]

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[Hub]:
        """Within the block, requests are answered at `url`."""
        server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": self}))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: the log is the hub's."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        size = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.log.append(request)
            fault = self.hub.fault(request)
            if fault is not None and fault.status == 0:
                self.close_connection = True
                self.connection.close()
                return
            if fault is not None:
                self._error(fault.status, fault.message, headers=fault.headers)
                return
            for method, pattern, answer in ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    answer(self, query, body, **found.groupdict())
                    return
            self._error(404, f"no such page: {request}")

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    # --- answers ----------------------------------------------------------------------------------------------------

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(json.dumps(data).encode(), {"Content-Type": "application/json"}, status)

    def _error(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        said = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._send(json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **said}, status)

    def _writer(self, name: str) -> bool:
        """Whether the token may write there; otherwise it is answered."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in OWNERS:
            self._error(401, "Invalid credentials in Authorization header")
        elif OWNERS[token] != name.partition("/")[0]:
            self._error(403, f"You don't have the rights to write to {name}")
        else:
            return True
        return False

    def _found(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(name)
        signed = (self.headers.get("Authorization") or "").removeprefix("Bearer ") in OWNERS
        if repository is None or (repository.private and not signed):
            self._error(401 if not signed else 404, "Repository not found", "RepoNotFound")
        elif repository.gated:
            self._error(403, "Access to this model is restricted", "GatedRepo")
        elif (oid := repository.at(revision)) is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        else:
            return repository, oid
        return None

    # --- the API ----------------------------------------------------------------------------------------------------

    def create(self, query: Any, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization')}/{asked['name']}"
        if not self._writer(name):
            return
        if name in self.hub.repositories:
            said = "You already created this model repo"
            self._json({"error": said, "url": f"{self.hub.url}/{name}"}, 409)
            return
        made = self.hub.repositories[name] = Repository(private=asked.get("visibility") == "private")
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{name}"})

    def info(self, query: Any, body: bytes, name: str, revision: str = "main") -> None:
        if (found := self._found(name, revision)) is not None:
            repository, oid = found
            files = repository.commits[oid]
            siblings = [{"rfilename": path} for path in sorted(files)]
            self._json(_described(name, repository, files) | {"sha": oid, "siblings": siblings})

    def listed(self, query: Any, body: bytes) -> None:
        wanted, words = query.get("filter", []), query.get("search", [""])[0].lower()
        rows = []
        for name, repository in self.hub.repositories.items():
            row = _described(name, repository, repository.commits[repository.refs["main"]])
            if not repository.private and set(wanted) <= set(row["tags"]) and words in name.lower():
                rows.append(row)
        self._json(rows)

    def refs(self, query: Any, body: bytes, name: str) -> None:
        if (found := self._found(name)) is not None:
            branches = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
                        for ref, oid in found[0].refs.items()]  # fmt: skip
            self._json({"branches": branches, "tags": [], "converts": []})

    def tree(self, query: Any, body: bytes, name: str, revision: str, under: str = "") -> None:
        if (found := self._found(name, revision)) is not None:
            self._json([_entry(path, content) for path, content in sorted(found[0].commits[found[1]].items())])

    def resolve(self, query: Any, body: bytes, name: str, revision: str, path: str) -> None:
        if (found := self._found(name, revision)) is None:
            return
        content = found[0].commits[found[1]].get(path)
        if content is None:
            self._error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": found[1]})
            return
        headers = {"X-Repo-Commit": found[1], "ETag": f'"{_oid(path, content)}"', "Accept-Ranges": "bytes"}
        if path.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{_oid(path, content)}"', "X-Linked-Size": str(len(content))}
        if self.command == "GET" and path in self.hub.lies:
            content = self.hub.lies[path]
        self._send(content, headers)

    def validate(self, query: Any, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [self.hub.card_error] if self.hub.card_error else []
        try:
            head = yaml.safe_load(content.split("---\n")[1])
            errors += [f'"{key}" is required' for key in ("tags",) if key not in head]
        except (IndexError, yaml.YAMLError) as exc:
            errors.append(str(exc))
        said = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._json(said, 400 if errors else 200)

    def preupload(self, query: Any, body: bytes, name: str, revision: str) -> None:
        if "create_pr" not in query and not self._writer(name):
            return
        if (found := self._found(name, revision)) is None:
            return
        there = found[0].commits[found[1]]
        files = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            row = {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
            files.append(row | ({"oid": _oid(path, there[path])} if path in there else {}))
        self._json({"files": files})

    def batch(self, query: Any, body: bytes, name: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            oid = asked["oid"]
            actions = {"upload": {"href": f"{self.hub.url}/large/{oid}"}, "verify": {"href": f"{self.hub.url}/verify"}}
            objects.append(asked | ({} if oid in self.hub.large else {"actions": actions}))
        self._json({"objects": objects, "transfer": "basic"})

    def put(self, query: Any, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._error(400, "not what was announced")
            return
        self.hub.large[oid] = body
        self._send(b"", {})

    def verify(self, query: Any, body: bytes) -> None:
        asked = json.loads(body)
        good = len(self.hub.large.get(asked["oid"], b"")) == asked["size"]
        self._json({}, 200 if good else 400)

    def commit(self, query: Any, body: bytes, name: str, revision: str) -> None:
        proposed = "create_pr" in query
        if not proposed and not self._writer(name):
            return
        if (found := self._found(name, revision)) is None:
            return
        repository, oid = found
        files = dict(repository.commits[oid])
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header" and value.get("parentCommit") not in (None, oid):
                self._error(412, "A commit has happened since. Please refresh and try again.")
                return
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        new = repository.commit(files, "refs/pr/1" if proposed else "main")
        page = {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"} if proposed else {}
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{new}", "commitOid": new, **page})


_NAME, _REV = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", "/api/models", Handler.listed),
    ("GET", f"/api/models/{_NAME}", Handler.info),
    ("GET", f"/api/models/{_NAME}/revision/{_REV}", Handler.info),
    ("GET", f"/api/models/{_NAME}/refs", Handler.refs),
    ("GET", f"/api/models/{_NAME}/tree/{_REV}(?:/(?P<under>.*))?", Handler.tree),
    ("POST", f"/api/models/{_NAME}/preupload/{_REV}", Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/{_REV}", Handler.commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/large/(?P<oid>[0-9a-f]+)", Handler.put),
    ("POST", "/verify", Handler.verify),
    ("HEAD", f"/{_NAME}/resolve/{_REV}/(?P<path>.+)", Handler.resolve),
    ("GET", f"/{_NAME}/resolve/{_REV}/(?P<path>.+)", Handler.resolve),
]


def _oid(path: str, content: bytes) -> str:
    """As git names a blob, or as LFS does."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "oid": _oid(path, content), "size": len(content)}
    if path.endswith(LARGE):
        row["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 134}
    return row


def _described(name: str, repository: Repository, files: dict[str, bytes]) -> dict[str, Any]:
    head: dict[str, Any] = {}
    if "README.md" in files:
        head = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    tags = list(head.get("tags", []))
    if head.get("base_model"):
        tags.append(f"base_model:{head['base_model']}")
    return {"id": name, "modelId": name, "private": repository.private, "tags": tags, "downloads": 3, "likes": 0}


if __name__ == "__main__":
    with Hub().serving(int(sys.argv[1])) as served:
        print(served.url, flush=True)
        threading.Event().wait()
