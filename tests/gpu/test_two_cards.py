"""A second card of one machine: the pictures of the first, by itself and while that one draws too."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from capped_demo import CUDA, PICTURES, ask, draw, draw_in_waves, load, pictures_of, residency_of, wanted

pytest.importorskip("triton")

from millicent import EditRequest
from millicent.engine.editor import Editor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one card")]

SECOND = torch.device("cuda", 1)
SHARES = [None, 0.9, 0.3]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", ["own", "approximate"])
def test_the_pictures_are_the_same(kind: str, share: float | None) -> None:
    expected = wanted(kind)
    gc.collect()
    first = torch.cuda.memory_allocated(CUDA)
    model = load(kind, share, device=SECOND)
    for _ in range(3):  # as it is, recorded, replayed
        assert draw(model) == expected
    assert draw_in_waves(model, 3, threading.Event()) == expected
    assert torch.cuda.current_device() == 0
    assert torch.cuda.memory_allocated(CUDA) <= first


def test_the_caller_keeps_its_own_card_between_results() -> None:
    model = load("own", 0.3, device=SECOND)
    residency_of(model).wave = 2
    results = Editor("demo", model).edit_many(ask(number) for number in range(4))
    for _ in results:
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("share", SHARES)
def test_an_editor_on_each_at_once(share: float | None) -> None:
    expected = wanted("own")
    models = [load("own", share, device=device) for device in (torch.device("cuda", 0), SECOND)]
    start = threading.Barrier(len(models))

    def work(number: int) -> list[list[list[bytes]]]:
        start.wait()
        return [*(draw(models[number]) for _ in range(3)), *(draw_in_waves(models[number], 3) for _ in range(3))]

    with ThreadPoolExecutor(len(models)) as threads:
        for found in threads.map(work, range(len(models))):
            assert found == [expected] * 6


def test_opened_by_its_name() -> None:
    request = EditRequest(images=(PICTURES[0],), prompt="make the shirt navy blue", seed=3)
    first, second = (Editor.open("demo", device=name) for name in ("cuda:0", "cuda:1"))
    for _ in range(3):
        assert pictures_of(second.edit(request)) == pictures_of(first.edit(request))
