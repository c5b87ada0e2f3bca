"""ggml's tensor types that we read: how many numbers stand in how many bytes. Known without torch, since headers name them.

Source: the `block_*` structs of ggml/src/ggml-common.h in ggml-org/llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockType:
    """One of ggml's tensor types: `values` numbers of a row are stored together in `block_bytes` bytes."""

    name: str
    ggml_type: int
    values: int
    block_bytes: int


BLOCK_TYPES = {
    block.ggml_type: block
    for block in (
        BlockType("F32", 0, 1, 4),
        BlockType("F16", 1, 1, 2),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q4_1", 3, 32, 20),
        BlockType("Q5_0", 6, 32, 22),
        BlockType("Q5_1", 7, 32, 24),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q4_K", 12, 256, 144),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("BF16", 30, 1, 2),
    )
}
