"""Where one step of the transformer goes, kernel by kernel, at true size with random weights. `python -m benchmarks.step`.

Needs a CUDA card. `benchmarks.peers` holds the engine against others; this one says what to do next.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

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


@torch.inference_mode()
def measure(name: Format, args: argparse.Namespace) -> dict[str, object]:
    """Prints the kernels that take longest; the figures of one format."""
    settings = Settings(format=name, attention=args.attention, reuse_reference=args.reuse)
    began = time.perf_counter()
    drawing, latents = start(settings, args)
    torch.cuda.synchronize()
    built_s = time.perf_counter() - began
    drawing.step(latents, 0)  # what is timed is a later one
    step_ms = median_ms(lambda: drawing.step(latents, 1), args.repeats)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        drawing.step(latents, 1)
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.device_time_total)
    for row in rows[:14]:
        each_us = row.device_time_total / row.count
        print(f"  {row.device_time_total / 1e3:8.2f} ms {row.count:6} x {each_us:8.1f} us  {row.key[:90]}")
    kernels_ms = sum(row.device_time_total for row in rows) / 1e3
    figures = {"step_ms": round(step_ms, 2), "kernels_ms": round(kernels_ms, 2), "built_s": round(built_s, 1)}
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
