"""A whole file of Nunchaku's, packed by DeepCompressor: given to the network's parameters, decoded, and compared with them.

The network has Qwen-Image's names and the smallest sizes that Nunchaku's tiles allow. DeepCompressor's package asks for half of
PyPI; see tests/formats/test_svdquant.py for how it is installed.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from millicent.checkpoint.architecture import transformer_tensors
from millicent.checkpoint.decode import decode_stored, read_codes
from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.layout import Layout, lay_out
from millicent.checkpoint.marks import Marks
from millicent.errors import CheckpointError, WeightsMismatchError
from millicent.formats.packed import E2M1
from millicent.formats.svdquant import GELU_SHIFT

# its padding indexes in a way that PyTorch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning")

CONFIG = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 128,
    "num_attention_heads": 1, "joint_attention_dim": 128,
}  # fmt: skip
EXPECTED = transformer_tensors(CONFIG)
RANK = 32
STACKED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
ALONE = [
    *("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    *("img_mod.1", "txt_mod.1"),
]
DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8", torch.int32: "I32",
}  # fmt: skip
# the names that nunchaku's files have for what DeepCompressor writes
RENAMED = {"smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig", "lora_down": "proj_down", "lora_up": "proj_up"}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def packer() -> ModuleType:
    return importlib.import_module("deepcompressor.backend.nunchaku.convert")


@cache
def network() -> Tensors:
    """Rows and columns of unequal size, and every parameter unlike every other."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for key, shape in EXPECTED.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            noise *= (
                0.02
                * torch.randn(shape[0], 1, generator=generator).mul(0.5).exp()
                * (1 + torch.rand(shape[1], generator=generator))
            )
        drawn[key] = noise.bfloat16().float()
    return drawn


def split(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """smooth (K,), down (r, K), up (N, r) in BF16, and the rest of the smoothed weight, which will be quantized."""
    smooth = (1 / weight.abs().amax(0).sqrt()).bfloat16()
    u, s, v = torch.linalg.svd(weight * smooth.float(), full_matrices=False)
    up, down = (u[:, :RANK] * s[:RANK]).bfloat16(), v[:RANK].bfloat16()
    return smooth, down, up, weight * smooth.float() - up.float() @ down.float()


def renamed(parts: Tensors) -> Tensors:
    return {RENAMED.get(name, name): tensor for name, tensor in parts.items()}


def pack_int4(packer: ModuleType, weight: Tensor, bias: Tensor, shifted: bool) -> Tensors:
    smooth, down, up, rest = split(weight)
    # powers of 2, because DeepCompressor takes codes times scales in BF16
    scales = (rest.unflatten(1, (-1, 64)).abs().amax(-1) / 7).log2().ceil().exp2()
    codes = (rest.unflatten(1, (-1, 64)) / scales[..., None]).round().flatten(1)
    rest = codes * scales.repeat_interleave(64, 1)
    if shifted:
        # it takes a bias that undoes the shift for the whole weight, and takes the low-rank pair's part out of that
        bias = bias - GELU_SHIFT * ((rest + up.float() @ down.float()) / smooth.float()).sum(1)
    written = packer.convert_to_nunchaku_w4x4y16_linear_state_dict(
        rest.bfloat16(),
        scales.bfloat16()[:, None, :, None],
        bias=bias.bfloat16(),
        smooth=smooth,
        lora=(down, up),
        shift=torch.tensor([GELU_SHIFT]) if shifted else None,
    )
    return renamed(written)


def pack_fp4(packer: ModuleType, weight: Tensor, bias: Tensor, per_row: bool) -> Tensors:
    smooth, down, up, rest = split(weight)
    outer = ((rest.abs().amax(1) if per_row else rest.abs().amax().reshape(1)) / 2048).bfloat16()
    groups = (rest / outer.float()[:, None]).unflatten(1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6).to(torch.float8_e4m3fn).float()
    values = E2M1[(groups[..., None] / scales[..., None, None] - E2M1).abs().argmin(-1)] * scales[..., None]
    written = packer.convert_to_nunchaku_w4x4y16_linear_state_dict(
        (values.flatten(1) * outer.float()[:, None]).bfloat16(),
        outer[:, None, None, None] if per_row else outer,
        bias=bias.bfloat16(),
        smooth=smooth,
        lora=(down, up),
        float_point=True,
        subscale=scales.bfloat16()[:, None, :, None],
    )
    return renamed(written)


def pack_awq(packer: ModuleType, weight: Tensor, bias: Tensor) -> Tensors:
    groups = weight.shape[1] // 64
    scales = (weight.unflatten(1, (-1, 64)).abs().amax(-1) / 7).bfloat16()[:, None, :, None]
    written = packer.convert_to_nunchaku_w4x16_adanorm_zero_state_dict(weight.bfloat16(), scales, bias.bfloat16())
    # it fills up to 16 groups, of which Qwen-Image's modulations have 48
    return {name: tensor[:groups] if name in ("wscales", "wzeros") else tensor for name, tensor in written.items()}


@cache
def file_of(packer: ModuleType, precision: str) -> Tensors:
    """precision: int4 or fp4. In fp4 stacked linears have a scale for each row, others one for all, as DeepCompressor has it."""
    tensors = {key: tensor.bfloat16() for key, tensor in network().items()}
    for block in ("transformer_blocks.0.", "transformer_blocks.1."):
        for name, linears in {**STACKED, **{name: (name,) for name in ALONE}}.items():
            weight = torch.cat([tensors.pop(f"{block}{linear}.weight").float() for linear in linears])
            bias = torch.cat([tensors.pop(f"{block}{linear}.bias").float() for linear in linears])
            if name.endswith("_mod.1"):
                parts = pack_awq(packer, weight, bias)
            elif precision == "int4":
                parts = pack_int4(packer, weight, bias, shifted=name.endswith("net.2"))
            else:
                parts = pack_fp4(packer, weight, bias, per_row=len(linears) > 1)
            tensors |= {f"{block}{name}.{suffix}": tensor for suffix, tensor in parts.items()}
    return tensors


def read(tensors: Tensors) -> Layout:
    infos = {key: TensorInfo(DTYPES[tensor.dtype], tuple(tensor.shape), 0, 0) for key, tensor in tensors.items()}
    return lay_out(infos, EXPECTED, Marks(None), "the file")


def decode(tensors: Tensors, layout: Layout) -> Tensors:
    decoded: Tensors = {}
    for layer, stored in layout.matrices.items():
        yielded = decode_stored(layer, stored, {suffix: tensors[f"{layer}.{suffix}"] for suffix in stored.parts})
        assert tuple(yielded) == stored.parameters
        assert not decoded.keys() & yielded.keys()
        decoded |= yielded
    return decoded


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    assert found.dtype == torch.float32
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("precision", "schemes"),
    [
        ("int4", {"svdquant int4": 16, "nunchaku awq": 4, "plain": 6}),
        ("fp4", {"svdquant fp4": 12, "svdquant fp4, rows": 4, "nunchaku awq": 4, "plain": 6}),
    ],
)
def test_every_parameter_comes_back_once(packer: ModuleType, precision: str, schemes: dict[str, int]) -> None:
    tensors = file_of(packer, precision)
    layout = read(tensors)
    assert layout.schemes == schemes
    assert len(layout.high_precision) == 6
    decoded = decode(tensors, layout)
    assert decoded.keys() | layout.vectors.keys() == EXPECTED.keys()
    assert not decoded.keys() & layout.vectors.keys()
    for key, tensor in decoded.items():
        if key.endswith(".weight"):
            # 4 bits with a power of 2 for a scale, or E2M1; the modulations have no low-rank pair
            assert error(tensor, network()[key]) < 0.20, key
        else:
            # BF16, next to 1 in a modulation; behind a GELU after a sum over all columns
            torch.testing.assert_close(tensor, network()[key], rtol=0, atol=2**-5, msg=key)


def test_stacked_linears_are_taken_apart_in_their_order(packer: ModuleType) -> None:
    stored = read(file_of(packer, "int4")).matrices["transformer_blocks.1.attn.add_qkv_proj"]
    linears = [f"transformer_blocks.1.attn.add_{part}_proj" for part in "qkv"]
    assert stored.shape == (384, 128)
    assert stored.parameters == (*(f"{linear}.weight" for linear in linears), *(f"{linear}.bias" for linear in linears))
    assert stored.parts.keys() >= {"qweight", "smooth_factor_orig", "bias"}


def test_only_what_is_behind_a_gelu_in_int4_has_its_bias_unshifted(packer: ModuleType) -> None:
    """A shift that is taken back where there was none, or left where there was one, moves a bias by far more than rounding."""
    tensors = file_of(packer, "int4")
    decoded = decode(tensors, read(tensors))
    for name in ("img_mlp.net.2", "txt_mlp.net.2", "img_mlp.net.0.proj"):
        key = f"transformer_blocks.0.{name}"
        shift = GELU_SHIFT * network()[f"{key}.weight"].sum(1)
        assert (
            error(decoded[f"{key}.bias"], network()[f"{key}.bias"]) < 0.02 < float(shift.norm() / network()[f"{key}.bias"].norm())
        )


def test_no_codes_of_nunchakus_are_kept(packer: ModuleType) -> None:
    tensors = file_of(packer, "int4")
    for layer, stored in read(tensors).matrices.items():
        assert read_codes(layer, stored, {suffix: tensors[f"{layer}.{suffix}"] for suffix in stored.parts}) is None


@pytest.mark.parametrize("precision", ["int4", "fp4"])
def test_one_tensor_less_is_refused_whichever_it_is(packer: ModuleType, precision: str) -> None:
    whole = file_of(packer, precision)
    for key in whole:
        if key.startswith("transformer_blocks.1."):
            continue
        without = {name: tensor for name, tensor in whole.items() if name != key}
        if key.endswith("smooth_factor_orig"):
            assert read(without).schemes == read(whole).schemes, "only a record"
            continue
        with pytest.raises(CheckpointError):
            read(without)


@pytest.mark.parametrize(
    ("key", "tensor", "told"),
    [
        (
            "transformer_blocks.0.attn.to_q.weight",
            torch.zeros(128, 128),
            r"not the network's: transformer_blocks\.0\.attn\.to_q\.weight",
        ),
        ("transformer_blocks.0.attn.to_out.0.weight", torch.zeros(128, 128), r"attn\.to_out\.0 is stored as"),
        ("transformer_blocks.0.attn.to_qkv.wtscale", torch.ones(1), r"attn\.to_qkv is stored as"),
        ("transformer_blocks.0.attn.norm_q.qweight", torch.zeros(4, 4), r"not the network's: .*norm_q\.qweight"),
        ("proj_out.qweight", torch.zeros(64, 64, dtype=torch.int8), r"proj_out is stored as"),
        ("transformer_blocks.2.attn.to_qkv.qweight", torch.zeros(64, 64, dtype=torch.int8), r"not the network's: .*blocks\.2"),
    ],
)
def test_one_tensor_more_is_refused(packer: ModuleType, key: str, tensor: Tensor, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        read(file_of(packer, "int4") | {key: tensor})


@pytest.mark.parametrize(
    ("suffix", "tensor"),
    [
        ("qweight", torch.zeros(384, 128, dtype=torch.int8)),
        ("qweight", torch.zeros(384, 64, dtype=torch.int32)),
        ("wscales", torch.zeros(2, 128).bfloat16()),
        ("wscales", torch.zeros(2, 384)),
        ("smooth_factor", torch.ones(384).bfloat16()),
        ("proj_down", torch.zeros(128, 24).bfloat16()),
        ("proj_up", torch.zeros(128, 32).bfloat16()),
        ("bias", torch.zeros(128).bfloat16()),
    ],
)
def test_a_tensor_of_another_kind_is_refused(packer: ModuleType, suffix: str, tensor: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"attn\.to_qkv is stored as"):
        read(file_of(packer, "int4") | {f"transformer_blocks.0.attn.to_qkv.{suffix}": tensor})


def swapped(packer: ModuleType, layer: str, parts: Tensors) -> Tensors:
    whole = file_of(packer, "int4")
    return {key: tensor for key, tensor in whole.items() if not key.startswith(f"{layer}.")} | {
        f"{layer}.{suffix}": tensor for suffix, tensor in parts.items()
    }


def test_a_modulation_is_awq_and_nothing_else_is(packer: ModuleType) -> None:
    weight, bias = torch.randn(768, 128), torch.randn(768)
    layer = "transformer_blocks.0.img_mod.1"
    with pytest.raises(CheckpointError, match=r"img_mod\.1 is stored as svdquant int4; Nunchaku stores it as AWQ"):
        read(swapped(packer, layer, pack_int4(packer, weight, bias, shifted=False)))
    layer = "transformer_blocks.0.attn.to_qkv"
    with pytest.raises(CheckpointError, match=r"attn\.to_qkv is stored as nunchaku awq; Nunchaku stores it as SVDQuant"):
        read(swapped(packer, layer, pack_awq(packer, weight[:384], bias[:384])))


def test_a_linear_that_is_left_plain_keeps_its_own_name(packer: ModuleType) -> None:
    names = ("weight", "bias")
    layer = "transformer_blocks.0.img_mod.1"
    tensors = swapped(packer, layer, {name: network()[f"{layer}.{name}"].bfloat16() for name in names})
    layout = read(tensors)
    assert layout.matrices[layer].scheme.name == "plain"
    assert f"{layer}.bias" in layout.vectors
    stacked = swapped(packer, "transformer_blocks.0.attn.to_qkv", {"weight": torch.zeros(384, 128), "bias": torch.zeros(384)})
    with pytest.raises(WeightsMismatchError, match=r"missing: transformer_blocks\.0\.attn\.to_k\.bias"):
        read(stacked)


BAD: list[tuple[str, str, Any, str]] = [
    ("int4", "attn.to_qkv.wscales", torch.nan, "scales that are not finite and above 0"),
    ("int4", "attn.to_qkv.wscales", -1.0, "scales that are not finite and above 0"),
    ("int4", "attn.to_qkv.smooth_factor", 0.0, "scales that are not finite and above 0"),
    ("int4", "attn.to_qkv.proj_up", torch.inf, "values that are not finite"),
    ("int4", "attn.to_qkv.bias", torch.nan, "bias holds values that are not finite"),
    ("int4", "img_mlp.net.2.bias", torch.inf, "bias holds values that are not finite"),
    ("int4", "img_mod.1.wzeros", torch.nan, "values that are not finite"),
    ("int4", "img_mod.1.wscales", 0.0, "scales that are not finite and above 0"),
    ("fp4", "attn.to_qkv.wcscales", 0.0, "scales that are not finite and above 0"),
    ("fp4", "attn.to_qkv.wscales", torch.nan, "codes that are no numbers"),
    ("fp4", "attn.to_qkv.wscales", -1.0, "negative scales"),
    ("fp4", "img_mlp.net.2.wtscale", torch.inf, "scales that are not finite and above 0"),
]


@pytest.mark.parametrize(("precision", "suffix", "bad", "told"), BAD)
def test_a_value_that_cannot_be_is_refused(packer: ModuleType, precision: str, suffix: str, bad: float, told: str) -> None:
    tensors = dict(file_of(packer, precision))
    key = f"transformer_blocks.0.{suffix}"
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[0] = bad
    layer = key.rsplit(".", 1)[0]
    stored = read(tensors).matrices[layer]
    with pytest.raises(CheckpointError, match=told):
        decode_stored(layer, stored, {name: tensors[f"{layer}.{name}"] for name in stored.parts})
