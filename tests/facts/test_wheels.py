"""torch's wheels: what each runs on, and the one that a card and a driver get."""

import itertools
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.errors import InputError
from millicent.facts.formats import list_capabilities, support
from millicent.facts.wheels import (
    MIN_TORCH,
    TESTED_TORCH,
    WHEELS,
    card_driver,
    driver_floor,
    find_wheel,
    is_older,
    parse_version,
    read_table,
    read_wheels,
    recommend_wheel,
    runs_on,
    torchao_loads,
    torchao_pairs,
)

TEXT = WHEELS.read_text(encoding="utf-8")
ROOT = Path(__file__).parents[2]
DRIVERS = [
    "470.256.02",
    "525.60.13",
    "535.104.05",
    "550.54.14",
    "570.26",
    "575.51.03",
    "580.65.06",
    "590.44.01",
    "595.45.04",
    "610.1",
]


def test_every_wheel_has_a_source_and_drivers() -> None:
    for wheel in read_wheels():
        assert wheel.source
        assert list(wheel.sms) == sorted(set(wheel.sms))
        assert driver_floor(wheel.cuda).source
    assert len({(wheel.torch, wheel.arch) for wheel in read_wheels() if wheel.on_pypi}) == sum(w.on_pypi for w in read_wheels())
    versions = [parse_version(wheel.torch) for wheel in read_wheels() if wheel.arch == "x86_64"]
    assert versions == sorted(versions)


@pytest.mark.parametrize(
    ("torch", "cuda", "capability", "runs"),
    [
        ("2.15.0", "13.2", (8, 9), True),  # by 8.6
        ("2.15.0", "13.2", (10, 3), True),  # by 10.0
        ("2.15.0", "13.2", (12, 1), True),  # by 12.0
        ("2.15.0", "13.2", (7, 5), True),
        ("2.15.0", "13.2", (7, 0), False),
        ("2.10.0", "12.8", (7, 0), True),
        ("2.11.0", "12.8", (7, 0), False),
        ("2.14.1", "12.6", (7, 0), True),
        ("2.14.1", "12.6", (9, 0), True),
        ("2.14.1", "12.6", (10, 0), False),
        ("2.14.1", "12.6", (12, 0), False),  # no kernel image is available
        ("2.6.0", "12.4", (12, 0), False),
        ("2.7.1", "12.8", (12, 0), True),
    ],
)
def test_a_wheel_runs_where_it_has_code_of_the_same_major_number(
    torch: str, cuda: str, capability: tuple[int, int], runs: bool
) -> None:
    wheel = find_wheel(f"{torch}+cu{cuda.replace('.', '')}", cuda)
    assert wheel
    assert runs_on(wheel, capability) is runs
    assert find_wheel(torch, "11.1") is None


def test_drivers() -> None:
    assert (driver_floor("12.8").driver, driver_floor("12.8").toolkit_driver) == ("525.60.13", "570.26")
    assert (driver_floor("13.2").driver, driver_floor("13.2").toolkit_driver) == ("580", "595.45.04")
    assert card_driver((8, 9)) is None
    blackwell = card_driver((12, 0))
    assert blackwell
    assert blackwell.driver == "570"
    assert "driver" in blackwell.unverified
    with pytest.raises(InputError, match=r"no driver for CUDA 12\.3.*It knows 11\.8, "):
        driver_floor("12.3")


@pytest.mark.parametrize(
    ("capability", "driver", "torch", "index"),
    [
        ((8, 9), None, TESTED_TORCH, "cu130"),
        ((8, 9), "580.65.06", TESTED_TORCH, "cu130"),
        ((8, 9), "535.104.05", TESTED_TORCH, "cu126"),
        ((8, 6), "550.54.14", TESTED_TORCH, "cu126"),
        ((9, 0), "580", TESTED_TORCH, "cu130"),
        ((9, 0), "610.1", TESTED_TORCH, "cu130"),  # and not cu132, which PyPI lacks for this torch
        ((12, 0), "580.95.05", TESTED_TORCH, "cu130"),
        ((12, 0), "570.124.06", "2.11.0", "cu128"),  # no newer torch has Blackwell's code on CUDA 12
        ((7, 0), "580.65.06", TESTED_TORCH, "cu126"),  # CUDA 13 left Volta out
    ],
)
def test_the_wheel_for_a_card_and_its_driver(capability: tuple[int, int], driver: str | None, torch: str, index: str) -> None:
    wheel = recommend_wheel(capability, driver)
    assert wheel
    assert (wheel.torch, wheel.index) == (torch, index)
    on_index = f" --index-url https://download.pytorch.org/whl/{index}" if index != "cu130" else ""
    assert wheel.pip_command == f'pip install "torch=={torch}"{on_index}'


@pytest.mark.parametrize(("capability", "driver"), [((8, 9), "470.256.02"), ((12, 0), "550.54.14"), ((13, 0), None)])
def test_no_wheel_is_made_up(capability: tuple[int, int], driver: str | None) -> None:
    assert recommend_wheel(capability, driver) is None


def test_an_arm_machine_gets_its_own_wheel() -> None:
    wheel = recommend_wheel((9, 0), "580.65.06", "aarch64")
    assert wheel
    assert (wheel.arch, wheel.on_pypi) == ("aarch64", False)


@pytest.mark.parametrize(("capability", "driver"), itertools.product(list_capabilities(), [None, *DRIVERS]))
def test_whatever_is_recommended_runs(capability: tuple[int, int], driver: str | None) -> None:
    wheel = recommend_wheel(capability, driver)
    if wheel is None:
        assert driver
        floor = card_driver(capability)
        assert is_older(driver, "525.60.13") or (floor and is_older(driver, floor.driver))
        return
    assert runs_on(wheel, capability)
    assert not is_older(wheel.torch, MIN_TORCH)
    assert driver is None or not is_older(driver, driver_floor(wheel.cuda).driver)
    rowwise = support("fp8-rowwise", capability)
    assert not (rowwise.runs and rowwise.min_torch and is_older(wheel.torch, rowwise.min_torch)), "it must run our FP8"


@given(st.sampled_from(list_capabilities()), st.tuples(st.integers(450, 620), st.integers(0, 200)))
def test_a_newer_driver_never_loses_a_card_its_wheel(capability: tuple[int, int], driver: tuple[int, int]) -> None:
    older, newer = (recommend_wheel(capability, f"{major}.{driver[1]}") for major in (driver[0], driver[0] + 1))
    if older:
        assert newer
        assert not is_older(newer.torch, older.torch)


@pytest.mark.parametrize(
    ("torchao", "torch", "loads"),
    [
        ("0.12.0", "2.7.1", True),
        ("0.14.0", "2.8.0", True),
        ("0.14.1", "2.9.0", True),
        ("0.14.1", "2.9.1", False),
        ("0.15.0", "2.9.1+cu128", True),
        ("0.16.0", "2.11.0", False),
        ("0.17.0", "2.10.0", False),
        ("0.18.0", "2.11.0", True),
        ("0.18.0", "2.15.0+cu132", True),
        ("9.9.9", "2.15.0", None),
    ],
)
def test_torchao_loads_its_kernels_with_its_own_torch(torchao: str, torch: str, loads: bool | None) -> None:
    assert torchao_loads(torchao, torch) is loads
    assert all(bool(pair.torch) != bool(pair.min_torch) for pair in torchao_pairs())


@pytest.mark.parametrize(
    ("version", "floor", "older"),
    [
        ("2.9.1", "2.10.0", True),
        ("2.10.0", "2.9.1", False),
        ("580", "580.0", False),
        ("580.0", "580", False),
        ("579.99.9", "580", True),
        ("2.13.0+cu130", "2.13", False),
        ("2.13.0a0+git1", "2.13", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, floor: str, older: bool) -> None:
    assert is_older(version, floor) is older
    with pytest.raises(InputError, match="'new' is no version"):
        is_older("new", floor)


def test_the_versions_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert f"torch>={MIN_TORCH}" in extras["engine"]
    (constraints,) = ROOT.glob("constraints*.txt")
    assert re.search(rf"^torch=={re.escape(TESTED_TORCH)}$", constraints.read_text(encoding="utf-8"), re.MULTILINE)


def damage(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (damage('cudnn = "9.1.0.70"', 'cuddn = "9.1.0.70"'), "wheel 1 has the unknown key cuddn"),
        (re.sub(r"\nsource = .*", "", TEXT, count=1), "wheel 1 lacks source"),
        (damage("on_pypi = true", 'on_pypi = "yes"'), "wheel 1 has on_pypi = 'yes'"),
        (
            damage('torch = "2.5.1"\ncuda = "12.4"\nindex = "cu124"', 'torch = "2.4.1"\ncuda = "12.1"\nindex = "cu121"'),
            "2.4.1 12.1 x86_64 twice",
        ),
        (damage('index = "cu121"', 'index = "cu124"'), r"has CUDA 12\.1 and the index cu124"),
        (damage('[[driver]]\ncuda = "12.1"', '[[driver]]\ncuda = "12.2"'), r"no driver for CUDA 12\.1 of torch 2\.4\.1"),
        (damage('[[driver]]\ncuda = "12.5"', '[[driver]]\ncuda = "12.4"'), r"driver 12\.4 twice"),
        (damage('torchao = "0.13.0"', 'torchao = "0.12.0"'), r"torchao 0\.12\.0 twice"),
        (damage("[[10, 0], [10, 3]", "[[10, 0], [10, 0]"), r"card \(10, 0\) twice"),
        (damage('unverified = ["sms"]', 'unverified = ["smss"]'), "calls smss unverified"),
        (damage('min_torch = "2.11.0"', "min_torch = 2.11"), "torchao 7 has min_torch = 2.11"),
    ],
)
def test_a_wrong_table_is_refused(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "wheels.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=told):
        read_table(file)
