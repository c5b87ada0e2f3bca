"""Makers' marks, as the makers write them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from millicent.checkpoint.header import read_header
from millicent.checkpoint.marks import Marks, read_marks
from millicent.checkpoint.source import open_source
from millicent.errors import CheckpointError

PREFIX = "model.diffusion_model."
LAYER = "transformer_blocks.0.attn.to_q"
CODES = torch.zeros(4, 4, dtype=torch.int8)


def note(**fields: Any) -> torch.Tensor:
    return torch.tensor([*json.dumps(fields).encode(), 0, 0], dtype=torch.uint8)


def read(tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, **options: Any) -> Marks:
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata)
    source = open_source(path)
    return read_marks(read_header(source), source, options.pop("prefix", ""), **options)


def test_a_note_for_each_layer(tmp_path: Path) -> None:
    tensors = {f"{PREFIX}{LAYER}.weight": CODES, f"{PREFIX}{LAYER}.comfy_quant": note(format="int8_tensorwise", convrot=True)}
    marks = read(tmp_path, tensors, prefix=PREFIX)
    assert marks == Marks("comfy", {LAYER: {"format": "int8_tensorwise", "convrot": True}})


def test_nested_parameters_are_lifted(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.comfy_quant": note(format="int8_tensorwise", params={"convrot": True, "convrot_groupsize": 64})}
    assert read(tmp_path, tensors).notes[LAYER] == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_notes_in_the_metadata(tmp_path: Path, prefix: str) -> None:
    layers = {f"{PREFIX}{LAYER}": {"format": "nvfp4"}, "img_in": "float8_e4m3fn"}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    marks = read(tmp_path, {f"{prefix}{LAYER}.weight": CODES}, metadata, prefix=prefix)
    assert marks == Marks("comfy", {LAYER: {"format": "nvfp4"}, "img_in": {"format": "float8_e4m3fn"}})


def test_the_old_marker(tmp_path: Path) -> None:
    assert read(tmp_path, {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn), "w": CODES}).maker == "comfy"


@pytest.mark.parametrize(("method", "maker"), [("modelopt", "modelopt"), ("compressed-tensors", "compressed-tensors")])
def test_a_quantization_config_in_the_folder_or_in_the_metadata(tmp_path: Path, method: str, maker: str) -> None:
    config = {"quant_method": method, "quant_algo": "NVFP4"}
    assert read(tmp_path, {"w": CODES}, quantization=config).maker == maker
    assert read(tmp_path, {"w": CODES}, {"quantization_config": json.dumps(config)}).maker == maker


def test_no_mark_is_no_maker(tmp_path: Path) -> None:
    assert read(tmp_path, {"w": CODES}, {"format": "pt"}) == Marks(None, {})


@pytest.mark.parametrize("method", ["sdnq", "gptq", "auto-round", "nunchaku_lite"])
def test_what_another_library_must_read_is_refused_by_name(tmp_path: Path, method: str) -> None:
    with pytest.raises(CheckpointError, match=f"quantized by {method}"):
        read(tmp_path, {"w": CODES}, quantization={"quant_method": method})


@pytest.mark.parametrize(("ending", "library"), [("encoded_exponent", "DFloat11"), ("g_idx", "GPTQ"), ("W_q", "HQQ")])
def test_foreign_tensors_are_refused_by_name(tmp_path: Path, ending: str, library: str) -> None:
    with pytest.raises(CheckpointError, match=library):
        read(tmp_path, {f"{LAYER}.{ending}": CODES})


def test_two_makers_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has ComfyUI's marks and says that modelopt made it"):
        read(tmp_path, {f"{LAYER}.comfy_quant": note(format="nvfp4")}, quantization={"quant_method": "modelopt"})


@pytest.mark.parametrize(
    "broken",
    [
        torch.zeros(8, dtype=torch.uint8),
        torch.tensor(list(b"[1]"), dtype=torch.uint8),
        note(convrot=True),
        note(format="nvfp4", params=[1]),
        torch.zeros(5000, dtype=torch.uint8),
        torch.tensor([0xFF, 0xFE], dtype=torch.uint8),
    ],
)
def test_a_broken_note_is_refused(tmp_path: Path, broken: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="no note that can be read"):
        read(tmp_path, {f"{LAYER}.comfy_quant": broken})
