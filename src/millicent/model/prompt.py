"""The words around the words: Qwen-Image-Edit's chat template, as the model was trained with it.

Only strings here. The system text comes first; what the model sees of it is cut off again after encoding, so that the
transformer receives the pictures, the prompt and the template's tail.
"""

from __future__ import annotations

import re

from millicent.errors import InputError

SYSTEM_TEXT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), "
    "then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency "
    "with the original input where appropriate."
)
SYSTEM_PREFIX = f"<|im_start|>system\n{SYSTEM_TEXT}<|im_end|>\n<|im_start|>user\n"
IMAGE_PAD = "<|image_pad|>"

_PICTURE = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
_TAIL = "<|im_end|>\n<|im_start|>assistant\n"
_CONTROL_TOKEN = re.compile(r"<\|\w+\|>")


def edit_prompt(prompt: str) -> str:
    """The whole text for Qwen-Image-Edit: one picture, then the prompt. Raises InputError for a control token."""
    return SYSTEM_PREFIX + _PICTURE + _checked(prompt) + _TAIL


def edit_plus_prompt(prompt: str, images: int) -> str:
    """The whole text for 2509 and 2511: `images` numbered pictures, then the prompt. Raises InputError as above."""
    pictures = "".join(f"Picture {number}: {_PICTURE}" for number in range(1, images + 1))
    return SYSTEM_PREFIX + pictures + _checked(prompt) + _TAIL


def _checked(prompt: str) -> str:
    # the tokenizer would read it as a control token: an image_pad without a picture, or an end in mid-sentence
    if found := _CONTROL_TOKEN.search(prompt):
        raise InputError(f"The prompt holds the model's control token {found[0]}.", "Take it out of the prompt.")
    return prompt
