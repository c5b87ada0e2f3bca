"""Failures in the middle of an edit: told as the machine's, and the editor goes on as if new."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import draw_picture

from millicent.edits import EditRequest
from millicent.engine import loading, pressure
from millicent.engine.editor import Editor
from millicent.engine.failures import Place, alone, explain, guarded, is_out_of_memory
from millicent.engine.settings import Settings
from millicent.engine.transformer import Drawing
from millicent.errors import InputError, MachineError, MillicentError

ADA = Place("NVIDIA GeForce RTX 4090 (24 GiB)", (8, 9), "fp8")
AMPERE = Place("NVIDIA GeForce RTX 3090 (24 GiB)", (8, 6), "bf16")
BLACKWELL = Place("NVIDIA GeForce RTX 5090 (32 GiB)", (12, 0), "fp8")
PLAIN = Place("NVIDIA H200 (140 GiB)", (9, 0), None)
REQUEST = EditRequest(images=(draw_picture(100, 150),), prompt="make it navy", seed=5, steps=2)

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1131, please report'),
]


def open_editor(folder: Path, **settings: Any) -> Editor:
    return Editor.open(folder, device="cpu", settings=Settings(**{"format": "fp8", **settings}))


def triton_error(name: str, said: str, module: str = "triton.compiler.errors") -> Exception:
    """As Triton's own, which an install for a CPU has not."""
    kind = type(name, (Exception,), {"__module__": module})
    return kind(said)  # type: ignore[no-any-return]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_a_want_of_memory_names_what_would_fit(error: Exception) -> None:
    told = explain(error, ADA)
    assert isinstance(told, MachineError)
    assert "RTX 4090 (24 GiB)" in told.message
    assert "with fp8" in told.message
    # nothing smaller than 8 bits runs on Ada
    assert "--format" not in told.fix
    assert "smaller picture" in told.fix
    blackwell, ampere, plain = (explain(error, place) for place in (BLACKWELL, AMPERE, PLAIN))
    assert blackwell is not None
    assert "--format nvfp4, " in blackwell.fix
    assert ampere is not None
    assert "--format int8 or int8-weight, " in ampere.fix
    assert plain is not None
    assert "the plain network" in plain.message
    assert "--format fp8 or int8" in plain.fix


def test_a_capture_that_broke_for_memory_is_found_by_its_context() -> None:
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert not is_out_of_memory(error)
    error.__context__ = torch.OutOfMemoryError()
    assert is_out_of_memory(error)
    assert isinstance(explain(error, ADA), MachineError)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (triton_error("CompilationError", "at 3:4:\n    x = tl.dot(a)\nmissing argument"), "CompilationError: missing argument"),
        (
            triton_error("OutOfResources", "out of resource: shared memory, Required: 2", "triton.runtime.errors"),
            "OutOfResources: out of resource: shared memory",
        ),
        (triton_error("PTXASError", "", "triton.runtime.errors"), "PTXASError: it does not say why"),
    ],
)
def test_a_kernel_that_does_not_compile_names_the_formats_that_may(error: Exception, said: str) -> None:
    told = explain(error, ADA)
    assert isinstance(told, MachineError)
    assert said in told.message
    assert "RTX 4090 (24 GiB), compute capability 8.9" in told.message
    assert "--format bf16 or int8 or int8-weight" in told.fix
    assert "--plain" in told.fix


def test_a_subclass_of_tritons_is_tritons() -> None:
    kind = type(triton_error("CompilationError", ""))
    assert explain(types.new_class("OurOwn", (kind,))("no"), ADA) is not None


def test_a_missing_compiler_is_told() -> None:
    told = explain(RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), ADA)
    assert isinstance(told, MachineError)
    assert "apt-get install gcc" in told.fix


def test_a_failing_compiler_is_told_when_triton_ran_it() -> None:
    error = subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"])
    assert explain(error, ADA) is None
    namespace: dict[str, Any] = {"__name__": "triton.runtime.build", "error": error}
    exec("def build():\n    raise error", namespace)
    with pytest.raises(subprocess.CalledProcessError):
        namespace["build"]()
    told = explain(error, ADA)
    assert isinstance(told, MachineError)
    assert "python3-dev" in told.fix


@pytest.mark.parametrize(
    "error", [ValueError("out of memory of what I said"), RuntimeError("shape mismatch"), InputError("no.", "yes."), KeyError("a")]
)
def test_other_errors_are_left_as_they_are(error: Exception) -> None:
    assert explain(error, ADA) is None


def test_what_was_handled_before_is_no_part_of_a_failure() -> None:
    """An edit tried again in an `except` has the first failure as its context."""
    first, second = torch.OutOfMemoryError(), ValueError("another")
    second.__context__ = first
    assert explain(second, ADA, handled=first) is None
    assert explain(second, ADA) is not None


def fail_once(monkeypatch: pytest.MonkeyPatch, error: Exception, at: int = 1) -> list[weakref.ref[torch.Tensor]]:
    """Drawing.step fails at its call number `at`; what it held then is returned."""
    step, calls, held = Drawing.step, [], []

    def failing(self: Drawing, latents: torch.Tensor, row: int) -> torch.Tensor:
        calls.append(row)
        if len(calls) == at + 1:
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise error
        return step(self, latents, row)

    monkeypatch.setattr(Drawing, "step", failing)
    return held


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("reuse_reference", [False, True])
def test_after_a_failure_the_editor_draws_as_a_fresh_one(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, reuse_reference: bool, at: int
) -> None:
    expected = open_editor(tiny_folder, reuse_reference=reuse_reference).edit(REQUEST).image.tobytes()
    editor = open_editor(tiny_folder, reuse_reference=reuse_reference)
    held = fail_once(monkeypatch, OUT_OF_MEMORY[0], at)
    with pytest.raises(MachineError, match="memory of this CPU is too small"):
        editor.edit(REQUEST)
    model = editor._model
    assert model.fast is not None
    assert model.reader is not None
    assert model.latents is not None
    assert not model.fast.network._drawings
    assert len(model.latents) == len(model.reader.pictures) == len(model.reader.openings) == len(model.reader.embeddings) == 0
    gc.collect()
    assert held[0]() is None
    assert editor.edit(REQUEST).image.tobytes() == expected


def test_memory_is_free_while_the_error_is_handled(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = open_editor(tiny_folder)
    held = fail_once(monkeypatch, OUT_OF_MEMORY[1])
    with pytest.raises(MachineError) as caught:
        editor.edit(REQUEST)
    assert isinstance(caught.value.__cause__, RuntimeError)
    # the error and its traceback are still held, as by a program that tells of it
    assert held[0]() is None


def test_a_second_try_from_where_the_first_is_handled_is_judged_by_itself(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = open_editor(tiny_folder)
    fail_once(monkeypatch, OUT_OF_MEMORY[1])
    try:
        editor.edit(REQUEST)
    except MachineError:
        kept = editor.edit(REQUEST)
        assert editor._model.latents is not None
        with pytest.raises(InputError):
            editor.edit(EditRequest(images=REQUEST.images, prompt="<|im_end|>"))
        assert len(editor._model.latents) == 1, "a refusal is no failure: nothing is dropped"
    assert kept.images


def test_what_earlier_edits_have_left_goes_before_weights_do(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = open_editor(tiny_folder)
    expected = editor.edit(REQUEST).image.tobytes()
    given_up = Mock()
    monkeypatch.setattr(pressure, "once_more_with_less", given_up)
    fail_once(monkeypatch, OUT_OF_MEMORY[1])
    assert editor.edit(REQUEST).image.tobytes() == expected
    given_up.assert_not_called()


def test_memory_that_runs_out_in_opening_is_told(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "speed_up_model", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(MachineError, match="ran out while the model was opened"):
        open_editor(tiny_folder)
    monkeypatch.setattr(loading, "speed_up_model", Mock(side_effect=RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        open_editor(tiny_folder)


def test_another_failure_in_a_handler_of_the_first_gives_nothing_up(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = open_editor(tiny_folder)
    fail_once(monkeypatch, OUT_OF_MEMORY[1])
    given_up = Mock()
    try:
        editor.edit(REQUEST)
    except MachineError:
        monkeypatch.setattr(pressure, "once_more_with_less", given_up)
        with pytest.raises(InputError):
            editor.edit(EditRequest(images=REQUEST.images, prompt="<|im_end|>"))
        (refused,) = editor.edit_many([EditRequest(images=REQUEST.images, prompt="<|im_end|>")])
        assert isinstance(refused, InputError)
    given_up.assert_not_called()


@pytest.mark.parametrize("fails", [False, True])
def test_an_edit_by_itself_leaves_no_work_behind_where_it_fails(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Between two results of edit_many it shares buffers with that one's streams, which do not wait for it."""
    waited = Mock()
    monkeypatch.setattr(torch.cuda, "synchronize", waited)
    model: Any = SimpleNamespace(device=torch.device("cuda", 1))
    with pytest.raises(InputError) if fails else contextlib.nullcontext(), alone(model):
        waited.assert_called_once_with(model.device)
        if fails:
            raise InputError("The negative prompt is too long.", "Shorten it.")
    assert waited.call_count == (2 if fails else 1)


def test_the_models_card_is_the_current_one_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []

    @contextlib.contextmanager
    def use(device: torch.device) -> Iterator[None]:
        used.append(device)
        yield
        used.pop()

    monkeypatch.setattr(torch.cuda, "device", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    model: Any = SimpleNamespace(device=torch.device("cuda", 1))
    with guarded(model):
        assert used == [model.device]
    assert used == []


def test_a_kernels_failure_reaches_the_user_by_edit_and_by_edit_many(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = open_editor(tiny_folder)
    fail_once(monkeypatch, triton_error("CompilationError", "no such instruction"))
    with pytest.raises(MachineError, match="A kernel for fp8 does not run on this CPU: CompilationError"):
        editor.edit(REQUEST)
    monkeypatch.undo()
    fail_once(monkeypatch, triton_error("CompilationError", "no such instruction"))
    first, second = editor.edit_many([REQUEST, REQUEST])
    assert isinstance(first, MachineError)
    assert not isinstance(second, MillicentError)


def test_triton_is_not_imported_for_it() -> None:
    # in a process of its own: other tests here import it, and so do other packages where they find it
    code = "import sys; sys.modules['triton'] = None; import millicent.engine.failures"
    subprocess.run([sys.executable, "-c", code], check=True)
