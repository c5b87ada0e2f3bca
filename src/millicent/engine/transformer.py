"""The transformer's forward pass as a card likes it: few launches, no copy that is not needed, weights in a number format.

The same network as model/mmdit.py, whose weights it takes over, laid out anew:

- Both streams lie in one buffer, references first, then the target, then the text, so that what works on single tokens is one
  launch for both, and attention reads queries, keys and values where the projections wrote them. Attention does not see order.
- q, k and v of a stream are one product. What the timestep alone decides comes from a table (model/modulation.py).
- Between two products stands one kernel (kernels/): gate, residual, norm, modulation and codes in one pass.
- Of the last block only the target's tokens are drawn from; the others give it their keys and values and no more.
- Pictures and text come in once for each edit, not once a step. A shape that comes again is captured as a CUDA graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from millicent.kernels import Code, Kernels, Rows, choose, choose_int8_attention
from millicent.model.layers import Block, make_rope
from millicent.model.mmdit import MMDiT
from millicent.model.modulation import FINAL, ModulationTable

Exact = Literal["cudnn", "flash", "math"]
Attention = Exact | Literal["int8"]
_KEPT_SHAPES = 4
_BACKENDS: dict[Exact, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


class RowLinear(Protocol):
    """What formats/ has for each number format; `code` and `group` say how the rows must come."""

    @property
    def code(self) -> Code: ...

    @property
    def group(self) -> int: ...

    out_features: int

    def matmul(self, values: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor: ...


MakeLinear = Callable[[str, Sequence[nn.Module]], RowLinear]


@dataclass(frozen=True, slots=True)
class Pair:
    """The same projection of both streams; their rows come in the same code."""

    img: RowLinear
    txt: RowLinear

    def __post_init__(self) -> None:
        assert (self.img.code, self.img.group) == (self.txt.code, self.txt.group)

    @property
    def taking(self) -> tuple[Code, int]:
        return self.img.code, self.img.group

    def __call__(self, rows: Rows, img_rows: int, out: Tensor, side: torch.cuda.Stream | None) -> Tensor:
        """rows (M, K), the first `img_rows` of pictures -> out (M, N). side: runs the text's small product beside the large one."""
        values, scale = rows
        with _beside(side):
            for linear, part in ((self.img, slice(None, img_rows)), (self.txt, slice(img_rows, None))):
                if len(out[part]):
                    with torch.cuda.stream(side if linear is self.txt else None):
                        linear.matmul(values[part], None if scale is None else scale[part], out[part])
        return out


@contextmanager
def _beside(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on the stream `side` begins after, and ends before, that on the current one; however it ends, or no capture could."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream())
    try:
        yield
    finally:
        torch.cuda.current_stream().wait_stream(side)


@dataclass(frozen=True, slots=True)
class FastBlock:
    """qk_norms: (2, 2, d), of q and k for pictures, then for text."""

    qkv: Pair
    out: Pair
    up: Pair
    down: Pair
    qk_norms: Tensor


def make_block(block: Block, name: str, make_linear: MakeLinear, device: torch.device) -> FastBlock:
    """A block's weights in their formats, on the device. name: of the block, to which a linear's own is added."""
    attn = block.attn

    def pair(img: str, txt: str) -> Pair:
        made = []
        for names in (img, txt):
            modules = [block.get_submodule(part) for part in names.split()]
            made.append(make_linear(f"{name}.{names.split()[0]}", modules))
        return Pair(*made)

    norms = [attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k]
    return FastBlock(
        qkv=pair("attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"),
        out=pair("attn.to_out.0", "attn.to_add_out"),
        up=pair("img_mlp.net.0.proj", "txt_mlp.net.0.proj"),
        down=pair("img_mlp.net.2", "txt_mlp.net.2"),
        qk_norms=torch.stack([norm.weight.to(device) for norm in norms]).unflatten(0, (2, 2)),
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

    @classmethod
    def lay_out(cls, table: ModulationTable, num_layers: int) -> Self:
        blocks = []
        for number in range(num_layers):
            img = table.vectors[f"transformer_blocks.{number}.img_mod"]
            txt = table.vectors[f"transformer_blocks.{number}.txt_mod"]
            # with zero_cond_t the second row is the references'
            blocks.append(torch.cat([img[:, -1:], img[:, :1], txt], 1).unflatten(-1, (6, -1)))
        return cls(table.timesteps, torch.stack(blocks, 1), table.vectors[FINAL][:, 0].unflatten(-1, (2, -1)).contiguous())


class FastMMDiT:
    """The transformer, ready to draw.

    reuse_reference: keys and values of the references are computed at the first step alone. An approximation: the true ones
    follow the noise, which the references see. attention: "int8" is an approximation, the others are exact. uses_graphs,
    overlaps_text: capture steps as CUDA graphs, with the text's products beside the pictures'.
    """

    def __init__(
        self,
        mmdit: MMDiT,
        make_linear: MakeLinear,
        *,
        attention: Attention,
        reuse_reference: bool = False,
        uses_graphs: bool = True,
        overlaps_text: bool = True,
        kernels: Kernels | None = None,
    ) -> None:
        """Takes the blocks' weights over, one block at a time, and leaves the network without its blocks."""
        self.config = mmdit.config
        self.attention = attention
        self.reuse_reference = reuse_reference
        self.edges = mmdit  # what stands before and after the blocks stays as it is
        self.dtype, self.device = mmdit.img_in.weight.dtype, mmdit.img_in.weight.device
        self.kernels = choose(self.device) if kernels is None else kernels
        self.attend_int8 = choose_int8_attention(self.device)
        self.uses_graphs = uses_graphs and self.device.type == "cuda"
        self.overlaps_text = overlaps_text
        # one for all graphs: torch's streams come round again after 32, and might be another graph's
        self.side = torch.cuda.Stream(self.device) if self.uses_graphs else None
        self._drawings: OrderedDict[tuple[object, ...], Drawing] = OrderedDict()
        self.forget()
        self.blocks: list[FastBlock] = []
        taken, mmdit.transformer_blocks = list(mmdit.transformer_blocks), nn.ModuleList()
        for number in range(len(taken)):
            block = taken[number]
            assert isinstance(block, Block)
            self.blocks.append(make_block(block, f"transformer_blocks.{number}", make_linear, self.device))
            taken[number] = nn.Identity()  # lets the block's own weights go

    def start(self, txt: Tensor, references: Tensor, img_shapes: Sequence[tuple[int, int]], mods: Mods, slot: int = 0) -> Drawing:
        """One picture's drawing. txt (1, T, C) of the encoder; references (1, R, 64); img_shapes as MMDiT.forward's.

        slot: tells drawings apart that go on at the same time, as with guidance; the one before in a slot has ended.
        """
        key = (tuple(img_shapes), txt.shape[1], slot)
        drawing = self._drawings.pop(key, None) or Drawing(self, list(img_shapes), txt.shape[1])
        self._drawings[key] = drawing  # the last one used is the last in order
        while len(self._drawings) > _KEPT_SHAPES:
            self._drawings.popitem(last=False)
        drawing.begin(txt, references, mods)
        return drawing

    def forget(self) -> None:
        """Let go of every shape's buffers and graphs: the memory is needed, or a step has failed half-way."""
        self._drawings.clear()
        # one picture is drawn after another, so that their graphs may share memory; a failed capture leaves its pool unusable
        self.graph_pool = torch.cuda.graph_pool_handle() if self.uses_graphs else None


class Drawing:
    """One picture after another of the same shapes: buffers that stay where they are, so that a graph can be replayed on them."""

    def __init__(self, network: FastMMDiT, img_shapes: list[tuple[int, int]], txt_tokens: int) -> None:
        config = network.config
        self.network = network
        self.target = img_shapes[0][0] * img_shapes[0][1]
        self.references, self.begun = sum(h * w for h, w in img_shapes[1:]), 0
        rope = make_rope(img_shapes, txt_tokens, config.axes_dims_rope, network.device)
        order = [slice(self.target, None), slice(None, self.target)]  # references first here, the target first there
        self.cos = torch.cat([*(rope.img_cos[part] for part in order), rope.txt_cos])
        self.sin = torch.cat([*(rope.img_sin[part] for part in order), rope.txt_sin])
        self.heads = (3, config.num_attention_heads, config.attention_head_dim)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=network.dtype, device=network.device)

        self.latents = empty(self.target, config.in_channels)
        self.reference_rows, self.txt_rows = empty(self.references, config.dim), empty(txt_tokens, config.dim)
        self.mods, self.final = empty(config.num_layers, 3, 6, config.dim), empty(2, config.dim)
        kept_blocks = config.num_layers if network.reuse_reference and self.references else 0
        self.kept = [empty(self.references, 2, *self.heads[1:]) for _ in range(kept_blocks)]
        self.holds_kept = False
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def begin(self, txt: Tensor, references: Tensor, mods: Mods) -> None:
        """The next picture. txt (1, T, C), references (1, R, 64)."""
        edges = self.network.edges
        assert references.shape[1] == self.references, "img_shapes must cover every reference token"
        self.reference_rows.copy_(edges.img_in(references[0]))
        self.txt_rows.copy_(edges.txt_in(edges.txt_norm(txt[0])))
        self.table, self.holds_kept, self.begun = mods, False, self.begun + 1

    def step(self, latents: Tensor, row: int) -> Tensor:
        """The velocity (1, target, 64) of latents (1, target, 64), at the table's timestep number `row`."""
        self.latents.copy_(latents[0])
        self.mods.copy_(self.table.blocks[row])
        self.final.copy_(self.table.final[row])
        reuses = self.holds_kept
        # a shape that comes again may come often: then what it takes to capture it is paid back
        if reuses not in self.graphs and self.network.uses_graphs and self.begun > 1:
            self.graphs[reuses] = self._capture(reuses)
        if reuses in self.graphs:
            graph, drawn = self.graphs[reuses]
            graph.replay()
            velocity = drawn.clone()
        else:
            velocity = self._forward(reuses, side=None)
        self.holds_kept = bool(self.kept)
        return velocity[None]

    def _capture(self, reuses: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        side = self.network.side if self.network.overlaps_text else None
        self._forward(reuses, None)  # what is compiled, tuned or allocated at first use cannot be while a graph is captured
        torch.cuda.synchronize(self.network.device)
        # other threads may go on using the card meanwhile
        with torch.cuda.graph(graph, pool=self.network.graph_pool, capture_error_mode="thread_local"):
            drawn = self._forward(reuses, side)
        return graph, drawn

    def _forward(self, reuses: bool, side: torch.cuda.Stream | None) -> Tensor:
        """(target, 64) of what the buffers hold."""
        skipped = self.references if reuses else 0
        x = torch.cat([self.reference_rows[skipped:], self.network.edges.img_in(self.latents), self.txt_rows])
        target = slice(self.references - skipped, self.references - skipped + self.target)
        update: Tensor | None = None
        for number in range(len(self.network.blocks)):
            update = self._block(number, x, update, target, reuses, side)
        assert update is not None
        return self._finish(x[target], update)

    def _block(
        self, number: int, x: Tensor, update: Tensor | None, target: slice, reuses: bool, side: torch.cuda.Stream | None
    ) -> Tensor:
        """One block on the stream x (M, D), in place. What its MLP adds is returned, for the next kernel to add.

        update: the same of the block before, (M, D). target: where its rows are in x.
        """
        network, kernels = self.network, self.network.kernels
        block, is_last = network.blocks[number], number == len(network.blocks) - 1
        shift1, scale1, gate1, shift2, scale2, _ = self.mods[number].unbind(1)
        bounds, img = (target.start, target.stop), target.stop
        if update is None:
            rows = kernels.norm_modulate(x, shift1, scale1, bounds, *block.qkv.taking)
        else:
            gate = self.mods[number - 1, :, 5]
            rows = kernels.add_gated_norm_modulate(x, update, gate, shift1, scale1, bounds, *block.qkv.taking)
        kept = self.references if reuses else 0
        joint = self._joint(block.qkv, rows, img, kept, side)
        if kept:
            _copy_rows(joint[:kept, 1:], self.kept[number])
        queries = slice(kept, kept + len(x))
        if is_last:
            queries = slice(kept + target.start, kept + target.stop)
            x, bounds, img = x[target], (0, self.target), self.target
        attended = self._attend(joint, block.qk_norms, kept + target.stop, kept, queries)
        if self.kept and not reuses:
            _copy_rows(self.kept[number], joint[: self.references, 1:])
        attended_rows = kernels.quantize_rows(attended, *block.out.taking)
        made = block.out(attended_rows, img, torch.empty_like(x), side)
        rows = kernels.add_gated_norm_modulate(x, made, gate1, shift2, scale2, bounds, *block.up.taking)
        up = torch.empty((len(x), block.up.img.out_features), dtype=x.dtype, device=x.device)
        hidden = kernels.gelu_rows(block.up(rows, img, up, side), *block.down.taking)
        return block.down(hidden, img, torch.empty_like(x), side)

    def _attend(self, joint: Tensor, qk_norms: Tensor, img: int, kept: int, queries: slice) -> Tensor:
        """Attention of the rows `queries` of joint (S, 3, H, d) over all, (Q, H d). From row `kept` on its q and k are raw.

        img: how many of the S rows are pictures'. Afterwards all k are normed and turned.
        """
        network = self.network
        if network.attention == "int8":
            out = torch.empty((queries.stop - queries.start, self.heads[1] * self.heads[2]), dtype=joint.dtype, device=joint.device)
            return network.attend_int8(joint, qk_norms, self.cos, self.sin, img, kept, queries, out)
        network.kernels.qk_norm_rope(joint[kept:], qk_norms, self.cos[kept:], self.sin[kept:], img - kept)
        return attend(joint[queries, 0], joint[:, 1], joint[:, 2], network.attention)

    def _joint(self, qkv: Pair, rows: Rows, img: int, kept: int, side: torch.cuda.Stream | None) -> Tensor:
        """Queries, keys and values of rows (M, K): (kept + M, 3, H, d), its first `kept` rows still to be filled."""
        shape = (kept + len(rows.values), qkv.img.out_features)
        joint = torch.empty(shape, dtype=self.network.dtype, device=self.network.device)
        qkv(rows, img, joint[kept:], side)
        return joint.unflatten(1, self.heads)

    def _finish(self, x: Tensor, update: Tensor) -> Tensor:
        # one segment alone, and here the scale comes first
        gate, scale, shift = (vector.expand(3, -1) for vector in (self.mods[-1, 1, 5], *self.final))
        rows = self.network.kernels.add_gated_norm_modulate(x, update, gate, shift, scale, (0, len(x)), "bf16")
        velocity: Tensor = self.network.edges.proj_out(rows.values)
        return velocity


def _copy_rows(to: Tensor, rows: Tensor) -> None:
    """Both (M, 2, H, d), each row in one piece. As the longest numbers that torch has: rows apart it copies one by one."""
    long = torch.complex128
    to.flatten(1).view(long).copy_(rows.flatten(1).view(long))


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Exact) -> Tensor:
    """q (M, H, d), k and v (S, H, d) -> (M, H d)."""
    with sdpa_kernel(_BACKENDS[backend]):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v)
    return attended[0].transpose(0, 1).flatten(1)
