"""What the text encoder's image processor makes of a picture: a size, and numbers for its levels.

The arithmetic is that of transformers' Qwen2VLImageProcessorPil, to the bit, without the seconds that importing it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from millicent.errors import CheckpointError, IncompleteModelError
from millicent.model.config import read_json

# beyond it transformers refuses a picture; images.size_for_area does so before
LONGEST_TO_SHORTEST = 200
_FIX = "Use the processor folder of a Qwen-Image-Edit, -2509 or -2511 model."


@dataclass(frozen=True, slots=True)
class PictureProcessor:
    """The numbers of a preprocessor_config.json; the defaults are transformers'.

    patch_px: a side of a patch. merge: patches a side of a token. patch_frames: how many times a still picture is in a patch.
    least_area_px, most_area_px: between which a picture is brought. mean, std: of each color, of levels times rescale_factor.
    """

    patch_px: int = 14
    merge: int = 2
    patch_frames: int = 2
    least_area_px: int = 56 * 56
    most_area_px: int = 28 * 28 * 1280
    resample: Image.Resampling = Image.Resampling.BICUBIC
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read a preprocessor_config.json, with older names too. Raises CheckpointError for what is not computed here."""
        given, plain = {key: value for key, value in config.items() if value is not None}, cls()
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not given.get(step, True):
                raise CheckpointError(f"The image processor's config has {step} off.", _FIX)
        areas = _areas(given, {"shortest_edge": plain.least_area_px, "longest_edge": plain.most_area_px})
        return cls(
            patch_px=_whole("patch_size", given.get("patch_size", plain.patch_px)),
            merge=_whole("merge_size", given.get("merge_size", plain.merge)),
            patch_frames=_whole("temporal_patch_size", given.get("temporal_patch_size", plain.patch_frames)),
            least_area_px=_whole("size's shortest_edge", areas.get("shortest_edge")),
            most_area_px=_whole("size's longest_edge", areas.get("longest_edge")),
            resample=_resample(given.get("resample", plain.resample)),
            rescale_factor=_number("rescale_factor", given.get("rescale_factor", plain.rescale_factor)),
            mean=_colors("image_mean", given.get("image_mean", plain.mean)),
            std=_colors("image_std", given.get("image_std", plain.std)),
        )

    def size_picture(self, image: Image.Image) -> Image.Image:
        """In RGB, of a size that is a whole number of tokens a side."""
        height, width = self.size_of(image.height, image.width)
        return image.convert("RGB").resize((width, height), self.resample)

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture gets: its own, rounded to tokens, unless its area is out of bounds."""
        assert max(height, width) <= LONGEST_TO_SHORTEST * min(height, width)
        side = self.patch_px * self.merge
        rounded = round(height / side) * side, round(width / side) * side
        if rounded[0] * rounded[1] > self.most_area_px:
            shrink = math.sqrt((height * width) / self.most_area_px)
            return max(side, math.floor(height / shrink / side) * side), max(side, math.floor(width / shrink / side) * side)
        if rounded[0] * rounded[1] < self.least_area_px:
            grow = math.sqrt(self.least_area_px / (height * width))
            return math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
        return rounded

    def normalize_levels(self) -> Tensor:
        """(3, 256) FP32: what each level of each color stands for."""
        # scaled in FP64 and normalized in FP32, as transformers does it
        rescaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(color, dtype=np.float32)[:, None] for color in (self.mean, self.std))
        return torch.from_numpy((rescaled - mean) / std)


def read_picture_processor(folder: Path) -> PictureProcessor:
    """Read a processor folder; of a processor_config.json only its image processor, which goes first where there is one.

    Raises IncompleteModelError for neither file, CheckpointError for one that cannot be read or asks for something else.
    """
    joined, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
    if joined.is_file():
        nested = read_json(joined).get("image_processor")
        if isinstance(nested, dict):
            return PictureProcessor.from_dict(nested)
    if not alone.is_file():
        raise IncompleteModelError(f"{alone} is missing.", "Fetch the whole model again.")
    return PictureProcessor.from_dict(read_json(alone))


def _areas(given: Mapping[str, Any], plain: Mapping[str, int]) -> dict[str, Any]:
    """transformers calls the two areas edges, and called them min_pixels and max_pixels."""
    size = given.get("size", plain)
    if not isinstance(size, Mapping):
        raise _refusal("size", size, "shortest_edge and longest_edge are")
    older = {"shortest_edge": given.get("min_pixels"), "longest_edge": given.get("max_pixels")}
    return {**size, **{name: area for name, area in older.items() if area is not None}}


def _whole(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _refusal(key, value, "a whole number from 1 is")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _refusal(key, value, "a number is")
    return float(value)


def _colors(key: str, value: object) -> tuple[float, float, float]:
    """One number for each color, or one for all."""
    numbers = value if isinstance(value, (list, tuple)) else [value] * 3
    if len(numbers) != 3:
        raise _refusal(key, value, "three numbers are")
    red, green, blue = (_number(key, number) for number in numbers)
    return red, green, blue


def _resample(value: Any) -> Image.Resampling:
    try:
        return Image.Resampling(value)
    except ValueError as error:
        raise _refusal("resample", value, "a number of Pillow's is") from error


def _refusal(key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"The image processor's config has {value!r} for {key}; {wanted} wanted.", _FIX)
