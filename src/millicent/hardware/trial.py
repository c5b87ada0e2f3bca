"""Pre-flight's second stage, as its child process: `python -m millicent.hardware.trial --device cuda`. It alone here loads torch.

It runs a few small things that an edit stands on and prints a JSON line before and after each, so that a hang or a crash names its
step. judging.py starts it, ends it after a time limit, and says what its lines mean. Operands are codes drawn at random, and every
product is compared with the float64 product of what those codes stand for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from millicent.facts.formats import list_capabilities, support
from millicent.hardware.recipes import known_failure

if TYPE_CHECKING:
    from torch import Tensor

PINNED_BYTES = 256 << 20
CHECKED_SHAPE = (256, 512, 256)  # M, K, N of the product that is compared
TIMED_SHAPE = (4096, 4096, 4096)  # of the one that is timed: large enough for the tensor cores, and 100 MB in BF16
TIMED_RUNS = 5
# rounding to BF16 gives 0.002; a scale at the wrong place gives 0.5 and more
MAX_ERROR = 0.02
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class Product:
    """run: the tensor cores' product, (M, N). exact: what it should be, in float64."""

    run: Callable[[], Tensor]
    exact: Callable[[], Tensor]


MakeProduct = Callable[[tuple[int, int, int], str], Product]


class StepFailed(Exception):  # noqa: N818  # tells, and is not an error of ours
    """A step ran, and did not give what it should."""


class Teller:
    """Writes the lines: {"step", "state": "begin" | "done" | "skipped" | "failed", "found", and numbers}."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def tell(self, step: str, state: str, found: str = "", **numbers: Any) -> None:
        print(json.dumps({"step": step, "state": state, "found": found, **numbers}), file=self._out, flush=True)

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """The body fills in what was found. What it raises is told, and raised again as StepFailed."""
        self.tell(name, "begin")
        found: dict[str, Any] = {}
        started = time.perf_counter()
        try:
            yield found
        except Exception as error:  # the edge of one step: whatever torch or the card says is the finding
            lines = str(error).strip().splitlines()
            self.tell(name, "failed", f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)
            raise StepFailed(name) from error
        self.tell(name, "done", **found, seconds=round(time.perf_counter() - started, 3))


def try_all(teller: Teller, device: str, wait: Callable[[], None] | None = None) -> None:
    """Every step in order; wait is called before the card is used.

    Raises StepFailed where one fails that all later ones stand on.
    """
    with teller.step("import torch") as found:
        import torch

        found["found"] = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if wait is not None:
        wait()
    capability = None
    if device == "cuda":
        with teller.step("open card") as found:
            capability = _open_card(found)
    with teller.step("kernel") as found:
        total = float((torch.ones(1024, device=device) + 1).sum())
        if total != 2048:
            raise RuntimeError(f"1024 twos sum to {total}")
        found["found"] = "a first kernel ran"
    independent: list[tuple[str, Callable[[dict[str, Any]], None]]] = [("convolution", lambda found: _convolve(device, found))]
    if device == "cuda":
        independent.append(("pinned memory", _pin))
    for name, run in independent:
        _try_one(teller, name, run)
    _try_products(teller, device, capability)


def _try_one(teller: Teller, name: str, run: Callable[[dict[str, Any]], None]) -> None:
    """A step whose failure leaves the later ones to be tried."""
    try:
        with teller.step(name) as found:
            run(found)
    except StepFailed:
        return


def _open_card(found: dict[str, Any]) -> tuple[int, int]:
    import torch

    torch.cuda.init()
    major, minor = torch.cuda.get_device_capability(0)
    found["found"] = f"{torch.cuda.get_device_name(0)}, compute capability {major}.{minor}"
    return major, minor


def _convolve(device: str, found: dict[str, Any]) -> None:
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 8, 8, 8, generator=generator), torch.randn(8, 8, 3, 3, generator=generator)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    y = F.conv2d(x.to(device, dtype), weight.to(device, dtype), padding=1)
    _compare(y, F.conv2d(x.to(dtype).double(), weight.to(dtype).double(), padding=1))
    version = torch.backends.cudnn.version() if device == "cuda" else None
    found["found"] = f"cuDNN {version} convolves" if version else "convolves, without cuDNN"
    if device == "cuda" and version is None:
        raise RuntimeError("torch finds no cuDNN (libcudnn.so.9)")


def _pin(found: dict[str, Any]) -> None:
    import torch

    # a power of two, as torch would round any other size up to one
    block = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    if not block.is_pinned():
        raise RuntimeError("the memory that torch gave is not locked")
    found["found"] = f"{PINNED_BYTES >> 20} MiB were locked"


def _try_products(teller: Teller, device: str, capability: tuple[int, int] | None) -> None:
    import torch

    for name, make in PRODUCTS.items():
        reason = None
        if capability is not None:
            reason = known_failure(name, capability, str(torch.__version__), torch.version.cuda) or _unsupported(name, capability)
        elif name == "nvfp4":
            reason = "a CPU has no such product"
        if reason:
            teller.tell(name, "skipped", reason)
            continue
        _try_one(teller, name, lambda found, make=make: _try_product(make, device, found))  # type: ignore[misc]


def _unsupported(product: str, capability: tuple[int, int]) -> str | None:
    """Why the card's tensor cores do not run it; None where they do."""
    if capability not in list_capabilities():
        return "the table does not know this card's compute capability"
    told = support(product, capability)
    return None if told.runs else told.because


def _try_product(make: MakeProduct, device: str, found: dict[str, Any]) -> None:
    checked = make(CHECKED_SHAPE, device)
    found["relative_error"] = _compare(checked.run(), checked.exact())
    found["found"] = "right"
    if device == "cuda":
        m, k, n = TIMED_SHAPE
        seconds = _time(make(TIMED_SHAPE, device).run)
        found["tera_per_s"] = round(2 * m * k * n / seconds / 1e12, 1)


def _compare(y: Tensor, exact: Tensor) -> float:
    """The relative error, of the whole. Raises StepFailed where it is more than rounding, or no number."""
    difference = float((y.double().to(exact.device) - exact).norm() / exact.norm())
    # written so that NaN fails too
    if not difference <= MAX_ERROR:
        raise RuntimeError(f"wrong: a relative error of {difference:.3g}, where {MAX_ERROR} is the most")
    return round(difference, 5)


def _time(run: Callable[[], Tensor]) -> float:
    """Seconds of one run on the card, the median of a few, after one that chooses an algorithm."""
    import torch

    run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(TIMED_RUNS)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def _make_bf16(shape: tuple[int, int, int], device: str) -> Product:
    import torch

    m, k, n = shape
    a, b = (torch.randn(rows, k, device=device).bfloat16() for rows in (m, n))
    return Product(lambda: a @ b.t(), lambda: a.double() @ b.double().t())


def _make_fp8(shape: tuple[int, int, int], device: str, per_row: bool) -> Product:
    import torch

    m, k, n = shape
    a, b = (torch.randn(rows, k, device=device).to(torch.float8_e4m3fn) for rows in (m, n))
    scale_a = torch.rand((m, 1) if per_row else (), device=device) + 0.5
    scale_b = torch.rand((1, n) if per_row else (), device=device) + 0.5
    return Product(
        lambda: torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True),
        lambda: (a.double() * scale_a) @ (b.double().t() * scale_b),
    )


def _make_int8(shape: tuple[int, int, int], device: str) -> Product:
    import torch

    m, k, n = shape
    a, b = (torch.randint(-127, 128, (rows, k), device=device).to(torch.int8) for rows in (m, n))
    return Product(lambda: torch._int_mm(a, b.t()), lambda: a.double() @ b.double().t())


def _make_nvfp4(shape: tuple[int, int, int], device: str) -> Product:
    import torch

    m, k, n = shape
    (a, scale_a, exact_a), (b, scale_b, exact_b) = (_draw_nvfp4(rows, k, device) for rows in (m, n))
    return Product(
        lambda: torch._scaled_mm(
            a.view(torch.float4_e2m1fn_x2),
            b.view(torch.float4_e2m1fn_x2).t(),
            scale_a=scale_a,
            scale_b=scale_b,
            out_dtype=torch.bfloat16,
        ),
        lambda: exact_a() @ exact_b().t(),
    )


def _draw_nvfp4(rows: int, k: int, device: str) -> tuple[Tensor, Tensor, Callable[[], Tensor]]:
    """Codes (rows, k / 2), two a byte, the low half first; scales of 16 neighbors, swizzled and flat; what they stand for.

    Swizzled: tiles of 128 rows and 4 scales, in each the scale of row r and column c at (r % 32) 16 + (r // 32) 4 + c, as the
    cuBLAS documentation has it under "1D Block Scaling Factors Layout".
    """
    import torch

    codes = torch.randint(0, 256, (rows, k // 2), device=device).to(torch.uint8)
    # of very different sizes, so that one at a wrong place is seen
    scales = torch.exp2(torch.randint(-3, 4, (rows, k // 16), device=device).float())
    tiles = scales.to(torch.float8_e4m3fn).view(torch.uint8).reshape(rows // 128, 4, 32, k // 64, 4)
    swizzled = tiles.permute(0, 3, 2, 1, 4).contiguous().view(torch.float8_e4m3fn).flatten()

    def exact() -> Tensor:
        magnitudes = torch.tensor(E2M1, device=device, dtype=torch.float64)
        each = torch.stack([codes & 15, codes >> 4], dim=-1).view(rows, k).long()
        return magnitudes[each & 7] * (1 - 2 * (each >> 3)) * scales.double().repeat_interleave(16, dim=1)

    return codes, swizzled, exact


# by the names of facts/formats.py; BF16 first, which the others are measured by
PRODUCTS: dict[str, MakeProduct] = {
    "bf16": _make_bf16,
    "fp8-rowwise": lambda shape, device: _make_fp8(shape, device, per_row=True),
    "fp8-tensorwise": lambda shape, device: _make_fp8(shape, device, per_row=False),
    "int8": _make_int8,
    "nvfp4": _make_nvfp4,
}


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Try what an edit stands on; one JSON line before and after each step.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wait", action="store_true", help="leave the card alone until a line comes on standard input")
    arguments = parser.parse_args()
    # libraries print to standard output too, where our lines alone belong
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        try_all(Teller(out), arguments.device, _wait if arguments.wait else None)
    except StepFailed:
        return 1
    return 0


def _wait() -> None:
    """Raises SystemExit where standard input ends: whoever started this has ended."""
    if not sys.stdin.readline():
        sys.exit()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # torch takes a tenth of a second to be taken down, of which nobody has anything
    os._exit(code)
