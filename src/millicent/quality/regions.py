"""Which parts of a small picture an edit was to leave alone: the backdrop, the product, or what lies outside a mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from millicent.quality.color import Floats
from millicent.quality.limits import Keep

Region = NDArray[np.bool_]

SMOOTH_DE = (
    5.0  # CIELAB units from one pixel to the next: a backdrop's gradients and shadows stay below, a product's outline does not
)
MARGIN_PX = 2  # of the small picture: outlines belong to neither side


def find_kept(source_lab: Floats, keep: Keep, mask: Image.Image | None) -> Region:
    """CIELAB (H, W, 3) of the source -> (H, W), true where its color must stay.

    mask: "L", of any size, laid over the source; what is not black may change.
    """
    height, width = source_lab.shape[:2]
    kept = np.zeros((height, width), dtype=np.bool_)
    if mask is not None:
        may_change = np.asarray(mask.resize((width, height), Image.Resampling.BOX)) > 0
        kept |= ~_grow(may_change)
    if keep != "nothing":
        backdrop = flood(source_lab)
        kept |= ~_grow(~backdrop) if keep == "background" else ~_grow(backdrop)
    return kept


def flood(lab: Floats) -> Region:
    """What can be reached from the border without crossing an outline."""
    smooth = _steepest(lab) < SMOOTH_DE
    reached = np.zeros_like(smooth)
    reached[0], reached[-1], reached[:, 0], reached[:, -1] = smooth[0], smooth[-1], smooth[:, 0], smooth[:, -1]
    count = 0
    while (found := int(reached.sum())) > count:
        count = found
        for _ in range(8):  # counting is not free: eight steps at a time
            wider = reached.copy()
            wider[1:] |= reached[:-1]
            wider[:-1] |= reached[1:]
            wider[:, 1:] |= reached[:, :-1]
            wider[:, :-1] |= reached[:, 1:]
            reached = wider & smooth
    return reached


def _steepest(lab: Floats) -> Floats:
    """(H, W): the distance to the next pixel down or across, whichever is greater."""
    steepest = np.zeros(lab.shape[:2], dtype=np.float32)
    down, across = np.linalg.norm(np.diff(lab, axis=0), axis=-1), np.linalg.norm(np.diff(lab, axis=1), axis=-1)
    steepest[:-1] = down
    steepest[:, :-1] = np.maximum(steepest[:, :-1], across)
    return steepest


def _grow(region: Region) -> Region:
    wider = Image.fromarray(region.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * MARGIN_PX + 1))
    return np.asarray(wider) > 0
