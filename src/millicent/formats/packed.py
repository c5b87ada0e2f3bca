"""Numbers of four bits, two to a byte, and of eight that are only an exponent: from codes to values.

E2M1 and E8M0 are those of the OCP Microscaling Formats (MX) Specification 1.0. Which nibble comes first is the
producer's choice, written nowhere in the bytes: comfy-kitchen's NVFP4 has the even element in the high one; ModelOpt,
compressed-tensors, LightX2V and comfy-kitchen's INT4 in the low one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millicent.errors import CheckpointError

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)])
_FP32_MANTISSA_BITS = 23


def unpack_nibbles(packed: Tensor, high_first: bool) -> Tensor:
    """packed (..., K/2), uint8 or int8 -> codes (..., K), uint8, 0 to 15.

    high_first: element 0 of each pair lies in the high nibble. Raises CheckpointError for another type than bytes.
    """
    if packed.dtype not in (torch.uint8, torch.int8):
        found = str(packed.dtype).removeprefix("torch.")
        raise CheckpointError(f"Packed 4-bit codes are {found}; wanted uint8 or int8.", "Use a file that packs two to a byte.")
    # a signed byte would shift its sign in
    unsigned = packed.view(torch.uint8)
    high, low = unsigned >> 4, unsigned & 15
    return torch.stack([high, low] if high_first else [low, high], -1).flatten(-2)


def decode_e2m1(codes: Tensor) -> Tensor:
    """codes (...), integers 0 to 15 -> FP32 (...): 1 bit of sign, 2 of exponent, 1 of mantissa. No infinities, no NaN."""
    # bytes would index as a mask
    return E2M1.to(codes.device)[codes.int()]


def decode_int4(codes: Tensor) -> Tensor:
    """codes (...), integers 0 to 15 -> FP32 (...), -8 to 7: two's complement."""
    return ((codes ^ 8).to(torch.int8) - 8).float()


def decode_e8m0(exponents: Tensor) -> Tensor:
    """exponents (...), uint8 or float8_e8m0fnu -> FP32 (...): 2^(b - 127), 0 for b = 0, NaN for b = 255."""
    # FP32's exponent has the same bias, so the byte only moves. That makes b = 0 a zero, as comfy-kitchen has it, which
    # writes it for blocks of zeros; the specification's 2^-127 differs only where a weight is below 1e-35.
    biased = exponents.view(torch.uint8).int()
    powers = (biased << _FP32_MANTISSA_BITS).view(torch.float32)
    # the specification's NaN; comfy-kitchen never writes it, and would read an infinity
    return powers.masked_fill(biased == 255, torch.nan)
