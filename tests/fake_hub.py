"""A hub on this machine: the few addresses of the real one that fetching a model asks for, with its refusals."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_the_right_one"

_FILE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
_TREE = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/tree/([^/?]+)")


@dataclass
class FakeHub:
    """Repositories by name, each a folder at one commit, known as ``main`` and ``v1``; and what was asked, in order.

    ``gated`` and ``private`` repositories answer to ``TOKEN`` alone. Of the files in ``cut``, half is sent once.
    ``broken``: every answer is this status.
    """

    address: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    broken: int = 0
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def fetched(self) -> set[str]:
        """Return the names of the files whose content was sent."""
        return {found[3] for method, path, _ in self.asked if method == "GET" and (found := _FILE.fullmatch(path))}

    def refusal(self, name: str, revision: str, token: str) -> tuple[int, str] | None:
        """Return the status and the hub's code for what may not be read, None if it may."""
        if self.broken:
            return self.broken, ""
        allowed = token == f"Bearer {TOKEN}"
        if name not in self.repositories or (name in self.private and not allowed):
            return 401, "RepoNotFound"
        if name in self.gated and not allowed:
            return 403, "GatedRepo"
        return None if revision in (COMMIT, "main", "v1") else (404, "RevisionNotFound")


@contextmanager
def running() -> Iterator[FakeHub]:
    """Yield a hub that answers until the block ends."""
    hub = FakeHub()

    class Handler(_Handler):
        owner = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on standard error."""

    def _answer(self, body: bool) -> None:
        token = self.headers.get("authorization", "")
        self.owner.asked.append((self.command, self.path, token))
        file, tree = _FILE.fullmatch(self.path), _TREE.match(self.path)
        found = file or tree
        if found is None:
            return self._refuse(404, "")
        if refused := self.owner.refusal(found[1], found[2], token):
            return self._refuse(*refused)
        folder = self.owner.repositories[found[1]]
        if tree:
            names = sorted(path for path in folder.rglob("*") if path.is_file())
            rows = [
                {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": "0"} for path in names
            ]
            return self._send(json.dumps(rows).encode(), body, {"Content-Type": "application/json"})
        assert file
        path = folder / file[3]
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        data = path.read_bytes()
        return self._send(data, body, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, cut=body and path.name in self.owner.cut)

    def _send(self, data: bytes, body: bool, headers: dict[str, str], cut: bool = False) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(data) - start), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[start : len(data) // 2] if cut else data[start:])

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()
