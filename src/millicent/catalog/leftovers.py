"""What a killed run left beside its outputs: files that were being written, and never got their name."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from millicent.catalog.attempts import is_remote
from millicent.catalog.finish import PROBE, set_aside_name
from millicent.catalog.ledger import Ledger
from millicent.catalog.storage import BESIDE_HEX, output_location

_BESIDE = re.compile(rf"\.(.+)\.[0-9a-f]{{{BESIDE_HEX}}}", re.DOTALL)


def sweep_killed(ledger: Ledger, out: str) -> int:
    """Remove what runs that were killed left of the outputs that they were at; how many files.

    To be called when a run has begun, and after check_root: what has been written since belongs to somebody who lives.
    """
    if is_remote(out):
        return 0  # a store has an object whole or not at all
    # the root's own time of change, by check_root's file: the file system's clock may not be this machine's. It is taken before the
    # ledger is asked: whoever takes one of these images up from then on writes later
    before_ns = Path(out).stat().st_mtime_ns
    names = [PROBE]
    for output, number in ledger.lost():
        names += [output, set_aside_name(output, number)]
    return sweep(out, names, before_ns)


def sweep(out: str, names: Iterable[str], before_ns: int) -> int:
    """Remove plain files that storage.write_output was to rename to one of `names`, last changed before a time; how many."""
    wanted: dict[Path, set[str]] = defaultdict(set)
    for name in names:
        path = Path(output_location(out, name))
        wanted[path.parent].add(path.name)
    return sum(_sweep_folder(folder, files, before_ns) for folder, files in wanted.items())


def _sweep_folder(folder: Path, files: set[str], before_ns: int) -> int:
    removed = 0
    # a folder that cannot be read or changed is told when an output is to be written there; a file left over harms nobody
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _BESIDE.fullmatch(entry.name)
            if found is None or found[1] not in files or not entry.is_file(follow_symlinks=False):
                continue
            if entry.stat(follow_symlinks=False).st_mtime_ns < before_ns:
                Path(entry.path).unlink()
                removed += 1
    return removed
