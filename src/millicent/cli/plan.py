"""`millicent plan`."""

from __future__ import annotations

import datetime
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from millicent.cli.cost import prices_folder
from millicent.cli.plan_view import chart_plan, chart_ranking, plan_to_dict, ranking_to_dict, show_plan, show_ranking
from millicent.cli.preflight import folders, read_machine, write
from millicent.engine.machine_plan import MachinePlan, plan_machine, rank_cards
from millicent.engine.settings import Settings
from millicent.engine.workload import DEFAULT_MODEL, Asked, ask
from millicent.errors import InputError, SizeError
from millicent.facts.gpus import find_gpu
from millicent.hardware.machine import machine_of
from millicent.hardware.probe import probe

MemoryLimit = Annotated[
    float | None,
    typer.Option(
        "--memory",
        metavar="<GB>",
        help="Use at most so many GB of the card's memory; what does not fit waits on the host. Default: all that is free.",
    ),
]


def plan(
    gpu: Annotated[str | None, typer.Option(help='A card to plan for, as "RTX 4090". Default: this machine.')] = None,
    machine_file: Annotated[
        Path | None, typer.Option("--machine", metavar="<file>", help="A machine that `millicent preflight --save-machine` wrote.")
    ] = None,
    model: Annotated[str, typer.Option(help="A card's name, a model folder, or demo.")] = DEFAULT_MODEL,
    size: Annotated[str | None, typer.Option(help="Of the picture, as 1024x1024. Default: the model's own.")] = None,
    refs: Annotated[int, typer.Option(help="Pictures that go into an edit.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Default: 4, as with a Lightning LoRA, or as the file's card says.")] = None,
    format_name: Annotated[
        str | None, typer.Option("--format", help="bf16, fp8, int8, int8-weight or nvfp4. Default: the one that suits the card.")
    ] = None,
    attention: Annotated[str, typer.Option(help="exact, or int8, an approximation.")] = "exact",
    reuse_reference: Annotated[
        bool, typer.Option("--reuse-reference", help="Keep the references' keys and values; an approximation.")
    ] = False,
    memory_gb: MemoryLimit = None,
    all_cards: Annotated[bool, typer.Option("--all", help="Rank every card of the table by dollars per image.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="<file.svg>", help="Draw it as a bar chart.")] = None,
) -> None:
    """Which format, what stays in memory, seconds and dollars per image, and why: before anything is rented or fetched.

    Every time is marked: measured on that card, calibrated by runs on its kind, or modelled, with its error. The exit code is 40
    where no placement fits.
    """
    check_options(gpu, machine_file, all_cards, plot)
    settings = Settings(
        format=format_name,  # type: ignore[arg-type]  # it looks for itself
        attention=attention,  # type: ignore[arg-type]
        reuse_reference=reuse_reference,
        memory_gb=memory_gb,
    )
    asked, today = ask(model, parse_size(size), refs, steps), datetime.datetime.now(tz=datetime.UTC).date()
    if all_cards:
        ranking = rank_cards(asked.model, settings, asked.work, on=today, prices=prices_folder())
        draw, show, made = partial(chart_ranking, ranking), partial(show_ranking, ranking), ranking_to_dict(ranking, asked)
    else:
        planned = plan_one(gpu, machine_file, asked, settings, today)
        draw, show, made = partial(chart_plan, planned), partial(show_plan, planned), plan_to_dict(planned, asked)
    if plot is not None:
        write(plot, draw(asked))
    if as_json:
        print(json.dumps(made, default=str))
    else:
        show(asked)


def check_options(gpu: str | None, machine_file: Path | None, all_cards: bool, plot: Path | None) -> None:
    """Raises InputError for options that exclude each other, and for a chart that is no SVG."""
    given = [name for name, is_given in (("--gpu", gpu), ("--machine", machine_file), ("--all", all_cards)) if is_given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} were given.", "Give one of them.")
    if plot is not None and plot.suffix.lower() != ".svg":
        raise InputError(f"The chart would be {plot}; charts are SVG.", f"Use --plot {plot.with_suffix('.svg')}.")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "1024x768" -> (1024, 768). Raises SizeError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise SizeError(f"The size is {text!r}.", "Give width and height in pixels, as 1024x768.")
    return int(found[1]), int(found[2])


def plan_one(gpu: str | None, machine_file: Path | None, asked: Asked, settings: Settings, today: datetime.date) -> MachinePlan:
    row, env = None if gpu is None else find_gpu(gpu), os.environ
    if row is not None:
        machine = machine_of(row, checked=today.isoformat())
    elif machine_file is not None:
        machine = read_machine(machine_file)
    else:
        machine = probe(folders(DEFAULT_MODEL), env.get("CUDA_VISIBLE_DEVICES"), env.get("CC"))
    return plan_machine(asked.model, machine, settings, asked.work, on=today, gpu=row, prices=prices_folder())
