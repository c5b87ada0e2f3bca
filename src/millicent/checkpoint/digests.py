"""SHA-256 of files, kept so that a file that stayed as it was is not read again: 13 GB take ten seconds.

A small file in a folder of the user's tells the digest of each, and by what the file can be known again:

    <folder>/<32 digits, of the path>.json     {"path": "/models/a.safetensors", "known_by": [...], "sha256": "..."}

It is known by what git's index knows files by: device, inode, size, and both times. Who writes to a file moves its ctime, which no
program can set back. A change within the grain of a file system's clock would move nothing; so a digest is kept only of a file that
had been left alone for longer than that before it was read (git's own documentation, racy-git.adoc).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

_LOG = logging.getLogger("millicent")
# FAT's grain; that of others is far finer
_GRAIN_NS = 2_000_000_000
# between two pieces a thread waits for Python's lock, for 5 ms where another computes
_PIECE_BYTES = 16 << 20
_LEAST_BYTES = 64 << 20  # a smaller file is read in a moment

# device, inode, size, mtime, ctime; the times in nanoseconds
KnownBy = tuple[int, int, int, int, int]


def file_sha256(path: Path, kept: Path | None = None) -> str:
    """Of a file's content, in hexadecimal digits. Lets other threads run meanwhile.

    kept: a folder, made where it is missing: what it tells of a large file is believed, or kept from now on; where it cannot be
    written the log says so. None keeps nothing.
    Raises OSError for a file that cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        known_by = _know(file)
        if kept is None or known_by[2] < _LEAST_BYTES:
            return _hash(file, known_by[2])
        place = kept / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"
        if (digest := _find(place, known_by)) is not None:
            return digest
        was_left_alone = time.time_ns() - max(known_by[3:]) > _GRAIN_NS
        digest = _hash(file, known_by[2])
        if was_left_alone and _know(file) == known_by:
            _keep(place, {"path": str(path.resolve()), "known_by": known_by, "sha256": digest})
        return digest


def _know(file: BinaryIO) -> KnownBy:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _hash(file: BinaryIO, size_bytes: int) -> str:
    # what is no file has a size of 0
    digest, piece = hashlib.sha256(), memoryview(bytearray(min(max(size_bytes, 1 << 16), _PIECE_BYTES)))
    while count := file.readinto(piece):  # type: ignore[attr-defined]  # files have it, BinaryIO does not say so
        digest.update(piece[:count])
    return digest.hexdigest()


def _find(place: Path, known_by: KnownBy) -> str | None:
    """What is damaged, as by a full disk, is as good as missing."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        told = json.loads(place.read_text(encoding="utf-8"))
        if told["known_by"] == list(known_by) and len(digest := bytes.fromhex(told["sha256"])) == hashlib.sha256().digest_size:
            return digest.hex()
    return None


def _keep(place: Path, told: object) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        # whole or not at all, whoever else writes the same
        fd, name = tempfile.mkstemp(dir=place.parent)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(told, file)
            Path(name).replace(place)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        _tell(place.parent, error.strerror)


@cache  # a model has a dozen files, and the reason is the folder's
def _tell(folder: Path, why: str | None) -> None:
    _LOG.warning("Hashes of weights cannot be kept in %s, and take seconds in each run: %s.", folder, why)
