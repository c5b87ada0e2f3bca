"""The question to the hub: every answer is a finding, and none takes longer than its limit."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from millicent.hardware.network import ask_hub, start_asking

REPO = "Qwen/Qwen-Image-Edit-2511"
Seen = list[tuple[str, str, str | None]]


@contextmanager
def serve(status: int, location: str | None = None, delay_s: float = 0) -> Iterator[tuple[str, Seen]]:
    """A hub that answers every HEAD with one status, and remembers method, path and token."""
    seen: Seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            seen.append((self.command, self.path, self.headers.get("Authorization")))
            time.sleep(delay_s)
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "level"), [(200, "ok"), (404, "ok"), (401, "error"), (403, "error"), (429, "warning"), (503, "warning")]
)
def test_an_answer_is_judged_by_its_status(status: int, level: str) -> None:
    with serve(status) as (endpoint, seen):
        assert ask_hub(endpoint, REPO).level == level
    assert seen == [("HEAD", f"/{REPO}/resolve/main/model_index.json", None)]


def test_a_token_goes_to_the_hub_and_to_no_other() -> None:
    with serve(200) as (other, other_seen), serve(302, location=f"{other}/elsewhere") as (endpoint, seen):
        assert ask_hub(endpoint, REPO, token="hf_secret").level == "ok"
    assert [token for _, _, token in seen] == ["Bearer hf_secret"]
    assert other_seen == []


def test_nothing_that_listens_is_a_warning() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    finding = ask_hub(f"http://127.0.0.1:{port}", REPO)
    assert finding.level == "warning"
    assert "cannot be reached" in finding.found


def test_a_hub_that_does_not_answer_takes_no_longer_than_the_limit() -> None:
    with serve(200, delay_s=1.5) as (endpoint, _):
        started = time.perf_counter()
        finding = start_asking(endpoint, REPO, timeout_s=0.2)()
        assert time.perf_counter() - started < 1
    assert finding.level == "warning"


def test_the_answer_comes_while_others_work() -> None:
    with serve(200) as (endpoint, _):
        wait = start_asking(endpoint, REPO)
        time.sleep(0.3)
        started = time.perf_counter()
        assert wait().level == "ok"
        assert time.perf_counter() - started < 0.2


@pytest.mark.parametrize("endpoint", ["file:///etc/passwd", "huggingface.co"])
def test_an_address_that_is_none_is_an_error(endpoint: str) -> None:
    assert ask_hub(endpoint, REPO).level == "error"
