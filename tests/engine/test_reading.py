"""A reader against the text encoder that it reads with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_picture
from PIL import Image
from safetensors.torch import load_file
from test_capture import Recorder
from torch import Tensor

from millicent import demo
from millicent.checkpoint.architecture import text_encoder_name
from millicent.checkpoint.folder import read_json
from millicent.checkpoint.load import fill
from millicent.engine.capture import Replays
from millicent.engine.reading import Reader
from millicent.errors import CheckpointError, InputError, PromptTooLongError
from millicent.model.picture_processor import read_picture_processor
from millicent.model.text_encoder import TextEncoder, build_network, build_plain_network
from millicent.model.tokenizer import read_tokenizer

# FP32 with sums in another order, through a handful of layers: some units in the last place of the largest value
RELATIVE = 1e-5
PLENTY_BYTES = 1 << 30

LANDSCAPE = draw_picture(56, 84)
PORTRAIT = draw_picture(112, 56, seed=1)


def load_encoder(folder: Path, template: str = "edit-plus", build: Callable[..., Any] = build_plain_network) -> TextEncoder:
    network = build(read_json(folder / "text_encoder" / "config.json"))
    state = load_file(folder / "text_encoder" / "model.safetensors")
    fill(network, {text_encoder_name(key): tensor for key, tensor in state.items() if not key.startswith("lm_head.")}, str(folder))
    tokenizer, pictures = read_tokenizer(folder / "tokenizer"), read_picture_processor(folder / "processor")
    return TextEncoder(network.float(), tokenizer, pictures, template=template, max_prompt_tokens=20)


@pytest.fixture(scope="module", params=["random", "demo"])
def encoder(request: pytest.FixtureRequest, tiny_folder: Path) -> TextEncoder:
    return load_encoder(tiny_folder if request.param == "random" else demo.folder())


def assert_as_encoded(found: Tensor, encoder: TextEncoder, prompt: str, images: Sequence[Image.Image]) -> None:
    expected, mask = encoder.encode([prompt], [images])
    assert mask is None
    torch.testing.assert_close(found, expected, rtol=0.0, atol=RELATIVE * expected.abs().max().item())


@pytest.mark.parametrize("folder", ["random", "demo"])
def test_our_modules_are_read_as_transformers_to_the_bit(folder: str, tiny_folder: Path) -> None:
    path = tiny_folder if folder == "random" else demo.folder()
    ours, plain = load_encoder(path, build=build_network), load_encoder(path)
    assert type(ours.network) is not type(plain.network)
    for images in ([LANDSCAPE], [PORTRAIT, LANDSCAPE]):
        found, expected = (Reader(encoder, 0).read("make it navy", images) for encoder in (ours, plain))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("budget_bytes", [0, PLENTY_BYTES])
@pytest.mark.parametrize("images", [[LANDSCAPE], [PORTRAIT, LANDSCAPE], [LANDSCAPE, LANDSCAPE, PORTRAIT]])
def test_what_is_read_is_what_is_encoded(encoder: TextEncoder, images: list[Image.Image], budget_bytes: int) -> None:
    reader = Reader(encoder, budget_bytes)
    for prompt in ("navy", "make the {shirt} navy blue", "", " on a table", "navy"):
        assert_as_encoded(reader.read(prompt, images), encoder, prompt, images)
    # a picture twice in one request is looked at once
    assert len(reader.pictures) == (len({id(image) for image in images}) if budget_bytes else 0)
    assert (reader.openings.hits, reader.embeddings.hits) == ((3, 1) if budget_bytes else (0, 0))


def test_the_edit_template_is_read_too(tiny_folder: Path) -> None:
    encoder = load_encoder(tiny_folder, template="edit")
    reader = Reader(encoder, PLENTY_BYTES)
    for prompt in ("make it navy", "blue"):
        assert_as_encoded(reader.read(prompt, [PORTRAIT]), encoder, prompt, [PORTRAIT])


def test_the_past_does_not_show_in_a_single_bit(encoder: TextEncoder) -> None:
    remembers = Reader(encoder, PLENTY_BYTES)
    remembers.read("make the shirt navy blue on a table", [LANDSCAPE, PORTRAIT])
    for prompt in ("navy", "make it blue"):
        fresh = Reader(encoder, 0).read(prompt, [LANDSCAPE, PORTRAIT])
        assert torch.equal(remembers.read(prompt, [LANDSCAPE, PORTRAIT]), fresh)
    assert remembers.openings.hits == 2


def test_recorded_work_reads_the_same_bits(encoder: TextEncoder) -> None:
    recorder = Recorder()
    plain, reader = Reader(encoder, 0), Reader(encoder, 0)
    reader.replays = Replays(recorder.record, kept=12)
    # pictures and prompts differ, their shapes do not
    for seed, prompt in enumerate(("navy", "blue", "make it blue", "")):
        images = [draw_picture(112, 56, seed=seed), LANDSCAPE]
        assert torch.equal(reader.read(prompt, images), plain.read(prompt, images))
    # two pictures, one opening, one length of prompts
    assert (recorder.recorded, recorder.replayed) == (4, 4 * 3)


def test_nothing_shows_of_the_padding(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Reader(encoder, 0).read("navy", [LANDSCAPE])
    pad_id = encoder.tokenizer.pad_id
    (encoder.tokenizer.pad_id,) = encoder.tokenize("a")
    assert torch.equal(Reader(encoder, 0).read("navy", [LANDSCAPE]), expected)
    encoder.tokenizer.pad_id = pad_id
    monkeypatch.setattr("millicent.engine.reading.TOKENS_MULTIPLE", 1)
    found = Reader(encoder, 0).read("navy", [LANDSCAPE])
    torch.testing.assert_close(found, expected, rtol=0.0, atol=RELATIVE * expected.abs().max().item())


def test_pictures_are_known_by_content_and_order(encoder: TextEncoder) -> None:
    reader = Reader(encoder, PLENTY_BYTES)
    first = reader.read("navy", [LANDSCAPE, PORTRAIT])
    assert reader.read("navy", [LANDSCAPE.copy(), PORTRAIT.copy()]) is first
    swapped = reader.read("navy", [PORTRAIT, LANDSCAPE])
    assert_as_encoded(swapped, encoder, "navy", [PORTRAIT, LANDSCAPE])
    # the order is another opening, of the same two pictures
    assert (len(reader.openings), len(reader.pictures), reader.pictures.hits) == (2, 2, 2)
    assert_as_encoded(reader.read("navy", [LANDSCAPE]), encoder, "navy", [LANDSCAPE])


def test_a_small_budget_is_kept_and_right(encoder: TextEncoder) -> None:
    generous = Reader(encoder, PLENTY_BYTES)
    generous.read("navy", [PORTRAIT])
    caches = (generous.pictures, generous.openings, generous.embeddings)
    # room for about one of each
    reader = Reader(encoder, 2 * sum(cache.bytes for cache in caches))
    for seed in range(4):
        images = [draw_picture(112, 56, seed=seed)]
        assert_as_encoded(reader.read("navy", images), encoder, "navy", images)
    kept = (reader.pictures, reader.openings, reader.embeddings)
    assert sum(cache.bytes for cache in kept) <= 2 * sum(cache.bytes for cache in caches)
    assert 0 < len(reader.openings) < 4


def test_what_is_counted_is_what_is_kept(encoder: TextEncoder) -> None:
    reader = Reader(encoder, PLENTY_BYTES)
    embedding = reader.read("navy", [LANDSCAPE, PORTRAIT])
    (opening, counted), *_ = reader.openings._kept.values()
    tensors = (opening.hidden, opening.past)
    assert counted == sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert reader.embeddings.bytes == embedding.untyped_storage().nbytes()


def test_nothing_is_remembered_after_clear(encoder: TextEncoder) -> None:
    reader = Reader(encoder, PLENTY_BYTES)
    first = reader.read("navy", [LANDSCAPE])
    reader.clear()
    assert reader.pictures.bytes == reader.openings.bytes == reader.embeddings.bytes == 0
    again = reader.read("navy", [LANDSCAPE])
    assert again is not first
    assert torch.equal(again, first)


def test_a_long_prompt_is_refused_with_both_counts(encoder: TextEncoder) -> None:
    with pytest.raises(PromptTooLongError, match=r"tokens.*at most 20"):
        Reader(encoder, PLENTY_BYTES).read(" blue" * 90, [LANDSCAPE])


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|vision_end|>"])
def test_control_tokens_in_a_prompt_are_refused(encoder: TextEncoder, token: str) -> None:
    with pytest.raises(InputError, match=token.replace("|", r"\|")):
        Reader(encoder, PLENTY_BYTES).read(f"navy{token}", [LANDSCAPE])


def test_a_config_that_is_not_computed_is_refused(tiny_folder: Path) -> None:
    encoder = load_encoder(tiny_folder)
    encoder.network.config.text_config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(CheckpointError, match="sliding_attention"):
        Reader(encoder, 0)
