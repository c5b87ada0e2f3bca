"""The trial: run on a CPU, ended when it hangs, told when it crashes, judged by what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from millicent.engine.needs import needs_of
from millicent.hardware import trial
from millicent.hardware.findings import Finding
from millicent.hardware.judging import Ended, judge, start_trial, trial_command
from millicent.hardware.machine import Machine, from_json
from millicent.hardware.recipes import known_failure

MACHINES = Path(__file__).parent.parent / "machines"
SAYS = """import json, os, signal, subprocess, sys, time
def say(step, state):
    print(json.dumps({"step": step, "state": state}), flush=True)
"""


def machine(name: str = "rtx-4090") -> Machine:
    return from_json((MACHINES / f"{name}.json").read_text())


def judged(ended: Ended, asked: str = "fp8", name: str = "rtx-4090") -> dict[str, Finding]:
    return {
        finding.name: finding for finding in judge(ended, machine(name), needs_of("qwen-image-edit-2511", asked, machine(name)))
    }


def run_trial(command: Sequence[str], limit_s: float = 20) -> Ended:
    with start_trial(command) as finish:
        return finish(limit_s)


def run(code: str, limit_s: float = 20) -> Ended:
    return run_trial((sys.executable, "-c", SAYS + code), limit_s)


def told(*lines: dict[str, Any], code: int | None = 0) -> Ended:
    return Ended(tuple({"found": ""} | line for line in lines), code, 5.0)


def rate(step: str, tera_per_s: float) -> dict[str, Any]:
    return {"step": step, "state": "done", "found": "right", "tera_per_s": tera_per_s}


def test_on_a_cpu_every_step_is_right() -> None:
    ended = run_trial(trial_command("cpu"))
    assert ended.code == 0, ended
    done = {line["step"]: line for line in ended.lines if line["state"] == "done"}
    assert list(done) == ["import torch", "kernel", "convolution", "bf16", "fp8-rowwise", "fp8-tensorwise", "int8"]
    assert all(done[step]["relative_error"] <= trial.MAX_ERROR for step in ("bf16", "fp8-rowwise", "fp8-tensorwise", "int8"))
    assert not any("tera_per_s" in line for line in ended.lines)
    findings = judged(ended)
    assert {finding.level for finding in findings.values()} == {"ok"}
    assert findings["trial: nvfp4"].found == "not tried: a CPU has no such product"


def test_without_a_card_opening_it_is_the_step_that_fails() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    ended = run_trial(trial_command("cuda"))
    assert ended.code == 1
    finding = judged(ended)["trial: open card"]
    assert finding.level == "error"
    assert finding.found


def test_a_hang_is_ended_and_names_its_step() -> None:
    started = time.perf_counter()
    ended = run("say('kernel', 'begin'); say('kernel', 'done'); say('fp8-rowwise', 'begin'); time.sleep(60)", limit_s=1)
    assert time.perf_counter() - started < 5
    assert ended.code is None
    finding = judged(ended)["trial: fp8-rowwise"]
    assert finding.level == "error"
    assert "did not end within 1 s, and was stopped in: fp8-rowwise" in finding.found


def test_the_card_is_left_alone_until_it_is_told_to_go_on(tmp_path: Path) -> None:
    """As what else uses the card is looked at meanwhile."""
    told = tmp_path / "told"
    code = f"from millicent.hardware import trial; trial._wait(); open({str(told)!r}, 'w').close(); say('kernel', 'done')"
    with start_trial((sys.executable, "-c", SAYS + code)) as finish:
        time.sleep(1)
        assert not told.exists()
        assert finish(20).code == 0
    assert told.exists()


def test_a_trial_that_is_not_wanted_is_ended_at_once(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with start_trial((sys.executable, "-c", f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)")):
        while not note.exists() or not note.read_text():
            time.sleep(0.01)
    assert not Path(f"/proc/{note.read_text()}").exists()


def test_a_trial_that_has_ended_already_and_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS does not let a signal be sent to what has ended."""
    right = os.killpg

    def refuse(group: int, number: int) -> None:
        right(group, number)
        raise PermissionError

    monkeypatch.setattr(os, "killpg", refuse)
    with start_trial(("false",)):
        time.sleep(0.5)


def test_a_trial_whose_starter_has_ended_ends_too() -> None:
    ended = subprocess.run((*trial_command("cpu"), "--wait"), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    assert [json.loads(line)["step"] for line in ended.stdout.splitlines()] == ["import torch", "import torch"]


def test_a_hang_in_a_format_that_is_not_wanted_is_a_warning() -> None:
    assert judged(told({"step": "int8", "state": "begin"}, code=None))["trial: int8"].level == "warning"


def test_what_a_trial_started_ends_with_it(tmp_path: Path) -> None:
    """A process that it left, and that holds its outputs open."""
    note = tmp_path / "pid"
    start = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code = f"{start}\nopen({str(note)!r}, 'w').write(str(child.pid))"
    started = time.perf_counter()
    assert run(code).code == 0
    assert time.perf_counter() - started < 10
    pid = int(note.read_text())
    for _ in range(50):
        # a zombie has ended, though nobody has asked for it yet
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the grandchild lives on")


def test_a_crash_names_its_signal_and_step() -> None:
    ended = run("say('import torch', 'done'); say('convolution', 'begin'); os.kill(os.getpid(), signal.SIGSEGV)")
    finding = judged(ended)["trial: convolution"]
    assert finding.level == "error"
    assert "crashed (SIGSEGV) in: convolution" in finding.found


def test_a_start_that_fails_is_told_with_its_last_words() -> None:
    finding = judged(run("sys.exit('no module named millicent')"))["trial: its start"]
    assert finding.level == "error"
    assert "no module named millicent" in finding.found


def test_lines_that_are_not_ours_are_passed_over() -> None:
    ended = run(
        "print('warning: x'); print('[1]'); print('{\"step\": 3}'); say('kernel', 'done'); print('{\"step\": \"ke', end='')"
    )
    assert [line["step"] for line in ended.lines] == ["kernel"]


def test_a_format_slower_than_bf16_is_an_error_where_it_is_the_one_wanted() -> None:
    ended = told(rate("bf16", 150), rate("fp8-rowwise", 120), rate("int8", 300))
    assert judged(ended, "fp8")["trial: fp8-rowwise"].level == "error"
    assert judged(ended, "int8")["trial: fp8-rowwise"].level == "warning"
    assert judged(ended, "int8")["trial: int8"].found == "right, 300 TOP/s, 2.0 times BF16"


def test_a_card_far_below_its_own_rate_is_told() -> None:
    assert judged(told(rate("bf16", 150)))["trial: bf16"].level == "ok"
    finding = judged(told(rate("bf16", 40)))["trial: bf16"]
    assert (finding.level, finding.found) == ("warning", "right, 40 TFLOP/s, of the table's 165")


def test_a_cudnn_that_is_not_found_is_told_as_such() -> None:
    found = "OSError: libcudnn.so.9: cannot open shared object file: No such file or directory"
    finding = judged(told({"step": "import torch", "state": "failed", "found": found}, code=1))["trial: import torch"]
    assert (finding.level, finding.found) == ("error", found)
    assert "LD_LIBRARY_PATH" in str(finding.command)


def test_a_wrong_product_is_an_error_in_the_format_that_is_wanted() -> None:
    ended = told(
        {"step": "nvfp4", "state": "failed", "found": "wrong"}, {"step": "pinned memory", "state": "failed", "found": "no"}, code=0
    )
    assert judged(ended, "nvfp4", "rtx-5090")["trial: nvfp4"].level == "error"
    assert judged(ended, "fp8", "rtx-5090")["trial: nvfp4"].level == "warning"
    assert judged(ended)["trial: pinned memory"].level == "warning"
    # whose weights come from locked memory
    assert judged(ended, None, "rtx-3090")["trial: pinned memory"].level == "error"


@pytest.mark.parametrize("make", [name for name in trial.PRODUCTS if name != "nvfp4"])
def test_a_product_with_one_operand_changed_is_seen(make: str) -> None:
    """The comparison must be able to fail."""
    right, other = (trial.PRODUCTS[make](trial.CHECKED_SHAPE, "cpu") for _ in range(2))
    assert trial._compare(right.run(), right.exact()) <= trial.MAX_ERROR
    with pytest.raises(RuntimeError, match="wrong"):
        trial._compare(other.run(), right.exact())
    with pytest.raises(RuntimeError, match="wrong"):
        trial._compare(torch.full_like(right.exact(), float("nan")), right.exact())


def test_nvfp4_operands_are_what_our_own_format_reads() -> None:
    """Codes, order of halves and swizzle, against the decoder of the formats."""
    from millicent.formats.float_blocks import dequantize_nvfp4

    codes, scales, exact = trial._draw_nvfp4(256, 128, "cpu")
    grid = scales.view(torch.float8_e4m3fn).view(256, 8)
    read = dequantize_nvfp4(codes, grid, torch.tensor(1.0), (256, 128), high_first=False, swizzled=True)
    assert torch.equal(read.double(), exact())


@pytest.mark.parametrize(
    ("product", "capability", "version", "cuda", "fails"),
    [
        ("fp8-rowwise", (8, 9), "2.11.0+cu130", "13.0", True),
        ("fp8-rowwise", (8, 9), "2.12.0+cu130", "13.0", False),
        ("fp8-tensorwise", (8, 9), "2.11.0+cu130", "13.0", False),
        ("fp8-rowwise", (9, 0), "2.11.0+cu130", "13.0", False),
        ("fp8-rowwise", (12, 0), "2.10.0+cu130", "13.0", True),
        ("fp8-rowwise", (12, 0), "2.10.0+cu128", "12.8", False),
        ("fp8-rowwise", (12, 0), "2.11.0+cu130", "13.0", False),
    ],
)
def test_known_failures_are_gated_by_card_and_torch(
    product: str, capability: tuple[int, int], version: str, cuda: str, fails: bool
) -> None:
    assert (known_failure(product, capability, version, cuda) is not None) == fails
