"""Colors as the eye tells them apart: CIELAB and CIEDE2000, in numpy. Tests hold both against scikit-image's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]  # single precision, where nothing else is said

# sRGB's primaries over D65's white, so that white comes out as (1, 1, 1)
_TO_XYZ = np.array(
    [
        [0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047],
        [0.212671, 0.715160, 0.072169],
        [0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883],
    ],
    dtype=np.float32,
)
_TO_LAB = np.array([[0, 116, 0], [500, -500, 0], [0, 200, -200]], dtype=np.float32)


def to_lab(levels: Floats) -> Floats:
    """sRGB levels (..., 3) from 0 to 255 -> CIELAB under D65."""
    rgb = levels / np.float32(255)
    linear = np.where(rgb <= 0.04045, rgb / np.float32(12.92), ((rgb + np.float32(0.055)) / np.float32(1.055)) ** np.float32(2.4))
    xyz = linear @ _TO_XYZ.T
    f = np.where(xyz > 0.008856, np.cbrt(xyz), np.float32(7.787) * xyz + np.float32(16 / 116))
    lab: Floats = f @ _TO_LAB.T - np.array([16, 0, 0], dtype=np.float32)
    return lab


def ciede2000(lab1: Floats, lab2: Floats) -> Floats:
    """The difference of two CIELAB pictures (..., 3), per pixel (...).

    Equations (2) to (22) of Sharma, Wu & Dalal, "The CIEDE2000 Color-Difference Formula", 2005.
    """
    l1, a1, b1 = np.moveaxis(lab1, -1, 0)
    l2, a2, b2 = np.moveaxis(lab2, -1, 0)
    stretch = 1 + 0.5 * (1 - _seventh((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2))
    a1, a2 = stretch * a1, stretch * a2
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.arctan2(b1, a1), np.arctan2(b2, a2)
    gray = c1 * c2 == 0
    turn = np.where(gray, 0, (h2 - h1 + math.pi) % (2 * math.pi) - math.pi)  # the short way around
    h_mean = np.where(gray, h1 + h2, h1 + turn / 2)
    l_mean, c_mean = (l1 + l2) / 2, (c1 + c2) / 2
    off = (l_mean - 50) ** 2
    s_l, s_c = 1 + 0.015 * off / np.sqrt(20 + off), 1 + 0.045 * c_mean
    s_h = 1 + 0.015 * c_mean * _hue_weight(h_mean)
    degrees = np.degrees(h_mean) % 360
    twist = -2 * _seventh(c_mean) * np.sin(np.radians(60) * np.exp(-(((degrees - 275) / 25) ** 2)))
    lightness, chroma = (l2 - l1) / s_l, (c2 - c1) / s_c
    hue = 2 * np.sqrt(c1 * c2) * np.sin(turn / 2) / s_h
    squared = lightness**2 + chroma**2 + hue**2 + twist * chroma * hue
    difference: Floats = np.sqrt(np.maximum(squared, 0)).astype(np.float32)
    return difference


def _seventh(chroma: Floats) -> Floats:
    power = chroma.astype(np.float64) ** 7  # 1e14 and more: single precision would do, its rounding is another matter
    root: Floats = np.sqrt(power / (power + 25.0**7)).astype(np.float32)
    return root


def _hue_weight(hue: Floats) -> Floats:
    """T of equation (15); hue in radians."""
    weight: Floats = (
        1
        - 0.17 * np.cos(hue - math.radians(30))
        + 0.24 * np.cos(2 * hue)
        + 0.32 * np.cos(3 * hue + math.radians(6))
        - 0.20 * np.cos(4 * hue - math.radians(63))
    )
    return weight
