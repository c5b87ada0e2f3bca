"""PyTorch's allocator maps pages where it can, and is left alone where its user has settled how it works."""

import contextlib
import logging
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch

from millicent.engine import allocator
from millicent.engine.allocator import let_segments_grow

CARD = torch.device("cuda", 0)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator is told."""
    told: list[str] = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    let_segments_grow.cache_clear()
    return told


def answer(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> None:
    """The first piece that is asked for."""
    monkeypatch.setattr(allocator.torch, "empty", lambda *args, **kwargs: work())


def fail(error: RuntimeError) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_pages_are_mapped_from_then_on_and_that_is_settled_once(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, lambda: None)
    let_segments_grow(CARD)
    let_segments_grow(CARD)
    assert settings == ["expandable_segments:True"]


def test_a_process_that_sees_several_cards_keeps_fixed_sizes(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer(monkeypatch, lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with caplog.at_level(logging.WARNING, "millicent"):
        let_segments_grow(CARD)
    assert settings == []
    assert "CUDA_VISIBLE_DEVICES" in caplog.text


def test_a_driver_that_maps_none_is_told_of_and_left_as_it_was(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer(monkeypatch, fail(RuntimeError("CUDA driver error: operation not supported\nand more")))
    with caplog.at_level(logging.WARNING, "millicent"):
        let_segments_grow(CARD)
    assert settings == ["expandable_segments:True", "expandable_segments:False"]
    assert "maps no pages (CUDA driver error: operation not supported)" in caplog.text


FULL = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA driver error: out of memory")]


@pytest.mark.parametrize("error", FULL)
def test_a_full_card_is_no_word_on_its_driver(settings: list[str], monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    answer(monkeypatch, fail(error))
    with pytest.raises(RuntimeError, match="out of memory"):
        let_segments_grow(CARD)
    answer(monkeypatch, lambda: None)
    let_segments_grow(CARD)  # is tried again
    assert settings == ["expandable_segments:True"] * 2


def test_under_wsl_nothing_is_changed(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.18.33.2-microsoft-standard-WSL2")
    let_segments_grow(CARD)
    assert settings == []


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_user_s_own_settings_stay(settings: list[str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    let_segments_grow(CARD)
    assert settings == []


def test_pytorch_takes_the_setting() -> None:
    before = torch._C._accelerator_getAllocatorSettings()
    allocator._set("expandable_segments:False")
    assert torch._C._accelerator_getAllocatorSettings() == "expandable_segments:False"
    allocator._set(before)
