"""The fast VAE on a card: its kernel against the twin, the whole in BF16 against diffusers' 3-D one, and its recorded passes."""

from collections.abc import Iterator

import pytest
import torch
from conftest import make_vae
from torch import Tensor

pytest.importorskip("triton")

from millicent.engine.fast_vae import CapturedVAE, chunked_attention, speed_up
from millicent.engine.output import Sent, to_uint8
from millicent.kernels import channel_norm, channel_norm_reference
from millicent.model.config import VAEConfig
from millicent.model.vae import VAE, convert_state

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
BASE_DIM = 24  # 24, 48 and 96 channels: no powers of two, as the real 96, 192 and 384
# FP32 sums in another order: where a value lies on the border, it goes to the next number of BF16, at most 2^-7 away
BF16_STEP = {"atol": 1e-6, "rtol": 2**-7}
# relative to the spread: BF16 rounds by up to 2^-9, and about 60 independent roundings lie one behind another; twice that
BF16_RELATIVE = 60**0.5 * 2**-9 * 2

REFERENCE = make_vae(BASE_DIM)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(CUDA)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).square().mean().sqrt() / expected.float().std())


def make_fast(attention: str = "sdpa") -> VAE:
    vae = VAE(VAEConfig.from_dict(REFERENCE.config))
    vae.load_state_dict(convert_state(REFERENCE.state_dict()))
    vae = vae.eval().to(CUDA, torch.bfloat16)
    speed_up(vae, attention=attention)
    return vae


@pytest.fixture
def reference() -> Iterator[torch.nn.Module]:
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield REFERENCE.to(CUDA)
    REFERENCE.to("cpu")
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 96, 64, 64), (2, 192, 17, 5), (1, 384, 1, 1), (3, 384, 3, 7), (1, 24, 31, 33)], ids=str)
def test_the_norm_equals_its_twin(
    shape: tuple[int, int, int, int], dtype: torch.dtype, silu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = noise(*shape) * 3
    x[0, 5, -1, -1] = 1e4
    x[-1, :, 0, 0] = 0
    x[0, :, 0, -1] *= 1e-3
    x = x.to(dtype, memory_format=torch.channels_last)
    gamma = noise(shape[1], 1, 1, seed=1).to(dtype)
    expected = channel_norm_reference.channel_norm_silu(x, gamma, silu)
    unwritten = torch.full_like(x, float("nan"))
    monkeypatch.setattr(torch, "empty_like", lambda *_, **__: unwritten)
    found = channel_norm.channel_norm_silu(x, gamma, silu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    # in FP32 the exponential and the division are approximations of a few last bits
    torch.testing.assert_close(found, expected, **(BF16_STEP if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-5}))
    assert (found == expected).float().mean() > (0.99 if dtype == torch.bfloat16 else 0.2)


def test_the_norm_reaches_beyond_two_billion_numbers() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB")
    x = torch.zeros(1, 4800, 4800, 96, dtype=torch.bfloat16, device=CUDA).permute(0, 3, 1, 2)
    x[:, :, -1] = noise(1, 96, 4800).bfloat16()
    gamma = noise(96, 1, 1, seed=1).bfloat16()
    expected = channel_norm_reference.channel_norm_silu(x[:, :, -1:], gamma, True)
    torch.testing.assert_close(channel_norm.channel_norm_silu(x, gamma, True)[:, :, -1:], expected, **BF16_STEP)


@pytest.mark.parametrize("attention", ["sdpa", "chunked"])
@pytest.mark.parametrize("graphs", [False, True])
def test_the_vae_stays_near_diffusers_in_fp32(reference: torch.nn.Module, attention: str, graphs: bool) -> None:
    vae = CapturedVAE(make_fast(attention), graphs=graphs)
    mean, std = (torch.tensor(getattr(reference.config, f"latents_{s}"), device=CUDA).view(1, 16, 1, 1) for s in ("mean", "std"))
    # what BF16 does to the inputs is not the VAE's error
    pixels, latents = noise(1, 3, 192, 160).clamp(-1, 1).bfloat16(), noise(1, 16, 24, 20).bfloat16()
    with torch.inference_mode():
        encoded = (reference.encode(pixels.float()[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
        decoded = reference.decode((latents.float() * std + mean)[:, :, None]).sample[:, :, 0].clamp(-1, 1)
    assert 0 < relative(vae.encode(pixels), encoded) < BF16_RELATIVE
    assert 0 < relative(vae.decode(latents), decoded) < BF16_RELATIVE


def test_one_recording_draws_every_picture_of_its_shape() -> None:
    fast = make_fast()
    captured = CapturedVAE(fast)
    pictures = [noise(1, 3, 96, 128, seed=seed).clamp(-1, 1).bfloat16() for seed in range(4)]
    latents = [captured.encode(picture) for picture in pictures]
    drawn = [captured.decode(latent) for latent in latents]
    assert relative(latents[0], latents[1]) > 0.1
    with torch.inference_mode():
        for picture, latent, found in zip(pictures, latents, drawn, strict=True):
            # the same kernels on the same numbers; a tenth of BF16's error for sums in an order that is not fixed
            assert relative(latent, fast.encode(picture)) < BF16_RELATIVE / 10
            assert relative(found, fast.decode(latent)) < BF16_RELATIVE / 10


def test_more_shapes_than_are_kept_share_memory_without_harm() -> None:
    fast = make_fast()
    captured = CapturedVAE(fast)
    shapes = [(64, 64), (96, 64), (64, 96), (128, 96), (96, 128), (160, 64)]
    for seed, size in enumerate((*shapes, shapes[0], shapes[5], shapes[4])):  # forgotten, then kept ones
        pixels = noise(1, 3, *size, seed=seed).clamp(-1, 1).bfloat16()
        for _ in range(2):  # as it is, then recorded
            latents = captured.encode(pixels)
            drawn = captured.decode(latents)
        with torch.inference_mode():
            assert relative(latents, fast.encode(pixels)) < BF16_RELATIVE / 10
            assert relative(drawn, fast.decode(latents)) < BF16_RELATIVE / 10


@pytest.mark.parametrize("calls_before", [0, 1], ids=["first", "to be recorded"])
def test_too_little_memory_harms_nothing(calls_before: int) -> None:
    captured = CapturedVAE(make_fast())
    small, large = noise(1, 16, 8, 8).bfloat16(), noise(1, 16, 128, 128).bfloat16()
    before = captured.decode(small)
    for _ in range(calls_before):
        captured.decode(large)
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 64 * 2**20  # one tensor of the last level is 48 MiB
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    stream = torch.cuda.current_stream()
    try:
        with pytest.raises(RuntimeError):  # out of memory, or that of ending the recording
            captured.decode(large)
    finally:
        torch.cuda.set_stream(stream)  # as engine/failures.py does
        torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(captured.decode(small), before)
    assert captured.decode(large).isfinite().all()


def test_attention_of_384_channels_both_ways() -> None:
    q, k, v = (noise(1, 5000, 384, seed=seed).bfloat16() for seed in range(3))
    wide = (q.double() @ k.double().mT * 384**-0.5).softmax(-1) @ v.double()
    # weights and results are rounded to BF16, each by up to 2^-9; twice their sum
    assert relative(chunked_attention(q, k, v), wide) < 2**-7


def test_levels_come_back_as_a_cpu_makes_them() -> None:
    pixels = noise(3, 70, 50).bfloat16()
    [levels] = Sent(to_uint8(pixels)).wait()
    assert torch.equal(levels, to_uint8(pixels.cpu()))
