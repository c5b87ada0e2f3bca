"""As much of Google Cloud Storage's JSON interface on 127.0.0.1 as gcsfs asks of it for small objects."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)")
_LISTING = re.compile(r"(?:/upload)?/storage/v1/b/([^/]+)/o")


@contextmanager
def serve_gcs() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Its address, and the objects by bucket/name."""
    objects: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            if found := _OBJECT.fullmatch(url.path):
                name = f"{found[1]}/{unquote(found[2])}"
                if name not in objects:
                    self.answer(404, {"error": {"code": 404, "message": "No such object"}})
                elif "alt" in query:
                    self.answer(200, objects[name])
                else:
                    self.answer(200, describe(name))
            elif found := _LISTING.fullmatch(url.path):
                prefix = f"{found[1]}/{query.get('prefix', [''])[0]}"
                self.answer(200, {"items": [describe(name) for name in objects if name.startswith(prefix)]})
            else:
                self.answer(404, {"error": {"code": 404, "message": "Not found"}})

        def do_POST(self) -> None:
            found = _LISTING.fullmatch(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
            _, metadata, data, _ = body.split(boundary)
            assert found is not None
            key = json.loads(metadata.partition(b"\n\n")[2])["name"]
            name = f"{found[1]}/{key}"
            objects[name] = data.partition(b"\n\n")[2].removesuffix(b"\n")
            self.answer(200, describe(name))

        def answer(self, status: int, what: bytes | dict[str, Any]) -> None:
            data = what if isinstance(what, bytes) else json.dumps(what).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/octet-stream" if isinstance(what, bytes) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            # gcsfs asks in two ways at once whether something exists, and hangs up on the slower one
            with suppress(OSError):
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    def describe(name: str) -> dict[str, Any]:
        bucket, _, key = name.partition("/")
        digest = base64.b64encode(hashlib.md5(objects[name], usedforsecurity=False).digest()).decode()
        return {"kind": "storage#object", "bucket": bucket, "name": key, "size": str(len(objects[name])), "md5Hash": digest}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
