"""What stands between the matrix products, in Triton: the twins of reference.py.

Each kernel reads its rows once and writes them once. A row lies in the registers of one program: norm, modulation, turn,
largest value and codes are made of it without another look at memory. It lies there in parts, a tuple of vectors: Triton's
vectors have powers of two, rows have three times one (3072 and 12288 channels), and of one padded to 4096 a quarter of the
threads would load nothing.
"""

# Triton's tuples grow by assignment
# mypy: disable-error-code="assignment, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from millicent.errors import InputError
from millicent.kernels import Bounds, Code, Rows
from millicent.kernels.reference import NORM_EPS

_CODES = {"bf16": 0, "fp8": 1, "int8": 2}
_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
_GROUPS = (1, 16, 64, 256)
_SMALLEST_PART = 512


@triton.jit
def _hadamard(SIZE: tl.constexpr):
    # the regular matrix of hadamard.py: 1/2 for each digit of 4, negative where row's and column's digit add up to 3
    i = tl.arange(0, SIZE)[:, None]
    j = tl.arange(0, SIZE)[None, :]
    h = tl.where(i % 4 + j % 4 == 3, -0.5, 0.5) * tl.where((i // 4) % 4 + (j // 4) % 4 == 3, -0.5, 0.5)
    if SIZE == 64:
        h *= tl.where(i // 16 + j // 16 == 3, -0.5, 0.5)
    return h


@triton.jit
def _rotate(y, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    # one return, at the end: Triton compiles what stands after an early one all the same
    if GROUP == 1:
        turned = y
    elif GROUP <= 64 and GROUP != 16:
        turned = tl.dot(tl.reshape(y, (BLOCK // GROUP, GROUP)), _hadamard(GROUP), input_precision="tf32")
    else:
        # H256 = H16 x H16: over both sides of a square of 16 x 16. Products of squares, not of one tall matrix with H16: of
        # those Triton 3.6 and 3.7 make what does not compile for 10.0
        squares: tl.constexpr = BLOCK // 256
        h = tl.broadcast_to(tl.reshape(_hadamard(16), (1, 16, 16)), (squares, 16, 16))
        turned = tl.dot(tl.reshape(y, (squares, 16, 16)), h, input_precision="tf32")
        if GROUP == 256:
            turned = tl.dot(h, turned, input_precision="tf32")
    return tl.reshape(turned, (BLOCK,))


@triton.jit
def _load_parts(ptr, D, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """D numbers from ptr in FP32, zeros beyond them: PARTS vectors of BLOCK."""
    parts = ()
    for part in tl.static_range(PARTS):
        offsets = part * BLOCK + tl.arange(0, BLOCK)
        parts = parts + (tl.load(ptr + offsets, mask=offsets < D, other=0.0).to(tl.float32),)
    return parts


@triton.jit
def _larger(a, b):
    """No number where either is none: integers have no code for it, and a row's scale must tell."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_row(
    parts, out_ptr, scale_ptr, row, D, BLOCK: tl.constexpr, PARTS: tl.constexpr, CODE: tl.constexpr, GROUP: tl.constexpr
):
    """PARTS vectors (BLOCK,) FP32, zeros beyond D, to one row of the output."""
    out_ptr += row * D
    if CODE == 0:
        for part in tl.static_range(PARTS):
            offsets = part * BLOCK + tl.arange(0, BLOCK)
            tl.store(out_ptr + offsets, parts[part].to(out_ptr.dtype.element_ty), mask=offsets < D)
    else:
        turned = ()
        amax = tl.zeros((BLOCK,), tl.float32)
        for part in tl.static_range(PARTS):
            y = _rotate(parts[part], BLOCK, GROUP)
            turned = turned + (y,)
            amax = _larger(amax, tl.abs(y))
        largest: tl.constexpr = 448.0 if CODE == 1 else 127.0
        scale = tl.reduce(amax, 0, _larger) / largest
        scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
        tl.store(scale_ptr + row, scale)
        inverse = 1.0 / scale
        for part in tl.static_range(PARTS):
            offsets = part * BLOCK + tl.arange(0, BLOCK)
            steps = turned[part] * inverse
            if CODE == 2:
                # to the nearest, ties to even: at this size FP32 has no fractions left
                steps = (steps + 12582912.0) - 12582912.0
            tl.store(out_ptr + offsets, steps.to(out_ptr.dtype.element_ty), mask=offsets < D)


@triton.jit
def _gelu(y):
    # 0.5 y (1 + tanh u) = y / (1 + exp(-2 u)), u = sqrt(2 / pi) (y + 0.044715 y^3)
    u = y * (0.7978845608028654 + 0.035677408136300125 * y * y)
    return y / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def _quantize_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    D,
    x_stride,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    parts = _load_parts(x_ptr + row * x_stride, D, BLOCK, PARTS)
    if GELU:
        made = ()
        for part in tl.static_range(PARTS):
            made = made + (_gelu(parts[part]),)
        parts = made
    _store_row(parts, out_ptr, scale_ptr, row, D, BLOCK, PARTS, CODE, GROUP)


@triton.jit
def _add_gated(x_ptr, update_ptr, gate_ptr, D, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """x + gate * update, rounded as x is and stored there: PARTS vectors of BLOCK, FP32."""
    xs = _load_parts(x_ptr, D, BLOCK, PARTS)
    updates = _load_parts(update_ptr, D, BLOCK, PARTS)
    gates = _load_parts(gate_ptr, D, BLOCK, PARTS)
    made = ()
    for part in tl.static_range(PARTS):
        offsets = part * BLOCK + tl.arange(0, BLOCK)
        summed = (xs[part] + gates[part] * updates[part]).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + offsets, summed, mask=offsets < D)
        made = made + (summed.to(tl.float32),)
    return made


@triton.jit
def _norm(xs, D, EPS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """LayerNorm without weights of a row's PARTS vectors of BLOCK; zeros beyond D."""
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += xs[part]
    mean = tl.sum(total, 0) / D
    centered = ()
    squares = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        inside = part * BLOCK + tl.arange(0, BLOCK) < D
        c = tl.where(inside, xs[part] - mean, 0.0)
        centered = centered + (c,)
        squares += c * c
    rstd = tl.rsqrt(tl.sum(squares, 0) / D + EPS)
    normed = ()
    for part in tl.static_range(PARTS):
        normed = normed + (centered[part] * rstd,)
    return normed


@triton.jit
def _norm_modulate_kernel(
    x_ptr,
    update_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    out_ptr,
    out_scale_ptr,
    D,
    references,
    img,
    mod_stride,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    segment = tl.where(row < references, 0, tl.where(row < img, 1, 2)) * mod_stride
    if ADD:
        xs = _add_gated(x_ptr + row * D, update_ptr + row * D, gate_ptr + segment, D, BLOCK, PARTS)
    else:
        xs = _load_parts(x_ptr + row * D, D, BLOCK, PARTS)
    normed = _norm(xs, D, EPS, BLOCK, PARTS)
    scales = _load_parts(scale_ptr + segment, D, BLOCK, PARTS)
    shifts = _load_parts(shift_ptr + segment, D, BLOCK, PARTS)
    made = ()
    for part in tl.static_range(PARTS):
        made = made + (normed[part] * (1.0 + scales[part]) + shifts[part],)
    _store_row(made, out_ptr, out_scale_ptr, row, D, BLOCK, PARTS, CODE, GROUP)


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr,
    weights_ptr,
    cos_ptr,
    sin_ptr,
    M,
    img,
    row_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    which = tl.program_id(1)
    vector = tl.arange(0, ROW_BLOCK * HEAD_BLOCK)
    row = (tl.program_id(0) * ROW_BLOCK + vector // HEAD_BLOCK).to(tl.int64)
    head = tl.program_id(2) * HEAD_BLOCK + vector % HEAD_BLOCK
    valid = (row < M) & (head < HEADS)
    channel = tl.arange(0, WIDTH)
    place = (row * row_stride + (which * HEADS + head) * WIDTH)[:, None] + channel[None, :]
    x = tl.load(qkv_ptr + place, mask=valid[:, None], other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPS)
    stream = tl.where(row < img, 0, 1)
    weight = tl.load(weights_ptr + ((stream * 2 + which) * WIDTH)[:, None] + channel[None, :])
    normed = x * rstd[:, None] * weight.to(tl.float32)
    a, b = tl.split(tl.reshape(normed, (ROW_BLOCK * HEAD_BLOCK, WIDTH // 2, 2)))
    pair = (row * (WIDTH // 2))[:, None] + tl.arange(0, WIDTH // 2)[None, :]
    c = tl.load(cos_ptr + pair, mask=valid[:, None], other=0.0)
    s = tl.load(sin_ptr + pair, mask=valid[:, None], other=0.0)
    turned = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (ROW_BLOCK * HEAD_BLOCK, WIDTH))
    tl.store(qkv_ptr + place, turned.to(qkv_ptr.dtype.element_ty), mask=valid[:, None])


def quantize_rows(x: Tensor, code: Code, group: int = 1) -> Rows:
    """reference.quantize_rows."""
    if code == "bf16":
        return Rows(x, None)
    return _rows(x, code, group, gelu=False)


def gelu_rows(x: Tensor, code: Code, group: int = 1) -> Rows:
    """reference.gelu_rows."""
    return _rows(x, code, group, gelu=True)


def _rows(x: Tensor, code: Code, group: int, gelu: bool) -> Rows:
    rows, columns = x.shape
    assert x.stride(1) == 1
    made = _empty_rows(x, code, group)
    block, parts = _cut(columns, group)
    _quantize_rows_kernel[(rows,)](
        x,
        made.values,
        made.scale,
        columns,
        x.stride(0),
        BLOCK=block,
        PARTS=parts,
        CODE=_CODES[code],
        GROUP=group,
        GELU=gelu,
        num_warps=_num_warps(block * parts),
    )
    return made


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, bounds: Bounds, code: Code, group: int = 1) -> Rows:
    """reference.norm_modulate."""
    made = _empty_rows(x, code, group)
    _launch_norm(x, None, shift, shift, scale, bounds, made, code, group)
    return made


def add_gated_norm_modulate(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, bounds: Bounds, code: Code, group: int = 1
) -> Rows:
    """reference.add_gated_norm_modulate."""
    made = _empty_rows(x, code, group)
    _launch_norm(x, update, gate, shift, scale, bounds, made, code, group)
    return made


def _launch_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    bounds: Bounds,
    made: Rows,
    code: Code,
    group: int,
) -> None:
    rows, columns = x.shape
    assert all(tensor.is_contiguous() for tensor in (x, update) if tensor is not None)
    assert gate.stride() == shift.stride() == scale.stride() == (gate.stride(0), 1)
    block, parts = _cut(columns, group)
    _norm_modulate_kernel[(rows,)](
        x,
        update,
        gate,
        shift,
        scale,
        made.values,
        made.scale,
        columns,
        *bounds,
        gate.stride(0),
        EPS=NORM_EPS,
        BLOCK=block,
        PARTS=parts,
        CODE=_CODES[code],
        GROUP=group,
        ADD=update is not None,
        num_warps=_num_warps(block * parts),
    )


def qk_norm_rope(qkv: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, img_rows: int) -> None:
    """reference.qk_norm_rope."""
    rows, _, heads, width = qkv.shape
    assert qkv.stride()[1:] == (heads * width, width, 1)
    assert all(tensor.is_contiguous() for tensor in (weights, cos, sin))
    # of what was tried on an H200, all within 15 %, the fastest
    row_block, head_block = 1, min(8, triton.next_power_of_2(heads))
    grid = (rows, 2, triton.cdiv(heads, head_block))
    _qk_norm_rope_kernel[grid](
        qkv,
        weights,
        cos,
        sin,
        rows,
        img_rows,
        qkv.stride(0),
        HEADS=heads,
        WIDTH=width,
        HEAD_BLOCK=head_block,
        ROW_BLOCK=row_block,
        EPS=NORM_EPS,
        num_warps=4,
    )


def _empty_rows(x: Tensor, code: Code, group: int) -> Rows:
    if code == "bf16":
        return Rows(torch.empty_like(x, memory_format=torch.contiguous_format), None)
    if group not in _GROUPS or x.shape[1] % group:
        raise InputError(
            f"INT8's Hadamard groups of {group} are asked for on {x.shape[1]} channels.",
            f"Use groups of {_GROUPS} that divide them.",
        )
    return Rows(
        torch.empty(x.shape, dtype=_DTYPES[code], device=x.device),
        torch.empty((len(x), 1), dtype=torch.float32, device=x.device),
    )


def _cut(columns: int, group: int) -> tuple[int, int]:
    """The length of a row's vectors, and how many there are."""
    # a product with a turn's matrix has at least 16 rows
    smallest = max(_SMALLEST_PART, 16 * group if 1 < group <= 64 else group)
    third = columns // 3
    if columns % 3 == 0 and third == triton.next_power_of_2(third) and third >= smallest:
        return third, 3
    return max(int(triton.next_power_of_2(columns)), 16 * group if 1 < group <= 64 else 1), 1


def _num_warps(columns: int) -> int:
    """Of the fastest on an H200: 4 for 3072 columns, 8 for 12288."""
    return max(1, min(8, int(triton.next_power_of_2(columns // 768))))
