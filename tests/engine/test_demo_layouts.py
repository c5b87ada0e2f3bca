"""The demo, whose pictures mean something, drawn through other layouts: what a user sees of a quantized file."""

from pathlib import Path

import numpy as np
import pytest
import zoo
from safetensors.torch import load_file

from millicent import EditRequest, demo, open_image
from millicent.engine.editor import Editor
from millicent.engine.settings import Settings

EXAMPLE = Path(__file__).parents[2] / "examples" / "shirt.png"
# the most mean difference to the BF16 picture, in 255ths; measured: up to 0.7, 1.0, 1.4 and 3.0
EIGHT, FIVE, E5M2, FOUR = 1.0, 1.5, 2.0, 4.0
# each kind of scale and of number; tiles of 128 and blocks of 256 do not divide the demo's 192 channels, and the producers that
# quantize whole modules have their own size in test_zoo.py
LAYOUTS = {
    "raw e4m3": EIGHT,
    "raw e5m2": E5M2,
    "comfy old": EIGHT,
    "lightx2v comfy": EIGHT,
    "comfy fp8, metadata": EIGHT,
    "comfy mxfp8": EIGHT,
    "comfy nvfp4": FOUR,
    "comfy int8": EIGHT,
    "comfy int8 rows": EIGHT,
    "lightx2v fp8 by block": EIGHT,
    "lightx2v int8": EIGHT,
    "lightx2v nvfp4, calibrated": FOUR,
    "musubi [N, nb, 1]": EIGHT,
    "convert_to_quant int8": EIGHT,
    "modelopt fp8": EIGHT,
    "modelopt nvfp4": FOUR,
    "fine-grained fp8": EIGHT,
    "bitsandbytes nf4, nested": FOUR,
    "bitsandbytes fp4": FOUR,
    "bitsandbytes int8": EIGHT,
    "gguf Q8_0": EIGHT,
    "gguf Q5_0": FIVE,
    "gguf Q4_1": FOUR,
}


def draw(editor: Editor) -> np.ndarray:
    request = EditRequest(images=(open_image(EXAMPLE),), prompt="make the shirt navy blue", seed=7, steps=4, schedule="lightning")
    return np.asarray(editor.edit(request).image).astype(float)


@pytest.fixture(scope="module")
def state() -> zoo.State:
    (path,) = (demo.folder() / "transformer").glob("*.safetensors")
    return {key: tensor.float() for key, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return draw(Editor.open("demo-base", device="cpu"))


@pytest.mark.parametrize("settings", [Settings(), Settings(format="fp8")], ids=["plain", "fast"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_demo_draws_the_same_picture_through_another_layout(
    name: str, settings: Settings, state: zoo.State, picture: np.ndarray, tmp_path: Path
) -> None:
    path = zoo.write(zoo.LAYOUTS[name], state, tmp_path).path
    drawn = draw(Editor.open("demo-base", transformer=path, device="cpu", settings=settings))
    assert 0 < np.abs(drawn - picture).mean() <= LAYOUTS[name]
