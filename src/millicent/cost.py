"""What a job on a rented card costs, idle time and all: a bill that is the sum of its parts, and paid APIs beside it.

A forecast makes the seconds of each part from a Job; a measured run gives its own to `bill`. Money is Decimal, and each part is
rounded once, to a billionth of a dollar; so the parts add up to the total exactly.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import ROUND_CEILING, Decimal
from typing import Literal, get_args

from millicent.errors import InputError
from millicent.facts.apis import ApiPrice, Status, status_on
from millicent.facts.prices import EgressPrice, RentalPrice, StoragePrice

GpuPart = Literal["busy", "rejects", "retries", "spot losses", "loading", "idle"]
FixedPart = Literal["storage", "egress"]
PARTS: dict[GpuPart | FixedPart, str] = {
    "busy": "making the images that are kept",
    "rejects": "making images that were rejected",
    "retries": "runs that failed and gave no image",
    "spot losses": "work lost when a card was taken away",
    "loading": "fetching and loading weights",
    "idle": "rented, with nothing to do",
    "storage": "weights and images kept",
    "egress": "images sent out",
}

_NANO = Decimal("1e-9")
_HOUR_S = Decimal(3600)
_MOST = Decimal("1e12")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is wanted, and how well the rented time is used. Shares are from 0 to 1.

    busy_share: of the time that cards are up and loaded, the part that they work. reject_share: of the images that come out, the
    part that nobody wants. redo_rejects: make those again until they are accepted, 1/(1 - reject_share) images for each; or leave
    them out.
    retry_share: of the runs, the part that fails without an image; each is repeated until one succeeds.
    spot_loss_share: of all work, the part that is lost with a card that is taken away, and done again.
    starts: how often each card is started; each start downloads download_gb at download_gb_per_s and then loads for load_s.
    storage_gb, storage_months: what is kept, and for how long. egress_gb: what is sent out of the provider's network.
    """

    images: int
    variants: int = 1
    busy_share: Decimal = Decimal("0.7")
    reject_share: Decimal = Decimal("0.04")
    redo_rejects: bool = True
    retry_share: Decimal = Decimal(0)
    spot_loss_share: Decimal = Decimal(0)
    cards: int = 1
    starts: int = 1
    load_s: Decimal = Decimal(40)
    download_gb: Decimal = Decimal(40)
    download_gb_per_s: Decimal = Decimal("0.2")
    storage_gb: Decimal = Decimal(0)
    storage_months: Decimal = Decimal(1)
    egress_gb: Decimal = Decimal(0)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # a float would bring a binary fraction into the money
            assert type(value) in (int, bool, Decimal), f"{field.name} is a {type(value).__name__}"
            _check(field.name, value)


def _check(name: str, value: int | Decimal) -> None:
    if name in ("images", "variants", "cards", "starts"):
        allowed, wanted = 1 <= value <= _MOST, "at least 1"
    elif name == "busy_share":
        allowed, wanted = 0 < value <= 1, "above 0 and at most 1"
    elif name.endswith("_share"):
        allowed, wanted = 0 <= value < 1, "at least 0 and below 1"
    elif name == "download_gb_per_s":
        allowed, wanted = 0 < value <= _MOST, "above 0"
    else:
        allowed, wanted = 0 <= value <= _MOST, "0 or more"
    if not allowed:
        raise InputError(f"{name} is {value}; it must be {wanted}.", "Give another.")


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a bill. hours: of one card's rented time; 0 for what is not billed by time."""

    name: GpuPart | FixedPart
    hours: Decimal
    usd: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What was, or will be, paid. images, accepted: those that came out, and those of them that are kept; a forecast's are expected
    values and need not be whole.

    fixed_usd_per_month: what is paid each month whether or not an image is made. assumptions: everything the sum rests on.
    """

    parts: tuple[Part, ...]
    images: Decimal
    accepted: Decimal
    price: RentalPrice
    cards: int = 1
    fixed_usd_per_month: Decimal = Decimal(0)
    assumptions: tuple[str, ...] = ()

    @property
    def total_usd(self) -> Decimal:
        return sum((part.usd for part in self.parts), Decimal(0))

    @property
    def gpu_hours(self) -> Decimal:
        """Rented hours, added over the cards."""
        return sum((part.hours for part in self.parts), Decimal(0))

    @property
    def images_per_hour(self) -> Decimal | None:
        """Of one card's rented hours, idle and loading too; None where none was rented."""
        return _round(self.images / self.gpu_hours) if self.gpu_hours else None

    @property
    def usd_per_image(self) -> Decimal | None:
        """None where no image came out."""
        return _round(self.total_usd / self.images) if self.images else None

    @property
    def usd_per_accepted_image(self) -> Decimal | None:
        """None where no image was accepted."""
        return _round(self.total_usd / self.accepted) if self.accepted else None

    @property
    def asterisk(self) -> str:
        """The assumptions as text, a line each."""
        return "\n".join(f"* {assumption}" for assumption in self.assumptions)

    def usd_of(self, name: GpuPart | FixedPart) -> Decimal:
        return sum((part.usd for part in self.parts if part.name == name), Decimal(0))


def bill(
    seconds: Mapping[GpuPart, Decimal],
    fixed: Mapping[FixedPart, Decimal],
    price: RentalPrice,
    *,
    images: Decimal,
    accepted: Decimal,
    cards: int = 1,
    fixed_usd_per_month: Decimal = Decimal(0),
    assumptions: Sequence[str] = (),
) -> Bill:
    """A bill from seconds of rented time, measured or forecast and added over the cards, and from other dollars paid (`fixed`)."""
    assert 0 <= accepted <= images, f"{accepted} of {images} images accepted"
    hours = {name: seconds[name] / _HOUR_S for name in get_args(GpuPart) if name in seconds}
    assert hours.keys() == seconds.keys(), f"unknown part among {', '.join(seconds)}"
    assert fixed.keys() <= set(get_args(FixedPart)), f"unknown part among {', '.join(fixed)}"
    assert min((*seconds.values(), *fixed.values()), default=0) >= 0, "a part is negative"
    parts = [Part(name, hours[name], _round(hours[name] * price.usd_per_hour)) for name in hours]
    parts += [Part(name, Decimal(0), _round(fixed[name])) for name in get_args(FixedPart) if name in fixed]
    return Bill(
        parts=tuple(parts),
        images=images,
        accepted=accepted,
        price=price,
        cards=cards,
        fixed_usd_per_month=_round(fixed_usd_per_month),
        assumptions=tuple(assumptions),
    )


def forecast(
    job: Job,
    seconds_per_image: Decimal | float,
    price: RentalPrice,
    storage: Sequence[StoragePrice] = (),
    egress: EgressPrice | None = None,
    because: str = "as given",
) -> Bill:
    """The expected bill of a job. because: where the seconds of one image on one card come from.

    storage: one kind's prices of one provider, one for each step in size. Raises InputError where the job stores or sends out what
    no price is given for, and for seconds that are not above 0.
    """
    # by way of the text, a float's digits are those that the user sees
    each_s = seconds_per_image if isinstance(seconds_per_image, Decimal) else Decimal(str(seconds_per_image))
    if not (each_s.is_finite() and 0 < each_s <= _MOST):
        raise InputError(f"An image takes {each_s} s; it must be above 0.", "Give the seconds of one image.")
    wanted = Decimal(job.images * job.variants)
    images = wanted / (1 - job.reject_share) if job.redo_rejects else wanted
    accepted = wanted if job.redo_rejects else wanted * (1 - job.reject_share)
    monthly_usd = _monthly_usd(job, storage)
    return bill(
        _seconds(job, each_s, images, accepted),
        {"storage": monthly_usd * job.storage_months, "egress": _egress_usd(job, egress)},
        price,
        images=images,
        accepted=accepted,
        cards=job.cards,
        fixed_usd_per_month=monthly_usd,
        assumptions=(*_assume_time(job, each_s, because), *_assume_prices(job, price, storage, egress)),
    )


def _seconds(job: Job, each_s: Decimal, images: Decimal, accepted: Decimal) -> dict[GpuPart, Decimal]:
    busy_s = accepted * each_s
    rejects_s = images * each_s - busy_s
    retries_s = (busy_s + rejects_s) * _extra(job.retry_share)
    spot_s = (busy_s + rejects_s + retries_s) * _extra(job.spot_loss_share)
    idle_s = (busy_s + rejects_s + retries_s + spot_s) * (1 - job.busy_share) / job.busy_share
    loading_s = job.cards * job.starts * (job.download_gb / job.download_gb_per_s + job.load_s)
    return {
        "busy": busy_s,
        "rejects": rejects_s,
        "retries": retries_s,
        "spot losses": spot_s,
        "loading": loading_s,
        "idle": idle_s,
    }


def _extra(lost_share: Decimal) -> Decimal:
    """Tries in vain for each that counts, where this share of all tries is in vain."""
    return lost_share / (1 - lost_share)


def _monthly_usd(job: Job, storage: Sequence[StoragePrice]) -> Decimal:
    """Each GB at the price of the step that it lies in."""
    if not job.storage_gb:
        return Decimal(0)
    steps = sorted(storage, key=lambda step: step.above_gb)
    if not steps or steps[0].above_gb:
        raise InputError(f"{job.storage_gb} GB are to be kept, and no price of storage is known.", "Give the price, or 0 GB.")
    assert len({(step.provider, step.kind) for step in steps}) == 1, "storage prices of one kind and provider are wanted"
    ends = [*(Decimal(step.above_gb) for step in steps[1:]), job.storage_gb]
    kept_gb = [max(Decimal(0), min(end, job.storage_gb) - step.above_gb) for step, end in zip(steps, ends, strict=True)]
    return sum((gb * step.usd_per_gb_month for gb, step in zip(kept_gb, steps, strict=True)), Decimal(0))


def _egress_usd(job: Job, egress: EgressPrice | None) -> Decimal:
    if not job.egress_gb:
        return Decimal(0)
    if egress is None:
        raise InputError(f"{job.egress_gb} GB are to be sent out, and no price of that is known.", "Give the price, or 0 GB.")
    return job.egress_gb * egress.usd_per_gb


def _assume_time(job: Job, each_s: Decimal, because: str) -> tuple[str, ...]:
    cards = "one card" if job.cards == 1 else f"{job.cards} cards, billed each"
    rejects = (
        f"{_percent(job.reject_share)} of the images are rejected and made again until accepted"
        if job.redo_rejects
        else f"{_percent(job.reject_share)} of the images are rejected, paid and not made again"
    )
    start = f"{_plain(job.download_gb)} GB at {_plain(job.download_gb_per_s)} GB/s, then {_plain(job.load_s)} s to load"
    return (
        f"{job.images:,} images, {job.variants} variant{'s' if job.variants > 1 else ''} of each, on {cards}",
        f"{_plain(each_s)} s an image, {because}; nothing is reused between variants",
        f"loaded cards work {_percent(job.busy_share)} of the time they are rented",
        f"{rejects}; looking at them is not billed",
        f"{_percent(job.retry_share)} of the runs fail and are repeated",
        f"{_percent(job.spot_loss_share)} of the work is lost with cards that are taken away",
        f"each card starts {'once' if job.starts == 1 else f'{job.starts} times'}: {start}",
    )


def _assume_prices(job: Job, price: RentalPrice, storage: Sequence[StoragePrice], egress: EgressPrice | None) -> tuple[str, ...]:
    lines = [f"${price.usd_per_hour} an hour, {price.provider} {price.kind}, since {price.since}: {_cite(price)}"]
    if job.storage_gb:
        prices = " and ".join(
            f"${step.usd_per_gb_month}" + (f" above {step.above_gb} GB" if step.above_gb else "")
            for step in sorted(storage, key=lambda step: step.above_gb)
        )
        months = "a month" if job.storage_months == 1 else f"{_plain(job.storage_months)} months"
        kept = f"{_plain(job.storage_gb)} GB for {months}"
        lines.append(f"{kept}, {storage[0].provider} {storage[0].kind} at {prices} for a GB and month: {_cite(storage[0])}")
    else:
        lines.append("storage is not counted")
    if egress is not None and job.egress_gb:
        lines.append(f"{_plain(job.egress_gb)} GB sent out at ${egress.usd_per_gb} a GB, {egress.provider}: {_cite(egress)}")
    else:
        lines.append("traffic out is not counted")
    return (*lines, "people, taxes and minimum charges are not counted")


def _cite(price: RentalPrice | StoragePrice | EgressPrice) -> str:
    unverified = f"; unverified: {', '.join(price.unverified)}" if price.unverified else ""
    return f"{price.source}, read {price.checked}{unverified}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A paid API beside a bill. Whatever starts with batch_ is at its batch price, None where it has none.

    job_usd: what it asks for as many images as the bill has, rejected ones too.
    break_even_images_per_hour: of one card's billed hours; above it the card is cheaper. Storage is left out.
    break_even_images_per_month: above it the card is cheaper, with a month's storage and this job's loading paid once a month; None
    where an image costs more on the card even without those.
    """

    api: ApiPrice
    status: Status
    job_usd: Decimal
    batch_job_usd: Decimal | None
    break_even_images_per_hour: Decimal
    batch_break_even_images_per_hour: Decimal | None
    break_even_images_per_month: int | None
    batch_break_even_images_per_month: int | None


def compare(bill: Bill, apis: Iterable[ApiPrice], today: datetime.date) -> tuple[Comparison, ...]:
    """Each API that is not shut down on that day, the cheapest first. What its `extra` names comes on top of its price."""
    live = sorted(
        (api for api in apis if status_on(api, today) != "shut down"),
        key=lambda api: (api.usd_per_image, api.provider, api.model, api.label),
    )
    return tuple(_compare(bill, api, status_on(api, today)) for api in live)


def _compare(bill: Bill, api: ApiPrice, status: Status) -> Comparison:
    batch = api.batch_usd_per_image
    return Comparison(
        api=api,
        status=status,
        job_usd=_round(bill.images * api.usd_per_image),
        batch_job_usd=None if batch is None else _round(bill.images * batch),
        break_even_images_per_hour=_round(bill.price.usd_per_hour / api.usd_per_image),
        batch_break_even_images_per_hour=None if batch is None else _round(bill.price.usd_per_hour / batch),
        break_even_images_per_month=_monthly_break_even(bill, api.usd_per_image),
        batch_break_even_images_per_month=None if batch is None else _monthly_break_even(bill, batch),
    )


def _monthly_break_even(bill: Bill, api_usd: Decimal) -> int | None:
    fixed_usd = bill.fixed_usd_per_month + bill.usd_of("loading")
    if not bill.images:
        return None
    each_usd = (bill.total_usd - bill.usd_of("storage") - bill.usd_of("loading")) / bill.images
    if each_usd >= api_usd:
        return None
    return int((fixed_usd / (api_usd - each_usd)).to_integral_value(ROUND_CEILING))


def _round(usd: Decimal) -> Decimal:
    return usd.quantize(_NANO)


def _percent(share: Decimal) -> str:
    return f"{_plain(share * 100)} %"


def _plain(number: Decimal) -> str:
    """Without trailing zeros, and without an exponent."""
    return f"{number.normalize():f}"
