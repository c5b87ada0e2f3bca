"""torch's wheels, from data/wheels.toml: which cards each has code for, which driver it needs, which one a card and driver want."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from millicent.errors import InputError
from millicent.facts.rows import read_rows, require_known

WHEELS = Path(__file__).parent / "data" / "wheels.toml"
INDEX = "https://download.pytorch.org/whl"
# what the package asks for, and the version that its tests run with
MIN_TORCH = "2.9"
TESTED_TORCH = "2.13.0"

Capability = tuple[int, int]
Arch = Literal["x86_64", "aarch64"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One build of torch for Linux.

    cuda: its toolkit, as "13.0". index: the name of PyTorch's own index that has it, as "cu130". on_pypi: whether plain
    `pip install torch` gives it. sms: the architectures that it holds machine code for, as 86 for compute capability 8.6.
    ptx: the one that it holds PTX for, which newer cards' drivers can compile. cudnn, triton: the versions that it pins.
    """

    torch: str
    cuda: str
    index: str
    on_pypi: bool
    sms: tuple[int, ...]
    source: str
    checked: datetime.date
    arch: Arch = "x86_64"
    ptx: int | None = None
    cudnn: str | None = None
    triton: str | None = None
    min_python: str | None = None
    unverified: tuple[str, ...] = ()

    @property
    def pip_command(self) -> str:
        """What installs it."""
        return f'pip install "torch=={self.torch}"' + ("" if self.on_pypi else f" --index-url {INDEX}/{self.index}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverFloor:
    """The oldest Linux drivers for a CUDA toolkit.

    driver: loads what was built with it, by the compatibility of minor versions. toolkit_driver: came with it; just-in-time
    compiled code, PTX and some of Triton's, may need this one.
    """

    cuda: str
    driver: str
    toolkit_driver: str
    source: str
    checked: datetime.date
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CardDriver:
    """The oldest driver that knows the cards of some capabilities."""

    capabilities: tuple[Capability, ...]
    driver: str
    source: str
    checked: datetime.date
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchaoPair:
    """The torch versions with which one torchao loads its own kernels: these alone, or `min_torch` and later ones.

    otherwise: what it does with any other.
    """

    torchao: str
    otherwise: str
    source: str
    checked: datetime.date
    torch: tuple[str, ...] = ()
    min_torch: str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """The tables of a file of wheels."""

    wheels: tuple[Wheel, ...]
    drivers: tuple[DriverFloor, ...]
    card_drivers: tuple[CardDriver, ...]
    torchao: tuple[TorchaoPair, ...]


def read_wheels() -> tuple[Wheel, ...]:
    """Every wheel that the table has, oldest torch first."""
    return _read_all().wheels


def find_wheel(torch: str, cuda: str, arch: Arch = "x86_64") -> Wheel | None:
    """The wheel of an installed torch, by its version ("2.13.0" or "2.13.0+cu130") and CUDA; None where the table lacks it."""
    asked = (torch.partition("+")[0], cuda, arch)
    return next((wheel for wheel in read_wheels() if (wheel.torch, wheel.cuda, wheel.arch) == asked), None)


def runs_on(wheel: Wheel, capability: Capability) -> bool:
    """Whether a wheel has machine code for a card: of the same major number and a minor one that is not above the card's.

    PTX is not counted: the driver would compile every kernel when it is first used, and must be as new as the toolkit.
    """
    return any(divmod(sm, 10)[0] == capability[0] and sm % 10 <= capability[1] for sm in wheel.sms)


def driver_floor(cuda: str) -> DriverFloor:
    """The drivers for a toolkit, as "12.8". Raises InputError for one that the table lacks."""
    for row in _read_all().drivers:
        if row.cuda == cuda:
            return row
    known = ", ".join(row.cuda for row in _read_all().drivers)
    raise InputError(f"The table knows no driver for CUDA {cuda}.", f"It knows {known}.")


def card_driver(capability: Capability) -> CardDriver | None:
    """The oldest driver that knows such a card, where one is known to matter."""
    return next((row for row in _read_all().card_drivers if capability in row.capabilities), None)


def torchao_pairs() -> tuple[TorchaoPair, ...]:
    """Every torchao that the table has, oldest first."""
    return _read_all().torchao


def torchao_loads(torchao: str, torch: str) -> bool | None:
    """Whether a torchao loads its own kernels with a torch; None for a torchao that the table lacks."""
    version = torch.partition("+")[0]
    for row in torchao_pairs():
        if row.torchao == torchao:
            is_later = row.min_torch is not None and parse_version(version) >= parse_version(row.min_torch)
            return version in row.torch or is_later
    return None


def recommend_wheel(capability: Capability, driver: str | None, arch: Arch = "x86_64") -> Wheel | None:
    """The wheel for a card and its driver (None: any): `pip_command` installs it. None where no wheel would run the engine.

    The torch that millicent is tested with comes first, then the newest; of one torch, what PyPI has, then the newest CUDA. A
    driver older than the chosen toolkit's own (`driver_floor`) loads the wheel, but may refuse code that is compiled on the spot.
    """
    floor = card_driver(capability)
    if driver is not None and floor is not None and is_older(driver, floor.driver):
        return None
    fitting = [wheel for wheel in read_wheels() if wheel.arch == arch and runs_on(wheel, capability) and _is_loaded(wheel, driver)]
    usable = [wheel for wheel in fitting if parse_version(wheel.torch) >= parse_version(MIN_TORCH)]
    return max(usable, key=_rank, default=None)


def _is_loaded(wheel: Wheel, driver: str | None) -> bool:
    return driver is None or not is_older(driver, driver_floor(wheel.cuda).driver)


def _rank(wheel: Wheel) -> tuple[bool, tuple[int, ...], bool, tuple[int, ...]]:
    return wheel.torch == TESTED_TORCH, parse_version(wheel.torch), wheel.on_pypi, parse_version(wheel.cuda)


def is_older(version: str, floor: str) -> bool:
    """Whether a version of a driver, CUDA or torch is below another."""
    return parse_version(version) < parse_version(floor)


def parse_version(version: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 13) of "2.13.0" and of "2.13.0+cu130", so that "580" is no older than "580.0".

    Raises InputError for a text that does not begin with a number.
    """
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise InputError(f"{version!r} is no version.", "Give one as 580.65.06.")
    numbers = [int(part) for part in match[0].split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


@cache
def _read_all() -> Table:
    return read_table(WHEELS)


def read_table(path: Path) -> Table:
    """A file of wheels.

    Raises InputError for a key that is unknown, missing or of the wrong type, a row that is there twice, and a wheel whose CUDA
    has no driver.
    """
    rows = read_rows(path, {"wheel": Wheel, "driver": DriverFloor, "card_driver": CardDriver, "torchao": TorchaoPair})
    keys = [
        *((wheel.torch, wheel.cuda, wheel.arch) for wheel in rows["wheel"]),
        *(("driver", row.cuda) for row in rows["driver"]),
        *(("card", capability) for row in rows["card_driver"] for capability in row.capabilities),
        *(("torchao", row.torchao) for row in rows["torchao"]),
    ]
    if twice := [key for n, key in enumerate(keys) if key in keys[:n]]:
        raise InputError(f"{path} has {' '.join(map(str, twice[0]))} twice.", "Correct the facts file.")
    for name, table in rows.items():
        for n, row in enumerate(table, 1):
            require_known(f"{path}: {name} {n}", getattr(row, "unverified", ()), type(row))
    known = {row.cuda for row in rows["driver"]}
    for wheel in rows["wheel"]:
        if wheel.cuda not in known:
            raise InputError(f"{path} has no driver for CUDA {wheel.cuda} of torch {wheel.torch}.", "Correct the facts file.")
        if wheel.index != "cu" + wheel.cuda.replace(".", ""):
            raise InputError(
                f"{path}: torch {wheel.torch} has CUDA {wheel.cuda} and the index {wheel.index}.", "Correct the facts file."
            )
    return Table(rows["wheel"], rows["driver"], rows["card_driver"], rows["torchao"])
