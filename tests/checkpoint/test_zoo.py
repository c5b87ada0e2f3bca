"""Every published layout, whole: recognized, decoded within its bounds and as its maker decodes it, and drawn with."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from conftest import draw_picture
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from millicent.checkpoint.load import load_network, read_parameters
from millicent.checkpoint.recognize import Component, Recognized, recognize
from millicent.checkpoint.schemes import KEEPABLE
from millicent.edits import EditRequest
from millicent.engine.editor import Editor
from millicent.formats.scaled import ScaledLinear
from millicent.model.config import MMDiTConfig
from millicent.model.mmdit import MMDiT

# mean difference between two pictures, in 255ths, by bits: where blocks are quantized, where all is, where the encoder is.
# Measured: up to 0.7 and 2.3, 2.4 and 3.9, 0.1 and 0.4
MAX_DIFFERENCE = {"blocks": {8: 1.0, 4: 3.0}, "all": {8: 3.0, 4: 5.0}, "encoder": {8: 0.2, 4: 0.8}}
MAX_NORM_RATIO = 1.02

Write = Callable[[str], zoo.Written]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.make_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def state(folder: Path) -> zoo.State:
    return zoo.read_state(folder / "transformer")


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    return lambda name: zoo.written(name, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def write_text_encoder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    state = zoo.read_text_encoder(folder)
    return cache(lambda name: zoo.write(zoo.TEXT_ENCODERS[name], state, tmp_path_factory.mktemp("text_encoder"), "encoder"))


def draw(editor: Editor) -> np.ndarray:
    request = EditRequest(images=(draw_picture(64, 64),), prompt="make it navy", seed=5, steps=2)
    return np.asarray(editor.edit(request).image).astype(float)


@pytest.fixture(scope="module")
def picture(folder: Path) -> np.ndarray:
    """By the folder's own BF16 weights."""
    return draw(Editor.open(folder, device="cpu"))


def difference(drawn: np.ndarray, picture: np.ndarray) -> float:
    return float(np.abs(drawn - picture).mean())


def bits(layout: zoo.Layout) -> int:
    return 8 if layout.bound < zoo.FOUR_BITS else 4


def check_parameters(found: zoo.State, stored: Any, state: zoo.State, layout: zoo.Layout) -> None:
    """As its maker reads them, and as near to the weights before as the format can be."""
    assert found.keys() == stored.truth.keys()
    for key, truth in stored.truth.items():
        read = found[key].float()
        if layout.tolerance:
            largest = float(truth.abs().max())
            torch.testing.assert_close(read, truth, rtol=0, atol=layout.tolerance * largest, msg=lambda text, key=key: key + text)
        else:
            assert torch.equal(read, truth), key
        if truth.ndim == 2:
            error = float((read - state[key]).norm() / state[key].norm())
            ratio = float(read.norm() / state[key].norm())
            assert error < layout.bound, (key, error)
            assert 1 / MAX_NORM_RATIO < ratio < MAX_NORM_RATIO, (key, ratio)


def recognized_as(path: Path, network: Any, layout: zoo.Layout) -> tuple[Recognized, Component]:
    recognized = recognize(path)
    assert set(recognized.components) == {network}
    component = recognized.components[network]
    assert component.layout is not None
    assert component.layout.schemes == layout.schemes
    assert component.marks.maker == layout.maker
    assert component.prefix == layout.prefix
    return recognized, component


@pytest.mark.parametrize("name", zoo.LAYOUTS)
def test_a_layout_is_recognized_and_decoded(name: str, write: Write, state: zoo.State) -> None:
    written = write(name)
    recognized, component = recognized_as(written.path, "transformer", written.layout)
    is_marked = "__index_timestep_zero__" in written.stored.tensors or name == "nunchaku int4"
    says = is_marked or (written.layout.config or {}).get("zero_cond_t")
    assert component.zero_cond_t == (True if says else None)
    assert bool(recognized.warnings) == name.startswith("raw")
    assert recognized.distilled is None
    check_parameters(dict(read_parameters(component, recognized.source)), written.stored, state, written.layout)


@pytest.mark.parametrize("name", zoo.LAYOUTS)
def test_codes_stay_as_they_are(name: str, write: Write) -> None:
    """Bit for bit, with their scales, in the layouts that hold FP8 or INT8 codes with one scale, or one for each row."""
    written = write(name)
    recognized = recognize(written.path)
    component = recognized.components["transformer"]
    with torch.device("meta"):
        mmdit: nn.Module = MMDiT(MMDiTConfig.from_dict({**component.config, "zero_cond_t": True}))
    kept = load_network(mmdit, component, recognized.source, torch.bfloat16, keep_codes=True)
    quantized = {scheme: count for scheme, count in written.layout.schemes.items() if scheme != "plain"}
    assert kept == (sum(quantized.values()) if written.layout.kept else 0)
    assert component.layout is not None
    for layer, matrix in component.layout.matrices.items():
        linear = mmdit.get_submodule(layer) if not layer.endswith("qkv") and "add_qkv" not in layer else None
        if not isinstance(linear, ScaledLinear):
            continue
        codes, scale = (written.stored.tensors[f"{layer}.{suffix}"] for suffix in KEEPABLE[matrix.scheme.name])
        assert torch.equal(linear.weight.view(torch.uint8), codes.view(torch.uint8)), layer
        truth = written.stored.truth[f"{layer}.weight"]
        torch.testing.assert_close(linear.weight.float() * linear.weight_scale, truth, rtol=2**-22, atol=0)
        if matrix.scheme.name not in ("bitsandbytes int8", "musubi scaled fp8"):
            assert torch.equal(linear.weight_scale.flatten(), scale.float().flatten()), layer


@pytest.mark.parametrize("name", zoo.LAYOUTS)
def test_a_layout_draws_what_bf16_draws(name: str, write: Write, folder: Path, picture: np.ndarray) -> None:
    written = write(name)
    editor = Editor.open(folder, transformer=written.path, device="cpu")
    off = difference(draw(editor), picture)
    where = "blocks" if "plain" in written.layout.schemes else "all"
    assert off <= (0 if written.layout.schemes == zoo.WHOLE else MAX_DIFFERENCE[where][bits(written.layout)])


@pytest.mark.parametrize("name", zoo.TEXT_ENCODERS)
def test_a_text_encoder_is_recognized_and_decoded(name: str, write_text_encoder: Write, folder: Path) -> None:
    written = write_text_encoder(name)
    recognized, component = recognized_as(written.path, "text_encoder", written.layout)
    found = dict(read_parameters(component, recognized.source))
    check_parameters(found, written.stored, zoo.read_text_encoder(folder), written.layout)


@pytest.mark.parametrize("name", zoo.TEXT_ENCODERS)
def test_a_text_encoder_reads_what_bf16_reads(name: str, write_text_encoder: Write, folder: Path, picture: np.ndarray) -> None:
    written = write_text_encoder(name)
    editor = Editor.open(folder, text_encoder=written.path, device="cpu")
    off = difference(draw(editor), picture)
    assert off <= (0 if name.startswith("bf16") else MAX_DIFFERENCE["encoder"][bits(written.layout)])


def without_scales(weight: Tensor) -> Tensor:
    return zoo.comfy_old(weight)[0]["weight"].float()


def along_the_columns(weight: Tensor) -> Tensor:
    """One scale for each row, given to the columns: what broadcasting does of itself, where a matrix is square."""
    parts, read = zoo.fp8_rows(weight)
    return parts["weight"].float() * parts["weight_scale"].T if weight.shape[0] == weight.shape[1] else read


def not_rotated_back(weight: Tensor) -> Tensor:
    parts = zoo.comfy_int8_convrot(weight)[0]
    return parts["weight"].float() * parts["weight_scale"]


def with_swapped_nibbles(weight: Tensor) -> Tensor:
    codes, scales, whole, _ = zoo.nvfp4(weight)
    return zoo.kitchen.dequantize_nvfp4(codes, whole, zoo.blocked(scales), torch.float32, hi_first=True)


def with_scales_in_rows(weight: Tensor) -> Tensor:
    codes, scales, whole, _ = zoo.nvfp4(weight)
    return zoo.kitchen.dequantize_nvfp4(codes, whole, scales, torch.float32, hi_first=False)


WRONG = [(without_scales, 8), (along_the_columns, 8), (not_rotated_back, 8), (with_swapped_nibbles, 4), (with_scales_in_rows, 4)]


def copy_folder(folder: Path, to: Path, part: str, state: zoo.State) -> Path:
    """The folder with other weights in one part; the other parts are links."""
    to.mkdir()
    for path in folder.iterdir():
        if path.name != part:
            (to / path.name).symlink_to(path)
    (to / part).mkdir()
    (to / part / "config.json").symlink_to(folder / part / "config.json")
    stem = "diffusion_pytorch_model" if part == "transformer" else "model"
    save_file(state, to / part / f"{stem}.safetensors")
    return to


@pytest.mark.parametrize(("decode", "of_bits"), WRONG)
def test_a_wrong_decode_draws_another_picture(
    decode: Callable[[Tensor], Tensor], of_bits: int, state: zoo.State, folder: Path, tmp_path: Path, picture: np.ndarray
) -> None:
    """What the bounds above are worth: the errors that people report, built by hand into a model's own weights."""
    wrong = {k: decode(t) if zoo.in_blocks(k) and zoo.is_matrix(k, t) else t for k, t in state.items()}
    other = copy_folder(folder, tmp_path / "model", "transformer", wrong)
    off = difference(draw(Editor.open(other, device="cpu")), picture)
    assert off > 2 * MAX_DIFFERENCE["blocks"][of_bits]


def test_a_text_encoder_without_its_scales_reads_another_prompt(folder: Path, tmp_path: Path, picture: np.ndarray) -> None:
    own = load_file(folder / "text_encoder" / "model.safetensors")
    wrong = {
        key: without_scales(tensor.float()) if tensor.ndim == 2 and zoo.is_text_linear(key) else tensor
        for key, tensor in own.items()
    }
    other = copy_folder(folder, tmp_path / "model", "text_encoder", wrong)
    off = difference(draw(Editor.open(other, device="cpu")), picture)
    assert off > 2 * MAX_DIFFERENCE["encoder"][8]
