"""What paid image APIs ask: the figures that comparisons rest on, their ends, and what is refused."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path

import pytest

from millicent.errors import InputError
from millicent.facts.apis import ApiPrice, current_apis, read_apis, status_on
from millicent.facts.prices import is_stale

DAY = datetime.date(2026, 11, 25)
ROW = """[[api]]
provider = "Somebody"
model = "painter"
label = "1K"
usd_per_image = "0.04"
batch_usd_per_image = "0.02"
status = "live"
source = "a page"
checked = 2026-11-22
"""


def find(model: str, label: str, provider: str = "Google") -> ApiPrice:
    (found,) = [price for price in read_apis() if (price.provider, price.model, price.label) == (provider, model, label)]
    return found


@pytest.mark.parametrize(
    ("provider", "model", "label", "usd", "batch"),
    [
        ("Google", "gemini-2.5-flash-image", "1K", "0.039", "0.0195"),
        ("Google", "gemini-3.1-flash-lite-image", "1K", "0.0336", "0.0168"),
        ("Google", "gemini-nano-banana-2.1", "1K", "0.0336", "0.0168"),
        ("Google", "gemini-3.1-flash-image", "4K", "0.151", "0.0755"),
        ("Google", "gemini-3-pro-image", "4K", "0.24", "0.12"),
        ("OpenAI", "gpt-image-1-mini", "low", "0.005", None),
        ("fal", "gpt-image-2", "medium, edit", "0.061", None),
        ("fal", "qwen-image-edit-2511", "megapixel", "0.03", None),
    ],
)
def test_prices_are_those_of_their_sources(provider: str, model: str, label: str, usd: str, batch: str | None) -> None:
    price = find(model, label, provider)
    assert price.usd_per_image == Decimal(usd)
    assert price.batch_usd_per_image == (None if batch is None else Decimal(batch))


def test_googles_batch_is_half() -> None:
    for price in read_apis():
        if price.provider == "Google":
            assert price.batch_usd_per_image == price.usd_per_image / 2


def test_what_was_shut_down_is_not_current() -> None:
    assert "gpt-image-1" not in {price.model for price in current_apis(DAY)}
    assert "gpt-image-1" in {price.model for price in read_apis()}


def test_what_will_be_shut_down_is_current_until_its_day() -> None:
    price = find("gpt-image-1-mini", "low", "OpenAI")
    assert status_on(price, datetime.date(2026, 11, 30)) == "deprecated"
    assert status_on(price, datetime.date(2026, 12, 1)) == "shut down"
    assert price in current_apis(datetime.date(2026, 11, 30))
    assert price not in current_apis(datetime.date(2026, 12, 1))


def test_a_contested_end_is_told_and_does_not_hide_the_price() -> None:
    price = find("gemini-2.5-flash-image", "1K")
    assert (price.contested, price.shutdown) == (True, datetime.date(2026, 10, 2))
    assert "2027-03-15" in price.note
    assert price in current_apis(DAY)
    assert status_on(price, DAY) == "deprecated"


def test_current_ones_come_cheapest_first() -> None:
    found = [price.usd_per_image for price in current_apis(DAY)]
    assert found == sorted(found)
    assert len(found) > 20


def test_a_price_is_stale_after_60_days_and_an_old_page_at_once() -> None:
    price = find("gemini-3.1-flash-lite-image", "1K")
    assert not is_stale(price, datetime.date(2027, 1, 21))
    assert is_stale(price, datetime.date(2027, 1, 22))
    assert is_stale(find("flux-2-pro", "edit, first megapixel", "Black Forest Labs"), DAY)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('usd_per_image = "0.04"', "usd_per_image = 0.04", "no text"),
        ('usd_per_image = "0.04"', 'usd_per_image = "0"', "costs nothing"),
        ('batch_usd_per_image = "0.02"', 'batch_usd_per_image = "0.05"', "more in batch"),
        ('status = "live"', 'status = "poorly"', "poorly"),
        ('source = "a page"\n', "", "lacks source"),
        ('label = "1K"', 'label = "1K"\ncolor = "red"', "unknown key color"),
        ('label = "1K"', 'label = "1K"\ncontested = true', "no note"),
        ('label = "1K"', 'label = "1K"\nunverified = ["size"]', "size"),
        ("[[api]]", "[[apis]]", "nothing else"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "apis.toml"
    path.write_text(ROW.replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        read_apis(path)


def test_the_same_price_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "apis.toml"
    path.write_text(ROW + ROW)
    with pytest.raises(InputError, match="twice"):
        read_apis(path)
