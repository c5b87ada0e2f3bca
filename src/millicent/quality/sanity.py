"""Whether a drawn picture may be delivered: no static, not blank, no copy of its source, in its place, and no drift of color.

Everything is measured on copies of 256 pixels a side, but the grain, which only the whole picture has. What each limit costs and
catches is measured in tests/quality/test_detection.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from PIL import Image

from millicent.images import Fit
from millicent.quality import registration
from millicent.quality.change import measure_change, measure_drift
from millicent.quality.color import Floats
from millicent.quality.limits import Limits as Limits
from millicent.quality.registration import FINE_PX, Placement, register
from millicent.quality.shrink import lay_mask, shared_boxes, shrink, small_size, to_levels
from millicent.quality.texture import noise_levels, spectrum, spread_levels

LOUDER = 2.0  # times the source's grain
FAR = 0.25  # of outlines' likeness; new backdrops full of outlines agree by chance with a place far away to 0.45
SAME_SHAPE = 0.03  # proportions that differ more are drawn anew: nothing says where things then belong


@dataclass(frozen=True, slots=True)
class Verdict:
    """accepted: whether no check found fault. reasons: one sentence for each fault.

    figures: what was measured, by name; a figure that could not be measured is missing. shift and zoom are missing where the
    pictures have too little in common.
    """

    accepted: bool
    reasons: tuple[str, ...]
    figures: Mapping[str, float]


def judge(
    source: Image.Image, result: Image.Image, limits: Limits, mask: Image.Image | None = None, *, fit: Fit = "fit"
) -> Verdict:
    """Measure a result against the picture that it was drawn from, and hold it to the limits.

    source: the last reference, whose shape the result follows. mask: in the source's shape; what is not black may change.
    fit: how the request's exact size was met (EditRequest.fit).
    """
    boxes = shared_boxes(source.size, result.size, fit)
    size = small_size(boxes[1], FINE_PX)
    before, after = (to_levels(shrink(image, box, size)) for image, box in zip((source, result), boxes, strict=True))
    same_shape = abs(math.log(_proportions(boxes[0]) / _proportions(boxes[1]))) < SAME_SHAPE
    place = register(before, after) if same_shape else None
    figures = _describe_result(source, result, after)
    if place is not None:
        figures |= {"likeness": place.likeness, "common": place.common}
        figures |= _describe_place(place, max(result.size), limits)
    if place is not None and place.is_moved and "zoom" in figures:
        after = registration.lay_back(after, place)
    figures["change_de"], figures["change_median_de"] = measure_change(before, after)
    if mask is not None or limits.keep != "nothing":
        laid = None if mask is None else lay_mask(mask, source.size, boxes[0])
        drift = measure_drift(before, after, limits.keep, laid)
        figures |= {} if drift is None else {"drift_median_de": drift[0], "drift_p95_de": drift[1]}
    reasons = tuple(_find_faults(figures, limits))
    return Verdict(not reasons, reasons, figures)


def _proportions(box: tuple[float, float, float, float]) -> float:
    return (box[2] - box[0]) / (box[3] - box[1])


def _describe_result(source: Image.Image, result: Image.Image, after: Floats) -> dict[str, float]:
    structure, flatness = spectrum(after, max(result.size))
    return {
        "contrast_levels": spread_levels(after),
        "noise_levels": noise_levels(result),
        "source_noise_levels": noise_levels(source),
        "structure": structure,
        "flatness": flatness,
    }


def _describe_place(place: Placement, side_px: int, limits: Limits) -> dict[str, float]:
    """Shift and zoom, or nothing where the outlines say too little: the further away a place, the more must speak for it."""
    moved = place.shift + abs(place.zoom - 1)
    if place.likeness < limits.min_likeness + min(moved, FAR) or place.error > limits.max_shift:
        return {}
    return {
        "shift": place.shift,
        "shift_x_px": place.shift_x * side_px,
        "shift_y_px": place.shift_y * side_px,
        "zoom": place.zoom,
    }


def _find_faults(f: Mapping[str, float], limits: Limits) -> Iterator[str]:
    if f["contrast_levels"] < limits.min_contrast_levels:
        yield f"blank: it varies by {f['contrast_levels']:.1f} levels of 255, and {limits.min_contrast_levels:g} are the least"
    elif fault := _find_static(f, limits):
        yield fault
    elif _is_copy(f, limits) and not limits.allow_copy:
        yield f"a copy of the input: nothing in it changed by {limits.min_change_de:g} dE, and {f['change_de']:.1f} is the most"
    if not limits.allow_shift:
        yield from _find_move(f, limits)
    if (median := f.get("drift_median_de", 0)) > limits.max_drift_median_de:
        yield f"color drift: half of what was to stay moved by over {median:.1f} dE, and {limits.max_drift_median_de:g} are allowed"
    if (high := f.get("drift_p95_de", 0)) > limits.max_drift_p95_de:
        yield f"color drift: 5 % of what was to stay moved by over {high:.1f} dE, and {limits.max_drift_p95_de:g} are allowed"


def _find_static(f: Mapping[str, float], limits: Limits) -> str | None:
    if f["noise_levels"] > max(limits.max_noise_levels, LOUDER * f["source_noise_levels"]):
        return f"static: grain of {f['noise_levels']:.0f} levels, and {limits.max_noise_levels:g} are allowed"
    formless = f["structure"] < limits.min_structure and f["flatness"] > limits.max_flatness
    if formless and f.get("common", 0) < limits.min_common and f.get("likeness", 0) < limits.min_likeness:
        figures = f"{f['structure']:.2f} of what varies is form, and its spectrum's flatness is {f['flatness']:.2f}"
        return f"static: {figures}, with nothing of the input in it"
    return None


def _is_copy(f: Mapping[str, float], limits: Limits) -> bool:
    return f["change_de"] < limits.min_change_de and f["change_median_de"] < limits.min_change_median_de


def _find_move(f: Mapping[str, float], limits: Limits) -> Iterator[str]:
    if "zoom" not in f:
        if limits.require_registration:
            yield "not measurable: it has too little in common with the input to say whether it is shifted or zoomed"
        return
    if f["shift"] > limits.max_shift:
        moved = f"{f['shift_x_px']:+.1f} px across and {f['shift_y_px']:+.1f} px down"
        yield f"shifted by {moved}: {f['shift']:.1%} of its longer side, and {limits.max_shift:.1%} is allowed"
    if abs(f["zoom"] - 1) > limits.max_zoom:
        yield f"zoomed by {f['zoom'] - 1:+.1%}, and {limits.max_zoom:.1%} is allowed"
