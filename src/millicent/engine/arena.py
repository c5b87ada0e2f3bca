"""Where the layers of two networks lie that are on the card in turn: one piece of its memory, in bytes from its beginning.

The transformer's stand at its beginning and the text encoder's at its end, and where both together are longer than the arena they
overlap. What does not fit even alone comes through a ring of slots. Pure: sizes in, places out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

RING_SLOTS = 2


@dataclass(frozen=True, slots=True)
class Places:
    """Where one network's layers lie in the arena, in bytes from its beginning.

    begins: of each layer, None for one that is streamed. slots: of its ring, none where nothing is streamed. begin, end: of all of
    it, the ring included.
    """

    begins: tuple[int | None, ...]
    slots: tuple[int, ...]
    begin: int
    end: int


def lay_out_arena(
    blocks: Sequence[int], encoder_sizes: Sequence[int], resident_blocks: int, resident_encoder_layers: int, arena_bytes: int
) -> tuple[Places, Places]:
    """The transformer's layers from the arena's beginning, and the text encoder's from its end; both networks' sizes are in bytes.

    Between them lie their rings, which keep nothing from one pass to the next: so they overlap first.
    """
    drawing, reading = _line_up(blocks, resident_blocks), _line_up(encoder_sizes, resident_encoder_layers)
    slot = _slot_bytes(encoder_sizes, resident_encoder_layers)
    shift = arena_bytes - reading.end
    assert max(drawing.end, reading.end) <= arena_bytes, (drawing.end, reading.end, arena_bytes)
    first = shift + len(reading.slots) * slot
    return drawing, Places(
        begins=tuple(None if begin is None else first + begin for begin in reading.begins),
        slots=tuple(shift + number * slot for number in range(len(reading.slots))),
        begin=shift,
        end=arena_bytes,
    )


def _line_up(layer_sizes: Sequence[int], resident: int) -> Places:
    """The layers that stay, one after another from 0 on, and then the ring."""
    stays, slot = spread(len(layer_sizes), resident), _slot_bytes(layer_sizes, resident)
    ends = list(accumulate((size if here else 0 for size, here in zip(layer_sizes, stays, strict=True)), initial=0))
    slots = tuple(ends[-1] + number * slot for number in range(RING_SLOTS)) if slot else ()
    begins = tuple(begin if here else None for begin, here in zip(ends[:-1], stays, strict=True))
    return Places(begins=begins, slots=slots, begin=0, end=ends[-1] + len(slots) * slot)


def _slot_bytes(layer_sizes: Sequence[int], resident: int) -> int:
    """The largest layer's that is streamed; 0 where none is."""
    stays = spread(len(layer_sizes), resident)
    return max((size for size, here in zip(layer_sizes, stays, strict=True) if not here), default=0)


def spread(count: int, resident: int) -> tuple[bool, ...]:
    """Which of so many layers are resident: the others come evenly among them, each as late as it may.

    Then the ring is filled while layers run that are here.
    """
    streamed = count - resident
    comes = {-(-(number + 1) * count // streamed) - 1 for number in range(streamed)}
    return tuple(number not in comes for number in range(count))


def count_resident(layer_sizes: Sequence[int], arena_bytes: int) -> int:
    """As many layers as fit: all, or some beside a ring for the others. With a ring alone it is 0."""
    return next((n for n in range(len(layer_sizes), 0, -1) if _line_up(layer_sizes, n).end <= arena_bytes), 0)


def streamed_bytes(layer_sizes: Sequence[int], stays: Sequence[bool]) -> int:
    return sum(size for size, here in zip(layer_sizes, stays, strict=True) if not here)


def overlapped_bytes(layer_sizes: Sequence[int], places: Places, others: Places) -> int:
    """Of one network's layers that the other's places are written over: they are copied again when the network is needed."""
    return sum(
        size
        for size, begin in zip(layer_sizes, places.begins, strict=True)
        if begin is not None and begin < others.end and others.begin < begin + size
    )
