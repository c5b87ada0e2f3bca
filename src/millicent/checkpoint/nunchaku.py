"""Which linears of Qwen-Image's transformer Nunchaku stores together, and what its own kernels had changed about them.

Source: nunchaku, `NunchakuQwenImageTransformer2DModel`. In each block the three projections of a stream are one linear, rows
of q, k and v stacked; a packed linear holds its bias packed too. The modulations are AWQ, all else that is packed SVDQuant.
What has no packed codes in the file is plain and keeps the network's own names. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from millicent.checkpoint.header import TensorInfo
from millicent.errors import CheckpointError

CODES = ".qweight"
AWQ_SCHEME = "nunchaku awq"
# by what follows "transformer_blocks.N."
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
BEHIND_GELU = ("img_mlp.net.2", "txt_mlp.net.2")
MODULATIONS = ("img_mod.1", "txt_mod.1")
SINGLE = ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.0.proj", *BEHIND_GELU, *MODULATIONS)
_BLOCK = re.compile(r"transformer_blocks\.\d+\.")


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One stored linear: shape: its (N, K). parameters: the weights whose rows it stacks, in that order, then their biases."""

    shape: tuple[int, int]
    parameters: tuple[str, ...]


def find_packed(tensors: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]) -> dict[str, PackedLinear]:
    """The packed linears of a file by their own names; none in a file that is not Nunchaku's.

    Codes of a linear that Nunchaku does not pack are left to whoever looks for tensors that belong to no parameter.
    """
    packed = {}
    for key in tensors:
        layer = key.removesuffix(CODES)
        block = _BLOCK.match(layer)
        if layer == key or block is None:
            continue
        local = layer[block.end() :]
        linears = FUSED.get(local, (local,) if local in SINGLE else ())
        weights = [f"{block[0]}{linear}.weight" for linear in linears]
        biases = [f"{block[0]}{linear}.bias" for linear in linears]
        if weights and all(name in expected for name in weights + biases):
            rows = sum(expected[name][0] for name in weights)
            packed[layer] = PackedLinear((rows, expected[weights[0]][1]), (*weights, *biases))
    return packed


def is_behind_gelu(layer: str) -> bool:
    return layer.endswith(tuple(f".{local}" for local in BEHIND_GELU))


def check_kind(layer: str, scheme: str, name: str) -> None:
    """Raises CheckpointError for a modulation that is not AWQ, or another linear that is: their order is known of no other."""
    is_modulation = layer.endswith(tuple(f".{local}" for local in MODULATIONS))
    if is_modulation != (scheme == AWQ_SCHEME):
        wanted = "AWQ" if is_modulation else "SVDQuant"
        raise CheckpointError(
            f"In {name} {layer} is stored as {scheme}; Nunchaku stores it as {wanted}.",
            "Use a file that its makers published.",
        )
