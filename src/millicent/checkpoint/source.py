"""Where a checkpoint's bytes come from: a file here, or a file elsewhere read by HTTP ranges.

Reading a range never reads more than the range. A server that answers a range with the whole file is refused before its body
is touched: the files meant here have 40 GB.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from millicent.errors import CheckpointError, InputNotFoundError

TIMEOUT_S = 20.0
MAX_GAP_BYTES, READERS = 64 << 10, 16
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Source(Protocol):
    """name: the path or URL, for messages. size_bytes: of the whole file."""

    name: str
    size_bytes: int

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` up to `end`, all of them. Raises CheckpointError where the file ends before."""
        ...


def open_source(where: str | Path, token: str | None = None) -> Source:
    """A path or an http(s) URL. `token` goes to the first server alone, never to the one that it redirects to.

    Raises InputNotFoundError where nothing is there, CheckpointError where it cannot be read in ranges.
    """
    if isinstance(where, str) and where.startswith(("http://", "https://")):
        return HttpSource(where, token)
    return FileSource(Path(where))


def read_together(source: Source, places: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """Many small reads as few larger ones, several at a time: a request costs more than the bytes between two notes."""
    runs: list[list[str]] = []
    end = 0
    for name, (begin, stop) in sorted(places.items(), key=lambda place: place[1]):
        if runs and begin - end < MAX_GAP_BYTES:
            runs[-1].append(name)
        else:
            runs.append([name])
        end = stop
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(lambda run: source.read(places[run[0]][0], places[run[-1]][1]), runs))
    return {
        name: data[places[name][0] - places[run[0]][0] : places[name][1] - places[run[0]][0]]
        for run, data in zip(runs, read, strict=True)
        for name in run
    }


class FileSource:
    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            if not path.is_file():
                raise InputNotFoundError(f"There is no file {path}.", "Check the path.")
            self._path, self.size_bytes = path, path.stat().st_size
            path.open("rb").close()
        except OSError as error:
            raise InputNotFoundError(f"{path} cannot be read: {error.strerror}.", "Give a file that can be read.") from error

    def read(self, begin: int, end: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        if len(data) != end - begin:
            raise _ends_early(self.name, begin, end, len(data))
        return data


class HttpSource:
    """A file behind a server that answers ranges. Redirects are followed at every read: their addresses expire."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        self.name = f"{parts.scheme}://{parts.hostname}{parts.path}"  # without a password, or a signature in the query
        self._url, self._token = url, token
        self.bytes_read = 0
        _, self.size_bytes = self._get(0, 1)

    def read(self, begin: int, end: int) -> bytes:
        if begin == end:
            return b""
        return self._get(begin, end)[0]

    def _get(self, begin: int, end: int) -> tuple[bytes, int]:
        """The range and the whole file's size."""
        request = urllib.request.Request(self._url, headers={"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"})
        if self._token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                if response.status != 206:
                    raise CheckpointError(
                        f"{self.name} answers a range with status {response.status}, so it would send the whole file.",
                        "Download the file first, or use a server that answers ranges.",
                    )
                size_bytes = self._check_range(response.headers.get("Content-Range", ""), begin, end)
                data = response.read(end - begin)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from error
        except (OSError, HTTPException) as error:
            raise CheckpointError(f"{self.name} cannot be read: {error}.", "Check the address and the network.") from error
        if len(data) != end - begin:
            raise _ends_early(self.name, begin, end, len(data))
        self.bytes_read += len(data)
        return data, size_bytes

    def _check_range(self, header: str, begin: int, end: int) -> int:
        found = _CONTENT_RANGE.fullmatch(header.strip())
        if found is None or (int(found[1]), int(found[2])) != (begin, end - 1):
            raise CheckpointError(
                f"{self.name} was asked for bytes {begin}-{end - 1} and answers with {header or 'no range'!r}.",
                "Download the file first, or use a server that answers ranges.",
            )
        return int(found[3])

    def _refusal(self, error: urllib.error.HTTPError) -> CheckpointError | InputNotFoundError:
        with suppress(OSError):
            error.close()
        if error.code == 404:
            return InputNotFoundError(f"There is nothing at {self.name}.", "Check the address.")
        if error.code in (401, 403):
            return CheckpointError(f"{self.name} wants a login (status {error.code}).", "Give a token that may read it.")
        if error.code == 416:
            return CheckpointError(f"{self.name} is empty.", "Check the address.")
        return CheckpointError(f"{self.name} answers with status {error.code}.", "Try again later.")


def _ends_early(name: str, begin: int, end: int, got: int) -> CheckpointError:
    return CheckpointError(f"{name} ends early: {got} of the bytes {begin} to {end} are there.", "Fetch the file again.")
