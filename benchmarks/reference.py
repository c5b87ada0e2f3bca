"""diffusers' Qwen-Image-Edit pipelines as the reference: what the tests compare with, and the benchmarks' peer."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# the scheduler_config.json of the published base models, and what Lightning's own script makes of it
BASE_SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
LIGHTNING_SCHEDULER = {**BASE_SCHEDULER, "base_shift": math.log(3), "max_shift": math.log(3), "shift_terminal": None}
SCHEDULERS = {"base": BASE_SCHEDULER, "lightning": LIGHTNING_SCHEDULER}
MODULES = ("pipeline_qwenimage_edit", "pipeline_qwenimage_edit_plus")


def make_processor(
    tokenizer: transformers.Qwen2Tokenizer, image_processor: Qwen2VLImageProcessorPil
) -> transformers.Qwen2VLProcessor:
    """transformers' own processor around its own parts, without the video processor, which wants torchvision."""
    processor = transformers.Qwen2VLProcessor.__new__(transformers.Qwen2VLProcessor)
    processor.tokenizer = tokenizer
    processor.image_processor = image_processor
    processor.image_token = "<|image_pad|>"
    processor.video_token = "<|video_pad|>"
    processor.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    processor.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    processor.chat_template = None
    return processor


def open_pipeline(folder: Path, schedule: str, dtype: torch.dtype) -> diffusers.QwenImageEditPlusPipeline:
    """A folder's parts, read by diffusers' and transformers' own classes."""
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    pipeline = diffusers.QwenImageEditPlusPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[schedule]),
        vae=diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=dtype),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=dtype),
        tokenizer=tokenizer,
        processor=make_processor(tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")),
        transformer=diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def picture_areas(vae_area_px: int, encoder_area_px: int) -> Iterator[None]:
    """Other areas than the published models', which are constants in diffusers' modules."""
    areas = {1024 * 1024: vae_area_px, 384 * 384: encoder_area_px}
    modules = [importlib.import_module(f"diffusers.pipelines.qwenimage.{name}") for name in MODULES]
    originals = [module.calculate_dimensions for module in modules]

    def with_areas(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda area, ratio: original(areas[area], ratio)

    for module, original in zip(modules, originals, strict=True):
        vars(module)["calculate_dimensions"] = with_areas(original)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            vars(module)["calculate_dimensions"] = original


@contextmanager
def mended_positions(pipeline: diffusers.DiffusionPipeline) -> Iterator[None]:
    """The picture tokens' rows and columns, as the model was trained with them.

    With transformers 5, diffusers 0.42 forgets to pass `mm_token_type_ids` on, and the text encoder then takes plain text
    positions for the picture tokens (huggingface/diffusers issue 14194). A hook passes them on.
    """
    encoder = pipeline.text_encoder

    def pass_on(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        token_types = (kwargs["input_ids"] == encoder.config.image_token_id).int()
        return args, {**kwargs, "mm_token_type_ids": token_types}

    hook = encoder.register_forward_pre_hook(pass_on, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
