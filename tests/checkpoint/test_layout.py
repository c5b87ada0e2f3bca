"""Whole files by their headers: closure, pairing, and makers' marks, over the published transformer's shape."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from millicent.checkpoint.architecture import transformer_tensors
from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.layout import Layout, lay_out
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


def read(tensors: Tensors, maker: str | None = None) -> Layout:
    return lay_out(tensors, EXPECTED, maker, "the file")


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
    layout = read(file(store, blocks_only) | {"scaled_fp8": info("F8_E4M3", 0), "__index_timestep_zero__": info("F32", 0)})
    assert layout.schemes == schemes
    assert len(layout.matrices) + len(layout.vectors) == len(EXPECTED)
    assert set(layout.leftovers) == {"scaled_fp8", "__index_timestep_zero__"}
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
