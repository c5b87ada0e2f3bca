"""Two pictures made small and laid over each other as the edit laid them: the same content at the same place."""

from __future__ import annotations

import numpy as np
from PIL import Image

from millicent.images import Fit, flatten
from millicent.quality.color import Floats

Box = tuple[float, float, float, float]


def shared_boxes(source: tuple[int, int], result: tuple[int, int], fit: Fit) -> tuple[Box, Box]:
    """Sizes (width, height) -> what of the source, and of the result, shows the same. As images.fit_to lays them."""
    return (inner(source, result) if fit == "crop" else whole(source)), (inner(result, source) if fit == "pad" else whole(result))


def whole(size: tuple[int, int]) -> Box:
    return 0, 0, size[0], size[1]


def inner(size: tuple[int, int], shape: tuple[int, int]) -> Box:
    """The largest box of `shape`'s proportions in the middle of a picture of `size`."""
    (width, height), (across, down) = size, shape
    scale = min(width / across, height / down)
    # one of the two is 0, and must not come out a hair below
    left, top = max(0.0, (width - across * scale) / 2), max(0.0, (height - down * scale) / 2)
    return left, top, width - left, height - top


def small_size(box: Box, side: int) -> tuple[int, int]:
    """Width and height in pixels, the longer one `side`."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def shrink(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """A box of a picture, averaged down to `size` (width, height); RGB, on white where it is transparent."""
    small = image.resize(size, Image.Resampling.BOX, box, reducing_gap=2.0) if image.mode in ("RGB", "L") else None
    if small is None:
        return flatten(image).resize(size, Image.Resampling.BOX, box, reducing_gap=2.0)
    return small.convert("RGB")


def lay_mask(mask: Image.Image, source: tuple[int, int], box: Box) -> Image.Image:
    """What of a mask, of any size in a source's shape, lies over a box of that source."""
    across, down = mask.width / source[0], mask.height / source[1]
    size = max(1, round((box[2] - box[0]) * across)), max(1, round((box[3] - box[1]) * down))
    laid = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return mask.convert("L").resize(size, Image.Resampling.NEAREST, laid)


def to_levels(image: Image.Image) -> Floats:
    """(H, W, 3), 0 to 255."""
    return np.asarray(image, dtype=np.float32)


def average(levels: Floats, cell: int) -> Floats:
    """(H, W, 3) -> (H // cell, W // cell, 3), means of cell x cell pixels; a picture narrower than a cell is left as it is."""
    height, width = (side // cell * cell for side in levels.shape[:2])
    if not height or not width:
        return levels
    rows = sum((levels[row:height:cell] for row in range(1, cell)), start=levels[:height:cell])  # quicker than a mean of two axes
    total = sum((rows[:, column:width:cell] for column in range(1, cell)), start=rows[:, :width:cell])
    return total / np.float32(cell * cell)
