"""A block's weights as the fast transformer reads them, and the modulation of every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from millicent.kernels import Code
from millicent.model.layers import Block
from millicent.model.modulation import FINAL, ModulationTable


class RowLinear(Protocol):
    """What formats/ has for each number format; `code` and `group` say how the rows must come."""

    @property
    def code(self) -> Code: ...

    @property
    def group(self) -> int: ...

    out_features: int

    def matmul(self, values: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor: ...


MakeLinear = Callable[[str, Sequence[nn.Module]], RowLinear]


class Half(nn.Module):
    """A block's weights for one of its streams, of pictures or of text. qkv: the three as one."""

    qkv: RowLinear
    out: RowLinear
    up: RowLinear
    down: RowLinear

    def __init__(self, qkv: RowLinear, out: RowLinear, up: RowLinear, down: RowLinear) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = qkv, out, up, down


class FastBlock(nn.Module):
    """qk_norms: (2, 2, d), of q and k for pictures, then for text."""

    img: Half
    txt: Half
    qk_norms: Tensor

    def __init__(self, img: Half, txt: Half, qk_norms: Tensor) -> None:
        super().__init__()
        self.img, self.txt = img, txt
        self.register_buffer("qk_norms", qk_norms)


_HALVES = {
    "img": ("attn.to_q attn.to_k attn.to_v", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2"),
    "txt": ("attn.add_q_proj attn.add_k_proj attn.add_v_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
}


def make_block(block: Block, name: str, make_linear: MakeLinear, device: torch.device) -> FastBlock:
    """A block's weights in their formats, on the device. name: of the block, to which a linear's own is added."""

    def make(names: str) -> RowLinear:
        parts = names.split()
        return make_linear(f"{name}.{parts[0]}", [block.get_submodule(part) for part in parts])

    attn = block.attn
    norms = [attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k]
    return FastBlock(
        **{stream: Half(*(make(names) for names in linears)) for stream, linears in _HALVES.items()},
        # a block without values, which is made for its shapes, has no other device
        qk_norms=torch.stack([norm.weight if norm.weight.is_meta else norm.weight.to(device) for norm in norms]).unflatten(
            0, (2, 2)
        ),
    )


@dataclass(frozen=True, slots=True)
class Mods:
    """A modulation table as the kernels read it.

    timesteps: S of them. blocks: (S, blocks, 3, 6, D), of references, target and text; shift, scale and gate of attention, then
    of the MLP. final: (S, 2, D), the last norm's scale, then its shift.
    """

    timesteps: tuple[float, ...]
    blocks: Tensor
    final: Tensor

    def on_host(self) -> Self:
        """In page-locked memory, from which a card takes a row without the host waiting for it."""

        def bring(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

        return replace(self, blocks=bring(self.blocks), final=bring(self.final))

    @classmethod
    def lay_out(cls, table: ModulationTable, num_layers: int) -> Self:
        blocks = []
        for number in range(num_layers):
            img = table.vectors[f"transformer_blocks.{number}.img_mod"]
            txt = table.vectors[f"transformer_blocks.{number}.txt_mod"]
            # with zero_cond_t the second row is the references'
            blocks.append(torch.cat([img[:, -1:], img[:, :1], txt], 1).unflatten(-1, (6, -1)))
        return cls(table.timesteps, torch.stack(blocks, 1), table.vectors[FINAL][:, 0].unflatten(-1, (2, -1)).contiguous())
