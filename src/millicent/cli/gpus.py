"""`millicent gpus [NAME]`."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from millicent.facts.card_formats import CardFormat, list_engine_formats, weigh_formats
from millicent.facts.formats import Capability, read_memory_formats
from millicent.facts.gpus import Gpu, Laptop, find_gpu, find_laptop, list_alike, read_gpus
from millicent.facts.wheels import Arch, Wheel, card_driver, driver_floor, is_older, recommend_wheel

LEGEND = """Dense rates in TFLOP/s, with FP32 accumulation; INT8 in TOP/s.
~ derived, recalled or of doubtful source. - not run by the tensor cores. ? not published.
`millicent gpus NAME` tells more of one."""
NO_RATES = "another chip than its namesake for the desk, at a power that its maker sets: the table has no rates for it"
# of the oldest branch that still loads wheels of CUDA 12, and so what an old machine may have
OLD_DRIVER = "525.60.13"


def gpus(
    name: Annotated[list[str] | None, typer.Argument(help='A card, as "RTX 4090" or H100 SXM. Default: all of them.')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Tell what a card's name says: its memory, which number formats its tensor cores run, and the torch that it needs.

    The exit code is 19 for a name that no card of the table has, or several.
    """
    if not name:
        table = read_gpus()
        print(json.dumps({"gpus": [to_dict(gpu) for gpu in table]}, indent=2)) if as_json else show_table(table)
        return
    asked = " ".join(name)
    card = find_laptop(asked) or find_gpu(asked)
    if as_json:
        print(json.dumps(to_page(card), indent=2))
    else:
        show_page(card)


def show_table(cards: tuple[Gpu, ...]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("card")
    table.add_column("architecture")
    for heading in ("capability", "MiB", "GB/s", "BF16", "FP8", "INT8", "FP4"):
        table.add_column(heading, justify="right")
    for gpu in cards:
        numbers = ("memory_mib", "bandwidth_gb_per_s", "bf16_tflops", "fp8_tflops", "int8_tops", "fp4_tflops")
        table.add_row(gpu.name, gpu.architecture, show_capability(gpu.capability), *(show_number(gpu, key) for key in numbers))
    console = open_console()
    console.print(table)
    console.print(LEGEND, highlight=False)


def open_console() -> Console:
    """A pipe counts as 80 wide, which would break every line of a table."""
    return Console(width=max(Console().width, 112))


def show_number(gpu: Gpu, key: str) -> str:
    """A number, marked where it is not certain, or the mark of one that is not there."""
    value, is_doubtful = getattr(gpu, key), key in gpu.unverified
    if value is None:
        return "?" if is_doubtful else "-"
    return f"{'~' if is_doubtful else ''}{value:g}" if value < 1e5 else f"{'~' if is_doubtful else ''}{value:.0f}"


def show_capability(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def show_page(card: Gpu | Laptop) -> None:
    gpu = card if isinstance(card, Gpu) else None
    formats = weigh_formats(card.capability, gpu)
    console = open_console()

    def show(heading: str, rows: Iterable[tuple[str, ...]]) -> None:
        console.print(f"{heading}", highlight=False, style="bold")
        console.print(arrange(rows), highlight=False)

    show(show_title(card), show_gpu(gpu) if gpu else [("rates", NO_RATES)])
    show("\nIts tensor cores run", [show_format(each, gpu) for each in formats if each.support.runs])
    show("\nThey do not run", [(each.support.format, each.support.because) for each in formats if not each.support.runs])
    show("\nThese save memory and no time, on every card", [(each.name, each.because) for each in read_memory_formats()])
    show("\nmillicent", show_engine(card.capability, gpu.host_arch if gpu else "x86_64"))


def arrange(rows: Iterable[tuple[str, ...]]) -> Table:
    """Columns, of which the last is wrapped."""
    grid = Table.grid(padding=(0, 2), pad_edge=True)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    for column in grid.columns[:-1]:
        column.no_wrap = True
    return grid


def show_title(card: Gpu | Laptop) -> str:
    kind = show_kind(card) if isinstance(card, Gpu) else "a laptop's card"
    return f"{card.name}: {card.architecture}, compute capability {show_capability(card.capability)}, {kind}"


def show_gpu(gpu: Gpu) -> list[tuple[str, str]]:
    link = f"PCIe {gpu.pcie_generation} x{gpu.pcie_lanes}" if gpu.pcie_generation else ""
    power = f"{show_number(gpu, 'power_w')} W" if gpu.power_w else ""
    sms = f"{show_number(gpu, 'sm_count')} SMs" if gpu.sm_count else ""
    lines = [
        ("reported as", ", ".join(gpu.reported)),
        ("memory", f"{show_number(gpu, 'memory_mib')} MiB as reported, {show_number(gpu, 'bandwidth_gb_per_s')} GB/s"),
        ("card", ", ".join(part for part in (link, power, sms) if part)),
        ("note", " ".join((gpu.notes, *show_accumulation(gpu))).strip()),
        ("not to be taken for", ", ".join(list_alike(gpu))),
        ("source", f"{gpu.source}; checked {gpu.checked}"),
        ("not settled (~)", ", ".join(gpu.unverified)),
    ]
    return [(name, told) for name, told in lines if told]


def show_kind(gpu: Gpu) -> str:
    kind = {"geforce": "a GeForce", "slice": "a slice of a card", "soc": "on one chip with its CPU"}.get(
        gpu.kind, f"a {gpu.kind} card"
    )
    return f"{kind}, made for {gpu.region}" if gpu.region else kind


def show_format(each: CardFormat, gpu: Gpu | None) -> tuple[str, ...]:
    row = each.support
    needs = [f"{name} {version}" for name, version in (("torch", row.min_torch), ("CUDA", row.min_cuda)) if version]
    told = f"{row.because}; from {' and '.join(needs)}" if needs else row.because
    if gpu is None:
        return row.format, told
    unit = "TOP/s" if row.format in ("int8", "int4") else "TFLOP/s"
    rate = f"{'' if each.is_certain else '~'}{each.rate:g} {unit}" if each.rate else "rate not published"
    times = f"{each.times_bf16:.1f}x BF16" if each.times_bf16 and row.format != "bf16" else ""
    return row.format, rate, times, told


def show_accumulation(gpu: Gpu) -> list[str]:
    """GeForce cards run products with FP32 sums at half the rate that is on the box."""
    if gpu.fp16_accumulate_fp16_tflops is None:
        return []
    half = (
        f"GeForce halves the rate of products with FP32 sums: FP16 with FP16 sums has {gpu.fp16_accumulate_fp16_tflops:g} TFLOP/s."
    )
    if gpu.fp8_fp16_accumulate_tflops is None:
        return [half]
    return [half, f"FP8's {gpu.fp8_fp16_accumulate_tflops:g} TFLOP/s on the box are with FP16 sums, which cuBLASLt does not offer."]


def show_engine(capability: Capability, arch: Arch) -> list[tuple[str, str]]:
    """What of ours runs there, and the torch for it: for a new driver, and for the oldest that knows the card."""
    names = list_engine_formats(capability)
    runs = f"--format {', '.join(names)}" if names else "does not run: it computes in BF16, which these tensor cores lack"
    floor = card_driver(capability)
    drivers = (None, floor.driver if floor else OLD_DRIVER)
    wheels = {wheel.cuda: wheel for driver in drivers if (wheel := recommend_wheel(capability, driver, arch))}
    shown = [(f"driver {oldest_driver(wheel, capability)} or later", wheel.pip_command) for wheel in wheels.values()]
    return [("engine", runs), *shown]


def oldest_driver(wheel: Wheel, capability: Capability) -> str:
    """What loads the wheel and knows the card."""
    loads, knows = driver_floor(wheel.cuda).driver, card_driver(capability)
    return knows.driver if knows and is_older(loads, knows.driver) else loads


def to_dict(gpu: Gpu) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(gpu), default=_show_date))


def to_page(card: Gpu | Laptop) -> dict[str, Any]:
    """What --json prints of one card."""
    gpu = card if isinstance(card, Gpu) else None
    arch: Arch = gpu.host_arch if gpu else "x86_64"
    wheel = recommend_wheel(card.capability, None, arch)
    assert wheel, "every capability of the table has a wheel"
    page = to_dict(gpu) if gpu else {**dataclasses.asdict(card), "kind": "laptop"}
    formats = [
        {
            **dataclasses.asdict(each.support),
            "rate": each.rate,
            "times_bf16": each.times_bf16,
            "is_certain": each.is_certain,
        }
        for each in weigh_formats(card.capability, gpu)
    ]
    page |= {
        "formats": formats,
        "memory_only": [dataclasses.asdict(each) for each in read_memory_formats()],
        "engine_formats": list_engine_formats(card.capability),
        "torch": {"version": wheel.torch, "cuda": wheel.cuda, "command": wheel.pip_command},
    }
    return json.loads(json.dumps(page, default=_show_date))


def _show_date(value: object) -> str:
    assert isinstance(value, datetime.date)
    return value.isoformat()
