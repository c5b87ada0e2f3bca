"""A machine from JSON, or a refusal that names the key; and the one that a rental would be."""

import json
from pathlib import Path
from typing import Any

import pytest

from millicent.errors import InputError
from millicent.facts.gpus import find_gpu
from millicent.hardware.machine import from_json, machine_of, to_json

MACHINE = Path(__file__).parent.parent / "machines" / "rtx-4090.json"


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(MACHINE.read_text()) | changes)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "no JSON"),
        ("[]", "the whole"),
        (changed(gpus=3), "unknown key gpus"),
        (changed(cpu_count="16"), "cpu_count"),
        (changed(cpu_count=True), "cpu_count"),
        (changed(cpu_count=-1), "cpu_count"),
        (changed(cards=[{"index": 0, "name": "A40", "memory_mib": 46068}]), r"cards\[0\].free_mib"),
        (changed(cards=[{"index": 0, "name": "A40", "memory_mib": 1, "free_mib": 1, "capability": [8]}]), r"cards\[0\].capability"),
        (changed(cards=[{"index": 0, "name": 40, "memory_mib": 1, "free_mib": 1}]), r"cards\[0\].name"),
        (changed(disks=[{"path": "/", "purpose": "models", "free_bytes": 1, "size": 2}]), r"disks\[0\].size"),
        (changed(torch=2.13), "torch"),
        (changed(cuda_driver=[12, 4, 0]), "cuda_driver"),
        (changed(container="yes"), "container"),
        (changed(cards={}), "cards"),
        ("{}", "lacks checked"),
    ],
)
def test_what_is_no_machine_is_refused_by_the_key(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        from_json(text)


def test_keys_with_a_default_may_be_left_out() -> None:
    values = json.loads(MACHINE.read_text())
    for key in ("torchao", "shm_bytes", "no_cards_because"):
        del values[key]
    machine = from_json(json.dumps(values))
    assert (machine.torchao, machine.shm_bytes, machine.no_cards_because) == (None, None, None)


@pytest.mark.parametrize("name", ["RTX 3090", "A100 80GB PCIe", "RTX PRO 6000 MIG 1g.24gb"])
def test_a_rental_is_the_card_whole_and_free(name: str) -> None:
    gpu = find_gpu(name)
    machine = machine_of(gpu)
    assert machine.card is not None
    assert machine.card.name in gpu.reported
    assert machine.card.free_mib == machine.card.memory_mib == gpu.memory_mib
    assert machine.card.capability == gpu.capability
    assert machine.card.mig == (gpu.kind == "slice")
    assert from_json(to_json(machine)) == machine


def test_no_card_is_no_first_card() -> None:
    assert from_json(changed(cards=[])).card is None
