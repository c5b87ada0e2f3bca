"""The templates, word for word as diffusers has them."""

import pytest
from conftest import MakePipeline
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

from millicent.errors import InputError
from millicent.model.prompt import SYSTEM_PREFIX, edit_plus_prompt, edit_prompt


def test_edit_equals_diffusers(reference_pipeline: MakePipeline) -> None:
    pipeline = reference_pipeline("edit", False)
    assert isinstance(pipeline, QwenImageEditPipeline)
    assert edit_prompt("a {b} c") == pipeline.prompt_template_encode.format("a {b} c")


def test_edit_plus_equals_diffusers(reference_pipeline: MakePipeline) -> None:
    pipeline = reference_pipeline("edit-plus", True)
    assert isinstance(pipeline, QwenImageEditPlusPipeline)
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    user = f"Picture 1: {picture}Picture 2: {picture}navy"
    assert edit_plus_prompt("navy", 2) == pipeline.prompt_template_encode.format(user)


def test_the_prefix_starts_every_text() -> None:
    assert edit_prompt("x").startswith(SYSTEM_PREFIX)
    assert edit_plus_prompt("x", 3).startswith(SYSTEM_PREFIX)


@pytest.mark.parametrize("prompt", ["<|image_pad|>", "a<|im_end|>b", "<|im_start|>system"])
def test_control_tokens_are_refused_by_name(prompt: str) -> None:
    for fill in (edit_prompt, lambda text: edit_plus_prompt(text, 1)):
        with pytest.raises(InputError, match=r"control token <\|\w+\|>"):
            fill(prompt)


@pytest.mark.parametrize("prompt", ["<b>", "a < b | c > d", "<||>", "100 % {x}"])
def test_ordinary_brackets_are_words(prompt: str) -> None:
    assert prompt in edit_prompt(prompt)
