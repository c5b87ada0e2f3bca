"""Many edits where text encoder and transformer lie on the card in turn: a wave of them shares one exchange.

    encode 0, 1, 2 ... | bring the transformer | draw 0, decode 0 | draw 1, decode 1 | ... | bring the text encoder | encode ...

Where the transformer's blocks are streamed, a few are drawn together, so that each block comes once for all of them.

What each edit is told waits for its drawing on the host. All work is on one stream, where memory that one stage has given back
is taken again by the next. Neither exchange is seen here: whoever reads has the text encoder's weights brought, and whoever draws
the transformer's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from millicent.edits import EditRequest
from millicent.engine.caches import size_bytes
from millicent.engine.machine_plan import WAVE_HOST_SHARE
from millicent.engine.stream import Edit, Outcome, Stages, draw_stream
from millicent.hardware.memory import free_host_bytes


def draw_many(stages: Stages, requests: Iterable[EditRequest], ahead: int) -> Iterator[Outcome]:
    """All in order; in waves where weights are on the card in turn, also from the moment on when memory is found to be short.

    ahead: how many requests are being prepared beside the one that is encoded next, and of the next wave while one is drawn; at
    most a wave.
    """
    with stages.open():
        edits = stages.begin(requests, min(ahead, stages.wave) if stages.in_turn else ahead)
        left = None if stages.in_turn else (yield from draw_stream(stages, edits))
        stages.join_streams()
        encoded = deque[Edit]() if left is None else deque([left])
        while _fill_wave(stages, edits, encoded):
            yield from _draw_wave(stages, encoded)


def _draw_wave(stages: Stages, encoded: deque[Edit]) -> Iterator[Outcome]:
    """Each result comes once the next drawing has been given to the card; each edit is let go then. None are left."""
    last: Edit | None = None
    together = deque[Edit]()
    while encoded:
        together.extend(encoded.popleft() for _ in range(min(stages.abreast, len(encoded))))
        stages.attempt_together(together)
        while together:
            drawn = together.popleft()
            stages.attempt(drawn, stages.draw)
            if drawn.was_cut:
                together.clear()
                encoded.clear()
                break
            stages.attempt(drawn, stages.decode)
            if last is not None:
                yield stages.collect(last)
            last = drawn
    if last is not None:
        yield stages.collect(last)


def _fill_wave(stages: Stages, edits: Iterator[Edit], encoded: deque[Edit]) -> bool:
    """Encode the next edits, as many as make a wave and as the host has room for; one always. Whether there are any."""
    left_bytes, largest_bytes = int(WAVE_HOST_SHARE * free_host_bytes()), 0
    while not encoded or (len(encoded) < stages.wave and left_bytes >= largest_bytes):
        edit = next(edits, None)
        if edit is None:
            break
        stages.attempt(edit, stages.encode)
        encoded.append(edit)
        held_bytes = _held_bytes(edit)
        left_bytes, largest_bytes = left_bytes - held_bytes, max(largest_bytes, held_bytes)
    return bool(encoded)


def _held_bytes(edit: Edit) -> int:
    """Of the host's memory: the request's pictures, and what is told to the transformer."""
    pictures = sum(image.width * image.height * len(image.getbands()) for image in edit.request.images)
    told = edit.conditioning
    if told is None:
        return pictures
    return pictures + size_bytes(told.positive, told.references, *([] if told.negative is None else [told.negative]))
