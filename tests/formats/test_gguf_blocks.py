"""GGUF's blocks against `gguf`, the package that writes them; and every way in which bytes may not fit."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from millicent.errors import CheckpointError
from millicent.formats.gguf_blocks import dequantize
from millicent.formats.gguf_types import BLOCK_TYPES, BlockType

BY_NAME = {block.name: block for block in BLOCK_TYPES.values()}
PRODUCED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]  # gguf reads the K types, but cannot write them
F16_BYTES = {"F32": slice(0), "BF16": slice(0), "Q4_1": slice(4), "Q5_1": slice(4), "Q4_K": slice(4), "Q5_K": slice(4)}
F16_BYTES |= {"F16": slice(2), "Q8_0": slice(2), "Q4_0": slice(2), "Q5_0": slice(2), "Q6_K": slice(208, 210)}
SHAPES = [(1, 256), (3, 512), (37, 256), (3, 5, 768), (1280,)]  # gguf works on groups of 16 rows, so 37 ends within one
FINITE, INFINITE, NAN = 0x7BFF, 0x7C00, 0x7E00  # F16: the largest number, infinity, a quiet NaN

Bytes = NDArray[np.uint8]


@pytest.fixture(params=list(BY_NAME))
def block(request: pytest.FixtureRequest) -> BlockType:
    return BY_NAME[request.param]


def random_blocks(block: BlockType, shape: tuple[int, ...], seed: int = 0) -> Bytes:
    """Random bytes whose F16 numbers are finite: (..., row bytes)."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block.values, block.block_bytes), np.uint8)
    scales = blocks[..., F16_BYTES[block.name]].copy().view(np.uint16)
    scales[(scales & INFINITE) == INFINITE] ^= 0x0400  # the lowest bit of an exponent that is all ones
    blocks[..., F16_BYTES[block.name]] = scales.view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def reference(stored: Bytes, block: BlockType) -> NDArray[np.float32]:
    return gguf.quants.dequantize(stored, GGMLQuantizationType(block.ggml_type))


def ours(stored: Bytes, block: BlockType, shape: tuple[int, ...]) -> torch.Tensor:
    return dequantize(torch.from_numpy(stored.reshape(-1).copy()), block.ggml_type, shape)


def assert_same_bits(found: torch.Tensor, wanted: NDArray[np.float32]) -> None:
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    np.testing.assert_array_equal(found.numpy().view(np.uint32), wanted.view(np.uint32))


def test_the_table_is_ggmls(block: BlockType) -> None:
    assert GGMLQuantizationType(block.ggml_type).name == block.name
    assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType(block.ggml_type)] == (block.values, block.block_bytes)
    assert BLOCK_TYPES[block.ggml_type] is block


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", PRODUCED)
def test_what_gguf_wrote_is_read_as_gguf_reads_it(name: str, shape: tuple[int, ...]) -> None:
    block, rng = BY_NAME[name], np.random.default_rng(1)
    weights = rng.normal(0, 0.02, shape).astype(np.float32)
    weights[rng.random(shape) < 0.01] *= 100
    weights[..., :32] = 0  # a block without a scale
    stored = gguf.quants.quantize(weights, GGMLQuantizationType(block.ggml_type)).view(np.uint8)
    assert_same_bits(ours(stored, block, shape), reference(stored, block))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_blocks_are_read_as_gguf_reads_them(block: BlockType, shape: tuple[int, ...]) -> None:
    stored = random_blocks(block, shape)
    assert_same_bits(ours(stored, block, shape), reference(stored, block))


@pytest.mark.parametrize("number", [INFINITE, NAN, FINITE])
@pytest.mark.parametrize("name", [name for name, where in F16_BYTES.items() if where.stop])
def test_scales_that_are_not_finite_pass_through(name: str, number: int) -> None:
    block = BY_NAME[name]
    stored = random_blocks(block, (3, 256))
    scales = stored.reshape(-1, block.block_bytes)[1::2, F16_BYTES[name]]
    scales[:] = np.full(scales.shape[-1] // 2, number, np.uint16).view(np.uint8)
    with np.errstate(invalid="ignore"):
        wanted = reference(stored, block)
    np.testing.assert_array_equal(ours(stored, block, (3, 256)).numpy(), wanted)


def test_bytes_may_begin_anywhere_and_lie_apart(block: BlockType) -> None:
    stored = random_blocks(block, (3, 256))
    data = torch.from_numpy(stored.reshape(-1))
    inside_a_file = torch.cat([torch.zeros(1, dtype=torch.uint8), data])[1:]
    every_other = torch.stack([data, data], -1)[:, 0]
    for laid_out in (inside_a_file, every_other):
        assert_same_bits(dequantize(laid_out, block.ggml_type, (3, 256)), reference(stored, block))


def test_the_bytes_are_neither_changed_nor_shared(block: BlockType) -> None:
    stored = random_blocks(block, (3, 256))
    data = torch.from_numpy(stored.reshape(-1).copy())
    dequantize(data, block.ggml_type, (3, 256)).zero_()
    np.testing.assert_array_equal(data.numpy(), stored.reshape(-1))


def test_one_number_needs_no_dimension() -> None:
    data = torch.tensor([1.5]).view(torch.uint8)
    assert torch.equal(dequantize(data, BY_NAME["F32"].ggml_type, ()), torch.tensor(1.5))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_bytes_is_refused(block: BlockType, change: int) -> None:
    wanted = 3 * 256 // block.values * block.block_bytes
    data = torch.zeros(wanted + change, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=rf"{block.name} .*\(3, 256\).* {wanted + change} bytes; {wanted} bytes.*again"):
        dequantize(data, block.ggml_type, (3, 256))


@pytest.mark.parametrize("name", [name for name, block in BY_NAME.items() if block.values > 1])
def test_a_block_never_spans_two_rows(name: str) -> None:
    block = BY_NAME[name]
    rows, row_values = block.values, block.values + 1  # as many bytes as whole blocks would have
    data = torch.zeros(row_values * block.block_bytes, dtype=torch.uint8)
    for shape in ((rows, row_values), ()):
        with pytest.raises(CheckpointError, match=rf"{block.name} .*last dimension .* multiple of {block.values}\."):
            dequantize(data, block.ggml_type, shape)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 256), (-1, 256), (-1, -256), (2**70, 0)])
def test_dimensions_below_one_are_refused(block: BlockType, shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="every dimension must be 1 or more"):
        dequantize(torch.zeros(0, dtype=torch.uint8), block.ggml_type, shape)


@pytest.mark.parametrize("ggml_type", [-1, 4, 5, 9, 10, 16, 24, 28, 39, 2**32 - 1])
def test_types_that_are_not_read_are_named(ggml_type: int) -> None:
    with pytest.raises(CheckpointError, match=rf"ggml type {ggml_type}; .*F32.*Q4_K.*BF16"):
        dequantize(torch.zeros(18, dtype=torch.uint8), ggml_type, (32,))


@settings(deadline=None)
@given(data=st.binary(max_size=700), block=st.sampled_from(list(BLOCK_TYPES.values())), spare=st.booleans())
def test_any_bytes_are_read_or_refused(data: bytes, block: BlockType, spare: bool) -> None:
    """Whole blocks are read, whatever is in them; anything else is refused."""
    blocks, rest = divmod(len(data), block.block_bytes)
    if spare:
        data, rest = data[: len(data) - rest], 0
    stored, shape = torch.tensor(list(data), dtype=torch.uint8), (blocks * block.values,)
    if blocks and not rest:
        assert dequantize(stored, block.ggml_type, shape).shape == shape
    else:
        with pytest.raises(CheckpointError):
            dequantize(stored, block.ggml_type, shape)


@settings(deadline=None)
@given(
    data=st.binary(max_size=700),
    ggml_type=st.integers(-1, 40) | st.integers(),
    shape=st.lists(st.integers(-2, 512) | st.sampled_from([2**31, 2**63, 2**64]), max_size=5),
)
def test_any_header_is_read_or_refused(data: bytes, ggml_type: int, shape: list[int]) -> None:
    try:
        values = dequantize(torch.tensor(list(data), dtype=torch.uint8), ggml_type, tuple(shape))
    except CheckpointError:
        return
    assert values.shape == tuple(shape)
