"""CIELAB and CIEDE2000 against scikit-image's."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from millicent.quality.color import ciede2000, to_lab


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Levels (100, 100, 3) twice: any two colors, near ones, grays and black."""
    random = np.random.default_rng(5)
    first = random.uniform(0, 255, (100, 100, 3))
    second = random.uniform(0, 255, (100, 100, 3))
    second[:40] = np.clip(first[:40] + random.normal(0, 4, (40, 100, 3)), 0, 255)
    second[40:50] = first[40:50].mean(-1, keepdims=True)
    first[50] = 0
    second[51] = 0
    return first.astype(np.float32), second.astype(np.float32)


def test_lab_is_scikit_images(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(to_lab(pairs[0]), rgb2lab(pairs[0].astype(np.float64) / 255), atol=2e-3)


def test_ciede2000_is_scikit_images(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    labs = [rgb2lab(levels.astype(np.float64) / 255) for levels in pairs]
    np.testing.assert_allclose(ciede2000(to_lab(pairs[0]), to_lab(pairs[1])), deltaE_ciede2000(*labs), atol=2e-2)


def test_a_color_does_not_differ_from_itself(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    lab = to_lab(pairs[0])
    assert ciede2000(lab, lab).max() == 0
