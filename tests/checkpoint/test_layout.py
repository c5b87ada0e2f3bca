"""Whole files by their headers: closure, pairing, and makers' marks, over the published transformer's shape."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from millicent.checkpoint.architecture import transformer_tensors
from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.layout import COMFY_FORMATS, Layout, lay_out
from millicent.checkpoint.marks import Marks
from millicent.checkpoint.schemes import BY_NAME, Scheme
from millicent.errors import CheckpointError, WeightsMismatchError

CONFIG = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584,
}  # fmt: skip
EXPECTED = transformer_tensors(CONFIG)
Tensors = dict[str, TensorInfo]


def info(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(dtype, shape, 0, 0)


def file(store: Callable[[str, int, int], Tensors], blocks_only: bool = True) -> Tensors:
    """Vectors in BF16, matrices as `store` has them; outside the blocks in BF16 where `blocks_only`."""
    tensors: Tensors = {}
    for key, shape in EXPECTED.items():
        if len(shape) == 2 and (key.startswith("transformer_blocks.") or not blocks_only):
            tensors |= {f"{key.removesuffix('weight')}{suffix}": i for suffix, i in store(key, *shape).items()}
        else:
            tensors[key] = info("BF16", *shape)
    return tensors


def plain(key: str, n: int, k: int) -> Tensors:
    return {"weight": info("BF16", n, k)}


def raw(key: str, n: int, k: int) -> Tensors:
    return {"weight": info("F8_E4M3", n, k)}


def comfy_old(key: str, n: int, k: int) -> Tensors:
    return {"weight": info("F8_E4M3", n, k), "scale_weight": info("F32")}


def rows(key: str, n: int, k: int) -> Tensors:
    return {"weight": info("F8_E4M3", n, k), "weight_scale": info("F32", n, 1)}


def nvfp4(key: str, n: int, k: int) -> Tensors:
    return {"weight": info("U8", n, k // 2), "weight_scale": info("F8_E4M3", n, k // 16), "weight_scale_2": info("F32")}


def read(tensors: Tensors, maker: str | None = None, name: str = "the file", **options: Any) -> Layout:
    return lay_out(tensors, EXPECTED, Marks(maker, options.pop("notes", {})), name, **options)


@pytest.mark.parametrize(
    ("store", "blocks_only", "schemes"),
    [
        (plain, False, {"plain": 34}),
        (raw, False, {"raw fp8": 34}),
        (comfy_old, True, {"comfy scaled fp8": 28, "plain": 6}),
        (comfy_old, False, {"comfy scaled fp8": 34}),
        (rows, True, {"fp8 per row": 28, "plain": 6}),
    ],
)
def test_a_file_of_one_scheme(store: Any, blocks_only: bool, schemes: dict[str, int]) -> None:
    marker = {"scaled_fp8": info("F8_E4M3", 0)} if store is comfy_old else {}
    layout = read(file(store, blocks_only) | marker | {"__index_timestep_zero__": info("F32", 0)})
    assert layout.schemes == schemes
    assert {key for matrix in layout.matrices.values() for key in matrix.parameters} | set(layout.vectors) == set(EXPECTED)
    assert all(matrix.parameters == (f"{layer}.weight",) for layer, matrix in layout.matrices.items())
    assert set(layout.leftovers) == {*marker, "__index_timestep_zero__"}
    assert len(layout.high_precision) == (6 if blocks_only else 0)


def test_nvfp4_is_read_as_its_maker_says_and_refused_without_one() -> None:
    assert read(file(nvfp4), "comfy").schemes["nvfp4, comfy"] == 28
    assert read(file(nvfp4), "modelopt").schemes["nvfp4, modelopt"] == 28
    with pytest.raises(CheckpointError, match="can be read as nvfp4, comfy or nvfp4, modelopt, and nothing in the file says which"):
        read(file(nvfp4))


def test_one_missing_or_foreign_tensor_anywhere_is_refused() -> None:
    whole = file(rows)
    rng = random.Random(0)
    for key in rng.sample(sorted(whole), 40):
        with pytest.raises(CheckpointError) as caught:
            read({k: v for k, v in whole.items() if k != key})
        assert key.rsplit(".", 1)[0] in caught.value.message, key
        with pytest.raises(CheckpointError):
            read(whole | {f"{key}_extra": info("F32")})


def test_a_second_network_in_the_file_is_refused() -> None:
    with pytest.raises(WeightsMismatchError, match=r"not the network's: vae\.conv1\.weight"):
        read(file(plain, False) | {"vae.conv1.weight": info("BF16", 3, 3)})
    with pytest.raises(WeightsMismatchError, match=r"missing: transformer_blocks\.1"):
        read({k: v for k, v in file(rows).items() if not k.startswith("transformer_blocks.1.")})


def test_one_lost_scale_is_no_raw_cast() -> None:
    tensors = file(comfy_old)
    del tensors["transformer_blocks.1.attn.to_q.scale_weight"]
    with pytest.raises(
        CheckpointError, match=r"1 FP8 ones have none, such as transformer_blocks\.1\.attn\.to_q: their scales are lost"
    ):
        read(tensors)


def test_a_renamed_scale_is_told_with_what_it_should_be() -> None:
    tensors = file(rows)
    tensors["transformer_blocks.0.attn.to_q.weight_scales"] = tensors.pop("transformer_blocks.0.attn.to_q.weight_scale")
    with pytest.raises(CheckpointError, match=r"attn\.to_q is stored as .*weight_scales"):
        read(tensors)


def test_scales_beside_a_plain_weight_are_refused() -> None:
    tensors = file(rows)
    tensors["transformer_blocks.0.attn.to_q.weight"] = info("BF16", 3072, 3072)
    with pytest.raises(CheckpointError, match=r"fp8 per row: weight is BF16"):
        read(tensors)


def test_vectors_of_another_shape_or_of_integers_are_refused() -> None:
    with pytest.raises(WeightsMismatchError, match=r"txt_norm\.weight is \[2560\]; the network has \[3584\]"):
        read(file(plain) | {"txt_norm.weight": info("BF16", 2560)})
    with pytest.raises(CheckpointError, match="norms and biases are plain"):
        read(file(plain) | {"img_in.bias": info("I8", 3072)})


@pytest.mark.parametrize("store", [plain, raw])
def test_the_old_marker_without_a_scale_is_refused(store: Any) -> None:
    with pytest.raises(CheckpointError, match=r"marked as scaled FP8 .* no matrix of it has a scale"):
        read(file(store, False) | {"scaled_fp8": info("F8_E4M3", 0)}, "comfy")


def test_who_can_look_at_values_is_asked_where_no_mark_decides() -> None:
    asked: list[tuple[str, set[str], list[str]]] = []

    def decide(layer: str, parts: Mapping[str, TensorInfo], readings: tuple[Scheme, ...]) -> Scheme | None:
        asked.append((layer, set(parts), [scheme.name for scheme in readings]))
        return BY_NAME["nvfp4, modelopt"]

    assert read(file(nvfp4), decide=decide).schemes["nvfp4, modelopt"] == 28
    assert len(asked) == 28
    assert asked[0][1:] == ({"weight", "weight_scale", "weight_scale_2"}, ["nvfp4, comfy", "nvfp4, modelopt"])
    assert read(file(nvfp4), "comfy", decide=decide).schemes["nvfp4, comfy"] == 28, "a mark is not overruled"
    with pytest.raises(CheckpointError, match="nothing in the file says which"):
        read(file(nvfp4), decide=lambda layer, parts, readings: None)


def test_answers_that_no_maker_could_have_written_together_are_refused() -> None:
    answers = iter(["nvfp4, modelopt", "nvfp4, comfy"] * 14)
    with pytest.raises(CheckpointError, match="stored as nvfp4, comfy and as nvfp4, modelopt: no maker writes both"):
        read(file(nvfp4), decide=lambda layer, parts, readings: BY_NAME[next(answers)])


def test_a_maker_that_the_shapes_belie_is_refused() -> None:
    def unswizzled(key: str, n: int, k: int) -> Tensors:
        return {"weight": info("U8", n, k // 2), "weight_scale": info("F8_E4M3", n, k // 16), "weight_scale_2": info("F32")}

    # proj_out has 64 rows, which a swizzled grid pads to 128: the only matrix whose shapes tell
    tensors = file(plain, False) | {f"proj_out.{suffix}": i for suffix, i in unswizzled("", 64, 3072).items()}
    assert read(tensors, "modelopt").schemes["nvfp4, modelopt"] == 1
    with pytest.raises(CheckpointError, match=r"says that comfy made it, but proj_out is stored as modelopt does"):
        read(tensors, "comfy")


LAYER = "transformer_blocks.0.attn.to_q"
SHAPE = (3072, 3072)
F8, F8_5, I8 = info("F8_E4M3", *SHAPE), info("F8_E5M2", *SHAPE), info("I8", *SHAPE)
VALUE, ROW, ROWS, GRID, BLOCKS = (info("F32", *shape) for shape in ((), (3072,), (3072, 1), (24, 24), (3072, 24, 1)))
MXFP8 = {"weight": F8, "weight_scale": info("U8", 3072, 96)}
NVFP4 = nvfp4("", *SHAPE)
# format -> the layer's tensors as its maker writes them, and the scheme
NOTED: dict[str, tuple[Tensors, str]] = {
    "float8_e4m3fn": ({"weight": F8, "weight_scale": VALUE, "input_scale": VALUE}, "fp8 per tensor"),
    "float8_e5m2": ({"weight": F8_5, "weight_scale": ROW}, "fp8 per row"),
    "mxfp8": (MXFP8, "mxfp8, swizzled"),
    "nvfp4": (NVFP4, "nvfp4, comfy"),
    "int8_tensorwise": ({"weight": I8, "weight_scale": ROWS}, "int8 per row"),
    "convrot_w4a4": ({"weight": info("I8", 3072, 1536), "weight_scale": ROW}, "int4 convrot"),
    "float8_e4m3fn_rowwise": ({"weight": F8, "weight_scale": ROW}, "fp8 per row"),
    "float8_e4m3fn_blockwise": ({"weight": F8, "weight_scale": GRID}, "fp8 blocks"),
    "float8_e4m3fn_block3d": ({"weight": F8, "weight_scale": BLOCKS}, "fp8 blocks"),
    "int8_blockwise": ({"weight": I8, "weight_scale": GRID}, "int8 blocks"),
    "int8_lodewise": ({"weight": I8, "weight_scale": info("F32", 3072, 24)}, "int8 blocks"),
}


def with_layer(parts: Tensors, layer: str = LAYER) -> Tensors:
    tensors = file(plain, False)
    del tensors[f"{layer}.weight"]
    return tensors | {f"{layer}.{suffix}": part for suffix, part in parts.items()}


def test_every_format_is_tried_here() -> None:
    assert set(NOTED) == set(COMFY_FORMATS)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("number_format", NOTED)
def test_a_noted_layer_is_stored_as_its_note_says(number_format: str, as_tensor: bool) -> None:
    parts, scheme = NOTED[number_format]
    parts = parts | {"comfy_quant": info("U8", 40)} if as_tensor else parts
    note = {"format": number_format, "full_precision_matrix_mult": True}
    matrix = read(with_layer(parts), "comfy", notes={LAYER: note}).matrices[LAYER]
    assert (matrix.scheme.name, matrix.note, matrix.shape) == (scheme, note, SHAPE)


def test_a_note_does_not_fit_another_formats_tensors() -> None:
    """Every format's tensors under every other format's note: only what both promise passes."""
    shared = {("float8_e4m3fn_rowwise", "float8_e4m3fn")}
    for number_format, (parts, _) in NOTED.items():
        for other in NOTED:
            if other != number_format and (number_format, other) not in shared:
                with pytest.raises(CheckpointError, match=f"{LAYER} is noted as {other}, but stored as weight"):
                    read(with_layer(parts), "comfy", notes={LAYER: {"format": other}})


@pytest.mark.parametrize("number_format", ["asym_w4a8_int8", "awq_w4a16", "svdquant_w4a4", "hybrid_mxfp8", "anything"])
def test_a_note_of_an_unknown_format_is_refused_by_its_name(number_format: str) -> None:
    parts = {"weight": info("I8", 3072, 1536), "weight_s_rel": info("F32", 3072, 192), "weight_s_channel": ROW}
    with pytest.raises(CheckpointError, match=f"noted as {number_format}, which this version does not read"):
        read(with_layer(parts), "comfy", notes={LAYER: {"format": number_format}})


@pytest.mark.parametrize("parts", [{"weight": info("BF16", *SHAPE)}, {"weight": F8}, {"weight": I8}], ids=["plain", "raw", "int8"])
def test_a_noted_layer_that_has_no_scale_is_refused(parts: Tensors) -> None:
    with pytest.raises(CheckpointError, match="is noted as float8_e4m3fn, but stored as weight"):
        read(with_layer(parts), "comfy", notes={LAYER: {"format": "float8_e4m3fn"}})


def test_a_note_for_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"a note for transformer_blocks\.9\.attn\.to_q, which is no layer"):
        read(file(plain), "comfy", notes={"transformer_blocks.9.attn.to_q": {"format": "nvfp4"}})
    kept = read(file(plain) | {"lm_head.weight": F8}, "comfy", notes={"lm_head": {"format": "float8_e4m3fn"}})
    assert kept.schemes == {"plain": 34}, "what is not used may be noted"


@pytest.mark.parametrize(
    "parts",
    [{"weight": F8, "weight_scale": VALUE}, {"weight": F8}, {"weight": F8, "scale_weight": VALUE}],
    ids=["new", "raw", "old"],
)
def test_a_quantized_layer_without_a_note_is_refused_where_others_have_one(parts: Tensors) -> None:
    noted = f"{LAYER[:-1]}k"
    tensors = with_layer(parts)
    tensors |= {f"{noted}.{suffix}": part for suffix, part in NOTED["nvfp4"][0].items()}
    with pytest.raises(CheckpointError, match=r"has no note|scales are lost"):
        read(tensors, "comfy", notes={noted: {"format": "nvfp4"}})
    old = tensors | {"scaled_fp8": info("F8_E4M3", 0)}
    if "scale_weight" in parts:
        assert read(old, "comfy", notes={noted: {"format": "nvfp4"}}).schemes["comfy scaled fp8"] == 1
    else:
        with pytest.raises(CheckpointError, match=r"has no note|scales are lost"):
            read(old, "comfy", notes={noted: {"format": "nvfp4"}})


@pytest.mark.parametrize(
    ("number_format", "fields", "told"),
    [
        ("int8_tensorwise", {"convrot": "yes"}, "noted with convrot 'yes'"),
        ("int8_tensorwise", {"convrot": True, "convrot_groupsize": "256"}, "in groups of '256'"),
        ("int8_tensorwise", {"convrot": True, "convrot_groupsize": 128}, "in groups of 128"),
        ("int8_tensorwise", {"convrot": True, "convrot_groupsize": 1}, "in groups of 1"),
        ("nvfp4", {"convrot": True}, "noted as a rotated nvfp4"),
        ("mxfp8", {"convrot": True}, "noted as a rotated mxfp8"),
        ("convrot_w4a4", {"convrot": False}, "as not rotated"),
        ("int8_blockwise", {"group_size": 64}, "noted in blocks of 64"),
        ("float8_e4m3fn_block3d", {"group_size": "128"}, "noted in blocks of '128'"),
    ],
)
def test_a_note_whose_fields_contradict_the_tensors_is_refused(number_format: str, fields: dict[str, Any], told: str) -> None:
    parts, _ = NOTED[number_format]
    with pytest.raises(CheckpointError, match=told):
        read(with_layer(parts), "comfy", notes={LAYER: {"format": number_format, **fields}})


def test_notes_may_say_more() -> None:
    notes = {LAYER: {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}}
    assert read(with_layer(NOTED["int8_tensorwise"][0]), "comfy", notes=notes).matrices[LAYER].note["convrot"] is True
    notes = {LAYER: {"format": "int8_blockwise", "group_size": 128}}
    assert read(with_layer(NOTED["int8_blockwise"][0]), "comfy", notes=notes).schemes["int8 blocks"] == 1


def int8(key: str, n: int, k: int) -> Tensors:
    return {"weight": info("I8", n, k), "weight_scale": info("F32", n, 1)}


def test_int8_in_a_file_that_is_called_rotated_needs_a_note() -> None:
    name = "models/qwen_image_edit_2511_int8_ConvRot.safetensors"
    with pytest.raises(CheckpointError, match="rotation unknown"):
        read(file(int8), name=name)
    with pytest.raises(CheckpointError, match="rotation unknown"):
        read(with_layer(NOTED["convrot_w4a4"][0]))
    notes = {
        key.removesuffix(".weight"): {"format": "int8_tensorwise", "convrot": True}
        for key, shape in EXPECTED.items()
        if len(shape) == 2 and key.startswith("transformer_blocks.")
    }
    assert read(file(int8), "comfy", name, notes=notes).schemes["int8 per row"] == 28
    assert read(file(int8), name="convrot/plain_int8.safetensors").schemes["int8 per row"] == 28, "a folder's name says nothing"


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (
            {**NVFP4, "svdquant_lora_a": info("BF16", 32, 3072), "svdquant_lora_b": info("BF16", 3072, 32)},
            "ModelOpt's NVFP4 SVDQuant",
        ),
        ({"weight": I8, "weight_s_rel": GRID, "weight_codebook": info("F32", 16)}, "comfy-kitchen's asym_w4a8_int8"),
        ({"weight": I8, "weight_scale": GRID, "weight_zeros": GRID}, "comfy-kitchen's awq_w4a16"),
        ({"weight": I8, "weight_scale": GRID, "weight_proj_down": GRID}, "comfy-kitchen's svdquant_w4a4"),
        ({"weight": I8, "scale": ROW, "svd_up": GRID, "svd_down": GRID}, "SDNQ"),
        (
            {"weight_packed": info("I32", 3072, 384), "weight_shape": info("I64", 2), "weight_scale": ROW},
            "compressed-tensors' pack",
        ),
        ({"weight._data": info("U8", 3072, 1536), "weight._scale": ROW, "weight._shift": ROW}, "quanto's int4"),
        ({"weight": info("U32", 3072, 384), "scales": GRID, "biases": GRID}, "MLX"),
    ],
)
def test_a_layout_that_is_not_read_is_refused_by_name(parts: Tensors, told: str) -> None:
    with pytest.raises(CheckpointError, match=f"{LAYER} is stored as {told}"):
        read(with_layer(parts), "modelopt")


def gguf(key: str, n: int, k: int) -> Tensors:
    """As city96's files are: what does not divide into blocks of 256 has a type of smaller ones."""
    return {"weight": info("Q4_K" if k % 256 == 0 else "Q8_0", n, k)}


def test_a_gguf_file() -> None:
    layout = read(file(gguf, blocks_only=False))
    assert layout.schemes == {"gguf Q4_K": 33, "gguf Q8_0": 1}
    half = read(file(gguf) | {"img_in.weight": info("F16", 3072, 64), "txt_norm.weight": info("F32", 3584)})
    assert half.schemes == {"gguf Q4_K": 28, "plain": 6}
    assert len(half.high_precision) == 6


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_K", "GGML_28"])
def test_norms_and_biases_of_a_gguf_file_are_plain(dtype: str) -> None:
    with pytest.raises(CheckpointError, match=f"is {dtype}; norms and biases are plain"):
        read(file(gguf) | {"transformer_blocks.0.attn.to_q.bias": info(dtype, 3072)})


def test_a_type_that_ggml_has_and_we_do_not_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"stored as weight GGML_10 \[3072, 3072\], which is no layout that is known"):
        read(file(gguf) | {f"{LAYER}.weight": info("GGML_10", *SHAPE)})
