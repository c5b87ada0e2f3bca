"""Every Triton kernel without a card: compiled for each generation as it would be launched there, and some run by the interpreter.

The launching functions run as they are, on tensors without memory, with a card's compute capability in place of a card; a
launch ends after the compiler. So what is compiled is what a card would be given: tiles, vector lengths, warps, alignments.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from millicent.engine.planner import TENSOR_CORES, Capability
from millicent.kernels import Code, Rows, reference
from millicent.model.config import MMDiTConfig

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from millicent.kernels import attention, attention_codes, attention_kept, channel_norm, elementwise, matmul

# the most shared memory of a block, in KiB: CUDA C++ programming guide, technical specifications per compute capability
SHARED_KIB = {
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (12, 0): 99,
    (12, 1): 99,
}
REGISTERS_PER_BLOCK = 65536
# none of ours keeps anything there; a few registers put aside once cost nothing, those put aside in a loop are many more
MOST_STACK_BYTES = 64

DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
DIM, HEADS, HEAD_WIDTH = MMDiTConfig().dim, MMDiTConfig().num_attention_heads, MMDiTConfig().attention_head_dim
# a small model's: no group of 256 divides it, nor a tile's 128
SMALL_DIM = 192
# references, target and a text, whose sum 16 does not divide: of what it divides, the compiler makes use
BOUNDS, TOKENS, TEXT_TOKENS = (4096, 8192), 8387, 195

Handle = Callable[..., None]


class Case(NamedTuple):
    """Some launches of the engine, and on which cards it makes them."""

    name: str
    launch: Callable[[], None]
    cards: frozenset[Capability]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_rows(code: Code, group: int, dim: int) -> None:
    x, mods = empty(TOKENS, dim), empty(3, 6, dim).unbind(1)
    elementwise.quantize_rows(x, code, group)
    # norm_modulate is the same kernel with less in it
    elementwise.add_gated_norm_modulate(x, x, mods[2], mods[3], mods[4], BOUNDS, code, group)
    elementwise.gelu_rows(empty(TOKENS, 4 * dim), code, group)


def launch_heads() -> None:
    angles = empty(TOKENS, HEAD_WIDTH // 2, dtype=torch.float32)
    elementwise.qk_norm_rope(empty(TOKENS, 3, HEADS, HEAD_WIDTH), empty(2, 2, HEAD_WIDTH), angles, angles, BOUNDS[1])


def launch_attention() -> None:
    angles = empty(TOKENS, HEAD_WIDTH // 2, dtype=torch.float32)
    qkv, weights = empty(TOKENS, 3, HEADS, HEAD_WIDTH), empty(2, 2, HEAD_WIDTH)
    queries = slice(BOUNDS[0], TOKENS)
    attention.attend_normed_int8(qkv, weights, angles, angles, BOUNDS[1], BOUNDS[0], queries, empty(TOKENS - BOUNDS[0], DIM))


def launch_kept_attention(references: int) -> None:
    tokens = TOKENS - references
    angles = empty(tokens, HEAD_WIDTH // 2, dtype=torch.float32)
    qkv, weights = empty(tokens, 3, HEADS, HEAD_WIDTH), empty(2, 2, HEAD_WIDTH)
    kept = attention.make_kept(1, references, HEADS, HEAD_WIDTH, qkv.device).layer(0)
    img_rows = BOUNDS[1] - references
    attention.attend_kept_int8(qkv, weights, angles, angles, img_rows, slice(0, tokens), empty(tokens, DIM), kept)


def launch_products(code: Code) -> None:
    for rows, k, n in [(TEXT_TOKENS, DIM, 3 * DIM), (TOKENS, DIM, 3 * DIM), (TEXT_TOKENS, SMALL_DIM, 3 * SMALL_DIM)]:
        x, weight = empty(rows, k, dtype=DTYPES[code]), empty(n, k, dtype=DTYPES[code])
        scales = [empty(length, 1, dtype=torch.float32) for length in (rows, n)]
        matmul.scaled_matmul(x, scales[0], weight, scales[1], empty(n), empty(rows, n))


def launch_pixels() -> None:
    # the VAE's narrowest norm, and its attention's
    for channels, silu in [(96, True), (384, False)]:
        x = empty(1, channels, 1024, 1024).to(memory_format=torch.channels_last)
        channel_norm.channel_norm_silu(x, empty(channels), silu)


ALL = frozenset(SHARED_KIB)
FP8_CARDS, INT8_CARDS = (ALL & TENSOR_CORES[name] for name in ("fp8", "int8"))
CASES = [
    Case("rows-bf16", partial(launch_rows, "bf16", 1, DIM), ALL),
    Case("rows-fp8", partial(launch_rows, "fp8", 1, DIM), FP8_CARDS),
    Case("rows-int8", partial(launch_rows, "int8", 1, DIM), INT8_CARDS),
    Case("rows-int8-turned-by-256", partial(launch_rows, "int8", 256, DIM), INT8_CARDS),
    Case("rows-int8-turned-by-64", partial(launch_rows, "int8", 64, SMALL_DIM), INT8_CARDS),
    Case("heads", launch_heads, ALL),
    Case("attention", launch_attention, INT8_CARDS),
    Case("attention-kept", partial(launch_kept_attention, 0), INT8_CARDS),
    Case("attention-kept-references", partial(launch_kept_attention, BOUNDS[0]), INT8_CARDS),
    Case("products-fp8", partial(launch_products, "fp8"), FP8_CARDS),
    Case("products-int8", partial(launch_products, "int8"), INT8_CARDS),
    Case("pixels", launch_pixels, ALL),
]


class CardInName:
    """What Triton asks of a driver before it launches. A kernel's compilations are kept by device: here, by architecture."""

    def __init__(self, capability: Capability) -> None:
        self.architecture = 10 * capability[0] + capability[1]

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def stand_in(monkeypatch: pytest.MonkeyPatch, capability: Capability, handle: Handle) -> None:
    """A card of this capability, whose launches go to `handle`: the kernel, then what it was given."""
    monkeypatch.setattr(triton.runtime.driver, "_active", CardInName(capability))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=100))
    monkeypatch.setattr(JITFunction, "__getitem__", lambda kernel, grid: partial(handle, kernel))


def read_resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """A thread's registers, and its bytes of memory that is none of its registers: a stack, where they are spilled to."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2]) + int(found[3])


def pair_cards_and_cases() -> Iterator[Any]:
    for card in SHARED_KIB:
        for case in CASES:
            if card in case.cards:
                yield pytest.param(card, case, id=f"{card[0]}.{card[1]}-{case.name}")


# for Blackwell, 10.0 and 12.0, Triton assembles with a ptxas-blackwell that it brings beside the other cards' ptxas
@pytest.mark.parametrize(("capability", "case"), pair_cards_and_cases())
def test_a_card_has_room_for_what_is_compiled(
    capability: Capability, case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []
    stand_in(
        monkeypatch, capability, lambda kernel, *args, **options: made.append(kernel.run(*args, grid=(1,), warmup=True, **options))
    )
    case.launch()
    assert made
    for kernel in made:
        name, threads = kernel.metadata.name, 32 * kernel.metadata.num_warps
        assert kernel.metadata.shared <= 1024 * SHARED_KIB[capability], name
        registers, stack_bytes = read_resources(kernel.asm["cubin"], tmp_path)
        assert registers * threads <= REGISTERS_PER_BLOCK, name
        assert stack_bytes <= MOST_STACK_BYTES, name


def test_no_kernel_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    stand_in(monkeypatch, (9, 0), lambda kernel, *args, **options: launched.add(kernel.fn.__name__))
    for case in CASES:
        case.launch()
    assert launched == set(find_kernels())


def find_kernels() -> Iterator[str]:
    """Of our functions in Triton, those that are launched, and not called by another."""
    for module in (attention, attention_codes, attention_kept, channel_norm, elementwise, matmul):
        source = inspect.getsource(module)
        yield from (name for name, made in vars(module).items() if isinstance(made, JITFunction) and f" {name}[" in source)


# Triton decides whether to interpret when it is imported, for good: so in another process
INTERPRET = """
import sys, torch
from millicent.kernels import elementwise
calls = torch.load(sys.argv[1])
torch.save([(getattr(elementwise, name)(*given), given) for name, given in calls], sys.argv[2])
"""


class Call(NamedTuple):
    """One of the functions that both sides have, and what it is given: no BF16, to which the interpreter cuts where cards round."""

    name: str
    given: tuple[Any, ...]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_calls() -> Iterator[Call]:
    # 1536 is three vectors of 512, 320 one that is not full
    for dim, code, group in [(1536, "bf16", 1), (1536, "int8", 1), (1536, "int8", 256), (192, "int8", 64), (320, "int8", 16)]:
        x, update, shift, scale, gate = draw(7, dim, seed=1), draw(7, dim, seed=2), *draw(3, 3, dim, seed=3).unbind(1)
        # 2 of the rows are the references', 3 the target's
        how = ((2, 5), code, group)
        yield Call("quantize_rows", (x, code, group))
        yield Call("gelu_rows", (3 * x, code, group))
        yield Call("norm_modulate", (x, shift, scale, *how))
        # a copy, for x changes
        yield Call("add_gated_norm_modulate", (x.clone(), update, gate, shift, scale, *how))
    broken = draw(3, 1536, seed=1)
    broken[1, 700] = torch.nan
    for group in (1, 256):
        yield Call("quantize_rows", (broken, "int8", group))
    angles = draw(7, 16, seed=4)
    yield Call("qk_norm_rope", (draw(7, 3, 5, 32, seed=5), draw(2, 2, 32, seed=6), angles.cos(), angles.sin(), 5))


CALLS = list(make_calls())


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[tuple[Tensor, Tensor | None] | None, tuple[Any, ...]]]:
    """What each of CALLS gave, and its arguments afterwards."""
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save([(call.name, call.given) for call in CALLS], folder / "calls")
    command = [sys.executable, "-c", INTERPRET, str(folder / "calls"), str(folder / "made")]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    # named tuples are not among what torch loads without being told
    made: list[Any] = torch.load(folder / "made", weights_only=False)
    return made


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda number: f"{CALLS[number].name}-{number}")
def test_the_interpreter_gives_what_the_reference_gives(number: int, interpreted: list[Any]) -> None:
    made, given = interpreted[number]
    call = CALLS[number]
    wanted_given = tuple(each.clone() if isinstance(each, Tensor) else each for each in call.given)
    wanted = getattr(reference, call.name)(*wanted_given)
    # what is changed in place, and that nothing else is
    for after, wanted_after in zip(given, wanted_given, strict=True):
        assert_near(after, wanted_after)
    if wanted is not None:
        assert_same_rows(Rows(*made), wanted)


def assert_near(found: object, wanted: object) -> None:
    if not isinstance(wanted, Tensor):
        assert found == wanted
    else:
        # some tens of FP32's last bits: sums of 1536 numbers in another order, and exp and tanh of another library
        torch.testing.assert_close(found, wanted, rtol=4e-6, atol=4e-6, equal_nan=True)


def assert_same_rows(found: Rows, wanted: Rows) -> None:
    if wanted.scale is None:
        assert_near(found.values, wanted.values)
        return
    assert_near(found.scale, wanted.scale)
    told = wanted.scale[:, 0].isfinite()  # what the codes of other rows are says nothing
    assert bool(told.any())
    steps = (found.values.int() - wanted.values.int()).abs()[told]
    # FP32's last bits take what is close to a half to the other side: of values of up to 127 steps, some 1e-5 in either direction
    assert int(steps.max()) <= 1
    assert float(steps.float().mean()) < 1e-3
