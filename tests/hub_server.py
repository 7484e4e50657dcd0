"""A small Hugging Face Hub over real HTTP, for tests: huggingface_hub's own client does every transfer against it.

    with HubServer() as hub:
        HfApi(endpoint=hub.url, token=hub.token).create_repo("user/name")

It keeps repositories in memory: commits, branches, tags, regular and LFS files. "datasets/user/name" is a data set, which can be read.
It can be told to fail: `hub.faults.append(Fault(...))`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".png", ".wav", ".model")


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """Branches and tags name commits; a commit is a whole set of files, so a revision is always whole."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], branch: str = "main") -> str:
        parent = self.branches.get(branch, "")
        names = "".join(f"{name} {file.oid}\n" for name, file in sorted(files.items()))
        oid = hashlib.sha1(f"{parent}\n{len(self.commits)}\n{names}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return oid if oid in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Name -> bytes of every file at a revision."""
        return {name: file.data for name, file in self.commits[self.branches.get(revision) or self.tags[revision]].items()}


@dataclass
class Fault:
    """Goes wrong `times` times on requests whose method and path match.

    kind: "status" answers `status`; "drop" breaks the connection off in the middle; "cut" sends half of a file, and says so in its length;
    "shrink" does that in the HEAD request too, as if half were all there is; "call" runs `call` first and then answers as usual.
    """

    kind: str
    path: str
    method: str = "GET|HEAD|POST|PUT"
    status: int = 500
    times: int = 1
    call: Callable[[], Any] | None = None

    def matches(self, method: str, path: str) -> bool:
        return self.times > 0 and re.fullmatch(self.method, method) is not None and re.search(self.path, path) is not None


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", **more: str):
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class HubServer:
    """The server, its repositories, its faults and a log of "METHOD path" lines."""

    def __init__(self, token: str = "hf_dummyTokenForTests"):
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: str) -> dict[str, str]:
        """What a subprocess needs in its environment to take this for the Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": self.token,
            "HF_HOME": home,
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def add(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Put a commit there from behind, without HTTP: these files over those of the branch."""
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo())
            old = repo.commits.get(repo.branches.get(branch, ""), {})
            return repo.commit({**old, **{name: File(data, name.endswith(LFS_SUFFIXES)) for name, data in files.items()}}, branch)

    def pick_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.log.append(f"{method} {path}")
            for fault in self.faults:
                if fault.matches(method, path):
                    fault.times -= 1
                    return fault
        return None


ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "store"),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", "check"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/tag/(?P<rev>[^/]+)", "tag"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "branch"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
    ("GET", r"/api/(models/)?(?P<repo>(datasets/)?[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(/(?P<folder>.+))?", "tree"),
    ("GET", r"/api/(models/)?(?P<repo>(datasets/)?[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?", "info"),
    ("GET|HEAD", r"/(?P<repo>(datasets/)?[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<name>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    """One request. The `on_...` methods return JSON; `on_resolve` sends a file."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr: `hub.log` keeps the requests."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path = urlsplit(self.path).path
        fault = self.hub.pick_fault(self.command, path)
        self.fault = fault.kind if fault else ""
        if self.fault == "drop" and self.command == "PUT":
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            return self.hang_up()
        self.body = self.read_body()
        if self.fault == "drop" and "/resolve/" not in path:
            return self.hang_up()
        if fault and fault.call:
            fault.call()
        try:
            if fault and fault.kind == "status":
                raise Refused(fault.status, f"injected {fault.status}")
            with self.hub.lock:
                reply = self.route(path)
            if reply is not None:
                self.send(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})
        except Refused as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.send(refusal.status, json.dumps({"error": str(refusal), **refusal.more}).encode(), headers)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def route(self, path: str) -> Any:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(method, self.command):
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return getattr(self, f"on_{name}")(**groups)
        raise Refused(404, f"no such route: {self.command} {path}")

    # --- who may do what -------------------------------------------------------------------------------------------------------------
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def must_be_known(self) -> None:
        if not self.known():
            raise Refused(401, "Invalid username or password.")

    def repository(self, repo: str) -> Repo:
        if repo not in self.hub.repos or (self.hub.repos[repo].private and not self.known()):
            raise Refused(404 if self.known() else 401, f"Repository {repo} not found", "RepoNotFound")
        return self.hub.repos[repo]

    def at(self, repo: Repo, rev: str) -> str:
        oid = repo.resolve(rev)
        if oid is None:
            raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return oid

    # --- writing ---------------------------------------------------------------------------------------------------------------------
    def on_whoami(self) -> Any:
        self.must_be_known()
        return {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def on_create(self) -> Any:
        self.must_be_known()
        wish = json.loads(self.body)
        repo_id = f"{wish.get('organization') or 'user'}/{wish['name']}"
        if repo_id in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.url}/{repo_id}")
        private = wish.get("visibility") == "private" or bool(wish.get("private"))
        self.hub.repos[repo_id] = repo = Repo(private=private)
        repo.commit({".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        return {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}

    def on_validate(self) -> Any:
        return {"errors": [], "warnings": []}

    def on_preupload(self, repo: str, rev: str) -> Any:
        self.must_be_known()
        repository = self.repository(repo)
        old = repository.commits[self.at(repository, rev)]
        files = []
        for wish in json.loads(self.body)["files"]:
            name = wish["path"]
            mode = "lfs" if name.endswith(LFS_SUFFIXES) or wish["size"] > 10_000_000 else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": old[name].oid if name in old else None})
        return {"files": files}

    def on_batch(self, repo: str) -> Any:
        self.must_be_known()
        self.repository(repo)
        objects = []
        for wish in json.loads(self.body)["objects"]:
            href = f"{self.hub.url}/lfs/{wish['oid']}"
            actions = (
                {} if wish["oid"] in self.hub.objects else {"actions": {"upload": {"href": href}, "verify": {"href": href + "/verify"}}}
            )
            objects.append({"oid": wish["oid"], "size": wish["size"], **actions})
        return {"transfer": "basic", "objects": objects}

    def on_store(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the object has another hash")
        self.hub.objects[oid] = self.body
        return {}

    def on_check(self, oid: str) -> Any:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refused(404, "the object is not whole")
        return {}

    def on_commit(self, repo: str, rev: str) -> Any:
        self.must_be_known()
        repository = self.repository(repo)
        if rev not in repository.branches:
            raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        files = dict(repository.commits[repository.branches[rev]])
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            self.apply(item["key"], item["value"], files, repository.branches[rev])
        oid = repository.commit(files, rev)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "hookOutput": ""}

    def apply(self, key: str, value: dict[str, Any], files: dict[str, File], head: str) -> None:
        if key == "header" and value.get("parentCommit") not in (None, head):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        if key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise Refused(400, f"LFS object {value['oid']} was never uploaded")
            files[value["path"]] = File(self.hub.objects[value["oid"]], True)
        elif key == "deletedFile" and files.pop(value["path"], None) is None:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")

    def on_tag(self, repo: str, rev: str) -> Any:
        self.must_be_known()
        repository, name = self.repository(repo), json.loads(self.body)["tag"]
        if name in repository.tags:
            raise Refused(409, "Tag reference exists already")
        repository.tags[name] = self.at(repository, rev)
        return {}

    def on_branch(self, repo: str, rev: str) -> Any:
        self.must_be_known()
        repository = self.repository(repo)
        if rev in repository.branches:
            raise Refused(409, "Branch reference exists already")
        repository.branches[rev] = self.at(repository, json.loads(self.body or b"{}").get("startingPoint") or "main")
        return {}

    # --- reading ---------------------------------------------------------------------------------------------------------------------
    def on_refs(self, repo: str) -> Any:
        repository = self.repository(repo)
        lists = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        return {
            kind: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": oid} for name, oid in names.items()]
            for kind, (ref, names) in lists.items()
        } | {"converts": []}

    def on_tree(self, repo: str, rev: str, folder: str = "") -> Any:
        repository = self.repository(repo)
        entries = []
        for name, file in sorted(repository.commits[self.at(repository, rev)].items()):
            if not folder or name.startswith(folder + "/"):
                pointer = {"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 134}} if file.lfs else {}
                entries.append({"type": "file", "path": name, "size": len(file.data), "oid": file.oid[:40], **pointer})
        return entries

    def on_info(self, repo: str, rev: str = "main") -> Any:
        repository = self.repository(repo)
        oid = self.at(repository, rev)
        siblings = [{"rfilename": name} for name in sorted(repository.commits[oid])]
        return {
            "id": repo.removeprefix("datasets/"),
            "modelId": repo,
            "sha": oid,
            "private": repository.private,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def on_resolve(self, repo: str, rev: str, name: str) -> None:
        repository = self.repository(repo)
        oid = self.at(repository, rev)
        file = repository.commits[oid].get(name)
        if file is None:
            raise Refused(404, f"Entry not found: {name}", "EntryNotFound")
        data = file.data
        if self.fault == "shrink" or (self.fault == "cut" and self.command == "GET"):
            data = data[: len(data) // 2]
        headers = {"ETag": f'"{file.oid}"', "X-Repo-Commit": oid, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(data))}
        self.send_file(data, headers)

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        status, begin = 200, re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if begin:
            start = int(begin[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
        if self.fault == "drop" and self.command == "GET":
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return self.hang_up()
        self.send(status, data, headers)
