"""Work made of many small kernels, recorded as CUDA graphs: one launch for all of them, of shapes that come again."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Work = Callable[..., Tensors]
Replay = Callable[..., Tensors]
Record = Callable[[Work, Tensors], Replay]

_ONE_AT_A_TIME = threading.RLock()
# keys that came once: a catalog's photos have some dozens of shapes
_KEYS_KNOWN = 64


class Replays:
    """Runs work, and from the second time that its key and its inputs' shapes come, replays a recording of it.

    record: makes a recording for inputs such as these. kept: how many recordings; the least recently used goes first.
    """

    def __init__(self, record: Record, kept: int) -> None:
        self.kept = kept
        self._record = record
        self._known: deque[Hashable] = deque(maxlen=_KEYS_KNOWN)
        self._recordings: OrderedDict[Hashable, Replay] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recordings)

    def clear(self) -> None:
        """Forget all recordings: what they read has moved, or their memory is needed."""
        self._recordings.clear()
        self._known.clear()

    def run(self, key: Hashable, work: Work, *inputs: Tensor) -> Tensors:
        """work(*inputs).

        key: says what the work does besides what its inputs' shapes and dtypes say. work: leaves its inputs as they are, and
        neither waits for the device nor copies from the host.
        Raises as `record` does where a recording does not fit into memory.
        """
        full_key = (key, tuple((value.shape, value.dtype) for value in inputs))
        if full_key in self._recordings:
            self._recordings.move_to_end(full_key)
        elif full_key in self._known:
            while len(self._recordings) >= self.kept:  # before recording, so that its memory is taken again
                self._recordings.popitem(last=False)
            try:
                self._recordings[full_key] = self._record(work, inputs)
            except BaseException:  # the pool of the others takes no more
                self.clear()
                raise
        else:
            # what comes again may come often: then what it takes to record it is paid back
            self._known.append(full_key)
            return work(*inputs)
        return self._recordings[full_key](*inputs)


@dataclass(frozen=True, slots=True)
class Graph:
    """One recorded piece of work: where it reads its inputs, and where it leaves its results; neither is in the graphs' pool.

    work: holds what the graph reads besides its inputs.
    """

    graph: torch.cuda.CUDAGraph
    work: Work
    fed: Tensors
    made: Tensors

    def __call__(self, *inputs: Tensor) -> Tensors:
        _put(self.fed, inputs)
        self.graph.replay()
        return tuple(result.clone() for result in self.made)


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What this thread gives the card within goes into a graph, on a stream of its own, with its memory in a pool.

    Other threads may go on using the card meanwhile; of ours one records at a time. No garbage is collected within: some of it
    waits for the card as it goes, and that ends a recording. After a failure the current stream is the former one again, and the
    pool takes no more recordings.
    """
    before = torch.cuda.current_stream()
    with _ONE_AT_A_TIME, _nothing_collected():
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            torch.cuda.set_stream(before)
            # where it could not be ended its pool is being filled for good, and PyTorch lets go of nothing that other streams used
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise


@contextmanager
def _nothing_collected() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class GraphRecorder:
    """Records work on one CUDA device, on a stream of its own.

    All graphs share one pool of memory, of which none keeps a piece: replay them from one thread, on one stream. So the pool is
    whole again whenever another is recorded, and is not cut up by results that stay while graphs come and go.
    """

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"
        self._device = device
        # kept for good: of each stream that ever was PyTorch's allocator keeps memory, and cuBLAS a workspace
        self._stream = torch.cuda.Stream(device)
        self.open_pool()

    def open_pool(self) -> None:
        """Record in another pool from now on: one takes no more once a recording has failed in it, or its last one has gone."""
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work, inputs: Tensors) -> Graph:
        """Raises RuntimeError where it does not fit into memory."""
        with torch.cuda.device(self._device):
            try:
                return self._capture(work, inputs)
            except BaseException:
                self.open_pool()
                raise

    def _capture(self, work: Work, inputs: Tensors) -> Graph:
        fed = _make_places(inputs, torch.contiguous_format)
        _put(fed, inputs)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = work(*fed)  # cuBLAS's workspace is the stream's own: made here, it is not in the pool
        made = _make_places(results, torch.preserve_format)
        del results
        self._stream.synchronize()
        torch.cuda.empty_cache()  # what that left is of no use to the recording, which allocates in its pool
        graph = torch.cuda.CUDAGraph()
        with recording(graph, self._pool, self._stream):
            _put(made, work(*fed))
        torch.cuda.current_stream().wait_stream(self._stream)
        return Graph(graph, work, fed, made)


@torch.inference_mode(False)  # they outlive the call that made them, and are written to by later ones
def _make_places(values: Tensors, memory_format: torch.memory_format) -> Tensors:
    return tuple(torch.empty_like(value, memory_format=memory_format) for value in values)


def _put(places: Tensors, values: Tensors) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
