"""What a checkpoint is, from its headers: parts, variants, distillation, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor

from millicent.checkpoint.recognize import Distilled, recognize
from millicent.errors import CheckpointError, WeightsMismatchError

PREFIX = zoo.COMFY_PREFIX
TEXT_PREFIX = "text_encoders.qwen25_7b.transformer."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.make_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def plain(folder: Path) -> zoo.State:
    """The transformer in BF16, by its own names."""
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def vae(folder: Path) -> zoo.State:
    return load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")


def put(tmp_path: Path, tensors: zoo.State, name: str = "x", **metadata: str) -> Path:
    path = tmp_path / f"{name}.safetensors"
    save_file(tensors, path, metadata)
    return path


def quantized(folder: Path, quantize: Any) -> zoo.State:
    return zoo.by_matrix(quantize)(zoo.read_state(folder / "transformer")).tensors


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model.", "net.", "transformer."])
def test_one_prefix_is_stripped(prefix: str, plain: zoo.State, tmp_path: Path) -> None:
    found = recognize(put(tmp_path, {f"{prefix}{key}": tensor for key, tensor in plain.items()}))
    assert found.part == "transformer"
    component = found.components["transformer"]
    assert component.prefix == prefix
    assert component.tensors.keys() == plain.keys()
    assert component.config["num_layers"] == 2
    assert (component.config["attention_head_dim"], component.config["num_attention_heads"]) == (64, 4)


def test_a_tensor_without_the_prefix_is_refused(plain: zoo.State, tmp_path: Path) -> None:
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in plain.items() if key != "img_in.bias"}
    with pytest.raises(CheckpointError, match=r"without the prefix .* such as img_in\.bias"):
        recognize(put(tmp_path, {**tensors, "img_in.bias": plain["img_in.bias"]}))


def test_an_all_in_one_checkpoint_is_split(folder: Path, tmp_path: Path) -> None:
    found = recognize(put(tmp_path, zoo.all_in_one(folder)))
    assert found.part == "all-in-one"
    assert {network: part.prefix for network, part in found.components.items()} == {
        "transformer": PREFIX, "text_encoder": TEXT_PREFIX, "vae": "vae.",
    }  # fmt: skip
    transformer, encoder, vae = (found.components[network] for network in ("transformer", "text_encoder", "vae"))
    assert transformer.layout is not None
    assert encoder.layout is not None
    assert transformer.layout.schemes == {"comfy scaled fp8": 28, "plain": 6}
    assert encoder.layout.schemes == {"comfy scaled fp8": 26, "plain": 1}
    assert vae.layout is None
    assert sum(len(part.tensors) for part in found.components.values()) == len(found.header.tensors)


def test_an_all_in_one_checkpoint_in_comfy_s_newer_layout(folder: Path, tmp_path: Path) -> None:
    """Notes in either form belong to the part whose prefix they bear."""
    noted = zoo.noted(zoo.comfy_nvfp4, format="nvfp4")
    found = recognize(put(tmp_path, zoo.all_in_one(folder, noted)))
    assert {network: part.layout.schemes["nvfp4, comfy"] for network, part in found.components.items() if part.layout} == {
        "transformer": 28, "text_encoder": 26,
    }  # fmt: skip


def test_a_fourth_part_is_refused(folder: Path, tmp_path: Path) -> None:
    extra = {"control_net.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"holds control_net\.weight, which is of none of its parts"):
        recognize(put(tmp_path, zoo.all_in_one(folder) | extra))


def test_an_all_in_one_checkpoint_lacks_nothing_in_any_part(folder: Path, tmp_path: Path) -> None:
    whole = zoo.all_in_one(folder)
    for key in (
        f"{PREFIX}transformer_blocks.0.attn.to_q.scale_weight",
        f"{TEXT_PREFIX}model.layers.0.self_attn.q_proj.scale_weight",
        f"{PREFIX}img_in.bias",
        f"{TEXT_PREFIX}visual.merger.ln_q.weight",
    ):
        with pytest.raises(CheckpointError):
            recognize(put(tmp_path, {name: tensor for name, tensor in whole.items() if name != key}))


MARKER = {"__index_timestep_zero__": torch.empty(0)}


def in_folder(tmp_path: Path, tensors: zoo.State, config: dict[str, Any]) -> Path:
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_2511_is_told_by_its_mark_or_by_a_config(plain: zoo.State, tmp_path: Path) -> None:
    def of(path: Path) -> bool | None:
        return recognize(path).components["transformer"].zero_cond_t

    assert of(put(tmp_path, plain)) is None
    assert of(put(tmp_path, plain | MARKER)) is True
    assert of(put(tmp_path, {f"{PREFIX}{key}": tensor for key, tensor in (plain | MARKER).items()})) is True
    assert of(put(tmp_path, plain, config=json.dumps({"zero_cond_t": True}))) is True
    assert of(put(tmp_path, plain, config=json.dumps({"zero_cond_t": False}))) is False
    assert of(put(tmp_path, plain, config="no JSON")) is None
    (tmp_path / "x.safetensors").unlink()
    assert of(in_folder(tmp_path, plain, {"zero_cond_t": False})) is False
    assert of(in_folder(tmp_path, plain | MARKER, {"zero_cond_t": True})) is True


def test_a_mark_and_a_config_that_contradict_each_other_are_refused(plain: zoo.State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="marked as Qwen-Image-Edit-2511"):
        recognize(in_folder(tmp_path, plain | MARKER, {"zero_cond_t": False}))
    with pytest.raises(CheckpointError, match="marked as Qwen-Image-Edit-2511"):
        recognize(put(tmp_path, plain | MARKER, config=json.dumps({"zero_cond_t": False})))


def test_layered_is_refused_by_name(plain: zoo.State, tmp_path: Path) -> None:
    layered = {"time_text_embed.addition_t_embedding.weight": torch.zeros(2, 256)}
    with pytest.raises(CheckpointError, match="Qwen-Image-Layered"):
        recognize(put(tmp_path, plain | layered))


@pytest.mark.parametrize("spell", [str, zoo.to_wan_key])
def test_a_vae_in_either_spelling(spell: Any, vae: zoo.State, tmp_path: Path) -> None:
    found = recognize(put(tmp_path, {spell(key): tensor for key, tensor in vae.items()}))
    assert found.part == "vae"
    assert set(found.components) == {"vae"}


@pytest.mark.parametrize("spell", [str, zoo.to_wan_key])
def test_a_vae_of_other_channels_is_refused(spell: Any, vae: zoo.State, tmp_path: Path) -> None:
    """48 are Wan 2.2's, 64 are Qwen-Image-2.1's."""
    for channels in (48, 64):
        first = {"decoder.conv_in.weight": torch.zeros(32, channels, 3, 3, 3)}
        with pytest.raises(CheckpointError, match=f"{channels} latent channels; Qwen-Image's has 16"):
            recognize(put(tmp_path, {spell(key): tensor for key, tensor in (vae | first).items()}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_a_quantized_vae_is_refused(dtype: torch.dtype, vae: zoo.State, tmp_path: Path) -> None:
    key = "decoder.mid_block.resnets.0.conv1.weight"
    with pytest.raises(CheckpointError, match="a quantized VAE ruins pictures"):
        recognize(put(tmp_path, vae | {key: vae[key].to(dtype)}))


def test_a_text_encoder_without_its_vision_tower_is_refused(folder: Path, tmp_path: Path) -> None:
    """Whatever it is quantized to: it cannot see the picture that it is asked about."""
    state = {key: tensor for key, tensor in zoo.read_text_encoder(folder).items() if not key.startswith("visual.")}
    for store in (zoo.cast(torch.bfloat16), zoo.by_matrix(zoo.comfy_old, zoo.is_text_linear)):
        with pytest.raises(CheckpointError, match="text encoder without its vision tower"):
            recognize(put(tmp_path, zoo.by_hub_names(store)(state).tensors))


@pytest.mark.parametrize("name", zoo.TEXT_ENCODERS)
def test_a_text_encoder_lacks_nothing(name: str, folder: Path, tmp_path: Path) -> None:
    layout = zoo.TEXT_ENCODERS[name]
    tensors = layout.store(zoo.read_text_encoder(folder)).tensors
    ends = ("layers.1.mlp.down_proj.", "layers.0.self_attn.k_proj.", "visual.blocks.1.mlp.up_proj.", "norm.weight", "embed_tokens.")
    for end in ends:
        for key in [key for key in tensors if end in key and not key.endswith(("comfy_quant", "weight_format"))][:3]:
            with pytest.raises(CheckpointError):
                recognize(put(tmp_path, {name: tensor.contiguous() for name, tensor in tensors.items() if name != key}))


@pytest.mark.parametrize("form", ["transformer.{}.lora_A.weight", "{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"])
def test_a_lora_is_one_and_holds_no_network(form: str, tmp_path: Path) -> None:
    layers = [f"transformer_blocks.{i}.attn.to_{name}" for i in range(2) for name in "qkv"]
    found = recognize(put(tmp_path, {form.format(layer): torch.zeros(4, 4) for layer in layers}))
    assert (found.part, dict(found.components)) == ("lora", {})


NAMES: dict[str, tuple[int | None, str] | None] = {
    "qwen_image_edit_2511_fp8_e4m3fn_scaled_lightning_4steps_v1.0": (4, "lightning"),
    "qwen_image_edit_2511_fp8_e4m3fn_scaled_lightning_comfyui_4steps_v1.0": (4, "lightning"),
    "qwen_image_2512_fp8_e4m3fn_scaled_8steps_v1.0": (8, "8steps"),
    "svdq-int4_r128-qwen-image-edit-2509-lightningv2.0-4steps": (4, "lightning"),
    "Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16": (8, "Lightning"),
    "Qwen-Rapid-AIO-NSFW-v5": (None, "Rapid"),
    "qwen_image_2.1_turbo_int8": (None, "turbo"),
    "qwen-image-edit-distill-full": (None, "distill"),
    "edit 4 steps": (4, "4 steps"),
    "qwen_image_edit_2511_fp8mixed": None,
    "qwen_image_edit_2509_fp8_e4m3fn": None,
    "checkpoint-14steps": None,
    "trained-40steps": None,
    "sketch4stepsister": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_distillation_is_told_by_the_name(name: str, plain: zoo.State, tmp_path: Path) -> None:
    wanted = NAMES[name]
    found = recognize(put(tmp_path, plain, name)).distilled
    assert found == (None if wanted is None else Distilled(wanted[0], f"its name says {wanted[1]!r}"))


def test_the_folders_above_say_nothing_of_distillation(plain: zoo.State, tmp_path: Path) -> None:
    (tmp_path / "lightning-4steps").mkdir()
    assert recognize(put(tmp_path / "lightning-4steps", plain)).distilled is None


def test_our_own_metadata_is_certain(plain: zoo.State, tmp_path: Path) -> None:
    said = {"millicent": json.dumps({"distilled_steps": 4, "zero_cond_t": True})}
    found = recognize(put(tmp_path, plain, **said))
    assert found.distilled == Distilled(4, "its metadata says so", is_certain=True)
    assert found.components["transformer"].zero_cond_t is True
    said = {"millicent": json.dumps({"distilled_steps": None})}
    assert recognize(put(tmp_path, plain, "x-lightning-4steps", **said)).distilled is None


def without(tensors: zoo.State, *endings: str) -> zoo.State:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(endings)}


@pytest.mark.parametrize(
    ("quantize", "suffix"),
    [(zoo.comfy_old, "scale_weight"), (zoo.fp8_rows, "weight_scale"), (zoo.musubi_rows, "scale_weight"), (zoo.row_blocks, "s")],
)
def test_scaled_fp8_whose_scales_are_lost_is_refused_by_its_size(quantize: Any, suffix: str, folder: Path, tmp_path: Path) -> None:
    """The header is that of a raw cast; nothing but the size of the numbers shows it."""
    lost = without(quantized(folder, quantize if suffix != "s" else lambda w: zoo.row_blocks(w, "s")), f".{suffix}")
    with pytest.raises(
        CheckpointError, match="FP8 without a scale, but reaches 200 and more: it was scaled, and the scales are lost"
    ):
        recognize(put(tmp_path, lost))


def test_scaled_e5m2_whose_scales_are_lost_is_refused_by_its_size(folder: Path, tmp_path: Path) -> None:
    def quantize(weight: Tensor) -> tuple[zoo.Parts, Tensor]:
        return zoo.comfy_fp8(weight, zoo.E5M2)

    with pytest.raises(CheckpointError, match="the scales are lost"):
        recognize(put(tmp_path, without(quantized(folder, quantize), ".weight_scale")))


def test_nvfp4_without_a_mark_is_refused(folder: Path, tmp_path: Path) -> None:
    for quantize in (zoo.comfy_nvfp4, zoo.modelopt_nvfp4):
        tensors = without(quantized(folder, quantize), ".input_scale")
        with pytest.raises(
            CheckpointError, match="can be read as nvfp4, comfy or nvfp4, modelopt, and nothing in the file says which"
        ):
            recognize(put(tmp_path, tensors))


def test_who_decides_is_asked_with_both_readings(folder: Path, tmp_path: Path) -> None:
    path, asked = put(tmp_path, without(quantized(folder, zoo.modelopt_nvfp4), ".input_scale")), []

    def decide(layer: str, parts: Any, readings: Any) -> Any:
        asked.append(layer)
        assert {scheme.name for scheme in readings} == {"nvfp4, comfy", "nvfp4, modelopt"}
        assert set(parts) == {"weight", "weight_scale", "weight_scale_2"}
        return readings[1]

    layout = recognize(path, decide=decide).components["transformer"].layout
    assert layout is not None
    assert layout.schemes[layout.matrices[asked[0]].scheme.name] == len(asked) == 28
    with pytest.raises(CheckpointError, match="nothing in the file says which"):
        recognize(path, decide=lambda *_: None)


def test_a_rotation_that_only_the_name_speaks_of_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = quantized(folder, zoo.comfy_int8_convrot)
    with pytest.raises(CheckpointError, match="rotation unknown"):
        recognize(put(tmp_path, tensors, "qwen_image_edit_2511_int8_convrot"))
    with pytest.raises(CheckpointError, match="rotation unknown"):
        recognize(put(tmp_path, quantized(folder, zoo.comfy_w4a4)))


@pytest.mark.parametrize(("dtype", "told"), [(zoo.E4M3, "what is below 0.001 is lost"), (zoo.E5M2, "two bits of mantissa")])
def test_a_raw_cast_is_warned_of(dtype: torch.dtype, told: str, plain: zoo.State, tmp_path: Path) -> None:
    (warning,) = recognize(put(tmp_path, {key: tensor.to(dtype) for key, tensor in plain.items()})).warnings
    assert told in warning
    assert recognize(put(tmp_path, plain)).warnings == ()


def test_a_transformer_lacks_nothing_and_holds_nothing_else(plain: zoo.State, tmp_path: Path) -> None:
    for key in ("txt_in.weight", "norm_out.linear.bias", "transformer_blocks.1.attn.norm_added_k.weight"):
        with pytest.raises(WeightsMismatchError, match=f"missing: {key}"):
            recognize(put(tmp_path, {name: tensor for name, tensor in plain.items() if name != key}))
    for key in ("extra.weight", "transformer_blocks.0.attn.to_qkv.weight", "vae.conv1.weight", "scale_shift"):
        with pytest.raises(CheckpointError, match=key):
            recognize(put(tmp_path, plain | {key: torch.zeros(2, 2)}))


def test_a_missing_block_is_told_by_its_number(plain: zoo.State, tmp_path: Path) -> None:
    third = {key.replace("blocks.1", "blocks.2"): tensor for key, tensor in plain.items()}
    with pytest.raises(CheckpointError, match=r"has a block 2, but no block 1"):
        recognize(put(tmp_path, third))
