"""The whole pipeline against diffusers': the same weights and the same seed give the same picture.

One thing is mended on diffusers' side, the positions of the picture tokens (benchmarks/reference.py says how and why);
`test_without_the_mended_positions...` shows that this is the only difference.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import (
    ENCODER_AREA_PX,
    VAE_AREA_PX,
    MakeFolder,
    MakePipeline,
    draw_picture,
    make_pipeline,
    save_pipeline,
)
from PIL import Image

from benchmarks.reference import SCHEDULERS, mended_positions, open_pipeline, picture_areas
from millicent import demo
from millicent.edits import EditRequest
from millicent.engine.editor import Editor
from millicent.model import text_encoder

EXAMPLES = Path(__file__).parents[2] / "examples"

# both round to 8 bits; where FP32 sums in another order end on two sides of a half, they differ by one level
LEVELS = 1

LANDSCAPE = draw_picture(150, 230)
PORTRAIT = draw_picture(200, 130, seed=1)
SQUARE = draw_picture(100, 100, seed=2)


@pytest.fixture
def small_areas() -> Iterator[None]:
    with picture_areas(VAE_AREA_PX, ENCODER_AREA_PX):
        yield


def run_diffusers(
    pipeline: diffusers.DiffusionPipeline, images: list[Image.Image], seed: int, schedule: str, **arguments: Any
) -> np.ndarray:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[schedule])
    pipeline = type(pipeline)(**{**pipeline.components, "scheduler": scheduler})
    pipeline.set_progress_bar_config(disable=True)
    image = images if isinstance(pipeline, diffusers.QwenImageEditPlusPipeline) else images[0]
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipeline(image=image, generator=generator, **arguments).images[0]).astype(int)


def run_ours(folder: Path, images: list[Image.Image], **request: Any) -> np.ndarray:
    result = Editor.open(folder, device="cpu", dtype="fp32").edit(EditRequest(images=tuple(images), **request))
    return np.asarray(result.image).astype(int)


def assert_same_picture(ours: np.ndarray, expected: np.ndarray) -> None:
    assert ours.shape == expected.shape
    # a flat or a saturated picture would prove nothing
    assert expected.std() > 15
    assert np.isin(expected, (0, 255)).mean() < 0.3
    assert np.abs(ours - expected).max() <= LEVELS


CASES = {
    "2509, one landscape": ("edit-plus", False, [LANDSCAPE], 1.0, "base", 4),
    "2509, portrait and landscape, guided": ("edit-plus", False, [PORTRAIT, LANDSCAPE], 4.0, "base", 4),
    "2509, three, lightning": ("edit-plus", False, [LANDSCAPE, SQUARE, PORTRAIT], 1.0, "lightning", 4),
    "2511, one portrait": ("edit-plus", True, [PORTRAIT], 1.0, "base", 6),
    "2511, one portrait, guided": ("edit-plus", True, [PORTRAIT], 4.0, "base", 4),
    "2511, two, lightning": ("edit-plus", True, [SQUARE, LANDSCAPE], 1.0, "lightning", 4),
    "2511, three, lightning, guided": ("edit-plus", True, [PORTRAIT, LANDSCAPE, SQUARE], 2.5, "lightning", 8),
    "2511, three landscape": ("edit-plus", True, [PORTRAIT, SQUARE, LANDSCAPE], 1.0, "base", 3),
    "edit, landscape": ("edit", False, [LANDSCAPE], 1.0, "base", 4),
    "edit, portrait, guided": ("edit", False, [PORTRAIT], 4.0, "base", 4),
    "edit, portrait, lightning": ("edit", False, [PORTRAIT], 1.0, "lightning", 4),
    "edit with zero_cond_t, square": ("edit", True, [SQUARE], 4.0, "lightning", 4),
}


@pytest.mark.usefixtures("small_areas")
@pytest.mark.parametrize(("kind", "zero_cond_t", "images", "true_cfg", "schedule", "steps"), CASES.values(), ids=CASES)
def test_the_picture_equals_diffusers(
    tiny_folders: MakeFolder,
    reference_pipeline: MakePipeline,
    kind: str,
    zero_cond_t: bool,
    images: list[Image.Image],
    true_cfg: float,
    schedule: Any,
    steps: int,
) -> None:
    prompt, negative = "make the shirt navy blue", "on a table"
    pipeline = reference_pipeline(kind, zero_cond_t)
    with mended_positions(pipeline):
        expected = run_diffusers(
            pipeline,
            images,
            seed=7,
            schedule=schedule,
            prompt=prompt,
            negative_prompt=negative if true_cfg > 1 else None,
            true_cfg_scale=true_cfg,
            num_inference_steps=steps,
        )
    ours = run_ours(
        tiny_folders(kind, zero_cond_t),
        images,
        prompt=prompt,
        negative_prompt=negative,
        true_cfg=true_cfg,
        schedule=schedule,
        steps=steps,
        seed=7,
    )
    assert_same_picture(ours, expected)


@pytest.mark.usefixtures("small_areas")
def test_an_exact_size_equals_diffusers(tiny_folders: MakeFolder, reference_pipeline: MakePipeline) -> None:
    pipeline = reference_pipeline("edit-plus", True)
    with mended_positions(pipeline):
        expected = run_diffusers(
            pipeline,
            [PORTRAIT],
            3,
            "base",
            prompt="navy",
            height=80,
            width=144,
            num_inference_steps=3,
            true_cfg_scale=1.0,
        )
    folder = tiny_folders("edit-plus", True)
    assert expected.shape == (80, 144, 3)
    ours = run_ours(folder, [PORTRAIT], prompt="navy", height=80, width=144, steps=3, seed=3)
    assert_same_picture(ours, expected)


@pytest.mark.usefixtures("small_areas")
def test_without_the_mended_positions_diffusers_is_our_network_at_plain_ones(
    tiny_folders: MakeFolder, reference_pipeline: MakePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one mend is all: at the positions that diffusers falls back on, the untouched pipelines agree, too."""
    arguments = {"prompt": "navy", "num_inference_steps": 3, "true_cfg_scale": 1.0}
    expected = run_diffusers(reference_pipeline("edit-plus", True), [PORTRAIT, SQUARE], 3, "base", **arguments)
    folder = tiny_folders("edit-plus", True)
    with_rows_and_columns = run_ours(folder, [PORTRAIT, SQUARE], prompt="navy", steps=3, seed=3)
    lay_out_tokens = text_encoder.lay_out_tokens

    def plain_positions(*arguments: Any) -> tuple[list[int], torch.Tensor]:
        ids, positions = lay_out_tokens(*arguments)
        return ids, torch.arange(len(ids)).expand_as(positions)

    monkeypatch.setattr(text_encoder, "lay_out_tokens", plain_positions)
    assert_same_picture(run_ours(folder, [PORTRAIT, SQUARE], prompt="navy", steps=3, seed=3), expected)
    assert np.abs(with_rows_and_columns - expected).max() > 5 * LEVELS


@pytest.mark.usefixtures("small_areas")
def test_prompt_pictures_order_guidance_seed_and_schedule_all_matter(tiny_folders: MakeFolder) -> None:
    folder = tiny_folders("edit-plus", True)
    request: dict[str, Any] = {"prompt": "make the shirt navy blue", "seed": 7, "steps": 4}
    first = run_ours(folder, [SQUARE, PORTRAIT], **request)
    others = {
        "prompt": run_ours(folder, [SQUARE, PORTRAIT], **{**request, "prompt": "on a table"}),
        "picture": run_ours(folder, [draw_picture(100, 100, seed=5), PORTRAIT], **request),
        "number": run_ours(folder, [PORTRAIT], **request),
        "guidance": run_ours(folder, [SQUARE, PORTRAIT], **request, true_cfg=4.0),
        "seed": run_ours(folder, [SQUARE, PORTRAIT], **{**request, "seed": 8}),
        "schedule": run_ours(folder, [SQUARE, PORTRAIT], **request, schedule="lightning"),
        "zero_cond_t": run_ours(tiny_folders("edit-plus", False), [SQUARE, PORTRAIT], **request),
    }
    for name, other in others.items():
        assert np.abs(first - other).max() > 10 * LEVELS, name


def test_the_picture_equals_diffusers_at_the_published_areas(tmp_path: Path) -> None:
    """1024x1024 and 384x384, from the card that the folder's own configs point to; the transformer in shards."""
    pipeline = make_pipeline("edit-plus", True, vae_base_dim=4)
    folder = save_pipeline(pipeline, tmp_path)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="500KB")
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 1
    with mended_positions(pipeline):
        expected = run_diffusers(pipeline, [LANDSCAPE], 1, "lightning", prompt="navy", num_inference_steps=1, true_cfg_scale=1.0)
    assert expected.shape == (832, 1280, 3)
    ours = run_ours(folder, [LANDSCAPE], prompt="navy", steps=1, schedule="lightning", true_cfg=1.0, seed=1)
    assert_same_picture(ours, expected)


@pytest.mark.parametrize(("prompt", "steps"), [("make the shirt navy blue", 4), ("Take this item and add white stripes to it", 8)])
def test_the_demos_trained_weights_draw_diffusers_picture(prompt: str, steps: int) -> None:
    """What random weights do not have: trained statistics, a real tokenizer's merges, a picture that makes sense."""
    pipeline = open_pipeline(demo.folder(), "lightning", torch.float32)
    shirt = Image.open(EXAMPLES / "shirt.png").convert("RGB")
    with mended_positions(pipeline), picture_areas(256 * 256, 112 * 112):
        expected = run_diffusers(pipeline, [shirt], 5, "lightning", prompt=prompt, num_inference_steps=steps, true_cfg_scale=1.0)
    request = EditRequest(images=(shirt,), prompt=prompt, steps=steps, schedule="lightning", seed=5)
    ours = Editor.open("demo-base", device="cpu").edit(request).image
    assert_same_picture(np.asarray(ours).astype(int), expected)
