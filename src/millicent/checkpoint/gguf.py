"""The header of a GGUF file: key-value pairs, then one entry for each tensor. github.com/ggml-org/ggml, docs/gguf.md."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from millicent.formats.gguf_types import BLOCK_TYPES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_DIMENSIONS = 4
# value type -> struct's code; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MIN_TENSOR_ENTRY_BYTES = 8 + 4 + 4 + 8  # an empty name, no dimension, the type, the offset
MIN_PAIR_BYTES = 8 + 4 + 1


class NeedsMoreBytesError(Exception):
    """The header goes on behind the bytes that were given."""


class DamagedHeaderError(Exception):
    """The bytes are no GGUF header; the text says why."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """tensors: name -> (ggml type's name, shape in torch's order, offset from data_begin, bytes)."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    data_begin: int


class _Reader:
    """A cursor over the bytes that are there."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise NeedsMoreBytesError
        self.at += count
        return self.data[self.at - count : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedHeaderError("a name in it is no UTF-8") from error

    def value(self, kind: int) -> Any:
        """A scalar or a string. Of an array only its length: vocabularies are none of our business."""
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise DamagedHeaderError(f"it has a value of the unknown type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in SCALARS:
            self.take(count * struct.calcsize(f"<{SCALARS[inner]}"))
        elif inner == STRING:
            for _ in range(count):
                self.take(self.scalar("Q"))
        else:
            raise DamagedHeaderError(f"it has an array of the unknown type {inner}")
        return f"array of {count}"


def parse(data: bytes) -> Parsed:
    """The first bytes of a file -> its header. Raises NeedsMoreBytesError or DamagedHeaderError."""
    reader = _Reader(data)
    if reader.take(4) != MAGIC:
        raise DamagedHeaderError("it does not begin with GGUF")
    version = reader.scalar("I")
    if version not in VERSIONS:
        raise DamagedHeaderError(f"it has the GGUF version {version}, this version reads {' and '.join(map(str, VERSIONS))}")
    tensor_count, pair_count = reader.scalar("Q"), reader.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = reader.string()
        if key in metadata:
            raise DamagedHeaderError(f"the key {key} stands there twice")
        metadata[key] = reader.value(reader.scalar("I"))
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name = reader.string()
        if name in tensors:
            raise DamagedHeaderError(f"the tensor {name} stands there twice")
        tensors[name] = _tensor(reader, name)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise DamagedHeaderError(f"its alignment is {alignment}")
    return Parsed(metadata, tensors, -(-reader.at // alignment) * alignment)


def _tensor(reader: _Reader, name: str) -> tuple[str, tuple[int, ...], int, int]:
    dimensions = reader.scalar("I")
    if dimensions > MAX_DIMENSIONS:
        raise DamagedHeaderError(f"{name} has {dimensions} dimensions")
    shape = tuple(reversed([reader.scalar("Q") for _ in range(dimensions)]))
    kind, offset = reader.scalar("I"), reader.scalar("Q")
    values = 1
    for side in shape:
        values *= side
    if kind not in BLOCK_TYPES:
        return f"GGML_{kind}", shape, offset, 0  # a type that we do not read; how long it is only its maker knows
    block = BLOCK_TYPES[kind]
    if values % block.values:
        raise DamagedHeaderError(f"{name} has {values} values, which is no multiple of {block.name}'s {block.values}")
    return block.name, shape, offset, values // block.values * block.block_bytes
