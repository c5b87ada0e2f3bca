"""The checks on machines that were met, or could be: what each has wrong with it, and nothing else."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.engine.needs import needs_of
from millicent.facts.formats import FORMATS
from millicent.hardware.findings import Finding, exit_code
from millicent.hardware.machine import Machine, from_json, to_json
from millicent.hardware.preflight import CHECKS, check_machine

MACHINES = Path(__file__).parent.parent / "machines"
MODEL = "qwen-image-edit-2511"
SLICE = {"slice": "warning"}
TOO_SMALL = {"memory": "error"}
SLOW = {"memory": "warning"}  # what is streamed takes longer than the card computes

# the format that the card is given, and every finding that is not "ok"; of cards that no table names, "name" is left out
EXPECTED: dict[str, tuple[str, dict[str, str]]] = {
    "a100-40gb": ("int8", {}),
    "a100-80gb": ("int8", {}),
    "a100-mig-3g.20gb": ("int8", SLICE),
    "b200": ("fp8", {}),
    "b300": ("fp8", {}),
    "bare-pod": ("fp8", {"torch": "warning", "compiler": "warning"}),
    "container-4gb": ("fp8", {"ram": "error"}),
    "container-8gb": ("fp8", {}),
    "cpu-torch": ("fp8", {"torch": "error"}),
    "cudnn-mixed": ("fp8", {"cudnn": "warning"}),
    "disk-20gb": ("fp8", {"models disk": "error", "hub cache": "warning"}),
    "disk-small-beside-volume": ("fp8", {"models disk": "error"}),
    "driver-535-cu128": ("int8", {"driver": "warning"}),
    "driver-535-cu130": ("fp8", {"driver": "error"}),
    "driver-550-b200": ("fp8", {"driver": "error", "torch": "error"}),
    "full-tmp": ("fp8", {"temporary files": "error"}),
    "gb10": ("fp8", {}),
    "h100": ("fp8", {}),
    "h100-cuda-12.9": ("fp8", {"recipe": "warning"}),
    "h100-dirty": ("fp8", SLOW | {"processes": "warning"}),
    "h100-mig-1g.10gb": ("fp8", SLICE | SLOW),
    "h20": ("fp8", {}),
    "h200": ("fp8", {}),
    "hidden-gpu": ("bf16", {"card": "error"}),
    "kernel-cache-full": ("fp8", {"compiled kernels": "error"}),
    "l4": ("fp8", {}),
    "l40s": ("fp8", {}),
    "no-compiler": ("fp8", {"compiler": "error"}),
    "no-gpu": ("bf16", {"card": "error"}),
    "nvidia-container": ("fp8", {}),
    "no-triton": ("fp8", {"triton": "error"}),
    "old-triton": ("fp8", {"triton": "warning"}),
    "rtx-3090": ("int8", {}),
    "rtx-4070-ti": ("fp8", {}),
    "rtx-4090": ("fp8", {}),
    "rtx-4090-d": ("fp8", {}),
    "rtx-4090-laptop": ("fp8", {}),
    "rtx-4090-riser": ("fp8", {"pcie": "warning", "power": "warning"}),
    "rtx-4090-torch-2.11": ("fp8", {"recipe": "warning"}),
    "rtx-5090": ("fp8", {}),
    "rtx-5090-cu126": ("fp8", {"wheel": "error", "recipe": "error"}),
    "rtx-5090-torch-2.10": ("fp8", {"recipe": "error"}),
    "rtx-pro-6000-mig-1g.24gb": ("fp8", SLICE),
    "shm-64mb": ("fp8", {}),
    "t4": ("bf16", TOO_SMALL | {"format": "error"}),
    "throttled": ("int8", {"clocks": "warning"}),
    "torchao-mismatch": ("fp8", {"torchao": "warning"}),
    "two-cards": ("fp8", {}),
    "two-cards-shm-64mb": ("fp8", {"shared memory": "warning"}),
    "windows": ("fp8", {"system": "warning"}),
    "v100-cu130": ("bf16", TOO_SMALL | {"format": "error", "wheel": "error"}),
}


def read(name: str) -> Machine:
    return from_json((MACHINES / f"{name}.json").read_text())


def judge(name: str, asked: str | None = None) -> dict[str, Finding]:
    machine = read(name)
    return {finding.name: finding for finding in check_machine(machine, needs_of(MODEL, asked, machine))}


def wrong(findings: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.level for name, finding in findings.items() if finding.level != "ok"}


def test_the_table_names_every_machine() -> None:
    assert sorted(EXPECTED) == sorted(path.stem for path in MACHINES.glob("*.json"))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_machine_is_found_as_it_is(name: str) -> None:
    machine = read(name)
    needs = needs_of(MODEL, None, machine)
    chosen, expected = EXPECTED[name]
    assert needs.format == chosen
    found = check_machine(machine, needs)
    assert len({finding.name for finding in found}) == len(found)
    assert {finding.name: finding.level for finding in found if finding.level != "ok" and finding.name != "name"} == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_wrong_says_what_is_wanted_and_what_mends_it(name: str) -> None:
    for finding in judge(name).values():
        assert finding.found
        if finding.level != "ok":
            assert finding.wanted, finding
            assert finding.command, finding


@pytest.mark.parametrize("name", EXPECTED)
def test_a_machine_is_the_same_after_a_file(name: str) -> None:
    machine = read(name)
    assert from_json(to_json(machine)) == machine


@pytest.mark.parametrize(
    ("name", "code"), [("rtx-4090", 0), ("l40s", 0), ("rtx-4090-riser", 1), ("bare-pod", 1), ("rtx-5090-cu126", 2), ("no-gpu", 2)]
)
def test_the_exit_code_is_that_of_the_worst_finding(name: str, code: int) -> None:
    assert exit_code(judge(name).values()) == code


def test_a_bare_pod_is_told_the_build_for_its_driver_and_card() -> None:
    # CUDA 13 wants driver 580; Triton in the build for CUDA 12.6 wants 560, which no build that is recent enough goes below
    command = judge("bare-pod")["torch"].command
    assert command is not None
    assert command.startswith('pip install "torch==2.')
    assert command.endswith("/whl/cu126")


def test_a_card_without_code_is_told_the_build_that_has_it() -> None:
    finding = judge("rtx-5090-cu126")["wheel"]
    assert '"no kernel image is available"' in finding.found
    assert finding.command is not None
    assert "cu126" not in finding.command


def test_pip_is_told_to_replace_a_build_of_the_same_version() -> None:
    assert "--force-reinstall" in str(judge("cpu-torch")["torch"].command)
    assert "--force-reinstall" not in str(judge("bare-pod")["torch"].command)


def test_a_taken_card_names_who_holds_it() -> None:
    found = judge("h100-dirty")
    assert "python3 (4711) 74800 MiB" in found["processes"].found
    assert "kill 4711" in str(found["memory"].command)


def test_a_card_without_room_for_all_is_told_where_the_weights_lie_and_what_it_costs() -> None:
    found = judge("rtx-4070-ti")["memory"]
    for told in (
        "lie on the card in turn",
        "40 of 60 layers fit",
        "takes no time of its own",
        "for 2 pictures together",
        "waves of 10 share an exchange",
    ):
        assert told in found.found
    assert (found.level, found.command) == ("ok", None)
    assert "graphs are recorded of text and denoise alone" in judge("rtx-4090")["memory"].found


def test_streaming_that_is_slow_is_told_with_what_would_be_fast() -> None:
    # over one lane the weights take longer than the card computes; in another format they all stay
    riser = judge("rtx-4090-riser", "bf16")["memory"]
    assert "1.87 times as long as with all weights on the card" in riser.found
    assert (riser.level, riser.command) == ("warning", f"millicent preflight --model {MODEL} --format fp8")
    unknown = judge("h100-mig-1g.10gb")["memory"]
    assert "how long an edit takes is not known" in unknown.found
    assert (unknown.level, unknown.command) == ("warning", "Rent a card with 21.8 GiB free; millicent plan --all ranks them")


def test_a_card_that_is_too_small_for_anything_is_told_the_least() -> None:
    machine = read("rtx-4070-ti")
    assert machine.card is not None
    tiny = dataclasses.replace(machine, cards=(dataclasses.replace(machine.card, memory_mib=2048, free_mib=2000),))
    told = {finding.name: finding for finding in check_machine(tiny, needs_of(MODEL, None, tiny))}["memory"]
    assert "too little even with all weights streamed, which takes 2.8 GiB" in told.found
    assert told.level == "error"


def test_a_limit_of_locked_memory_is_told_where_weights_cross_the_link() -> None:
    for name, level in (("rtx-4070-ti", "warning"), ("rtx-4090", None)):
        machine = dataclasses.replace(read(name), pinned_limit_bytes=64 << 10)
        found = {finding.name: finding for finding in check_machine(machine, needs_of(MODEL, None, machine))}
        assert (found["pinned memory"].level if "pinned memory" in found else None) == level
        if level:
            assert found["pinned memory"].wanted == "19.4 GiB locked, for what crosses the link"


def test_a_format_that_does_not_run_has_no_plan_to_tell() -> None:
    assert "in turn" not in judge("t4")["memory"].found
    assert judge("t4")["memory"].level == "error"
    assert judge("t4")["ram"].level == "ok"


def test_a_container_is_told_its_own_limit_and_not_the_host_s() -> None:
    found = judge("container-4gb")["ram"].found
    assert "3.6 GiB free of the container's 4.0 GiB" in found
    assert "503.0 GiB" in found


def test_8_gb_do_where_all_stays_on_the_card_and_not_where_weights_are_streamed() -> None:
    assert wrong(judge("container-8gb")) == {}
    assert wrong(judge("container-8gb", "bf16")) == {"ram": "error"}


def test_a_format_that_the_card_does_not_run_names_those_that_it_does() -> None:
    finding = judge("rtx-3090", "fp8")["format"]
    assert finding.level == "error"
    assert finding.wanted.endswith("bf16, int8, int8-weight")
    assert judge("b300", "int8")["format"].level == "error"
    assert judge("rtx-5090", "nvfp4")["format"].level == "ok"


def test_without_a_card_the_demo_is_offered_and_the_reason_told() -> None:
    assert judge("hidden-gpu")["card"].found == "CUDA_VISIBLE_DEVICES= hides the card"
    assert "--model demo" in str(judge("no-gpu")["card"].command)


def test_variants_are_told_from_the_cards_whose_names_they_bear() -> None:
    assert "RTX 4090 D" in judge("rtx-4090-d")["name"].found
    assert "China" in judge("h20")["name"].found
    assert "China" not in judge("rtx-4090")["name"].found
    assert judge("rtx-4090-laptop")["name"].found != judge("rtx-4090")["name"].found


def test_a_full_disk_is_told_the_one_with_room() -> None:
    assert "/workspace/hf/hub" in str(judge("disk-small-beside-volume")["models disk"].command)
    assert "a larger disk" in str(judge("disk-20gb")["models disk"].command)


def test_a_build_that_is_not_pytorch_s_own_is_left_to_the_trial() -> None:
    found = judge("nvidia-container")
    assert "not in the table" in found["wheel"].found
    assert "the trial loads it" in found["cudnn"].found


def test_a_card_in_no_table_is_told() -> None:
    machine = read("l40s")
    assert machine.card is not None
    unknown = dataclasses.replace(machine, cards=(dataclasses.replace(machine.card, name="NVIDIA Quux 9000", capability=(13, 7)),))
    found = {finding.name: finding for finding in check_machine(unknown, needs_of(MODEL, None, unknown))}
    assert (found["name"].level, found["format"].level) == ("warning", "error")
    assert "13.7 is in no table" in found["format"].found
    untold = dataclasses.replace(machine, cards=(dataclasses.replace(machine.card, capability=None),))
    assert "format" in wrong({finding.name: finding for finding in check_machine(untold, needs_of(MODEL, None, untold))})


def test_two_cards_are_told_how_to_be_used() -> None:
    assert "CUDA_VISIBLE_DEVICES=0" in judge("two-cards")["card"].found


def test_every_check_says_what_it_is_for() -> None:
    assert all(check.__doc__ for check in CHECKS)
    assert len({check.__name__ for check in CHECKS}) == len(CHECKS)


def errors(machine: Machine, asked: str | None) -> set[str]:
    return {finding.name for finding in check_machine(machine, needs_of(MODEL, asked, machine)) if finding.level == "error"}


more = st.integers(0, 1 << 40)


@given(
    name=st.sampled_from(sorted(EXPECTED)),
    asked=st.sampled_from([None, *FORMATS]),
    ram=more,
    disk=more,
    mib=st.integers(0, 1 << 18),
)
def test_more_room_never_adds_an_error(name: str, asked: str | None, ram: int, disk: int, mib: int) -> None:
    machine = read(name)
    roomier = dataclasses.replace(
        machine,
        ram_bytes=machine.ram_bytes + ram,
        ram_available_bytes=machine.ram_available_bytes + ram,
        disks=tuple(dataclasses.replace(each, free_bytes=each.free_bytes + disk) for each in machine.disks),
        cards=tuple(
            dataclasses.replace(card, memory_mib=max(card.memory_mib, card.free_mib + mib), free_mib=card.free_mib + mib)
            for card in machine.cards
        ),
    )
    assert errors(roomier, asked) <= errors(machine, asked)
