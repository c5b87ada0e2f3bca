"""Host memory that processes share: who fills it, who reads it, and what is left when any of them is killed."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
import torch

from millicent.engine import host_memory
from millicent.engine.host_memory import HostMemory, allocate, shared_bytes
from millicent.errors import MachineError
from millicent.hardware.memory import Memory

CPU = torch.device("cpu")
SIZE = 3 * 4096 + 100
KEY = "abc123"
needs_memfd = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memory that is no file and can be shared")

# allocates, says what it has, and does what it is told: a line for each of both
PROCESS = """
import os, sys, torch
from millicent.engine.host_memory import allocate
torch.set_num_threads(1)
size, value = int(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
memory = allocate(size, sys.argv[3], torch.device("cpu"))
print("filled" if memory.is_filled else "new", os.fstat(memory._fd).st_ino, int(memory.tensor.sum()), flush=True)
for line in sys.stdin:
    if line == "publish\\n":
        memory.tensor.fill_(value)
        memory.publish()
    print("done", flush=True)
"""


class Process:
    """Another one that allocates SIZE bytes and fills them with `value`."""

    def __init__(self, value: int) -> None:
        self.running = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(SIZE), str(value), KEY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": tempfile.gettempdir()},
        )
        assert self.running.stdin is not None
        assert self.running.stdout is not None
        self.stdin: IO[str] = self.running.stdin
        self.stdout: IO[str] = self.running.stdout

    def wait(self) -> None:
        assert self.stdout.readline() == "ready\n"

    def ask(self, word: str) -> None:
        self.stdin.write(f"{word}\n")
        self.stdin.flush()

    def allocate(self) -> tuple[str, int, int]:
        """Whether it was filled; its inode; its sum."""
        self.ask("allocate")
        found, inode, total = self.stdout.readline().split()
        return found, int(inode), int(total)

    def publish(self) -> None:
        self.ask("publish")
        assert self.stdout.readline() == "done\n"

    def kill(self) -> None:
        self.running.send_signal(signal.SIGKILL)
        self.running.wait()
        self.stdin.close()
        self.stdout.close()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"millicent-{os.getuid()}"


@pytest.fixture
def start() -> Iterator[Callable[..., list[Process]]]:
    """A process for each value, all ready to allocate; killed when the test ends."""
    started: list[Process] = []

    def begin(*values: int) -> list[Process]:
        started.extend(Process(value) for value in values)  # all at once, as each imports PyTorch for a second
        for process in started:
            process.wait()
        return started

    yield begin
    for process in started:
        if process.running.returncode is None:
            process.kill()


@pytest.fixture
def make() -> Iterator[Callable[..., HostMemory]]:
    """Allocate here; closed when the test ends."""
    made: list[HostMemory] = []

    def begin(size: int = SIZE, key: str | None = KEY) -> HostMemory:
        made.append(allocate(size, key, CPU))
        return made[-1]

    yield begin
    for memory in made:
        memory.close()


def publish(memory: HostMemory, value: int) -> None:
    memory.tensor.fill_(value)
    memory.publish()


def inode(memory: HostMemory) -> int:
    return os.fstat(memory._fd).st_ino


@needs_memfd
def test_two_processes_have_one_memory(make: Callable[..., HostMemory], start: Callable[..., list[Process]], folder: Path) -> None:
    mine = make()
    assert not mine.is_filled
    assert mine.tensor.shape == (SIZE,)
    assert mine.tensor.dtype == torch.uint8
    publish(mine, 3)
    assert start(9)[0].allocate() == ("filled", inode(mine), 3 * SIZE)
    # nothing but the record is in a file system
    assert [(path.name, path.stat().st_size < 100) for path in folder.iterdir()] == [(f"millicent-{KEY}.lock", True)]
    assert folder.stat().st_mode & 0o777 == 0o700


@needs_memfd
def test_who_comes_while_it_is_filled_waits(make: Callable[..., HostMemory], start: Callable[..., list[Process]]) -> None:
    mine, (other,) = make(), start(9)
    answers: list[tuple[str, int, int]] = []
    waiting = threading.Thread(target=lambda: answers.append(other.allocate()))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    assert not answers
    publish(mine, 5)
    waiting.join(30)
    assert answers == [("filled", inode(mine), 5 * SIZE)]


@needs_memfd
def test_what_a_killed_process_had_begun_is_made_anew(make: Callable[..., HostMemory], start: Callable[..., list[Process]]) -> None:
    (maker,) = start(9)
    assert maker.allocate()[0] == "new"
    maker.kill()
    mine = make()
    assert not mine.is_filled
    assert not mine.tensor.any()


@needs_memfd
def test_the_memory_outlives_its_maker_with_whoever_holds_it(start: Callable[..., list[Process]]) -> None:
    maker, second, third, fourth = start(7, 9, 9, 9)
    first_inode = maker.allocate()[1]
    maker.publish()
    expected = ("filled", first_inode, 7 * SIZE)
    assert second.allocate() == expected
    maker.kill()
    assert third.allocate() == expected
    second.kill()
    third.kill()
    # nobody holds it any more
    assert fourth.allocate()[::2] == ("new", 0)


@needs_memfd
def test_those_who_are_gone_leave_the_record(
    make: Callable[..., HostMemory], start: Callable[..., list[Process]], folder: Path
) -> None:
    maker, second = start(7, 9)
    maker.allocate()
    maker.publish()
    second.allocate()
    maker.kill()
    make()
    holders = json.loads((folder / f"millicent-{KEY}.lock").read_text())
    assert [pid for pid, _ in holders] == [second.running.pid, os.getpid()]


@needs_memfd
@pytest.mark.parametrize(
    "record",
    [
        "",
        "[[",
        "null",
        "[1]",
        "[[1, 2, 3]]",
        '{"pid": 1}',
        '[["../self", 0]]',
        "[[1e999, 0]]",
        "[[true, false]]",
        "[" * 100_000,
        "\xff",
    ],
)
def test_a_damaged_record_is_not_trusted(make: Callable[..., HostMemory], folder: Path, record: str) -> None:
    make().close()
    (folder / f"millicent-{KEY}.lock").write_text(record, encoding="latin-1")
    assert not make().is_filled


@needs_memfd
def test_a_record_of_an_unrelated_process_is_not_trusted(make: Callable[..., HostMemory], folder: Path, tmp_path: Path) -> None:
    make().close()
    other = allocate(SIZE, "other", CPU)
    publish(other, 1)
    unpublished = os.memfd_create(f"millicent-{KEY}", os.MFD_ALLOW_SEALING)
    os.ftruncate(unpublished, SIZE)
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(SIZE)
        holders = [(1, 0), (os.getpid(), file.fileno()), (os.getpid(), other._fd), (os.getpid(), unpublished), (2**31, 5)]
        (folder / f"millicent-{KEY}.lock").write_text(json.dumps(holders))
        found = make()
    assert not found.is_filled
    assert inode(found) not in (inode(other), os.fstat(unpublished).st_ino)
    os.close(unpublished)
    other.close()


@needs_memfd
def test_memory_of_another_size_is_not_used(make: Callable[..., HostMemory]) -> None:
    publish(make(), 1)
    larger = make(2 * SIZE)
    assert not larger.is_filled
    assert larger.tensor.shape == (2 * SIZE,)


@needs_memfd
def test_it_cannot_be_resized_once_published(make: Callable[..., HostMemory]) -> None:
    mine = make()
    publish(mine, 1)
    for size in (0, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(mine._fd, size)
    mine.publish()  # again, as an engine that lays its weights out anew does


@needs_memfd
def test_a_fork_does_not_keep_others_waiting(make: Callable[..., HostMemory]) -> None:
    mine = make()
    assert mine._lock is not None
    of_fork = os.dup(mine._lock.fileno())  # what a fork has: the same open file, and its lock
    publish(mine, 1)
    assert make().is_filled
    os.close(of_fork)


@needs_memfd
def test_what_is_shared_is_told_beforehand(make: Callable[..., HostMemory]) -> None:
    assert shared_bytes(KEY) == 0
    mine = make()
    publish(mine, 1)
    assert shared_bytes(KEY) == SIZE
    mine.close()
    assert shared_bytes(KEY) == 0


@needs_memfd
def test_nothing_is_shared_after_close_or_failure(make: Callable[..., HostMemory]) -> None:
    first = make()
    publish(first, 1)
    first.close()
    first.close()
    assert first.tensor.numel() == 0
    second = make()
    assert not second.is_filled
    second.close()  # never published: the lock is let go
    assert not make().is_filled


def count_open() -> int:
    """Of this process's open files those that are of our kind: others open and close theirs meanwhile."""
    ours = 0
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            to = str(one.readlink())
            ours += "/memfd:millicent" in to or to.endswith(".lock")
    return ours


@needs_memfd
def test_what_is_forgotten_is_let_go() -> None:
    gc.collect()  # what other tests have forgotten
    open_before = count_open()
    memory = allocate(SIZE, KEY, CPU)
    del memory
    gc.collect()
    assert count_open() == open_before
    allocate(SIZE, KEY, CPU).close()


@needs_memfd
def test_what_is_forgotten_in_a_cycle_does_not_block(make: Callable[..., HostMemory]) -> None:
    cycle: list[object] = [allocate(SIZE, KEY, CPU)]
    cycle.append(cycle)
    del cycle
    assert not make().is_filled


def test_tensors_outlive_close(make: Callable[..., HostMemory]) -> None:
    memory = make()
    view = memory.tensor[4096:8192].view(torch.float32)
    view.fill_(2.5)
    memory.close()
    del memory
    gc.collect()
    assert view.sum() == 2.5 * 1024


@pytest.mark.parametrize("platform", [sys.platform, "darwin"])
def test_without_a_key_or_on_other_systems_nothing_is_shared(
    make: Callable[..., HostMemory], folder: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    key = None if platform == "linux" else KEY
    first, second = make(key=key), make(key=key)
    publish(first, 1)
    assert not first.is_filled
    assert not second.is_filled
    assert not second.tensor.any()
    assert not folder.exists()


@pytest.mark.parametrize("key", [None, KEY])
def test_too_little_memory_is_refused(make: Callable[..., HostMemory], monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    told = Memory(total_bytes=64 << 30, limit_bytes=16 << 30, available_bytes=(3 << 30) // 2)
    monkeypatch.setattr(host_memory, "read_memory", lambda: told)
    with pytest.raises(MachineError, match=r"take 2\.0 GiB .* 1\.5 GiB are free, within the container's limit of 16\.0 GiB"):
        make(2 << 30, key)
    make()  # the lock was let go


@needs_memfd
def test_memory_that_is_shared_needs_no_room(make: Callable[..., HostMemory], monkeypatch: pytest.MonkeyPatch) -> None:
    publish(make(), 1)
    monkeypatch.setattr(host_memory, "read_memory", lambda: Memory(total_bytes=64 << 30, limit_bytes=None, available_bytes=0))
    assert make().is_filled


@needs_memfd
@pytest.mark.parametrize("kind", ["open to others", "link", "file"])
def test_a_folder_that_is_not_ours_alone_is_refused(make: Callable[..., HostMemory], folder: Path, kind: str) -> None:
    if kind == "open to others":
        folder.mkdir()
        folder.chmod(0o755)
    elif kind == "link":
        (folder.parent / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to("elsewhere")
    else:
        folder.touch()
    with pytest.raises(MachineError, match="TMPDIR"):
        make()


class Cudart:
    """CUDA's runtime, as far as a page lock asks for it."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 1
        if self.status == 0:
            self.locked[pointer] = size
        return self.status

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        del self.locked[pointer]
        return 0


@pytest.fixture
def cudart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cudart:
    made = Cudart(request.param)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return made


@needs_memfd
@pytest.mark.parametrize("cudart", [0], indirect=True)
def test_a_page_lock_spans_all_of_it_and_keeps_what_others_wrote(make: Callable[..., HostMemory], cudart: Cudart) -> None:
    publish(make(), 3)
    mine = allocate(SIZE, KEY, torch.device("cuda"))
    assert mine.is_filled
    assert (mine.tensor == 3).all()
    assert cudart.locked == {mine.tensor.data_ptr(): SIZE}
    view = mine.tensor[:10]
    mine.close()
    assert not cudart.locked
    assert (view == 3).all()
    forgotten = allocate(SIZE, None, torch.device("cuda"))
    assert cudart.locked
    del forgotten
    gc.collect()
    assert not cudart.locked


@needs_memfd
@pytest.mark.parametrize("cudart", [2], indirect=True)
def test_a_page_lock_that_fails_leaves_nothing(
    make: Callable[..., HostMemory], cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor an error that CUDA would tell of at the next launch."""
    launched: list[object] = []

    def launch(*shape: int, device: torch.device) -> torch.Tensor:
        launched.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", launch)
    open_before = count_open()
    with pytest.raises(MachineError, match="page-lock"):
        allocate(SIZE, KEY, torch.device("cuda"))
    gc.collect()
    assert count_open() == open_before
    assert launched == [torch.device("cuda")]
    make()  # the lock was let go
