"""A machine as a value: probed, read from JSON, or built from a card's name for a rental that nobody has started yet."""

from __future__ import annotations

import dataclasses
import datetime
import json
import types
from dataclasses import MISSING, dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from millicent.errors import InputError
from millicent.facts.gpus import Gpu

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process that holds memory of a card. name, used_mib: None where the driver does not tell, as in a container."""

    pid: int
    used_mib: int | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One card, or one slice of it, as its driver tells; None for what it does not.

    name: as nvidia-smi and torch report it. memory_mib: as reported, less than what is sold. free_mib: at the probe.
    mig: memory and processors are those of a MIG slice. power_limit_w: set now; power_default_w: as the card was made.
    pcie_generation, pcie_lanes: of the link at the probe, which an idle card lowers; the maximum is that of card and slot together.
    clocks_throttled: what slows the clocks, in words.
    """

    index: int
    name: str
    memory_mib: int
    free_mib: int
    uuid: str | None = None
    capability: tuple[int, int] | None = None
    mig: bool = False
    power_limit_w: float | None = None
    power_default_w: float | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    pcie_max_generation: int | None = None
    pcie_max_lanes: int | None = None
    processes: tuple[Process, ...] = ()
    clocks_throttled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A folder that a download or an edit fills. filesystem: equal for folders that share one, whose room counts once."""

    path: str
    purpose: str
    free_bytes: int
    filesystem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a machine has. None where it could not be told, or, for a package, where it is not installed.

    checked: when, ISO 8601. driver: NVIDIA's, as "580.65.06". cuda_driver: the latest CUDA that this driver runs.
    no_cards_because: why cards is empty, in words. torch: its version, as "2.13.0+cu130"; torch_cuda: the CUDA that it was built
    with, as "13.0", None for a build for CPUs; cudnn_package: name and version, as "nvidia-cudnn-cu13 9.20.0.48".
    c_compiler: which one there is, by its name or path.
    ram_bytes: the host's; ram_limit_bytes: the container's, None for none; ram_available_bytes: free for us, within both.
    pinned_limit_bytes: what may be locked in memory, None for no limit. shm_bytes: the size of /dev/shm.
    """

    checked: str
    python: str
    platform: str
    arch: str
    ram_bytes: int
    ram_available_bytes: int
    cpu_count: int
    container: bool = False
    cards: tuple[Card, ...] = ()
    no_cards_because: str | None = None
    driver: str | None = None
    cuda_driver: tuple[int, int] | None = None
    torch: str | None = None
    torch_cuda: str | None = None
    cudnn_package: str | None = None
    triton: str | None = None
    torchao: str | None = None
    c_compiler: str | None = None
    ram_limit_bytes: int | None = None
    pinned_limit_bytes: int | None = None
    shm_bytes: int | None = None
    disks: tuple[Disk, ...] = ()

    @property
    def card(self) -> Card | None:
        """The first card, which an edit uses."""
        return self.cards[0] if self.cards else None


def machine_of(
    gpu: Gpu, ram_bytes: int = 64 * GIB, disk_bytes: int = 200 * 10**9, cpu_count: int = 16, checked: str | None = None
) -> Machine:
    """The machine that a rental of this card would be: whole and free, on Linux, with nothing installed.

    Its driver is left open, as the renter chooses the host. checked: when, ISO 8601; now by default.
    """
    card = Card(
        index=0,
        name=gpu.reported[0] if gpu.reported else gpu.name,
        capability=gpu.capability,
        memory_mib=gpu.memory_mib,
        free_mib=gpu.memory_mib,
        mig=gpu.kind == "slice",
        power_limit_w=gpu.power_w,
        power_default_w=gpu.power_w,
        pcie_generation=gpu.pcie_generation,
        pcie_lanes=gpu.pcie_lanes,
        pcie_max_generation=gpu.pcie_generation,
        pcie_max_lanes=gpu.pcie_lanes,
    )
    return Machine(
        checked=checked or datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        python="3.12",
        platform="Linux",
        arch="x86_64",
        ram_bytes=ram_bytes,
        ram_available_bytes=ram_bytes,
        cpu_count=cpu_count,
        container=True,
        cards=(card,),
        disks=(Disk(path="/", purpose="models", free_bytes=disk_bytes),),
    )


def to_json(machine: Machine) -> str:
    """What from_json reads: one JSON object, a field a key."""
    return json.dumps(dataclasses.asdict(machine), indent=2)


def from_json(text: str) -> Machine:
    """Read a machine. Raises InputError for a key that is unknown, missing or of the wrong type, naming it."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"The machine is no JSON: {error}.", _FIX) from error
    machine = _read(Machine, value, "")
    assert isinstance(machine, Machine)
    return machine


_FIX = "Write one with `millicent preflight --save-machine FILE`, or correct the key."


def _read(kind: Any, value: Any, where: str) -> Any:
    """value, as JSON has it, as a `kind`: a dataclass, a union with None, a tuple or a plain type. where: its key, for errors."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_fields(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(next(each for each in arguments if each is not types.NoneType), value, where)
    if origin is tuple:
        wanted = None if arguments[-1] is ... else len(arguments)
        if not isinstance(value, list) or (wanted is not None and len(value) != wanted):
            raise _wrong(where, value, f"a list of {wanted}" if wanted else "a list")
        return tuple(_read(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(value))
    # bool is an int to isinstance
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise _wrong(where, value, {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind])
    if isinstance(value, (int, float)) and not 0 <= value < 1e18:
        raise _wrong(where, value, "a number that is not negative")
    return value


def _read_fields(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where or "the whole", value, "an object")
    prefix = f"{where}." if where else ""
    hints, known = get_type_hints(kind), {field.name: field.default is MISSING for field in dataclasses.fields(kind)}
    if unknown := sorted(value.keys() - known.keys()):
        raise InputError(f"The machine has the unknown key {', '.join(prefix + key for key in unknown)}.", _FIX)
    if missing := [key for key, needed in known.items() if needed and key not in value]:
        raise InputError(f"The machine lacks {', '.join(prefix + key for key in missing)}.", _FIX)
    return kind(**{key: _read(hints[key], each, prefix + key) for key, each in value.items()})


def _wrong(where: str, value: Any, wanted: str) -> InputError:
    return InputError(f"The machine says {where} = {json.dumps(value)}; it must be {wanted}.", _FIX)
