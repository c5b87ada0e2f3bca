"""What a picture is made of: spread, grain, coarse forms and the shape of its spectrum. Static has grain and no forms."""

from __future__ import annotations

import numpy as np
from PIL import Image

from millicent.quality.color import Floats
from millicent.quality.shrink import to_levels

PATCH_PX, PATCHES_A_SIDE = 64, 4
SPECTRUM_PX = 128
COARSE_CYCLES, FINE_CYCLES = 4.5, 40  # across the picture
LATENT_PX = 8  # beyond one cycle in two latents, the VAE's decoder alone rules


def spread_levels(levels: Floats) -> float:
    """(H, W, 3) of a small picture -> the standard deviation, in levels, of the channel that varies most."""
    return float(levels.std((0, 1)).max())


def noise_levels(image: Image.Image) -> float:
    """The standard deviation, in levels, of grain from pixel to pixel, taken as Gaussian; in full resolution, on 16 patches.

    Immerkaer, "Fast Noise Variance Estimation", 1996, with the median in place of the mean, which edges hardly move. The quietest
    quarter of the patches counts: a knitted product does not fill every corner of a picture, and static does.
    """
    patch = min(PATCH_PX, *image.size)
    sigmas = []
    for row in range(PATCHES_A_SIDE):
        for column in range(PATCHES_A_SIDE):
            left = (image.width - patch) * column // (PATCHES_A_SIDE - 1)
            top = (image.height - patch) * row // (PATCHES_A_SIDE - 1)
            sigmas.append(_grain(to_levels(image.crop((left, top, left + patch, top + patch)).convert("L"))))
    return float(np.percentile(sigmas, 25))


def _grain(a: Floats) -> float:
    """(H, W) in levels."""
    if min(a.shape) < 3:
        return 0.0
    rows = a[:-2] - 2 * a[1:-1] + a[2:]
    laplacian = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]  # of independent noise: 6 times its standard deviation
    return float(np.median(np.abs(laplacian)) / (0.6745 * 6))


def spectrum(levels: Floats, side_px: int) -> tuple[float, float]:
    """(H, W, 3) -> the share of what varies that coarse forms hold, and how flat the finer spectrum is: 0.56 of noise, 0 of forms.

    side_px: the longer side before the picture was shrunk. Flatness is the geometric mean of the power over the arithmetic one, up
    to 40 cycles across, and no further than latents can say.
    """
    gray = levels.mean(-1)
    window = _window(gray.shape[0])[:, None] * _window(gray.shape[1])[None]
    weighted = (gray - (gray * window).sum() / window.sum()) * window
    power = np.abs(np.fft.rfft2(weighted)) ** 2
    down = np.fft.fftfreq(gray.shape[0], 1 / gray.shape[0])[:, None]
    across = np.arange(power.shape[1])[None]
    cycles = np.hypot(down, across)
    varied = power[cycles > 0].sum()
    finest = min(FINE_CYCLES, 0.9 * side_px / (2 * LATENT_PX))
    middle = power[(cycles > COARSE_CYCLES) & (cycles <= finest)] + 1e-9
    if varied <= 1e-6 or not middle.size:
        return 1.0, 0.0
    coarse = power[(cycles > 0) & (cycles <= COARSE_CYCLES)].sum()
    return float(coarse / varied), float(np.exp(np.log(middle).mean()) / middle.mean())


def _window(length: int) -> Floats:
    """Hann's, without the zeros at its ends."""
    return np.hanning(length + 2)[1:-1].astype(np.float32)
