"""Block scales in the order that tensor cores read them: tiles of 128 rows and 4 columns, 512 scales each.

Source: the cuBLAS documentation, "1D Block Scaling Factors Layout". Tiles follow each other row by row; in a tile, the
scale of row r and column c stands at (r % 32) 16 + (r // 32) 4 + c. Rows are those of the weight, columns its blocks
along K. For most of Qwen-Image's layers a swizzled grid has the very shape of a plain one, so that only the producer's
name tells them apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from millicent.errors import CheckpointError

TILE_ROWS = 128
TILE_COLUMNS = 4


def round_up(count: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def _movable(scales: Tensor) -> Tensor:
    # as bytes, because PyTorch cannot pad E8M0, which has no zero
    return scales.view(torch.uint8) if scales.element_size() == 1 else scales


def deswizzle(scales: Tensor, rows: int, columns: int) -> Tensor:
    """scales, swizzled (rows up to a multiple of 128, columns of 4) -> (rows, columns), of the same dtype.

    Raises CheckpointError for another shape: without its padding a grid cannot have been swizzled.
    """
    padded = (round_up(rows, TILE_ROWS), round_up(columns, TILE_COLUMNS))
    if tuple(scales.shape) != padded:
        found = f"Swizzled block scales are {tuple(scales.shape)}; {rows} x {columns} of them want {padded}."
        raise CheckpointError(found, "Fetch the file again, or use one whose layout is declared.")
    tiles = _movable(scales).reshape(padded[0] // TILE_ROWS, padded[1] // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded)[:rows, :columns].view(scales.dtype)


def swizzle(scales: Tensor) -> Tensor:
    """scales (rows, columns) -> swizzled, zeros added up to multiples of 128 and 4, of the same dtype."""
    rows, columns = scales.shape
    padded = (round_up(rows, TILE_ROWS), round_up(columns, TILE_COLUMNS))
    grid = F.pad(_movable(scales), (0, padded[1] - columns, 0, padded[0] - rows))
    tiles = grid.reshape(padded[0] // TILE_ROWS, 4, 32, padded[1] // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded).view(scales.dtype)
