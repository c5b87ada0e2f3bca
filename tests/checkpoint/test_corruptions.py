"""Every published layout with one thing wrong in it: none of them loads, and the message says where.

What a header can tell is refused from the header, what values tell when they are read, with no base model to compare with;
only what neither shows (swapped nibbles, another order of block scales, a rotation that nobody notes) takes the folder's own
BF16 weights.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import zoo
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from millicent.checkpoint.load import check_codes, load_network
from millicent.checkpoint.recognize import recognize
from millicent.engine.parts import find_part
from millicent.errors import CheckpointError, IncompleteModelError, WeightsMismatchError
from millicent.formats.scaled import ScaledLinear
from millicent.model.config import MMDiTConfig
from millicent.model.mmdit import MMDiT

LAYER = "transformer_blocks.0.img_mlp.net.0.proj"  # quantized in every layout, and not square
MODULATION = "transformer_blocks.0.img_mod.1"
# beside the codes; what only tells of activations may be absent
CODES = ("weight", "qweight", "weight_packed", "_weight_qdata", "weight._data", "bias")
RECORDS = (
    "input_scale",
    "scale_input",
    "output_scale",
    "input_absmax",
    "smooth_factor_orig",
    "_weight_zero_point",
    "weight_format",
)
# a nested magnitude is 0 where a block's own are all the same
MAGNITUDES = ("weight.nested_absmax",)
# numbers that are no scales: tables, sums, halves of a product
TABLES = ("weight.quant_map", "weight.nested_quant_map", "wzeros", "proj_down", "proj_up")

SAFETENSORS = [name for name, layout in zoo.LAYOUTS.items() if layout.files != "gguf"]
GGUF = [name for name, layout in zoo.LAYOUTS.items() if layout.files == "gguf"]
QUANTIZED = [name for name in SAFETENSORS if zoo.LAYOUTS[name].schemes != zoo.WHOLE]
SCALED = [name for name in QUANTIZED if not name.startswith("raw")]
ONE_FILE = [name for name in SAFETENSORS if zoo.LAYOUTS[name].files not in ("shards", "blocks")]

Write = Callable[[str], zoo.Written]
Change = Callable[[zoo.State], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.make_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    return lambda name: zoo.written(name, tmp_path_factory.getbasetemp())


def load(path: Path, keep_codes: bool = True) -> None:
    """Without a base model."""
    recognized = recognize(path)
    component = recognized.components["transformer"]
    with torch.device("meta"):
        mmdit = MMDiT(MMDiTConfig.from_dict({**component.config, "zero_cond_t": True}))
    load_network(mmdit, component, recognized.source, torch.float32, keep_codes)


def damage(written: zoo.Written, to: Path, change: Change) -> Path:
    """A copy with other tensors, everything else as it was; a new tensor goes where the layer is."""
    shutil.rmtree(to, ignore_errors=True)
    beside = written.path if written.path.is_dir() else written.path.parent
    shutil.copytree(beside, to, ignore=shutil.ignore_patterns("*.safetensors"))
    prefix = written.layout.prefix
    files = {path: load_file(path) for path in written.files}
    homes = {key.removeprefix(prefix): path for path, tensors in files.items() for key in tensors}
    home = next(path for key, path in homes.items() if key.startswith(f"{LAYER}."))
    tensors = {key.removeprefix(prefix): tensor for held in files.values() for key, tensor in held.items()}
    change(tensors)
    for path in written.files:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        own = {f"{prefix}{key}": tensor for key, tensor in tensors.items() if homes.get(key, home) == path}
        save_file(own, to / path.name, metadata)
    return to if written.path.is_dir() else to / written.path.name


def parts_of(written: zoo.Written, layer: str = LAYER) -> zoo.Parts:
    begin = f"{layer}."
    return {key.removeprefix(begin): tensor for key, tensor in written.stored.tensors.items() if key.startswith(begin)}


def scales_of(written: zoo.Written, layer: str = LAYER) -> zoo.Parts:
    return {
        suffix: tensor for suffix, tensor in parts_of(written, layer).items() if suffix not in (*CODES, *RECORDS, "comfy_quant")
    }


def refused(load_it: Callable[[], Any], *names: str) -> str:
    """Refused, naming one of the names."""
    with pytest.raises(CheckpointError) as caught:
        load_it()
    assert caught.value.fix
    assert any(name in caught.value.message for name in names), caught.value.message
    return caught.value.message


# what a header tells


def dropped(key: str) -> Change:
    return lambda tensors: None if tensors.pop(key, None) is not None else pytest.fail(f"{key} was not there")


def renamed(key: str, to: str) -> Change:
    return lambda tensors: tensors.update({to: tensors.pop(key)})


@pytest.mark.parametrize("name", SCALED)
def test_a_missing_scale_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    layers = [LAYER, MODULATION] if name.startswith("nunchaku") else [LAYER]
    for layer in layers:
        for suffix in scales_of(written, layer):
            # without the one the layer is a whole one of the other musubi kind: only its size tells. The other is a record
            if suffix == "scale_weight_tensor" or (suffix == "input_global_scale" and name.startswith("compressed")):
                continue
            path = damage(written, tmp_path / "x", dropped(f"{layer}.{suffix}"))
            refused(lambda path=path: recognize(path), layer)


@pytest.mark.parametrize("name", SCALED)
def test_a_renamed_scale_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    for suffix in scales_of(written):
        for to in (f"{LAYER}.{suffix[:-1]}", f"transformer_blocks.0.img_mlp.net.0.{suffix}"):
            path = damage(written, tmp_path / "x", renamed(f"{LAYER}.{suffix}", to))
            refused(lambda path=path: recognize(path), LAYER, to)


SPELLINGS = {
    "comfy old": ("scale_weight", "weight_scale"),
    "musubi [1]": ("scale_weight", "weight_scale"),
    "musubi [N, nb, 1]": ("scale_weight", "weight_scale"),
    "lightx2v fp8": ("weight_scale", "scale_weight"),
    "lightx2v int8": ("weight_scale", "SCB"),
    "compressed-tensors fp8": ("weight_scale", "scale_weight"),
    "fine-grained fp8": ("weight_scale_inv", "weight_scale"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_scale_in_another_maker_s_spelling_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    """The layer alone would be whole; beside the others it is not: SCB is divided by 127, weight_scale is not."""
    old, new = SPELLINGS[name]
    path = damage(write(name), tmp_path / "x", renamed(f"{LAYER}.{old}", f"{LAYER}.{new}"))
    assert "no maker writes both" in refused(lambda: recognize(path), "x")


@pytest.mark.parametrize("name", SAFETENSORS)
def test_an_extra_scale_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    held = parts_of(written)
    for suffix in ("weight_scale", "scale_weight", "weight_global_scale"):
        if suffix not in held:
            extra = {f"{LAYER}.{suffix}": torch.tensor(0.5)}
            path = damage(written, tmp_path / "x", lambda tensors, extra=extra: tensors.update(extra))
            # three scales of which two say the third may stand together: then their numbers contradict each other
            may_stand = name == "lightx2v nvfp4, calibrated" and suffix == "weight_global_scale"
            refused(lambda path=path, ask=load if may_stand else recognize: ask(path), LAYER, written.path.name)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_scale_beside_a_plain_weight_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    """It has been multiplied in already, or it has not: the file does not say."""
    written = write(name)
    suffix = next((key for key in scales_of(written) if "scale" in key), "weight_scale")

    def change(tensors: zoo.State) -> None:
        for part in (*(set(parts_of(written)) - {"bias", suffix}), "weight"):
            tensors.pop(f"{LAYER}.{part}", None)
        tensors |= {f"{LAYER}.weight": torch.ones(1024, 256).bfloat16(), f"{LAYER}.bias": torch.ones(1024).bfloat16()}
        tensors.setdefault(f"{LAYER}.{suffix}", torch.tensor(0.5))

    refused(lambda: recognize(damage(written, tmp_path / "x", change)), LAYER, written.path.name)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_lost_tensor_of_a_block_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    for key in (f"{LAYER}.bias", "transformer_blocks.0.attn.norm_q.weight", *(f"{LAYER}.{code}" for code in CODES[:-1])):
        if key in written.stored.tensors:
            path = damage(written, tmp_path / "x", dropped(key))
            refused(lambda path=path: recognize(path), key.removesuffix(".weight"), LAYER)


@pytest.mark.parametrize("name", [name for name in SCALED if zoo.LAYOUTS[name].maker == "comfy"])
def test_a_note_that_is_lost_or_of_no_layer_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    if "comfy_quant" in parts_of(written):
        path = damage(written, tmp_path / "x", dropped(f"{LAYER}.comfy_quant"))
        refused(lambda: recognize(path), LAYER)
        to = LAYER.replace("net.0", "net.1")
        path = damage(written, tmp_path / "x", renamed(f"{LAYER}.comfy_quant", f"{to}.comfy_quant"))
        refused(lambda: recognize(path), to, LAYER)
        other = zoo.note(format="float8_e4m3fn" if "float8_e4m3fn" not in str(_note(written)) else "nvfp4")
        path = damage(written, tmp_path / "x", lambda tensors: tensors.update({f"{LAYER}.comfy_quant": other}))
        refused(lambda: recognize(path), LAYER)


def _note(written: zoo.Written) -> str:
    return bytes(parts_of(written)["comfy_quant"]).decode()


def test_a_layer_that_only_the_metadata_notes_is_refused(write: Write, tmp_path: Path) -> None:
    written = write("comfy fp8, metadata")
    notes = json.loads(written.stored.metadata["_quantization_metadata"])
    fp8 = notes["layers"].pop(LAYER)
    tensors = load_file(written.path)
    for layers in (notes["layers"], {**notes["layers"], LAYER: fp8, "transformer_blocks.7.attn.to_q": fp8}):
        metadata = {"_quantization_metadata": json.dumps({**notes, "layers": layers})}
        save_file(tensors, tmp_path / "x.safetensors", metadata)
        refused(lambda: recognize(tmp_path / "x.safetensors"), LAYER, "transformer_blocks.7.attn.to_q")


@pytest.mark.parametrize("name", ["lightx2v fp8", "lightx2v int8", "torchao int8", "quanto fp8", "compressed-tensors fp8"])
def test_scales_of_the_columns_are_refused(name: str, write: Write, tmp_path: Path) -> None:
    """As many as there are inputs, where there must be as many as there are rows."""
    written = write(name)
    (suffix,) = scales_of(written)
    for wrong in (torch.ones(1, 256), torch.ones(256), torch.ones(1, 1024), torch.ones(1023, 1)):
        path = damage(written, tmp_path / "x", lambda tensors, wrong=wrong: tensors.update({f"{LAYER}.{suffix}": wrong}))
        refused(lambda path=path: recognize(path), LAYER)


def test_an_old_comfy_marker_without_scales_is_refused(write: Write, tmp_path: Path) -> None:
    written = write("comfy old")

    def change(tensors: zoo.State) -> None:
        for key in [key for key in tensors if key.endswith("scale_weight")]:
            del tensors[key]

    refused(lambda: recognize(damage(written, tmp_path / "x", change)), "scaled_fp8")


# what values tell


def bad_values(suffix: str, tensor: Tensor) -> Iterator[Tensor]:
    """Copies of a scale with one element that no scale is. E4M3: never NaN or below 0. E8M0 has but one, 255."""
    if tensor.dtype == torch.uint8:
        wrong: list[Any] = [] if suffix != "weight_scale" else [255]
    elif tensor.dtype == zoo.E4M3:
        wrong = [float("nan"), -1.0]
    elif suffix in TABLES:
        wrong = [float("nan"), float("inf")]
    else:
        wrong = [float("nan"), float("inf"), -1.0] if suffix in MAGNITUDES else [float("nan"), float("inf"), -1.0, 0.0]
    for value in wrong:
        copy = tensor.clone()
        flat = copy.view(-1)
        # the last, so that a look at the first alone is not enough; of a matrix the middle, which no padding reaches
        flat[flat.numel() // 3] = torch.tensor(value).to(tensor.dtype)
        yield copy


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_that_is_no_scale_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    layers = [LAYER, MODULATION] if name.startswith("nunchaku") else [LAYER]
    for layer in layers:
        records = {suffix: tensor for suffix, tensor in parts_of(written, layer).items() if suffix in RECORDS[:3]}
        for suffix, tensor in (scales_of(written, layer) | records).items():
            if suffix.startswith("weight.quant_state"):
                continue
            for wrong in bad_values(suffix, tensor):
                change = {f"{layer}.{suffix}": wrong}
                path = damage(written, tmp_path / "x", lambda tensors, change=change: tensors.update(change))
                value = float(wrong.float().view(-1)[wrong.numel() // 3])
                try:
                    refused(lambda path=path: load(path), layer)
                except BaseException as error:
                    raise AssertionError(f"{layer}.{suffix} {value}: {error}") from error


@pytest.mark.parametrize("name", ["comfy old", "lightx2v fp8", "modelopt fp8", "torchao fp8", "quanto fp8", "bitsandbytes int8"])
def test_it_is_refused_where_no_codes_are_kept_too(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    for suffix, tensor in scales_of(written).items():
        for wrong in bad_values(suffix, tensor):
            change = {f"{LAYER}.{suffix}": wrong}
            path = damage(written, tmp_path / "x", lambda tensors, change=change: tensors.update(change))
            refused(lambda path=path: load(path, keep_codes=False), LAYER)


@pytest.mark.parametrize("name", [n for n in SAFETENSORS if "fp8" in n or "e4m3" in n or n in ("comfy old", "comfy mxfp8")])
def test_a_code_that_is_no_number_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    codes = next(suffix for suffix, tensor in parts_of(written).items() if tensor.dtype == zoo.E4M3)

    def change(tensors: zoo.State) -> None:
        tensors[f"{LAYER}.{codes}"].view(torch.uint8).view(-1)[1000] = 0xFF

    path = damage(written, tmp_path / "x", change)
    refused(lambda: load(path), LAYER)
    refused(lambda: load_unread(path), LAYER)


def load_unread(path: Path) -> None:
    """As for a card, which looks codes through by itself: who finds one that is no number has its layer named afterwards."""
    recognized = recognize(path)
    component = recognized.components["transformer"]
    with torch.device("meta"):
        mmdit = MMDiT(MMDiTConfig.from_dict({**component.config, "zero_cond_t": True}))
    load_network(mmdit, component, recognized.source, torch.float32, True, checks_codes=False)
    assert any(isinstance(module, ScaledLinear) for module in mmdit.modules())
    check_codes(component, recognized.source)


@pytest.mark.parametrize("name", [name for name in SAFETENSORS if zoo.LAYOUTS[name].schemes == zoo.WHOLE])
def test_a_plain_weight_that_is_not_finite_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    for key in (f"{LAYER}.weight", f"{LAYER}.bias"):
        path = damage(written, tmp_path / "x", lambda tensors, key=key: tensors[key].view(-1)[7:8].fill_(torch.nan))
        refused(lambda path=path: load(path), key)


def test_lost_scales_that_the_first_bytes_do_not_show_are_refused_when_read(tmp_path: Path, folder: Path) -> None:
    """One scale for a matrix: 448 is reached once, and that may be anywhere."""
    state = zoo.read_state(folder / "transformer")
    for key, tensor in state.items():
        if zoo.is_matrix(key, tensor):
            tensor[-1, -1] = 100 * tensor.abs().max()
    tensors = zoo.by_matrix(zoo.comfy_old)(state).tensors
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith("scale_weight")}, tmp_path / "x.safetensors")
    # more than is looked at in a header's place
    assert state[f"{LAYER}.weight"].numel() > (1 << 16)
    refused(lambda: load(tmp_path / "x.safetensors"), "transformer_blocks.")


# files


@pytest.mark.parametrize("name", zoo.LAYOUTS)
def test_a_truncated_file_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    copy = tmp_path / "x"
    shutil.copytree(written.path if written.path.is_dir() else written.path.parent, copy)
    whole = written.files[0].read_bytes()
    path = copy / written.files[0].name
    for size in (len(whole) - 1, len(whole) // 2, 2000, 8, 3):
        path.write_bytes(whole[:size])
        refused(lambda: recognize(copy if written.path.is_dir() else path), path.name)
    if name not in GGUF:
        path.write_bytes(whole + b"\0")
        refused(lambda: recognize(copy if written.path.is_dir() else path), path.name)


def _patched(whole: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


@pytest.mark.parametrize("name", ONE_FILE)
def test_a_wrong_offset_in_the_header_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    whole = written.files[0].read_bytes()
    copy = tmp_path / "x"
    shutil.copytree(written.path if written.path.is_dir() else written.path.parent, copy)
    path = copy / written.files[0].name
    key = f"{written.layout.prefix}{LAYER}.{next(suffix for suffix in CODES if suffix in parts_of(written))}"

    def shift(by: int, ends: tuple[int, ...]) -> Callable[[dict[str, Any]], None]:
        def change(header: dict[str, Any]) -> None:
            for end in ends:
                header[key]["data_offsets"][end] += by

        return change

    def exchange(header: dict[str, Any]) -> None:
        """Two tensors change places: only their sizes differ."""
        other = f"{written.layout.prefix}{LAYER}.bias"
        header[key]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], header[key]["data_offsets"]

    for change in (shift(1, (0, 1)), shift(-16, (0, 1)), shift(1, (1,)), shift(1 << 40, (0, 1)), exchange):
        path.write_bytes(_patched(whole, change))
        refused(lambda: recognize(copy if written.path.is_dir() else path), path.name)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_shard_alone_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    """By its name where it has one, else by what it lacks."""
    written = write(name)
    tensors = {key: tensor for path in written.files for key, tensor in load_file(path).items()}
    half = dict(sorted(tensors.items())[: len(tensors) // 2])
    shard = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file(half, shard, written.stored.metadata)
    with pytest.raises(IncompleteModelError, match="shard 1 of 2, not a whole model"):
        recognize(shard)
    shard = shard.rename(tmp_path / "part.safetensors")
    refused(lambda: recognize(shard), shard.name)


def test_shards_that_are_not_all_there_are_refused(write: Write, tmp_path: Path) -> None:
    written = write("bf16 shards")
    for shard in written.files:
        folder = shutil.copytree(written.path, tmp_path / shard.name)
        (folder / shard.name).unlink()
        with pytest.raises(IncompleteModelError, match=shard.name):
            recognize(folder)
    folder = shutil.copytree(written.path, tmp_path / "no index")
    next(folder.glob("*.index.json")).unlink()
    refused(lambda: recognize(folder), "no index")


def test_a_tensor_that_two_shards_hold_is_refused(write: Write, tmp_path: Path) -> None:
    folder = shutil.copytree(write("bf16 shards").path, tmp_path / "model")
    first, second, _ = sorted(folder.glob("*.safetensors"))
    key, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {key: tensor}, second)
    refused(lambda: recognize(folder), key)


def test_blocks_that_are_not_all_there_are_refused(write: Write, tmp_path: Path) -> None:
    """LightX2V's folders have no index: what lacks is told from the network."""
    written = write("lightx2v fp8 by block")
    for path in written.files:
        folder = shutil.copytree(written.path, tmp_path / path.stem)
        (folder / path.name).unlink()
        told = {"block_0": "blocks [0]", "block_1": "", "non_block": "no non_block.safetensors"}[path.stem]
        if told:
            refused(lambda folder=folder: recognize(folder), told, folder.name)
        else:
            # the last one: a model of one block, whole in itself, but not the folder's
            assert recognize(folder).components["transformer"].config["num_layers"] == 1
        refused(lambda path=path: recognize(path), path.name)
    folder = shutil.copytree(written.path, tmp_path / "twice")
    save_file(load_file(folder / "block_0.safetensors"), folder / "block_00.safetensors")
    refused(lambda: recognize(folder), "transformer_blocks.0.")


# what only a base model tells


def of_layers(written: zoo.Written, suffix: str, change: Callable[[Tensor], Tensor]) -> Change:
    def change_all(tensors: zoo.State) -> None:
        for key, tensor in tensors.items():
            is_plain = suffix == "weight" and tensor.dtype == torch.bfloat16
            if key.endswith(f".{suffix}") and "_blocks." in key and not is_plain:
                tensors[key] = change(tensor)

    return change_all


def swap_nibbles(codes: Tensor) -> Tensor:
    codes = codes.view(torch.uint8)
    return codes << 4 | codes >> 4


def swizzle(scales: Tensor) -> Tensor:
    return zoo.blocked(scales)


def in_rows(scales: Tensor) -> Tensor:
    data = scales.view(torch.uint8)
    tiles = data.view(data.shape[0] // 128, data.shape[1] // 4, 32, 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(data.shape).view(scales.dtype)


def without_rotation(tensor: Tensor) -> Tensor:
    fields = json.loads(bytes(tensor))
    return zoo.note(**{key: value for key, value in fields.items() if not key.startswith("convrot")})


def as_int8(tensor: Tensor) -> Tensor:
    return swap_nibbles(tensor).view(torch.int8)


DISORDERS: dict[str, list[tuple[str, Callable[[Tensor], Tensor]]]] = {
    "comfy nvfp4": [("weight", swap_nibbles), ("weight_scale", in_rows)],
    "comfy mxfp8": [("weight_scale", in_rows)],
    "comfy convrot w4a4": [("weight", as_int8)],
    "comfy int8 convrot": [("comfy_quant", without_rotation)],
    "comfy int8 rows": [("comfy_quant", lambda tensor: zoo.note(format="int8_tensorwise", convrot=True))],
    "lightx2v nvfp4": [("weight", swap_nibbles), ("weight_scale", in_rows)],
    "lightx2v nvfp4, calibrated": [("weight", swap_nibbles), ("weight_scale", in_rows)],
    "modelopt nvfp4": [("weight", swap_nibbles), ("weight_scale", swizzle)],
    "compressed-tensors nvfp4": [("weight_packed", swap_nibbles), ("weight_scale", swizzle)],
    "bitsandbytes nf4": [("weight", swap_nibbles), ("weight.absmax", lambda tensor: tensor.flip(0))],
    "bitsandbytes nf4, nested": [("weight", swap_nibbles), ("weight.absmax", lambda tensor: tensor.flip(0))],
    "bitsandbytes fp4": [("weight", swap_nibbles)],
    "nunchaku int4": [("qweight", lambda tensor: swap_nibbles(tensor).view(torch.int8) if tensor.dtype == torch.int8 else tensor)],
    "lightx2v fp8": [("weight_scale", lambda tensor: tensor.square()), ("weight_scale", lambda tensor: 1 / tensor)],
    "comfy old": [("scale_weight", lambda tensor: 1 / tensor), ("scale_weight", torch.ones_like)],
    "quanto int8": [("weight._scale", lambda tensor: tensor * 1.5)],
    "musubi, two levels": [("scale_weight", lambda tensor: tensor.roll(1, 0))],
    "raw e4m3": [
        ("weight", lambda tensor: tensor.view(torch.uint8).roll(1, -1).view(tensor.dtype) if tensor.ndim == 2 else tensor)
    ],
}


@pytest.mark.parametrize("name", DISORDERS)
def test_another_order_than_the_marks_say_is_refused(name: str, write: Write, folder: Path, tmp_path: Path) -> None:
    """The header is without fault, the numbers are finite: only the base model's own show it."""
    written = write(name)
    for suffix, change in DISORDERS[name]:
        path = damage(written, tmp_path / "x", of_layers(written, suffix, change))
        recognize(path)
        refused(lambda path=path: find_part("transformer", folder / "transformer", path, folder), "no version of the base model's")


def test_a_lost_second_level_is_refused(write: Write, folder: Path, tmp_path: Path) -> None:
    path = damage(write("musubi, two levels"), tmp_path / "x", dropped(f"{LAYER}.scale_weight_tensor"))
    refused(lambda: find_part("transformer", folder / "transformer", path, folder), LAYER)


def test_a_global_scale_under_its_inverse_s_name_is_refused(write: Write, folder: Path, tmp_path: Path) -> None:
    """weight_scale_2 multiplies, weight_global_scale divides, and the rest may look alike."""
    for name, old, new in (
        ("modelopt nvfp4", "weight_scale_2", "weight_global_scale"),
        ("lightx2v nvfp4", "weight_global_scale", "weight_scale_2"),
    ):

        def change(tensors: zoo.State, old: str = old, new: str = new) -> None:
            for key in [key for key in tensors if key.endswith(f".{old}")]:
                tensors[key.replace(old, new)] = tensors.pop(key)
                tensors.pop(key.replace(old, "input_scale"), None)

        path = damage(write(name), tmp_path / "x", change)
        refused(lambda path=path: find_part("transformer", folder / "transformer", path, folder), path.name, "transformer_blocks.")


def test_another_model_s_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    state = zoo.read_state(folder / "transformer")
    other = {key: torch.randn(tensor.shape, generator=generator).bfloat16() / 16 for key, tensor in state.items()}
    save_file(other, tmp_path / "other.safetensors")
    refused(lambda: find_part("transformer", folder / "transformer", tmp_path / "other.safetensors", folder), "other.safetensors")


@pytest.mark.parametrize("name", zoo.LAYOUTS)
def test_a_part_that_is_another_s_is_refused(name: str, write: Write, folder: Path) -> None:
    """A transformer given as the VAE or as the text encoder, in whatever layout."""
    written = write(name)
    for network in ("vae", "text_encoder"):
        refused(lambda network=network: find_part(network, folder / network, written.path, folder), "is a transformer, not a")


FAMILIES = {
    "Qwen-Image-2.1": {"txt_in.text_norm.weight": (256,), "transformer_blocks.0.attn.to_q.weight": (256, 256)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (768, 256), "img_in.weight": (256, 64)},
    "Wan": {"blocks.0.self_attn.q.weight": (256, 256), "blocks.0.ffn.0.weight": (1024, 256)},
    "Lens": {"transformer_blocks.0.img_mlp.w1.weight": (256, 256), "img_in.weight": (256, 64)},
    "Z-Image": {"cap_embedder.0.weight": (256,), "layers.0.attention.qkv.weight": (768, 256)},
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", [None, zoo.comfy_old, zoo.fp8_rows, zoo.lightx2v_int8, zoo.comfy_nvfp4])
def test_another_family_s_file_is_refused_by_its_name(family: str, prefix: str, quantize: Any, tmp_path: Path) -> None:
    tensors: zoo.State = {}
    for key, shape in FAMILIES[family].items():
        weight = torch.randn(shape)
        parts = {"weight": weight.bfloat16()} if quantize is None or weight.ndim < 2 else quantize(weight)[0]
        tensors |= {f"{prefix}{key.removesuffix('weight')}{suffix}": part for suffix, part in parts.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    refused(lambda: recognize(tmp_path / "x.safetensors"), family)


def test_a_look_alike_of_other_widths_is_refused(write: Write, folder: Path, tmp_path: Path) -> None:
    """Mage-Flow: Qwen-Image's names, 128 values out, and its own text width."""
    tensors = load_file(write("bf16").path)
    wide = {"proj_out.weight": torch.zeros(128, 256).bfloat16(), "proj_out.bias": torch.zeros(128).bfloat16()}
    save_file(tensors | wide, tmp_path / "x.safetensors")
    refused(lambda: recognize(tmp_path / "x.safetensors"), "128 values a patch")
    save_file(tensors | {"txt_norm.weight": torch.ones(80).bfloat16()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="txt_in"):
        recognize(tmp_path / "x.safetensors")


def test_a_model_of_fewer_blocks_is_not_the_folder_s(write: Write, folder: Path, tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in load_file(write("bf16").path).items() if not key.startswith("transformer_blocks.1.")}
    save_file(tensors, tmp_path / "x.safetensors")
    found = find_part("transformer", folder / "transformer", tmp_path / "x.safetensors", folder)
    with torch.device("meta"):
        mmdit = MMDiT(MMDiTConfig.from_dict({**found.component.config, "num_layers": 2, "zero_cond_t": True}))
    with pytest.raises(WeightsMismatchError, match=r"missing: transformer_blocks\.1\."):
        load_network(mmdit, found.component, found.source, torch.float32, keep_codes=True)


# GGUF, whose scales lie within the blocks


@pytest.mark.parametrize("name", GGUF)
def test_a_damaged_gguf_is_refused(name: str, write: Write, folder: Path, tmp_path: Path) -> None:
    written = write(name)
    whole, path = written.path.read_bytes(), tmp_path / "x.gguf"
    at = whole.index(f"{LAYER}.weight".encode())
    # after the name: dimensions, their sides, the type, the offset
    type_at = at + len(f"{LAYER}.weight") + 4 + 2 * 8
    offset = int.from_bytes(whole[type_at + 4 : type_at + 12], "little")
    for wrong in (offset + 1 << 40, offset - 32, offset + 32):
        path.write_bytes(whole[: type_at + 4] + wrong.to_bytes(8, "little") + whole[type_at + 12 :])
        refused(lambda: recognize(path), path.name)
    for ggml_type in (10, 16, 39):
        path.write_bytes(whole[:type_at] + ggml_type.to_bytes(4, "little") + whole[type_at + 4 :])
        refused(lambda: recognize(path), path.name, LAYER)
    path.write_bytes(whole.replace(f"{LAYER}.bias".encode(), f"{LAYER}.bais".encode()))
    refused(lambda: recognize(path), f"{LAYER}.bias")


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_scale_that_is_not_finite_is_refused(name: str, write: Write, tmp_path: Path) -> None:
    written = write(name)
    data, ggml_type = written.stored.tensors[f"{LAYER}.weight"]
    d_at = 208 if ggml_type == gguf.GGMLQuantizationType.Q6_K else 0
    for number in (0x7C00, 0x7E00):
        tensors = dict(written.stored.tensors)
        wrong = data.copy()
        wrong[5, d_at : d_at + 2] = np.array([number], np.uint16).view(np.uint8)
        tensors[f"{LAYER}.weight"] = (wrong, ggml_type)
        zoo.write_gguf(zoo.StoredGguf(tensors, {}), tmp_path / "x.gguf")
        refused(lambda: load(tmp_path / "x.gguf"), LAYER)


def test_a_gguf_with_another_tensor_more_or_less_is_refused(write: Write, tmp_path: Path) -> None:
    tensors = write("gguf Q8_0").stored.tensors
    extra = {f"{LAYER}.weight_scale": (np.ones(1, np.float32), gguf.GGMLQuantizationType.F32)}
    fewer = {key: tensor for key, tensor in tensors.items() if key != f"{LAYER}.weight"}
    for changed in ({**tensors, **extra}, fewer):
        zoo.write_gguf(zoo.StoredGguf(changed, {}), tmp_path / "x.gguf")
        refused(lambda: recognize(tmp_path / "x.gguf"), LAYER)


def test_the_order_of_gguf_s_nibbles_is_told_by_the_base(write: Write, folder: Path, tmp_path: Path) -> None:
    tensors = dict(write("gguf Q4_0").stored.tensors)
    for key, (data, ggml_type) in tensors.items():
        if ggml_type == gguf.GGMLQuantizationType.Q4_0:
            blocks = data.reshape(-1, 18).copy()
            blocks[:, 2:] = blocks[:, 2:] << 4 | blocks[:, 2:] >> 4
            tensors[key] = (blocks.reshape(data.shape), ggml_type)
    zoo.write_gguf(zoo.StoredGguf(tensors, {}), tmp_path / "x.gguf")
    refused(lambda: find_part("transformer", folder / "transformer", tmp_path / "x.gguf", folder), "no version of the base model's")
