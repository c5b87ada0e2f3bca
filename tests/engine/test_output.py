"""Levels as diffusers rounds them, and pictures written by threads."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from millicent.engine.output import Sent, Writer, to_uint8
from millicent.errors import OutputError
from millicent.images import open_image, read_metadata


def levels_by_numpy(pixels: torch.Tensor) -> np.ndarray:
    """As diffusers' VaeImageProcessor: halved and clamped in the pixels' dtype, scaled and rounded in FP32, to even."""
    halved = (pixels / 2 + 0.5).clamp(0, 1)
    return np.rint(halved.permute(1, 2, 0).float().numpy() * np.float32(255)).astype(np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_levels_are_rounded_as_diffusers_does(dtype: torch.dtype, layout: torch.memory_format) -> None:
    # every level, every boundary between two, and what lies outside
    steps = torch.cat([torch.arange(-6, 2 * 255 + 6) / 255 - 1, torch.randn(3000, generator=torch.Generator().manual_seed(0))])
    pixels = steps[: len(steps) // 18 * 18].view(1, 3, 6, -1).to(dtype).to(memory_format=layout)[0]
    levels = to_uint8(pixels)
    assert levels.dtype == torch.uint8
    assert levels.is_contiguous()
    np.testing.assert_array_equal(levels.numpy(), levels_by_numpy(pixels))
    [sent] = Sent(levels).wait()
    np.testing.assert_array_equal(sent.numpy(), levels_by_numpy(pixels))


def test_what_is_sent_arrives_in_any_thread() -> None:
    tensors = (torch.arange(6, dtype=torch.uint8).view(2, 3), torch.tensor(True))
    sent = Sent(*tensors)
    with Writer(threads=1) as writer:
        arrived = writer.submit(sent.wait)
    assert all(torch.equal(found, expected) for found, expected in zip(arrived.result(), tensors, strict=True))


def test_pictures_are_written_when_the_writer_is_left(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (40, 30), (shade, 0, 255 - shade)) for shade in range(8)]
    with Writer() as writer:
        for number, picture in enumerate(pictures):
            writer.save(picture, tmp_path / f"{number}.png", {"number": number})
    for number, picture in enumerate(pictures):
        assert open_image(tmp_path / f"{number}.png").tobytes() == picture.tobytes()
        assert read_metadata(tmp_path / f"{number}.png") == {"number": number}


def test_saving_does_not_wait(tmp_path: Path) -> None:
    gate = threading.Event()
    with Writer(threads=1) as writer:
        held = writer.submit(gate.wait)
        saved = writer.save(Image.new("RGB", (4, 4)), tmp_path / "a.jpg")
        assert not held.done()
        assert not (tmp_path / "a.jpg").exists()
        gate.set()
    assert saved.done()
    assert (tmp_path / "a.jpg").exists()


def test_the_first_error_is_raised_and_the_rest_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"), Writer() as writer:  # noqa: PT012
        writer.save(Image.new("RGB", (4, 4)), tmp_path / "nowhere" / "a.png")
        writer.save(Image.new("RGB", (4, 4)), tmp_path / "absent" / "b.png")
        writer.save(Image.new("RGB", (4, 4)), tmp_path / "c.png")
    assert (tmp_path / "c.png").exists()


def test_an_error_of_the_body_goes_first(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Writer() as writer:  # noqa: PT012
        writer.save(Image.new("RGB", (4, 4)), tmp_path / "nowhere" / "a.png")
        writer.save(Image.new("RGB", (4, 4)), tmp_path / "b.png")
        raise ZeroDivisionError
    assert (tmp_path / "b.png").exists()
