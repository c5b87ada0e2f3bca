"""The main kernel of 8-bit attention for Hopper, in Gluon: the products of one tile run beside the softmax of the next.

The order is FlashAttention-3's within a warp group (Shah et al. 2024, arXiv 2407.08608, section 3.2): while a tile's
scores pass through softmax, the product of the tile before it with the values is in the tensor core. Small blocks of one
warp group leave room for a second block on the multiprocessor, which fills what is left. What is computed, and the
arithmetic of a step, are those of `attention.py`.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

MAGIC_BITS = gl.constexpr(0x4B400000)
MAGIC = gl.constexpr(12582912.0)
LOG2_E4M3_MAX = gl.constexpr(8.807354922057604)


@gluon.jit
def _load(desc, row, column, ready, buffer):  # type: ignore[no-untyped-def]
    mbarrier.expect(ready, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], ready, buffer)


@gluon.jit
def _softmax_step(bits, scale, total, running_max, first_token, k_tokens, MASK: gl.constexpr):  # type: ignore[no-untyped-def]
    """E4M3 probabilities times 448 in the accumulator's layout, the new sum and maximum, and what shrinks older sums."""
    scores = bits.to(gl.float32, bitcast=True)
    if MASK:
        column = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        token = first_token + column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2
        scores = gl.where((token < k_tokens)[None, :], scores, float("-inf"))
    largest = gl.maximum(running_max, (gl.max(scores, 1) - MAGIC) * scale)
    shrink = gl.exp2(running_max - largest)
    offset = MAGIC * scale + largest - LOG2_E4M3_MAX
    p = gl.exp2(scores * scale[:, None] - offset[:, None])
    total = total * shrink + gl.sum(p, 1)
    return p.to(gl.float8e4nv), total, largest, shrink


@gluon.jit
def _align_with_operand(p, LAYOUT: gl.constexpr):  # type: ignore[no-untyped-def]
    """As in `attention.py`: columns in the values' order; moves nothing between threads."""
    M: gl.constexpr = p.shape[0]
    N: gl.constexpr = p.shape[1]
    p = p.reshape([M, N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([M, N])
    return gl.convert_layout(p, LAYOUT, assert_trivial=True)


@gluon.jit
def _keep_until_here(p):  # type: ignore[no-untyped-def]
    """Holds the registers of `p`, which a product in flight may still read; a wait takes no 8-bit tensor to hold."""
    gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [p], dtype=gl.int8, is_pure=False, pack=4)


@gluon.jit
def _shrink_rows(acc, shrink):  # type: ignore[no-untyped-def]
    """The factor of each row, in the shape and layout of `acc`."""
    rows = gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    return rows.expand_dims(1).broadcast_to(acc.shape)


@gluon.jit
def _start_product(p, values, acc, shrink, EXACT_SUM: gl.constexpr):  # type: ignore[no-untyped-def]
    """Sends p (M, N) times `values` (D, N) to the tensor core: alone, or onto the sum of the tiles before."""
    if EXACT_SUM:
        return warpgroup_mma(p, values.permute((1, 0)), gl.zeros_like(acc), use_acc=False, is_async=True)
    return warpgroup_mma(p, values.permute((1, 0)), acc * _shrink_rows(acc, shrink), is_async=True)


@gluon.jit
def _finish_product(product, acc, shrink, EXACT_SUM: gl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of all tiles up to the one of `product`, relative to the maximum that its probabilities are relative to."""
    if EXACT_SUM:
        return gl.fma(acc, _shrink_rows(acc, shrink), product)
    return product


@gluon.jit
def _step(  # type: ignore[no-untyped-def]
    q, q_scale, k_desc, v_desc, k_ring, v_ring, k_ready, v_ready, k_scale_ptr, k_row, v_row, tile, tiles, k_tokens,
    p, acc, total, running_max, shrink, STAGES: gl.constexpr, EXACT_SUM: gl.constexpr,
    MASK: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of `tile` >= 1, beside the product of the probabilities `p` of the tile before with its values.

    The keys of `tile` are there already; those of the next one are there on return.
    """
    N: gl.constexpr = k_desc.block_type.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 32])
    P_LAYOUT: gl.constexpr = p.type.layout
    k_slot, v_slot = tile % STAGES, (tile - 1) % STAGES
    scale = q_scale * gl.load(k_scale_ptr + tile)
    start = gl.full([q.shape[0], N], MAGIC_BITS, gl.int32, S_LAYOUT)
    bits = warpgroup_mma(q, k_ring.index(k_slot).permute((1, 0)), start, is_async=True)
    mbarrier.wait(v_ready.index(v_slot), (tile - 1) // STAGES & 1)
    product = _start_product(p, v_ring.index(v_slot), acc, shrink, EXACT_SUM)
    bits = warpgroup_mma_wait(1, deps=[bits])
    next_p, total, running_max, next_shrink = _softmax_step(bits, scale, total, running_max, tile * N, k_tokens, MASK)
    next_p = _align_with_operand(next_p, P_LAYOUT)
    # the wait for the next keys is a branch and the next one names the sum: without both, LLVM or ptxas moves the end of
    # the product up before the softmax that it is to overlap
    mbarrier.wait(k_ready.index((tile + 1) % STAGES), (tile + 1) // STAGES & 1, pred=tile + 1 < tiles)
    product, total = warpgroup_mma_wait(0, deps=[product, total])
    _keep_until_here(p)
    acc = _finish_product(product, acc, shrink, EXACT_SUM)
    # every warp is done with both buffers before they are filled again
    gl.thread_barrier()
    if tile + STAGES < tiles:
        _load(k_desc, k_row + (tile + STAGES) * N, 0, k_ready.index(k_slot), k_ring.index(k_slot))
    if tile - 1 + STAGES < tiles:
        _load(v_desc, v_row, (tile - 1 + STAGES) * N, v_ready.index(v_slot), v_ring.index(v_slot))
    return next_p, acc, total, running_max, next_shrink


@gluon.jit
def _hopper_kernel(  # type: ignore[no-untyped-def]
    q_desc, k_desc, v_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, out_ptr, out_stride, q_tokens, k_tokens, q_padded,
    k_padded, STAGES: gl.constexpr, EXACT_SUM: gl.constexpr,
):  # fmt: skip
    """The output of one block of queries of one head."""
    M: gl.constexpr = q_desc.block_type.shape[0]
    N: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = q_desc.block_type.shape[1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, N, 32])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 32])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 4)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    block, head = gl.program_id(0), gl.program_id(1)
    tiles = gl.cdiv(k_tokens, N)
    q_row, k_row, v_row = head * q_padded + block * M, head * k_padded, head * D
    k_scale_ptr += head * tiles

    q = gl.allocate_shared_memory(q_desc.dtype, [M, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, N, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, D, N], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
    _load(q_desc, q_row, 0, q_ready, q)
    for stage in gl.static_range(STAGES):
        if stage < tiles:
            _load(k_desc, k_row + stage * N, 0, k_ready.index(stage), k_ring.index(stage))
            _load(v_desc, v_row, stage * N, v_ready.index(stage), v_ring.index(stage))

    q_scale = gl.load(q_scale_ptr + q_row + gl.arange(0, M, ROWS))
    total = gl.zeros([M], gl.float32, ROWS)
    running_max = gl.full([M], float("-inf"), gl.float32, ROWS)
    acc = gl.zeros([M, D], gl.float32, O_LAYOUT)
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(0), 0)
    start = gl.full([M, N], MAGIC_BITS, gl.int32, S_LAYOUT)
    bits = warpgroup_mma(q, k_ring.index(0).permute((1, 0)), start)
    scale = q_scale * gl.load(k_scale_ptr)
    p, total, running_max, shrink = _softmax_step(bits, scale, total, running_max, 0, k_tokens, True)
    p = _align_with_operand(p, P_LAYOUT)
    gl.thread_barrier()
    if tiles > STAGES:
        _load(k_desc, k_row + STAGES * N, 0, k_ready.index(0), k_ring.index(0))

    mbarrier.wait(k_ready.index(1), 0, pred=tiles > 1)
    for tile in range(1, tiles - 1):
        p, acc, total, running_max, shrink = _step(
            q, q_scale, k_desc, v_desc, k_ring, v_ring, k_ready, v_ready, k_scale_ptr, k_row, v_row, tile, tiles,
            k_tokens, p, acc, total, running_max, shrink, STAGES, EXACT_SUM, False,
        )  # fmt: skip
    if tiles > 1:
        p, acc, total, running_max, shrink = _step(
            q, q_scale, k_desc, v_desc, k_ring, v_ring, k_ready, v_ready, k_scale_ptr, k_row, v_row, tiles - 1, tiles,
            k_tokens, p, acc, total, running_max, shrink, STAGES, EXACT_SUM, True,
        )  # fmt: skip
    slot = (tiles - 1) % STAGES
    mbarrier.wait(v_ready.index(slot), (tiles - 1) // STAGES & 1)
    product = warpgroup_mma_wait(0, deps=[_start_product(p, v_ring.index(slot), acc, shrink, EXACT_SUM)])
    _keep_until_here(p)
    acc = _finish_product(product, acc, shrink, EXACT_SUM)

    O_ROWS: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    row = block * M + gl.arange(0, M, O_ROWS)
    channel = gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))
    v_scale = gl.load(v_scale_ptr + head * D + channel)
    result = acc * gl.convert_layout(1.0 / total, O_ROWS)[:, None] * v_scale[None, :]
    at = out_ptr + row.to(gl.int64)[:, None] * out_stride + head * D + channel[None, :]
    gl.store(at, result.to(gl.bfloat16), (row < q_tokens)[:, None])


def attend_hopper(
    q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor, v_scale: Tensor, q_tokens: int, k_tokens: int,
    out: Tensor, rows: int, columns: int, stages: int, exact_sum: bool,
) -> Tensor:  # fmt: skip
    """Attention of INT8 q and k (H, padded, D) and E4M3 v (H, D, padded), to `out` (Q, H * D).

    A block has `rows` queries, `rows` / 16 warps and `stages` >= 2 tiles of `columns` keys and values in shared memory.
    """
    heads, q_padded, width = q.shape
    k_padded = k.shape[1]

    def describe(codes: Tensor, block: list[int], dtype: gl.dtype) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(codes, block, gl.NVMMASharedLayout.get_default_for(block, dtype))

    _hopper_kernel[(triton.cdiv(q_tokens, rows), heads)](
        describe(q.view(-1, width), [rows, width], gl.int8), describe(k.view(-1, width), [columns, width], gl.int8),
        describe(v.view(-1, k_padded), [width, columns], gl.float8e4nv), q_scale, k_scale, v_scale, out, out.stride(0),
        q_tokens, k_tokens, q_padded, k_padded, STAGES=stages, EXACT_SUM=exact_sum,
        num_warps=rows // 16,
    )  # fmt: skip
    return out
