"""Rental, storage and egress prices: what the package says, what is refused, and how a user's files go before it."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.errors import InputError
from millicent.facts import prices
from millicent.facts.gpus import read_gpus
from millicent.facts.prices import PRICES, STALE_AFTER_DAYS, is_stale, prices_of, read_egress, read_prices, read_storage

DAY = datetime.date(2026, 11, 25)
ROW = """[[rental]]
provider = "RunPod"
gpu = "RTX 4090"
kind = "on-demand"
usd_per_hour = "0.55"
since = 2026-11-25
source = "a page"
checked = 2026-11-25
"""


def write(folder: Path, text: str, name: str = "2026-11-25.toml") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return folder


def on_demand(day: datetime.date, folder: Path) -> list[str]:
    found = prices_of("RTX 4090", day, folder)
    return [str(price.usd_per_hour) for price in found if (price.provider, price.kind) == ("RunPod", "on-demand")]


def test_every_price_is_of_a_card_in_the_table() -> None:
    assert {price.gpu for price in read_prices()} <= {gpu.name for gpu in read_gpus()}


def test_the_4090_costs_what_the_article_says() -> None:
    on_runpod = {price.kind: price.usd_per_hour for price in prices_of("RTX 4090", DAY) if price.provider == "RunPod"}
    assert on_runpod["community"] == Decimal("0.34")
    assert on_runpod["on-demand"] == Decimal("0.69")


def test_the_cards_of_the_article_have_a_price() -> None:
    for gpu in ("RTX 3090", "RTX 4090", "L40S", "RTX 5090", "A100 80GB SXM", "H100 SXM"):
        assert prices_of(gpu, DAY), gpu


def test_serverless_hours_are_3600_of_their_seconds() -> None:
    per_second = {"RTX 4090": "0.00031", "L4": "0.00019", "A40": "0.00034", "L40S": "0.00053", "B200": "0.00240"}
    for gpu, usd in per_second.items():
        (price,) = [price for price in prices_of(gpu, DAY) if price.kind == "serverless"]
        assert price.usd_per_hour == Decimal(usd) * 3600


def test_a_price_counts_from_its_first_to_its_last_day() -> None:
    def community(day: datetime.date) -> list[Decimal]:
        return [price.usd_per_hour for price in prices_of("RTX 4090", day) if price.provider == "Vast.ai"]

    assert community(datetime.date(2026, 4, 30)) == []
    assert community(datetime.date(2026, 5, 1)) == [Decimal("0.31")]
    assert community(datetime.date(2026, 5, 31)) == [Decimal("0.31")]
    assert community(datetime.date(2026, 6, 1)) == [Decimal("0.68")]


def test_prices_come_cheapest_first_and_an_unknown_card_has_none() -> None:
    found = [price.usd_per_hour for price in prices_of("RTX 4090", DAY)]
    assert found == sorted(found)
    assert prices_of("RTX 9999", DAY) == ()


def test_each_file_holds_one_provider_by_whose_name_it_goes() -> None:
    for path in PRICES.glob("*.toml"):
        named = {row["provider"] for rows in prices.read_tables(path).values() for row in rows}
        assert [name.lower().replace(".", "-").replace(" ", "-") for name in named] == [path.stem]


def test_storage_and_egress() -> None:
    network = [price for price in read_storage() if (price.provider, price.kind) == ("RunPod", "network volume")]
    assert {price.above_gb: price.usd_per_gb_month for price in network} == {0: Decimal("0.07"), 1000: Decimal("0.05")}
    assert {price.provider: price.usd_per_gb for price in read_egress()} == {"RunPod": Decimal(0), "AWS": Decimal("0.09")}


def test_what_a_weak_source_says_is_marked() -> None:
    for price in read_prices():
        if "deploybase" in price.source:
            assert {"usd_per_hour", "kind"} <= set(price.unverified)
    assert [price.unverified for price in read_egress() if price.provider == "AWS"] == [("usd_per_gb",)]


def test_a_price_is_stale_after_60_days() -> None:
    assert STALE_AFTER_DAYS == 60
    (price,) = [price for price in prices_of("RTX 4090", DAY) if price.kind == "on-demand"]
    assert not is_stale(price, price.checked + datetime.timedelta(days=60))
    assert is_stale(price, price.checked + datetime.timedelta(days=61))


def test_an_old_page_read_yesterday_is_stale() -> None:
    (price,) = [price for price in prices_of("RTX 4090", DAY) if price.kind == "spot"]
    assert price.checked == datetime.date(2026, 11, 22)
    assert is_stale(price, DAY)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('usd_per_hour = "0.55"', "usd_per_hour = 0.55", "no text"),
        ('usd_per_hour = "0.55"', 'usd_per_hour = "cheap"', "no number"),
        ('usd_per_hour = "0.55"', 'usd_per_hour = "-1"', "zero or more"),
        ('usd_per_hour = "0.55"', 'usd_per_hour = "NaN"', "zero or more"),
        ('usd_per_hour = "0.55"', 'usd_per_hour = "0"', "costs nothing"),
        ('usd_per_hour = "0.55"', 'usd_per_hour = "0.55"\nhighest_usd_per_hour = "0.54"', "up to 0.54"),
        ('source = "a page"\n', "", "lacks source"),
        ('source = "a page"', 'source = " "', "source"),
        ("checked = 2026-11-25\n", "", "lacks checked"),
        ("since = 2026-11-25", 'since = "2026-11-25"', "date"),
        ("since = 2026-11-25", "since = 2026-11-25T10:00:00", "date"),
        ("since = 2026-11-25", "since = 2026-11-25\nuntil = 2026-11-24", "before it begins"),
        ('kind = "on-demand"', 'kind = "stolen"', "stolen"),
        ('gpu = "RTX 4090"', 'card = "RTX 4090"', "unknown key card"),
        ("checked = 2026-11-25", 'checked = 2026-11-25\nunverified = ["prise"]', "prise"),
        ("[[rental]]", "[[rentals]]", "unknown table rentals"),
        ("[[rental]]", "[rental]", "no list"),
        ("[[rental]]", "[[rental", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ROW
    with pytest.raises(InputError, match=message):
        read_prices(write(tmp_path, ROW.replace(old, new, 1)))


def test_a_wrong_storage_row_in_a_users_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks"):
        read_prices(write(tmp_path, '[[storage]]\nprovider = "RunPod"\n'))


@pytest.mark.parametrize(
    ("first_until", "second_since"), [(None, "2026-12-01"), ("2026-12-01", "2026-12-01"), (None, "2026-11-25")]
)
def test_dates_of_one_provider_card_and_kind_that_overlap_are_refused(
    tmp_path: Path, first_until: str | None, second_since: str
) -> None:
    first = ROW + (f"until = {first_until}\n" if first_until else "")
    second = ROW.replace("since = 2026-11-25", f"since = {second_since}")
    with pytest.raises(InputError, match=r"RunPod RTX 4090 on-demand has a price from 2026-11-25"):
        read_prices(write(tmp_path, first + second))


def test_an_overlap_within_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ROW, "one.toml")
    write(tmp_path, ROW, "two.toml")
    monkeypatch.setattr(prices, "PRICES", tmp_path)
    with pytest.raises(InputError, match="and another from 2026-11-25"):
        prices._read_packaged.__wrapped__()


def test_dates_that_meet_do_not_overlap(tmp_path: Path) -> None:
    first = ROW + "until = 2026-11-30\n"
    second = ROW.replace("since = 2026-11-25", "since = 2026-12-01").replace("0.55", "0.56")
    folder = write(tmp_path, first + second)
    assert on_demand(datetime.date(2026, 11, 30), folder) == ["0.55"]
    assert on_demand(datetime.date(2026, 12, 1), folder) == ["0.56"]


def test_a_users_newer_price_ends_the_packages_and_keeps_history(tmp_path: Path) -> None:
    folder = write(tmp_path, ROW)
    assert on_demand(datetime.date(2026, 11, 24), folder) == ["0.69"]
    assert on_demand(DAY, folder) == ["0.55"]
    assert on_demand(DAY, tmp_path / "none") == ["0.69"]
    # the other kinds are untouched
    assert [price for price in prices_of("RTX 4090", DAY, folder) if price.kind == "community"]


def test_of_two_files_of_one_day_the_later_counts(tmp_path: Path) -> None:
    write(tmp_path, ROW)
    folder = write(tmp_path, ROW.replace("0.55", "0.56"), "2026-11-25T101112.toml")
    assert on_demand(DAY, folder) == ["0.56"]


def test_an_older_snapshot_stays_as_history(tmp_path: Path) -> None:
    write(tmp_path, ROW)
    newer = ROW.replace("2026-11-25", "2026-12-05").replace("0.55", "0.60")
    folder = write(tmp_path, newer, "2026-12-05.toml")
    assert on_demand(datetime.date(2026, 12, 4), folder) == ["0.55"]
    assert on_demand(datetime.date(2026, 12, 5), folder) == ["0.60"]


@given(st.lists(st.tuples(st.dates(datetime.date(2026, 11, 23), datetime.date(2027, 3, 1)), st.integers(1, 500)), max_size=8))
def test_any_history_of_snapshots_leaves_one_price_a_day(rows: list[tuple[datetime.date, int]]) -> None:
    rows = sorted(rows, key=lambda row: row[0])
    merged = tuple(
        price for price in read_prices() if (price.gpu, price.kind, price.provider) == ("RTX 4090", "on-demand", "RunPod")
    )
    template = merged[0]
    for since, cents in rows:
        newer = prices.replace(template, since=since, usd_per_hour=Decimal(cents) / 100)
        merged = prices._supersede(merged, (newer,))
    prices._check_overlaps(merged, "merged")
    assert all(price.since <= (price.until or price.since) for price in merged)
    for since, _ in rows:
        (held,) = [price for price in merged if price.since <= since <= (price.until or since)]
        assert held.usd_per_hour == [Decimal(cents) / 100 for day, cents in rows if day == since][-1]
