"""Shift and zoom: found where they are, to a fraction of what is allowed, and not found where nothing says so."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from judged import knit, moved, noise, photograph, scenes, tint
from PIL import Image

from millicent.quality.color import Floats
from millicent.quality.limits import Limits
from millicent.quality.registration import FINE_PX, lay_back, register
from millicent.quality.shrink import shrink, small_size, to_levels, whole


def small(image: Image.Image) -> Floats:
    return to_levels(shrink(image, whole(image.size), small_size(whole(image.size), FINE_PX)))


CAT = photograph("cat", 480)
COFFEE = photograph("coffee", 480)


@settings(max_examples=25, deadline=None)
@example(zoom=0.994140625, right=0.0, down=0.0, recolored=False)
@given(zoom=st.floats(0.88, 1.12), right=st.floats(-0.06, 0.06), down=st.floats(-0.06, 0.06), recolored=st.booleans())
def test_a_photograph_is_found_where_it_was_moved(zoom: float, right: float, down: float, recolored: bool) -> None:
    result = moved(tint(CAT, (180, 120, 60)) if recolored else CAT, zoom, right, down)
    found = register(small(CAT), small(result))
    if not found.is_moved:  # where a move fits hardly better than none, none is told: only of what the limits let pass
        limits = Limits()
        assert abs(zoom - 1) < limits.max_zoom
        assert max(abs(right), abs(down)) < limits.max_shift
        return
    assert found.zoom == pytest.approx(zoom, abs=0.004)
    assert found.shift_x == pytest.approx(right, abs=0.003)
    assert found.shift_y == pytest.approx(down, abs=0.003)
    assert found.error < 0.002


def test_a_picture_lies_over_itself_exactly() -> None:
    found = register(small(COFFEE), small(COFFEE))
    assert (found.shift, found.zoom, found.is_moved) == (0, 1, False)
    assert found.likeness == pytest.approx(1)


def test_a_tall_picture_is_measured_in_shares_of_its_longer_side() -> None:
    tall = COFFEE.crop((100, 0, 260, 320))
    found = register(small(tall), small(moved(tall, 1.0, 0.02, -0.03)))
    assert (found.shift_x, found.shift_y) == (pytest.approx(0.02, abs=0.002), pytest.approx(-0.03, abs=0.002))


def test_what_is_laid_back_lies_over_its_source() -> None:
    source, result = small(CAT), small(moved(CAT, 1.05, 0.03, -0.02))
    back = lay_back(result, register(source, result))
    seen = np.isfinite(back)
    assert 0.8 < seen.mean() < 1
    assert np.abs(back - source)[seen].mean() < 0.3 * np.abs(result - source).mean()


def test_the_outlines_of_static_are_like_nothing() -> None:
    for seed, scene in enumerate(scenes(8)):
        assert register(small(scene.source), small(noise("gaussian", 256, seed))).likeness < 0.15


@pytest.mark.parametrize("levels", [0, 128])
def test_a_blank_picture_is_like_nothing(levels: int) -> None:
    blank = np.full((FINE_PX, FINE_PX, 3), levels, np.float32)
    for source in (blank, small(scenes(8)[0].source)):
        found = register(source, blank)
        assert (found.likeness, found.is_moved) == (0, False)


def test_a_pattern_that_repeats_is_not_moved_by_a_whole_repeat() -> None:
    before, after = knit(512, (200, 190, 170), 1), knit(512, (40, 50, 120), 2)
    assert not register(small(before), small(after)).is_moved


@pytest.mark.parametrize("shape", [(1, 1), (1, 256), (16, 256), (256, 16), (2, 3), (7, 256)])
def test_any_shape_is_measured_without_an_error(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for _ in range(3):
        found = register(*random.uniform(0, 255, (2, *shape, 3)).astype(np.float32))
        assert np.isfinite([found.zoom, found.shift, found.likeness]).all()
