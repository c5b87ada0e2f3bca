"""Where a picture's content lies against its source's: shift and zoom, found on outlines alone.

An edit changes colors and patterns, or a whole backdrop, so colors are not compared: both pictures become maps of where something
ends, strong edges and weak ones made alike. A search over zooms by cross-correlation (Reddy & Chatterji, 1996, without the
rotation) finds the place roughly; Gauss-Newton steps on shift and zoom with robust weights (Baker & Matthews, "Lucas-Kanade 20
Years On", 2004), which pay no heed to outlines that only one picture has, find it to a tenth of a pixel of the small copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from millicent.quality.color import Floats

FINE_PX = 256  # the longer side
TILE_PX, TILES_IN_COMMON = 32, 4  # static agrees with a source in four such tiles to 0.4 at most, good edits to 0.8 at least
EVEN = 0.1  # a tile's spread of outlines below which it shows none
NARROWEST_PX = 16  # less, four times smaller, holds no outlines
COARSE_ZOOMS = tuple(1.03**power for power in range(-7, 8))  # 0.81 to 1.23
MIDDLE_ZOOMS = tuple(1.0075**power for power in range(-4, 5))  # around the coarse one
FAINT = 4.0  # levels a pixel: edges much below this are grain, much above are all alike
OUTLIER = 1.0  # outlines that differ by much more of a map's spread are left out
STEPS = 5
LONGEST_STEP_PX = 2.0  # the search was nearer than that
SETTLED_PX = 0.02
BETTER = 0.01  # a place is left for another only where the outlines meet this much better


@dataclass(frozen=True, slots=True)
class Placement:
    """x, y of the source lies in the result at center + zoom * ((x, y) - center) + shift.

    shift_x, shift_y: shares of the longer side. zoom: 1.0 is none, above 1 the result shows less of the scene.
    likeness: correlation of the outlines once laid over each other, 1 for the same ones. likeness_in_place: without moving.
    common: the same in the fourth best tile of 32 x 32 pixels, which a kept product has even before a new and busy backdrop.
    error: how far off shift and zoom may be (one standard deviation, a share of the longer side); infinite without outlines.
    """

    shift_x: float
    shift_y: float
    zoom: float
    likeness: float
    likeness_in_place: float
    common: float
    error: float

    @property
    def shift(self) -> float:
        return float(np.hypot(self.shift_x, self.shift_y))

    @property
    def is_moved(self) -> bool:
        return (self.zoom, self.shift_x, self.shift_y) != IN_PLACE


IN_PLACE = (1.0, 0.0, 0.0)  # zoom, shift in pixels to the right and down


def register(source: Floats, result: Floats) -> Placement:
    """Two small pictures (H, W, 3) in levels, of one size, FINE_PX on the longer side -> where the second's content went."""
    assert source.shape == result.shape, "both were shrunk to one size"
    if min(source.shape[:2]) < NARROWEST_PX:
        return Placement(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, np.inf)
    side = max(source.shape[:2])
    fine = outlines(source), outlines(result)
    middle = _halve(fine[0]), _halve(fine[1])
    move = _search(_halve(middle[0]), _halve(middle[1]), COARSE_ZOOMS)
    move = _search(*middle, tuple(move[0] * step for step in MIDDLE_ZOOMS))
    rough = (move[0], move[1] * 2, move[2] * 2)
    exact, error = _refine(*fine, rough)
    places = {place: _likeness(*fine, place) for place in (IN_PLACE, rough, exact)}
    move = max(places, key=lambda place: places[place])
    if places[move] - places[IN_PLACE] < BETTER:
        move = IN_PLACE
    common = max(_find_common(*fine, place) for place in {IN_PLACE, move})
    here, there = places[IN_PLACE], places[move]
    return Placement(move[1] / side, move[2] / side, move[0], there, here, common, error / side)


def lay_back(result: Floats, place: Placement) -> Floats:
    """The result (H, W, 3), moved so that it lies over its source; NaN where the source shows what the result does not."""
    side = max(result.shape[:2])
    move = (place.zoom, place.shift_x * side, place.shift_y * side)
    return np.stack([_warp(np.ascontiguousarray(result[..., channel]), move) for channel in range(3)], -1)


def outlines(levels: Floats) -> Floats:
    """(H, W, 3) in levels -> (H, W), about 0 where all is even to about 3 at a hard edge."""
    across, down = np.zeros_like(levels), np.zeros_like(levels)
    across[:, 1:-1] = levels[:, 2:] - levels[:, :-2]
    down[1:-1] = levels[2:] - levels[:-2]
    strength = np.sqrt((across**2 + down**2).sum(-1)) / 2
    compressed: Floats = np.log1p(strength / np.float32(FAINT))
    return _blur(compressed)


def _blur(a: Floats) -> Floats:
    """Weights 1, 2, 1 each way; what lies outside counts as what lies at the edge."""
    padded = np.pad(a, 1, mode="edge")
    a = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    blurred: Floats = (a[:, :-2] + 2 * a[:, 1:-1] + a[:, 2:]) / 4
    return blurred


def _halve(a: Floats) -> Floats:
    height, width = a.shape[0] // 2 * 2, a.shape[1] // 2 * 2
    a = a[:height, :width]
    halved: Floats = (a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2]) / 4
    return halved


Move = tuple[float, float, float]


def _warp(a: Floats, move: Move) -> Floats:
    """a at where each pixel has moved to; NaN outside."""
    zoom, right, down = move
    height, width = a.shape
    middle_x, middle_y = width / 2, height / 2  # Pillow's coordinates have pixel centers at halves
    coefficients = (zoom, 0, middle_x * (1 - zoom) + right, 0, zoom, middle_y * (1 - zoom) + down)
    image = Image.fromarray(a)
    moved = image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=float("nan"))
    return np.asarray(moved)


def _search(source: Floats, result: Floats, zooms: tuple[float, ...]) -> Move:
    """The zoom of those, and the whole pixels up to a quarter of the picture, that bring the outlines together best."""
    height, width = source.shape
    reference = np.conj(np.fft.rfft2(_normalize(source)))
    best, found = -np.inf, IN_PLACE
    for zoom in zooms:
        moved = _normalize(_warp(result, (zoom, 0, 0)))
        products = np.fft.irfft2(np.fft.rfft2(moved) * reference, s=source.shape)
        products[height // 4 : -(height // 4)] = -np.inf
        products[:, width // 4 : -(width // 4)] = -np.inf
        down, right = np.unravel_index(int(products.argmax()), products.shape)
        if products[down, right] > best:
            best = products[down, right]
            # the result was zoomed about its middle before it was shifted: undone in the other order
            y, x = (int(down) + height // 2) % height - height // 2, (int(right) + width // 2) % width - width // 2
            found = (zoom, zoom * x, zoom * y)
    return found


def _normalize(a: Floats) -> Floats:
    """Mean 0 and length 1; what is unknown, and an empty map, is 0."""
    centered = np.nan_to_num(a - np.nanmean(a))
    length = np.sqrt((centered**2).sum())
    normalized: Floats = centered / (length if length > 0 else 1)
    return normalized


def _refine(source: Floats, result: Floats, move: Move) -> tuple[Move, float]:
    """Gauss-Newton from a rough place. -> the place, and its standard error in pixels at half the longer side from the middle."""
    height, width = source.shape
    half = max(height, width) / 2
    error = np.inf
    for _ in range(STEPS):
        moved = _warp(result, move)
        known = np.isfinite(moved)
        if known.sum() < known.size / 4:
            return IN_PLACE, np.inf
        found = _step(source, np.where(known, moved, source), known)
        if found is None:
            return move, np.inf
        step, error = found
        move = (move[0] + step[0] / half, move[1] + step[1], move[2] + step[2])
        if max(map(abs, step)) < SETTLED_PX:
            break
    return move, error


def _step(source: Floats, moved: Floats, known: NDArray[np.bool_]) -> tuple[Move, float] | None:
    """Pixels to go outward at half the longer side from the middle, right and down, and their standard error.

    None where no outline says where.
    """
    height, width = source.shape
    half = max(height, width) / 2
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / half)[:, None]
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / half)[None]
    down, across = np.gradient((source + moved) / 2)
    slopes = np.stack([across * x + down * y, across, down]).reshape(3, -1)
    spread = float(source[known].std() + moved[known].std()) / 2
    weight = known / (1 + ((source - moved) / (OUTLIER * spread + 1e-6)) ** 2) ** 2
    # an edit may leave outlines fainter, or stronger: all alike
    strength = (weight * source * moved).sum() / max(float((weight * moved**2).sum()), 1e-6)
    residual = source - strength * moved
    weighted = slopes * weight.ravel()
    try:
        inverse = np.linalg.inv((weighted @ slopes.T).astype(np.float64))
    except np.linalg.LinAlgError:
        return None
    step = np.clip(inverse @ (weighted @ residual.ravel()), -LONGEST_STEP_PX, LONGEST_STEP_PX)
    # neighbors are not independent: the blur makes one measurement of about nine pixels
    noise = 9 * float((weight * residual**2).sum() / max(weight.sum(), 1))
    return (float(step[0]), float(step[1]), float(step[2])), float(np.sqrt(noise * np.diag(inverse).max()))


def _likeness(source: Floats, result: Floats, move: Move) -> float:
    moved = _warp(result, move)
    known = np.isfinite(moved)
    a, b = source[known], moved[known]
    if a.size < source.size / 4 or a.std() < 1e-3 or b.std() < 1e-3:
        return 0.0
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


def _find_common(source: Floats, result: Floats, move: Move) -> float:
    """Correlation in the best tiles; 0 for those without outlines, or outside of the result."""
    moved = _warp(result, move)
    a, b = _cut_tiles(source), _cut_tiles(moved)
    seen = np.isfinite(b).all(1)
    a, b = a[seen], b[seen]
    if not len(a):
        return 0.0
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    spread_a, spread_b = a.std(1), b.std(1)
    agreement = np.where(np.minimum(spread_a, spread_b) < EVEN, 0, (a * b).mean(1) / (spread_a * spread_b + 1e-6))
    few = min(TILES_IN_COMMON, agreement.size)
    return float(np.partition(agreement, -few)[-few])


def _cut_tiles(a: Floats) -> Floats:
    """(H, W) -> (tiles, pixels of one)."""
    height, width = min(TILE_PX, a.shape[0]), min(TILE_PX, a.shape[1])
    down, across = a.shape[0] // height, a.shape[1] // width
    cut = a[: down * height, : across * width].reshape(down, height, across, width)
    return cut.swapaxes(1, 2).reshape(down * across, height * width)
