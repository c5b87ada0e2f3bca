"""What of driver and packages may stand in an edit's way: a function a check, each pure."""

from __future__ import annotations

from millicent.errors import InputError
from millicent.facts.formats import ENGINE_FORMATS
from millicent.facts.wheels import (
    MIN_TORCH,
    Arch,
    DriverFloor,
    Wheel,
    card_driver,
    driver_floor,
    find_wheel,
    is_older,
    parse_version,
    read_wheels,
    recommend_wheel,
    runs_on,
    torchao_loads,
)
from millicent.hardware.findings import Finding, error, ok, show_capability, warning
from millicent.hardware.machine import Machine
from millicent.hardware.needs import Needs, support_of
from millicent.hardware.recipes import doubtful, hangs_on_ada, known_failure


def check_driver(machine: Machine, needs: Needs) -> Finding | None:
    """The driver against the card, and against the CUDA that torch was built with."""
    card = machine.card
    if card is None or machine.driver is None:
        return None
    runs = f", which runs CUDA {machine.cuda_driver[0]}.{machine.cuda_driver[1]}" if machine.cuda_driver else ""
    found = f"driver {machine.driver}{runs}"
    known = card_driver(card.capability) if card.capability else None
    if known is not None and is_older(machine.driver, known.driver):
        return error("driver", found, f"{known.driver} or later for this card", _host_command(known.driver))
    if machine.torch is None or machine.torch_cuda is None:
        return ok("driver", found)
    floor = _floor(machine.torch_cuda)
    if floor is None:
        return ok("driver", f"{found}; the table knows no driver for CUDA {machine.torch_cuda}")
    if is_older(machine.driver, floor.driver):
        wanted = f"{floor.driver} or later for torch {machine.torch} (CUDA {machine.torch_cuda})"
        return error("driver", found, wanted, _wheel_command(machine) or _host_command(floor.driver))
    if is_older(machine.driver, floor.toolkit_driver):
        wanted = f"{floor.toolkit_driver}, which came with CUDA {machine.torch_cuda}, as Triton compiles with it"
        return warning("driver", found, wanted, _wheel_command(machine) or _host_command(floor.toolkit_driver))
    return ok("driver", found, f"{floor.driver} or later")


def _host_command(driver: str) -> str:
    return f"Take a machine with driver {driver} or later; in a container it is the host's, and cannot be changed from within"


def check_torch(machine: Machine, needs: Needs) -> Finding | None:
    """There is a torch that can use the card; where there is none, which build this driver and card need."""
    card = machine.card
    if card is None:
        return None
    # where the driver does not tell the capability, the plain build is the best guess
    command = _wheel_command(machine) if card.capability else "pip install torch"
    if machine.torch is None:
        if command is None:
            told = f"driver {machine.driver}" if machine.driver else "this driver"
            wanted = (
                f"a card and driver that a build of torch {MIN_TORCH} or later is for; for {card.name} and {told} there is none"
            )
            return error("torch", "torch is not installed", wanted, "Take another machine")
        return warning("torch", "torch is not installed", f"torch {MIN_TORCH} or later, built for this driver and card", command)
    found = f"torch {machine.torch}"
    if is_older(machine.torch, MIN_TORCH):
        return error("torch", found, f"torch {MIN_TORCH} or later", command)
    if machine.torch_cuda is None:
        return error("torch", f"{found} is a build without CUDA, and would leave the card alone", "a build with CUDA", command)
    return ok("torch", f"{found}, CUDA {machine.torch_cuda}")


def check_wheel(machine: Machine, needs: Needs) -> Finding | None:
    """torch has machine code for the card; where not, every kernel ends in "no kernel image is available"."""
    card = machine.card
    if card is None or card.capability is None or machine.torch is None or machine.torch_cuda is None:
        return None
    wheel = _installed_wheel(machine)
    if wheel is None:
        return ok(
            "wheel", f"torch {machine.torch} with CUDA {machine.torch_cuda} is not in the table; the trial shows whether it runs"
        )
    code = ", ".join(f"sm_{sm}" for sm in wheel.sms)
    if runs_on(wheel, card.capability):
        return ok("wheel", f"torch {machine.torch} has code for {code}")
    asked = show_capability(card.capability)
    found = f'torch {machine.torch} has code for {code}, and none for {asked}: "no kernel image is available"'
    wanted = f"a build for compute capability {asked}"
    return error(
        "wheel",
        found,
        wanted,
        _wheel_command(machine) or "Take another card: no build of torch that millicent runs with has code for it",
    )


def check_cudnn(machine: Machine, needs: Needs) -> Finding | None:
    """torch's cuDNN is there, once, and of torch's CUDA; else libcudnn.so.9 is not found. The trial loads it."""
    if machine.card is None or machine.torch is None or machine.torch_cuda is None:
        return None
    major = machine.torch_cuda.partition(".")[0]
    wheel = _installed_wheel(machine)
    pin = wheel.cudnn if wheel else None
    wanted = f"nvidia-cudnn-cu{major} {pin or ''}".strip()
    command = f"pip install --force-reinstall nvidia-cudnn-cu{major}" + (f"=={pin}" if pin else "")
    if machine.cudnn_package is None and wheel is None:
        return ok("cudnn", "no package; this build of torch brings its own, or the system does: the trial loads it")
    if machine.cudnn_package is None:
        return warning("cudnn", "no cuDNN package; libcudnn.so.9 must come from the system", wanted, command)
    name, _, version = machine.cudnn_package.partition(" ")
    if not name.endswith(f"-cu{major}"):
        return warning(
            "cudnn",
            f"{machine.cudnn_package} beside a torch for CUDA {machine.torch_cuda}",
            wanted,
            f"pip uninstall {name}; {command}",
        )
    if pin is not None and parse_version(version)[:2] != parse_version(pin)[:2]:
        return warning("cudnn", machine.cudnn_package, f"{wanted}, which this torch was built with", command)
    return ok("cudnn", machine.cudnn_package)


def check_triton(machine: Machine, needs: Needs) -> Finding | None:
    """Triton, and the C compiler that it wants, for our kernels."""
    if machine.card is None or machine.torch is None or machine.torch_cuda is None:
        return None
    wheel = _installed_wheel(machine)
    pin = wheel.triton.removeprefix("~=") if wheel and wheel.triton else None
    command = f'pip install "triton=={pin}"' if pin else "pip install triton"
    if machine.triton is None:
        return error("triton", "Triton is not installed", f"Triton {pin or ''} for our kernels".replace("  ", " "), command)
    if pin is not None and parse_version(machine.triton)[:2] != parse_version(pin)[:2]:
        return warning("triton", f"Triton {machine.triton}", f"{pin}, which torch {machine.torch} pins", command)
    return ok("triton", f"Triton {machine.triton}")


def check_compiler(machine: Machine, needs: Needs) -> Finding | None:
    """Triton builds the launcher of each kernel with the machine's C compiler."""
    if machine.card is None:
        return None
    if machine.c_compiler is None:
        # before torch is installed, one more thing to install
        return (error if machine.torch else warning)(
            "compiler",
            "no C compiler",
            "gcc or clang, as Triton builds a launcher for each kernel",
            "apt-get install -y gcc, or name one in CC",
        )
    return ok("compiler", machine.c_compiler)


def check_recipe(machine: Machine, needs: Needs) -> Finding | None:
    """The format's products in this build of torch: too old for them, or known to fail or to hang."""
    card, product = machine.card, ENGINE_FORMATS[needs.format]
    if card is None or card.capability is None or machine.torch is None or machine.torch_cuda is None:
        return None
    newer = _wheel_command(machine) or "Install a later torch"
    known = support_of(needs.format, card.capability)
    if known and known.runs and known.min_cuda and is_older(machine.torch_cuda, known.min_cuda):
        found = f"CUDA {machine.torch_cuda} has no {needs.format} for compute capability {show_capability(card.capability)}"
        return error("recipe", found, f"CUDA {known.min_cuda} or later", newer)
    failure = known_failure(product, card.capability, machine.torch, machine.torch_cuda)
    if failure and hangs_on_ada(card.capability, machine.torch):
        return warning("recipe", f"{failure}; millicent takes its own kernel there", "torch 2.12 or later", newer)
    if failure:
        return error("recipe", failure, "another torch than 2.10", newer)
    if doubt := doubtful(product, machine.torch_cuda):
        return warning("recipe", doubt, "CUDA 12.8 or 13.0", newer)
    return ok("recipe", f"nothing is known against {needs.format} with torch {machine.torch} on this card")


def check_torchao(machine: Machine, needs: Needs) -> Finding | None:
    """millicent does not use it; others in the same environment do, and are told of a mismatch in a log alone."""
    if machine.torchao is None or machine.torch is None:
        return None
    pair = f"torchao {machine.torchao} with torch {machine.torch}"
    loads = torchao_loads(machine.torchao, machine.torch)
    if loads is not False:
        return ok("torchao", pair + ("" if loads else ", a pair that is not in the table"))
    found = f"{pair}: it leaves its own kernels out, and says so in its log alone"
    return warning(
        "torchao", found, "a pair that fits; millicent does without", "pip uninstall torchao, or pip install --upgrade torchao"
    )


def _installed_wheel(machine: Machine) -> Wheel | None:
    """The build in the table, or its neighbor of the same minor version and CUDA, which has the same code.

    None for a build that is not PyTorch's own, as in NVIDIA's containers ("2.9.0a0+nv25.10"): it has the code that its maker chose.
    """
    if machine.torch is None or machine.torch_cuda is None:
        return None
    suffix = machine.torch.partition("+")[2]
    if suffix and not suffix.startswith("cu"):
        return None
    arch = _arch(machine)
    minor = parse_version(machine.torch)[:2]
    near = (
        wheel
        for wheel in read_wheels()
        if parse_version(wheel.torch)[:2] == minor and (wheel.cuda, wheel.arch) == (machine.torch_cuda, arch)
    )
    return find_wheel(machine.torch, machine.torch_cuda, arch) or next(near, None)


def _wheel_command(machine: Machine) -> str | None:
    """How to install the build for this driver and card; None where there is none."""
    card = machine.card
    if card is None or card.capability is None:
        return None
    wheel = recommend_wheel(card.capability, machine.driver, _arch(machine))
    if wheel is None:
        return None
    # pip takes 2.13.0+cpu for the 2.13.0 that is asked for, and leaves it
    is_same = machine.torch is not None and machine.torch.partition("+")[0] == wheel.torch
    return wheel.pip_command.replace("pip install", "pip install --force-reinstall", 1) if is_same else wheel.pip_command


def _arch(machine: Machine) -> Arch:
    return "aarch64" if machine.arch in ("aarch64", "arm64") else "x86_64"


def _floor(cuda: str) -> DriverFloor | None:
    try:
        return driver_floor(cuda)
    except InputError:
        return None
