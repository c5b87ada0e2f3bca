"""The fast VAE on the CPU: the same numbers by the reference twin, and what is kept of which shape."""

import pytest
import torch
from conftest import make_vae
from torch import Tensor

from millicent.engine.fast_vae import CapturedVAE, FusedNorm, chunked_attention, speed_up
from millicent.kernels.channel_norm_reference import channel_norm_silu
from millicent.model.config import VAEConfig
from millicent.model.vae import VAE, ChannelNorm, NormSiLU, convert_state

# latents and pixels are of order 1; channels-last convolutions sum in another order
FP32_TOLERANCE = {"atol": 5e-6, "rtol": 0.0}
# relative to the spread: BF16 keeps 8 bits (2^-9 of rounding), about 60 roundings lie one behind another
BF16_RELATIVE = 60**0.5 * 2**-9 * 2


def load(dtype: torch.dtype = torch.float32) -> VAE:
    reference = make_vae()
    vae = VAE(VAEConfig.from_dict(reference.config))
    vae.load_state_dict(convert_state(reference.state_dict()))
    return vae.eval().to(dtype)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("silu", [False, True])
def test_the_norms_reference_equals_the_formula_in_float64(silu: bool) -> None:
    x, gamma = noise(2, 24, 3, 5).to(memory_format=torch.channels_last), noise(24, 1, 1, seed=1)
    x[0, :, 1, 2] = 0
    x[1, 3, 0, 0] = 1e4
    wide = x.double()
    length = wide.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    expected = wide / length * 24**0.5 * gamma.double()
    expected = expected * torch.sigmoid(expected) if silu else expected
    found = channel_norm_silu(x, gamma, silu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)  # FP32 against float64, values of order 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_silu_as_one_module_give_the_same_bits(dtype: torch.dtype) -> None:
    both, alone = NormSiLU(24).to(dtype), ChannelNorm(24).to(dtype)
    with torch.no_grad():
        both.gamma.copy_(noise(24, 1, 1))
        alone.gamma.copy_(both.gamma)
        x = noise(2, 24, 3, 5).to(dtype)
        assert torch.equal(both(x), torch.nn.functional.silu(alone(x)))


@pytest.mark.parametrize("attention", ["sdpa", "chunked"])
def test_the_fast_vae_draws_the_same_in_fp32(attention: str) -> None:
    plain, fast = load(), load()
    names = list(plain.state_dict())
    speed_up(fast, attention=attention)
    assert list(fast.state_dict()) == names
    assert not any(isinstance(module, ChannelNorm) for module in fast.modules())
    assert sum(module.silu for module in fast.modules() if isinstance(module, FusedNorm)) == sum(
        name.endswith((".norm1.gamma", ".norm2.gamma", ".norm_out.gamma")) for name in names
    )
    pixels, latents = noise(2, 3, 48, 80).clamp(-1, 1), noise(2, 16, 6, 10)
    with torch.inference_mode():
        torch.testing.assert_close(fast.encode(pixels), plain.encode(pixels), **FP32_TOLERANCE)
        torch.testing.assert_close(fast.decode(latents), plain.decode(latents), **FP32_TOLERANCE)


def test_the_fast_vae_in_bf16_stays_near_fp32() -> None:
    plain, fast = load(), load(torch.bfloat16)
    speed_up(fast)
    latents = noise(1, 16, 8, 8)
    with torch.inference_mode():
        error = relative(fast.decode(latents.bfloat16()), plain.decode(latents))
    assert 0 < error < BF16_RELATIVE


def test_without_the_kernel_the_norms_stay() -> None:
    vae = load()
    speed_up(vae, kernel=False)
    assert any(isinstance(module, NormSiLU) for module in vae.modules())
    assert not any(isinstance(module, FusedNorm) for module in vae.modules())


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_attention_in_chunks_equals_the_formula_in_float64(rows: int) -> None:
    q, k, v = (noise(2, 30, 48, seed=seed) * 2 for seed in range(3))
    wide = (q.double() @ k.double().mT * 48**-0.5).softmax(-1) @ v.double()
    found = chunked_attention(q, k, v, rows)
    torch.testing.assert_close(found.double(), wide, atol=5e-6, rtol=0.0)  # FP32 sums of 48 and 30 terms of order 1 to 10


def test_without_graphs_it_is_the_vae_itself() -> None:
    vae = load()
    latents = noise(1, 16, 4, 4)
    with torch.inference_mode():
        assert torch.equal(CapturedVAE(vae, graphs=False).decode(latents), vae.decode(latents))
    assert CapturedVAE(vae, graphs=False).config is vae.config
