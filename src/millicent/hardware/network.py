"""Whether the hub answers: one request without a body, with a hard limit."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.parse import urlsplit

from millicent.hardware.findings import Finding, error, ok, warning

TIMEOUT_S = 2.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An answer is enough, wherever it points; and a token must not go there."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def start_asking(endpoint: str, repo: str | None, token: str | None = None, timeout_s: float = TIMEOUT_S) -> Callable[[], Finding]:
    """Ask the hub in a thread of its own; the call that is returned waits for the finding until timeout_s have passed since.

    endpoint: as https://huggingface.co. repo: whose files are wanted, owner/name; None for the hub alone. token: of a user.
    """
    answers: list[Finding] = []
    # a daemon: a name server that does not answer would hold the thread beyond any timeout of the socket's
    deadline = time.monotonic() + timeout_s
    thread = threading.Thread(target=lambda: answers.append(ask_hub(endpoint, repo, token, timeout_s)), daemon=True)
    thread.start()

    def wait() -> Finding:
        thread.join(max(0.0, deadline - time.monotonic()))
        return answers[0] if answers else _unreachable(endpoint, f"no answer within {timeout_s:.0f} s")

    return wait


def ask_hub(endpoint: str, repo: str | None, token: str | None = None, timeout_s: float = TIMEOUT_S) -> Finding:
    """HEAD the model's index at the hub. Raises nothing: what goes wrong is the finding."""
    address = f"{endpoint.rstrip('/')}/{repo}/resolve/main/model_index.json" if repo else endpoint
    if urlsplit(address).scheme not in ("http", "https"):
        return error("hub", f"HF_ENDPOINT is {endpoint}", "an address that begins with https://", "unset HF_ENDPOINT")
    request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "millicent"})
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout_s) as answer:
            return _judge(endpoint, repo, answer.status, token)
    except urllib.error.HTTPError as answered:
        answered.close()
        return _judge(endpoint, repo, answered.code, token)
    except (OSError, ValueError, HTTPException) as failed:
        return _unreachable(endpoint, str(getattr(failed, "reason", failed)))


def _judge(endpoint: str, repo: str | None, status: int, token: str | None) -> Finding:
    if status in (401, 403):
        told = "with the token in HF_TOKEN" if token else "without a token"
        return error(
            "hub",
            f"{endpoint} does not show {repo} {told}",
            "a user that may read it",
            "Accept its terms on its page, and export HF_TOKEN=...",
        )
    if status == 429 or status >= 500:
        return warning("hub", f"{endpoint} answers with status {status}", "an answer", "Try again later")
    # a single file's repository has no index, and is no less there
    return ok("hub", f"{endpoint} answers")


def _unreachable(endpoint: str, why: str) -> Finding:
    return warning(
        "hub",
        f"{endpoint} cannot be reached: {why}",
        "the hub, to fetch a model",
        "Mend the network or HTTPS_PROXY, or bring the model's files by other means; with --offline this is not asked",
    )
