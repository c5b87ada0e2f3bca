"""Editor.open and .edit: what comes back, in which size, and what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeFolder, draw_picture, write_card
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import millicent.engine.editor as editor_module
from millicent import demo
from millicent.edits import EditRequest, Progress
from millicent.engine import loading, pipeline
from millicent.engine.drawing import pack, unpack
from millicent.engine.editor import Editor, find_model
from millicent.engine.pipeline import drawn_size, size_for_area, to_pixels
from millicent.engine.sampler import lightning_sigmas
from millicent.engine.settings import Settings
from millicent.errors import (
    CheckpointError,
    IncompleteModelError,
    InputError,
    InputNotFoundError,
    MachineError,
    ModelNotFoundError,
    PromptTooLongError,
    SizeError,
    WeightsMismatchError,
)
from millicent.facts.models import find_card

LANDSCAPE = draw_picture(100, 150)
PORTRAIT = draw_picture(150, 100, seed=1)


@pytest.fixture(scope="module")
def editor(tiny_folder: Path) -> Editor:
    return Editor.open(tiny_folder, device="cpu")


def make_request(*images: Image.Image, **changes: Any) -> EditRequest:
    return EditRequest(images=images or (LANDSCAPE,), **{"prompt": "make it navy", "seed": 5, "steps": 2, **changes})


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_same_request_draws_the_same_picture(editor: Editor) -> None:
    first, second = (editor.edit(make_request()) for _ in range(2))
    assert np.array_equal(pixels(first.image), pixels(second.image))
    assert (first.seed, first.schedule, first.steps, first.true_cfg) == (5, "base", 2, 1.0)
    assert first.weights_sha256 == second.weights_sha256 == editor.weights_sha256


def test_a_seed_that_is_not_given_is_drawn_and_told(editor: Editor) -> None:
    first, second = (editor.edit(make_request(seed=None)) for _ in range(2))
    assert first.seed != second.seed
    assert np.array_equal(pixels(editor.edit(make_request(seed=first.seed)).image), pixels(first.image))


@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_each_variant_can_be_drawn_alone(editor: Editor, true_cfg: float) -> None:
    together = editor.edit(make_request(variants=3, true_cfg=true_cfg))
    assert together.seeds == (5, 6, 7)
    for seed, image in zip(together.seeds, together.images, strict=True):
        alone = editor.edit(make_request(seed=seed, true_cfg=true_cfg)).image
        # a batch sums in another order, which can tip an 8-bit rounding
        assert np.abs(pixels(image) - pixels(alone)).max() <= 1
    assert np.abs(pixels(together.images[0]) - pixels(together.images[1])).max() > 10


def test_the_output_follows_the_last_picture(editor: Editor) -> None:
    assert editor.edit(make_request(PORTRAIT, LANDSCAPE)).image.size == (160, 96)
    assert editor.edit(make_request(LANDSCAPE, PORTRAIT)).image.size == (96, 160)


@pytest.mark.parametrize("fit", ["fit", "pad", "crop"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (77, 101), (300, 200), (32, 320)])
def test_an_exact_size_is_met(editor: Editor, fit: Any, height: int, width: int) -> None:
    image = editor.edit(make_request(height=height, width=width, fit=fit)).image
    assert image.size == (width, height)
    assert pixels(image).std() > 10


def test_pad_keeps_the_whole_picture_between_white_borders(editor: Editor) -> None:
    whole = editor.edit(make_request()).image
    padded = editor.edit(make_request(height=200, width=160, fit="pad")).image
    assert whole.size == (160, 96)
    assert np.array_equal(pixels(padded)[52:148], pixels(whole))
    assert (pixels(padded)[:52] == 255).all()
    assert (pixels(padded)[148:] == 255).all()


def test_crop_cuts_the_overhang_evenly(editor: Editor) -> None:
    whole = editor.edit(make_request()).image
    cropped = editor.edit(make_request(height=96, width=96, fit="crop")).image
    assert np.array_equal(pixels(cropped), pixels(whole)[:, 32:128])


@pytest.mark.parametrize(
    ("asked", "drawn"),
    [
        ({}, (832, 1248)),
        ({"height": 1024, "width": 1024}, (1024, 1024)),
        ({"height": 640, "width": 480}, (640, 480)),
        ({"height": 4000, "width": 3000}, (1184, 880)),
        ({"height": 500, "width": 500}, (496, 496)),
        ({"height": 500, "width": 500, "fit": "pad"}, (832, 1248)),
        ({"height": 500, "width": 500, "fit": "crop"}, (832, 1248)),
    ],
)
def test_the_drawn_size(asked: dict[str, Any], drawn: tuple[int, int]) -> None:
    assert drawn_size(make_request(LANDSCAPE, **asked), find_card("qwen-image-edit-2511"), 16) == drawn


@pytest.mark.parametrize(
    ("area_px", "ratio", "sized"),
    [
        (1024 * 1024, (1, 1), (1024, 1024)),
        (1024 * 1024, (3, 4), (896, 1184)),
        (1024 * 1024, (9, 16), (768, 1376)),
        (384 * 384, (1, 1), (384, 384)),
        (384 * 384, (3, 4), (320, 448)),
        (384 * 384, (9, 16), (288, 512)),
    ],
)
def test_the_published_sizes(area_px: int, ratio: tuple[int, int], sized: tuple[int, int]) -> None:
    assert size_for_area(area_px, *ratio) == sized


def test_packing_is_undone_by_unpacking() -> None:
    latents = torch.arange(2 * 16 * 6 * 4).reshape(2, 16, 6, 4)
    tokens = pack(latents)
    assert tokens.shape == (2, 6, 64)
    # the first token holds the top left 2x2 of every channel, row by row
    assert tokens[0, 0, :8].tolist() == [0, 1, 4, 5, 24, 25, 28, 29]
    assert torch.equal(unpack(tokens, 3, 2), latents)


def test_sigmas_are_used_as_given(editor: Editor) -> None:
    sigmas = (1.0, 0.77, 0.31)
    result = editor.edit(make_request(steps=None, sigmas=sigmas))
    assert (result.sigmas, result.schedule, result.steps) == ((*sigmas, 0.0), "sigmas", 3)
    same = editor.edit(make_request(steps=None, sigmas=tuple(lightning_sigmas(4)[:-1])))
    expected = editor.edit(make_request(steps=4, schedule="lightning"))
    assert np.array_equal(pixels(same.image), pixels(expected.image))


def test_progress_tells_every_step_and_every_stages_end(editor: Editor) -> None:
    told: list[Progress] = []
    result = editor.edit(make_request(steps=2, variants=2), told.append)
    stages = (("prepare", 1), ("encode", 1), ("denoise", 2), ("decode", 2))
    assert told == [Progress(stage, step, steps) for stage, steps in stages for step in range(steps + 1)]
    timings = result.timings
    assert min(timings.prepare_s, timings.encode_s, timings.denoise_s, timings.decode_s) > 0


def test_transparent_parts_are_white(editor: Editor) -> None:
    red_behind_glass = LANDSCAPE.convert("RGBA")
    red_behind_glass.paste((255, 0, 0, 0), (0, 0, 70, 150))
    white = LANDSCAPE.copy()
    white.paste((255, 255, 255), (0, 0, 70, 150))
    first, second = (editor.edit(make_request(image)).image for image in (red_behind_glass, white))
    assert np.array_equal(pixels(first), pixels(second))


def test_the_negative_prompt_counts_under_guidance_alone(editor: Editor) -> None:
    plain, other = (editor.edit(make_request(negative_prompt=text)).image for text in (" ", "on a table"))
    assert np.array_equal(pixels(plain), pixels(other))
    guided, other = (editor.edit(make_request(negative_prompt=t, true_cfg=4.0)).image for t in (" ", "on a table"))
    assert np.abs(pixels(guided) - pixels(other)).max() > 5


def test_bf16_draws_a_picture_of_the_same_kind(editor: Editor, tiny_folder: Path) -> None:
    bf16 = Editor.open(tiny_folder, device="cpu", dtype="bf16")
    first, second = (pixels(e.edit(make_request()).image) for e in (editor, bf16))
    # not the same picture: as in diffusers, BF16 noise is drawn in BF16
    assert abs(first.mean() - second.mean()) < 20
    assert second.std() > 15


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt": "navy" * 65}, PromptTooLongError),
        ({"prompt": "navy<|im_end|>"}, InputError),
        ({"negative_prompt": "<|image_pad|>", "true_cfg": 2.0}, InputError),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(editor: Editor, changes: dict[str, Any], error: type) -> None:
    with pytest.raises(error):
        editor.edit(make_request(**changes))


def test_a_picture_that_is_too_long_is_refused(editor: Editor) -> None:
    with pytest.raises(SizeError, match="4000x2"):
        editor.edit(make_request(Image.new("RGB", (4000, 2))))


@pytest.mark.parametrize("size", [(300, 1), (1, 300), (100_000, 499)])
def test_a_picture_that_the_vision_tower_would_refuse_is_refused_before(size: tuple[int, int]) -> None:
    """Beyond 200 times the shorter side transformers' image processor raises an error of its own."""
    image = Image.new("RGB", size)
    # areas as in the published cards: rounding a side to 32 can bring the shape across the limit, or back
    with pytest.raises(SizeError, match="too long"):
        [size_for_area(area, image.height, image.width) for area in (384 * 384, 1024 * 1024)]


@given(st.integers(16, 16384), st.integers(16, 16384), st.sampled_from(["fit", "pad", "crop"]))
@example(16, 16, "fit")
@example(16, 256, "fit")
@example(16384, 1024, "fit")
@example(23, 367, "fit")
def test_what_is_drawn_is_whole_tokens_whatever_is_asked(height: int, width: int, fit: Any) -> None:
    try:
        request = make_request(LANDSCAPE, height=height, width=width, fit=fit)
    except SizeError:
        assert max(height, width) > 16 * min(height, width)
        return
    card = find_card("qwen-image-edit-2511")
    drawn = drawn_size(request, card, 16)
    assert all(side >= 16 and side % 16 == 0 for side in drawn)
    # each side is rounded by up to half a token, 8 of at least 16 pixels
    asked_px = height * width if fit == "fit" else card.vae_area_px
    assert drawn[0] * drawn[1] <= min(card.vae_area_px, asked_px) * 1.5**2


@pytest.mark.parametrize(("height", "width"), [(17, 33), (99, 101), (250, 31)])
def test_odd_sizes_come_out_as_asked_from_odd_pictures(editor: Editor, height: int, width: int) -> None:
    odd = draw_picture(97, 53)
    assert editor.edit(make_request(odd, height=height, width=width)).image.size == (width, height)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_those_of_a_division_on_the_host(dtype: torch.dtype) -> None:
    levels = np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)[:, :15]
    # as diffusers' VaeImageProcessor computes them, before they go to a card
    expected = 2.0 * torch.from_numpy((levels.astype(np.float32) / 255.0).transpose(2, 0, 1).copy())[None] - 1.0
    found = to_pixels(torch.from_numpy(levels.copy()), dtype)
    assert found.is_contiguous()
    assert torch.equal(found, expected.to(dtype))


def test_a_picture_that_was_encoded_is_not_encoded_again(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    fast = Editor.open(tiny_folder, device="cpu", settings=Settings(format="bf16"))
    encoded: list[torch.Size] = []
    encode = fast._model.vae.encode
    monkeypatch.setattr(fast._model.vae, "encode", lambda x: encoded.append(x.shape) or encode(x))
    first = fast.edit(make_request(LANDSCAPE, PORTRAIT))
    again = fast.edit(make_request(LANDSCAPE, PORTRAIT))
    assert len(encoded) == 2
    other = fast.edit(make_request(PORTRAIT))
    assert len(encoded) == 2
    assert np.array_equal(pixels(first.image), pixels(again.image))
    fresh = Editor.open(tiny_folder, device="cpu", settings=Settings(format="bf16"))
    assert np.array_equal(pixels(other.image), pixels(fresh.edit(make_request(PORTRAIT)).image))


def test_the_plain_network_keeps_no_latents(editor: Editor) -> None:
    assert editor._model.latents is None


@pytest.mark.parametrize(("kind", "resizes"), [("edit", 1), ("edit-plus", 2)])
def test_each_distinct_resize_is_done_once(
    monkeypatch: pytest.MonkeyPatch, tiny_folders: MakeFolder, kind: str, resizes: int
) -> None:
    model = Editor.open(tiny_folders(kind, False), device="cpu")._model
    sizes: list[tuple[int, int]] = []
    resize = pipeline.resize
    monkeypatch.setattr(pipeline, "resize", lambda image, *size: sizes.append(size) or resize(image, *size))
    prepared = pipeline.prepare(make_request(), model)
    assert len(sizes) == len(set(sizes)) == resizes
    [seen], [reference] = prepared.encoder_images, prepared.references
    assert np.array_equal(pixels(seen), pixels(resize(LANDSCAPE, seen.height, seen.width)))
    levels = reference.levels.numpy()
    assert np.array_equal(levels, pixels(resize(LANDSCAPE, *levels.shape[:2])))


def test_edit_takes_one_picture(tiny_folders: MakeFolder) -> None:
    with pytest.raises(InputError, match="2 pictures"):
        Editor.open(tiny_folders("edit", False), device="cpu").edit(make_request(LANDSCAPE, PORTRAIT))


def test_unknown_names_are_told_what_can_be_given(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"'demmo'.*demo or demo-base, or a folder"):
        Editor.open("demmo")
    with pytest.raises(IncompleteModelError, match=r"model_index\.json"):
        Editor.open(tmp_path)


PARTS_OF_FILES = [
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "processor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("name", PARTS_OF_FILES)
def test_each_missing_file_is_refused_with_its_place(own_folder: Path, name: str) -> None:
    (own_folder / name).unlink()
    with pytest.raises(IncompleteModelError, match=f"{own_folder / name.split('/')[0]}"):
        Editor.open(own_folder, device="cpu")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_missing_tensor_is_refused_by_name(own_folder: Path, part: str) -> None:
    (path,) = (own_folder / part).glob("*.safetensors")
    state = load_file(path)
    removed = min(key for key in state if not key.startswith("lm_head"))
    save_file({key: tensor for key, tensor in state.items() if key != removed}, path)
    with pytest.raises(WeightsMismatchError, match=rf"1 missing: (language_model\.)?{removed.removeprefix('model.')}"):
        Editor.open(own_folder, device="cpu")


def test_a_card_of_another_pipeline_is_refused(own_folder: Path) -> None:
    write_card(own_folder, pipeline="edit")
    with pytest.raises(CheckpointError, match="edit-plus"):
        Editor.open(own_folder, device="cpu")


@pytest.mark.parametrize(
    ("kind", "zero_cond_t", "name"),
    [
        ("edit", False, "qwen-image-edit"),
        ("edit-plus", False, "qwen-image-edit-2509"),
        ("edit-plus", True, "qwen-image-edit-2511"),
    ],
)
def test_without_a_card_the_configs_say_which_model_it_is(
    tiny_folders: MakeFolder, tmp_path: Path, kind: str, zero_cond_t: bool, name: str
) -> None:
    folder = shutil.copytree(tiny_folders(kind, zero_cond_t), tmp_path / "mine")
    (folder / "card.toml").unlink()
    assert find_model(folder) == ("mine", folder, find_card(name))


def write_lora(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = "transformer_blocks.0.attn.to_v"
    save_file(
        {
            f"{layer}.lora_down.weight": torch.randn(4, 48, generator=generator),
            f"{layer}.lora_up.weight": torch.randn(48, 4, generator=generator),
            f"{layer}.alpha": torch.tensor(4.0),
        },
        folder / "lora.safetensors",
    )


def test_the_demo_opens_with_its_lora_and_demo_base_without(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, editor: Editor
) -> None:
    write_card(own_folder, lora="lora.safetensors", name="demo", schedule="lightning")
    write_lora(own_folder)
    monkeypatch.setattr(editor_module.demo, "folder", lambda: own_folder)
    demo, base = Editor.open("demo", device="cpu"), Editor.open("demo-base", device="cpu")
    assert (demo.name, demo.card.schedule, demo.card.steps) == ("demo", "lightning", 4)
    assert (base.name, base.card.schedule, base.card.steps, base.card.lora) == ("demo-base", "base", 20, None)
    pictures = [pixels(e.edit(make_request(schedule="base")).image) for e in (demo, base, editor)]
    assert np.abs(pictures[0] - pictures[1]).max() > 5
    assert np.array_equal(pictures[1], pictures[2])
    # a LoRA is part of what drew the picture
    assert base.weights_sha256 == editor.weights_sha256 != demo.weights_sha256


@pytest.mark.parametrize("lora", ["lora.safetensors", "../lora.safetensors"])
def test_a_lora_that_is_not_in_the_folder_is_refused(own_folder: Path, lora: str) -> None:
    write_card(own_folder, lora=lora)
    with pytest.raises(CheckpointError, match="lora"):
        Editor.open(own_folder, device="cpu")


@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ({"device": "tpu"}, InputError),
        ({"device": "meta"}, InputError),
        ({"device": "cuda:99"}, MachineError),
        ({"device": "cpu", "dtype": "fp16"}, InputError),
    ],
)
def test_devices_and_dtypes_that_do_not_exist_are_refused(tiny_folder: Path, choice: dict[str, str], error: type) -> None:
    with pytest.raises(error):
        Editor.open(tiny_folder, **choice)


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_without_the_engine_extra_the_error_says_what_to_install(tiny_folder: Path, package: str) -> None:
    script = (
        "import sys\n"
        f"sys.modules[{package!r}] = None\n"
        "from millicent.engine.editor import Editor\n"
        "from millicent.errors import MissingExtraError\n"
        "try:\n"
        f"    Editor.open({str(tiny_folder)!r})\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"{package} is not installed" in done.stdout
    assert 'pip install "millicent[engine]"' in done.stdout


LIGHTNING = demo.folder() / "lightning-4steps.safetensors"


def test_a_lightning_lora_on_the_base_is_the_demo() -> None:
    """The same weights by the other door: the schedule comes along, and so does the picture."""
    base, whole = Editor.open("demo-base", loras=[(LIGHTNING, 1.0)], device="cpu"), Editor.open("demo", device="cpu")
    assert (base.card.steps, base.card.schedule, base.card.true_cfg) == (4, "lightning", 1.0)
    request = EditRequest(images=(LANDSCAPE,), prompt="make it navy", seed=5)
    assert np.array_equal(pixels(base.edit(request).image), pixels(whole.edit(request).image))


def test_the_strength_of_a_lora_counts_in_the_picture_and_in_the_hash() -> None:
    request = EditRequest(images=(LANDSCAPE,), prompt="make it navy", seed=5, steps=2, schedule="lightning")
    plain = Editor.open("demo-base", device="cpu")
    none, half, whole = (Editor.open("demo-base", loras=[(str(LIGHTNING), s)], device="cpu") for s in (0.0, 0.5, 1.0))
    assert len({e.weights_sha256 for e in (plain, none, half, whole)}) == 4
    drawn = [pixels(editor.edit(request).image) for editor in (plain, none, half, whole)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])
    assert not np.array_equal(drawn[2], drawn[3])


def test_two_lightning_loras_are_refused(tmp_path: Path) -> None:
    again = shutil.copy(LIGHTNING, tmp_path / "again.safetensors")
    with pytest.raises(CheckpointError, match=r"lightning-4steps\.safetensors and again\.safetensors are each"):
        Editor.open("demo", loras=[(again, 1.0)], device="cpu")


def test_a_lora_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match=r"There is no LoRA .*nowhere\.safetensors"):
        Editor.open("demo", loras=[(tmp_path / "nowhere.safetensors", 1.0)], device="cpu")


def test_fp32_with_a_format_is_refused_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_describe_card", lambda device: ((9, 0), "a card"))
    card = find_model("demo")[2]
    with pytest.raises(InputError, match="compute in BF16 on a card"):
        loading.load_model(demo.folder(), card, torch.device("cuda"), torch.float32, settings=Settings(format="fp8"))
