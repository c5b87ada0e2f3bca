"""A stand-in for the module pynvml: the functions that are called, with the real module's errors, classes and return types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

MIB = 1 << 20


@dataclass(eq=False)
class FakeCard:
    """answers: by function name; one that is not there is "Not Supported", an exception is raised. slices: MIG devices."""

    answers: dict[str, Any]
    slices: list[FakeCard] = field(default_factory=list)


def fake_nvml(cards: list[FakeCard], **system: Any) -> SimpleNamespace:
    """The module, with every function that the real one has: those of no card refuse as a driver does."""

    def answer(name: str, values: dict[str, Any]) -> Any:
        value = values.get(name, pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED))
        if isinstance(value, Exception):
            raise value
        return value

    def of_card(name: str) -> Callable[[FakeCard], Any]:
        return lambda card: answer(name, card.answers)

    def of_system(name: str) -> Callable[..., Any]:
        return lambda *_: answer(name, system)

    def slice_of(card: FakeCard, number: int) -> FakeCard:
        if number >= len(card.slices):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return card.slices[number]

    functions: dict[str, Any] = {
        name: of_card(name) if name.startswith("nvmlDevice") else of_system(name)
        for name in dir(pynvml)
        if name.startswith(("nvmlDeviceGet", "nvmlDeviceIs", "nvmlSystemGet"))
    }
    functions |= {
        "nvmlInit": lambda: answer("nvmlInit", {"nvmlInit": None} | system),
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(cards),
        "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
        "nvmlDeviceGetMaxMigDeviceCount": lambda card: 7 if card.slices else answer("none", {}),
        "nvmlDeviceGetMigDeviceHandleByIndex": slice_of,
        "NVMLError": pynvml.NVMLError,
        "NVML_DEVICE_MIG_ENABLE": pynvml.NVML_DEVICE_MIG_ENABLE,
    }
    return SimpleNamespace(**functions)


def memory(total_mib: int, free_mib: int) -> SimpleNamespace:
    return SimpleNamespace(total=total_mib * MIB, free=free_mib * MIB, used=(total_mib - free_mib) * MIB)
