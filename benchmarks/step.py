"""Where one step of the transformer goes, kernel by kernel, at true size with random weights. `python -m benchmarks.step`.

Needs a CUDA card. `benchmarks.peers` holds the engine against others; this one says what to do next: which kernels a step's time
is, when the card waits for the next one, how much two run beside each other, and at what clock and power all that was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import describe_machine
from millicent.engine.laying_out import lay_out
from millicent.engine.planner import plan
from millicent.engine.settings import Format, Settings
from millicent.engine.transformer import Drawing
from millicent.model.config import MMDiTConfig
from millicent.model.mmdit import MMDiT

SIGMAS = [1.0, 0.9, 0.75, 0.5, 0.0]
# the last of so many is told: before it the card has become as hot as in a row of edits
PROFILED_STEPS = 6
KERNELS_SHOWN, GAPS_SHOWN = 14, 8


class Kernel(NamedTuple):
    """One launch, as the profiler saw it."""

    name: str
    begin_us: float
    end_us: float


class Timeline(NamedTuple):
    """What became of the time of some kernels, ms, and the gaps between them, us, by the kernels before and after."""

    whole_ms: float
    idle_ms: float
    beside_ms: float  # two or more at once
    gaps_us: dict[tuple[str, str], list[float]]


def lay_out_in_time(kernels: Sequence[Kernel]) -> Timeline:
    """kernels: in the order in which they began."""
    gaps: dict[tuple[str, str], list[float]] = defaultdict(list)
    last, beside = kernels[0], 0.0
    for kernel in kernels[1:]:
        if kernel.begin_us >= last.end_us:
            gaps[last.name, kernel.name].append(kernel.begin_us - last.end_us)
        else:
            beside += min(kernel.end_us, last.end_us) - kernel.begin_us
        if kernel.end_us >= last.end_us:
            last = kernel
    whole, idle = last.end_us - kernels[0].begin_us, sum(sum(each) for each in gaps.values())
    return Timeline(whole / 1e3, idle / 1e3, beside / 1e3, dict(gaps))


def make_network(layers: int, device: torch.device) -> MMDiT:
    """Random BF16 weights of the true width, made where they stay."""
    with torch.device("meta"):
        network = MMDiT(MMDiTConfig(num_layers=layers, zero_cond_t=True))
    network = network.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.normal_(0, 0.1, generator=generator)
    for name, parameter in network.named_parameters():
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight", "txt_norm.weight")):
            parameter.add_(1)
    return network


def median_ms(work: Callable[[], object], repeats: int) -> float:
    for _ in range(2):
        work()
    milliseconds = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end))
    return statistics.median(milliseconds)


def start(settings: Settings, args: argparse.Namespace) -> tuple[Drawing, torch.Tensor]:
    device = torch.device("cuda")
    network = make_network(args.layers, device)
    chosen = plan(settings, torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    assert chosen is not None
    fast = lay_out(network, chosen, device, torch.bfloat16)
    fast.network.uses_graphs, fast.network.overlaps_text = not args.no_graphs, not args.no_overlap
    fast.network.keeps_codes = not args.fresh_codes
    mods, _ = fast.modulation.mods(SIGMAS)
    shapes, tokens = [(args.side, args.side)] * 2, args.side**2
    latents, references = (torch.randn(1, tokens, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    txt = torch.randn(1, args.txt_tokens, network.config.joint_attention_dim, device=device, dtype=torch.bfloat16)
    # the second picture of a shape is the one that is captured
    drawings = [fast.network.start(txt, references, shapes, mods) for _ in range(2)]
    return drawings[-1], latents


def profile_last(work: Callable[[], object], times: int) -> list[Kernel]:
    """The kernels of the last of `times`, which all launch the same ones, in the order in which they began."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            work()
        torch.cuda.synchronize()
    found = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    kernels = sorted((Kernel(event.name, event.time_range.start, event.time_range.end) for event in found), key=lambda one: one[1])
    assert len(kernels) % times == 0, (len(kernels), times)
    return kernels[-len(kernels) // times :]


def read_clock(work: Callable[[], object], work_s: float) -> dict[str, float]:
    """The clock of the multiprocessors and the card's power in the middle of work that has gone on for a second."""
    times, began = round(1 / work_s) + 2, time.perf_counter()
    for _ in range(times):
        work()
    time.sleep(max(0.0, began + (times - 1) * work_s - time.perf_counter()))  # the host may have been held up
    found: dict[str, float] = {"sm_mhz": torch.cuda.clock_rate(), "watts": round(torch.cuda.power_draw() / 1e3)}
    torch.cuda.synchronize()
    return found


def show(kernels: Sequence[Kernel], timeline: Timeline) -> None:
    spent: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        spent[kernel.name].append(kernel.end_us - kernel.begin_us)
    for name, each in sorted(spent.items(), key=lambda item: -sum(item[1]))[:KERNELS_SHOWN]:
        print(f"  {sum(each) / 1e3:8.2f} ms {len(each):6} x {statistics.mean(each):8.1f} us  {name[:90]}")
    print(f"  of {timeline.whole_ms:.2f} ms two ran at once for {timeline.beside_ms:.2f}, and none for {timeline.idle_ms:.2f}:")
    for (before, after), each in sorted(timeline.gaps_us.items(), key=lambda item: -sum(item[1]))[:GAPS_SHOWN]:
        print(f"  {sum(each) / 1e3:8.2f} ms {len(each):6} x {statistics.mean(each):8.1f} us  {before[:44]} -> {after[:44]}")


@torch.inference_mode()
def measure(name: Format, args: argparse.Namespace) -> dict[str, object]:
    """Prints the kernels and gaps that take longest; the figures of one format."""
    settings = Settings(format=name, attention=args.attention, reuse_reference=args.reuse)
    began = time.perf_counter()
    drawing, latents = start(settings, args)
    torch.cuda.synchronize()
    built_s = time.perf_counter() - began
    drawing.step(latents, 0)  # what is timed is a later one
    step_ms = median_ms(lambda: drawing.step(latents, 1), args.repeats)
    kernels = profile_last(lambda: drawing.step(latents, 1), PROFILED_STEPS)
    timeline = lay_out_in_time(kernels)
    show(kernels, timeline)
    figures = {
        "step_ms": round(step_ms, 2),
        "profiled_ms": round(timeline.whole_ms, 2),
        "idle_ms": round(timeline.idle_ms, 2),
        "beside_ms": round(timeline.beside_ms, 2),
        "built_s": round(built_s, 1),
        **read_clock(lambda: drawing.step(latents, 1), step_ms / 1e3),
    }
    return {"benchmark": "step", **vars(args), "format": name, **figures, **describe_machine(torch.device("cuda"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", nargs="+", default=["fp8"])
    parser.add_argument("--attention", default="exact")
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-overlap", action="store_true", help="the text's products after the pictures', not beside them")
    parser.add_argument("--fresh-codes", action="store_true", help="8-bit attention with each step's own mean key and scales")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--txt-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    for name in args.format:
        print(json.dumps(measure(name, args)))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
