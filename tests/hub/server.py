"""A Hugging Face hub on 127.0.0.1: repositories in memory, served as `huggingface_hub` and `datasets` ask for them.

    with LoopbackHub() as hub:
        hub.publish("owner/name", {"README.md": b"# hi", "data/train.jsonl": b"{}"})
        ...  # a process with HF_ENDPOINT=hub.url

Serves repository info, trees, path info and files (ETag, X-Repo-Commit, ranges; large files behind a redirect, as from
a CDN), for datasets and models, and takes uploads from clients with a token (`uploads.py`; set HF_HUB_DISABLE_XET=1).
Faults are added and removed while it runs. It never leaves this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from tests.hub import uploads

LFS_BYTES = 2048  # larger files are redirected to /cdn/, as LFS files are
_KINDS = {"datasets": "dataset", "models": "model"}


@dataclass
class Fault:
    """What goes wrong with requests whose path contains `where`, at most `times` times.

    `kind`: "truncate" closes the connection at the share `at` of the body, "hang" sends nothing for `seconds`, "short"
    sends the share `at` of the file as if it were all, "corrupt" sends other bytes of the right size, "flip" one other
    bit at `at`, "whole" the whole file whatever range was asked for, "status" answers with `code`, "stall" waits for
    `seconds` after the share `at` of the body and then closes.
    """

    kind: str
    where: str = ""
    method: str = "GET"
    code: int = 500
    seconds: float = 5.0
    at: float = 0.5
    times: int = 1_000_000

    def hits(self, method: str, path: str) -> bool:
        if self.times > 0 and self.method == method and self.where in path:
            self.times -= 1
            return True
        return False


@dataclass
class Repository:
    """Commits of one repository, oldest first: sha -> path -> bytes."""

    kind: str
    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        """The sha of a revision: "main" or a sha."""
        return list(self.commits)[-1] if revision == "main" else revision if revision in self.commits else None


class LoopbackHub:
    """See the module; `faults` and `moved` (old id -> new id) may be changed at any time, `requests` is what came."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.moved: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []  # the Range headers that came
        self.private: set[str] = set()  # models that were created as private
        self.blobs: dict[str, bytes] = {}
        self._ports = [0, 0]  # the hub's, and that of the CDN it redirects to
        self._stopping = threading.Event()
        self.start()

    def start(self) -> None:
        """Listen; after `stop`, on the same port again."""
        hub = self
        self._stopping.clear()

        class Handler(_Handler):
            served = hub

        self._servers = [_Server(("127.0.0.1", port), Handler) for port in self._ports]
        self._ports = [int(server.server_address[1]) for server in self._servers]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Stop listening: connections are refused from now on."""
        self._stopping.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.hang_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._ports[1]}"

    def publish(self, name: str, files: Mapping[str, bytes], *, kind: str = "dataset") -> str:
        """Add a commit that holds exactly `files`; returns its sha."""
        repository = self.repositories.setdefault((kind, name), Repository(kind, name))
        digest = hashlib.sha1(f"{name}/{len(repository.commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(f"{path}\0{len(content)}\0".encode() + content)
            self.blobs[hashlib.sha256(content).hexdigest()] = content
        repository.commits[digest.hexdigest()] = dict(files)
        return digest.hexdigest()

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than the hub runs."""
        self._stopping.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close connections that clients kept alive."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: LoopbackHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        split = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(split.path)
        self.served.requests.append(f"{self.command} {path}")
        fault = next((fault for fault in self.served.faults if fault.hits(self.command, path)), None)
        try:
            if fault is not None and fault.kind == "hang":
                self.served.sleep(fault.seconds)
                self.close_connection = True
            elif fault is not None and fault.kind == "status":
                self._error(fault.code, "", "a planned fault")
            elif (taken := uploads.take(self.served, self.command, path, self.headers, body)) is not None:
                self._send(taken[0], json.dumps(taken[1]).encode(), {"Content-Type": "application/json"})
            elif path.startswith("/cdn/"):
                self._file(self.served.blobs[path.removeprefix("/cdn/")], {}, fault)
            elif path.startswith("/api/"):
                self._api(split.path.removeprefix("/api/"), urllib.parse.parse_qs(split.query), body)
            elif "/resolve/" in path:
                self._resolve(split.path, fault)
            else:
                self._error(404, "", "no such page")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # Repositories

    def _repository(self, kind: str, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the sha of a revision; None after an error or a redirect was sent."""
        if name in self.served.moved:
            self._send(307, b"", {"Location": self.path.replace(f"/{name}/", f"/{self.served.moved[name]}/", 1)})
            return None
        found = self.served.repositories.get((kind, name))
        if found is None:
            self._error(401, "RepoNotFound", "Invalid username or password.")
            return None
        sha = found.find(revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return found, sha

    def _api(self, path: str, query: Mapping[str, list[str]], body: bytes) -> None:
        kinds, _, rest = path.partition("/")
        for verb in ("/revision/", "/tree/", "/paths-info/", ""):
            name, found, tail = rest.partition(verb) if verb else (rest, "/revision/", "main")
            if found and kinds in _KINDS:
                break
        else:
            return self._error(404, "", "no such call")
        revision, _, folder = tail.partition("/")
        revision, folder = urllib.parse.unquote(revision), urllib.parse.unquote(folder)
        if (here := self._repository(_KINDS[kinds], name, revision)) is None:
            return None
        repository, sha = here
        files = repository.commits[sha]
        if verb == "/tree/":
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            return self._json(_tree(files, folder, recursive))
        if verb == "/paths-info/":
            wanted = urllib.parse.parse_qs(body.decode()).get("paths", [])
            everything = {entry["path"]: entry for entry in _tree(files, "", True)}
            return self._json([everything[name] for name in wanted if name in everything])
        siblings = [{"rfilename": name} for name in files]
        private = repository.name in self.served.private
        about = {
            "id": repository.name,
            "sha": sha,
            "private": private,
            "gated": False,
            "tags": [],
            "siblings": siblings,
        }
        return self._json(about)

    def _resolve(self, path: str, fault: Fault | None) -> None:
        """/datasets/OWNER/NAME/resolve/REVISION/FILE, without /datasets for models."""
        front, _, tail = path.lstrip("/").partition("/resolve/")
        kind = "dataset" if front.startswith("datasets/") else "model"
        revision, _, file = (urllib.parse.unquote(part) for part in tail.partition("/"))
        here = self._repository(kind, front.removeprefix("datasets/"), revision)
        if here is None:
            return
        repository, sha = here
        commit = {"X-Repo-Commit": sha}
        content = repository.commits[sha].get(file)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", commit)
        if len(content) <= LFS_BYTES:
            return self._file(content, {**commit, "ETag": f'"{_git_oid(content)}"'}, fault)
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "ETag": f'"{digest}"'}
        return self._send(302, b"", {**commit, **linked, "Location": f"{self.served.cdn}/cdn/{digest}"})

    # Answers

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, text: str, headers: Mapping[str, str] | None = None) -> None:
        about = {**(headers or {}), "X-Error-Message": text, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": text}).encode(), about)

    def _file(self, content: bytes, headers: Mapping[str, str], fault: Fault | None) -> None:
        if fault is not None and fault.kind == "short":
            content = content[: int(len(content) * fault.at)]
        if fault is not None and fault.kind == "corrupt":
            content = bytes(byte ^ 0x55 for byte in content)
        if fault is not None and fault.kind == "flip":
            spot = int(len(content) * fault.at)
            content = content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :]
        status, about = 200, {**headers, "Accept-Ranges": "bytes"}
        whole = fault is not None and fault.kind == "whole"
        if asked := self.headers.get("Range", ""):
            self.served.ranges.append(asked)
        if asked.startswith("bytes=") and not whole:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            total, start = len(content), int(first)
            end = min(int(last) + 1, total) if last else total
            if start >= total:
                return self._send(416, b"", {"Content-Range": f"bytes */{total}"})
            status, content = 206, content[start:end]
            about["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
        self._send(status, content, about, fault)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.kind in ("truncate", "stall"):
            self.wfile.write(body[: int(len(body) * fault.at)])
            if fault.kind == "stall":
                self.wfile.flush()
                self.served.sleep(fault.seconds)
            self.close_connection = True
            return
        self.wfile.write(body)


def _tree(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries under a folder, as the hub lists them."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            inner = prefix + "/".join(parts[:depth])
            entries[inner] = {"type": "directory", "path": inner, "size": 0, "oid": _git_oid(inner.encode())}
        if recursive or len(parts) == 1:
            entries[path] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            if len(content) > LFS_BYTES:
                digest = hashlib.sha256(content).hexdigest()
                entries[path]["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
    return list(entries.values())


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
