"""Schedules and steps against diffusers' scheduler, bit for bit."""

import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift, retrieve_timesteps

from benchmarks.reference import BASE_SCHEDULER
from millicent.engine.sampler import (
    BaseSchedule,
    base_sigmas,
    denoise,
    guide,
    lightning_sigmas,
    round_timestep,
)
from millicent.errors import CheckpointError

LIGHTNING = {**BASE_SCHEDULER, "base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
BASE = BaseSchedule.from_dict(BASE_SCHEDULER)
IMAGE_TOKENS = (64, 256, 1024, 4056, 4096, 6400)


def reference_scheduler(config: dict[str, object], steps: int, image_tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler, set as its pipeline sets it."""
    import numpy as np

    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    shift = [scheduler.config[key] for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")]
    sigmas = np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=calculate_shift(image_tokens, *shift))
    return scheduler


@pytest.mark.parametrize("image_tokens", IMAGE_TOKENS)
def test_base_sigmas_equal_diffusers(image_tokens: int) -> None:
    for steps in range(2, 51):
        assert base_sigmas(steps, image_tokens, BASE) == reference_scheduler(BASE_SCHEDULER, steps, image_tokens).sigmas.tolist()


@pytest.mark.parametrize("image_tokens", IMAGE_TOKENS)
def test_lightning_sigmas_equal_diffusers_at_any_size(image_tokens: int) -> None:
    for steps in range(1, 51):
        assert lightning_sigmas(steps) == reference_scheduler(LIGHTNING, steps, image_tokens).sigmas.tolist()


@pytest.mark.parametrize(
    ("steps", "published"),
    [
        (4, [1, 0.9, 0.75, 0.5, 0]),
        (8, [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3, 0]),
    ],
)
def test_lightning_sigmas_are_the_published_ones(steps: int, published: list[float]) -> None:
    # the published figures have six decimals
    assert lightning_sigmas(steps) == pytest.approx(published, abs=5e-7)


def test_base_sigmas_at_four_steps_are_the_published_ones() -> None:
    # the published figures have four decimals
    assert base_sigmas(4, 4096, BASE) == pytest.approx([1, 0.7667, 0.4556, 0.02, 0], abs=5e-5)


def test_a_single_base_step_is_finite() -> None:
    # diffusers divides 0 by 0 here
    assert base_sigmas(1, 4096, BASE) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dynamic_shifting", False),
        ("time_shift_type", "linear"),
        ("invert_sigmas", True),
        ("use_beta_sigmas", True),
        ("stochastic_sampling", True),
        ("num_train_timesteps", 500),
    ],
)
def test_another_scheduler_is_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        BaseSchedule.from_dict({**BASE_SCHEDULER, key: value})


def test_a_missing_shift_is_what_diffusers_takes_it_for() -> None:
    keys = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "shift_terminal")
    bare = {key: value for key, value in BASE_SCHEDULER.items() if key not in keys}
    expected = reference_scheduler(bare, 8, 4096).sigmas.tolist()
    assert base_sigmas(8, 4096, BaseSchedule.from_dict(bare)) == expected


def test_timesteps_in_bf16_are_rounded_as_trained() -> None:
    latents = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    seen = [round_timestep(torch.tensor(sigma), latents) for sigma in lightning_sigmas(4)[:-1]]
    assert [t.tolist() for t in seen] == [[1.0] * 2, [0.8984375] * 2, [0.75390625] * 2, [0.5] * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denoise_equals_diffusers_steps(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 6, 64, generator=generator).to(dtype)
    velocities = [torch.randn(2, 6, 64, generator=generator).to(dtype) for _ in range(7)]
    scheduler = reference_scheduler(BASE_SCHEDULER, 7, 4096)
    scheduler.set_begin_index(0)
    expected, expected_timesteps = noise, []
    for t, velocity in zip(scheduler.timesteps, velocities, strict=True):
        expected_timesteps.append(t.expand(2).to(dtype) / 1000)
        expected = scheduler.step(velocity, t, expected, return_dict=False)[0]
    timesteps, order, remaining = [], [], iter(velocities)

    def step(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        timesteps.append(timestep)
        return next(remaining)

    latents = denoise(step, noise, base_sigmas(7, 4096, BASE), order.append)
    assert torch.equal(latents, expected)
    assert torch.equal(torch.stack(timesteps), torch.stack(expected_timesteps))
    assert order == list(range(7))


def test_denoising_with_the_true_velocity_arrives_at_the_picture() -> None:
    picture, noise = torch.full((1, 2, 3), 0.25), torch.ones(1, 2, 3)
    for sigmas in (lightning_sigmas(4), base_sigmas(9, 64, BASE), [1.0, 0.3, 0.0]):
        arrived = denoise(lambda *_: noise - picture, noise, sigmas)
        # one rounding a step
        torch.testing.assert_close(arrived, picture, atol=1e-6, rtol=0.0)
        assert all(a > b for a, b in itertools.pairwise(sigmas))


def test_guidance_keeps_each_tokens_length() -> None:
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 1, 5, 64, generator=generator)
    guided = guide(positive, negative, 4.0)
    # FP32 rounding of a division and a product
    torch.testing.assert_close(guided.norm(dim=-1), positive.norm(dim=-1), atol=1e-5, rtol=0.0)
    straight = negative + 4.0 * (positive - negative)
    cosine = torch.nn.functional.cosine_similarity(guided, straight, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-6, rtol=0.0)
    # without guidance nothing changes, but for rounding
    torch.testing.assert_close(guide(positive, negative, 1.0), positive, atol=1e-5, rtol=0.0)
