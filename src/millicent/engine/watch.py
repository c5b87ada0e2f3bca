"""When the stages of an edit begin and end, and telling of them.

On a card a point in time is an event between its work, so that the host need not wait to have one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from millicent.edits import OnProgress, Progress, Stage, Timings

Mark = float | torch.cuda.Event  # a point in time, of the host or of a card's stream


def mark(stream: torch.cuda.Stream | None) -> Mark:
    """Now on the host, or where all work that the stream was given so far ends."""
    if stream is None:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """Called after the end has come."""
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return float(begin.elapsed_time(end)) / 1000
    assert not isinstance(end, torch.cuda.Event)
    return end - begin


class Watch:
    """Times the stages of one edit, and tells of each step.

    Who is told of progress is told when a stage has ended: the host waits for the card there. With nobody to tell, it goes on to
    the next stage meanwhile.
    """

    def __init__(self, on_progress: OnProgress | None, device: torch.device) -> None:
        self._on_progress = on_progress
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._spans: dict[Stage, tuple[Mark, Mark]] = {}

    @contextmanager
    def stage(self, stage: Stage, steps: int = 1) -> Iterator[Callable[[int, int], None]]:
        """Yields what to call before each step, where there are several; a stage of one step is told here."""
        begin = mark(self._stream)
        if stage in ("prepare", "encode"):
            self._tell(stage, 0, steps)
        yield lambda step, of: self._tell(stage, step, of)
        if self._on_progress is not None and self._stream is not None:
            self._stream.synchronize()
        self._spans[stage] = begin, mark(self._stream)
        self._tell(stage, steps, steps)

    def timings(self) -> Timings:
        """Of all four stages; waits for their end."""
        if self._stream is not None:
            self._stream.synchronize()
        return Timings(**{f"{stage}_s": seconds_between(*span) for stage, span in self._spans.items()})

    def _tell(self, stage: Stage, step: int, steps: int) -> None:
        if self._on_progress is not None:
            self._on_progress(Progress(stage, step, steps))
