"""Start the trial, end it in time, and say what its lines mean."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from millicent.facts.formats import ENGINE_FORMATS
from millicent.hardware.card_checks import identify_card
from millicent.hardware.findings import Finding, error, ok, warning
from millicent.hardware.machine import Machine
from millicent.hardware.needs import Needs

# from when it may use the card; long, for a hang alone: on a disk in the network torch is imported slowly the first time
LIMIT_S = 30.0
KILL_S = 2.0
# of BF16's dense rate in the table; a product of 4096 x 4096 x 4096 reaches two thirds and more
LEAST_SHARE = 0.4
MENDS = {
    "import torch": "Install torch again: pip install --force-reinstall torch",
    "open card": "Compare driver and torch, above; nvidia-smi must show the card",
    "kernel": "Install the torch build that the check of the wheel names",
    "convolution": "Unset LD_LIBRARY_PATH, and install torch again with its own nvidia-cudnn package",
    "pinned memory": "Start the container with --ulimit memlock=-1 and more memory",
}


@dataclass(frozen=True, slots=True)
class Ended:
    """How the trial ended. lines: what it told. code: its exit code, negative for a signal; None where the limit ended it.

    last_words: the end of what it wrote on standard error.
    """

    lines: tuple[dict[str, Any], ...]
    code: int | None
    limit_s: float
    last_words: str = ""


def trial_command(device: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", "millicent.hardware.trial", "--device", device)


@contextmanager
def start_trial(command: Sequence[str]) -> Iterator[Callable[[float], Ended]]:
    """Start the trial: it imports torch, which takes longest, and leaves the card alone until what is yielded is called.

    That is given the seconds that it may take from then on, and waits for its end. It has a process group of its own, which ends
    with this whatever it does.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        # files, not pipes: a process that its driver does not let die would keep a pipe open
        child = subprocess.Popen((*command, "--wait"), stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True)

        def finish(limit_s: float) -> Ended:
            code: int | None = None
            with suppress(subprocess.TimeoutExpired):
                child.communicate(b"\n", limit_s)
                code = child.returncode
            _end(child)
            out.seek(0)
            err.seek(0)
            words = [line for line in err.read().decode("utf-8", "replace").splitlines() if line.strip()]
            return Ended(_parse(out.read().decode("utf-8", "replace")), code, limit_s, words[-1].strip() if words else "")

        try:
            yield finish
        finally:
            _end(child)
            assert child.stdin is not None
            child.stdin.close()


def _end(child: subprocess.Popen[bytes]) -> None:
    """With all that it has started, where the system has process groups."""
    if sys.platform == "win32":
        child.kill()
    else:
        with suppress(ProcessLookupError, PermissionError):  # macOS's word where all of it has ended and was not asked for
            os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(KILL_S)


def _parse(text: str) -> tuple[dict[str, Any], ...]:
    """The lines that are ours; the last may have been cut off."""
    lines = []
    for each in text.splitlines():
        with suppress(ValueError):
            line = json.loads(each)
            if isinstance(line, dict) and isinstance(line.get("step"), str) and "state" in line:
                lines.append(line)
    return tuple(lines)


def judge(ended: Ended, machine: Machine, needs: Needs) -> tuple[Finding, ...]:
    """A finding for each step, and one for a hang or a crash that names the step it was in."""
    told = {line["step"]: line for line in ended.lines}
    rate = _rate(told.get("bf16"))
    findings = [_judge_step(line, machine, needs, rate) for line in told.values() if line["state"] != "begin"]
    # 1 is the child's own word that a step failed, which is told already
    has_told = ended.code == 0 or (ended.code == 1 and any(line["state"] == "failed" for line in told.values()))
    if not has_told:
        under_way = next((step for step, line in told.items() if line["state"] == "begin"), "its start")
        findings.append(_judge_end(ended, under_way, needs))
    return tuple(findings)


def _judge_end(ended: Ended, step: str, needs: Needs) -> Finding:
    command = MENDS.get(step, "Choose another format, or another torch")
    if ended.code is None:
        found = f"the trial did not end within {ended.limit_s:.0f} s, and was stopped in: {step}"
    elif ended.code < 0:
        found = f"the trial crashed ({_signal_name(-ended.code)}) in: {step}"
    else:
        found = f"the trial ended with code {ended.code} in: {step}"
    told = f"{found}. {ended.last_words}" if ended.last_words else found
    make = error if _matters(step, needs) else warning
    return make(f"trial: {step}", told, "a trial that ends", command)


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _judge_step(line: dict[str, Any], machine: Machine, needs: Needs, bf16: float | None) -> Finding:
    step, name, found = line["step"], f"trial: {line['step']}", str(line.get("found", ""))
    matters = _matters(step, needs)
    if line["state"] == "skipped":
        return ok(name, f"not tried: {found}")
    if line["state"] == "failed":
        # torch's own import fails where it cannot find cuDNN
        cause = "convolution" if "libcudnn" in found else step
        command = MENDS.get(cause, "Choose another format with --format, or another torch")
        return (error if matters else warning)(name, found, "to run, and to be right", command)
    rate = _rate(line)
    if rate is None:
        return ok(name, found)
    told = f"{found}, {rate:.0f} {'TOP/s' if step == 'int8' else 'TFLOP/s'}"
    if step == "bf16":
        return _judge_bf16(name, told, rate, machine)
    if bf16 is not None and rate < bf16:
        advice = "Choose bf16, or another format, with --format" if matters else None
        return (error if matters else warning)(name, f"{told}: slower than BF16's {bf16:.0f}", f"more than {bf16:.0f}", advice)
    return ok(name, told + (f", {rate / bf16:.1f} times BF16" if bf16 else ""))


def _judge_bf16(name: str, told: str, rate: float, machine: Machine) -> Finding:
    """The card's own rate against the table's: a card that is shared, hot or limited shows it here."""
    gpu = identify_card(machine.card) if machine.card else None
    most = gpu.bf16_tflops if gpu else None
    if most is None or rate >= LEAST_SHARE * most:
        return ok(name, told + (f" of the table's {most:.0f}" if most else ""))
    return warning(name, f"{told}, of the table's {most:.0f}", f"{LEAST_SHARE * most:.0f} at least", "Take another machine")


def _matters(step: str, needs: Needs) -> bool:
    """Whether an edit in this format stands on the step; other formats' products are told, and are no reason to stop."""
    if step == "pinned memory":
        # weights that cross the link for an edit lie in locked memory; all else is only loaded a little slower
        return needs.pinned_bytes > 0
    formats = {ENGINE_FORMATS[each]: each for each in ("bf16", "fp8", "int8", "nvfp4")}
    return step not in (*formats, "fp8-tensorwise") or step in (ENGINE_FORMATS[needs.format], "bf16")


def _rate(line: dict[str, Any] | None) -> float | None:
    rate = (line or {}).get("tera_per_s")
    return float(rate) if isinstance(rate, (int, float)) else None
