"""A hub on 127.0.0.1 that speaks as much of the real one's HTTP as a download needs, and can be told to misbehave.

Large files are redirected to a second address, as the real hub does it: nobody's login must arrive there.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"
LARGE = (".safetensors", ".gguf", ".bin")  # in LFS, as the real hub has them


@dataclass
class Request:
    """sent: bytes of body. begin: where its range begins. is_download: by huggingface_hub, not by our range reader."""

    server: str
    method: str
    path: str
    begin: int
    is_download: bool
    authorization: str | None
    sent: int = 0


@dataclass
class FakeHub:
    """files: what the listing is made of, by repository and path. contents: what is sent in place of them."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    licenses: dict[str, dict[str, str]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)  # of each download in turn, bytes until the connection is cut
    stall_after: int | None = None
    length_too_large: int = 0
    ignores_ranges: bool = False
    wanted_token: str | None = None
    gated_status: int = 403
    listed_path: Callable[[str], str] = lambda path: path
    commit: str = COMMIT
    requests: list[Request] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    idle: threading.Condition = field(default_factory=threading.Condition)
    busy: int = 0
    endpoint: str = ""
    cdn: str = ""

    def add(self, repo: str, files: dict[str, bytes], license: str | None = "apache-2.0", **card: str) -> None:  # noqa: A002
        self.files[repo] = files
        self.licenses[repo] = ({"license": license} if license else {}) | card

    def wait(self) -> None:
        """Until all answers are out: a client may have all of one before the server has counted it."""
        with self.idle:
            assert self.idle.wait_for(lambda: not self.busy, timeout=10)

    def downloads(self, path: str) -> list[Request]:
        """The downloads of one file of which anything was sent."""
        self.wait()
        return [request for request in self.requests if request.is_download and request.path == path and request.sent]

    def downloaded_bytes(self, path: str) -> int:
        return sum(request.sent for request in self.downloads(path))

    def listing(self, repo: str) -> dict[str, Any]:
        siblings = []
        for path, data in self.files[repo].items():
            entry: dict[str, Any] = {"rfilename": self.listed_path(path), "size": len(data)}
            entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if path.endswith(LARGE):
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
            siblings.append(entry)
        return {"id": repo, "sha": self.commit, "siblings": siblings, "cardData": self.licenses[repo], "tags": []}


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, name)) for name in ("hub", "cdn")]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def _handler(hub: FakeHub, name: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError):  # the client may leave in the middle
                super().handle()

        def do_GET(self) -> None:
            with hub.idle:
                hub.busy += 1
            try:
                self._answer()
            finally:
                with hub.idle:
                    hub.busy -= 1
                    hub.idle.notify_all()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))
            request = Request(
                name,
                self.command,
                path.split("/resolve/")[-1].partition("/")[2],
                int(asked[1]) if asked else 0,
                "hf_hub" in self.headers.get("User-Agent", ""),
                self.headers.get("Authorization"),
            )
            hub.requests.append(request)
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self._send_listing(found[1], found[2])
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._send_file(request, found[1], found[3], asked)
            else:
                self._send(404, b"")

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _send_listing(self, repo: str, revision: str | None) -> None:
            if repo not in hub.files:
                self._send(404, b"", X_Error_Code="RepoNotFound")
            elif revision not in (None, "main", hub.commit):
                self._send(404, b"", X_Error_Code="RevisionNotFound")
            else:
                self._send(200, json.dumps(hub.listing(repo)).encode(), Content_Type="application/json")

        def _send_file(self, request: Request, repo: str, path: str, asked: re.Match[str] | None) -> None:
            if name == "hub" and hub.wanted_token and request.authorization != f"Bearer {hub.wanted_token}":
                self._send(hub.gated_status, b"", X_Error_Code="GatedRepo")
            elif path not in hub.files.get(repo, {}):
                self._send(404, b"", X_Error_Code="EntryNotFound")
            elif name == "hub" and path.endswith(LARGE):
                self._send(302, b"", Location=f"{hub.cdn}{self.path}", X_Repo_Commit=hub.commit)
            else:
                self._send_bytes(request, hub.contents.get(path, hub.files[repo][path]), asked)

        def _send_bytes(self, request: Request, data: bytes, asked: re.Match[str] | None) -> None:
            compresses = request.is_download and "gzip" in self.headers.get("Accept-Encoding", "")
            data = gzip.compress(data) if compresses else data
            begin, end = 0, len(data)
            if asked and not hub.ignores_ranges:
                begin, end = int(asked[1]), min(int(asked[2] or len(data) - 1) + 1, len(data))
                if begin >= len(data):
                    return self._send(416, b"")
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
            else:
                self.send_response(200)
            body = data[begin:end]
            if compresses:
                self.send_header("Content-Encoding", "gzip")
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(body) + (hub.length_too_large if request.is_download else 0)))
            self.end_headers()
            stop = hub.cut_after.pop(0) if hub.cut_after and request.is_download else None
            if request.is_download and hub.stall_after is not None:
                self._write(request, body[: hub.stall_after])
                hub.released.wait()
                stop = hub.stall_after
            else:
                self._write(request, body if stop is None else body[:stop])
            if stop is not None or hub.length_too_large:
                self.close_connection = True
            return None

        def _write(self, request: Request, data: bytes) -> None:
            self.wfile.write(data)
            self.wfile.flush()
            request.sent += len(data)

    return Handler
