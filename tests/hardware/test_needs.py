"""What a model needs: the plan's own figures, on every machine, so that pre-flight and plan never disagree."""

import datetime
from pathlib import Path

import pytest

from millicent.engine.machine_plan import MachinePlan, plan_machine
from millicent.engine.needs import needs_of
from millicent.engine.settings import Settings
from millicent.engine.workload import ask
from millicent.errors import InputError, MachineError, ModelNotFoundError
from millicent.facts.formats import FORMATS
from millicent.facts.models import find_any_card
from millicent.hardware.card_checks import SLOW_STREAMING
from millicent.hardware.findings import Finding
from millicent.hardware.machine import GIB, Machine, from_json
from millicent.hardware.needs import Needs
from millicent.hardware.preflight import check_machine

MACHINES = Path(__file__).parent.parent / "machines"
MODEL = "qwen-image-edit-2511"
ON = datetime.date(2026, 11, 25)


def read(name: str) -> Machine:
    return from_json((MACHINES / f"{name}.json").read_text())


MACHINE = read("rtx-4090")


def plan_of(machine: Machine, asked: str | None) -> MachinePlan:
    of, settings = ask(MODEL, (1024, 1024), references=1, steps=4), Settings(format=asked)  # type: ignore[arg-type]
    return plan_machine(of.model, machine, settings, of.work, on=ON, compares=False)


def judge(machine: Machine, needs: Needs) -> dict[str, Finding]:
    return {finding.name: finding for finding in check_machine(machine, needs)}


@pytest.mark.parametrize("asked", [None, *FORMATS])
@pytest.mark.parametrize("name", sorted(path.stem for path in MACHINES.glob("*.json")))
def test_the_figures_are_the_plan_s(name: str, asked: str | None) -> None:
    machine = read(name)
    needs = needs_of(MODEL, asked, machine)
    found = judge(machine, needs)
    try:
        made = plan_of(machine, asked)
    except MachineError as error:
        # what the plan refuses, and why, is an error of a check, too
        refusals = {"no NVIDIA card": "card", "the host needs": "ram", "none of our formats": "format", "do not run": "format"}
        check = next(check for words, check in refusals.items() if words in error.message)
        assert found[check].level == "error"
        return
    placement = made.placement
    assert needs.format == made.formats.format
    assert (needs.card_bytes, needs.least_card_bytes) == (made.components.resident, made.components.least)
    assert (needs.host_bytes, needs.pinned_bytes) == (placement.needed_host_bytes, placement.pinned_bytes)
    reading = placement.streamed_text_bytes + placement.streamed_language_bytes  # which the language model does in two passes
    assert needs.link_bytes == placement.exchanged_bytes + 4 * placement.streamed_step_bytes + reading
    assert found["ram"].level == found["format"].level == "ok"
    assert (needs.placed is None) == (placement.weights == "on the card" and placement.records_graphs)
    assert placement.because in (needs.placed or placement.because)
    waves = [line for line in made.because if line.startswith("waves of ")]
    assert all(line in (needs.placed or "") for line in waves)
    assert len(waves) == (placement.exchanged_bytes > 0)
    is_slow = needs.slower is None or needs.slower >= SLOW_STREAMING
    assert found["memory"].level == ("warning" if is_slow else "ok")
    if not placement.streams:
        assert needs.slower == 1


@pytest.mark.parametrize("name", ["rtx-4090", "rtx-5090", "l4", "a100-40gb", "rtx-pro-6000-mig-1g.24gb"])
def test_the_other_formats_are_those_whose_weights_stay_there(name: str) -> None:
    machine = read(name)
    needs = needs_of(MODEL, "bf16", machine)
    runs = []
    for each in FORMATS:
        try:
            placement = plan_of(machine, each).placement
            runs += [each] if placement.weights == "on the card" else []
        except MachineError:
            continue
    assert list(needs.other_formats) == ([] if "bf16" in runs else runs)


def test_without_a_card_there_are_needs_and_no_plan() -> None:
    needs = needs_of(MODEL, None, read("no-gpu"))
    assert (needs.format, needs.placed, needs.pinned_bytes, needs.other_formats) == ("bf16", None, 0, ())
    assert needs.card_bytes > 40 * GIB
    assert needs_of(MODEL, "nvfp4", read("no-gpu")).format == "nvfp4"


def test_smaller_formats_take_less() -> None:
    nvfp4, fp8, int8, int8_weight, bf16 = (
        needs_of(MODEL, name, read("rtx-5090")).weights_bytes for name in ("nvfp4", "fp8", "int8", "int8-weight", "bf16")
    )
    assert nvfp4 < fp8 == int8 == int8_weight < bf16


def test_what_is_here_is_not_fetched_again() -> None:
    whole = needs_of(MODEL, None, MACHINE)
    rest = needs_of(MODEL, None, MACHINE, present_bytes=50 * 10**9)
    assert whole.download_bytes - rest.download_bytes == 50 * 10**9
    assert needs_of(MODEL, None, MACHINE, present_bytes=10**12).download_bytes == 0
    assert whole.disk_bytes == int(whole.download_bytes * 1.1)


def test_a_lora_needs_its_model_too() -> None:
    lora = find_any_card("qwen-image-edit-2511-lightning-4steps")
    base = needs_of(MODEL, None, MACHINE)
    assert needs_of(lora.name, None, MACHINE).download_bytes == base.download_bytes + (lora.size_bytes or 0)
    assert needs_of(lora.name, None, MACHINE).card_bytes == base.card_bytes


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ModelNotFoundError):
        needs_of("qwen-image-edit-3000", None, MACHINE)
    with pytest.raises(InputError, match="fp16"):
        needs_of(MODEL, "fp16", MACHINE)


def test_what_is_locked_is_what_lies_in_the_slabs() -> None:
    needs = needs_of(MODEL, "fp8", read("rtx-4070-ti"))
    parts = plan_of(read("rtx-4070-ti"), "fp8").components
    assert needs.pinned_bytes == sum(parts.blocks) + sum(parts.encoder_sizes)
    # a format that the card does not run has nothing planned to cross the link
    assert needs_of(MODEL, "nvfp4", read("rtx-4070-ti")).pinned_bytes == 0
