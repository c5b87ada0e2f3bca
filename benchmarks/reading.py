"""How long the text encoder takes, stage by stage, at true size with random weights. `python -m benchmarks.reading`.

vision: one new picture, from its levels on the device. opening: the system text and the picture's tokens. prompt: what comes
after them. read: all of it, from picture and prompt, with nothing kept from before; host: how long `read` keeps the host, with
nothing kept either. Each in ms, the median of several, from an idle device to an idle device. error: of the hidden states
against those of the network as it is, relative, in the mean square; random weights pass errors on, so it says whether a kernel
is right, not how good a number format is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.true_size import SIZES, Size, make_text_encoder
from millicent import demo
from millicent.engine.fast_encoder import quantize_encoder
from millicent.engine.planner import EncoderFormat
from millicent.engine.reading import Reader
from millicent.model.picture_processor import read_picture_processor
from millicent.model.text_encoder import TextEncoder
from millicent.model.tokenizer import read_tokenizer

PROMPT = "make the shirt navy blue, on a wooden table"
PLENTY_BYTES = 1 << 30
# FP8 through 28 layers of random weights is some hundredths off; what has nothing to do with the truth, 1.4
LARGEST_ERROR = 0.5


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the encoder. format: None for the network as it is."""

    name: str
    format: EncoderFormat | None
    vision: bool
    graphs: bool


WAYS = (
    Way("plain, eager", None, vision=False, graphs=False),
    Way("plain, graphs", None, vision=False, graphs=True),
    Way("bf16 joined, eager", "bf16", vision=True, graphs=False),
    Way("bf16 joined, graphs", "bf16", vision=True, graphs=True),
    Way("fp8, eager", "fp8", vision=True, graphs=False),
    Way("fp8, graphs", "fp8", vision=True, graphs=True),
    Way("fp8 but for vision, graphs", "fp8", vision=False, graphs=True),
)


def make_encoder(size: Size, device: torch.device) -> TextEncoder:
    network = make_text_encoder(size, device).model
    tokenizer, pictures = read_tokenizer(demo.folder() / "tokenizer"), read_picture_processor(demo.folder() / "processor")
    return TextEncoder(network, tokenizer, pictures, template="edit-plus", max_prompt_tokens=256)


def encoders(size: Size, device: torch.device) -> Iterator[tuple[Way, TextEncoder]]:
    """Each way with its encoder, which is made anew only where the network changes."""
    laid_out: tuple[EncoderFormat | None, bool] | None = None
    for way in WAYS:
        if (way.format, way.vision) != laid_out:
            encoder = None  # lets the one before go first
            encoder = make_encoder(size, device)
            if way.format is not None:
                quantize_encoder(encoder.network, device, way.format, vision=way.vision)
            laid_out = (way.format, way.vision)
        assert encoder is not None
        yield way, encoder


def median_ms(work: Callable[[], object], device: torch.device, repeats: int, *, waits: bool = True) -> float:
    """waits: counts until the device is idle, else until the host is free."""
    times = []
    for number in range(repeats + 3):
        _wait(device)
        began = time.perf_counter()
        work()
        if waits:
            _wait(device)
        if number >= 3:  # the first compiles, the second records, the third meets warm memory
            times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times), 3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure(way: Way, encoder: TextEncoder, image: Image.Image, repeats: int) -> tuple[dict[str, object], Tensor]:
    """The figures of one way, and its hidden states."""
    reader = Reader(encoder, PLENTY_BYTES, uses_graphs=way.graphs)
    forgetful = Reader(encoder, 0, uses_graphs=way.graphs)
    device = reader.device
    ids = encoder.tokenize(encoder.fill_template(PROMPT, 1))
    end = ids.index(encoder.image_token_id) + 2  # after the picture and its end
    levels = torch.from_numpy(np.array(encoder.size_picture(image))).to(device)
    hidden = forgetful.read(PROMPT, [image])
    opening = reader.open(ids[:end], [image], ["picture"])
    figures: dict[str, object] = {
        "vision_ms": median_ms(lambda: reader.see(levels), device, repeats),
        "opening_ms": median_ms(lambda: reader.open(ids[:end], [image], ["picture"]), device, repeats),
        "prompt_ms": median_ms(lambda: reader.go_on(ids[end:], opening), device, repeats),
        "read_ms": median_ms(lambda: forgetful.read(PROMPT, [image]), device, repeats),
        "host_ms": median_ms(lambda: forgetful.read(PROMPT, [image]), device, repeats, waits=False),
        "tokens": hidden.shape[1] + encoder.prefix_tokens,
        "weights_gb": round(sum(t.nbytes for t in (*encoder.network.parameters(), *encoder.network.buffers())) / 1e9, 2),
    }
    # the recorded passes have run by now: what they read is what counts
    again = forgetful.read(PROMPT, [image])
    if not torch.equal(again, hidden):
        raise SystemExit(f"{way.name}: a recorded reading differs from the first one.")
    return figures, hidden


def measure_plain_transformers(encoder: TextEncoder, image: Image.Image, repeats: int) -> float:
    device = next(encoder.network.parameters()).device
    with torch.inference_mode():
        return median_ms(lambda: encoder.encode([PROMPT], [[image]]), device, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    size, device = SIZES[args.size], torch.device(args.device)
    levels = np.random.default_rng(0).integers(0, 256, (size.encoder_px // 16, size.encoder_px // 16, 3), dtype=np.uint8)
    image = Image.fromarray(levels).resize((size.encoder_px, size.encoder_px), Image.Resampling.BICUBIC)
    truth: Tensor | None = None
    for way, encoder in encoders(size, device):
        row: dict[str, object] = {"benchmark": "reading", "way": way.name}
        if truth is None:
            row["transformers_ms"] = measure_plain_transformers(encoder, image, args.repeats)
        figures, hidden = measure(way, encoder, image, args.repeats)
        truth = hidden.float() if truth is None else truth
        error = float((hidden.float() - truth).norm() / truth.norm())
        if not error < LARGEST_ERROR:
            raise SystemExit(f"{way.name}: the hidden states are off by {error:.2f} of their size; its speed is not told.")
        print(json.dumps({**row, **figures, "error": round(error, 4), **vars(args), **describe_machine(device)}))
        del encoder


if __name__ == "__main__":
    main()
