"""The layers of a network whose weights do not all stay on the card: from page-locked slabs on the host to one arena there.

A layer's tensors lie one after another in its slab, as they lie on the card, so that it comes with one copy. Some layers have a
place of their own in the arena, and are copied again only when another network's have been written over them. The others come
through a ring of slots in every pass: what a slot held has been read when the next layer is written to it, and has come when it is
read. Both waits are events between two streams of the card; the host waits for nothing.

    copy stream   | layer 3 -> slot 0 | layer 5 -> slot 1 |        | layer 7 -> slot 0 |
    the current   |   layers 0 1 2    |      layer 3      | layer 4 | layer 5 | layer 6 | ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from millicent.engine.arena import Places
from millicent.model.sizes import ALIGNMENT_BYTES

Views = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Field:
    """A tensor of a layer: the dict of its module that names it, and where it lies in the layer's slab."""

    home: dict[str, Tensor | None]
    name: str
    shape: torch.Size
    dtype: torch.dtype
    is_parameter: bool
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.shape.numel() * self.dtype.itemsize


def _list_fields(module: nn.Module) -> list[_Field]:
    fields: list[_Field] = []
    for part in module.modules():
        for home, is_parameter in ((part._parameters, True), (part._buffers, False)):
            for name, tensor in home.items():
                if tensor is not None:
                    begin = _aligned(fields[-1].end) if fields else 0
                    fields.append(_Field(home, name, tensor.shape, tensor.dtype, is_parameter, begin))  # type: ignore[arg-type]
    return fields


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def slab_bytes(module: nn.Module) -> int:
    """Of a layer's tensors, one after another; they may lie anywhere, on the meta device too."""
    return _aligned(_list_fields(module)[-1].end)


class Layer:
    """A module whose tensors have a slab on the host.

    host: (size_bytes,) uint8. begin: of its place in the arena, None for a layer that is streamed. is_here: whether that place
    holds it, or will once what is on the copy stream is done. arrived: when the last copy to the card ends; None on a CPU.
    """

    def __init__(self, module: nn.Module, host: Tensor, device: torch.device) -> None:
        self.host = host
        self.size_bytes = len(host)
        self.begin: int | None = None
        self.is_here = False
        self.arrived = torch.cuda.Event() if device.type == "cuda" else None
        self._fields = _list_fields(module)

    def fill(self) -> None:
        """Write the slab from where the module's tensors lie. On a card nothing is waited for."""
        for field, view in zip(self._fields, self.cut(self.host), strict=True):
            tensor = field.home[field.name]
            assert tensor is not None
            view.copy_(tensor, non_blocking=True)

    def cut(self, place: Tensor) -> Views:
        """Tensors like the module's own, on size_bytes of memory."""
        views = []
        for field in self._fields:
            view = place[field.begin : field.end].view(field.dtype).view(field.shape)
            views.append(nn.Parameter(view, requires_grad=False) if field.is_parameter else view)
        return tuple(views)

    def bind(self, views: Views) -> None:
        """Let the module read these from now on."""
        for field, view in zip(self._fields, views, strict=True):
            field.home[field.name] = view


class Link:
    """Copies from the host to the card on a stream of its own. copied_bytes: how much since it was made.

    delay: given a copy's bytes, holds up the copy stream after it, as a slower link would; None for none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.copied_bytes = 0
        self.delay: Callable[[int], None] | None = None

    def follow(self) -> None:
        """What is copied next is copied after all work that the current stream has now."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def send(self, layer: Layer, place: Tensor) -> None:
        """Copy a layer's slab to its size of memory on the card; layer.arrived tells when it is there."""
        self.copied_bytes += layer.size_bytes
        if self.stream is None:
            place.copy_(layer.host)
            return
        with torch.cuda.stream(self.stream):
            place.copy_(layer.host, non_blocking=True)
            if self.delay is not None:
                self.delay(layer.size_bytes)
            assert layer.arrived is not None
            layer.arrived.record(self.stream)


class Stack:
    """The layers of one network, in the order in which a pass runs them. For one thread, on one stream at a time.

    wraps: after the last layer comes the first again, whose copy may begin. bring: makes the arena the stack's; called where a
    layer is to run and another stack has had the arena since. stays: all layers are on the card for good; nothing is waited for,
    so that passes can be recorded.
    """

    def __init__(self, link: Link, *, wraps: bool, bring: Callable[[], None]) -> None:
        self.layers: list[Layer] = []
        self.is_here = False
        self.stays = False
        self._link, self._wraps, self._bring = link, wraps, bring
        self._places: Places | None = None
        self._slots: tuple[Tensor, ...] = ()
        self._cut: Mapping[int, tuple[Views, ...]] = {}
        self._streamed: list[int] = []
        # (layer, slot) on the card or on their way, the next to run first
        self._ring: deque[tuple[int, int]] = deque()

    @property
    def places(self) -> Places:
        assert self._places is not None, "not settled"
        return self._places

    @property
    def size_bytes(self) -> int:
        return sum(layer.size_bytes for layer in self.layers)

    def settle(self, arena: Tensor, places: Places) -> None:
        """Give every layer its place in the arena; none is there yet."""
        self._places = places
        self._streamed = [number for number, begin in enumerate(places.begins) if begin is None]
        largest = max((self.layers[number].size_bytes for number in self._streamed), default=0)
        self._slots = tuple(arena[begin : begin + largest] for begin in places.slots)
        for layer, begin in zip(self.layers, places.begins, strict=True):
            layer.begin, layer.is_here = begin, False
            if begin is not None:
                layer.bind(layer.cut(self._place(layer, arena)))
        self._cut = {number: tuple(self.layers[number].cut(slot) for slot in self._slots) for number in self._streamed}
        self._ring.clear()
        self.is_here = False

    def leave_arena(self) -> None:
        """Let go of the arena: the modules read from the host until the stack is settled again."""
        self._slots, self._cut, self.stays, self.is_here = (), {}, False, False
        for layer in self.layers:
            layer.bind(layer.cut(layer.host))

    def _place(self, layer: Layer, arena: Tensor) -> Tensor:
        assert layer.begin is not None
        return arena[layer.begin : layer.begin + layer.size_bytes]

    def lose(self, others: Places) -> None:
        """Another stack's layers come to their places."""
        self.is_here = False
        self._ring.clear()
        for layer in self.layers:
            if layer.begin is not None and layer.begin < others.end and others.begin < layer.begin + layer.size_bytes:
                layer.is_here = False

    def fetch(self, arena: Tensor) -> None:
        """Bring what is not here, in the order in which it runs; the current stream may go on meanwhile."""
        self._ring.clear()  # of a fetch that was interrupted
        self._link.follow()
        first = self._streamed[: len(self._slots)]
        for number, layer in enumerate(self.layers):
            if number in first:
                self._send_to_slot(number, len(self._ring))
            elif layer.begin is not None and not layer.is_here:
                self._link.send(layer, self._place(layer, arena))
                layer.is_here = True
        self.is_here = True

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """A layer's weights are on the card for what the current stream is given within."""
        self.arrive(number)
        yield
        self.leave(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """All layers are on the card for what is done within, and none is waited for, so that passes can be recorded.

        For a stack of which nothing is streamed.
        """
        assert not self._streamed
        if self.stays:
            yield
            return
        if not self.is_here:
            self._bring()
        for layer in self.layers:
            self._wait_for(layer)
        self.stays = True
        try:
            yield
        finally:
            self.stays = False

    def arrive(self, number: int) -> None:
        """What the current stream is given from here on finds the layer's weights on the card."""
        if self.stays:
            return
        if not self.is_here:
            self._bring()
            if self.stays:
                return
        layer = self.layers[number]
        if layer.begin is None:
            if not self._ring or self._ring[0][0] != number:  # a pass was broken off, or begins in the middle
                self._refill(number)
            layer.bind(self._cut[number][self._ring[0][1]])
        self._wait_for(layer)

    def _wait_for(self, layer: Layer) -> None:
        if layer.arrived is not None:
            torch.cuda.current_stream(self._link.device).wait_event(layer.arrived)

    def leave(self, number: int) -> None:
        """What the current stream is given from here on does not need the layer's weights."""
        if self.layers[number].begin is not None:
            return
        slot = self._ring.popleft()[1]
        following = self._following(self._ring[-1][0] if self._ring else number)
        if following is not None:
            self._link.follow()  # what the slot holds has been read by then
            self._send_to_slot(following, slot)

    def _following(self, number: int) -> int | None:
        """The streamed layer after one of them."""
        place = self._streamed.index(number) + 1
        if place < len(self._streamed):
            return self._streamed[place]
        return self._streamed[0] if self._wraps else None

    def _refill(self, number: int) -> None:
        self._ring.clear()
        self._link.follow()
        following: int | None = number
        for slot in range(len(self._slots)):
            if following is not None:
                self._send_to_slot(following, slot)
                following = self._following(following)

    def _send_to_slot(self, number: int, slot: int) -> None:
        layer = self.layers[number]
        self._link.send(layer, self._slots[slot][: layer.size_bytes])
        self._ring.append((number, slot))


class ArrivingLayers(nn.ModuleList):
    """A network's list of layers: each is on the card while a loop over the list has it, and may go when the loop goes on.

    first: the number of the first of them in the stack.
    """

    def __init__(self, layers: Sequence[nn.Module], stack: Stack, first: int) -> None:
        super().__init__(layers)
        self._stack, self._first = stack, first

    def __iter__(self) -> Iterator[nn.Module]:
        for number, layer in enumerate(super().__iter__()):
            with self._stack.at(self._first + number):
                yield layer
