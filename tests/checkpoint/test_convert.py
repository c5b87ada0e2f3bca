"""Conversions of the tiny model: what is stored against float64 and torchao, killed ones against whole ones, and the pictures."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeFolder, draw_picture, write_card
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchao.quantization import Float8WeightOnlyConfig, quantize_

from millicent.checkpoint.architecture import transformer_tensors
from millicent.checkpoint.convert import FORMATS, Format, Report, check_whole
from millicent.checkpoint.converted import sees_timestep_alone, split_table, without_modulation
from millicent.checkpoint.files import JoinedSource, open_weights
from millicent.checkpoint.layout import lay_out
from millicent.checkpoint.load import MappedFiles, read_parameters
from millicent.checkpoint.lora import fuse_loras
from millicent.checkpoint.marks import Marks
from millicent.checkpoint.recognize import Component
from millicent.checkpoint.write import partial_paths
from millicent.edits import EditRequest
from millicent.engine.convert import TRANSFORMER_FILE, ConvertRequest, convert
from millicent.engine.editor import Editor
from millicent.engine.sampler import lightning_sigmas
from millicent.errors import CheckpointError, InputError, OutputError, ScheduleError, WeightsMismatchError
from millicent.facts.models import read_card
from millicent.formats.quantize import LARGEST, RowFormat, quantize_rows
from millicent.model.config import MMDiTConfig
from millicent.model.mmdit import MMDiT

ROW_FORMATS: tuple[RowFormat, ...] = ("fp8", "int8")
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
BLOCK = "transformer_blocks.1"
LORA_LAYERS = (
    f"{BLOCK}.attn.to_q",
    f"{BLOCK}.img_mlp.net.2",
    f"{BLOCK}.txt_mod.1",
    "transformer_blocks.0.attn.to_add_out",
    "img_in",
)


def cast_transformer(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    path = folder / TRANSFORMER_FILE
    made: dict[str, Tensor] = {}
    for key, tensor in load_file(path).items():
        made |= change(key, tensor)
    save_file(made, path, {"format": "pt"})


@pytest.fixture(scope="module")
def bf16_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny 2511 with a BF16 transformer, as the published ones are; not to be changed."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("bf16") / "tiny")
    cast_transformer(folder, lambda key, tensor: {key: tensor.bfloat16()})
    return folder


@pytest.fixture(scope="module")
def lightning(bf16_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that says it is Lightning's of 4 steps, and changes layers of each kind."""
    weights = load_file(bf16_folder / TRANSFORMER_FILE)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in LORA_LAYERS:
        rows, columns = weights[f"{layer}.weight"].shape
        tensors[f"{layer}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
        tensors[f"{layer}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 4
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    path = tmp_path_factory.mktemp("lora") / "fast.safetensors"
    save_file(tensors, path, {"schedule": "lightning", "steps": "4"})
    return path


def request(number_format: Format, *loras: Path, **changes: Any) -> ConvertRequest:
    return ConvertRequest(number_format, tuple((lora, 1.0) for lora in loras), **changes)


def open_stored(file: Path, zero_cond_t: bool = True) -> tuple[Component, JoinedSource, dict[str, Tensor]]:
    """A converted file as a loader sees it: the network's part, its source, and the table's tensors with their prefix."""
    files = open_weights(file)
    own, table = split_table(files.header.tensors)
    config = read_config(file)
    expected = transformer_tensors(config)
    kept = expected if "norm_out.linear.weight" in own else without_modulation(expected)
    component = Component("transformer", "", config, own, lay_out(own, kept, Marks(None), file.name), Marks(None), zero_cond_t)
    mapped = MappedFiles(files.source)
    return component, files.source, {key: mapped.tensor(info) for key, info in table.items()}


def read_config(file: Path) -> dict[str, Any]:
    return dict(json.loads((file.parent / "config.json").read_text()))


def read_back(folder: Path) -> dict[str, Tensor]:
    component, source, _ = open_stored(folder / TRANSFORMER_FILE)
    return {key: tensor.float() for key, tensor in read_parameters(component, source)}


def fused(folder: Path, *loras: Path, strength: float = 1.0) -> dict[str, Tensor]:
    """The transformer's weights in FP32, with LoRAs fused in by the engine."""
    mmdit = MMDiT(MMDiTConfig.from_dict(read_config(folder / TRANSFORMER_FILE)))
    mmdit.load_state_dict(load_file(folder / TRANSFORMER_FILE), assign=True)
    fuse_loras(mmdit.float().requires_grad_(False), [(lora, strength) for lora in loras])
    return mmdit.state_dict()


# what is stored


@pytest.mark.parametrize("number_format", FORMATS)
def test_every_weight_comes_back_within_its_formats_rounding(
    number_format: Format, bf16_folder: Path, lightning: Path, tmp_path: Path
) -> None:
    report = convert(bf16_folder, tmp_path / "made", request(number_format, lightning, keep_modulation=True))
    found, wanted = read_back(tmp_path / "made"), fused(bf16_folder, lightning)
    assert found.keys() == wanted.keys()
    told = {layer.name: layer for layer in report.layers}
    assert told.keys() == {name.removesuffix(".weight") for name, tensor in wanted.items() if tensor.ndim == 2}
    for name, weight in wanted.items():
        layer = told.get(name.removesuffix(".weight"))
        row_step = weight.abs().amax(-1, keepdim=True) / LARGEST.get(number_format, 1.0)
        bound = {
            "fp8": torch.maximum(weight.abs() / 16, row_step / 1024),  # half a step of 3 bits; of the subnormals
            "int8": row_step / 2,
            "bf16": weight.abs() / 256,
        }[layer.format if layer else "bf16"]
        # a quotient of up to 127 or 448 steps is itself rounded to FP32
        assert ((found[name] - weight).abs() <= bound * (1 + 1e-4)).all(), name
        if layer:
            error = ((found[name].double() - weight.double()).norm() / weight.double().norm()).item()
            assert layer.error == pytest.approx(error, rel=1e-3, abs=1e-9)
            assert layer.is_fused == (layer.name in LORA_LAYERS)
            assert not layer.is_copied


@pytest.mark.parametrize("number_format", ROW_FORMATS)
def test_only_the_blocks_matrices_are_quantized(number_format: RowFormat, bf16_folder: Path, tmp_path: Path) -> None:
    report = convert(bf16_folder, tmp_path / "made", request(number_format, keep_modulation=True))
    quantized = {layer.name for layer in report.layers if layer.format == number_format}
    assert len(quantized) == 2 * 12  # eight projections and four of the MLPs in each of two blocks
    assert all(name.startswith("transformer_blocks.") and "_mod." not in name for name in quantized)
    held = load_file(tmp_path / "made" / TRANSFORMER_FILE)
    for name, tensor in held.items():
        layer = name.removesuffix("_scale").removesuffix(".weight")
        code = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[number_format]
        scale = torch.float32 if name.endswith("_scale") else code
        assert tensor.dtype == (scale if layer in quantized and ".weight" in name else torch.bfloat16), name
    assert report.counts == {number_format: 24, "bf16": len(fused(bf16_folder)) - 24, "left out": 0}
    assert report.bytes_after == (tmp_path / "made" / TRANSFORMER_FILE).stat().st_size


def nearest(values: Tensor, steps: Tensor) -> Tensor:
    """The nearest of a format's values to each, in float64; NaN where two are as near as FP32's division can tell."""
    distances = (values[..., None] - steps).abs()
    two = distances.topk(2, largest=False)
    is_tie = (two.values[..., 1] - two.values[..., 0]) <= 2.0**-22 * values.abs()
    return torch.where(is_tie, torch.nan, steps[two.indices[..., 0]])


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_the_codes_are_the_nearest_ones(row_format: RowFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 96, generator=generator) * torch.logspace(-12, 6, 40)[:, None]
    codes, scale = quantize_rows(weight, row_format)
    every = E4M3.double()[~E4M3.float().isnan()].unique() if row_format == "fp8" else torch.arange(-127, 128).double()
    torch.testing.assert_close(scale.double(), weight.double().abs().amax(1, keepdim=True) / LARGEST[row_format], rtol=2e-7, atol=0)
    wanted = nearest(weight.double() / scale.double(), every)
    assert torch.isnan(wanted).float().mean() < 0.01
    assert ((codes.double() == wanted) | torch.isnan(wanted)).all()
    assert (codes.float().abs().amax(1) == LARGEST[row_format]).all()


def test_fp8_codes_and_scales_are_torchaos() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    linear = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False))
    linear[0].weight.data = weight.clone()
    quantize_(linear, Float8WeightOnlyConfig())
    codes, scale = quantize_rows(weight, "fp8")
    stored: Any = linear[0].weight
    assert torch.equal(codes.view(torch.uint8), stored.qdata.view(torch.uint8))
    assert torch.equal(scale, stored.scale)


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_rows_of_zeros_and_rows_too_small_for_a_scale(row_format: RowFormat) -> None:
    weight = torch.zeros(3, 32)
    weight[1] = 1e-42
    weight[2, 0] = -3.0
    codes, scale = quantize_rows(weight, row_format)
    assert (scale > 0).all()
    assert (codes.float() * scale - weight).abs().max() <= 1e-42


@pytest.mark.parametrize("scale_of", ["row", "tensor"])
@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_codes_that_are_there_are_copied_unless_a_lora_changes_them(
    row_format: RowFormat, scale_of: str, bf16_folder: Path, lightning: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(bf16_folder, tmp_path / "coded")

    def quantize(key: str, tensor: Tensor) -> dict[str, Tensor]:
        if not (key.startswith("transformer_blocks.") and tensor.ndim == 2):
            return {key: tensor}
        # half of what the format holds, so that codes made anew would be others
        codes, scale = quantize_rows(2 * tensor.float() if scale_of == "row" else tensor.float().reshape(1, -1), row_format)
        codes = torch.where(codes.float().abs() > LARGEST[row_format] / 2, torch.zeros_like(codes), codes)
        return {key: codes.reshape(tensor.shape), f"{key}_scale": scale if scale_of == "row" else scale.reshape(())}

    cast_transformer(folder, quantize)
    source = load_file(folder / TRANSFORMER_FILE)
    report = convert(folder, tmp_path / "made", request(row_format, lightning))
    made = load_file(tmp_path / "made" / TRANSFORMER_FILE)
    for layer in report.layers:
        is_coded = layer.format == row_format
        assert layer.is_copied == (is_coded and layer.name not in LORA_LAYERS)
        if layer.is_copied:
            key = f"{layer.name}.weight"
            assert layer.error == 0
            assert torch.equal(made[key].view(torch.uint8), source[key].view(torch.uint8))
            assert torch.equal(made[f"{key}_scale"], source[f"{key}_scale"].expand(len(made[key]), 1))
    other = convert(folder, tmp_path / "other", request("int8" if row_format == "fp8" else "fp8", keep_modulation=True))
    assert not any(layer.is_copied for layer in other.layers)


def test_bf16_with_a_lora_is_what_the_engine_fuses_bit_for_bit(bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    convert(bf16_folder, tmp_path / "made", ConvertRequest("bf16", ((lightning, 0.7),), keep_modulation=True))
    wanted = MMDiT(MMDiTConfig.from_dict(read_config(bf16_folder / TRANSFORMER_FILE))).bfloat16()
    wanted.load_state_dict(load_file(bf16_folder / TRANSFORMER_FILE))
    fuse_loras(wanted, [(lightning, 0.7)])
    found = load_file(tmp_path / "made" / TRANSFORMER_FILE)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert not torch.equal(found[f"{LORA_LAYERS[0]}.weight"], load_file(bf16_folder / TRANSFORMER_FILE)[f"{LORA_LAYERS[0]}.weight"])


def test_the_file_says_what_it_is(bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    convert(bf16_folder, tmp_path / "made", request("int8", lightning))
    with safe_open(tmp_path / "made" / TRANSFORMER_FILE, framework="pt") as file:
        told = json.loads(file.metadata()["millicent"])
        keys = set(file.keys())
    [lora] = told.pop("loras")
    assert told == {
        "version": 1,
        "format": "int8",
        "distilled_steps": 4,
        "schedule": "lightning",
        "steps": 4,
        "modulation_table": True,
        "modulation_weights": False,
        "zero_cond_t": True,
        "source": "tiny",
    }
    assert (lora["name"], lora["strength"], len(lora["sha256"])) == ("fast.safetensors", 1.0, 64)
    own, table = split_table(dict.fromkeys(keys))
    assert not any(sees_timestep_alone(key) for key in own)
    assert {key.split(".")[1] for key in table} == {"bf16", "fp32"}
    assert len(table) == 2 * (1 + 2 * 2 + 1)


# kills


class KilledError(Exception):
    pass


def stop_after(units: int) -> Callable[[int, int], None]:
    def on_unit(done: int, total: int) -> None:
        if done == units:
            raise KilledError

    return on_unit


def all_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(bf16_folder: Path, lightning: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Report]:
    """A conversion in one go."""
    target = tmp_path_factory.mktemp("whole") / "made"
    report = convert(bf16_folder, target, request("fp8", lightning))
    return all_files(target), report


def test_the_bytes_are_the_same_each_time(
    whole: tuple[dict[str, bytes], Report], bf16_folder: Path, lightning: Path, tmp_path: Path
) -> None:
    convert(bf16_folder, tmp_path / "again", request("fp8", lightning))
    assert all_files(tmp_path / "again") == whole[0]


@pytest.mark.parametrize("units", [1, 2, 7, 20, -1])
def test_a_run_that_broke_off_is_gone_on_with_to_the_same_bytes(
    units: int, whole: tuple[dict[str, bytes], Report], bf16_folder: Path, lightning: Path, tmp_path: Path
) -> None:
    units = units % whole[1].units
    target, asked = tmp_path / "made", request("fp8", lightning)
    with pytest.raises(KilledError):
        convert(bf16_folder, target, asked, stop_after(units))
    assert not target.exists()
    partial, journal = partial_paths(tmp_path / "made.partial" / TRANSFORMER_FILE)
    # a unit that was being written, and its line
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    spoil_what_has_no_line(partial, {json.loads(line)["unit"] for line in lines[1:-1]})
    report = convert(bf16_folder, target, asked)
    assert (report.resumed_units, report.started_anew) == (units - 1, False)
    assert all_files(target) == whole[0]
    assert [dataclasses.astuple(layer) for layer in report.layers] == [dataclasses.astuple(layer) for layer in whole[1].layers]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("cut_bytes", [1, 9])
def test_a_run_may_break_off_twice(
    cut_bytes: int, whole: tuple[dict[str, bytes], Report], bf16_folder: Path, lightning: Path, tmp_path: Path
) -> None:
    """What follows a line that was cut off must not be lost with it."""
    asked = request("fp8", lightning)
    with pytest.raises(KilledError):
        convert(bf16_folder, tmp_path / "made", asked, stop_after(6))
    _, journal = partial_paths(tmp_path / "made.partial" / TRANSFORMER_FILE)
    os.truncate(journal, journal.stat().st_size - cut_bytes)
    with pytest.raises(KilledError):
        convert(bf16_folder, tmp_path / "made", asked, stop_after(12))
    (tmp_path / "made.partial" / "vae" / "of-another-source.txt").write_text("left behind")
    report = convert(bf16_folder, tmp_path / "made", asked)
    assert (report.resumed_units, report.started_anew) == (12, False)
    assert all_files(tmp_path / "made") == whole[0]


def spoil_what_has_no_line(partial: Path, done: set[str]) -> None:
    header = open_weights_header(partial)
    with partial.open("r+b") as file:
        for key, info in header.items():
            module = "modulation." + key.split(".", 2)[2] if key.startswith("modulation.") else key.rpartition(".")[0]
            if module not in done:
                file.seek(info["begin"])
                file.write(b"\xff" * (info["end"] - info["begin"]))


def open_weights_header(partial: Path) -> dict[str, dict[str, int]]:
    data = partial.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    entries.pop("__metadata__")
    starts = {key: [8 + length + offset for offset in entry["data_offsets"]] for key, entry in entries.items()}
    return {key: {"begin": begin, "end": end} for key, (begin, end) in starts.items()}


KILL = """
import os, signal, sys, torch
from pathlib import Path
from millicent.engine.convert import ConvertRequest, convert
torch.set_num_threads(1)
def on_unit(done, total):
    if done == 11:
        os.kill(os.getpid(), signal.SIGKILL)
source, target, lora = map(Path, sys.argv[1:])
convert(source, target, ConvertRequest("fp8", ((lora, 1.0),)), on_unit)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_killed_process_is_gone_on_with_to_the_same_bytes(
    whole: tuple[dict[str, bytes], Report], bf16_folder: Path, lightning: Path, tmp_path: Path
) -> None:
    target = tmp_path / "made"
    killed = subprocess.run([sys.executable, "-c", KILL, bf16_folder, target, lightning], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    report = convert(bf16_folder, target, request("fp8", lightning))
    assert report.resumed_units == 11
    assert all_files(target) == whole[0]


@pytest.mark.parametrize("changed", ["format", "strength", "source"])
def test_other_options_or_another_source_start_anew(changed: str, bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bf16_folder, tmp_path / "tiny")
    with pytest.raises(KilledError):
        convert(folder, tmp_path / "made", request("fp8", lightning), stop_after(9))
    asked = request("fp8", lightning)
    if changed == "format":
        asked = request("int8", lightning)
    elif changed == "strength":
        asked = ConvertRequest("fp8", ((lightning, 0.5),))
    else:
        cast_transformer(folder, lambda key, tensor: {key: tensor * 2})
    report = convert(folder, tmp_path / "made", asked)
    assert (report.resumed_units, report.started_anew) == (0, True)
    convert(folder, tmp_path / "fresh", asked)
    assert all_files(tmp_path / "made") == all_files(tmp_path / "fresh")


# the pictures


def draw(editor: Editor, **changes: Any) -> np.ndarray:
    edit = EditRequest(images=(draw_picture(100, 150),), prompt="make it navy", seed=5, steps=4, schedule="lightning", **changes)
    return np.asarray(editor.edit(edit).image).astype(int)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_an_edit_with_a_table_is_the_sources_bit_for_bit(
    dtype: str, tiny_folders: MakeFolder, lightning: Path, tmp_path: Path
) -> None:
    for zero_cond_t in (False, True):
        folder = shutil.copytree(tiny_folders("edit-plus", zero_cond_t), tmp_path / f"{zero_cond_t}")
        cast_transformer(folder, lambda key, tensor: {key: tensor.bfloat16()})
        write_card(folder, schedule="lightning", steps=4)  # distilled as it is: no LoRA, whose rounding FP32 would not share
        made = tmp_path / f"{zero_cond_t}-made"
        convert(folder, made, request("bf16"))
        wanted = draw(Editor.open(folder, device="cpu", dtype=dtype))
        assert np.array_equal(draw(Editor.open(made, device="cpu", dtype=dtype)), wanted)


def test_an_edit_with_a_fused_lora_is_the_engines_bit_for_bit(bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    convert(bf16_folder, tmp_path / "made", request("bf16", lightning))
    wanted = draw(Editor.open(bf16_folder, loras=[(lightning, 1.0)], device="cpu", dtype="bf16"))
    assert np.array_equal(draw(Editor.open(tmp_path / "made", device="cpu", dtype="bf16")), wanted)
    assert not np.array_equal(draw(Editor.open(bf16_folder, device="cpu", dtype="bf16")), wanted)


@pytest.mark.parametrize(("number_format", "bound"), [("bf16", 0), ("int8", 6), ("fp8", 16)])
def test_a_converted_folder_opens(number_format: Format, bound: float, bf16_folder: Path, tmp_path: Path) -> None:
    """Kept modulation and the base schedule: such a folder holds nothing but what other makers' files hold."""
    made = tmp_path / "made"
    convert(bf16_folder, made, request(number_format, keep_modulation=True))
    # 8-bit weights of a random network move a picture by some of its 256 levels in the mean
    difference = np.abs(draw(Editor.open(made, device="cpu")) - draw(Editor.open(bf16_folder, device="cpu")))
    assert difference.mean() <= bound
    others = {name: data for name, data in all_files(bf16_folder).items() if not name.startswith(("transformer", "card"))}
    assert {name: data for name, data in all_files(made).items() if not name.startswith(("transformer", "card"))} == others
    assert read_card(made / "card.toml") == read_card(bf16_folder / "card.toml")


def test_the_cards_lora_is_fused_and_no_longer_named(bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bf16_folder, tmp_path / "own")
    shutil.copy(lightning, folder / "fast.safetensors")
    write_card(folder, lora="fast.safetensors", schedule="lightning")
    report = convert(folder, tmp_path / "made", request("fp8"))
    assert {layer.name for layer in report.layers if layer.is_fused} == {name for name in LORA_LAYERS if "_mod" not in name}
    assert read_card(tmp_path / "made" / "card.toml").lora is None
    assert not (tmp_path / "made" / "fast.safetensors").exists()
    with pytest.raises(CheckpointError, match="each distilled"):
        convert(folder, tmp_path / "twice", request("fp8", lightning))


def test_a_config_no_longer_speaks_of_the_sources_quantization(bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bf16_folder, tmp_path / "quantized")
    config = read_config(folder / TRANSFORMER_FILE)
    said = {**config, "quantization_config": {"quant_method": "quanto", "weights": "float8"}}
    (folder / "transformer" / "config.json").write_text(json.dumps(said))
    convert(folder, tmp_path / "made", request("fp8", lightning))
    assert read_config(tmp_path / "made" / TRANSFORMER_FILE) == config


def test_the_table_is_for_the_steps_that_are_asked(bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    convert(bf16_folder, tmp_path / "made", request("bf16", lightning, steps=6))
    editor = Editor.open(tmp_path / "made", device="cpu")
    edit = EditRequest(images=(draw_picture(100, 150),), prompt="make it navy", seed=5)
    assert editor.edit(edit).sigmas == tuple(lightning_sigmas(6))  # without being asked for
    with pytest.raises(ScheduleError, match="modulation table, which holds 1, "):
        editor.edit(dataclasses.replace(edit, steps=4))
    with pytest.raises(ScheduleError, match="modulation table, which holds 1, "):
        editor.edit(dataclasses.replace(edit, schedule="base"))


# a file alone


def test_a_file_alone_becomes_a_file(bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    source = shutil.copy(bf16_folder / TRANSFORMER_FILE, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="2511's kind"):
        convert(source, tmp_path / "made.safetensors", request("fp8", lightning))
    convert(source, tmp_path / "made.safetensors", request("fp8", lightning, zero_cond_t=True))
    convert(bf16_folder, tmp_path / "folder", request("fp8", lightning))
    alone, within = load_file(tmp_path / "made.safetensors"), load_file(tmp_path / "folder" / TRANSFORMER_FILE)
    assert alone.keys() == within.keys()
    assert all(torch.equal(alone[key].view(torch.uint8), within[key].view(torch.uint8)) for key in alone)
    assert sorted(path.name for path in tmp_path.glob("made*")) == ["made.safetensors"]


def test_a_file_that_only_its_name_calls_distilled_must_be_said_to_be(bf16_folder: Path, tmp_path: Path) -> None:
    source = shutil.copy(bf16_folder / TRANSFORMER_FILE, tmp_path / "tiny-lightning-4steps.safetensors")
    asked = request("fp8", zero_cond_t=True)
    with pytest.raises(CheckpointError, match="--distilled 4"):
        convert(source, tmp_path / "made.safetensors", asked)
    convert(source, tmp_path / "made.safetensors", dataclasses.replace(asked, distilled_steps=4))
    with safe_open(tmp_path / "made.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["millicent"])["distilled_steps"] == 4


# refusals


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "base schedule, which depends on the picture's size"),
        ({"steps": 4}, "Add a Lightning LoRA"),
        ({"steps": 4, "keep_modulation": True}, "--keep-modulation and no --steps"),
    ],
)
def test_a_base_model_has_no_table(changes: dict[str, Any], match: str, bf16_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=match):
        convert(bf16_folder, tmp_path / "made", request("fp8", **changes))
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_touched(bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    made, asked = tmp_path / "made", request("fp8", lightning)
    made.mkdir()
    (made / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="there already"):
        convert(bf16_folder, made, asked)
    with pytest.raises(OutputError, match="no model folder"):
        convert(bf16_folder, made, dataclasses.replace(asked, overwrite=True))
    assert all_files(tmp_path) == {"made/notes.txt": b"mine"}


def test_a_model_folder_is_replaced_only_when_it_is_asked(
    whole: tuple[dict[str, bytes], Report], bf16_folder: Path, lightning: Path, tmp_path: Path
) -> None:
    made = shutil.copytree(bf16_folder, tmp_path / "made")
    (made / "vae" / "extra.txt").write_text("old")
    before = all_files(made)
    with pytest.raises(OutputError, match="there already"):
        convert(bf16_folder, made, request("fp8", lightning))
    with pytest.raises(KilledError):
        convert(bf16_folder, made, request("fp8", lightning, overwrite=True), stop_after(3))
    assert all_files(made) == before
    convert(bf16_folder, made, request("fp8", lightning, overwrite=True))
    assert all_files(made) == whole[0]
    assert list(tmp_path.iterdir()) == [made]


@pytest.mark.parametrize("inside", [False, True])
def test_a_source_is_never_its_own_target(inside: bool, bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bf16_folder, tmp_path / "own")
    before = all_files(folder)
    with pytest.raises(OutputError, match="lie in one another"):
        convert(folder, folder / "fp8" if inside else folder, request("fp8", lightning, overwrite=True))
    file = folder / TRANSFORMER_FILE
    with pytest.raises(OutputError, match="one of the inputs"):
        convert(file, file, request("fp8", lightning, overwrite=True, zero_cond_t=True))
    assert all_files(folder) == before


@pytest.mark.parametrize("target", ["made", "made.gguf", "nowhere/made.safetensors"])
def test_a_files_target_must_be_a_safetensors_file(target: str, bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        convert(bf16_folder / TRANSFORMER_FILE, tmp_path / target, request("fp8", lightning, zero_cond_t=True))


def test_a_lora_that_does_not_fit_costs_nothing(bf16_folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong-lightning-4steps.safetensors"
    layer = LORA_LAYERS[0]
    save_file({f"{layer}.lora_down.weight": torch.ones(2, 5), f"{layer}.lora_up.weight": torch.ones(48, 2)}, wrong)
    with pytest.raises(WeightsMismatchError, match="the model has"):
        convert(bf16_folder, tmp_path / "made", request("fp8", wrong))
    with pytest.raises(InputError, match="strength"):
        convert(bf16_folder, tmp_path / "made", ConvertRequest("fp8", ((wrong, float("nan")),)))
    assert list(tmp_path.iterdir()) == [wrong]


def test_a_disk_without_room_is_told_before_anything_is_written(
    bf16_folder: Path, lightning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copy(bf16_folder / TRANSFORMER_FILE, tmp_path / "plain.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match=r"GB more, and 0\.0 GB are free"):
        convert(source, tmp_path / "made.safetensors", request("fp8", lightning, zero_cond_t=True))
    assert list(tmp_path.iterdir()) == [source]
    with pytest.raises(OutputError, match="The other parts of"):
        convert(bf16_folder, tmp_path / "made", request("fp8", lightning))
    assert not (tmp_path / "made").exists()


def test_what_was_converted_without_its_modulation_is_not_converted_again(
    bf16_folder: Path, lightning: Path, tmp_path: Path
) -> None:
    convert(bf16_folder, tmp_path / "made", request("fp8", lightning))
    component, _, _ = open_stored(tmp_path / "made" / TRANSFORMER_FILE)
    with pytest.raises(CheckpointError, match=r"left out norm_out\.linear\.bias, .* Convert the model that it was made of"):
        check_whole(component, "made")
    with pytest.raises(CheckpointError):
        convert(tmp_path / "made", tmp_path / "again", request("bf16"))


def test_a_place_that_cannot_be_written_to(bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        convert(bf16_folder, tmp_path / ("m" * 250), request("fp8", lightning))  # the name of a part of it is too long


def test_a_disk_that_fails_is_told_and_gone_on_with(
    whole: tuple[dict[str, bytes], Report],
    bf16_folder: Path,
    lightning: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) == 20:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match="No space left on device"):
            convert(bf16_folder, tmp_path / "made", request("fp8", lightning))
    report = convert(bf16_folder, tmp_path / "made", request("fp8", lightning))
    assert report.resumed_units > 0
    assert all_files(tmp_path / "made") == whole[0]


def test_a_broken_weight_is_refused_and_named(bf16_folder: Path, lightning: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bf16_folder, tmp_path / "broken")
    cast_transformer(folder, lambda key, tensor: {key: tensor * torch.nan if key == f"{BLOCK}.attn.to_k.weight" else tensor})
    with pytest.raises(CheckpointError, match=rf"{BLOCK}\.attn\.to_k\.weight holds values that are not finite"):
        convert(folder, tmp_path / "made", request("fp8", lightning))
    assert not (tmp_path / "made").exists()
