"""Host memory for weights that wait there: page-locked, so that a card fetches them by itself, and one copy for all processes.

It is no file anywhere (memfd_create), as /dev/shm holds 64 MB in most containers: when the last process that has it ends, be it by
SIGKILL, the kernel takes it back. What is shared is found by a small file for each content, in a folder of this user alone:

    <temporary folder>/millicent-<uid>/<key>.lock     [[pid, file descriptor], ...] of those who hold it

Who fills the memory keeps that file locked, and others wait: that is shorter than reading 20 GB twice. A lock ends with its
process. The record is a hint: what it names is used only where /proc shows this user's memory of that name there, of the right
size, and with the seals that its maker set once all was written.

Sources: memfd_create(2), fcntl(2) for seals, flock(2); the CUDA runtime's cudaHostRegister.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
import stat
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from millicent.errors import MachineError
from millicent.hardware.memory import read_memory

if sys.platform != "win32":  # where nothing is shared
    import fcntl

_GIB = 2**30
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every card that the process uses

Holder = tuple[int, int]  # a process, and its number for the memory's file descriptor


class HostMemory:
    """Bytes on the host.

    tensor: (size_bytes,) uint8 on the CPU, page-locked for a card; empty after `close`. is_filled: whether another process has
    written all of it, and it is only to be read. That nobody writes after `publish` is agreed, not enforced: not every driver
    page-locks what is mapped read-only. That nobody resizes it is enforced.
    A fork shares it; it can be read there, but is page-locked, published and closed in the process that allocated it alone.
    """

    def __init__(self, tensor: Tensor, is_filled: bool, fd: int, lock: IO[str] | None, held: ExitStack) -> None:
        self.tensor = tensor
        self.is_filled = is_filled
        self._fd = fd
        self._lock = lock
        self._release = weakref.finalize(self, held.close)
        self._release.atexit = False  # the kernel is quicker, and CUDA may have ended by then

    def publish(self) -> None:
        """All is written: other processes may use it. Does nothing for memory that is not shared, or is published.

        Raises MachineError where the record cannot be written.
        """
        if self._lock is None:
            return
        with _telling_of_folder():
            _write_holders(self._lock, [(os.getpid(), self._fd)])
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        _unlock(self._lock)
        self._lock = None

    def close(self) -> None:
        """Offer it to no other process any more, and end the page lock; what is on its way to a card is waited for.

        The memory goes with the last tensor that lies there. Closing it again does nothing.
        """
        self._release()
        self._lock = None
        # the mapping itself is never closed: PyTorch does not keep it open for its tensors, and they would point to nothing
        self.tensor = torch.empty(0, dtype=torch.uint8)


def allocate(size_bytes: int, key: str | None, device: torch.device) -> HostMemory:
    """Memory for what `key` names, from another process of this user where one has it; without a key, for this process alone.

    key: a hash of the content, in letters, digits, - and _. Waits while another process fills the same; so a process must publish
    or close what it fills before it asks for the same again. Systems without memfd share nothing.
    Raises MachineError for too little memory, and where it cannot be page-locked or shared.
    """
    assert size_bytes > 0
    with ExitStack() as held:
        fd, is_filled, lock = -1, False, None
        if key is not None and sys.platform == "linux":
            lock = held.enter_context(_lock(key, fcntl.LOCK_EX))
            found = _attach(lock, key, size_bytes)
            fd, is_filled = (_make(size_bytes, key), False) if found is None else (found, True)
            held.callback(os.close, fd)
        else:
            _check_room(size_bytes)
        if is_filled and lock is not None:
            _unlock(lock)
            lock = None
        tensor = _map(fd, size_bytes)
        if device.type == "cuda":
            _page_lock(tensor, is_filled, device)
            held.callback(_end_page_lock, tensor.data_ptr(), device)
        return HostMemory(tensor, is_filled, fd, lock, held.pop_all())


def shared_bytes(key: str) -> int:
    """Of what other processes of this host share under a key, 0 for nothing: `allocate` takes no more of the host's memory for it.

    Waits while another process fills it. Raises MachineError where the folder of locks cannot be used.
    """
    if sys.platform != "linux":
        return 0
    with _lock(key, fcntl.LOCK_SH) as lock:
        fd = _open_published(_living(_read_holders(lock), key), None)
    if fd is None:
        return 0
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def _check_room(size_bytes: int) -> None:
    memory = read_memory()
    # pages are taken as they are touched, and the kernel's answer to one too many is SIGKILL, which says nothing
    if memory.total_bytes and size_bytes > memory.available_bytes:
        within = "" if memory.limit_bytes is None else f", within the container's limit of {memory.limit_bytes / _GIB:.1f} GiB"
        raise MachineError(
            f"The weights that wait on the host take {size_bytes / _GIB:.1f} GiB of its memory, and "
            f"{memory.available_bytes / _GIB:.1f} GiB are free{within}.",
            "Free memory that other programs hold, use a host or a card with more, or a format with fewer bytes.",
        )


def _make(size_bytes: int, key: str) -> int:
    """A file descriptor of new memory under a key's name, not filled. Raises MachineError."""
    _check_room(size_bytes)
    with ExitStack() as held, _telling_of_memory(size_bytes):
        fd = os.memfd_create(_name(key), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        held.callback(os.close, fd)
        os.ftruncate(fd, size_bytes)
        held.pop_all()
        return fd


def _map(fd: int, size_bytes: int) -> Tensor:
    with _telling_of_memory(size_bytes):
        mapping = mmap.mmap(fd, size_bytes)
    with suppress(OSError, AttributeError):  # a wish: not every kernel has large pages, and few give them to shared memory
        mapping.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(False):  # it outlives the edit in which it may be made
        return torch.frombuffer(mapping, dtype=torch.uint8)


def _page_lock(tensor: Tensor, is_filled: bool, device: torch.device) -> None:
    if not is_filled:
        # CUDA takes pages that are not there one by one, on one thread; PyTorch's threads take a share each
        tensor[:: mmap.PAGESIZE].zero_()
    with torch.cuda.device(device):
        status = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), _PORTABLE))
        if status != 0:
            with suppress(RuntimeError):  # or the next kernel's launch would be told of it, as if it had failed itself
                torch.ones(1, device=device).neg()
    if status != 0:
        raise MachineError(
            f"CUDA does not page-lock {tensor.numel() / _GIB:.1f} GiB of this host's memory (its error {status}).",
            "Give the machine or the container more memory and no limit on locked memory, or use a card with more memory.",
        )


def _end_page_lock(pointer: int, device: torch.device) -> None:
    # a card that has failed, or is another process's since a fork, copies nothing from here
    with suppress(RuntimeError):
        torch.cuda.synchronize(device)
        torch.cuda.cudart().cudaHostUnregister(pointer)


def _name(key: str) -> str:
    assert re.fullmatch(r"[\w-]{1,128}", key, re.ASCII), key
    return f"millicent-{key}"


def _lock(key: str, operation: int) -> IO[str]:
    """The file of a key's record, locked for as long as it is open. Raises MachineError where it cannot be."""
    with _telling_of_folder():
        folder = Path(tempfile.gettempdir()) / f"millicent-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise MachineError(
                f"{folder} must be a folder that this user owns and nobody else can open, and is not.",
                "Remove it, or name another folder for temporary files in TMPDIR.",
            )
        with ExitStack() as held:
            file = held.enter_context((folder / f"{_name(key)}.lock").open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                gc.collect()  # a model of this process that failed to load may hold it, in a cycle, and would be waited for forever
                fcntl.flock(file, operation)
            held.pop_all()
            return file


def _unlock(lock: IO[str]) -> None:
    # closing alone would leave it locked for as long as a fork has the file open
    fcntl.flock(lock, fcntl.LOCK_UN)
    lock.close()


def _attach(lock: IO[str], key: str, size_bytes: int) -> int | None:
    """A file descriptor of the memory that others hold, with ourselves recorded as one who holds it; None where nobody does."""
    holders = _living(_read_holders(lock), key)
    fd = _open_published(holders, size_bytes)
    if fd is not None:
        with ExitStack() as held, _telling_of_folder():
            held.callback(os.close, fd)
            _write_holders(lock, [*holders, (os.getpid(), fd)])
            held.pop_all()
    return fd


def _living(holders: Sequence[Holder], key: str) -> list[Holder]:
    """Those that have memory of that name now; a number may have gone to another process or file since."""
    living = []
    for pid, fd in holders:
        with suppress(OSError):
            if str(Path(f"/proc/{pid}/fd/{fd}").readlink()) == f"/memfd:{_name(key)} (deleted)":
                living.append((pid, fd))
    return living


def _open_published(holders: Sequence[Holder], size_bytes: int | None) -> int | None:
    """Our file descriptor of the first's memory that is all written. size_bytes: that it must have; None for any."""
    for pid, number in holders:
        with suppress(OSError), ExitStack() as held:
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
            held.callback(os.close, fd)
            # its maker seals it when all is written
            is_written = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL
            if is_written and size_bytes in (None, os.fstat(fd).st_size):
                held.pop_all()
                return fd
    return None


def _read_holders(lock: IO[str]) -> list[Holder]:
    """Nobody where the record is damaged, as by a process that was killed while it wrote."""
    lock.seek(0)
    try:
        return [(pid, fd) for pid, fd in json.load(lock) if type(pid) is int and type(fd) is int]
    except (ValueError, TypeError, RecursionError):
        return []


def _write_holders(lock: IO[str], holders: Sequence[Holder]) -> None:
    lock.seek(0)
    lock.truncate()
    json.dump(holders, lock)
    lock.flush()


@contextmanager
def _telling_of_folder() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"Processes that share weights meet in the folder for temporary files, and it cannot be used: {error}.",
            "Make room there, or name another folder in TMPDIR.",
        ) from error


@contextmanager
def _telling_of_memory(size_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"The system does not give {size_bytes / _GIB:.1f} GiB of memory for weights: {error.strerror}.",
            "Free memory that other programs hold, lift the limits on it that this machine sets, or use a card with more memory.",
        ) from error
