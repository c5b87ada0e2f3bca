"""Nunchaku's SVDQuant weights, and the AWQ modulation layers beside them, as the plain weights that they stand for.

Sources: nunchaku (`SVDQW4A4Linear`, `AWQW4A16Linear` and their kernels) and DeepCompressor 0.1.0, which packs for them
(`NunchakuWeightPacker`, `convert_to_nunchaku_w4x16_linear_weight`). A layer computes
y = (code * scale) (x / smooth) + up (down x) + bias, so its weight is (code * scale) / smooth + up down.

Packed tensors hold their numbers in the order in which the 32 lanes of a warp load them: 128 rows at a time for codes,
scales and vectors, fragments of 16 x 16 for the low-rank pair. Their shapes do not show it: read as they lie, they are
noise. They hold whole tiles: N and K are multiples of 128, r of 16, as those of Qwen-Image are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millicent.errors import CheckpointError
from millicent.formats.packed import decode_e2m1, decode_int4, unpack_nibbles

INT4_GROUP = 64
FP4_GROUP = 16
AWQ_GROUP = 64
# nunchaku's kernels add it to what comes out of GELU, so that INT4 activations need no sign
GELU_SHIFT = 0.171875

_TILE = 128
_CODE_COLUMNS = 64
_FRAGMENT = 16
_AWQ_ROWS = 4
_MODULATION_PARTS = 6
# twice shift, scale and gate
_SCALE_PARTS = (1, 4)
_HALF = (torch.bfloat16, torch.float16)
_FIX = "Fetch the file again, or use another quantization of this model."


def dequantize_svdq_int4(qweight: Tensor, wscales: Tensor, smooth_factor: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
    """FP32 (N, K): w = code * scale / smooth + up @ down, a group being 64 neighbors along K.

    qweight: INT8 (N, K/2), two signed codes to a byte. wscales: (K/64, N). smooth_factor: (K,); `smooth_factor_orig` is only
    a record. proj_down: (K, r). proj_up: (N, r). All but qweight BF16 or FP16.
    Raises CheckpointError for other types or shapes.
    """
    rows, columns = _read_shape(qweight)
    _check("The scales of an INT4 weight", wscales, (columns // INT4_GROUP, rows), *_HALF)
    w = decode_int4(_unpack_codes(qweight))
    w.view(rows, -1, INT4_GROUP).mul_(_unpack_scales(wscales.float())[..., None])
    return _finish(w, smooth_factor, proj_down, proj_up)


def dequantize_svdq_fp4(
    qweight: Tensor,
    wscales: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    wtscale: Tensor | None = None,
    wcscales: Tensor | None = None,
) -> Tensor:
    """FP32 (N, K): w = e2m1 * scale * wtscale * wcscale / smooth + up @ down, a group being 16 neighbors along K.

    qweight: INT8 (N, K/2), two codes to a byte. wscales: E4M3 (K/16, N). wtscale: one number, FP32, BF16 or FP16. wcscales:
    (N,), BF16 or FP16. A file may lack one of the last two, which is then 1. The others are as in `dequantize_svdq_int4`.
    Raises CheckpointError for other types or shapes.
    """
    rows, columns = _read_shape(qweight)
    _check("The scales of an FP4 weight", wscales, (columns // FP4_GROUP, rows), torch.float8_e4m3fn)
    scales = _unpack_micro_scales(wscales)
    if wtscale is not None:
        _check("wtscale", wtscale.reshape(-1), (1,), torch.float32, *_HALF)
        scales.mul_(wtscale.float().reshape(()))
    if wcscales is not None:
        _check("wcscales", wcscales, (rows,), *_HALF)
        scales.mul_(unpack_vector(wcscales)[:, None])
    w = decode_e2m1(_unpack_codes(qweight))
    w.view(rows, -1, FP4_GROUP).mul_(scales[..., None])
    return _finish(w, smooth_factor, proj_down, proj_up)


def unpack_vector(packed: Tensor) -> Tensor:
    """A layer's bias: packed (N,), BF16 or FP16 -> FP32 (N,). Those of the AWQ layers are not packed.

    Raises CheckpointError for another type, or an N that is no multiple of 128.
    """
    if packed.ndim != 1 or packed.numel() % _TILE:
        raise CheckpointError(f"A packed vector is {tuple(packed.shape)}; wanted one dimension, a multiple of {_TILE}.", _FIX)
    _check("A packed vector", packed, tuple(packed.shape), *_HALF)
    return _unpack_scales(packed.float()[None]).flatten()


def unshift_bias(bias: Tensor, w: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
    """The bias that goes with `w` for a GELU that is not shifted: bias + 0.171875 * (w - up @ down) summed over K.

    For the INT4 layers behind a GELU (`img_mlp.net.2`, `txt_mlp.net.2`) and no others: there the kernel adds 0.171875 to x
    after the low-rank pair has seen it, and DeepCompressor has put the opposite into the stored bias.
    bias: FP32 (N,) from `unpack_vector`. w: FP32 (N, K) from `dequantize_svdq_int4`. proj_down, proj_up: as given to that.
    Raises CheckpointError for other types or shapes.
    """
    rows, columns = w.shape
    _check("A bias", bias, (rows,), torch.float32)
    down, up = _unpack_low_rank(proj_down, proj_up, rows, columns)
    sums = w.sum(1, dtype=torch.float64) - up.double() @ down.sum(1, dtype=torch.float64)
    return (bias + GELU_SHIFT * sums).float()


def dequantize_awq(qweight: Tensor, wscales: Tensor, wzeros: Tensor) -> Tensor:
    """FP32 (N, K): w = code * scale + zero, codes 0 to 15, a group being 64 neighbors along K. N: a multiple of 4, K of 64.

    qweight: INT32 (N/4, K/2). wscales, wzeros: BF16 or FP16 (K/64, N), in the plain order; a zero is negative, and has been
    multiplied by its scale.
    The rows stay in the order of the file: `restore_modulation` puts them into that of diffusers.
    Raises CheckpointError for other types or shapes.
    """
    if qweight.ndim != 2 or qweight.shape[1] % (AWQ_GROUP // 2) or 0 in qweight.shape:
        raise CheckpointError(f"AWQ codes are {tuple(qweight.shape)}; wanted (N/4, K/2), K a multiple of {AWQ_GROUP}.", _FIX)
    rows, columns = _AWQ_ROWS * qweight.shape[0], 2 * qweight.shape[1]
    _check("AWQ codes", qweight, tuple(qweight.shape), torch.int32)
    _check("AWQ scales", wscales, (columns // AWQ_GROUP, rows), *_HALF)
    _check("AWQ zeros", wzeros, (columns // AWQ_GROUP, rows), *_HALF)
    # words of 16 bits, each holding a column of four runs of 8; four rows take turns, 64 columns at a time
    codes = unpack_nibbles(qweight.contiguous().view(torch.uint8), high_first=False)
    lanes = codes.reshape(rows // _AWQ_ROWS, columns // AWQ_GROUP, _AWQ_ROWS, 2, 8, 4)
    w = lanes.permute(0, 2, 1, 3, 5, 4).reshape(rows, -1, AWQ_GROUP).float()
    return w.mul_(wscales.float().T[..., None]).add_(wzeros.float().T[..., None]).reshape(rows, columns)


def restore_modulation(w: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """FP32 (6 * dim, K) and (6 * dim,), in diffusers' order: all of shift, then scale, then gate, and the same again.

    w: (dim * 6, K), bias: (dim * 6,), the six of one feature side by side, and 1 added to the bias of either scale, because
    nunchaku multiplies by it as it is. What was rounded off with the 1 does not come back.
    Raises CheckpointError for other shapes.
    """
    if w.ndim != 2 or w.shape[0] % _MODULATION_PARTS or tuple(bias.shape) != tuple(w.shape[:1]):
        found = f"A modulation's weight is {tuple(w.shape)} and its bias {tuple(bias.shape)}"
        raise CheckpointError(f"{found}; wanted (dim * {_MODULATION_PARTS}, K) and (dim * {_MODULATION_PARTS},).", _FIX)
    by_part = bias.float().unflatten(0, (-1, _MODULATION_PARTS)).T.contiguous()
    by_part[list(_SCALE_PARTS)] -= 1
    return w.float().unflatten(0, (-1, _MODULATION_PARTS)).transpose(0, 1).flatten(0, 1), by_part.flatten()


def _finish(w: Tensor, smooth_factor: Tensor, proj_down: Tensor, proj_up: Tensor) -> Tensor:
    """w (N, K), overwritten: / smooth + up @ down."""
    rows, columns = w.shape
    _check("smooth_factor", smooth_factor, (columns,), *_HALF)
    down, up = _unpack_low_rank(proj_down, proj_up, rows, columns)
    # FP32 throughout: the activations of such a model are not rounded to 4 bits here, and the weight should not lose more
    return w.div_(unpack_vector(smooth_factor)).addmm_(up, down)


def _unpack_codes(qweight: Tensor) -> Tensor:
    """(N, K/2) -> (N, K), uint8, 0 to 15."""
    rows, columns = qweight.shape[0], 2 * qweight.shape[1]
    # packed: tiles of rows and of columns, 16 rows, lanes by row and by column, halves of the 16 rows and of the 64
    # columns, the 8 codes of a register
    lanes = unpack_nibbles(qweight, high_first=False).reshape(rows // _TILE, columns // _CODE_COLUMNS, 8, 8, 4, 2, 2, 8)
    return lanes.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(rows, columns)


def _unpack_scales(packed: Tensor) -> Tensor:
    """(groups, N) -> (N, groups)."""
    groups, rows = packed.shape
    # of 16 rows, a lane holds two neighbors and the two that are 8 further on
    return packed.reshape(rows // _TILE, groups, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(rows, groups)


def _unpack_micro_scales(packed: Tensor) -> Tensor:
    """(groups, N), E4M3 -> FP32 (N, groups)."""
    groups, rows = packed.shape
    # a lane holds four rows that are 32 apart, and of each the four groups of 64 columns
    lanes = packed.float().reshape(rows // _TILE, groups // 4, 8, 4, 4, 4)
    return lanes.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups)


def _unpack_low_rank(proj_down: Tensor, proj_up: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(K, r) and (N, r) -> FP32 (r, K) and (N, r). Fragments stand along the first dimension, then along the rank."""
    rank = proj_down.shape[-1] if proj_down.ndim == 2 else 0
    if rank == 0 or rank % _FRAGMENT:
        raise CheckpointError(f"proj_down is {tuple(proj_down.shape)}; wanted (K, r), r a multiple of {_FRAGMENT}.", _FIX)
    _check("proj_down", proj_down, (columns, rank), *_HALF)
    _check("proj_up", proj_up, (rows, rank), *_HALF)
    # in a fragment: lanes by row and by column, halves of either, two neighbors. A fragment's rows are those of the product
    # that it is used in: of down, the rank
    down = proj_down.float().reshape(-1, rank // _FRAGMENT, 8, 4, 2, 2, 2).permute(1, 4, 2, 0, 5, 3, 6)
    up = proj_up.float().reshape(-1, rank // _FRAGMENT, 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6)
    return down.reshape(rank, columns), up.reshape(rows, rank)


def _read_shape(qweight: Tensor) -> tuple[int, int]:
    shape = (qweight.shape[0], 2 * qweight.shape[1]) if qweight.ndim == 2 else (0, 0)
    if 0 in shape or shape[0] % _TILE or shape[1] % _TILE:
        wanted = f"(N, K/2), N and K multiples of {_TILE}"
        raise CheckpointError(f"SVDQuant codes are {tuple(qweight.shape)}; wanted {wanted}.", _FIX)
    _check("SVDQuant codes", qweight, tuple(qweight.shape), torch.int8)
    return shape


def _check(what: str, tensor: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        found, *names = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        raise CheckpointError(f"{what}: found {found}; wanted {' or '.join(names)}.", _FIX)
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{what}: found {tuple(tensor.shape)}; wanted {shape}.", _FIX)
