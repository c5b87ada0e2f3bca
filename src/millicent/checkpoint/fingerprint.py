"""One hash that names the weights that drew a picture, so that the picture can be drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def weights_sha256(
    root: Path, files: Iterable[Path], loras: Sequence[tuple[Path, float]] = (), elsewhere: Iterable[tuple[str, Path]] = ()
) -> str:
    """SHA-256 over the sorted lines "name sha256-of-the-content", names relative to `root` with forward slashes.

    elsewhere: files that stand in for a part, such as ("transformer", path); their lines begin with the part.

    loras: files from anywhere, each with its strength; their lines begin with "lora:" and the strength, whatever they are called.
    Without them the same as `sha256sum FILES | awk '{print $2" "$1}' | LC_ALL=C sort | sha256sum` says in `root`.
    """
    paths = sorted(set(files))
    # hashlib lets other threads run while it hashes
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_sha256, paths))
    lines = [f"lora:{strength!r} {file_sha256(path)}\n" for path, strength in loras]
    lines += [f"{part}: {file_sha256(path)}\n" for part, path in elsewhere]
    lines += [f"{path.relative_to(root).as_posix()} {digest}\n" for path, digest in zip(paths, digests, strict=True)]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
