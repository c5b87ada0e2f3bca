"""How far colors moved: most where an edit was made, not at all where none was wanted. On small pictures laid over each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from millicent.quality.color import Floats, ciede2000, to_lab
from millicent.quality.limits import Keep
from millicent.quality.regions import find_kept
from millicent.quality.shrink import average

CHANGED_CELLS = 8  # of 64 x 64: the smallest logo that a catalog recolors covers more
MIN_KEPT = 0.02  # of the picture


def measure_change(before: Floats, after: Floats) -> tuple[float, float]:
    """Levels (H, W, 3) -> CIEDE2000 in the eighth most changed cell of 4 x 4 pixels, and in the median one.

    Each pixel is compared with the nearest color that the source has at or beside that place: a JPEG or the VAE smears an outline
    into what is there already, where an edit brings something new. What after does not show (NaN) has not changed.
    """
    before, after = average(before, 2), average(after, 2)
    nearest = np.clip(after, _among_neighbors(before, np.minimum), _among_neighbors(before, np.maximum))
    difference = np.nan_to_num(ciede2000(to_lab(nearest), to_lab(after)))
    cells = average(difference[..., None], 2).ravel()
    few = min(CHANGED_CELLS, cells.size)
    return float(np.partition(cells, -few)[-few]), float(np.median(cells))


def _among_neighbors(levels: Floats, extreme: Callable[[Floats, Floats], Floats]) -> Floats:
    """The least or greatest of each channel in the 3 x 3 pixels around each."""
    padded = np.pad(levels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = extreme(extreme(padded[:-2], padded[1:-1]), padded[2:])
    return extreme(extreme(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def measure_drift(before: Floats, after: Floats, keep: Keep, mask: Image.Image | None) -> tuple[float, float] | None:
    """Levels (H, W, 3) -> CIEDE2000 of what was to stay: the median, and what 95 % stay below. None where next to nothing was.

    mask: laid over before, of any size; what is not black may change. What after does not show (NaN) is left out.
    """
    before_lab, after_lab = to_lab(average(before, 2)), to_lab(average(after, 2))
    kept = find_kept(before_lab, keep, mask) & np.isfinite(after_lab[..., 0])
    if kept.mean() < MIN_KEPT:
        return None
    median, high = np.percentile(ciede2000(before_lab[kept], after_lab[kept]), [50, 95])
    return float(median), float(high)
