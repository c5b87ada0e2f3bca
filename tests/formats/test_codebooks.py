"""4-bit and 8-bit codebooks against bitsandbytes itself, on the CPU.

Everything is compared in FP32. Products of two FP32 numbers are rounded once on either side, so they are equal bit for bit;
a tolerance stands only where the libraries round at different points.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional, nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from millicent.errors import CheckpointError
from millicent.formats.codebooks import NestedAbsmax, QuantState, dequantize_4bit, dequantize_int8_rows, read_quant_state

# an odd number of values, blocks that end amid a row, a last block cut short, more scales than one nested block holds
SHAPES = [(48, 64), (7, 9), (1, 1), (33, 100), (130, 208)]
# NF4 has 0.09 to 0.12 and FP4 0.12 to 0.15; quantizing the scales again adds less than 0.001
MAX_ERROR_4_BIT = 0.16
MAX_ERROR_8_BIT = 0.02
MIN_ERROR_IF_WRONG = 0.3


def draw_weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Rows of very different sizes, as trained weights have: then a misplaced scale shows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[0], *(1 for _ in shape[1:]), generator=generator).exp()
    return 0.02 * rows * torch.randn(shape, generator=generator)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def dequantize_by_bitsandbytes(packed: Tensor, state: functional.QuantState) -> Tensor:
    """The same numbers with one block to a row.

    The AVX-512 kernel of bitsandbytes 0.50.2 takes wrong scales where a block ends amid a row: its error on such a weight is
    0.4 to 1, that of its other implementations 0.1.
    """
    blocks = torch.Size((state.absmax.numel(), state.blocksize))
    padded = F.pad(packed.flatten(), (0, blocks.numel() // 2 - packed.numel()))[:, None]
    by_block = functional.QuantState(
        state.absmax, blocks, state.code, state.blocksize, state.quant_type, state.dtype, state.offset, state.state2
    )
    return functional.dequantize_4bit(padded, by_block).flatten()[: state.shape.numel()].reshape(state.shape)


def decode(packed: Tensor, saved: dict[str, Tensor]) -> tuple[Tensor, QuantState]:
    """From the tensors that bitsandbytes saves beside a weight, by the names it saves them under."""
    (key,) = (name for name in saved if name.startswith("quant_state."))
    state = read_quant_state(saved[key])
    assert key == f"quant_state.bitsandbytes__{state.quant_type}"
    nested = None
    if state.nested_block_size is not None and state.nested_offset is not None:
        nested = NestedAbsmax(saved["nested_absmax"], saved["nested_quant_map"], state.nested_offset, state.nested_block_size)
    return dequantize_4bit(packed, saved["absmax"], saved["quant_map"], state.shape, state.block_size, nested), state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("nested", [False, True])
def test_4_bits_equal_bitsandbytes(shape: tuple[int, int], quant_type: str, block_size: int, nested: bool) -> None:
    w = draw_weight(shape)
    packed, written = functional.quantize_4bit(w, blocksize=block_size, compress_statistics=nested, quant_type=quant_type)
    decoded, state = decode(packed, written.as_dict(packed=True))
    assert torch.equal(decoded, dequantize_by_bitsandbytes(packed, written))
    assert state.shape == shape
    assert state.block_size == block_size
    assert (state.nested_block_size is not None) == nested
    if shape != (1, 1):
        assert relative_error(decoded, w) < MAX_ERROR_4_BIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_of_16_bits_comes_back_unrounded(dtype: torch.dtype, nested: bool) -> None:
    """bitsandbytes computes in FP32 and rounds to the weight's own dtype at the end; we leave that to whoever stores it."""
    w = draw_weight((48, 64)).to(dtype)
    packed, written = functional.quantize_4bit(w, compress_statistics=nested, quant_type="nf4")
    decoded, state = decode(packed, written.as_dict(packed=True))
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.to(dtype), functional.dequantize_4bit(packed, written))
    assert torch.equal(decoded.to(dtype), dequantize_by_bitsandbytes(packed, written))
    assert state.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_saved_layer_is_read(quant_type: str, nested: bool) -> None:
    w = draw_weight((50, 96))
    layer = nn.Linear4bit(96, 50, bias=False, compress_statistics=nested, quant_type=quant_type)
    layer.weight = nn.Params4bit(w, requires_grad=False, compress_statistics=nested, quant_type=quant_type)
    layer.to("cpu")
    saved = {name.removeprefix("weight"): tensor for name, tensor in layer.state_dict().items()}
    packed = saved.pop("")
    decoded, _ = decode(packed, {name.removeprefix("."): tensor for name, tensor in saved.items()})
    assert packed.shape == (50 * 96 // 2, 1)
    assert relative_error(decoded, w) < MAX_ERROR_4_BIT


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 70),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from([32, 64, 256]),
    nested=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_any_size_equals_bitsandbytes(rows: int, columns: int, quant_type: str, block_size: int, nested: bool, seed: int) -> None:
    w = draw_weight((rows, columns), seed)
    packed, written = functional.quantize_4bit(w, blocksize=block_size, compress_statistics=nested, quant_type=quant_type)
    decoded, _ = decode(packed, written.as_dict(packed=True))
    assert torch.equal(decoded, dequantize_by_bitsandbytes(packed, written))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bits_read_wrongly_are_far_off(quant_type: str) -> None:
    w = draw_weight((128, 128))
    packed, state = functional.quantize_4bit(w, compress_statistics=False, quant_type=quant_type)
    swapped = packed << 4 | packed >> 4
    other_map = functional.get_4bit_type("fp4" if quant_type == "nf4" else "nf4", device="cpu")
    for wrong in (
        dequantize_4bit(swapped, state.absmax, state.code, (128, 128), 64),
        dequantize_4bit(packed, state.absmax.flip(0), state.code, (128, 128), 64),
        dequantize_4bit(packed, state.absmax, other_map, (128, 128), 64),
    ):
        assert relative_error(wrong, w) > MIN_ERROR_IF_WRONG


@pytest.mark.parametrize("shape", [(50, 96), (7, 9), (1, 1)])
def test_int8_rows_equal_bitsandbytes(shape: tuple[int, int]) -> None:
    w = draw_weight(shape)
    codes, scb, _ = functional.int8_vectorwise_quant(w.half())
    decoded = dequantize_int8_rows(codes, scb)
    # three roundings of 2^-24 apart: theirs multiplies by a rounded 1/127 last, ours divides by 127 first
    torch.testing.assert_close(decoded, functional.int8_vectorwise_dequant(codes, scb), rtol=3 * 2**-24, atol=0)
    exact = codes.double() * scb.double()[:, None] / 127
    torch.testing.assert_close(decoded.double(), exact, rtol=2 * 2**-24, atol=0)
    assert relative_error(decoded, w) < MAX_ERROR_8_BIT


NOT_NESTED = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [50, 96]}
NESTED = {**NOT_NESTED, "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}


def test_a_quant_state_is_read_from_bytes_and_from_a_tensor() -> None:
    data = json.dumps(NESTED).encode()
    state = read_quant_state(data)
    assert state == QuantState("nf4", (50, 96), 64, "bfloat16", 256, 0.25)
    assert read_quant_state(torch.tensor(list(data), dtype=torch.uint8)) == state
    assert read_quant_state(json.dumps(NOT_NESTED).encode()) == QuantState("nf4", (50, 96), 64, "bfloat16", None, None)


@pytest.mark.parametrize("name", sorted(NESTED))
def test_a_quant_state_lacks_nothing(name: str) -> None:
    rest = {field: value for field, value in NESTED.items() if field != name}
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        read_quant_state(json.dumps(rest).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales_order": "swizzled"}, "do not know: scales_order"),
        ({"quant_type": "int4"}, r"quant_type 'int4'; wanted one of \('nf4', 'fp4'\)"),
        ({"quant_type": None}, "quant_type None"),
        ({"blocksize": 63}, "blocksize 63"),
        ({"blocksize": 64.0}, "blocksize 64.0"),
        ({"blocksize": "64"}, "blocksize '64'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"shape": None}, "shape None"),
        ({"shape": []}, r"shape \[\]"),
        ({"shape": [50, 0]}, r"shape \[50, 0\]"),
        ({"shape": [50, True]}, r"shape \[50, True\]"),
        ({"shape": [50, -96]}, r"shape \[50, -96\]"),
        ({"nested_blocksize": 0}, "nested_blocksize 0"),
        ({"nested_dtype": "float16"}, "nested_dtype 'float16'"),
        ({"nested_offset": math.nan}, "nested_offset nan"),
        ({"nested_offset": math.inf}, "nested_offset inf"),
        ({"nested_offset": None}, "nested_offset None"),
    ],
)
def test_a_quant_state_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_quant_state(json.dumps({**NESTED, **change}).encode())
    assert caught.value.fix


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "of 0 bytes is no JSON"),
        (b'{"quant_type": "nf4"', "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[" * 100_000, "of 100000 bytes is no JSON"),
        (b"[64]", "is a JSON list"),
        (torch.zeros(3), "quant_state: found float32; wanted uint8"),
    ],
)
def test_what_is_no_quant_state_is_refused(data: bytes | Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_quant_state(data)
    assert caught.value.fix


@given(data=st.binary(max_size=40), position=st.integers(0, 400))
@settings(deadline=None)
def test_a_damaged_quant_state_is_refused_or_read(data: bytes, position: int) -> None:
    whole = json.dumps(NESTED).encode()
    try:
        state = read_quant_state(whole[:position] + data + whole[position + len(data) :])
    except CheckpointError:
        return
    assert math.prod(state.shape) > 0


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


MAP, SCALES = torch.zeros(16), torch.ones(75)
AGAIN = NestedAbsmax(torch.ones(1), torch.zeros(256), 0.5, 256)


@pytest.mark.parametrize(
    ("packed", "absmax", "quant_map", "block_size", "nested", "message"),
    [
        (bytes_of(2399, 1), SCALES, MAP, 64, None, r"codes: found 2399 bytes; a \(50, 96\) weight wants 2400"),
        (bytes_of(2400, 1).bfloat16(), SCALES, MAP, 64, None, "codes: found bfloat16; wanted uint8"),
        (bytes_of(2400, 1), SCALES[:74], MAP, 64, None, r"scales of a 4-bit weight: found \(74,\); wanted \(75,\)"),
        (bytes_of(2400, 1), SCALES[:, None], MAP, 64, None, r"found \(75, 1\); wanted \(75,\)"),
        (bytes_of(2400, 1), SCALES.half(), MAP, 64, None, "found float16; wanted float32"),
        (bytes_of(2400, 1), bytes_of(75), MAP, 64, None, "found uint8; wanted float32"),
        (bytes_of(2400, 1), SCALES, torch.zeros(256), 64, None, r"table of 4-bit codes: found \(256,\); wanted \(16,\)"),
        (bytes_of(2400, 1), SCALES, MAP.half(), 64, None, "found float16; wanted float32"),
        (bytes_of(2400, 1), SCALES, MAP, 128, None, r"found \(75,\); wanted \(38,\)"),
        (bytes_of(2400, 1), SCALES, MAP, 0, None, "has blocks of 0; wanted one of"),
        (bytes_of(2400, 1), SCALES, MAP, 64, AGAIN, "weight's scales: found float32; wanted uint8"),
        (bytes_of(2400, 1), bytes_of(74), MAP, 64, AGAIN, r"found \(74,\); wanted \(75,\)"),
        (
            bytes_of(2400, 1),
            bytes_of(75),
            MAP,
            64,
            NestedAbsmax(torch.ones(2), torch.zeros(256), 0.5, 256),
            r"found \(2,\); wanted \(1,\)",
        ),
        (bytes_of(2400, 1), bytes_of(75), MAP, 64, NestedAbsmax(torch.ones(1), torch.zeros(16), 0.5, 256), r"found \(16,\)"),
        (bytes_of(2400, 1), bytes_of(75), MAP, 64, NestedAbsmax(torch.ones(1), torch.zeros(256), 0.5, 100), "blocks of 100"),
    ],
)
def test_4_bits_refuse(
    packed: Tensor, absmax: Tensor, quant_map: Tensor, block_size: int, nested: NestedAbsmax | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize_4bit(packed, absmax, quant_map, (50, 96), block_size, nested)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("codes", "scb", "message"),
    [
        (bytes_of(50, 96), torch.ones(50), "codes: found uint8; wanted int8"),
        (bytes_of(50, 96).char(), torch.ones(96), r"SCB: found \(96,\); wanted \(50,\)"),
        (bytes_of(50, 96).char(), torch.ones(50, 1), r"SCB: found \(50, 1\)"),
        (bytes_of(50, 96).char(), torch.ones(50).half(), "SCB: found float16; wanted float32"),
        (bytes_of(4800).char(), torch.ones(50), r"codes: found \(4800,\); wanted two dimensions"),
    ],
)
def test_int8_rows_refuse(codes: Tensor, scb: Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize_int8_rows(codes, scb)
    assert caught.value.fix
