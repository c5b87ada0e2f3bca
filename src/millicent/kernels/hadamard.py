"""ConvRot: weights turned by a Hadamard matrix before they are quantized, so that outliers spread over their group.

Source: comfy-kitchen 0.2.40, the format field `convrot`. Its matrix is the regular one, whose rows all have the same
sum. Sylvester's, which most libraries mean by the name, is another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millicent.errors import CheckpointError

DEFAULT_GROUP = 256
_H4 = ((1.0, 1.0, 1.0, -1.0), (1.0, 1.0, -1.0, 1.0), (1.0, -1.0, 1.0, 1.0), (-1.0, 1.0, 1.0, 1.0))


def rotate(w: Tensor, group: int) -> Tensor:
    """w (..., K) -> FP32 (..., K): each `group` neighbors along K times H, which is symmetric and its own inverse.

    group: a power of 4, at least 4. Raises CheckpointError if it is none, or does not divide K.
    """
    if group < 4 or 4 ** ((group.bit_length() - 1) // 2) != group:
        raise CheckpointError(f"A ConvRot group is {group} wide; wanted a power of 4.", "Use a file rotated in such groups.")
    if w.shape[-1] % group:
        found = f"A weight of {w.shape[-1]} columns is said to be rotated in groups of {group}, which do not divide it."
        raise CheckpointError(found, "Fetch the file again, or use one whose groups fit.")
    return (w.float().reshape(-1, group) @ _regular_hadamard(group, w.device)).reshape(w.shape)


def _regular_hadamard(size: int, device: torch.device) -> Tensor:
    # 1 / sqrt(4) in each factor: powers of 2, so that every entry stays exact
    h4 = torch.tensor(_H4, device=device) / 2
    h = h4
    while h.shape[0] < size:
        h = torch.kron(h, h4)
    return h


def largest_group(k: int, wanted: int = DEFAULT_GROUP) -> int:
    """The largest power of 4 that divides k and is at most `wanted`; 1, which `rotate` refuses, if 4 does not divide it."""
    group = 1
    while group * 4 <= wanted and k % (group * 4) == 0:
        group *= 4
    return group
