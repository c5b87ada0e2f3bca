"""The transformer's forward pass as a card likes it: few launches, no copy that is not needed, weights in a number format.

The same network as model/mmdit.py, whose weights it takes over, laid out anew:

- Tokens come in the order references, target, text, and the projections of both streams write queries, keys and values to one
  buffer, where attention reads them. Attention does not see order.
- The text's few tokens go their way beside the pictures' many, from one attention to the next.
- q, k and v of a stream are one product. What the timestep alone decides comes from a table (model/modulation.py).
- Between two products stands one kernel (kernels/): gate, residual, norm, modulation and codes in one pass.
- Of the last block only the target's tokens are drawn from; the others give it their keys and values and no more.
- Pictures and text come in once for each edit, not once a step. A shape that comes again is captured as a CUDA graph.
- Where blocks are streamed, several drawings go through each while it is on the card.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from millicent.engine.blocks import FastBlock, Half, MakeLinear, Mods, RowLinear, make_block
from millicent.engine.capture import recording
from millicent.engine.layer_stack import Stack
from millicent.engine.weighing import SHAPES_KEPT
from millicent.kernels import Bounds, Kernels, KeysValues, Rows, choose, choose_int8_attention
from millicent.model.layers import Block, make_rope
from millicent.model.mmdit import MMDiT

Exact = Literal["cudnn", "flash", "math"]
Attention = Exact | Literal["int8"]
# by their own names: which of them scaled_dot_product_attention may take is set for the whole process, other threads included
_EXACT: dict[Exact, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cudnn": lambda q, k, v: torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0],
    "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0],
    "math": lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0],
}


@dataclass(slots=True)
class Part:
    """The tokens of one stream on their way through the blocks.

    x: (M, D), changed in place. update: (M, D), what the last MLP adds, for the next kernel to add. bounds: as kernels take them.
    """

    x: Tensor
    bounds: Bounds
    update: Tensor | None = None


@contextmanager
def _joined(side: torch.cuda.Stream | None) -> Iterator[None]:
    """What the side does within begins after, and ends before, what is on the current stream; or no capture could be ended."""
    _fork(side)
    try:
        yield
    finally:
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)


def _fork(side: torch.cuda.Stream | None) -> None:
    """What the side does next begins after what is on the current stream."""
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())


# a forward pass that stops before each block, and returns the velocity (target, 64)
Pass = Generator[None, None, Tensor]


class FastMMDiT:
    """The transformer, ready to draw.

    reuse_reference: keys and values of the references are computed at the first step alone. An approximation: the true ones
    follow the noise, which the references see. attention: "int8" is an approximation, the others are exact. keeps_codes: what
    8-bit attention has to know of all tokens is found at the first step alone, and of the references, where they are reused, their
    codes are kept. uses_graphs, overlaps_text: capture steps as CUDA graphs, with the text's products beside the pictures'.
    stack: what brings the blocks to the card; None where all of them stay there. abreast: how many drawings share a block that is
    streamed.
    """

    def __init__(
        self,
        mmdit: MMDiT,
        make_linear: MakeLinear,
        *,
        attention: Attention,
        reuse_reference: bool = False,
        keeps_codes: bool = True,
        uses_graphs: bool = True,
        overlaps_text: bool = True,
        kernels: Kernels | None = None,
        take: Callable[[FastBlock], None] | None = None,
    ) -> None:
        """Takes the blocks' weights over, one block at a time, and leaves the network without its blocks.

        take: given each block when it is laid out, before the next one is.
        """
        self.config = mmdit.config
        self.attention = attention
        self.reuse_reference = reuse_reference
        self.edges = mmdit  # what stands before and after the blocks stays as it is
        # of a parameter that is never codes
        self.dtype, self.device = mmdit.txt_norm.weight.dtype, mmdit.txt_norm.weight.device
        self.kernels = choose(self.device) if kernels is None else kernels
        self.int8_attention = choose_int8_attention(self.device)
        self.keeps_codes = keeps_codes
        self.uses_graphs = uses_graphs and self.device.type == "cuda"
        self.overlaps_text = overlaps_text
        # one for all graphs: torch's streams come round again after 32, and might be another graph's
        self.side = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None
        # torch's own for all captures is on the card of its first
        self.capturing = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.stack: Stack | None = None
        self.abreast = 1
        self._drawings: OrderedDict[tuple[object, ...], Drawing] = OrderedDict()
        self._kept: WeakValueDictionary[tuple[int, int], Tensor] = WeakValueDictionary()
        self._kept_codes: WeakValueDictionary[tuple[int, int], KeysValues] = WeakValueDictionary()
        self.blocks: list[FastBlock] = []
        taken, mmdit.transformer_blocks = list(mmdit.transformer_blocks), nn.ModuleList()
        for number in range(len(taken)):
            block = taken[number]
            assert isinstance(block, Block)
            self.blocks.append(make_block(block, f"transformer_blocks.{number}", make_linear, self.device))
            taken[number] = nn.Identity()  # lets the block's own weights go
            if take is not None:
                take(self.blocks[-1])

    def start(self, txt: Tensor, references: Tensor, img_shapes: Sequence[tuple[int, int]], mods: Mods, slot: int = 0) -> Drawing:
        """One picture's drawing. txt (1, T, C) of the encoder; references (1, R, 64); img_shapes as MMDiT.forward's.

        slot: tells drawings apart that go on at the same time, as with guidance; the one before in a slot has ended.
        """
        key = (tuple(img_shapes), txt.shape[1], slot)
        drawing = self._drawings.pop(key, None)
        if drawing is None:
            self._make_room(references.shape[1], slot)
            drawing = Drawing(self, list(img_shapes), txt.shape[1], slot)
        self._drawings[key] = drawing  # the last one used is the last in order
        drawing.begin(txt, references, mods)
        return drawing

    def _make_room(self, references: int, slot: int) -> None:
        """For the drawing of another shape."""
        had_graphs = self.has_graphs
        # without graphs they are only memory; with guidance a picture has two
        while len(self._drawings) >= (SHAPES_KEPT if self.uses_graphs else 2 * self.abreast):
            self._drawings.popitem(last=False)
        if self.reuse_reference:  # what is kept of so many references is 3 GB, of which each slot has one
            for key, drawing in list(self._drawings.items()):
                if drawing.slot == slot and drawing.references != references:
                    del self._drawings[key]
        if had_graphs and not self.has_graphs:  # PyTorch may give their pool's memory away, and the last one may still run
            torch.cuda.synchronize(self.device)

    def kept_rows(self, references: int, slot: int) -> Tensor:
        """Where drawings keep their references' keys and values (blocks, R, 2, H, d): 3 GB for 4096 tokens at true size.

        Drawings of a slot share it, as one has ended when the next begins; it goes with the last of them.
        """
        kept = self._kept.get((references, slot))
        if kept is None:
            config = self.config
            shape = (config.num_layers, references, 2, config.num_attention_heads, config.attention_head_dim)
            kept = self._kept[references, slot] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return kept

    def kept_codes(self, references: int, slot: int) -> KeysValues:
        """As kept_rows, for 8-bit attention: half of that memory, and 1.5 MB where `references` is 0."""
        kept = self._kept_codes.get((references, slot))
        if kept is None:
            config = self.config
            shape = config.num_layers, references, config.num_attention_heads, config.attention_head_dim
            kept = self._kept_codes[references, slot] = self.int8_attention.make_kept(*shape, self.device)
        return kept

    def step(self, asked: Sequence[tuple[Drawing, Tensor, int]]) -> list[Tensor]:
        """The next step of drawings with slots of their own, `abreast` of them at a time: Drawing.step's arguments and results."""
        velocities: list[Tensor] = []
        for begin in range(0, len(asked), self.abreast):
            together = asked[begin : begin + self.abreast]
            if len(together) == 1 or self.uses_graphs:
                velocities += [drawing.step(latents, row) for drawing, latents, row in together]
                continue
            for drawing, latents, row in together:
                drawing.feed(latents, row)
            side = self.side if self.overlaps_text else None
            velocities += [velocity[None] for velocity in self.run([drawing.go(side) for drawing, _, _ in together], side)]
            for drawing, _, _ in together:
                drawing.end_step()
        return velocities

    def run(self, passes: Sequence[Pass], side: torch.cuda.Stream | None) -> list[Tensor]:
        """Take passes through all blocks, each block through all of them while it is on the card. What they return."""
        for each in passes:
            next(each)
        made: list[Tensor] = []
        with _joined(side):
            for number in range(len(self.blocks)):
                with self.at(number, side):
                    for each in passes:
                        try:
                            next(each)
                        except StopIteration as ended:
                            made.append(ended.value)
                        if len(passes) > 1 and side is not None:  # or what it reads of one would have to outlast the other's block
                            torch.cuda.current_stream(self.device).wait_stream(side)
        return made

    @contextmanager
    def at(self, number: int, side: torch.cuda.Stream | None) -> Iterator[None]:
        """A block's weights are on the card for what the current stream and the side are given within."""
        if self.stack is None or self.stack.stays:
            yield
            return
        with self.stack.at(number):
            yield
            if side is not None:
                torch.cuda.current_stream(self.device).wait_stream(side)

    @property
    def keeps_drawings(self) -> bool:
        return bool(self._drawings)

    def record(self, records: bool) -> None:
        """Whether steps are recorded as graphs from now on."""
        self.uses_graphs = records and self.device.type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Let go of every shape's buffers and graphs: the memory is needed, or a step has failed half-way."""
        self._drawings.clear()

    def open_pool(self) -> None:
        """Have a pool of memory for one more graph: that of those there are, as one picture is drawn after another.

        A pool that has lost its last graph takes no other.
        """
        if not self.has_graphs:
            self.graph_pool = torch.cuda.graph_pool_handle()

    @property
    def has_graphs(self) -> bool:
        return any(drawing.graphs for drawing in self._drawings.values())


class Drawing:
    """One picture after another of the same shapes: buffers that stay where they are, so that a graph can be replayed on them."""

    def __init__(self, network: FastMMDiT, img_shapes: list[tuple[int, int]], txt_tokens: int, slot: int) -> None:
        config = network.config
        self.network, self.slot = network, slot
        self.target = img_shapes[0][0] * img_shapes[0][1]
        self.references, self.begun = sum(h * w for h, w in img_shapes[1:]), 0
        self.img_tokens = self.references + self.target
        rope = make_rope(img_shapes, txt_tokens, config.axes_dims_rope, network.device)
        order = [slice(self.target, None), slice(None, self.target)]  # references first here, the target first there
        self.cos = torch.cat([*(rope.img_cos[part] for part in order), rope.txt_cos])
        self.sin = torch.cat([*(rope.img_sin[part] for part in order), rope.txt_sin])
        self.heads = (3, config.num_attention_heads, config.attention_head_dim)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=network.dtype, device=network.device)

        self.table: Mods | None = None
        self.latents = empty(self.target, config.in_channels)
        self.reference_rows, self.txt_rows = empty(self.references, config.dim), empty(txt_tokens, config.dim)
        self.mods, self.final = empty(config.num_layers, 3, 6, config.dim), empty(2, config.dim)
        reused = self.references if network.reuse_reference else 0
        keeps_codes = network.attention == "int8" and network.keeps_codes
        self.kept_codes = network.kept_codes(reused, slot) if keeps_codes else None
        self.kept = network.kept_rows(reused, slot) if reused and not keeps_codes else None
        self.later_skips = reused  # so many tokens of the references a later step has not to go through
        self.holds_kept = False
        # outside of the graphs' pool, which is whole again whenever one is captured
        self.drawn = empty(self.target, network.edges.proj_out.out_features)
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def begin(self, txt: Tensor, references: Tensor, mods: Mods) -> None:
        """The next picture. txt (1, T, C), references (1, R, 64)."""
        edges = self.network.edges
        assert references.shape[1] == self.references, "img_shapes must cover every reference token"
        self.reference_rows.copy_(edges.img_in(references[0]))
        self.txt_rows.copy_(edges.txt_in(edges.txt_norm(txt[0])))
        self.table, self.holds_kept, self.begun = mods, False, self.begun + 1

    def end(self) -> None:
        """The picture is drawn. Of 40 steps a table is 266 MB at true size, and shapes are kept longer than schedules."""
        self.table = None

    def step(self, latents: Tensor, row: int) -> Tensor:
        """The velocity (1, target, 64) of latents (1, target, 64), at the table's timestep number `row`."""
        self.feed(latents, row)
        reuses = self.holds_kept
        # a shape that comes again may come often: then what it takes to capture it is paid back
        if reuses not in self.graphs and self.network.uses_graphs and self.begun > 1:
            self.graphs[reuses] = self._capture(reuses)
        if reuses in self.graphs:
            self.graphs[reuses].replay()
            velocity = self.drawn.clone()
        else:
            # a pass that will be recorded has its memory from one stream's pool until then
            velocity = self._forward(reuses, None if self.network.uses_graphs else self._side)
        self.end_step()
        return velocity[None]

    def feed(self, latents: Tensor, row: int) -> None:
        """What a step reads: as step's."""
        assert self.table is not None
        self.latents.copy_(latents[0])
        self.mods.copy_(self.table.blocks[row], non_blocking=True)
        self.final.copy_(self.table.final[row], non_blocking=True)

    def end_step(self) -> None:
        self.holds_kept = self.kept is not None or self.kept_codes is not None

    def _capture(self, reuses: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._forward(reuses, None)  # what is compiled, tuned or allocated at first use cannot be while a graph is captured
        torch.cuda.synchronize(self.network.device)
        self.network.open_pool()
        try:
            with recording(graph, self.network.graph_pool, self.network.capturing):
                self.drawn.copy_(self._forward(reuses, self._side))
        except BaseException:  # their pool takes no more
            self.network.forget()
            raise
        return graph

    @property
    def _side(self) -> torch.cuda.Stream | None:
        return self.network.side if self.network.overlaps_text else None

    def _forward(self, reuses: bool, side: torch.cuda.Stream | None) -> Tensor:
        """(target, 64) of what the buffers hold."""
        return self.network.run([self._go(reuses, side)], side)[0]

    def go(self, side: torch.cuda.Stream | None) -> Pass:
        """A step of what the buffers hold, for FastMMDiT.run; side: as there."""
        return self._go(self.holds_kept, side)

    def _go(self, reuses: bool, side: torch.cuda.Stream | None) -> Pass:
        """Goes on with a block each time it is asked. side: runs the text's small products beside the pictures' large ones.

        The two meet where tokens attend to one another: there the current stream waits for the side. The side waits for it where
        a block begins and after attention, so that what it reads has been written, and what it writes nobody reads any more.
        """
        network, kept = self.network, self.later_skips if reuses else 0
        x = torch.cat([self.reference_rows[kept:], network.edges.img_in(self.latents)])
        img = Part(x, (self.references - kept, len(x)))
        txt = Part(self.txt_rows.clone(), (0, 0))
        attended = txt.x
        for number, block in enumerate(network.blocks[:-1]):
            yield
            joint = self._project(number, img, txt, kept, side)
            # until here the side may have read the last block's: memory that is let go goes to the next who asks
            attended = self._attend(number, joint, slice(kept, kept + len(img.x) + len(txt.x)), reuses)
            del joint
            _fork(side)
            with torch.cuda.stream(side):
                self._finish_block(number, block.txt, txt, attended[len(img.x) :])
            self._finish_block(number, block.img, img, attended[: len(img.x)])
        yield
        joint = self._project(len(network.blocks) - 1, img, txt, kept, side)
        return self._draw(joint, img.x[len(img.x) - self.target :], reuses)

    def _project(self, number: int, img: Part, txt: Part, kept: int, side: torch.cuda.Stream | None) -> Tensor:
        """Queries, keys and values of a block (S, 3, H, d), raw.

        Its first `kept` rows have keys and values of an earlier step; where their codes were kept, it begins after them.
        """
        block = self.network.blocks[number]
        kept = 0 if self.kept is None else kept
        shape = (kept + len(img.x) + len(txt.x), block.img.qkv.out_features)
        joint = torch.empty(shape, dtype=self.network.dtype, device=self.network.device)
        first_txt = kept + len(img.x)
        with _joined(side):
            with torch.cuda.stream(side):
                self._project_part(number, block.txt, txt, joint[first_txt:])
            self._project_part(number, block.img, img, joint[kept:first_txt])
        joint = joint.unflatten(1, self.heads)
        if self.kept is not None and kept:
            _copy_rows(joint[:kept, 1:], self.kept[number])
        return joint

    def _project_part(self, number: int, half: Half, part: Part, out: Tensor) -> None:
        kernels, linear = self.network.kernels, half.qkv
        shift, scale, *_ = self.mods[number].unbind(1)
        if part.update is None:
            rows = kernels.norm_modulate(part.x, shift, scale, part.bounds, linear.code, linear.group)
        else:
            gate = self.mods[number - 1, :, 5]
            rows = kernels.add_gated_norm_modulate(part.x, part.update, gate, shift, scale, part.bounds, linear.code, linear.group)
            part.update = None
        linear.matmul(*rows, out)

    def _attend(self, number: int, joint: Tensor, queries: slice, reuses: bool) -> Tensor:
        """Attention of the tokens `queries` of joint (S, 3, H, d) over all, (Q, H d). Norms and turns what is raw."""
        network, qk_norms, kept = self.network, self.network.blocks[number].qk_norms, self.later_skips if reuses else 0
        if self.kept_codes is not None and reuses:
            rows = slice(queries.start - kept, queries.stop - kept)
            out, codes = self._make_room(joint, queries), self.kept_codes.layer(number)
            later = self.cos[kept:], self.sin[kept:], self.img_tokens - kept, rows
            return network.int8_attention.attend_kept_int8(joint, qk_norms, *later, out, codes)
        if network.attention == "int8":
            layer = None if self.kept_codes is None else self.kept_codes.layer(number)
            out, place = self._make_room(joint, queries), (self.cos, self.sin, self.img_tokens, kept, queries)
            attended = network.int8_attention.attend_normed_int8(joint, qk_norms, *place, out, kept=layer)
        else:
            network.kernels.qk_norm_rope(joint[kept:], qk_norms, self.cos[kept:], self.sin[kept:], self.img_tokens - kept)
            attended = attend(joint[queries, 0], joint[:, 1], joint[:, 2], network.attention)
        if self.kept is not None and not reuses:
            _copy_rows(self.kept[number], joint[: self.references, 1:])
        return attended

    def _make_room(self, joint: Tensor, queries: slice) -> Tensor:
        """For what attention gives: (Q, H d)."""
        return torch.empty((queries.stop - queries.start, self.heads[1] * self.heads[2]), dtype=joint.dtype, device=joint.device)

    def _finish_block(self, number: int, half: Half, part: Part, attended: Tensor) -> None:
        """What comes after attention. What the MLP adds becomes the part's update."""
        kernels = self.network.kernels
        _, _, gate, shift, scale, _ = self.mods[number].unbind(1)
        made = _multiply(half.out, kernels.quantize_rows(attended, half.out.code, half.out.group), part)
        rows = kernels.add_gated_norm_modulate(part.x, made, gate, shift, scale, part.bounds, half.up.code, half.up.group)
        hidden = kernels.gelu_rows(_multiply(half.up, rows, part), half.down.code, half.down.group)
        part.update = _multiply(half.down, hidden, part)

    def _draw(self, joint: Tensor, x: Tensor, reuses: bool) -> Tensor:
        """The last block from its attention on, for the target alone; then the velocity (target, 64). x (target, D)."""
        network, last = self.network, len(self.network.blocks) - 1
        part = Part(x, (0, self.target))
        attended = self._attend(last, joint, slice(self.references, self.img_tokens), reuses)
        self._finish_block(last, network.blocks[-1].img, part, attended)
        assert part.update is not None
        return self._finish(part.x, part.update)

    def _finish(self, x: Tensor, update: Tensor) -> Tensor:
        # one segment alone, and here the scale comes first
        gate, scale, shift = (vector.expand(3, -1) for vector in (self.mods[-1, 1, 5], *self.final))
        rows = self.network.kernels.add_gated_norm_modulate(x, update, gate, shift, scale, (0, len(x)), "bf16")
        velocity: Tensor = self.network.edges.proj_out(rows.values)
        return velocity


def _multiply(linear: RowLinear, rows: Rows, part: Part) -> Tensor:
    """rows (M, K) -> (M, N), in the dtype of the part's stream."""
    out = torch.empty((len(rows.values), linear.out_features), dtype=part.x.dtype, device=part.x.device)
    return linear.matmul(*rows, out)


def _copy_rows(to: Tensor, rows: Tensor) -> None:
    """Both (M, 2, H, d), each row in one piece. As the longest numbers that torch has: rows apart it copies one by one."""
    long = torch.complex128
    to.flatten(1).view(long).copy_(rows.flatten(1).view(long))


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Exact) -> Tensor:
    """q (M, H, d), k and v (S, H, d) -> (M, H d)."""
    attended = _EXACT[backend](*(x.transpose(0, 1)[None] for x in (q, k, v)))
    return attended[0].transpose(0, 1).flatten(1)
