"""When an edit runs out of the card's memory: once more, with less of the model there."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from millicent.edits import EditRequest
from millicent.engine.failures import is_out_of_memory
from millicent.engine.fitting import carry_out, free_bytes, sizes_of, weigh_model
from millicent.engine.loading import Model
from millicent.engine.pipeline import weigh_request
from millicent.engine.placement import Placement, place
from millicent.engine.residency import Residency
from millicent.errors import MachineError, MillicentError
from millicent.hardware.memory import free_host_bytes

T = TypeVar("T")
_LOG = logging.getLogger("millicent")
# less than that would soon be asked for again
_STEP_BYTES = 1 << 30


def once_more(model: Model, request: EditRequest, work: Callable[[], T]) -> T:
    """Do a request's work again that has failed for want of memory beside what is gone now; then with less of the model."""
    handled = sys.exception()  # the first failure
    _LOG.info("The card's memory ran out. What earlier edits left there is gone now, and this is done once more.")
    try:
        return work()
    except MillicentError as error:
        if not is_out_of_memory(error, handled):
            raise
        return once_more_with_less(model, request, error, work)


def once_more_with_less(model: Model, request: EditRequest, error: MillicentError, work: Callable[[], T]) -> T:
    """Do a request's work again that has failed for want of the card's memory, with less of the model there. The log says so.

    Where that is not enough the former placement comes back, and the second error is raised; where nothing can go, the first.
    """
    residency = model.residency
    lower = None if residency is None else _lower(model, residency, request)
    if residency is None or lower is None:
        raise error
    before = residency.placement
    _LOG.debug("%s", error.__cause__)  # PyTorch's own numbers
    _LOG.warning("%s Now %s; the edit is drawn again.", error.message, lower.because)
    if (failure := _carry_out(model, lower)) is not None:
        raise error from failure
    try:
        return work()
    except MillicentError as again:
        if is_out_of_memory(again, error):
            _go_back(model, before, lower)
        raise


def _carry_out(model: Model, placement: Placement) -> Exception | None:
    """The failure, where another program has taken memory meanwhile, or the host lacks what is to wait there."""
    handled = sys.exception()
    try:
        carry_out(model, placement)
    except (RuntimeError, MachineError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error, handled):
            raise
        return error
    return None


def _go_back(model: Model, before: Placement, lower: Placement) -> None:
    if _carry_out(model, before) is not None:  # what was given back has been taken by another program
        _carry_out(model, lower)  # the arena comes when it is next asked for


def _lower(model: Model, residency: Residency, request: EditRequest) -> Placement | None:
    """A placement for a request, with at least a gigabyte less of the weights on the card than now.

    None where the card or the host is too small for one.
    """
    assert model.fast is not None
    now = residency.placement
    parts = weigh_model(sizes_of(model), weigh_request(request, model), model.fast.plan, model.device)
    # what was recorded has gone already, so that to record less would give nothing
    taken = min(parts.resident, parts.beside() + now.arena_bytes) if now.in_turn else parts.resident
    free = free_bytes(model.device, residency.limit_bytes, torch.cuda.memory_allocated(model.device))
    left = min(free, taken) - _STEP_BYTES
    # slabs are written once: they are no new demand on the host; nor is what an open model has there already
    host = sys.maxsize if residency.has_slabs else free_host_bytes() + now.needed_host_bytes
    try:
        return place(parts, left, host)
    except MachineError:
        return None
