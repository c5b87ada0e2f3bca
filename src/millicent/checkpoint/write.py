"""A safetensors file written one tensor at a time, which a kill does not cost: the next run goes on where this one was.

The header says where each tensor lies before any is known, so each is written in its place in NAME.partial. A unit is a
few tensors that are made together. When the disk has them, a line in NAME.partial.journal says so; what has no line is made
again, to the same bytes. Only a whole file gets its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from millicent.checkpoint.header import DTYPE_BITS, TensorInfo
from millicent.errors import OutputError

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file's header says of a tensor that is yet to be made. dtype: safetensors' name."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """A file before its tensors: its header's bytes, where each tensor goes, and how long the file will be."""

    header: bytes
    places: Mapping[str, TensorInfo]
    size_bytes: int


def outline(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> Outline:
    """Larger elements first, so that each tensor begins at a multiple of its own; otherwise in the order given."""
    ordered = sorted(entries.items(), key=lambda item: -DTYPE_BITS[item[1].dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, entry in ordered:
        info = TensorInfo(entry.dtype, entry.shape, 0, 0)
        begin, end = end, end + info.values * DTYPE_BITS[entry.dtype] // 8
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    places = {}
    for name, entry in ordered:
        begin, stop = header[name]["data_offsets"]
        places[name] = TensorInfo(entry.dtype, entry.shape, start + begin, start + stop)
    return Outline(len(text).to_bytes(8, "little") + text, places, start + end)


def partial_paths(target: Path) -> tuple[Path, Path]:
    """Where a file lies until it is whole, and its journal."""
    return target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.partial.journal")


class ResumableFile:
    """The file on its way.

    done: the units that an earlier run finished, each with what it told of it. started_anew: whether an earlier run's work
    was thrown away, because its outline or its inputs were others.
    """

    def __init__(self, target: Path, plan: Outline, inputs: Mapping[str, Any]) -> None:
        """inputs: JSON that names all that the tensors are made of, beside what the header says."""
        self.target, self._plan = target, plan
        self._partial, self._journal_path = partial_paths(target)
        digest = sha256(plan.header + json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        found = _read_journal(self._journal_path)
        goes_on = (
            found is not None
            and found.inputs == digest
            and self._partial.is_file()
            and self._partial.stat().st_size == plan.size_bytes
        )
        self.done: dict[str, Any] = found.units if found is not None and goes_on else {}
        self.started_anew = found is not None and not goes_on
        self._check_free_space()
        if found is not None and goes_on:
            self._file: BinaryIO = self._partial.open("r+b")
            # a line that a kill cut off would spoil the next one
            os.truncate(self._journal_path, found.whole_bytes)
            self._journal = self._journal_path.open("a", encoding="utf-8")
        else:
            self._file = self._begin()
            self._journal = self._journal_path.open("w", encoding="utf-8")
            self._note({"inputs": digest})

    def _check_free_space(self) -> None:
        held = self._partial.stat().st_blocks * 512 if self._partial.is_file() else 0
        free, needed = shutil.disk_usage(self.target.parent).free, self._plan.size_bytes - held
        if needed > free:
            raise OutputError(
                f"{self.target} takes {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free there.",
                "Free some space, or write to another disk.",
            )

    def _begin(self) -> BinaryIO:
        # the old journal must not speak for the new file
        self._journal_path.unlink(missing_ok=True)
        file = self._partial.open("w+b")
        file.write(self._plan.header)
        file.truncate(self._plan.size_bytes)
        _sync(file)
        return file

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place. What it is must be what the outline says."""
        place = self._plan.places[name]
        assert (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) == (place.dtype, place.shape), name
        self._file.seek(place.begin)
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def finish_unit(self, unit: str, told: object) -> None:
        """Everything of a unit is written; `told`: JSON that an interrupted run's successor finds in `done`."""
        _sync(self._file)
        self._note({"unit": unit, "told": told})
        self.done[unit] = told

    def _note(self, line: object) -> None:
        self._journal.write(json.dumps(line) + "\n")
        _sync(self._journal)

    def publish(self) -> None:
        """Give the whole file its name; whatever had it is replaced."""
        _sync(self._file)
        self._partial.replace(self.target)
        sync_folder(self.target.parent)
        self._journal_path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._journal.close()


@dataclass(frozen=True, slots=True)
class _Journal:
    """inputs: their digest. units: what each finished one told. whole_bytes: of the lines that are whole."""

    inputs: str
    units: dict[str, Any]
    whole_bytes: int


def _read_journal(path: Path) -> _Journal | None:
    """None where there is no journal, or none whose first line is whole."""
    if not path.is_file():
        return None
    entries, whole_bytes = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith(b"\n"):
            entries.pop()
            break
        whole_bytes += len(line)
    if not entries:
        return None
    return _Journal(entries[0]["inputs"], {entry["unit"]: entry["told"] for entry in entries[1:]}, whole_bytes)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """A new name is on the disk only when its folder is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
