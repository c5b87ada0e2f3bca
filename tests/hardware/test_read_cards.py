"""Cards through a stand-in for NVIDIA's library: whole ones, slices, and drivers that do not answer everything."""

import sys
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from fake_nvml import FakeCard, fake_nvml, memory

from millicent.hardware import cards as reading
from millicent.hardware.cards import Seen, read_cards
from millicent.hardware.machine import Process
from millicent.hardware.memory import Memory

HOST = Memory(total_bytes=128 << 30, limit_bytes=None, available_bytes=100 << 30)


def whole(uuid: str = "GPU-1a", **answers: Any) -> FakeCard:
    return FakeCard(
        {
            "nvmlDeviceGetName": "NVIDIA GeForce RTX 4090",
            "nvmlDeviceGetUUID": uuid,
            "nvmlDeviceGetMemoryInfo": memory(24564, 24100),
            "nvmlDeviceGetCudaComputeCapability": (8, 9),
            "nvmlDeviceGetPowerManagementLimit": 300000,
            "nvmlDeviceGetPowerManagementDefaultLimit": 450000,
            "nvmlDeviceGetCurrPcieLinkGeneration": 1,
            "nvmlDeviceGetCurrPcieLinkWidth": 16,
            "nvmlDeviceGetMaxPcieLinkGeneration": 4,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonGpuIdle,
            "nvmlDeviceGetComputeRunningProcesses": [],
            "nvmlDeviceIsMigDeviceHandle": 0,
        }
        | answers
    )


def read(monkeypatch: pytest.MonkeyPatch, cards: list[FakeCard], visible: str | None = None, **system: Any) -> Seen:
    told = {"nvmlSystemGetDriverVersion": "580.95.05", "nvmlSystemGetCudaDriverVersion_v2": 13000} | system
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(cards, **told))
    return read_cards(HOST, visible)


def test_a_whole_card_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = read(monkeypatch, [whole()])
    assert (seen.driver, seen.cuda_driver, seen.none_because) == ("580.95.05", (13, 0), None)
    (card,) = seen.cards
    assert (card.name, card.capability, card.memory_mib, card.free_mib) == ("NVIDIA GeForce RTX 4090", (8, 9), 24564, 24100)
    assert (card.power_limit_w, card.power_default_w) == (300, 450)
    assert (card.pcie_generation, card.pcie_lanes, card.pcie_max_generation, card.pcie_max_lanes) == (1, 16, 4, 16)
    assert (card.mig, card.clocks_throttled, card.processes) == (False, (), ())


def test_cuda_12_4_is_read_from_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, [whole()], nvmlSystemGetCudaDriverVersion_v2=12040).cuda_driver == (12, 4)


@pytest.mark.parametrize("lost", [key for key in whole().answers if key != "nvmlDeviceGetMemoryInfo"])
def test_a_call_that_is_refused_costs_its_own_answer_alone(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    card = whole()
    del card.answers[lost]
    (found,) = read(monkeypatch, [card]).cards
    assert (found.memory_mib, found.free_mib) == (24564, 24100)
    assert found.name == ("an NVIDIA card without a name" if lost == "nvmlDeviceGetName" else "NVIDIA GeForce RTX 4090")
    assert found.capability == (None if lost == "nvmlDeviceGetCudaComputeCapability" else (8, 9))


def test_slices_stand_for_their_card(monkeypatch: pytest.MonkeyPatch) -> None:
    part = FakeCard(
        {
            "nvmlDeviceGetName": "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
            "nvmlDeviceGetUUID": "MIG-1",
            "nvmlDeviceGetMemoryInfo": memory(19968, 19900),
        }
    )
    card = whole(nvmlDeviceGetName="NVIDIA A100-SXM4-40GB", nvmlDeviceGetCudaComputeCapability=(8, 0))
    card.slices = [part, part]
    found = read(monkeypatch, [card]).cards
    assert [(each.name, each.memory_mib, each.capability, each.mig) for each in found] == [
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19968, (8, 0), True)
    ] * 2


def test_shared_memory_is_the_host_s(monkeypatch: pytest.MonkeyPatch) -> None:
    card = whole(nvmlDeviceGetName="NVIDIA GB10", nvmlDeviceGetCudaComputeCapability=(12, 1))
    del card.answers["nvmlDeviceGetMemoryInfo"]
    (found,) = read(monkeypatch, [card]).cards
    assert (found.memory_mib, found.free_mib) == (128 << 10, 100 << 10)


def test_each_process_is_told_once_and_without_a_size_where_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    computing = [SimpleNamespace(pid=7, usedGpuMemory=500 << 20), SimpleNamespace(pid=9, usedGpuMemory=None)]
    card = whole(
        nvmlDeviceGetComputeRunningProcesses=computing,
        nvmlDeviceGetGraphicsRunningProcesses=[SimpleNamespace(pid=7, usedGpuMemory=1 << 20)],
    )
    (found,) = read(monkeypatch, [card], nvmlSystemGetProcessName=b"python3").cards
    assert found.processes == (Process(pid=7, used_mib=500, name="python3"), Process(pid=9, used_mib=None, name="python3"))


def test_the_bits_of_slow_clocks_are_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = (
        pynvml.nvmlClocksEventReasonHwSlowdown,
        pynvml.nvmlClocksEventReasonSwThermalSlowdown,
        pynvml.nvmlClocksEventReasonHwThermalSlowdown,
        pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    )
    assert tuple(reading.THROTTLES) == slow
    card = whole(nvmlDeviceGetCurrentClocksEventReasons=slow[2] | pynvml.nvmlClocksEventReasonSwPowerCap)
    assert read(monkeypatch, [card]).cards[0].clocks_throttled == ("heat, by hardware",)


@pytest.mark.parametrize(
    ("visible", "indexes"),
    [(None, [0, 1]), ("", []), ("-1", []), ("1", [1]), ("1,0", [1, 0]), ("GPU-2", [1]), ("0,9,1", [0]), (" 1 ,0", [1, 0])],
)
def test_cuda_visible_devices_chooses_and_orders(monkeypatch: pytest.MonkeyPatch, visible: str | None, indexes: list[int]) -> None:
    seen = read(monkeypatch, [whole("GPU-1a"), whole("GPU-2b")], visible)
    assert [card.index for card in seen.cards] == indexes
    assert (seen.none_because is None) == bool(indexes)


def test_hidden_cards_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, [whole()], "").none_because == "CUDA_VISIBLE_DEVICES= hides the card"
    assert "shows no card" in str(read(monkeypatch, []).none_because)


def test_a_card_that_is_to_be_cut_and_is_not_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = read(monkeypatch, [whole(nvmlDeviceGetMigMode=[pynvml.NVML_DEVICE_MIG_ENABLE, pynvml.NVML_DEVICE_MIG_ENABLE])])
    assert seen.cards == ()
    assert "nvidia-smi mig -cgi" in str(seen.none_because)
    assert read(monkeypatch, [whole(nvmlDeviceGetMigMode=[0, 1])]).cards


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_a_driver_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    seen = read(monkeypatch, [whole()], nvmlInit=pynvml.NVMLError(code))
    assert seen.cards == ()
    assert str(pynvml.NVMLError(code)) in str(seen.none_because)


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py" in str(read_cards(HOST).none_because)
