"""What of the host may stand in an edit's way - system, memory, disks -: a function a check, each pure."""

from __future__ import annotations

from millicent.hardware.findings import Finding, error, ok, show_gb, show_gib, warning
from millicent.hardware.machine import GIB, Disk, Machine
from millicent.hardware.needs import Needs

# what Triton's compiled kernels and the pictures under way take
SCRATCH_BYTES = 10**9
SHM_BYTES = GIB
# the folders that are told of; the command line names them so
MODELS, HUB_CACHE, TEMPORARY, KERNELS = "models", "hub cache", "temporary files", "compiled kernels"
_VARIABLES = {MODELS: "XDG_DATA_HOME", HUB_CACHE: "HF_HOME", TEMPORARY: "TMPDIR", KERNELS: "TRITON_CACHE_DIR"}


def check_system(machine: Machine, needs: Needs) -> Finding:
    """Linux, where cards have Triton's kernels."""
    told = f"{machine.platform} {machine.arch}, Python {machine.python}, {machine.cpu_count} processors"
    told += ", in a container" if machine.container else ""
    if machine.platform != "Linux" and machine.cards:
        return warning("system", told, "Linux, which our kernels are tested on", "Run it under Linux or WSL2")
    return ok("system", told)


def check_ram(machine: Machine, needs: Needs) -> Finding | None:
    """Free host memory, as the container has it, for loading and for the weights that the plan keeps there."""
    if machine.card is None:
        return None
    found = f"{show_gib(machine.ram_available_bytes)} free"
    if machine.ram_limit_bytes is not None:
        found += (
            f" of the container's {show_gib(machine.ram_limit_bytes)}, which free and top show as {show_gib(machine.ram_bytes)}"
        )
    wanted = f"{show_gib(needs.host_bytes)} to load {needs.model}"
    if machine.ram_available_bytes >= needs.host_bytes:
        return ok("ram", found, wanted)
    return error("ram", found, wanted, _ram_command(machine))


def _ram_command(machine: Machine) -> str:
    if machine.ram_limit_bytes is not None:
        return "Start the container with more memory (docker run --memory), or take another machine"
    return "Stop other programs, or take a machine with more memory"


def check_pinned(machine: Machine, needs: Needs) -> Finding | None:
    """Memory that is locked, where weights cross the link; the trial tries it."""
    if machine.card is None or not needs.pinned_bytes:
        return None
    pinned, limit = needs.pinned_bytes, machine.pinned_limit_bytes
    wanted = f"{show_gib(pinned)} locked, for what crosses the link"
    if limit is not None and limit < pinned:
        found = f"a limit of {limit // 1024} KiB (ulimit -l), which NVIDIA's driver passes on Linux, and not everywhere"
        return warning("pinned memory", found, wanted, "Start the container with --ulimit memlock=-1")
    return ok("pinned memory", "no limit" if limit is None else f"a limit of {show_gib(limit)}", wanted)


def check_models_disk(machine: Machine, needs: Needs) -> Finding | None:
    """Room for what is still to be fetched, a margin included."""
    disk = _find(machine, MODELS)
    if disk is None:
        return None
    wanted_bytes = needs.disk_bytes + _scratch_beside(machine, disk)
    found = f"{show_gb(disk.free_bytes)} free in {disk.path}"
    wanted = f"{show_gb(wanted_bytes)} for {needs.model}, a margin included" if needs.download_bytes else "nothing: it is here"
    if not needs.download_bytes or disk.free_bytes >= wanted_bytes:
        return ok("models disk", found, wanted)
    roomy = max(machine.disks, key=lambda each: each.free_bytes)
    place = f"the disk of {roomy.path}, which has the room" if roomy.free_bytes >= wanted_bytes else "a larger disk"
    command = f"Set XDG_DATA_HOME to a folder on {place}; or fetch it there: millicent pull {needs.model} --to FOLDER"
    return error("models disk", found, wanted, command)


def check_hub_cache(machine: Machine, needs: Needs) -> Finding | None:
    """The folder that huggingface_hub fills; `millicent pull` does not, but whoever downloads by other means does."""
    disk = _find(machine, HUB_CACHE)
    if disk is None or not needs.download_bytes:
        return None
    found = f"{show_gb(disk.free_bytes)} free in {disk.path}"
    wanted = f"{show_gb(needs.disk_bytes)}, if the model is fetched by other tools than millicent pull"
    if disk.free_bytes >= needs.disk_bytes:
        return ok("hub cache", found, wanted)
    return warning("hub cache", found, wanted, f"Fetch it with millicent pull, or {_set(HUB_CACHE)}")


def check_temporary_disk(machine: Machine, needs: Needs) -> Finding | None:
    """Room for pictures under way."""
    return _check_scratch(machine, TEMPORARY)


def check_kernel_cache(machine: Machine, needs: Needs) -> Finding | None:
    """Room for what Triton compiles."""
    return _check_scratch(machine, KERNELS) if machine.cards else None


def _check_scratch(machine: Machine, purpose: str) -> Finding | None:
    disk = _find(machine, purpose)
    if disk is None:
        return None
    found, wanted = f"{show_gb(disk.free_bytes)} free in {disk.path}", f"{show_gb(SCRATCH_BYTES)} for {purpose}"
    if disk.free_bytes >= SCRATCH_BYTES:
        return ok(purpose, found, wanted)
    return error(purpose, found, wanted, _set(purpose)[0].upper() + _set(purpose)[1:])


def check_shm(machine: Machine, needs: Needs) -> Finding | None:
    """/dev/shm, through which the processes of several cards would speak; one process needs none of it."""
    if machine.shm_bytes is None:
        return None
    found = f"/dev/shm has {show_gib(machine.shm_bytes)}"
    if machine.shm_bytes >= SHM_BYTES:
        return ok("shared memory", found)
    if len(machine.cards) < 2:
        return ok("shared memory", f"{found}; one card's process does not use it")
    return warning("shared memory", found, f"{show_gib(SHM_BYTES)} for several cards", "Start the container with --shm-size=8g")


def _find(machine: Machine, purpose: str) -> Disk | None:
    return next((disk for disk in machine.disks if disk.purpose == purpose), None)


def _scratch_beside(machine: Machine, models: Disk) -> int:
    """What else will be written to the same file system."""
    beside = [each for each in machine.disks if each.purpose in (TEMPORARY, KERNELS) and each.filesystem == models.filesystem]
    return SCRATCH_BYTES * len(beside) if models.filesystem else 0


def _set(purpose: str) -> str:
    return f"set {_VARIABLES[purpose]} to a folder on a larger disk"
