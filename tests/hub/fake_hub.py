"""
A Hugging Face Hub in memory, for tests: repositories with commits, large files in a store of their own, and faults on
demand.

Clients read `HF_ENDPOINT` when huggingface_hub is imported: run them in processes of their own, with
`FakeHub.environment`.
"""

import base64
import hashlib
import json
import os
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


USER = "tester"
LARGE_FILES = (".safetensors", ".png")


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A `main` branch; what its first commit holds is what the Hub puts into a new repository."""

    commits: list[Commit] = field(
        default_factory=lambda: [Commit("0" * 40, "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})]
    )

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    @property
    def files(self) -> dict[str, bytes]:
        return self.head.files

    def commit(self, title: str, files: dict[str, bytes]) -> Commit:
        listing = repr((len(self.commits), sorted((name, git_oid(content)) for name, content in files.items())))
        self.commits.append(Commit(hashlib.sha1(listing.encode()).hexdigest(), title, files))
        return self.head


@dataclass
class Answer:
    status: int
    content: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer other than the one that was asked for."""

    def __init__(self, status: int, code: str):
        self.answer = Answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})


class FakeHub:
    """
    Use as a context manager.

    `faults` maps a regular expression for "METHOD path" to what happens to such requests: a status code, or `"cut"`
    for a connection that ends in the middle of the answer. Files with one of `large_suffixes` are kept outside of git.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.large_suffixes = LARGE_FILES
        self.faults: dict[str, int | str] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def serve(self):
                hub.serve(self)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        # Another host's name, as in reality: clients treat a redirect to the Hub itself as a repository that has moved.
        self.storage = f"http://localhost:{self.server.server_port}/store"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a client process. `home` holds its caches."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_fake",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }

    def put(self, name: str, folder: Path) -> Repository:
        """Publish a folder as the repository `tester/name`."""
        files = {
            file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
        }
        repository = self.repositories[f"{USER}/{name}"] = Repository()
        repository.commit("published", files)
        return repository

    # -- requests

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(handler.path)
        path = urllib.parse.unquote(url.path)
        request = f"{handler.command} {path}"
        self.requests.append(request)
        fault = next((fault for pattern, fault in self.faults.items() if re.search(pattern, request)), None)
        if isinstance(fault, int):
            answer = Answer(fault, {"error": f"fault {fault}"})
        else:
            try:
                answer = self.route(handler.command, path, urllib.parse.parse_qs(url.query), body)
            except Refusal as refusal:
                answer = refusal.answer
        self.send(handler, answer, cut=fault == "cut")

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, answer: Answer, cut: bool) -> None:
        content = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
        asked_range = re.fullmatch(r"bytes=(\d+)-.*", handler.headers.get("Range") or "")
        if asked_range and answer.status == 200:
            start = int(asked_range[1])
            answer.headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            answer.status, content = 206, content[start:]
        handler.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content[: len(content) // 2] if cut else content)
        handler.close_connection = cut

    def route(self, method: str, path: str, query: dict, body: bytes) -> Answer:
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            user = {"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
            return Answer(200, user)
        if path == "/api/validate-yaml":
            return Answer(200, {"errors": [], "warnings": []})
        if path in ("/api/repos/create", "/api/repos/delete"):
            request = json.loads(body)
            name = f"{request.get('organization') or USER}/{request['name']}"
            return self.create(name) if path.endswith("create") else self.delete(name)
        if parts[0] == "store":
            return self.store(method, parts[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(path.removesuffix(".git/info/lfs/objects/batch").strip("/"), json.loads(body))
        if parts[:2] == ["api", "models"]:
            return self.api("/".join(parts[2:4]), parts[4:], query, body)
        if parts[2:3] == ["resolve"]:
            return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return Answer(404, {"error": f"no route for {method} {path}"})

    # -- repositories

    def create(self, name: str) -> Answer:
        url = f"{self.endpoint}/{name}"
        if name in self.repositories:
            return Answer(409, {"error": "You already created this model repo", "url": url})
        self.repositories[name] = Repository()
        return Answer(200, {"url": url, "name": name, "id": "1"})

    def delete(self, name: str) -> Answer:
        self.repository(name)
        del self.repositories[name]
        return Answer(200, {})

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise Refusal(404, "RepoNotFound")
        return self.repositories[name]

    def revision(self, name: str, revision: str) -> Commit:
        repository = self.repository(name)
        if revision == "main":
            return repository.head
        found = [commit for commit in repository.commits if commit.oid == revision]
        if not found:
            raise Refusal(404, "RevisionNotFound")
        return found[0]

    def api(self, name: str, rest: list[str], query: dict, body: bytes) -> Answer:
        action = rest[0] if rest else "revision"
        if action == "preupload":
            return self.preupload(self.repository(name), json.loads(body)["files"])
        if action == "commit":
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        commit = self.revision(name, rest[1] if len(rest) > 1 else "main")
        if action == "tree":
            return Answer(200, self.tree(commit.files, "/".join(rest[2:]), query))
        if action == "paths-info":
            return Answer(200, self.paths_info(commit.files, body))
        siblings = [{"rfilename": file} for file in sorted(commit.files)]
        facts = {"id": name, "modelId": name, "_id": "1", "private": False, "tags": [], "downloads": 0, "likes": 0}
        return Answer(200, {**facts, "sha": commit.oid, "siblings": siblings})

    def is_large(self, name: str) -> bool:
        return name.endswith(self.large_suffixes)

    def entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if self.is_large(path):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return entry

    def tree(self, files: dict[str, bytes], folder: str, query: dict) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        entries, folders = [], set()
        for name, content in sorted(files.items()):
            if not name.startswith(prefix):
                continue
            if "/" in name[len(prefix) :] and not recursive:
                folders.add(prefix + name[len(prefix) :].split("/")[0])
            else:
                entries.append(self.entry(name, content))
        return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)] + entries

    def paths_info(self, files: dict[str, bytes], body: bytes) -> list[dict]:
        paths = urllib.parse.parse_qs(body.decode()).get("paths", [])
        return [self.entry(path, files[path]) for path in paths if path in files]

    # -- pushes

    def preupload(self, repository: Repository, files: list[dict]) -> Answer:
        def how(path: str) -> dict:
            known = repository.files.get(path)
            oid = None if known is None else sha256(known) if self.is_large(path) else git_oid(known)
            mode = "lfs" if self.is_large(path) else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return Answer(200, {"files": [how(file["path"]) for file in files]})

    def batch(self, name: str, request: dict) -> Answer:
        self.repository(name)
        objects = []
        for wanted in request["objects"]:
            url = f"{self.storage}/{wanted['oid']}"
            known = wanted["oid"] in self.large_files
            objects.append(
                {**wanted, **({} if known else {"actions": {"upload": {"href": url}, "verify": {"href": url}}})}
            )
        return Answer(200, {"transfer": "basic", "objects": objects})

    def store(self, method: str, oid: str, body: bytes) -> Answer:
        if method == "PUT":
            if sha256(body) != oid:
                return Answer(400, {"error": "wrong sha256"})
            self.large_files[oid] = body
            return Answer(200)
        if oid not in self.large_files:
            return Answer(404, {"error": "no such object"})
        return Answer(200, self.large_files[oid] if method in ("GET", "HEAD") else {})

    def commit(self, name: str, lines: list[dict]) -> Answer:
        repository, title = self.repository(name), ""
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, repository.head.oid):
                    return Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large_files:
                    return Answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        oid = repository.commit(title, files).oid
        url = f"{self.endpoint}/{name}/commit/{oid}"
        return Answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # -- downloads

    def resolve(self, name: str, revision: str, file: str) -> Answer:
        commit = self.revision(name, revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if file not in commit.files:
            return Answer(404, {"error": "no such file"}, {**headers, "X-Error-Code": "EntryNotFound"})
        content = commit.files[file]
        if not self.is_large(file):
            return Answer(200, content, {**headers, "ETag": f'"{git_oid(content)}"'})
        self.large_files[sha256(content)] = content
        linked = {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        return Answer(302, b"", {**headers, **linked, "Location": f"{self.storage}/{sha256(content)}"})
