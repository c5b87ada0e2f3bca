"""The loop of steps 2 and 3: learning rate, new pairs, a log line, and an end when gradients stop being finite."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.demo.optimize import MasterWeights, captured, cosine


@dataclass(frozen=True)
class Length:
    """The schedule ends at `steps` or after `minutes`, whichever comes first; `stop_after` minutes stop before its end."""

    steps: int
    minutes: float
    stop_after: float = float("inf")
    warmup: int = 300


def run(
    name: str,
    step: Callable[[], Tensor],
    weights: MasterWeights,
    generator: torch.Generator,
    length: Length,
    refill: Callable[[], None],
    refill_every: int,
    log_every: int,
) -> dict[str, float]:
    """Repeat `step` (one loss, weights stepped) as one CUDA graph; returns what happened, for the record."""
    weights.prepare(cosine(weights.steps, weights.steps / length.steps, length.warmup))
    step = captured(step, weights, generator)
    started, first, recent = time.monotonic(), weights.steps, []

    def progress() -> float:
        return max(weights.steps / length.steps, (time.monotonic() - started) / (length.minutes * 60))

    while (share := progress()) < 1 and time.monotonic() - started < length.stop_after * 60:
        weights.prepare(cosine(weights.steps, share, length.warmup))
        recent.append(step())
        if weights.steps % refill_every == 0:
            refill()
        if weights.steps % log_every == 0:
            mean, elapsed = torch.stack(recent).mean().item(), time.monotonic() - started
            rate = (weights.steps - first) / elapsed
            print(
                f"{name} {weights.steps:6d}/{length.steps} {elapsed:6.1f} s {rate:5.1f} steps/s  loss {mean:.4f}"
                f"  skipped {int(weights.skipped)}",
                flush=True,
            )
            recent.clear()
            if weights.lost():
                print("stopping early: too many gradients were not finite", flush=True)
                break
    seconds = time.monotonic() - started
    return {"steps": weights.steps, "skipped": int(weights.skipped), "seconds": round(seconds, 1)}
