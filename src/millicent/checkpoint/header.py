"""What a weight file says of itself, read from its first bytes: names, formats, shapes and places of its tensors.

safetensors (github.com/huggingface/safetensors, README "Format") and GGUF (github.com/ggml-org/ggml, docs/gguf.md). Nothing
of a tensor is read here. A header is believed only where it fits its file: every offset inside, nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from millicent.checkpoint import gguf
from millicent.checkpoint.source import Source, open_source
from millicent.errors import CheckpointError

Container = Literal["safetensors", "gguf"]

FIRST_READ_BYTES = 1 << 20  # holds the header of every Qwen-Image file, scales and all
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DIMENSIONS = 8
# bits of one element; F4 and F6 shapes count elements, not bytes
DTYPE_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
LFS_START = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor's entry. dtype: safetensors' name, or ggml's for GGUF. begin, end: its bytes within the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def values(self) -> int:
        count = 1
        for side in self.shape:
            count *= side
        return count


@dataclass(frozen=True, slots=True)
class Header:
    """One file's header. header_bytes: what comes before the tensors. metadata: strings, in GGUF the scalar values too."""

    name: str
    container: Container
    tensors: dict[str, TensorInfo]
    metadata: dict[str, Any]
    size_bytes: int
    header_bytes: int


def read_header(where: str | Path | Source) -> Header:
    """Read the header of one file, here or behind a URL.

    Raises InputNotFoundError where there is no file; CheckpointError for a pickle, a pointer, a file that is neither
    safetensors nor GGUF, a header that is damaged, or a file that is shorter or longer than its header says.
    """
    source = open_source(where) if isinstance(where, (str, Path)) else where
    first = source.read(0, min(FIRST_READ_BYTES, source.size_bytes))
    if first.startswith(gguf.MAGIC):
        return _read_gguf(source, first)
    length = int.from_bytes(first[:8], "little")
    # looked at first: a header of 640 bytes begins like a pickle, one of 60 like a web page
    if first[8:9] == b"{" and 2 <= length <= MAX_HEADER_BYTES:
        return _read_safetensors(source, first, 8 + length)
    raise _no_weight_file(source.name, first)


def _no_weight_file(name: str, first: bytes) -> CheckpointError:
    if first.startswith(LFS_START):
        return CheckpointError(f"{name} is a Git LFS pointer, not the file itself.", "Fetch it with git lfs pull, or download it.")
    if first.startswith(PICKLE_STARTS):
        return CheckpointError(
            f"{name} is a pickle, which can run any code when it is opened.", "Use the same weights as safetensors or GGUF."
        )
    if first.lstrip()[:1] == b"<":
        return CheckpointError(f"{name} is a web page, not a weight file.", "Check the address, or log in.")
    if len(first) < 8:
        return CheckpointError(f"{name} has {len(first)} bytes.", "Fetch the file again.")
    return CheckpointError(f"{name} is no safetensors and no GGUF file.", "Give one of those.")


def _read_safetensors(source: Source, first: bytes, begin: int) -> Header:
    """`begin`: where the header ends and the tensors begin."""
    if begin > source.size_bytes:
        _damaged(source, f"its header of {begin - 8} bytes is longer than the file")
    data = first[8:begin] if begin <= len(first) else first[8:] + source.read(len(first), begin)
    entries = _parse_json(source, data)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(source, "its __metadata__ is no table of strings")
    tensors = {key: _parse_entry(source, key, entry, begin) for key, entry in entries.items()}
    _check_places(source, tensors.values(), begin)
    return Header(source.name, "safetensors", tensors, metadata, source.size_bytes, begin)


def _parse_json(source: Source, data: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a name stands there twice")
        return dict(pairs)

    try:
        entries = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        _damaged(source, f"its header is no JSON ({error})")
    if not isinstance(entries, dict):
        _damaged(source, "its header is no JSON object")
    return entries


def _parse_entry(source: Source, key: str, entry: object, data_begin: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _damaged(source, f"the entry of {key} is not a dtype, a shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{key} in {source.name} has the unknown dtype {dtype!r}.", "Use weights in a format that is documented."
        )
    if not (_are_counts(shape) and len(shape) <= MAX_DIMENSIONS and _are_counts(offsets) and len(offsets) == 2):
        _damaged(source, f"the entry of {key} has the shape {shape} and the offsets {offsets}")
    info = TensorInfo(dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])
    bits = info.values * DTYPE_BITS[dtype]
    if bits % 8 or info.end - info.begin != bits // 8:
        _damaged(source, f"{key} has {info.end - info.begin} bytes where {dtype} {list(shape)} takes {bits / 8:g}")
    return info


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_places(source: Source, tensors: Iterable[TensorInfo], begin: int) -> None:
    """Tensors lie one behind the other from the header's end to the file's: no gap, no overlap, nothing cut off."""
    end = begin
    for info in sorted(tensors, key=lambda info: (info.begin, info.end)):
        if info.begin != end:
            _damaged(source, f"a tensor begins at byte {info.begin}, the one before it ends at byte {end}")
        end = info.end
    if end > source.size_bytes:
        _damaged(source, f"its tensors take {end} bytes, the file has {source.size_bytes}: the download broke off")
    if end < source.size_bytes:
        _damaged(source, f"{source.size_bytes - end} bytes follow its last tensor")


def _read_gguf(source: Source, first: bytes) -> Header:
    """GGUF's header does not say how long it is: read on until it is whole."""
    data = first
    while True:
        try:
            parsed = gguf.parse(data)
            break
        except gguf.NeedsMoreBytesError:
            if len(data) >= min(source.size_bytes, MAX_HEADER_BYTES):
                _damaged(source, "its header is cut off")
            data += source.read(len(data), min(2 * len(data), source.size_bytes, MAX_HEADER_BYTES))
        except gguf.DamagedHeaderError as error:
            _damaged(source, str(error))
    tensors = {}
    for name, (dtype, shape, offset, size) in parsed.tensors.items():
        begin = parsed.data_begin + offset
        if begin + size > source.size_bytes:
            _damaged(source, f"{name} ends at byte {begin + size}, the file has {source.size_bytes}: the download broke off")
        tensors[name] = TensorInfo(dtype, shape, begin, begin + size)
    ends = 0
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin < ends:
            _damaged(source, f"two tensors share the bytes before {ends}")
        ends = info.end
    return Header(source.name, "gguf", tensors, parsed.metadata, source.size_bytes, parsed.data_begin)


def _damaged(source: Source, why: str) -> NoReturn:
    raise CheckpointError(f"{source.name} is damaged: {why}.", "Fetch the file again.")
