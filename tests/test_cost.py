"""Bills: the sum of their parts, worked examples by hand, and what must hold of any job."""

from __future__ import annotations

import datetime
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.cost import PARTS, Bill, Comparison, Job, bill, compare, forecast
from millicent.errors import InputError
from millicent.facts.apis import ApiPrice, read_apis
from millicent.facts.prices import EgressPrice, RentalPrice, read_storage

DAY = datetime.date(2026, 11, 25)
PRICE = RentalPrice(
    provider="RunPod", gpu="RTX 4090", kind="on-demand", usd_per_hour=Decimal("0.36"), since=DAY, source="a page", checked=DAY
)
NETWORK = tuple(each for each in read_storage() if (each.provider, each.kind) == ("RunPod", "network volume"))
EGRESS = EgressPrice(provider="AWS", usd_per_gb=Decimal("0.09"), source="a page", checked=DAY)
API = ApiPrice(
    provider="Google",
    model="painter",
    label="1K",
    usd_per_image=Decimal("0.0336"),
    batch_usd_per_image=Decimal("0.0168"),
    status="live",
    source="a page",
    checked=DAY,
)
# 100 images of 10 s at $0.36 an hour: $0.001 an image
PLAIN = Job(images=100, busy_share=Decimal(1), reject_share=Decimal(0), load_s=Decimal(0), download_gb=Decimal(0))

shares = st.decimals(0, "0.95", places=2)
jobs = st.builds(
    Job,
    images=st.integers(1, 10**6),
    variants=st.integers(1, 9),
    busy_share=st.decimals("0.01", 1, places=2),
    reject_share=shares,
    redo_rejects=st.booleans(),
    retry_share=shares,
    spot_loss_share=shares,
    cards=st.integers(1, 16),
    starts=st.integers(1, 9),
    load_s=st.decimals(0, 1000, places=1),
    download_gb=st.decimals(0, 100, places=1),
    download_gb_per_s=st.decimals("0.01", 5, places=2),
    storage_gb=st.decimals(0, 5000, places=0),
    storage_months=st.decimals(0, 24, places=1),
    egress_gb=st.decimals(0, 1000, places=0),
)
seconds = st.decimals("0.1", 600, places=3)
prices = st.decimals("0.01", 20, places=4).map(lambda usd: replace(PRICE, usd_per_hour=usd))


def forecast_all(job: Job, each_s: Decimal | float = Decimal(10), price: RentalPrice = PRICE) -> Bill:
    return forecast(job, each_s, price, NETWORK, EGRESS)


def usd(bill: Bill) -> dict[str, Decimal]:
    return {part.name: part.usd for part in bill.parts}


def test_a_job_without_losses_costs_its_seconds() -> None:
    plain = forecast_all(PLAIN)
    assert plain.total_usd == Decimal("0.1")
    assert plain.usd_per_image == plain.usd_per_accepted_image == Decimal("0.001")
    assert plain.images_per_hour == 360
    assert {name: each for name, each in usd(plain).items() if each} == {"busy": Decimal("0.1")}


def test_rejects_are_redone_until_accepted() -> None:
    redone = forecast_all(replace(PLAIN, reject_share=Decimal("0.2")))
    assert (redone.images, redone.accepted) == (125, 100)
    assert usd(redone)["rejects"] == Decimal("0.025")
    assert redone.usd_per_image == Decimal("0.001")
    assert redone.usd_per_accepted_image == Decimal("0.00125")


def test_rejects_that_are_left_are_paid_all_the_same() -> None:
    left = forecast_all(replace(PLAIN, reject_share=Decimal("0.2"), redo_rejects=False))
    assert (left.images, left.accepted) == (100, 80)
    assert (usd(left)["busy"], usd(left)["rejects"]) == (Decimal("0.08"), Decimal("0.02"))
    assert left.usd_per_accepted_image == Decimal("0.00125")


def test_each_loss_is_a_part_of_its_own() -> None:
    job = replace(
        PLAIN,
        variants=2,
        retry_share=Decimal("0.2"),
        spot_loss_share=Decimal("0.5"),
        busy_share=Decimal("0.8"),
        cards=2,
        starts=3,
        load_s=Decimal(20),
        download_gb=Decimal(40),
        download_gb_per_s=Decimal("0.5"),
        storage_gb=Decimal(60),
        storage_months=Decimal(2),
        egress_gb=Decimal(10),
    )
    assert usd(forecast_all(job)) == {
        "busy": Decimal("0.2"),
        "rejects": 0,
        "retries": Decimal("0.05"),  # a fifth fails: 1.25 runs for each image
        "spot losses": Decimal("0.25"),  # half is lost: all of it twice
        "idle": Decimal("0.125"),  # a fifth of 0.5 / 0.8
        "loading": Decimal("0.06"),  # 2 cards, 3 times, 100 s
        "storage": Decimal("8.4"),
        "egress": Decimal("0.9"),
    }


def test_storage_above_a_step_costs_less_and_below_it_the_same() -> None:
    monthly = [
        forecast_all(replace(PLAIN, storage_gb=Decimal(gb), storage_months=Decimal(3))).fixed_usd_per_month
        for gb in (999, 1000, 1500)
    ]
    assert monthly == [Decimal("69.93"), 70, 95]


def test_what_has_no_price_is_refused_and_not_free() -> None:
    with pytest.raises(InputError, match="no price of storage"):
        forecast(replace(PLAIN, storage_gb=Decimal(60)), 10.0, PRICE)
    with pytest.raises(InputError, match="sent out"):
        forecast(replace(PLAIN, egress_gb=Decimal(60)), 10.0, PRICE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", 0),
        ("variants", 0),
        ("cards", 0),
        ("starts", 0),
        ("busy_share", Decimal(0)),
        ("busy_share", Decimal("1.01")),
        ("reject_share", Decimal(1)),
        ("reject_share", Decimal("-0.1")),
        ("retry_share", Decimal(1)),
        ("spot_loss_share", Decimal(1)),
        ("load_s", Decimal(-1)),
        ("download_gb_per_s", Decimal(0)),
        ("storage_gb", Decimal("1e13")),
    ],
)
def test_an_impossible_job_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=name):
        replace(PLAIN, **{name: value})


@pytest.mark.parametrize("each_s", [0, -1.0, float("nan"), float("inf")])
def test_impossible_seconds_are_refused(each_s: float) -> None:
    with pytest.raises(InputError, match="above 0"):
        forecast(PLAIN, each_s, PRICE)


def test_no_float_reaches_the_money() -> None:
    with pytest.raises(AssertionError, match="busy_share is a float"):
        replace(PLAIN, busy_share=0.7)  # type: ignore[arg-type]
    # the digits that are seen are those that count: 0.1 is a tenth
    assert forecast(PLAIN, 0.1, PRICE).total_usd == Decimal("0.001")
    for part in forecast(PLAIN, 0.1, PRICE).parts:
        assert type(part.usd) is type(part.hours) is Decimal


def test_a_measured_run_makes_a_bill_too() -> None:
    measured = bill(
        {"busy": Decimal(1800), "idle": Decimal(1800)},
        {"storage": Decimal("1.5")},
        PRICE,
        images=Decimal(400),
        accepted=Decimal(372),
    )
    assert measured.total_usd == Decimal("1.86")
    assert measured.gpu_hours == 1
    assert measured.usd_per_accepted_image == Decimal("0.005")


def test_a_run_that_kept_nothing_has_no_price_an_image() -> None:
    nothing = bill({"loading": Decimal(60)}, {}, PRICE, images=Decimal(0), accepted=Decimal(0))
    assert nothing.usd_per_image is nothing.usd_per_accepted_image is None
    assert nothing.total_usd > 0
    assert compare(nothing, [API], DAY)[0].break_even_images_per_month is None


def test_a_bill_of_unknown_parts_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="unknown part"):
        bill({"coffee": Decimal(1)}, {}, PRICE, images=Decimal(1), accepted=Decimal(1))  # type: ignore[dict-item]


def test_the_asterisk_names_everything_that_the_sum_rests_on() -> None:
    job = replace(PLAIN, images=50000, variants=3, busy_share=Decimal("0.7"), reject_share=Decimal("0.04"), storage_gb=Decimal(60))
    price = replace(PRICE, unverified=("kind",))
    text = forecast(job, 5.0, price, NETWORK, because="measured on another card").asterisk
    for told in (
        "50,000 images, 3 variants",
        "5 s an image, measured on another card",
        "70 %",
        "4 % of the images are rejected and made again until accepted",
        "fail and are repeated",
        "taken away",
        "$0.36 an hour, RunPod on-demand, since 2026-11-25: a page, read 2026-11-25; unverified: kind",
        "60 GB for a month, RunPod network volume at $0.07",
        "traffic out is not counted",
    ):
        assert told in text
    assert all(line.startswith("* ") for line in text.splitlines())
    assert "not made again" in forecast(replace(job, redo_rejects=False), 5.0, price, NETWORK).asterisk
    assert "storage is not counted" in forecast(PLAIN, 5.0, price).asterisk


@given(jobs, seconds, prices)
def test_the_parts_are_the_bill(job: Job, each_s: Decimal, price: RentalPrice) -> None:
    made = forecast_all(job, each_s, price)
    assert sum(part.usd for part in made.parts) == made.total_usd
    assert {part.name for part in made.parts} == set(PARTS)
    assert all(part.usd >= 0 for part in made.parts)
    # each part by itself is its hours at the price, and the hours are those of the job
    for part in made.parts:
        if part.hours:
            assert abs(part.usd - part.hours * price.usd_per_hour) <= Decimal("1e-9")
    assert abs(sum(part.hours for part in made.parts) - made.gpu_hours) == 0
    assert made.accepted <= made.images


@given(jobs, seconds, prices, st.decimals("0.0001", "0.9999", places=4))
def test_a_cheaper_price_never_raises_the_cost(job: Job, each_s: Decimal, price: RentalPrice, factor: Decimal) -> None:
    cheaper = replace(price, usd_per_hour=price.usd_per_hour * factor)
    before, after = usd(forecast_all(job, each_s, price)), usd(forecast_all(job, each_s, cheaper))
    assert all(after[name] <= before[name] for name in before)


@given(jobs, seconds, prices, shares)
def test_more_rejects_never_lower_the_cost(job: Job, each_s: Decimal, price: RentalPrice, share: Decimal) -> None:
    few, many = (forecast_all(replace(job, reject_share=each), each_s, price) for each in sorted((job.reject_share, share)))
    # what is left out is paid the same, and rounded in two parts
    assert many.total_usd >= few.total_usd - (0 if job.redo_rejects else Decimal("2e-9"))
    assert few.usd_per_accepted_image is not None
    assert many.usd_per_accepted_image is not None
    assert many.usd_per_accepted_image >= few.usd_per_accepted_image - Decimal("1e-9")


@given(jobs, seconds)
def test_a_card_that_is_always_busy_is_never_idle(job: Job, each_s: Decimal) -> None:
    always = usd(forecast_all(replace(job, busy_share=Decimal(1)), each_s))
    assert always["idle"] == 0
    assert all(usd(forecast_all(job, each_s))[name] == always[name] for name in always if name != "idle")


@given(jobs, seconds, st.sampled_from(["retry_share", "spot_loss_share"]), shares)
def test_more_losses_never_lower_the_cost(job: Job, each_s: Decimal, name: str, share: Decimal) -> None:
    few, many = (forecast_all(replace(job, **{name: each}), each_s) for each in sorted((getattr(job, name), share)))
    assert many.total_usd >= few.total_usd


def compare_one(made: Bill, api: ApiPrice = API) -> Comparison:
    (found,) = compare(made, [api], DAY)
    return found


@pytest.mark.parametrize(("usd_per_hour", "images"), [("0.69", 21), ("0.99", 29), ("1.49", 44), ("3.29", 98)])
def test_break_even_in_a_billed_hour(usd_per_hour: str, images: int) -> None:
    made = forecast(PLAIN, 10.0, replace(PRICE, usd_per_hour=Decimal(usd_per_hour)))
    found = compare_one(made)
    assert round(found.break_even_images_per_hour) == images
    assert found.batch_break_even_images_per_hour == pytest.approx(found.break_even_images_per_hour * 2)


def test_an_api_does_the_same_job_rejects_included() -> None:
    found = compare_one(forecast_all(replace(PLAIN, reject_share=Decimal("0.2"))))
    assert (found.job_usd, found.batch_job_usd) == (Decimal("4.2"), Decimal("2.1"))
    assert compare_one(forecast_all(PLAIN), replace(API, batch_usd_per_image=None)).batch_job_usd is None


@given(jobs, seconds, prices)
def test_at_the_monthly_break_even_the_card_is_no_dearer_and_one_image_before_it_is(
    job: Job, each_s: Decimal, price: RentalPrice
) -> None:
    made = forecast_all(job, each_s, price)
    found = compare_one(made)
    fixed = made.fixed_usd_per_month + usd(made)["loading"]
    each_usd = (made.total_usd - usd(made)["storage"] - usd(made)["loading"]) / made.images
    even = found.break_even_images_per_month
    if even is None:
        assert each_usd >= API.usd_per_image
        return
    slack = Decimal("1e-15")
    assert fixed + even * each_usd <= even * API.usd_per_image + slack
    if even:
        assert fixed + (even - 1) * each_usd > (even - 1) * API.usd_per_image - slack


def test_storage_makes_the_monthly_break_even() -> None:
    # $4.20 a month against 0.0336 - 0.001 an image: 128.8
    made = forecast_all(replace(PLAIN, storage_gb=Decimal(60)))
    assert compare_one(made).break_even_images_per_month == 129
    assert compare_one(forecast_all(PLAIN)).break_even_images_per_month == 0


def test_a_slow_card_never_breaks_even() -> None:
    slow = forecast(PLAIN, 400.0, PRICE)  # $0.04 an image
    assert compare_one(slow).break_even_images_per_month is None


def test_what_is_shut_down_is_not_compared_and_a_contested_end_is() -> None:
    compared = compare(forecast_all(PLAIN), read_apis(), DAY)
    models = {each.api.model: each.status for each in compared}
    assert "gpt-image-1" not in models
    assert models["gemini-2.5-flash-image"] == "deprecated"
    assert models["gemini-3.1-flash-lite-image"] == "live"
    asked = [each.api.usd_per_image for each in compared]
    assert asked == sorted(asked)
    later = {each.api.model for each in compare(forecast_all(PLAIN), read_apis(), datetime.date(2026, 12, 1))}
    assert "gpt-image-1.5" in models.keys() - later
