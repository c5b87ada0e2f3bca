"""Noise levels, and the walk down them.

A schedule is a list of sigmas from 1 (pure noise) to 0 (the picture), the 0 included. They are computed in FP32 in the
order in which diffusers' FlowMatchEulerDiscreteScheduler computes them, so that they are its values bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from millicent.errors import CheckpointError

TRAIN_TIMESTEPS = 1000
# Lightning was distilled at a constant shift of 3: sigma' = 3 / (3 + 1 / sigma - 1)
LIGHTNING_MU = math.log(3)


@dataclass(frozen=True, slots=True)
class BaseSchedule:
    """How the shift grows with the picture: linear in its tokens, through two points.

    shift_terminal: the last sigma before 0, to which the whole schedule is stretched; None for no stretch.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers scheduler_config.json. Raises CheckpointError for another kind of schedule."""
        wanted = {
            "num_train_timesteps": TRAIN_TIMESTEPS,
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
            "invert_sigmas": False,
            "stochastic_sampling": False,
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
        }
        # what diffusers takes a missing key for is what we want, but for this one
        defaults = {**wanted, "use_dynamic_shifting": False}
        for key, value in wanted.items():
            # older configs write null for false
            found = config.get(key, defaults[key])
            if found != value and (found or value):
                raise CheckpointError(
                    f"scheduler_config.json says {key} = {found!r}; this version runs {value!r}.",
                    "Use the scheduler of a Qwen-Image-Edit, -2509 or -2511 folder.",
                )
        return cls(**{key: config[key] for key in cls.__dataclass_fields__ if key in config})


def base_sigmas(steps: int, image_tokens: int, schedule: BaseSchedule) -> list[float]:
    """The schedule of the undistilled model: `steps` sigmas for a target of `image_tokens`, and the final 0."""
    slope = (schedule.max_shift - schedule.base_shift) / (schedule.max_image_seq_len - schedule.base_image_seq_len)
    mu = image_tokens * slope + (schedule.base_shift - slope * schedule.base_image_seq_len)
    return _shifted_sigmas(steps, mu, schedule.shift_terminal)


def lightning_sigmas(steps: int) -> list[float]:
    """The schedule that the Lightning LoRAs were distilled on: 1, 0.9, 0.75, 0.5, 0 at 4 steps."""
    return _shifted_sigmas(steps, LIGHTNING_MU, None)


def _shifted_sigmas(steps: int, mu: float, terminal: float | None) -> list[float]:
    """sigma' = e^mu / (e^mu + 1 / sigma - 1), of sigma from 1 to 1 / steps (Esser et al., 2024, section 5.3.2)."""
    even = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    sigmas = math.exp(mu) / (math.exp(mu) + (1 / even - 1))
    # a single step starts and ends at 1, and there is nothing to stretch
    if terminal and steps > 1:
        rest = 1 - sigmas
        sigmas = 1 - rest / (rest[-1] / (1 - terminal))
    assert sigmas.dtype == np.float32
    return [*(float(sigma) for sigma in sigmas), 0.0]


def denoise(
    step: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Euler's method down the sigmas: x + (sigma_next - sigma) v, in FP32, cast back after every step.

    step: latents (B, L, C) and timesteps (B,) in [0, 1] -> velocity (B, L, C). sigmas: n + 1 levels, the last 0.
    on_step: called with the step's number before each step.
    """
    steps, number = denoising(latents, sigmas), 0
    asked = next(steps)
    while True:
        if on_step is not None:
            on_step(number)
        try:
            asked, number = steps.send(step(*asked)), number + 1
        except StopIteration as ended:
            drawn: Tensor = ended.value
            return drawn


def denoising(latents: Tensor, sigmas: Sequence[float]) -> Generator[tuple[Tensor, Tensor], Tensor, Tensor]:
    """As denoise, for whoever takes several pictures' steps together: asks with latents and timesteps, is sent the velocity."""
    # made on the host: made on a card, they would wait for all its work so far
    levels = torch.tensor(sigmas, dtype=torch.float32).to(latents.device, non_blocking=True)
    for sigma, sigma_next in itertools.pairwise(levels):
        velocity = yield latents, round_timestep(sigma, latents)
        latents = (latents.float() + (sigma_next - sigma) * velocity).to(velocity.dtype)
    return latents


def round_timestep(sigma: Tensor, latents: Tensor) -> Tensor:
    """One level as the network sees it, (B,): to thousandths and back in the latents' dtype, as it was trained.

    In BF16 the four Lightning levels become 1, 0.8984375, 0.75390625 and 0.5.
    """
    return (sigma * TRAIN_TIMESTEPS).expand(latents.shape[0]).to(latents.dtype) / TRAIN_TIMESTEPS


def guide(positive: Tensor, negative: Tensor, true_cfg: float) -> Tensor:
    """n + s (p - n), each token (B, L, C) scaled back to the length that p has there."""
    guided = negative + true_cfg * (positive - negative)
    wanted, found = (torch.linalg.vector_norm(velocity, dim=-1, keepdim=True) for velocity in (positive, guided))
    scaled: Tensor = guided * (wanted / found)
    return scaled
