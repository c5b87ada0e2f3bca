"""The text encoder against transformers' whole model as diffusers calls it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HIDDEN, MakePipeline, draw_picture, make_tokenizer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from millicent.checkpoint.architecture import text_encoder_name
from millicent.checkpoint.folder import read_json
from millicent.checkpoint.load import fill
from millicent.errors import CheckpointError, InputError, PromptTooLongError, WeightsMismatchError
from millicent.model.picture_processor import read_picture_processor
from millicent.model.prompt import SYSTEM_PREFIX
from millicent.model.qwen_vl import cut_patches
from millicent.model.text_encoder import (
    TextEncoder,
    build_network,
    build_plain_network,
    lay_out_tokens,
)
from millicent.model.tokenizer import read_tokenizer

# the same operations in the same order, but for the batch's shape: a few units in the last place of values near 3
FP32_TOLERANCE = {"atol": 2e-5, "rtol": 0.0}

LANDSCAPE = draw_picture(56, 84)
PORTRAIT = draw_picture(112, 56, seed=1)


def load_encoder(folder: Path, state: dict[str, Tensor] | None = None, template: str = "edit-plus") -> TextEncoder:
    network = build_plain_network(read_json(folder / "text_encoder" / "config.json"))
    state = state or load_file(folder / "text_encoder" / "model.safetensors")
    fill(network, {text_encoder_name(key): tensor for key, tensor in state.items() if not key.startswith("lm_head.")}, str(folder))
    tokenizer, pictures = read_tokenizer(folder / "tokenizer"), read_picture_processor(folder / "processor")
    return TextEncoder(network, tokenizer, pictures, template=template, max_prompt_tokens=20)


@pytest.fixture(scope="module")
def encoder(tiny_folder: Path) -> TextEncoder:
    return load_encoder(tiny_folder)


def encode(encoder: TextEncoder, prompts: list[str], images: list[list[Image.Image]]) -> tuple[Tensor, Tensor | None]:
    with torch.inference_mode():
        return encoder.encode(prompts, images)


def reference_states(pipeline: object, text: str, images: list[Image.Image]) -> Tensor:
    """transformers' processor and whole model, with every output of the one given to the other; (T, C), prefix cut."""
    inputs = pipeline.processor(text=[text], images=images, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = pipeline.text_encoder(**inputs, output_hidden_states=True).hidden_states[-1]
    return states[0, 64:]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("height", "width"), [(56, 84), (384, 384), (203, 500), (20, 90), (1400, 1100)])
def test_patches_are_the_processors_to_the_bit(encoder: TextEncoder, height: int, width: int, mode: str) -> None:
    image = draw_picture(height, width).convert(mode)
    processed = encoder.image_processor(images=[image], return_tensors="pt")
    levels = torch.from_numpy(np.array(encoder.size_picture(image)))
    found = cut_patches(levels, encoder.normalize_levels(), encoder.network.config.vision_config)
    assert torch.equal(found, processed["pixel_values"])
    assert processed["image_grid_thw"].tolist() == [[1, levels.shape[0] // 14, levels.shape[1] // 14]]


@pytest.mark.parametrize("images", [[LANDSCAPE], [PORTRAIT, LANDSCAPE], [LANDSCAPE, LANDSCAPE, PORTRAIT]])
def test_edit_plus_states_equal_transformers(
    encoder: TextEncoder, reference_pipeline: MakePipeline, images: list[Image.Image]
) -> None:
    pictures = "".join(f"Picture {n + 1}: <|vision_start|><|image_pad|><|vision_end|>" for n in range(len(images)))
    pipeline = reference_pipeline("edit-plus", True)
    text = pipeline.prompt_template_encode.format(f"{pictures}make the {{shirt}} navy")
    states, mask = encode(encoder, ["make the {shirt} navy"], [images])
    assert mask is None
    torch.testing.assert_close(states[0], reference_states(pipeline, text, images), **FP32_TOLERANCE)


def test_edit_states_equal_transformers(tiny_folder: Path, reference_pipeline: MakePipeline) -> None:
    pipeline = reference_pipeline("edit", False)
    states, _ = encode(load_encoder(tiny_folder, template="edit"), ["make it navy"], [[PORTRAIT]])
    text = pipeline.prompt_template_encode.format("make it navy")
    torch.testing.assert_close(states[0], reference_states(pipeline, text, [PORTRAIT]), **FP32_TOLERANCE)


def test_the_state_is_taken_after_the_final_norm(encoder: TextEncoder) -> None:
    norm = encoder.network.language_model.norm
    taken: list[Tensor] = []
    handle = norm.register_forward_hook(lambda *call: taken.append(call[-1]))
    states, _ = encode(encoder, ["make it navy"], [[LANDSCAPE]])
    handle.remove()
    assert torch.equal(states, taken[0][:, encoder.prefix_tokens :])


def test_the_prefix_is_counted_not_assumed(encoder: TextEncoder) -> None:
    assert encoder.prefix_tokens == len(make_tokenizer()(SYSTEM_PREFIX)["input_ids"]) == 64
    ids = encoder.tokenize(SYSTEM_PREFIX + "Picture 1: x")
    assert encoder.tokenizer.decode(ids[:64]) == SYSTEM_PREFIX


@pytest.mark.parametrize("order", [1, -1], ids=["shorter first", "longer first"])
def test_each_row_of_a_batch_is_what_it_is_alone(encoder: TextEncoder, order: int) -> None:
    prompts = ["navy", "make the shirt navy blue on a table", "make it blue"][::order]
    images = [[LANDSCAPE], [PORTRAIT, LANDSCAPE], [PORTRAIT]][::order]
    states, mask = encode(encoder, prompts, images)
    assert mask is not None
    lengths = []
    for row, (prompt, pictures) in enumerate(zip(prompts, images, strict=True)):
        alone, _ = encode(encoder, [prompt], [pictures])
        lengths.append(alone.shape[1])
        assert mask[row].tolist() == [True] * lengths[-1] + [False] * (mask.shape[1] - lengths[-1])
        torch.testing.assert_close(states[row, : lengths[-1]], alone[0], **FP32_TOLERANCE)
        assert not states[row, lengths[-1] :].any()
    assert len(set(lengths)) == 3


def test_a_batch_of_one_length_needs_no_mask(encoder: TextEncoder) -> None:
    states, mask = encode(encoder, ["make it navy"] * 2, [[LANDSCAPE], [LANDSCAPE]])
    assert mask is None
    assert states.shape == (2, states.shape[1], HIDDEN)


def test_prompt_and_picture_both_matter(encoder: TextEncoder) -> None:
    first, _ = encode(encoder, ["make it navy"], [[LANDSCAPE]])
    other_prompt, _ = encode(encoder, ["make it blue"], [[LANDSCAPE]])
    other_picture, _ = encode(encoder, ["make it navy"], [[draw_picture(56, 84, seed=9)]])
    assert (first - other_prompt).abs().max() > 0.1
    assert (first - other_picture).abs().max() > 0.1


def test_pictures_spread_over_rows_and_columns() -> None:
    ids, positions = lay_out_tokens([7, 5, 8, 5, 9], [(2, 3), (1, 1)], image_token_id=5)
    assert ids == [7, 5, 5, 5, 5, 5, 5, 8, 5, 9]
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 6],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 6],
    ]


def test_a_long_prompt_is_refused_with_both_counts(encoder: TextEncoder) -> None:
    # pictures and template do not count: the limit itself still passes
    encode(encoder, [" blue" * 20], [[LANDSCAPE]])
    with pytest.raises(PromptTooLongError, match=r"21 tokens.*at most 20"):
        encoder.encode([" blue" * 21], [[LANDSCAPE]])


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>"])
def test_control_tokens_in_a_prompt_are_refused(encoder: TextEncoder, token: str) -> None:
    with pytest.raises(InputError, match=token.replace("|", r"\|")):
        encoder.encode([f"navy{token}"], [[LANDSCAPE]])


def test_names_of_the_hub_and_names_in_memory_both_load(encoder: TextEncoder, tiny_folder: Path) -> None:
    stored = load_file(tiny_folder / "text_encoder" / "model.safetensors")
    hub, memory = {}, {}
    for key, tensor in stored.items():
        tail = key.removeprefix("model.").removeprefix("language_model.")
        is_vision, is_head = tail.startswith("visual."), tail.startswith("lm_head.")
        hub[tail if is_vision or is_head else f"model.{tail}"] = tensor
        memory[tail if is_head else f"model.{tail}" if is_vision else f"model.language_model.{tail}"] = tensor
    assert hub.keys() != memory.keys()
    expected, _ = encode(encoder, ["navy"], [[LANDSCAPE]])
    for state in (hub, memory):
        states, _ = encode(load_encoder(tiny_folder, state), ["navy"], [[LANDSCAPE]])
        assert torch.equal(states, expected)


def test_a_text_encoder_without_eyes_is_refused(tiny_folder: Path) -> None:
    state = load_file(tiny_folder / "text_encoder" / "model.safetensors")
    with pytest.raises(WeightsMismatchError, match="missing: visual"):
        load_encoder(tiny_folder, {key: tensor for key, tensor in state.items() if "visual" not in key})


@pytest.mark.parametrize("build", [build_network, build_plain_network])
def test_another_architecture_is_refused(build: Callable[..., object]) -> None:
    with pytest.raises(CheckpointError, match="qwen3_vl"):
        build({"model_type": "qwen3_vl"})
