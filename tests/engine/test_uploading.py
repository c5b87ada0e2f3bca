"""Weights by way of page-locked buffers; here the card is played by a second place in memory."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from millicent.engine import uploading as module
from millicent.engine.uploading import uploading

CPU = torch.device("cpu")
CARD = torch.device("cuda")
DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.bool)


class Event:
    """After a copy. Whoever fills a buffer again must have waited for it."""

    def __init__(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


class Memory:
    def __init__(self, size_bytes: int) -> None:
        self.tensor, self.is_closed = torch.zeros(size_bytes, dtype=torch.uint8), False

    def close(self) -> None:
        self.is_closed = True


class Machine:
    """memories: that were page-locked. events: of the copies, in their order."""

    def __init__(self) -> None:
        self.memories: list[Memory] = []
        self.events: list[Event] = []

    def allocate(self, size_bytes: int, key: str | None, device: torch.device) -> Memory:
        assert (key, device) == (None, CARD)
        self.memories.append(Memory(size_bytes))
        return self.memories[-1]

    def mark(self, device: torch.device) -> Event:
        self.events.append(Event())
        return self.events[-1]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(module, "allocate", machine.allocate)
    monkeypatch.setattr(module, "_mark", machine.mark)
    monkeypatch.setattr(module, "LEAST_BYTES", 1024)
    monkeypatch.setattr(module, "BUFFER_BYTES", 3 * 4096)
    empty = torch.empty
    # only where the result lies is played
    fake = SimpleNamespace(**{**vars(torch), "empty": lambda shape, dtype, device: empty(shape, dtype=dtype)})
    monkeypatch.setattr(module, "torch", fake)
    return machine


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
    return raw.view(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1024, 8), (2049, 17), (4096 * 12,)])
def test_the_bits_are_the_same(machine: Machine, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = draw(dtype, *shape)
    with uploading(CARD) as upload:
        found = upload(tensor, CARD)
    assert found.data_ptr() != tensor.data_ptr()
    assert (found.shape, found.dtype, found.stride()) == (tensor.shape, dtype, tensor.stride())
    assert torch.equal(bits(found), bits(tensor))
    assert len(machine.events) == -(-tensor.nbytes // (3 * 4096))


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, 3:90], lambda t: t[5:], lambda t: t[:1].expand(300, -1)])
def test_views_come_whole(machine: Machine, view: type) -> None:
    tensor = view(draw(torch.float8_e4m3fn, 300, 100))
    with uploading(CARD) as upload:
        found = upload(torch.nn.Parameter(tensor, requires_grad=False), CARD)
    assert machine.events
    assert found.is_contiguous()
    assert torch.equal(bits(found), bits(tensor))


def test_a_buffer_is_filled_again_only_when_its_copy_is_done(machine: Machine) -> None:
    waited_before = []
    mark = machine.mark

    def watch(device: torch.device) -> Event:
        waited_before.append([event.waited for event in machine.events])
        return mark(device)

    module._mark = watch  # the fixture puts it back
    with uploading(CARD) as upload:
        upload(draw(torch.uint8, 5 * 3 * 4096), CARD)
    # three buffers: the fourth piece waits for the first, and not for those that are under way
    assert waited_before == [[], [False], [False] * 2, [True, False, False], [True, True, False, False]]


def test_one_allocation_serves_all_and_is_given_back(machine: Machine) -> None:
    with uploading(CARD) as upload:
        for _ in range(3):
            upload(draw(torch.uint8, 50_000), CARD)
        assert [memory.is_closed for memory in machine.memories] == [False]
    assert [memory.is_closed for memory in machine.memories] == [True]


def test_it_is_given_back_after_an_error_too(machine: Machine) -> None:
    def fail() -> None:
        with uploading(CARD) as upload:
            upload(draw(torch.uint8, 50_000), CARD)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert machine.memories[0].is_closed


def test_what_is_small_or_goes_elsewhere_takes_the_usual_way(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    monkeypatch.setattr(module, "move", lambda tensor, device: moved.append((tensor.nbytes, device.type)) or tensor)
    with uploading(CARD) as upload:
        upload(draw(torch.uint8, 1023), CARD)
        upload(draw(torch.uint8, 4096), CPU)
        upload(torch.empty(4096, dtype=torch.uint8, device="meta"), CARD)
    assert moved == [(1023, "cuda"), (4096, "cpu"), (4096, "cuda")]
    assert not machine.memories


def test_on_a_cpu_nothing_is_copied() -> None:
    tensor = draw(torch.uint8, 1 << 21)
    with uploading(CPU) as upload:
        assert upload(tensor, CPU) is tensor
