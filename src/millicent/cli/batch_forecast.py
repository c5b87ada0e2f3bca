"""`millicent batch --dry-run`: what a run would draw, and what that would take."""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from millicent.catalog.items import Item
from millicent.catalog.manifest import BadRow, Columns, read_manifest
from millicent.catalog.recipes import Recipe, expand
from millicent.catalog.storage import FetchLimits, read_bytes
from millicent.cli.cost import prices_folder, write_value
from millicent.cli.live import show_time
from millicent.cost import Bill, Job, forecast
from millicent.edits import EditRequest, SupportsEdit
from millicent.engine.editor import DEMO_NAMES, find_model
from millicent.engine.machine_plan import plan_machine
from millicent.engine.settings import Settings
from millicent.engine.workload import ask
from millicent.errors import InputError
from millicent.facts.gpus import find_gpu
from millicent.facts.models import list_cards
from millicent.facts.prices import RentalPrice
from millicent.hardware.machine import machine_of
from millicent.images import flatten, open_image

FIRST = 3  # expanded prompts that are shown
MOST_BAD = 10  # bad rows that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What a manifest and a recipe come to. bad: of rows and of images, the first ones; bad_count: all."""

    rows: int
    images: int
    first: tuple[Item, ...]
    bad: tuple[BadRow, ...]
    bad_count: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of one image on one card, and where they come from."""

    seconds: Decimal
    because: str


def dry_run(
    manifest: str,
    columns: Columns,
    recipe: Recipe,
    model: str,
    gpu: str | None,
    price: Decimal | None,
    open_editor: Callable[[], SupportsEdit],
    allowed: frozenset[str],
    settings: Settings,
    cards: int,
    *,
    as_json: bool,
) -> None:
    """Print counts, the first prompts, and the forecast. Draws four pictures to time one, unless a card is named."""
    counted = count(manifest, columns, recipe)
    speed = predict(model, gpu, recipe, settings) if gpu is not None else measure(counted, open_editor, allowed)
    bill = None
    if speed is not None and price is not None and counted.images:
        bill = forecast(Job(images=counted.images, cards=cards), speed.seconds, rental(price, gpu), because=speed.because)
    if as_json:
        print(json.dumps(summarize(counted, speed, bill, cards), default=write_value))
    else:
        show(counted, speed, bill, cards)


def count(manifest: str, columns: Columns, recipe: Recipe) -> Counted:
    """Every row is read and expanded; no picture is."""
    first: list[Item] = []
    bad: list[BadRow] = []
    rows = images = bad_count = 0
    for row in read_manifest(manifest, columns):
        made: list[Item | BadRow] = [row] if isinstance(row, BadRow) else [expand(row, variant) for variant in recipe.variants]
        rows += not isinstance(row, BadRow)
        for each in made:
            if isinstance(each, BadRow):
                bad_count += 1
                bad += [each] if len(bad) < MOST_BAD else []
            else:
                images += 1
                first += [each] if len(first) < FIRST else []
    return Counted(rows=rows, images=images, first=tuple(first), bad=tuple(bad), bad_count=bad_count)


def predict(model: str, gpu: str, recipe: Recipe, settings: Settings) -> Speed:
    """By the planner, the mean of the variants. Raises InputError for a card whose speed is not known; as plan_machine."""
    card, day = find_gpu(gpu), datetime.date.today()
    machine = machine_of(card, checked=day.isoformat())
    seconds, kinds, waves = [], set(), set()
    for variant in recipe.variants:
        asked = ask(plannable(model), variant.size, 1, variant.steps)
        planned = plan_machine(asked.model, machine, settings, asked.work, on=day, gpu=card, prices=prices_folder(), compares=False)
        if planned.seconds is None:
            raise InputError(f"The speed of the {card.name} is not known.", "Leave out --gpu on that card, to time an edit.")
        seconds.append(Decimal(str(round(planned.seconds, 4))))
        kinds |= {each.kind for each in planned.stages.values()}
        waves.add(planned.wave)
    mean = (sum(seconds, Decimal(0)) / len(seconds)).quantize(Decimal("0.0001"))
    told = f", in waves of {' and '.join(map(str, sorted(waves)))}" if max(waves) > 1 else ""
    return Speed(mean, f"{' and '.join(sorted(kinds))} for the {card.name}, one picture a row{told}")


def plannable(model: str) -> str:
    """The name by which the planner knows a model: a folder without a card of its own is a published model.

    A published model's name will do too, before it is fetched.
    """
    if model in DEMO_NAMES:
        return "demo"
    if model in list_cards():
        return model
    _, folder, card = find_model(model)
    return str(folder) if (folder / "card.toml").is_file() else card.name


def measure(counted: Counted, open_editor: Callable[[], SupportsEdit], allowed: frozenset[str]) -> Speed | None:
    """The median of three edits on this machine, after one that warms up; None where there is nothing to draw."""
    if not counted.first:
        return None
    item = counted.first[0]
    pictures = [flatten(open_image(read_bytes(at, FetchLimits(), allowed), name=at)) for at in item.pictures]
    request = EditRequest(
        images=tuple(pictures),
        prompt=item.prompt,
        negative_prompt=item.negative_prompt,
        steps=item.steps,
        schedule=item.schedule,
        seed=item.seed,
        true_cfg=item.true_cfg,
        height=item.height,
        width=item.width,
        fit=item.fit,
    )
    editor = open_editor()
    editor.edit(request)
    seconds = [time_edit(editor, request) for _ in range(3)]
    return Speed(Decimal(str(round(statistics.median(seconds), 4))), "measured here, one edit alone")


def time_edit(editor: SupportsEdit, request: EditRequest) -> float:
    begun_s = time.perf_counter()
    editor.edit(request)
    return time.perf_counter() - begun_s


def rental(usd_per_hour: Decimal, gpu: str | None) -> RentalPrice:
    day = datetime.date.today()
    name = "the card" if gpu is None else find_gpu(gpu).name
    return RentalPrice(
        provider="your price",
        gpu=name,
        kind="on-demand",
        usd_per_hour=usd_per_hour,
        since=day,
        source="--price, or the cheapest known on demand",
        checked=day,
    )


def summarize(counted: Counted, speed: Speed | None, bill: Bill | None, cards: int) -> dict[str, Any]:
    """What --json prints."""
    return {
        "rows": counted.rows,
        "images": counted.images,
        "bad_rows": counted.bad_count,
        "bad": [{"line": bad.line, "why": bad.why} for bad in counted.bad],
        "first": [
            {"line": item.row_line, "id": item.row_id, "variant": item.variant, "prompt": item.prompt, "output": item.output}
            for item in counted.first
        ],
        "seconds_per_image": None if speed is None else speed.seconds,
        "because": None if speed is None else speed.because,
        "drawing_s": None if speed is None else speed.seconds * counted.images / cards,
        "gpu_hours": None if bill is None else bill.gpu_hours,
        "total_usd": None if bill is None else bill.total_usd,
        "usd_per_accepted_image": None if bill is None else bill.usd_per_accepted_image,
        "parts": None if bill is None else [dataclasses.asdict(part) for part in bill.parts],
        "assumptions": () if bill is None else bill.assumptions,
    }


def show(counted: Counted, speed: Speed | None, bill: Bill | None, cards: int) -> None:
    print(f"{counted.rows:,} rows, {counted.images:,} images to draw, {counted.bad_count:,} bad")
    for bad in counted.bad:
        print(f"  line {bad.line}: {bad.why}")
    if counted.bad_count > len(counted.bad):
        print(f"  and {counted.bad_count - len(counted.bad):,} more")
    for item in counted.first:
        print(f"{item.output}  {item.prompt}")
    if speed is None:
        return
    print(f"\n{speed.seconds} s an image, {speed.because}")
    at_once = "" if cards == 1 else f" on {cards} cards"
    print(f"{show_time(float(speed.seconds * counted.images / cards))} to draw all{at_once}, if none is rejected")
    if bill is None:
        print("no forecast of dollars without a price: give --price, or --gpu")
        return
    show_forecast(bill)


def show_forecast(bill: Bill) -> None:
    accepted = bill.usd_per_accepted_image
    each = "" if accepted is None else f", ${accepted:.6f} an accepted image"
    print(f"${bill.total_usd:,.2f} for {bill.gpu_hours:,.1f} rented hours{each} *")
    print(bill.asterisk)
