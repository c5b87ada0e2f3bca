"""A plan, or a ranking of cards, as `millicent plan` shows it: as JSON, on a terminal, and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from millicent.cli.bars import Bar, draw_bars
from millicent.engine.machine_plan import MachinePlan, Ranking, price_range
from millicent.engine.placement import Placement, describe_recorded
from millicent.engine.workload import Asked
from millicent.errors import InputError
from millicent.facts.prices import STALE_AFTER_DAYS
from millicent.hardware.machine import GIB

ARTICLE = ("RTX 3090", "RTX 4090", "L40S", "RTX 5090", "A100 80GB SXM", "H100 SXM")  # the six of the article
MILLICENT = Decimal("0.00001")
NEVER_IDLE = "Dollars are of the card's time alone, never idle; `millicent cost` adds the rest of the bill."


# as JSON


def plan_to_dict(planned: MachinePlan, asked: Asked) -> dict[str, Any]:
    placement, formats, work = planned.placement, planned.formats, planned.work
    return {
        "model": asked.title,
        "card": planned.card,
        "known": planned.gpu is not None,
        "work": {
            **{name: getattr(work, name) for name in ("width", "height", "references", "steps", "guided")},
            **{name: getattr(work, name) for name in ("target_tokens", "reference_tokens", "text_tokens")},
        },
        "format": formats.format,
        "text_encoder": formats.text_encoder,
        "attention": formats.attention,
        "reuse_reference": formats.reuse_reference,
        "parts": [
            {name: getattr(part, name) for name in ("name", "where", "size_bytes", "card_bytes", "host_bytes", "because")}
            for part in placement.parts
        ],
        "arena_bytes": placement.arena_bytes,
        "resident_blocks": placement.resident_blocks,
        "resident_encoder_layers": placement.resident_encoder_layers,
        "streamed_step_bytes": placement.streamed_step_bytes,
        "abreast": placement.abreast,
        "streamed_text_bytes": placement.streamed_text_bytes,
        "exchanged_bytes": placement.exchanged_bytes,
        "pinned_bytes": placement.pinned_bytes,
        "peak_bytes": placement.peak_bytes,
        "phase_peak_bytes": dict(placement.peaks),
        "free_bytes": placement.free_bytes,
        "records_graphs": placement.records_graphs,
        "recorded": placement.recorded,
        "link_gb_per_s": planned.link_gb_per_s,
        "wave_images": planned.wave,
        "stages": {
            name: {"seconds": round(each.seconds, 4), "kind": each.kind, "error": each.error and round(each.error, 3)}
            for name, each in planned.stages.items()
        },
        "seconds_per_image": planned.seconds,
        "seconds_alone": planned.alone_s,
        "images_per_hour": planned.images_per_hour,
        "prices": [
            {
                **{name: getattr(each.price, name) for name in ("provider", "kind", "usd_per_hour", "since", "checked", "source")},
                "usd_per_image": each.usd,
                "stale": each.stale,
            }
            for each in planned.prices
        ],
        "alternatives": [
            {name: getattr(each, name) for name in ("format", "seconds", "usd", "in_turn", "streams", "refused", "chosen")}
            for each in planned.alternatives
        ],
        "because": [*asked.told, *planned.because],
    }


def ranking_to_dict(ranking: Ranking, asked: Asked) -> dict[str, Any]:
    return {
        "model": asked.title,
        "told": asked.told,
        "cards": [plan_to_dict(planned, asked) | {"usd_per_image": price_range(planned.prices)} for planned in ranking.plans],
        "refused": [{"card": name, "because": why} for name, why in ranking.refused],
    }


# on a terminal


def show_plan(planned: MachinePlan, asked: Asked) -> None:
    console = make_console()
    console.print(f"[bold]{escape(planned.card)}[/]: {escape(asked.title)}, {describe_work(asked)}")
    console.print(table_of_parts(planned))
    if planned.stages:
        console.print(table_of_stages(planned))
        console.print(describe_times(planned))
    if planned.prices:
        console.print(table_of_prices(planned))
    elif planned.gpu is not None:
        console.print(f"No rental price of {escape(planned.card)} is in our tables.")
    console.print(table_of_alternatives(planned))
    for line in (*asked.told, *planned.because, *([NEVER_IDLE] if planned.prices else [])):
        console.print(f"- {escape(line)}")


def describe_work(asked: Asked) -> str:
    work = asked.work
    return f"{work.width}x{work.height}, {count(work.references, 'reference')}, {count(work.steps, 'step')}"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def table_of_parts(planned: MachinePlan) -> Table:
    table = make_table("part", "where", ">GiB", ">GiB on card", "because")
    for part in planned.placement.parts:
        table.add_row(part.name, part.where, show_gib(part.size_bytes), show_gib(part.card_bytes), part.because)
    told = f"{describe_peak(planned.placement)}; {show_gib(planned.placement.free_bytes)} GiB are free"
    table.add_row("[bold]peak[/]", "", "", f"[bold]{show_gib(planned.placement.peak_bytes)}[/]", told)
    if planned.placement.pinned_bytes:
        table.add_row("pinned on the host", "host", show_gib(planned.placement.pinned_bytes), "", "for what crosses the link")
    return table


def describe_peak(placement: Placement) -> str:
    """When the card is fullest. Graphs keep their memory while other phases run."""
    fullest, _ = max(placement.peaks, key=lambda peak: peak[1])
    kept = f", beside what graphs of {describe_recorded(placement.recorded)} keep" if placement.recorded else ""
    return f"in {fullest}{kept}"


def show_gib(size_bytes: int) -> str:
    """As pre-flight and cards' own tools count memory; two digits, for the small parts."""
    return f"{size_bytes / GIB:.2f}"


def table_of_stages(planned: MachinePlan) -> Table:
    table = make_table("stage", ">seconds", "how known", ">within")
    for stage, each in planned.stages.items():
        table.add_row(stage, f"{each.seconds:.3f}", each.kind, "" if each.error is None else f"{each.error:.0%}")
    return table


def describe_times(planned: MachinePlan) -> str:
    assert planned.seconds is not None
    assert planned.alone_s is not None
    wave = f", in waves of {planned.wave}" if planned.wave > 1 else ""
    row = f"{planned.seconds:.2f} s an image in a row{wave} ({planned.images_per_hour:,.0f} an hour)"
    return f"{row}; {planned.alone_s:.2f} s for one alone. The host prepares and writes beside the card."


def table_of_prices(planned: MachinePlan) -> Table:
    table = make_table("provider", "kind", ">$ an hour", ">$ an image", ">millicents", "price of")
    for each in planned.prices:
        price = each.price
        day = price.seen or price.checked
        told = f"{day}, more than {STALE_AFTER_DAYS} days old" if each.stale else str(day)
        usd, millicents = f"{each.usd:.5f}", f"{each.usd / MILLICENT:.1f}"
        table.add_row(price.provider, price.kind, str(price.usd_per_hour), usd, millicents, told)
    return table


def table_of_alternatives(planned: MachinePlan) -> Table:
    table = make_table("format", ">seconds", "$ an image", "weights", "")
    for each in planned.alternatives:
        if each.refused is not None:
            table.add_row(each.format, "", "", "", escape(each.refused))
            continue
        seconds = "" if each.seconds is None else f"{each.seconds:.2f}"
        where = "streamed" if each.streams else "in turn" if each.in_turn else "stay on the card"
        table.add_row(each.format, seconds, show_range(each.usd), where, "chosen" if each.chosen else "")
    return table


def show_ranking(ranking: Ranking, asked: Asked) -> None:
    console = make_console()
    console.print(f"{escape(asked.title)}, {describe_work(asked)}. * are the article's six.")
    table = make_table("", "card", "format", ">seconds", ">an hour", "$ an image", "how known", "weights", "faster, if it holds")
    for planned in ranking.plans:
        table.add_row(*rank_row(planned))
    console.print(table)
    for line in (*asked.told, *told_of_ranking(ranking)):
        console.print(f"- {escape(line)}")


def rank_row(planned: MachinePlan) -> tuple[str, ...]:
    kinds = {f"{each.kind}{'' if each.error is None else f', {each.error:.0%}'}" for each in planned.stages.values()}
    best = planned.alternatives[0] if planned.alternatives else None
    is_faster = best is not None and best.seconds is not None and not best.chosen and planned.seconds is not None
    return (
        "*" if planned.card in ARTICLE else "",
        escape(planned.card),
        planned.formats.format,
        "?" if planned.seconds is None else f"{planned.seconds:.2f}",
        "?" if planned.images_per_hour is None else f"{planned.images_per_hour:,.0f}",
        show_range(price_range(planned.prices)) or "no price",
        ", ".join(sorted(kinds)) or "no rates",
        planned.placement.weights,
        f"{best.format}, {best.seconds:.2f}" if best is not None and is_faster else "",
    )


def told_of_ranking(ranking: Ranking) -> list[str]:
    stale = sorted({planned.card for planned in ranking.plans if any(each.stale for each in planned.prices)})
    told = [NEVER_IDLE]
    if stale:
        told.append(f"Prices more than {STALE_AFTER_DAYS} days old are among those of {', '.join(stale)}.")
    if unpriced := [planned.card for planned in ranking.plans if not planned.prices]:
        told.append(f"{len(unpriced)} cards have no rental price in our tables, and stand behind the others.")
    if ranking.refused:
        told.append(f"Cards on which nothing runs: {', '.join(name for name, _ in ranking.refused)}.")
    return told


def show_range(usd: tuple[Decimal, Decimal] | None) -> str:
    if usd is None:
        return ""
    return f"{usd[0]:.5f}" if usd[0] == usd[1] else f"{usd[0]:.5f} to {usd[1]:.5f}"


def make_console() -> Console:
    """A table that is piped must not be folded at 80 columns."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def make_table(*headings: str) -> Table:
    """Headings that begin with > stand over numbers."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in headings:
        table.add_column(heading.removeprefix(">"), justify="right" if heading.startswith(">") else "left", overflow="fold")
    return table


# as a picture


def chart_plan(planned: MachinePlan, asked: Asked) -> str:
    """Seconds of each stage. Raises InputError for a card without times."""
    if not planned.stages:
        raise InputError(
            f"There are no times of {planned.card} to draw.", "Leave out --plot, or plan for a card of `millicent gpus`."
        )
    bars = [
        Bar(name, each.seconds, each.seconds * (1 + (each.error or 0)), f"{each.seconds:.3f} s, {each.kind}", marked=True)
        for name, each in planned.stages.items()
    ]
    return draw_bars(
        f"Seconds of an edit on {planned.card}", f"{asked.title}, {describe_work(asked)}, {planned.formats.format}", bars
    )


def chart_ranking(ranking: Ranking, asked: Asked) -> str:
    """Millicents an image, of the cards that have a price."""
    bars = [priced_bar(planned, usd) for planned in ranking.plans if (usd := price_range(planned.prices))]
    if not bars:
        raise InputError("No card has both times and a price for this edit.", "Leave out --plot.")
    return draw_bars(
        "Millicents an image", f"{asked.title}, {describe_work(asked)}; pale: the dearest price; dark: the article's six", bars
    )


def priced_bar(planned: MachinePlan, usd: Sequence[Decimal]) -> Bar:
    low, high = (float(each / MILLICENT) for each in usd)
    kind = next(iter(planned.stages.values())).kind
    told = f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"
    return Bar(f"{planned.card}, {planned.formats.format}", low, high, f"{told}, {kind}", marked=planned.card in ARTICLE)
