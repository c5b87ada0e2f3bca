"""One hash that names the weights that drew a picture, so that the picture can be drawn again.

A file of 13 GB takes ten seconds, so it is hashed while the weights are read and the first picture is drawn.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue

from millicent.checkpoint.digests import file_sha256
from millicent.errors import CheckpointError

# the others read the weights meanwhile; a converted folder has two large files
_SHARE_OF_PROCESSORS = 4
_LEAST_THREADS = 2

Waiting = SimpleQueue[tuple[Path, Future[str]]]


def weights_sha256(
    root: Path, files: Iterable[Path], loras: Sequence[tuple[Path, float]] = (), elsewhere: Iterable[tuple[str, Path]] = ()
) -> str:
    """SHA-256 over the sorted lines "name sha256-of-the-content", names relative to `root` with forward slashes.

    elsewhere: files that stand in for a part, such as ("transformer", path); their lines begin with the part.

    loras: files from anywhere, each with its strength; their lines begin with "lora:" and the strength, whatever they are called.
    Without them the same as `sha256sum FILES | awk '{print $2" "$1}' | LC_ALL=C sort | sha256sum` says in `root`.
    Raises CheckpointError for a file that cannot be read.
    """
    return begin_weights_sha256(root, files, loras, elsewhere)()


def begin_weights_sha256(
    root: Path,
    files: Iterable[Path],
    loras: Sequence[tuple[Path, float]] = (),
    elsewhere: Iterable[tuple[str, Path]] = (),
    kept: Path | None = None,
) -> Callable[[], str]:
    """As weights_sha256, in the background: returns a function that waits for it, once or often, and raises what it raises.

    kept: as file_sha256's. Nothing waits for it at the process's end.
    """
    named = [(f"{path.relative_to(root).as_posix()} ", path) for path in sorted(set(files))]
    named += [(f"lora:{strength!r} ", path) for path, strength in loras]
    named += [(f"{part}: ", path) for part, path in elsewhere]
    digests = _begin_hashing(list(dict.fromkeys(path for _, path in named)), kept)

    def wait() -> str:
        lines = [f"{name}{digests[path].result()}\n" for name, path in named]
        return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

    return wait


def _begin_hashing(paths: Sequence[Path], kept: Path | None) -> dict[Path, Future[str]]:
    """Of each file: its SHA-256, once it is known."""
    digests = {path: Future[str]() for path in paths}
    waiting: Waiting = SimpleQueue()
    # the largest first, or it would be waited for alone; one that is missing is told of by who hashes it
    for path in sorted(paths, key=lambda path: -path.stat().st_size if path.is_file() else 0):
        waiting.put((path, digests[path]))
    threads = max(_LEAST_THREADS, (os.cpu_count() or 1) // _SHARE_OF_PROCESSORS)
    for number in range(min(threads, len(paths))):
        # an executor's threads would hold up the end of the process
        threading.Thread(target=_hash_waiting, args=(waiting, kept), name=f"sha256-{number}", daemon=True).start()
    return digests


def _hash_waiting(waiting: Waiting, kept: Path | None) -> None:
    while True:
        try:
            path, digest = waiting.get_nowait()
        except Empty:
            return
        try:
            digest.set_result(file_sha256(path, kept))
        except OSError as error:
            told = CheckpointError(f"{path} cannot be read: {error.strerror}.", "Give a file that is on this machine.")
            told.__cause__ = error
            digest.set_exception(told)
        except Exception as error:  # else whoever waits for the digest would wait forever
            digest.set_exception(error)
