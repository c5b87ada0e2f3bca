"""Weights by way of page-locked buffers to a card, from a mapped file."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from millicent.engine.uploading import BUFFER_BYTES, BUFFERS, uploading

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# more than all buffers hold, and no multiple of one
COUNT_BYTES = (2 * BUFFERS + 1) * BUFFER_BYTES + 48


def read_mapped(path: Path) -> Tensor:
    path.write_bytes(torch.randint(0, 256, (COUNT_BYTES,), dtype=torch.uint8).numpy().data)
    with path.open("rb") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int8])
def test_the_bits_are_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = read_mapped(tmp_path / "weights")
    with uploading(CUDA) as upload:
        # work between copies, as of weights that are quantized on the card
        found = [upload(raw.view(dtype), CUDA) for _ in range(2)]
        doubled = found[1].view(torch.uint8).clone()
        columns = upload(raw[: 4096 * 4096].view(4096, 4096).t(), CUDA)
    assert found[0].dtype == dtype
    for each in (found[0].view(torch.uint8), doubled):
        assert torch.equal(each.cpu(), raw)
    assert torch.equal(columns.cpu(), raw[: 4096 * 4096].view(4096, 4096).t())


def test_a_failure_on_the_way_leaves_the_card_usable(tmp_path: Path) -> None:
    raw = read_mapped(tmp_path / "weights")

    def fail() -> None:
        with uploading(CUDA) as upload:
            upload(raw, CUDA)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with uploading(CUDA) as upload:
        assert torch.equal(upload(raw, CUDA).cpu(), raw)
