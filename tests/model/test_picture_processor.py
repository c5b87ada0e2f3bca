"""Our reading of the image processor's numbers against transformers' own processor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_picture
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from millicent import demo
from millicent.errors import CheckpointError, IncompleteModelError
from millicent.model.picture_processor import PictureProcessor, read_picture_processor
from millicent.model.qwen_vl import cut_patches
from millicent.model.text_encoder import build_image_processor

DEMO = demo.folder() / "processor"
# as the hub's folders have it: older names, and a class that this machine may not have
PUBLISHED = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}
# all that such a file may hold, and nothing at its default
FULL = {
    "crop_size": None,
    "data_format": "channels_first",
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.25, 0.125],
    "image_std": [0.3, 0.2, 0.1],
    "merge_size": 1,
    "patch_size": 16,
    "resample": 2,
    "rescale_factor": 0.005,
    "size": {"longest_edge": 40_000, "shortest_edge": 10_000},
    "temporal_patch_size": 1,
}
CONFIGS = [{}, PUBLISHED, FULL, {**FULL, "min_pixels": 20_000, "max_pixels": 30_000}, {"image_mean": 0.5, "image_std": 0.25}]


def write(folder: Path, config: dict[str, Any], name: str = "preprocessor_config.json") -> Path:
    (folder / name).write_text(json.dumps(config))
    return folder


class Sides:
    """What cut_patches reads of a vision_config."""

    def __init__(self, pictures: PictureProcessor) -> None:
        self.patch_size, self.spatial_merge_size = pictures.patch_px, pictures.merge
        self.temporal_patch_size = pictures.patch_frames


def assert_as_transformers(ours: PictureProcessor, theirs: Any, image: Image.Image) -> None:
    processed = theirs(images=[image], return_tensors="pt")
    levels = torch.from_numpy(np.array(ours.size_picture(image)))
    assert torch.equal(cut_patches(levels, ours.normalize_levels(), Sides(ours)), processed["pixel_values"])
    assert processed["image_grid_thw"].tolist() == [[1, *(side // ours.patch_px for side in levels.shape[:2])]]


@pytest.mark.parametrize("config", CONFIGS, ids=["defaults", "published", "full", "older names win", "one number for all colors"])
def test_patches_are_transformers_to_the_bit(tmp_path: Path, config: dict[str, Any]) -> None:
    ours = read_picture_processor(write(tmp_path, config))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (173, 311, 3), dtype=np.uint8))
    for image in (noise, draw_picture(20, 90), draw_picture(1400, 1100), draw_picture(203, 500).convert("L")):
        assert_as_transformers(ours, theirs, image)
        assert_as_transformers(ours, build_image_processor(ours), image)


def test_photos_become_what_transformers_makes_of_them(tmp_path: Path) -> None:
    from skimage import data

    ours, theirs = read_picture_processor(write(tmp_path, PUBLISHED)), Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    for photo in (data.astronaut(), data.chelsea()):
        assert_as_transformers(ours, theirs, Image.fromarray(photo))


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(1, 3136, 1003520), (28, 3136, 12845056), (16, 784, 20000)]))
@example(1, 200, (28, 3136, 12845056))
@example(14, 42, (28, 784, 12845056))
def test_sizes_are_transformers(height: int, width: int, shape: tuple[int, int, int]) -> None:
    side, least, most = shape
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(AssertionError):
            PictureProcessor().size_of(height, width)
        return
    ours = PictureProcessor(patch_px=side, merge=1, least_area_px=least, most_area_px=most)
    assert ours.size_of(height, width) == smart_resize(height, width, side, least, most)


def test_the_demo_s_folder_is_read() -> None:
    assert read_picture_processor(DEMO) == PictureProcessor(rescale_factor=0.00392156862745098)


def test_what_is_nested_in_the_processor_goes_first(tmp_path: Path) -> None:
    write(tmp_path, {"patch_size": 16})
    write(tmp_path, {"image_processor": {"patch_size": 12}}, "processor_config.json")
    assert read_picture_processor(tmp_path).patch_px == Qwen2VLImageProcessorPil.from_pretrained(tmp_path).patch_size == 12
    write(tmp_path, {"processor_class": "Qwen2_5_VLProcessor"}, "processor_config.json")
    assert read_picture_processor(tmp_path).patch_px == Qwen2VLImageProcessorPil.from_pretrained(tmp_path).patch_size == 16


def test_an_empty_folder_is_no_processor(tmp_path: Path) -> None:
    with pytest.raises(IncompleteModelError, match=r"preprocessor_config\.json is missing"):
        read_picture_processor(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"do_resize": False}, "do_resize off"),
        ({"do_rescale": False}, "do_rescale off"),
        ({"do_normalize": False}, "do_normalize off"),
        ({"size": 224}, "size"),
        ({"size": {"height": 224, "width": 224}}, "shortest_edge"),
        ({"size": {"shortest_edge": 3136}}, "longest_edge"),
        ({"patch_size": 0}, "patch_size"),
        ({"merge_size": 2.0}, "merge_size"),
        ({"temporal_patch_size": True}, "temporal_patch_size"),
        ({"resample": 9}, "resample"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": ["a", 1, 1]}, "image_std"),
        ({"rescale_factor": float("nan")}, "rescale_factor"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        PictureProcessor.from_dict(changes)


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_broken_file_is_told_by_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        read_picture_processor(tmp_path)
