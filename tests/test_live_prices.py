"""Fetching rental prices: gpuhunt's own reading of catalogs in its format, and our dated files."""

from __future__ import annotations

import datetime
import sys
import zipfile
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from millicent import live_prices
from millicent.errors import InputError, MachineError, MissingExtraError, OutputError
from millicent.facts.gpus import read_gpus
from millicent.facts.prices import prices_of, read_prices
from millicent.live_prices import match_gpu, refresh

# gpuhunt leaves a local catalog's file open
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NOW = datetime.datetime(2026, 11, 25, 14, 7, 50)
HEADER = (
    "instance_name,location,price,cpu,memory,gpu_count,gpu_name,gpu_memory,spot,disk_size,gpu_vendor,flags,cpu_arch,provider_data"
)
RUNPOD = f"""{HEADER}
NVIDIA GeForce RTX 4090,EU-RO-1,0.69,8,62.0,1,RTX4090,24.0,False,,nvidia,,x86,{{}}
NVIDIA GeForce RTX 4090,US-TX-1,0.74,8,62.0,1,RTX4090,24.0,False,,nvidia,,x86,{{}}
NVIDIA GeForce RTX 4090,CZ,0.34,8,62.0,1,RTX4090,24.0,False,,nvidia,,x86,{{}}
NVIDIA GeForce RTX 4090,EU-RO-1,1.38,16,124.0,2,RTX4090,24.0,False,,nvidia,,x86,{{}}
NVIDIA A100 80GB PCIe,EU-RO-1,1.39,8,117.0,1,A100,80.0,False,,nvidia,,x86,{{}}
NVIDIA RTX A4000,CA-MTL-1,0.25,8,62.0,1,A4000,16.0,False,,nvidia,,x86,{{}}
AMD Instinct MI300X OAM,EU-RO-1,1.99,24,283.0,1,MI300X,192.0,False,,amd,,x86,{{}}
cpu3c-2-4,EU-RO-1,0.06,2,4.0,0,,,False,20.0,,runpod-cpu,x86,{{}}
"""
AWS = f"""{HEADER}
g5.xlarge,us-east-1,1.006,4,16.0,1,A10G,24.0,False,,nvidia,,x86,{{}}
g5.xlarge,us-east-1,0.4104,4,16.0,1,A10G,24.0,True,,nvidia,,x86,{{}}
p5.4xlarge,us-east-1,6.88,16,256.0,1,H100,80.0,False,,nvidia,,x86,{{}}
p5.48xlarge,us-east-1,55.04,192,2048.0,8,H100,80.0,False,,nvidia,,x86,{{}}
"""


@pytest.fixture
def catalogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "catalogs"
    folder.mkdir()
    (folder / "runpod.csv").write_text(RUNPOD)
    (folder / "aws.csv").write_text(AWS)
    monkeypatch.setenv("GPUHUNT_CATALOG_DIR", str(folder))
    return folder


def test_single_nvidia_cards_come_by_provider_kind_and_range(catalogs: Path, tmp_path: Path) -> None:
    found = refresh(tmp_path / "prices", NOW, ("runpod", "aws"), local=True)
    rows = {
        (price.provider, price.gpu, price.kind): (str(price.usd_per_hour), price.highest_usd_per_hour) for price in found.prices
    }
    assert rows == {
        ("RunPod", "RTX 4090", "on-demand"): ("0.69", Decimal("0.74")),
        ("RunPod", "RTX 4090", "community"): ("0.34", None),
        ("RunPod", "A100 80GB PCIe", "on-demand"): ("1.39", None),
        ("RunPod", "RTX A4000", "on-demand"): ("0.25", None),
        ("AWS", "A10G", "on-demand"): ("1.006", None),
        ("AWS", "A10G", "spot"): ("0.4104", None),
    }
    # eight H100 cannot be rented as one, and "H100" is the name of three cards
    assert (found.larger, found.unmapped, found.failed) == (2, {"AWS H100 80 GB": 1}, {})


def test_the_file_is_read_back_as_it_was_found(catalogs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prices"
    found = refresh(folder, NOW, ("runpod",), local=True)
    assert found.path == folder / "2026-11-25.toml"
    assert set(found.prices) <= set(read_prices(folder))
    (price,) = [price for price in prices_of("RTX 4090", NOW.date(), folder) if price.kind == "on-demand"]
    assert (price.usd_per_hour, price.highest_usd_per_hour) == (Decimal("0.69"), Decimal("0.74"))
    assert price.source.startswith("gpuhunt 0.1.")
    assert price.note == "2 offers"
    assert [path.name for path in folder.iterdir()] == ["2026-11-25.toml"]


def test_history_is_never_overwritten(catalogs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prices"
    first = refresh(folder, NOW, ("runpod",), local=True).path
    before = first.read_bytes()
    (catalogs / "runpod.csv").write_text(RUNPOD.replace(",0.69,", ",0.59,"))
    second = refresh(folder, NOW, ("runpod",), local=True).path
    third = refresh(folder, NOW, ("runpod",), local=True).path
    tomorrow = refresh(folder, NOW + datetime.timedelta(days=1), ("runpod",), local=True).path
    assert [path.name for path in (second, third, tomorrow)] == [
        "2026-11-25T140750.toml",
        "2026-11-25T140750.000000.toml",
        "2026-11-26.toml",
    ]
    assert first.read_bytes() == before
    (price,) = [price for price in prices_of("RTX 4090", NOW.date(), folder) if price.kind == "on-demand"]
    assert price.usd_per_hour == Decimal("0.59")
    with pytest.raises(OutputError, match="already"):
        refresh(folder, NOW, ("runpod",), local=True)


def test_the_newest_of_a_day_sorts_last(tmp_path: Path) -> None:
    names = ["2026-11-25.toml", "2026-11-25T140750.toml", "2026-11-26.toml"]
    assert sorted(names) == names


def test_a_provider_that_gives_nothing_is_told_and_the_others_are_kept(catalogs: Path, tmp_path: Path) -> None:
    found = refresh(tmp_path / "prices", NOW, ("gcp", "runpod", "vastai"), local=True)
    assert found.failed.keys() == {"Google Cloud", "Vast.ai"}
    assert "gcp.csv" in found.failed["Google Cloud"]
    assert {price.provider for price in found.prices} == {"RunPod"}


def test_no_price_at_all_is_an_error_and_writes_nothing(catalogs: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No price was found"):
        refresh(tmp_path / "prices", NOW, ("gcp",), local=True)
    assert not (tmp_path / "prices").exists()


def test_an_unknown_provider_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no provider named shed"):
        refresh(tmp_path, NOW, ("shed",), local=True)


def test_a_folder_that_cannot_be_written_is_told(catalogs: Path, tmp_path: Path) -> None:
    (tmp_path / "prices").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"):
        refresh(tmp_path / "prices", NOW, ("runpod",), local=True)


def test_without_gpuhunt_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gpuhunt", None)
    with pytest.raises(MissingExtraError, match=r"millicent\[prices\]"):
        refresh(tmp_path, NOW, local=True)


def publish(site: Path, provider: str, csv: str) -> None:
    """A catalog as gpuhunt's makers publish it: a version, and a zip beside it."""
    (site / provider / "20261124-0312").mkdir(parents=True)
    (site / provider / "version").write_text("20261124-0312\n")
    with zipfile.ZipFile(site / provider / "20261124-0312" / "catalog.zip", "w") as archive:
        archive.writestr(f"{provider}.csv", csv)


def test_published_catalogs_are_loaded_and_a_missing_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUHUNT_CATALOG_DIR", raising=False)
    monkeypatch.setenv("GPUHUNT_CATALOG_URL", (tmp_path / "site").as_uri())
    publish(tmp_path / "site", "runpod", RUNPOD)
    found = refresh(tmp_path / "prices", NOW, ("runpod", "aws"))
    assert found.failed == {"AWS": "LookupError: its catalog could not be fetched"}
    assert {price.source for price in found.prices} == {f"gpuhunt {live_prices.version('gpuhunt')}, runpod, catalog 20261124-0312"}


def test_no_catalog_at_all_is_a_machine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPUHUNT_CATALOG_DIR", raising=False)
    monkeypatch.setenv("GPUHUNT_CATALOG_URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(MachineError, match="No price catalog"):
        refresh(tmp_path / "prices", NOW, ("runpod",))


@pytest.mark.parametrize(
    ("name", "instance", "memory_gb", "wanted"),
    [
        ("RTX4090", "anything", 24, "RTX 4090"),
        ("RTX4090", "123456", 48, None),  # twice the memory: not the card of the table
        ("A100", "NVIDIA A100-SXM4-80GB", 80, "A100 80GB SXM"),
        ("A100", "a2-highgpu-1g", 40, None),  # SXM or PCIe
        ("H100", "p5.4xlarge", 80, None),  # SXM or PCIe
        ("H100NVL", "x", 94, "H100 NVL"),
        ("H200", "x", 141, "H200 SXM"),
        ("A5000", "x", 24, "RTX A5000"),
        ("RTX6000Ada", "x", 48, "RTX 6000 Ada"),
        ("GH200", "gpu_1x_gh200", 96, "GH200 96GB"),
        ("RTXPRO6000", "x", 96, None),  # three forms
        ("L4", "g6.xlarge", 24, "L4"),
        ("L40S", "x", 48, "L40S"),
        ("A10", "Standard_NV6ads_A10_v5", 4, None),  # a sixth of the card
        ("T4", "x", None, "T4"),
        ("GTX1080", "x", 8, None),
        ("", "x", 24, None),
    ],
)
def test_an_offer_is_of_one_card_or_none(name: str, instance: str, memory_gb: float | None, wanted: str | None) -> None:
    found = match_gpu(read_gpus(), name, instance, memory_gb)
    assert (found.name if found else None) == wanted


def test_an_offer_that_two_cards_answer_to_is_of_none() -> None:
    (card,) = [gpu for gpu in read_gpus() if gpu.name == "L40S"]
    assert match_gpu([card], "L40S", "x", 48) == card
    assert match_gpu([card, replace(card, name="another")], "L40S", "x", 48) is None
