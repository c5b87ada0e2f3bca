"""Our 2-D VAE against diffusers' 3-D one, with the same weights, the dead temporal taps filled with noise."""

import re

import pytest
import torch
from conftest import draw_weights, make_vae
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from millicent.model.config import VAEConfig
from millicent.model.vae import VAE, convert_state

# latents and pixels are of order 1; 2-D and 3-D convolutions sum in another order
FP32_TOLERANCE = {"atol": 5e-6, "rtol": 0.0}

SIZES = [(64, 64), (48, 80), (80, 32)]


def load(reference: AutoencoderKLQwenImage, state: dict[str, Tensor] | None = None) -> VAE:
    with torch.device("meta"):
        ours = VAE(VAEConfig.from_dict(reference.config))
    ours.load_state_dict(convert_state(state or reference.state_dict()), assign=True)
    return ours.eval()


REFERENCE = make_vae()
OURS = load(REFERENCE)
MEAN = torch.tensor(REFERENCE.config.latents_mean).view(1, 16, 1, 1)
STD = torch.tensor(REFERENCE.config.latents_std).view(1, 16, 1, 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", SIZES)
def test_encode_equals_diffusers(size: tuple[int, int]) -> None:
    pixels = noise(2, 3, *size).clamp(-1, 1)
    with torch.inference_mode():
        expected = REFERENCE.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        latents = OURS.encode(pixels)
    assert latents.shape == (2, 16, size[0] // 8, size[1] // 8)
    assert expected.std() > 0.3
    torch.testing.assert_close(latents, (expected - MEAN) / STD, **FP32_TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
def test_decode_equals_diffusers(size: tuple[int, int]) -> None:
    latents = noise(2, 16, size[0] // 8, size[1] // 8)
    with torch.inference_mode():
        expected = REFERENCE.decode((latents * STD + MEAN)[:, :, None]).sample[:, :, 0]
        pixels = OURS.decode(latents)
    assert pixels.shape == (2, 3, *size)
    assert expected.std() > 0.1
    torch.testing.assert_close(pixels, expected, **FP32_TOLERANCE)


def test_the_posteriors_variance_equals_diffusers() -> None:
    pixels = noise(1, 3, 32, 48).clamp(-1, 1)
    with torch.inference_mode():
        expected = REFERENCE.encode(pixels[:, :, None]).latent_dist
        log_variance = OURS.moments(pixels)[1]
    torch.testing.assert_close(log_variance.clamp(-30, 20), expected.logvar[:, :, 0], **FP32_TOLERANCE)


def to_wan_key(key: str) -> str:
    """diffusers' name of a VAE parameter -> the Wan file's: the published table, read from right to left."""
    blocks = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    blocks["conv_shortcut"] = "shortcut"
    upsamples = {(b, r): 4 * b + r for b in range(4) for r in range(3)}
    key = key.replace("post_quant_conv.", "conv2.") if key.startswith("post_") else key.replace("quant_conv.", "conv1.")
    for half in ("encoder", "decoder"):
        key = key.replace(f"{half}.conv_in.", f"{half}.conv1.")
        key = key.replace(f"{half}.norm_out.", f"{half}.head.0.").replace(f"{half}.conv_out.", f"{half}.head.2.")
    key = key.replace("mid_block.resnets.0.", "middle.0.").replace("mid_block.attentions.0.", "middle.1.")
    key = key.replace("mid_block.resnets.1.", "middle.2.")
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"upsamples.{upsamples[int(m[1]), int(m[2])]}.", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"upsamples.{(3, 7, 11)[int(m[1])]}.", key)
    key = key.replace("down_blocks.", "downsamples.")
    in_residual = re.search(r"(samples\.\d+|middle\.[02])\.(norm1|conv1|norm2|conv2|conv_shortcut)\.", key)
    return key.replace(f".{in_residual[2]}.", f".{blocks[in_residual[2]]}.") if in_residual else key


def test_wan_native_names_give_the_same_weights() -> None:
    wan = {to_wan_key(key): tensor for key, tensor in REFERENCE.state_dict().items()}
    assert len(wan) == len(REFERENCE.state_dict())
    # names that the published files are told by
    for key in (
        "decoder.middle.0.residual.0.gamma",
        "encoder.downsamples.0.residual.2.weight",
        "decoder.upsamples.14.residual.6.bias",
        "decoder.upsamples.3.resample.1.weight",
        "decoder.head.0.gamma",
        "encoder.conv1.weight",
        "conv2.bias",
    ):
        assert key in wan
    ours = load(REFERENCE, wan)
    expected = OURS.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in ours.state_dict().items())


def test_temporal_taps_but_the_last_do_not_matter() -> None:
    changed = draw_weights(AutoencoderKLQwenImage(base_dim=8), seed=99)
    state = {}
    for key, tensor in REFERENCE.state_dict().items():
        state[key] = tensor.clone()
        if tensor.ndim == 5:
            state[key][:, :, :-1] = changed.state_dict()[key][:, :, :-1]
    changed.load_state_dict(state)
    pixels = noise(1, 3, 32, 32).clamp(-1, 1)
    with torch.inference_mode():
        first, second = (vae.encode(pixels[:, :, None]).latent_dist.mode() for vae in (REFERENCE, changed))
    torch.testing.assert_close(first, second, **FP32_TOLERANCE)
