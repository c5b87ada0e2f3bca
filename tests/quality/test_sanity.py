"""Each check alone: what it finds, what it lets pass, and what a recipe changes in it."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import (
    as_jpeg,
    decode_noise,
    in_oval,
    knit,
    moved,
    noise,
    photograph,
    scenes,
    through_vae,
    tint,
    to_picture,
    tweed,
    with_grain,
)
from PIL import Image

from millicent.images import fit_to
from millicent.quality.limits import Limits
from millicent.quality.sanity import Verdict, judge

DEFAULTS = Limits()
CAT = photograph("cat", 512)
NAVY, SAND = (40, 60, 140), (200, 175, 140)


def faults(verdict: Verdict) -> list[str]:
    """The name of each check that found fault."""
    assert verdict.accepted == (not verdict.reasons)
    return [reason.split(":")[0].split(" by ")[0] for reason in verdict.reasons]


# static


@pytest.mark.parametrize("side_px", [256, 512, 1024])
@pytest.mark.parametrize("kind", ["uniform", "gaussian", "gray", "salt and pepper", "latents"])
def test_static_is_found(kind: str, side_px: int) -> None:
    if (kind, side_px) == ("latents", 1024):
        side_px = 768  # decoding takes its time
    static = decode_noise(side_px, 3) if kind == "latents" else noise(kind, side_px, 3)
    for source in (CAT.resize((side_px, side_px)), scenes(4)[0].source, tweed(512, SAND, 1)):
        assert faults(judge(source, static, DEFAULTS)) == ["static"]


def test_heavy_grain_over_the_right_picture_is_static() -> None:
    assert faults(judge(CAT, with_grain(tint(CAT, SAND), 40, 1), DEFAULTS)) == ["static"]


def test_light_grain_and_a_grainy_source_are_not() -> None:
    assert judge(CAT, with_grain(tint(CAT, SAND), 8, 1), DEFAULTS).accepted
    grainy = with_grain(CAT, 40, 1)
    assert judge(grainy, tint(grainy, SAND), DEFAULTS).accepted


@pytest.mark.parametrize("texture", [tweed, knit])
def test_woven_and_knitted_goods_are_not_static(texture: object) -> None:
    assert callable(texture)
    for side_px in (384, 1024):
        before, after = texture(side_px, SAND, 1), texture(side_px, NAVY, 2)
        assert faults(judge(before, tint(before, NAVY), DEFAULTS)) == []
        assert faults(judge(before, after, DEFAULTS)) == []  # each fleck elsewhere, as a model would draw it


@pytest.mark.parametrize("texture", [tweed, knit])
def test_a_plain_product_may_become_a_woven_one(texture: object) -> None:
    assert callable(texture)
    oval = in_oval((768, 768))
    before = Image.composite(Image.new("RGB", oval.size, (150, 150, 155)), Image.new("RGB", oval.size, "white"), oval)
    assert faults(judge(before, Image.composite(texture(768, NAVY, 1), before, oval), DEFAULTS)) == []


@pytest.mark.parametrize("name", ["grass", "gravel", "brick"])
def test_a_photographed_texture_may_be_recolored(name: str) -> None:
    before = photograph(name, 512)
    assert faults(judge(before, tint(before, SAND), DEFAULTS)) == []


# blank


@pytest.mark.parametrize("color", ["black", "white", (127, 127, 127), (200, 30, 30)])
def test_one_color_is_blank_however_it_was_kept(color: str) -> None:
    blank = Image.new("RGB", CAT.size, color)
    for result in (blank, as_jpeg(blank, 60), with_grain(blank, 1.5, 1)):
        assert faults(judge(CAT, result, DEFAULTS)) == ["blank"]


def test_a_white_product_on_white_is_not_blank() -> None:
    oval = in_oval(CAT.size)
    result = Image.composite(Image.new("RGB", CAT.size, (240, 240, 240)), Image.new("RGB", CAT.size, "white"), oval)
    assert faults(judge(CAT, result, DEFAULTS)) == []


# copy


@pytest.mark.parametrize("how", ["itself", "jpeg", "vae"])
def test_a_copy_is_found(how: str) -> None:
    source = CAT.crop((0, 0, 512, 336))
    copy = {"itself": lambda x: x, "jpeg": lambda x: as_jpeg(x, 75), "vae": through_vae}[how](source)
    assert faults(judge(source, copy, DEFAULTS)) == ["a copy of the input"]
    assert judge(source, copy, Limits(allow_copy=True)).accepted


def test_a_copy_in_another_place_is_told_twice() -> None:
    verdict = judge(CAT, moved(CAT, 1.03), DEFAULTS)
    assert faults(verdict) == ["a copy of the input", "zoomed"]


def test_a_small_logo_in_another_color_is_no_copy() -> None:
    result = CAT.copy()
    result.paste((30, 60, 200), (240, 160, 270, 190))  # 0.5 % of the picture
    assert judge(CAT, result, DEFAULTS).accepted


def test_a_little_more_light_everywhere_is_no_copy() -> None:
    brighter = CAT.point(lambda level: min(255, round(level * 1.12)))
    assert judge(CAT, brighter, DEFAULTS).accepted


# shift and zoom


def test_a_move_is_told_in_pixels_of_the_whole_picture() -> None:
    verdict = judge(CAT, moved(tint(CAT, SAND), 1.0, 0.02, -0.01), DEFAULTS)
    assert faults(verdict) == ["shifted"]
    assert verdict.figures["shift_x_px"] == pytest.approx(0.02 * 512, abs=0.6)
    assert verdict.figures["shift_y_px"] == pytest.approx(-0.01 * 512, abs=0.6)
    assert judge(CAT, moved(tint(CAT, SAND), 1.0, 0.02, -0.01), Limits(max_shift=0.03)).accepted
    assert judge(CAT, moved(tint(CAT, SAND), 1.1, 0.02, -0.01), Limits(allow_shift=True)).accepted


def test_what_has_nothing_in_common_is_not_guessed_at() -> None:
    other = photograph("rocket", 512).resize(CAT.size)
    verdict = judge(CAT, other, DEFAULTS)
    assert verdict.accepted
    assert "zoom" not in verdict.figures
    assert "shift" not in verdict.figures
    assert faults(judge(CAT, other, Limits(require_registration=True))) == ["not measurable"]


def test_a_result_of_another_size_and_nearly_the_same_shape_is_measured() -> None:
    result = tint(CAT, SAND).resize((1184, 800))  # 512 x 341, as a model that draws multiples of 32 makes it
    verdict = judge(CAT, result, DEFAULTS)
    assert verdict.accepted
    assert verdict.figures["zoom"] == pytest.approx(1, abs=0.003)


def test_a_picture_drawn_in_another_shape_is_not_measured() -> None:
    assert "zoom" not in judge(CAT, tint(CAT, SAND).resize((512, 512)), DEFAULTS).figures


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_padding_and_cropping_are_no_shift(fit: str) -> None:
    assert fit in ("pad", "crop")
    for size in ((500, 500), (300, 640)):
        good = fit_to(tint(CAT, SAND), *size, fit)  # type: ignore[arg-type]
        verdict = judge(CAT, good, DEFAULTS, fit=fit)  # type: ignore[arg-type]
        assert verdict.accepted
        assert verdict.figures["likeness"] > 0.85
        bad = fit_to(moved(tint(CAT, SAND), 1.04), *size, fit)  # type: ignore[arg-type]
        assert faults(judge(CAT, bad, DEFAULTS, fit=fit)) == ["zoomed"]  # type: ignore[arg-type]


# drift


def test_drift_is_measured_outside_the_mask() -> None:
    mask = in_oval(CAT.size)
    kept = tint(CAT, NAVY, mask)
    verdict = judge(CAT, kept, DEFAULTS, mask)
    assert verdict.accepted
    assert verdict.figures["drift_p95_de"] < 1
    warmer = to_picture(np.asarray(kept, dtype=np.float32) + np.array([12, 0, -14]))
    assert faults(judge(CAT, warmer, DEFAULTS, mask))[0] == "color drift"
    assert judge(CAT, warmer, DEFAULTS).accepted  # nobody said that anything stays


def test_drift_of_a_part_is_told_too() -> None:
    mask = in_oval(CAT.size)
    kept = tint(CAT, NAVY, mask)
    kept.paste((250, 0, 0), (0, 0, 512, 40))
    (reason,) = judge(CAT, kept, DEFAULTS, mask).reasons
    assert reason.startswith("color drift: 5 % of what was to stay")


def test_drift_is_measured_after_the_picture_is_laid_back() -> None:
    mask = in_oval(CAT.size)
    away = moved(tint(CAT, NAVY, mask), 1.04, 0.02, 0)
    assert judge(CAT, away, Limits(allow_shift=True), mask).accepted


def product(backdrop: tuple[int, int, int], color: tuple[int, int, int]) -> Image.Image:
    """A mug-like oval with light from the left, on a backdrop that is lighter above."""
    size = (640, 480)
    y, x = np.mgrid[: size[1], : size[0]]
    ground = to_picture(np.array(backdrop) * (1.0 - 0.15 * y / size[1])[..., None])
    body = to_picture(np.array(color) * (1.1 - 0.5 * x / size[0])[..., None])
    return Image.composite(body, ground, in_oval(size))


@pytest.mark.parametrize(
    ("keep", "after", "found"),
    [
        ("background", product((225, 225, 225), NAVY), []),
        ("background", product((225, 205, 205), NAVY), ["color drift", "color drift"]),
        ("product", product((150, 190, 225), (180, 60, 60)), []),
        ("product", product((150, 190, 225), (150, 75, 60)), ["color drift", "color drift"]),
        ("nothing", product((150, 190, 225), NAVY), []),
    ],
)
def test_what_a_recipe_keeps_must_not_drift(keep: str, after: Image.Image, found: list[str]) -> None:
    before = product((225, 225, 225), (180, 60, 60))
    assert faults(judge(before, after, Limits(keep=keep))) == found  # type: ignore[arg-type]


def test_a_mask_over_everything_leaves_nothing_to_measure() -> None:
    verdict = judge(CAT, tint(CAT, NAVY), DEFAULTS, Image.new("1", CAT.size, 1))
    assert verdict.accepted
    assert "drift_p95_de" not in verdict.figures


def test_a_mask_follows_a_cropped_picture() -> None:
    mask = in_oval(CAT.size)
    result = fit_to(tint(CAT, NAVY, mask), 300, 300, "crop")
    verdict = judge(CAT, result, DEFAULTS, mask, fit="crop")
    assert verdict.accepted
    assert verdict.figures["drift_p95_de"] < 3


# any picture


@settings(max_examples=30, deadline=None)
@given(
    before=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    after=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1"]),
    fit=st.sampled_from(["fit", "pad", "crop"]),
    seed=st.integers(0, 99),
)
def test_any_two_pictures_are_judged(before: tuple[int, int], after: tuple[int, int], mode: str, fit: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = (Image.fromarray(random.integers(0, 256, (h, w, 3)).astype(np.uint8)) for w, h in (before, after))
    verdict = judge(first.convert(mode), second, Limits(keep="background"), Image.new("L", before, 0), fit=fit)  # type: ignore[arg-type]
    assert all(np.isfinite(figure) for figure in verdict.figures.values())
    assert all(type(figure) is float for figure in verdict.figures.values())


def test_a_verdict_takes_little_beside_an_edit() -> None:
    before = CAT.resize((1024, 1024))
    after = tint(before, NAVY)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        judge(before, after, Limits(keep="background"))
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.15  # about 0.03 on one core of its own
