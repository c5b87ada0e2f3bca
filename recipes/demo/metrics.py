"""How far an edit is from the truth: CIEDE2000 inside and outside the edit, SSIM, PSNR; batched, on any device.

Tests hold both against scikit-image's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

D65_WHITE = (0.95047, 1.0, 1.08883)
SRGB_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)


def to_lab(rgb: Tensor) -> Tensor:
    """sRGB (B, 3, H, W) in [0, 1] -> CIELAB under D65."""
    rgb = rgb.double().clamp(0, 1)
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    white = torch.tensor(D65_WHITE, dtype=rgb.dtype, device=rgb.device).view(1, 3, 1, 1)
    matrix = torch.tensor(SRGB_TO_XYZ, dtype=rgb.dtype, device=rgb.device)
    xyz = torch.einsum("ij,bjhw->bihw", matrix, linear) / white
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def ciede2000(a: Tensor, b: Tensor) -> Tensor:
    """The color difference of two sRGB pictures (B, 3, H, W) in [0, 1], per pixel (B, H, W).

    Equations (2) to (22) of Sharma, Wu & Dalal, "The CIEDE2000 Color-Difference Formula", 2005.
    """
    (l1, a1, b1), (l2, a2, b2) = to_lab(a).unbind(1), to_lab(b).unbind(1)
    c_mean7 = ((torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2) ** 7
    g = 0.5 * (1 - (c_mean7 / (c_mean7 + 25.0**7)).sqrt())
    a1, a2 = (1 + g) * a1, (1 + g) * a2
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    h1, h2 = torch.atan2(b1, a1) % (2 * math.pi), torch.atan2(b2, a2) % (2 * math.pi)
    gray = (c1 * c2) == 0
    dh = h2 - h1
    dh = torch.where(dh > math.pi, dh - 2 * math.pi, torch.where(dh < -math.pi, dh + 2 * math.pi, dh))
    dh = torch.where(gray, torch.zeros_like(dh), dh)
    h_sum = h1 + h2
    h_mean = torch.where((h1 - h2).abs() <= math.pi, h_sum / 2, (h_sum + torch.where(h_sum < 2 * math.pi, 1, -1) * 2 * math.pi) / 2)
    h_mean = torch.where(gray, h_sum, h_mean)
    l_mean, c_mean = (l1 + l2) / 2, (c1 + c2) / 2
    rad = math.radians
    t = (
        1
        - 0.17 * torch.cos(h_mean - rad(30))
        + 0.24 * torch.cos(2 * h_mean)
        + 0.32 * torch.cos(3 * h_mean + rad(6))
        - 0.20 * torch.cos(4 * h_mean - rad(63))
    )
    s_l = 1 + 0.015 * (l_mean - 50) ** 2 / (20 + (l_mean - 50) ** 2).sqrt()
    s_c, s_h = 1 + 0.045 * c_mean, 1 + 0.015 * c_mean * t
    d_theta = rad(30) * torch.exp(-(((torch.rad2deg(h_mean) - 275) / 25) ** 2))
    r_t = -torch.sin(2 * d_theta) * 2 * (c_mean**7 / (c_mean**7 + 25.0**7)).sqrt()
    lightness, chroma = (l2 - l1) / s_l, (c2 - c1) / s_c
    hue = 2 * (c1 * c2).sqrt() * torch.sin(dh / 2) / s_h
    return (lightness**2 + chroma**2 + hue**2 + r_t * chroma * hue).clamp(min=0).sqrt().float()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity (B,) of pictures (B, 3, H, W) in [0, 1].

    Wang et al., 2004: Gaussian windows of sigma 1.5 cut at 11 pixels, per channel, without the border.
    """
    a, b = a.double(), b.double()
    taps = torch.exp(-((torch.arange(11, device=a.device, dtype=a.dtype) - 5) ** 2) / (2 * 1.5**2))
    taps = (taps / taps.sum()).expand(a.shape[1], 1, 1, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, taps, groups=x.shape[1]), taps.transpose(2, 3), groups=x.shape[1])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    map_ = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return map_.mean((1, 2, 3)).float()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of pictures in [0, 1]."""
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)).clamp(min=1e-10))


MIN_OUTSIDE_PX = 300


def measure(output: Tensor, truth: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """One figure a picture, (B,): `mask` (B, H, W) is true where the edit changes the source.

    de_outside is NaN where fewer than 300 pixels lie outside.
    """
    difference = ciede2000(output, truth)
    inside, outside = mask.float(), 1 - mask.float()
    n_in, n_out = inside.sum((1, 2)), outside.sum((1, 2))
    outside_mean = (difference * outside).sum((1, 2)) / n_out.clamp(min=1)
    return {
        "de_inside": (difference * inside).sum((1, 2)) / n_in.clamp(min=1),
        "de_outside": torch.where(n_out >= MIN_OUTSIDE_PX, outside_mean, torch.nan),
        "ssim": ssim(output, truth),
        "psnr": psnr(output, truth),
    }
