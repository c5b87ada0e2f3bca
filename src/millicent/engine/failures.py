"""What goes wrong in the middle of an edit: told as an error of the machine, with what would run, and cleaned up after.

PyTorch, cuBLAS, cuDNN, CUDA graphs and Triton each have their own way to say that memory or a compiler is missing. They are
told apart by class where there is one, and else by the words that the libraries use.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch

from millicent.engine.fast_vae import CapturedVAE
from millicent.engine.loading import Model, current
from millicent.engine.planner import FORMAT_BYTES, TENSOR_CORES, Capability
from millicent.engine.settings import Format
from millicent.errors import MachineError, MillicentError

# the CUDA runtime's, the driver's, Triton's, which loads its kernels by itself, cuBLAS's and cuDNN's words; and PyTorch's where it
# would have told that memory ran out, and the driver does not say of whom, as for a slice of a card (pytorch issue 112377)
_MEMORY_WORDS = (
    "Triton Error [CUDA]: out of memory",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)
_NO_COMPILER = "Failed to find C compiler"  # triton/runtime/build.py


@dataclass(frozen=True, slots=True)
class Place:
    """What an edit ran on and with. capability: None for a CPU. format: of the transformer's blocks; None for the plain network."""

    card: str
    capability: Capability | None
    format: Format | None

    @classmethod
    def of(cls, model: Model) -> Self:
        chosen = None if model.fast is None else model.fast.plan.format
        if model.device.type != "cuda":
            return cls("this CPU", None, chosen)
        found = torch.cuda.get_device_properties(model.device)
        return cls(f"{found.name} ({found.total_memory / 2**30:.0f} GiB)", (found.major, found.minor), chosen)

    @property
    def others(self) -> list[Format]:
        """The other formats that would run here."""
        runs = [name for name, cards in TENSOR_CORES.items() if self.capability is None or self.capability in cards]
        return [name for name in runs if name != self.format]

    @property
    def smaller(self) -> list[Format]:
        """Those of them with fewer bytes for a weight."""
        return [name for name in self.others if FORMAT_BYTES[name] < FORMAT_BYTES[self.format or "bf16"]]


@contextmanager
def guarded(model: Model) -> Iterator[None]:
    """An edit, or a part of one, on the model. Where it fails for want of memory or of a kernel, the model can be used again.

    Raises MachineError for those; other errors pass. After either kind of failure everything that was kept for later edits is
    dropped, and all work on the card has ended. The model's card is the current one within.
    """
    outside = torch.cuda.current_stream(model.device) if model.device.type == "cuda" else None
    handled = sys.exception()  # an edit may be tried again where the failure of one is handled
    try:
        with current(model.device):
            yield
    except Exception as error:
        told = explain(error, Place.of(model), handled)
        if told is None:
            raise
        recover(model, error, outside)
        if told is error:
            raise
        raise told from error


@contextmanager
def alone(model: Model) -> Iterator[None]:
    """An edit between two results of edit_many, whose streams it shares buffers with: none works before, nor after a failure."""
    wait = functools.partial(torch.cuda.synchronize, model.device) if model.device.type == "cuda" else (lambda: None)
    wait()
    try:
        yield
    except BaseException:
        wait()
        raise


def explain(error: BaseException, place: Place, handled: BaseException | None = None) -> MillicentError | None:
    """The error as a user should read it; None for what is neither memory's nor a kernel's failure.

    handled: what was being handled before, which is no part of this failure although Python links the two.
    """
    if isinstance(error, MillicentError):
        return error if is_out_of_memory(error, handled) else None
    if is_out_of_memory(error, handled):
        return _tell_memory(place)
    kernels = [cause for cause in _chain(error, handled) if _is_of_triton(cause)]
    return _tell_kernel(kernels[0], place) if kernels else None


def is_out_of_memory(error: BaseException, handled: BaseException | None = None) -> bool:
    """Whether it, or what it came from or came up beside, is a want of the card's memory. handled: as of `explain`.

    Ending a capture that has failed raises an error of its own, with the first one as its context.
    """
    return any(
        isinstance(cause, torch.OutOfMemoryError) or (isinstance(cause, RuntimeError) and _says(cause, *_MEMORY_WORDS))
        for cause in _chain(error, handled)
    )


def keeps_something(model: Model) -> bool:
    """Of the device's memory, for edits that are like earlier ones; what `recover` drops."""
    return model.fast is not None and model.fast.network.keeps_drawings


def recover(model: Model, error: BaseException, outside: torch.cuda.Stream | None) -> None:
    """Drop what was kept for later edits, and what the failed one left.

    outside: the stream that was current before.
    """
    with current(model.device):
        _recover(model, error, outside)


def _recover(model: Model, error: BaseException, outside: torch.cuda.Stream | None) -> None:
    if outside is not None:
        torch.cuda.set_stream(outside)
        torch.cuda.synchronize(model.device)  # other streams may still read what goes now
    for cause in _chain(error, None):
        traceback.clear_frames(cause.__traceback__)  # or the error would hold every tensor of the edit
    if model.fast is not None:
        model.fast.network.forget()
        model.fast.modulation.forget()
    if model.reader is not None:
        model.reader.clear()
    if model.latents is not None:
        model.latents.clear()
    if isinstance(model.vae, CapturedVAE):
        model.vae.clear()
    if outside is not None:
        torch.cuda.empty_cache()


def _chain(error: BaseException, handled: BaseException | None) -> Iterator[BaseException]:
    """The error, its causes and its contexts, each once, without `handled` and what lies behind it."""
    seen: set[int] = {id(handled)}
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield found
            waiting += [found.__context__, found.__cause__]


def _says(error: BaseException, *words: str) -> bool:
    text = str(error)
    return any(word in text for word in words)


def _is_of_triton(error: BaseException) -> bool:
    # by name, as an install for a CPU has no Triton to import; its launcher is built by the machine's C compiler
    ours = any(kind.__module__.partition(".")[0] == "triton" for kind in type(error).__mro__)
    return ours or (isinstance(error, RuntimeError) and _says(error, _NO_COMPILER)) or _is_of_compiler(error)


def _is_of_compiler(error: BaseException) -> bool:
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, subprocess.CalledProcessError) and any(name.startswith("triton.") for name in frames)


def _tell_memory(place: Place) -> MachineError:
    drawn = "the plain network" if place.format is None else place.format
    fixes = [f"use --format {' or '.join(place.smaller)}"] if place.smaller else []
    fix = ", ".join([*fixes, "draw a smaller picture", "give fewer references"])
    return MachineError(
        f"The memory of {place.card} is too small for this edit with {drawn}, beside what else is in it.",
        f"{fix[0].upper()}{fix[1:]}, or free memory that other programs hold.",
    )


def _tell_kernel(error: BaseException, place: Place) -> MachineError:
    if _says(error, _NO_COMPILER):
        return MachineError(
            f"Our kernels for {place.card} need a C compiler, and this machine has none.",
            "Install one (apt-get install gcc), or name one in CC; or draw without kernels, with --plain.",
        )
    if _is_of_compiler(error):
        return MachineError(
            f"Our kernels for {place.card} could not be built: the C compiler failed.",
            "Install Python's headers (apt-get install python3-dev); or draw without kernels, with --plain.",
        )
    said = next((line.strip() for line in str(error).splitlines()[::-1] if line.strip()), "it does not say why")
    capability = "" if place.capability is None else ", compute capability {}.{}".format(*place.capability)
    return MachineError(
        f"A kernel for {place.format or 'the plain network'} does not run on {place.card}{capability}: "
        f"{type(error).__name__}: {said}",
        f"Use --format {' or '.join(place.others)}, or draw without kernels, with --plain.",
    )
