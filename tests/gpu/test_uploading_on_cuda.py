"""Weights by way of page-locked buffers to a card, from a mapped file."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from millicent.engine.uploading import BUFFER_BYTES, BUFFERS, uploading
from millicent.errors import CheckpointError

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# more than all buffers hold, and no multiple of one
COUNT_BYTES = (2 * BUFFERS + 1) * BUFFER_BYTES + 48


def read_mapped(path: Path) -> Tensor:
    """Even bytes, none of which is FP8's NaN."""
    path.write_bytes((torch.randint(0, 128, (COUNT_BYTES,), dtype=torch.uint8) * 2).numpy().data)
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


@pytest.mark.parametrize("nan", [0x7F, 0xFF])
@pytest.mark.parametrize("place", [0, BUFFER_BYTES + 17, COUNT_BYTES - 1])
def test_a_code_that_is_no_number_is_refused_at_the_end(tmp_path: Path, nan: int, place: int) -> None:
    raw = read_mapped(tmp_path / "weights")
    raw[place] = nan

    def upload_all() -> None:
        with uploading(CUDA) as upload:
            for values in (torch.zeros(4096, dtype=torch.uint8), raw):
                upload(values.view(torch.float8_e4m3fn), CUDA)

    with pytest.raises(CheckpointError, match="no numbers"):
        upload_all()
