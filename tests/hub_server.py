"""A model Hub on this machine: what huggingface_hub's client asks for, over HTTP, with a history of commits.

Repositories are kept in memory, files by their SHA-256 in a folder. There is one user, `tester`, with one token that
may write. Models only, no Xet, no pull requests; large files are sent by the Hub itself, not by another server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

USER = "tester"
LFS_SUFFIXES = (".bin", ".npy", ".npz", ".parquet", ".pt", ".safetensors")
LFS_BYTES = 10 * 2**20
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """An answer other than 200: its status, the Hub's code for it, a message, further headers."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


def lfs_pointer(sha256: str, size: int) -> bytes:
    """Return what git holds of a file that is kept beside it."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Blob:
    """A file's content: its SHA-256, its size, its id in git, and whether it is kept beside git."""

    sha256: str
    size: int
    git_id: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_id

    def describe(self, path: str) -> dict:
        """Return what a listing of files says of it."""
        entry = {"type": "file", "path": path, "oid": self.git_id, "size": self.size}
        pointer_size = len(lfs_pointer(self.sha256, self.size))
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": pointer_size}
        return {**entry, "lfs": lfs} if self.lfs else entry


@dataclass(frozen=True)
class Commit:
    """A repository's files at one time."""

    id: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repository:
    """Commits, and the branches and tags that name some of them."""

    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        """Return the commit that a branch, a tag or a SHA stands for."""
        found = self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def commit(self, branch: str, files: dict[str, Blob], title: str, message: str = "") -> Commit:
        """Add a commit of these files to a branch, which begins with it if it is new."""
        parent = self.branches.get(branch)
        content = {path: blob.etag for path, blob in sorted(files.items())}
        sha = hashlib.sha1(json.dumps([self.id, len(self.commits), parent, title, content]).encode()).hexdigest()
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.commits[sha] = Commit(sha, parent, title, message, date, files)
        self.branches[branch] = sha
        return self.commits[sha]

    def history(self, revision: str) -> list[Commit]:
        """Return a revision's commits, the latest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


class HubServer:
    """A Hub at `url`, while the `with` block lasts.

    Args:
        root: An existing folder for the files' contents.

    Attributes:
        url: Its address, for `HF_ENDPOINT`.
        token: The user's token, which may read and write everything.
        cut_downloads_after: The next answer of more bytes than this loses its connection after so many, once.
        requests: Method and path, without the query, of every request so far.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self.token = "hf_" + "t" * 34
        self.cut_downloads_after: int | None = None
        self.requests: list[tuple[str, str]] = []
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def store(self, content: bytes) -> Blob:
        """Keep a file's content and return what stands for it."""
        sha256 = hashlib.sha256(content).hexdigest()
        (self.root / sha256).write_bytes(content)
        return self.blob(sha256, lfs=False)

    def blob(self, sha256: str, *, lfs: bool) -> Blob:
        """Return what stands for content that is kept already."""
        file = self.root / sha256
        if not file.is_file():
            raise HubError(400, f"The object {sha256} was never uploaded.")
        in_git = file.read_bytes()
        size = len(in_git)
        if lfs:
            in_git = lfs_pointer(sha256, size)
        return Blob(sha256, size, hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest(), lfs)


_ID, _REV = r"(?P<repo>[\w.-]+/[\w.-]+?)", r"(?P<revision>[^/]+)"
_MODEL = rf"/api/models/{_ID}"
_ROUTES = [
    (method, re.compile(pattern), name)
    for method, pattern, name in [
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("POST", "/api/repos/create", "create_repository"),
        ("GET", rf"{_MODEL}(/revision/{_REV})?", "model_info"),
        ("GET", rf"{_MODEL}/commits/{_REV}", "history"),
        ("GET", rf"{_MODEL}/tree/{_REV}(/(?P<path>.+))?", "tree"),
        ("POST", rf"{_MODEL}/(?P<kind>tag|branch)/{_REV}", "create_reference"),
        ("POST", rf"{_MODEL}/preupload/{_REV}", "preupload"),
        ("POST", rf"{_MODEL}/commit/{_REV}", "commit"),
        ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/{_ID}\.git/info/lfs/verify", "lfs_verify"),
        ("PUT", "/objects/(?P<sha256>[0-9a-f]{64})", "put_object"),
        ("GET", rf"/{_ID}/resolve/{_REV}/(?P<path>.+)", "resolve"),
    ]
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: `HubServer.requests` is the log."""

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        # The path keeps its escapes until it is split: a branch may have a slash in its name.
        split = urlsplit(self.path)
        self.hub.requests.append((self.command, unquote(split.path)))
        self.query = split.query
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for known, pattern, name in _ROUTES:
                if known == method and (match := pattern.fullmatch(split.path)):
                    named = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    return self._call(name, **named)
            raise HubError(404, f"{self.command} {split.path} is nothing that this Hub has.", "RepoNotFound")
        except HubError as error:
            headers = {"X-Error-Message": str(error), **error.headers}
            headers |= {"X-Error-Code": error.code} if error.code else {}
            self._answer({"error": str(error)}, status=error.status, **headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def _call(self, name: str, repo: str | None = None, **named: str) -> None:
        signed_in = self._signed_in()
        with self.hub.lock:
            if repo is not None:
                repository = self.hub.repositories.get(repo)
                if repository is None or (repository.private and not signed_in):
                    # Whoever may not see a repository is not told whether it exists.
                    message = "Repository not found" if signed_in else "Invalid username or password."
                    raise HubError(404 if signed_in else 401, message, "RepoNotFound")
                if self.command == "POST" and not signed_in:
                    raise HubError(401, "Invalid username or password.")
            arguments = {} if repo is None else {"repository": repository}
            send = getattr(self, name)(**arguments, **named)
        # Sending a file may take long: others are served meanwhile.
        send() if callable(send) else self._answer(send)

    def _signed_in(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.hub.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        return given is not None

    def _answer(self, content: object, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(content).encode(), status, **{"Content-Type": "application/json"}, **headers)

    def _send(self, body: bytes, status: int, **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.hub.lock:
            cut = self.hub.cut_downloads_after
            if cut is not None and cut < len(body):
                self.hub.cut_downloads_after, body, self.close_connection = None, body[:cut], True
        self.wfile.write(body)

    # -- accounts and repositories

    def whoami(self) -> dict:
        if not self._signed_in():
            raise HubError(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return {"type": "user", "id": "0", "name": USER, "fullname": USER, "orgs": [], "auth": token}

    def create_repository(self) -> dict | Callable[[], None]:
        self.whoami()
        given = json.loads(self.body)
        owner = given.get("organization") or USER
        if owner != USER:
            raise HubError(403, f"You don't have the rights to create a model under the namespace {owner!r}.")
        if given.get("type") not in (None, "model"):
            raise HubError(400, f"A repository of type {given['type']} was asked for: this Hub has models only.")
        name = f"{owner}/{given['name']}"
        created = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            refused = {"error": "You already created this model repo", **created}
            return lambda: self._answer(refused, status=409)
        repository = Repository(name, given.get("private") or given.get("visibility") == "private")
        repository.commit("main", {".gitattributes": self.hub.store(GIT_ATTRIBUTES)}, "initial commit")
        self.hub.repositories[name] = repository
        return created

    def validate_yaml(self) -> dict | Callable[[], None]:
        """Refuse a card whose metadata are no YAML mapping; its fields are not looked at."""
        front = re.match(r"---\n(.*?)\n?---(\n|$)", json.loads(self.body)["content"], re.DOTALL)
        if front is None or not front[1].strip():
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        try:
            if isinstance(found := yaml.safe_load(front[1]), dict):
                return {"errors": [], "warnings": []}
        except yaml.YAMLError as error:
            found = error
        refused = {"errors": [{"message": f"The metadata are no YAML mapping: {found}"}], "warnings": []}
        return lambda: self._answer(refused, status=400)

    # -- reading

    def model_info(self, repository: Repository, revision: str = "main") -> dict:
        commit = repository.resolve(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        dates = {"lastModified": commit.date, "createdAt": repository.history(revision)[-1].date}
        known = {"author": USER, "private": repository.private, "disabled": False, "gated": False, "tags": []}
        return {"id": repository.id, "modelId": repository.id, "sha": commit.id, "siblings": siblings, **dates, **known}

    def history(self, repository: Repository, revision: str) -> list[dict]:
        return [
            {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": USER}]}
            for c in repository.history(revision)
        ]

    def tree(self, repository: Repository, revision: str, path: str | None = None) -> list[dict]:
        files = repository.resolve(revision).files
        entries = {name: blob.describe(name) for name, blob in files.items()}
        for folder in {str(parent) for name in files for parent in list(Path(name).parents)[:-1]}:
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
        inside = f"{path}/" if path else ""
        listed = [name for name in sorted(entries) if name.startswith(inside)]
        if path and not listed:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = "recursive=true" in self.query.lower()
        return [entries[name] for name in listed if recursive or "/" not in name[len(inside) :]]

    def resolve(self, repository: Repository, revision: str, path: str) -> Callable[[], None]:
        commit = repository.resolve(revision)
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.id})
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{blob.etag}"'}
        if blob.lfs:
            headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"'}
        return lambda: self._send_file(blob.sha256, headers)

    def _send_file(self, sha256: str, headers: dict[str, str]) -> None:
        """Send a file or the range asked for."""
        content, status = (self.hub.root / sha256).read_bytes(), 200
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            size, first = len(content), int(span[1])
            content, status = content[first : int(span[2] or size) + 1], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{size}"
        self._send(content, status, **headers)

    # -- writing

    def create_reference(self, repository: Repository, kind: str, revision: str) -> dict:
        given = json.loads(self.body or b"{}")
        name, start = (given["tag"], revision) if kind == "tag" else (revision, given.get("startingPoint", "main"))
        known = repository.tags if kind == "tag" else repository.branches
        if name in known:
            raise HubError(409, f"The {kind} {name} exists already.")
        known[name] = repository.resolve(start).id
        return {}

    def preupload(self, repository: Repository, revision: str) -> dict:
        """Say which files go beside git: by their names, if they are large, or if they are no text."""
        known = repository.resolve(revision).files

        def plan(file: dict) -> dict:
            text = b"\0" not in base64.b64decode(file["sample"])
            lfs = not text or file["size"] > LFS_BYTES or file["path"].endswith(LFS_SUFFIXES)
            old = known[file["path"]].etag if file["path"] in known else None
            return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": old}

        return {"files": [plan(file) for file in json.loads(self.body)["files"]]}

    def lfs_batch(self, repository: Repository) -> dict:
        verify = {"href": f"{self.hub.url}/{repository.id}.git/info/lfs/verify"}
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if not (self.hub.root / wanted["oid"]).is_file():
                upload = {"href": f"{self.hub.url}/objects/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def put_object(self, sha256: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "The content is not what its SHA-256 says.")
        self.hub.store(self.body)
        return {}

    def lfs_verify(self, repository: Repository) -> dict:
        given = json.loads(self.body)
        if self.hub.blob(given["oid"], lfs=True).size != given["size"]:
            raise HubError(400, f"The object {given['oid']} has not the size that was announced.")
        return {}

    def commit(self, repository: Repository, revision: str) -> dict:
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *changes = (json.loads(line) for line in self.body.splitlines())
        files = dict(repository.resolve(revision).files)
        for change in changes:
            self._change(files, change["key"], change["value"])
        commit = repository.commit(revision, files, header["value"]["summary"], header["value"]["description"])
        url = f"{self.hub.url}/{repository.id}/commit/{commit.id}"
        return {"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": ""}

    def _change(self, files: dict[str, Blob], key: str, value: dict) -> None:
        path = value["path"]
        if key == "file":
            files[path] = self.hub.store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[path] = self.hub.blob(value["oid"], lfs=True)
        else:
            inside = path.rstrip("/") + "/"
            gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(inside))]
            if not gone:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]


def run_client(
    server: HubServer, code: str, *, token: bool = True, cache: Path, offline: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code against a server, with huggingface_hub's real client, in a process of its own.

    Args:
        server: The Hub.
        code: The program; its folder is the repository's root.
        token: Whether the user is signed in.
        cache: The client's `HF_HOME`, kept between calls that share it.
        offline: Whether the client is in offline mode.
        env: Further environment variables.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    hub = {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": str(int(offline))}
    hub |= {"HF_TOKEN": server.token} if token else {}
    hub |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    # A proxy, where one is set, does not know this machine.
    hub |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=inherited | hub | env, cwd=root, capture_output=True, text=True, timeout=300)
