"""Cards: what each name says, how a live card tells its own, and the rates of its tensor cores, from data/gpus.toml."""

from __future__ import annotations

import datetime
import difflib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from millicent.errors import InputError
from millicent.facts.rows import read_rows, require_known

GPUS = Path(__file__).parent / "data" / "gpus.toml"

Capability = tuple[int, int]
Kind = Literal["data center", "workstation", "geforce", "laptop", "slice", "soc"]


class UnknownGpuError(InputError):
    """The table has no card of this name."""

    exit_code = 19


class AmbiguousGpuError(InputError):
    """The name is that of several cards."""

    exit_code = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A card as it is sold and rented.

    name: short and unique. reported: as nvidia-smi and torch name it. memory_mib: as it reports it, less than on the box.
    The rates are dense and with FP32 (for INT8, INT32) accumulation, in TFLOP/s or TOP/s. One that is None is not run by the
    tensor cores; or, where `unverified` names it, not known. The two with FP16 accumulation are given where they are higher.
    pcie_generation, pcie_lanes: None and 0 where the card is not on PCIe. host_arch: of the machines that it comes in.
    region: whose market a variant was made for.
    unverified: fields that were derived or recalled and are in no page that was read; notes say how.
    """

    name: str
    reported: tuple[str, ...]
    architecture: str
    capability: Capability
    memory_mib: int
    bandwidth_gb_per_s: float
    kind: Kind
    source: str
    checked: datetime.date
    bf16_tflops: float | None = None
    fp16_tflops: float | None = None
    fp8_tflops: float | None = None
    int8_tops: float | None = None
    fp4_tflops: float | None = None
    fp16_accumulate_fp16_tflops: float | None = None
    fp8_fp16_accumulate_tflops: float | None = None
    pcie_generation: int | None = None
    pcie_lanes: int = 16
    host_arch: Literal["x86_64", "aarch64"] = "x86_64"
    power_w: int | None = None
    sm_count: int | None = None
    region: str | None = None
    notes: str = ""
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AbsentGpu:
    """A card that is known and has no row. words: a name with any of them is meant."""

    words: tuple[str, ...]
    because: str
    source: str
    checked: datetime.date


@dataclass(frozen=True, slots=True, kw_only=True)
class AmbiguousName:
    """A name that several generations bear. readings: what it may mean, one line each."""

    name: str
    readings: tuple[str, ...]
    source: str
    checked: datetime.date


@dataclass(frozen=True, slots=True, kw_only=True)
class Laptop:
    """A laptop's card, told by its name alone: another chip than its namesake for the desk, and without rates in the table."""

    name: str
    architecture: str
    capability: Capability


# the rate that a format of facts/formats.py runs at
RATES = {
    "bf16": "bf16_tflops",
    "fp16": "fp16_tflops",
    "int8": "int8_tops",
    "fp8-tensorwise": "fp8_tflops",
    "fp8-rowwise": "fp8_tflops",
    "fp8-blockwise": "fp8_tflops",
    "mxfp8": "fp8_tflops",
    "nvfp4": "fp4_tflops",
}
# from developer.nvidia.com/cuda-gpus: what a laptop card's name has in it; the RTX 2050, which is no Turing, is left out
_LAPTOPS: tuple[tuple[str, str, Capability], ...] = (
    (r"QUADRO RTX \d000|RTX 20[678]0", "Turing", (7, 5)),
    (r"RTX 30[5-8]0|RTX A\d000", "Ampere", (8, 6)),
    (r"RTX 40[5-9]0|RTX \d\d00 ADA", "Ada", (8, 9)),
    (r"RTX 50[5-9]0|RTX PRO \d\d00 BLACKWELL", "Blackwell", (12, 0)),
)
# words that makers, shops and drivers add or leave out as they like
_NOISE = {"nvidia", "geforce", "tesla", "rtx", "generation", "edition", "gpu", "blackwell"}
_FIX = "Use a card of `millicent gpus`."


def read_gpus() -> tuple[Gpu, ...]:
    """Every card of the table, in its order."""
    return _read_all()[0]


def read_table(path: Path) -> tuple[tuple[Gpu, ...], tuple[AbsentGpu, ...], tuple[AmbiguousName, ...]]:
    """A file of cards. Raises InputError for a key that is unknown, missing or of the wrong type, and for a name borne twice."""
    rows = read_rows(path, {"gpu": Gpu, "absent": AbsentGpu, "ambiguous": AmbiguousName})
    gpus: tuple[Gpu, ...] = rows["gpu"]
    bearers: dict[frozenset[str], str] = {}
    for gpu in gpus:
        require_known(f"{path}: {gpu.name}", gpu.unverified, Gpu)
        _check_rates(path, gpu)
        for words in {_words(name) for name in (gpu.name, *gpu.reported)}:
            if words in bearers:
                raise InputError(f"{path}: {gpu.name} and {bearers[words]} are named alike.", "Correct the facts file.")
            bearers[words] = gpu.name
    return gpus, rows["absent"], rows["ambiguous"]


def _check_rates(path: Path, gpu: Gpu) -> None:
    for key in (*dict.fromkeys(RATES.values()), "bandwidth_gb_per_s", "memory_mib", "power_w", "sm_count"):
        value = getattr(gpu, key)
        if value is not None and value <= 0:
            raise InputError(f"{path}: {gpu.name} says {key} = {value}; it must be above 0.", "Correct the facts file.")


def rate_of(gpu: Gpu, format_name: str) -> float | None:
    """The dense rate in TFLOP/s or TOP/s that a format of facts/formats.py has there; None where it is not run or not known."""
    if format_name == "int4":  # of which no card's datasheet speaks
        return None
    assert format_name in RATES, format_name
    value: float | None = getattr(gpu, RATES[format_name])
    return value


def find_gpu(name: str) -> Gpu:
    """The card that a name means, whatever its capitals, spaces and "NVIDIA GeForce".

    Raises AmbiguousGpuError with the readings of a name that several cards bear, UnknownGpuError for one that none does.
    """
    gpus, absent, ambiguous = _read_all()
    asked = _words(name)
    for gpu in gpus:
        if any(asked == _words(each) or _squeeze(name) == _squeeze(each) for each in (gpu.name, *gpu.reported)):
            return gpu
    for known in ambiguous:
        if asked == _words(known.name):
            raise AmbiguousGpuError(f"{name} is the name of several cards: {'; '.join(known.readings)}.", "Give one of these.")
    if told := _tell_absent(name, gpus, absent):
        raise UnknownGpuError(f"{name} is {told}.", _FIX)
    near = [gpu for gpu in gpus if _number(gpu) in asked and asked <= _words(gpu.name)]
    if len(near) == 1:
        return near[0]
    if near:
        raise AmbiguousGpuError(f"{name} may be {', '.join(gpu.name for gpu in near)}.", "Give one of these.")
    raise UnknownGpuError(f"There is no card named {name!r} in the table.", _suggest(name, gpus))


def _tell_absent(name: str, gpus: tuple[Gpu, ...], absent: tuple[AbsentGpu, ...]) -> str | None:
    """What a card without a row is, as far as its name tells."""
    if laptop := find_laptop(name):
        told = f"{laptop.architecture}, compute capability {laptop.capability[0]}.{laptop.capability[1]}"
        return f"a laptop's card ({told}); the table has no rates for it"
    if re.search(r"\bMIG\b", name, re.IGNORECASE):
        return f"a slice of a card; of these the table has {', '.join(gpu.name for gpu in gpus if gpu.kind == 'slice')} alone"
    return next((row.because for row in absent if _words(name) & set(row.words)), None)


def _suggest(name: str, gpus: tuple[Gpu, ...]) -> str:
    names = {_squeeze(gpu.name): gpu.name for gpu in gpus}
    kin = [gpu.name for gpu in gpus if gpu.name.split()[0].casefold() in _words(name)]
    near = kin or [names[key] for key in difflib.get_close_matches(_squeeze(name), names, n=4, cutoff=0.5)]
    return f"Near it are {', '.join(near)}. {_FIX}" if near else _FIX


@cache
def _read_all() -> tuple[tuple[Gpu, ...], tuple[AbsentGpu, ...], tuple[AmbiguousName, ...]]:
    return read_table(GPUS)


def find_laptop(name: str) -> Laptop | None:
    """What a laptop card's name says, as "RTX 4090 Laptop GPU" or "RTX 2080 with Max-Q Design"; None for any other name.

    The RTX PRO cards' Max-Q editions are for the desk.
    """
    plain = " ".join(name.upper().split())
    if not re.search(r"\b(LAPTOP|MOBILE)\b", plain) and (" PRO " in plain or "MAX-Q" not in plain):
        return None
    for pattern, architecture, capability in _LAPTOPS:
        if re.search(rf"\b({pattern})\b", plain):
            return Laptop(name=" ".join(name.split()), architecture=architecture, capability=capability)
    return None


def list_alike(gpu: Gpu) -> tuple[str, ...]:
    """Names that one may take for this card's: RTX cards of all kinds share their numbers; a data center's keep their letter."""
    number = _number(gpu).lstrip("a") if "RTX" in gpu.name else _number(gpu)
    alike = {number, f"a{number}"} if "RTX" in gpu.name else {number}
    return tuple(other.name for other in read_gpus() if other is not gpu and _number(other) in alike)


def _number(gpu: Gpu) -> str:
    """The word without which a name is nobody's: "4090", "a6000", "h100"."""
    return next(word for word in _list_words(gpu.name) if re.search(r"\d", word))


def identify(reported: str, capability: Capability | None, memory_mib: int | None) -> Gpu | None:
    """The row of a live card, by the name that its driver reports; None where that is not certain.

    A MIG slice, a laptop's card or a variant is never taken for the card whose name it bears. None too where the capability is
    another, or the memory is less than 85 % of the row's: a share of a card has neither its memory nor its rates.
    """
    asked = _spell(reported)
    for gpu in read_gpus():
        if asked in {_spell(name) for name in gpu.reported}:
            is_other = capability is not None and capability != gpu.capability
            is_share = memory_mib is not None and memory_mib < 0.85 * gpu.memory_mib
            return None if is_other or is_share else gpu
    return None


def _spell(reported: str) -> str:
    """Older drivers left "NVIDIA" out; a slice's profile may end in its media engines, which change no rate."""
    return re.sub(r"( mig \d+g\.\d+gb)\+.*$", r"\1", " ".join(reported.casefold().split()).removeprefix("nvidia "))


def _words(name: str) -> frozenset[str]:
    """What tells one name from another: "NVIDIA GeForce RTX4090" and "rtx 4090" are one, "A100-SXM4-80GB" is "A100 80GB SXM"."""
    return frozenset(_list_words(name))


def _squeeze(name: str) -> str:
    """For names that are written in one: "h100sxm"."""
    return "".join(_list_words(name))


def _list_words(name: str) -> list[str]:
    spaced = re.sub(r"\b(rtx|quadro|geforce|nvidia|tesla)(?=[a-z\d])", r"\1 ", name.casefold())
    # what belongs together in spite of its hyphen, and a socket's number, which only some write
    joined = re.sub(r"\b(max|h20)-(q|3e)\b", r"\1\2", re.sub(r"\bsxm\d\b", "sxm", spaced))
    return [word for word in re.split(r"[^a-z\d.]+", joined) if word and word not in _NOISE]
