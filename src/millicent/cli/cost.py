"""`millicent cost` and `millicent cost refresh`."""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from millicent.cost import PARTS, Bill, Comparison, Job, compare, forecast
from millicent.engine.machine_plan import plan_machine
from millicent.engine.settings import Settings
from millicent.engine.workload import ask
from millicent.errors import InputError
from millicent.facts import apis
from millicent.facts.gpus import Gpu, find_gpu
from millicent.facts.prices import (
    STALE_AFTER_DAYS,
    EgressPrice,
    RentalKind,
    RentalPrice,
    StorageKind,
    StoragePrice,
    is_stale,
    prices_of,
    read_egress,
    read_storage,
)
from millicent.hardware.machine import machine_of
from millicent.live_prices import Refreshed, refresh

cost = typer.Typer(
    help="What a job costs on a rented card, idle time and all, beside today's paid APIs.",
    invoke_without_command=True,
    no_args_is_help=True,
)

MILLICENT_USD = Decimal("0.00001")
# weights in BF16 and a converted copy
STORAGE_GB = Decimal(60)
STORAGE_KINDS: tuple[StorageKind, ...] = ("network volume", "block storage")
DEFAULT = Job(images=1)


def read_number(text: str) -> Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise typer.BadParameter(f"{text} is no number.")
    return number


def read_day(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(str(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text} is no date; write it as 2026-11-22.") from error


def number(help_text: str, metavar: str = "<number>") -> Any:
    return typer.Option(parser=read_number, metavar=metavar, help=help_text)


@cost.callback()
def forecast_cost(
    context: typer.Context,
    gpu: Annotated[str | None, typer.Option(help='The card, as "RTX 4090".')] = None,
    images: Annotated[int | None, typer.Option(help="Pictures to edit.")] = None,
    variants: Annotated[int, typer.Option(help="Edits of each.")] = DEFAULT.variants,
    seconds: Annotated[
        Decimal | None, number("Seconds of one edit on this card. Default: as `millicent plan` says.", "<s>")
    ] = None,
    busy: Annotated[Decimal, number("Share of the rented time that loaded cards work.", "<share>")] = DEFAULT.busy_share,
    reject: Annotated[Decimal, number("Share of the images that nobody wants.", "<share>")] = DEFAULT.reject_share,
    leave_rejects: Annotated[
        bool, typer.Option("--leave-rejects", help="Leave rejected images out. Default: make them again until accepted.")
    ] = False,
    retry: Annotated[Decimal, number("Share of the runs that fail and are repeated.", "<share>")] = DEFAULT.retry_share,
    spot_loss: Annotated[
        Decimal, number("Share of the work that is lost with cards that are taken away.", "<share>")
    ] = DEFAULT.spot_loss_share,
    cards: Annotated[int, typer.Option(help="How many are rented at once.")] = DEFAULT.cards,
    starts: Annotated[int, typer.Option(help="How often each is started.")] = DEFAULT.starts,
    load_s: Annotated[Decimal, number("Seconds to load, after the download, at each start.", "<s>")] = DEFAULT.load_s,
    download_gb: Annotated[Decimal, number("What each start downloads.", "<GB>")] = DEFAULT.download_gb,
    download_gb_per_s: Annotated[Decimal, number("How fast.", "<GB/s>")] = DEFAULT.download_gb_per_s,
    storage_gb: Annotated[
        Decimal | None, number("What is kept. Default: 60 where the provider's price is known, else nothing.", "<GB>")
    ] = None,
    storage_months: Annotated[Decimal, number("For how long.")] = DEFAULT.storage_months,
    storage_price: Annotated[Decimal | None, number("Dollars for a GB and month.", "<usd>")] = None,
    egress_gb: Annotated[Decimal, number("What is sent out of the provider's network.", "<GB>")] = DEFAULT.egress_gb,
    price: Annotated[Decimal | None, number("Dollars an hour of one card, in place of the known ones.", "<usd>")] = None,
    provider: Annotated[str | None, typer.Option(help="Whose price. Default: the cheapest on demand.")] = None,
    kind: Annotated[str | None, typer.Option(help=f"Which kind: {', '.join(get_args(RentalKind))}.")] = None,
    on: Annotated[
        datetime.date | None, typer.Option(parser=read_day, metavar="<date>", help="The day whose prices count. Default: today.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """What a job costs on a rented card, idle time and all, beside today's paid APIs.

    Shares are from 0 to 1. `millicent cost refresh` fetches today's prices.
    """
    if context.invoked_subcommand is not None:
        return
    if gpu is None or images is None:
        raise typer.BadParameter("Give --gpu and --images, as in --gpu 'RTX 4090' --images 50000.")
    card = find_gpu(gpu)
    day = on or datetime.date.today()
    each_s, because = seconds_of(card, seconds, day)
    chosen, others = choose_prices(card, day, price, provider, kind)
    storage = storage_of(chosen, storage_price, day)
    kept_gb = storage_gb if storage_gb is not None else STORAGE_GB if storage else Decimal(0)
    job = Job(
        images=images,
        variants=variants,
        busy_share=busy,
        reject_share=reject,
        redo_rejects=not leave_rejects,
        retry_share=retry,
        spot_loss_share=spot_loss,
        cards=cards,
        starts=starts,
        load_s=load_s,
        download_gb=download_gb,
        download_gb_per_s=download_gb_per_s,
        storage_gb=kept_gb,
        storage_months=storage_months,
        egress_gb=egress_gb,
    )
    egress = next((each for each in read_egress() if each.provider == chosen.provider), None)
    bill = forecast(job, each_s, chosen, storage, egress, because)
    # another provider's storage is its own matter: what is compared is the card's price
    other_bills = [forecast(job, each_s, other, storage, egress, because) for other in others]
    compared = compare(bill, apis.read_apis(), day)
    used = (*(storage if kept_gb else ()), *((egress,) if egress and egress_gb else ()))
    warnings = (*warn(bill, used, day), *warn_beside(others, compared, day))
    if as_json:
        print(json.dumps(summarize(card, bill, other_bills, compared, warnings), indent=2, default=write_value))
    else:
        show(card, bill, other_bills, compared, warnings)


def seconds_of(card: Gpu, given: Decimal | None, day: datetime.date) -> tuple[Decimal, str]:
    """The seconds of one edit on a card, and where they come from. Raises MachineError for a card that cannot draw."""
    if given is not None:
        return given, "given with --seconds"
    asked = ask()
    machine = machine_of(card, checked=day.isoformat())
    planned = plan_machine(asked.model, machine, Settings(), asked.work, on=day, gpu=card, compares=False)
    if planned.seconds is None:
        raise typer.BadParameter(f"Give the seconds of one edit: our table lacks the {card.name}'s rates.", param_hint="--seconds")
    denoise = planned.stages["denoise"]
    known = denoise.kind if denoise.error is None else f"{denoise.kind} within {denoise.error:.0%}"
    told = f"by `millicent plan`: {asked.title} in {planned.formats.format} at 1024x1024, {known}"
    if planned.placement.in_turn:
        told += f", with weights {planned.placement.weights}" + (f" in waves of {planned.wave}" if planned.wave > 1 else "")
    return Decimal(f"{planned.seconds:.4f}"), told


def choose_prices(
    card: Gpu, day: datetime.date, usd: Decimal | None, provider: str | None, kind: str | None
) -> tuple[RentalPrice, tuple[RentalPrice, ...]]:
    """The price that the bill uses, and the others of that day. Raises InputError where there is none."""
    kinds: tuple[RentalKind, ...] = get_args(RentalKind)
    if kind is not None and kind not in kinds:
        raise InputError(f"There is no rental of the kind {kind!r}.", f"Use {', '.join(kinds)}.")
    known = prices_of(card.name, day, prices_folder())
    if usd is not None:
        given = RentalPrice(
            provider=next(
                (each.provider for each in known if provider and _same(each.provider, provider)), provider or "your price"
            ),
            gpu=card.name,
            kind=next((each for each in kinds if each == kind), "on-demand"),
            usd_per_hour=usd,
            since=day,
            source="given with --price",
            checked=day,
        )
        return given, known
    fit = [each for each in known if (provider is None or _same(each.provider, provider)) and kind in (None, each.kind)]
    if not fit:
        told = " ".join(each for each in (provider, kind) if each)
        raise InputError(
            f"No{' ' + told if told else ''} price of the {card.name} on {day} is known.",
            "Give --price, or fetch today's prices with `millicent cost refresh`.",
        )
    chosen = next((each for each in fit if each.kind == "on-demand"), fit[0])
    return chosen, tuple(each for each in known if each is not chosen)


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def storage_of(price: RentalPrice, usd: Decimal | None, day: datetime.date) -> tuple[StoragePrice, ...]:
    """What the provider of a rental price asks for files that outlive the card; nothing where that is not known."""
    if usd is not None:
        return (
            StoragePrice(
                provider=price.provider,
                kind=STORAGE_KINDS[0],
                usd_per_gb_month=usd,
                source="given with --storage-price",
                checked=day,
            ),
        )
    known = [each for each in read_storage() if each.provider == price.provider]
    kind = next((kind for kind in STORAGE_KINDS if any(each.kind == kind for each in known)), None)
    return tuple(each for each in known if each.kind == kind)


def prices_folder() -> Path:
    """Where `refresh` keeps prices: in the user's data folder, by the XDG rules."""
    data = os.environ.get("XDG_DATA_HOME", "")
    return (Path(data) if Path(data).is_absolute() else Path.home() / ".local" / "share") / "millicent" / "prices"


def warn(bill: Bill, used: Sequence[StoragePrice | EgressPrice], day: datetime.date) -> tuple[str, ...]:
    """What makes a forecast doubtful. used: the prices in the bill beside the card's."""
    price, lines = bill.price, []
    if is_stale(price, day):
        lines.append(f"the rental price was last seen on {price.seen or price.checked}; run `millicent cost refresh`")
    if price.unverified:
        lines.append(f"the rental price is unverified ({', '.join(price.unverified)})" + (f": {price.note}" if price.note else ""))
    if price.highest_usd_per_hour is not None:
        lines.append(f"the bill takes the lowest price; up to ${price.highest_usd_per_hour} an hour was seen")
    if price.kind == "serverless":
        lines.append("serverless bills no idle time beyond its timeout: give --busy as the share that is billed")
    lines += [
        f"the price of {'traffic out' if isinstance(each, EgressPrice) else each.kind} was last seen on {each.seen or each.checked}"
        for each in used
        if is_stale(each, day)
    ]
    if not bill.fixed_usd_per_month:
        lines.append("storage is not counted: give --storage-gb and --storage-price")
    return tuple(dict.fromkeys(lines))


def warn_beside(others: Sequence[RentalPrice], compared: Sequence[Comparison], day: datetime.date) -> tuple[str, ...]:
    """What makes the prices beside a forecast doubtful."""
    lines = [f"{each.api.provider} {each.api.model}: {each.api.note}" for each in compared if each.api.contested]
    stale = {
        "other prices of the card": sum(is_stale(price, day) for price in others),
        "API prices": sum(is_stale(each.api, day) for each in compared),
    }
    lines += [f"{count} {noun} last seen more than {STALE_AFTER_DAYS} days before {day}" for noun, count in stale.items() if count]
    return tuple(dict.fromkeys(lines))


def write_value(value: object) -> str:
    """JSON has no Decimal, date or Path: text, of a number without an exponent."""
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def summarize(
    card: Gpu, bill: Bill, others: Sequence[Bill], compared: Sequence[Comparison], warnings: Sequence[str]
) -> dict[str, Any]:
    """What --json prints; dollars are text."""
    return {
        "gpu": card.name,
        "price": asdict(bill.price),
        "images": bill.images,
        "accepted": bill.accepted,
        "images_per_hour": bill.images_per_hour,
        "gpu_hours": bill.gpu_hours,
        "parts": [asdict(part) for part in bill.parts],
        "total_usd": bill.total_usd,
        "usd_per_image": bill.usd_per_image,
        "usd_per_accepted_image": bill.usd_per_accepted_image,
        "other_prices": [
            {**asdict(other.price), "total_usd": other.total_usd, "usd_per_accepted_image": other.usd_per_accepted_image}
            for other in others
        ],
        "apis": [{**asdict(each.api), **{key: value for key, value in asdict(each).items() if key != "api"}} for each in compared],
        "assumptions": bill.assumptions,
        "warnings": warnings,
    }


def show(card: Gpu, bill: Bill, others: Sequence[Bill], compared: Sequence[Comparison], warnings: Sequence[str]) -> None:
    # a table that is piped must not be folded at 80 columns
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    price, accepted = bill.price, bill.usd_per_accepted_image
    print(f"{card.name}, {price.provider} {price.kind}, ${price.usd_per_hour} an hour\n")
    console.print(table_of_parts(bill))
    if accepted is not None:
        print(f"\nper accepted image  {_show_each(accepted)} *")
    print(bill.asterisk)
    if others:
        print(f"\nother prices of the {card.name}, with the same job and storage")
        console.print(table_of_prices(others))
    an_hour = "" if bill.images_per_hour is None else f", which makes {bill.images_per_hour:,.0f} images in a rented hour"
    print(f"\npaid APIs, for as many images; even: the images from which on this card{an_hour}, is cheaper,")
    print("an hour without storage, a month with storage and one loading")
    console.print(table_of_apis(compared))
    for warning in warnings:
        print(f"warning: {warning}")


def table_of_parts(bill: Bill) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("hours", justify="right")
    table.add_column("$", justify="right")
    table.add_column("")
    for part in bill.parts:
        hours = f"{part.hours:,.2f}" if part.hours else ""
        table.add_row(part.name, hours, f"{part.usd:,.2f}", PARTS[part.name])
    table.add_row(
        "total", f"{bill.gpu_hours:,.2f}", f"{bill.total_usd:,.2f}", f"{bill.images:,.0f} images, {bill.accepted:,.0f} kept"
    )
    return table


def table_of_prices(bills: Sequence[Bill]) -> Table:
    table = Table("price", "$/hour", "since", "last seen", "total $", "per accepted image", box=None, pad_edge=False)
    for bill in bills:
        price = bill.price
        highest = f" to {price.highest_usd_per_hour}" if price.highest_usd_per_hour is not None else ""
        accepted = bill.usd_per_accepted_image
        table.add_row(
            f"{price.provider} {price.kind}",
            f"{price.usd_per_hour}{highest}",
            str(price.since),
            str(price.seen or price.checked),
            f"{bill.total_usd:,.2f}",
            "" if accepted is None else _show_each(accepted),
        )
    return table


def table_of_apis(compared: Sequence[Comparison]) -> Table:
    table = Table(
        "API", "$/image", "batch", "job $", "batch", "even/hour", "batch", "even/month", "batch", "status", "on top", "read"
    )
    table.box, table.pad_edge = None, False
    for each in compared:
        api = each.api
        ends = f", until {api.shutdown}" if api.shutdown else ""
        table.add_row(
            _name(api),
            str(api.usd_per_image),
            _show(api.batch_usd_per_image),
            f"{each.job_usd:,.0f}",
            _show(each.batch_job_usd, ",.0f"),
            f"{each.break_even_images_per_hour:,.0f}",
            _show(each.batch_break_even_images_per_hour, ",.0f"),
            _show(each.break_even_images_per_month, ",", "never"),
            _show(each.batch_break_even_images_per_month, ",", "never" if api.batch_usd_per_image else "-"),
            f"{each.status}{ends}{' (contested)' if api.contested else ''}",
            api.extra or "",
            str(api.seen or api.checked),
        )
    return table


def _name(api: apis.ApiPrice) -> str:
    return f"{api.provider} {api.model} {api.label}"


def _show(value: Decimal | int | None, form: str = "", none: str = "-") -> str:
    return none if value is None else format(value, form)


def _show_each(usd: Decimal) -> str:
    return f"${usd:.6f}  {usd / MILLICENT_USD:,.1f} millicents"


@cost.command("refresh")
def refresh_cost(
    providers: Annotated[
        list[str] | None, typer.Option("--provider", help="As gpuhunt calls it. Repeatable. Default: all that ask for no key.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")] = False,
) -> None:
    """Fetch today's rental prices through gpuhunt into a new, dated file in your data folder.

    GPUHUNT_CATALOG_DIR may name a folder of catalogs, which then are read in place of the network.
    """
    # we tell ourselves which provider gave nothing
    logging.getLogger("gpuhunt").setLevel(logging.CRITICAL)
    local = "GPUHUNT_CATALOG_DIR" in os.environ
    now = datetime.datetime.now()
    found = refresh(prices_folder(), now, **({"providers": tuple(providers)} if providers else {}), local=local)
    if as_json:
        print(json.dumps(asdict(found), indent=2, default=write_value))
    else:
        show_refreshed(found)


def show_refreshed(found: Refreshed) -> None:
    cards = {price.gpu for price in found.prices}
    print(f"{found.path}  {_count(len(found.prices), 'price')} of {_count(len(cards), 'card')}")
    if found.larger:
        print(f"left out, because they are of several cards at once: {_count(found.larger, 'offer')}")
    if found.unmapped:
        named = ", ".join(f"{name} ({_count(count, 'offer')})" for name, count in sorted(found.unmapped.items()))
        print(f"left out, because the name is no card's in the table or several cards': {named}")
    for name, reason in found.failed.items():
        print(f"warning: nothing from {name}: {reason}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
