"""What of the card may stand in an edit's way: a function a check, each pure."""

from __future__ import annotations

from millicent.facts.formats import FORMATS
from millicent.facts.gpus import Gpu, identify
from millicent.hardware.findings import Finding, error, ok, show_capability, show_gib, warning
from millicent.hardware.machine import MIB, Card, Machine
from millicent.hardware.needs import Needs, runs_on_card, support_of

DEMO = "Without a card the demo model edits on the CPU: millicent edit examples/shirt.png 'make the shirt navy blue' --model demo"
# of one lane, one way, after encoding; PCI-SIG's rates
GB_PER_S_PER_LANE = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
# what a stray process, or a desktop's windows, may hold before it is worth a word
STRAY_MIB = 512
# of the power that a card was made for: a lower limit lowers the clocks under tensor-core load
FULL_POWER = 0.95
SLOW_LINK = 0.5
# times as long as with all weights on the card, from which on streaming is worth a word
SLOW_STREAMING = 1.1


def check_card(machine: Machine, needs: Needs) -> Finding:
    """There is a card at all, and which one an edit uses."""
    card = machine.card
    if card is None:
        return error("card", machine.no_cards_because or "no NVIDIA card", f"an NVIDIA card for {needs.model}", DEMO)
    capability = f", compute capability {show_capability(card.capability)}" if card.capability else ""
    told = f"{card.name}{capability}"
    if len(machine.cards) > 1:
        told += (
            f"; the first of {len(machine.cards)} cards: start millicent once for each, with CUDA_VISIBLE_DEVICES=0, =1 and so on"
        )
    return ok("card", told)


def check_name(machine: Machine, needs: Needs) -> Finding | None:
    """What the card is by our table, as its name alone may not say it."""
    card = machine.card
    if card is None:
        return None
    gpu = identify_card(card)
    if gpu is None:
        return warning(
            "name",
            f"{card.name} is not in the table of cards",
            "a card whose rates are known, to plan and to price it",
            "millicent gpus",
        )
    market = f", a variant for {gpu.region} with rates of its own" if gpu.region else ""
    return ok("name", f"{gpu.name}, {gpu.architecture}{market}")


def identify_card(card: Card) -> Gpu | None:
    return identify(card.name, card.capability, card.memory_mib)


def check_format(machine: Machine, needs: Needs) -> Finding | None:
    """The card's tensor cores run the format; weights alone in a small format save memory, and no time."""
    card = machine.card
    if card is None:
        return None
    if card.capability is None:
        return warning("format", f"the driver does not tell {card.name}'s compute capability", "to know which formats it runs")
    capability = show_capability(card.capability)
    found = support_of(needs.format, card.capability)
    if found is None:
        return error(
            "format", f"compute capability {capability} is in no table", "a card of a generation that is known", "millicent gpus"
        )
    told = f"{needs.format} on compute capability {capability}: {found.because}"
    if runs_on_card(needs.format, card.capability):
        return ok("format", told)
    runs = [name for name in FORMATS if runs_on_card(name, card.capability)]
    if not runs:
        wanted = "a card whose tensor cores run BF16, which is computed in around every format"
        return error("format", told, wanted, "Rent a card of the Ampere generation or later")
    return error("format", told, f"a format that this card runs: {', '.join(runs)}", f"millicent preflight --format {runs[0]}")


def check_memory(machine: Machine, needs: Needs) -> Finding | None:
    """Free memory of the card against what all weights take there; where it is too little, where they lie, and what that costs."""
    card = machine.card
    if card is None:
        return None
    free = card.free_mib * MIB
    found = f"{show_gib(free)} free of {show_gib(card.memory_mib * MIB)}"
    parts = f"{show_gib(needs.weights_bytes)} of weights, {show_gib(needs.working_bytes)} beside them"
    wanted = f"{show_gib(needs.card_bytes)} to keep {needs.model} in {needs.format} on the card: {parts}"
    if needs.placed is not None:
        found += f": {needs.placed}"
    if free >= needs.card_bytes:
        return ok("memory", found, wanted)
    if needs.placed is not None:
        is_fast = needs.slower is not None and needs.slower < SLOW_STREAMING
        return ok("memory", found, wanted) if is_fast else warning("memory", found, wanted, _room_command(card, needs))
    if free < needs.least_card_bytes:
        found += f", too little even with all weights streamed, which takes {show_gib(needs.least_card_bytes)}"
    return error("memory", found, wanted, _room_command(card, needs))


def _room_command(card: Card, needs: Needs) -> str:
    """What would run: this card when others leave it, another format, or another card."""
    if not _is_free(card) and card.memory_mib * MIB >= needs.card_bytes:
        return _free_command(card)
    if needs.other_formats:
        return f"millicent preflight --model {needs.model} --format {needs.other_formats[0]}"
    return f"Rent a card with {show_gib(needs.card_bytes)} free; millicent plan --all ranks them"


def _is_free(card: Card) -> bool:
    """A driver keeps a little of a card for itself."""
    return card.memory_mib - card.free_mib <= max(STRAY_MIB, card.memory_mib * 2 // 100)


def _free_command(card: Card) -> str:
    pids = [process.pid for process in card.processes]
    if pids:
        return f"Stop what holds it (kill {' '.join(map(str, pids))}), or take another machine"
    return "Take another machine: what holds it is not to be seen from here"


def check_processes(machine: Machine, needs: Needs) -> Finding | None:
    """Who else holds memory of the card; a card that was sold as free and is not."""
    card = machine.card
    if card is None:
        return None
    holders = ", ".join(
        f"{process.name or 'a process'} ({process.pid})" + ("" if process.used_mib is None else f" {process.used_mib} MiB")
        for process in card.processes
    )
    gpu = identify_card(card)
    if gpu is not None and gpu.kind == "soc":  # the host's memory, in use by everything
        return None
    if _is_free(card):
        return ok("processes", holders or "the card is free")
    told = f"{card.memory_mib - card.free_mib} MiB are in use: {holders or 'by no process that can be seen from here'}"
    return warning("processes", told, "a card for millicent alone", _free_command(card))


def check_mig(machine: Machine, needs: Needs) -> Finding | None:
    """A slice has a part of the memory, and of the processors too."""
    card = machine.card
    if card is None or not card.mig:
        return None
    return warning(
        "slice",
        f"{card.name} is a MIG slice: a part of a card's processors as of its memory",
        "the speed that the card's name promises",
        "Compare its price with a whole card's: millicent plan --all",
    )


def check_pcie(machine: Machine, needs: Needs) -> Finding | None:
    """The link to the host, at its best: an idle card lowers the generation, but not the lanes."""
    card = machine.card
    if card is None or not card.pcie_max_generation or not card.pcie_max_lanes:
        return None
    lanes = min(card.pcie_lanes or card.pcie_max_lanes, card.pcie_max_lanes)
    rate = _gb_per_s(card.pcie_max_generation, lanes)
    told = f"PCIe {card.pcie_max_generation} x{lanes}, {rate:.0f} GB/s"
    gpu = identify_card(card)
    generation, most = (gpu.pcie_generation, gpu.pcie_lanes) if gpu else (None, 0)
    if not generation or not most:
        generation, most = card.pcie_max_generation, card.pcie_max_lanes
    best = _gb_per_s(generation, most)
    if rate >= SLOW_LINK * best:
        return ok("pcie", told)
    why = f"{show_gib(needs.link_bytes)} of weights cross it for a picture by itself" if needs.link_bytes else "weights load slowly"
    return warning("pcie", f"{told}: {why}", f"PCIe {generation} x{most}, {best:.0f} GB/s", "Take another machine")


def _gb_per_s(generation: int, lanes: int) -> float:
    return GB_PER_S_PER_LANE[min(max(generation, 1), max(GB_PER_S_PER_LANE))] * lanes


def check_power(machine: Machine, needs: Needs) -> Finding | None:
    """A power limit below the card's own is paid for in seconds."""
    card = machine.card
    if card is None or not card.power_limit_w or not card.power_default_w:
        return None
    told = f"{card.power_limit_w:.0f} W of {card.power_default_w:.0f} W"
    if card.power_limit_w >= FULL_POWER * card.power_default_w:
        return ok("power", told)
    command = f"nvidia-smi -i {card.index} -pl {card.power_default_w:.0f}, as root on the host; or take another machine"
    return warning("power", f"the limit is {told}: the card will be slower", f"{card.power_default_w:.0f} W", command)


def check_clocks(machine: Machine, needs: Needs) -> Finding | None:
    """Heat or the power supply slow the card down already."""
    card = machine.card
    if card is None or not card.clocks_throttled:
        return None
    told = f"the clocks are lowered by {' and '.join(card.clocks_throttled)}"
    return warning("clocks", told, "full clocks", "Take another machine: nvidia-smi -q -d PERFORMANCE tells more")
