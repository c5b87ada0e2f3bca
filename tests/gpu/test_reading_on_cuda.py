"""The reader on a card: FP8 and recorded passes against the plain ones, and a host that never waits."""

from collections.abc import Iterator

import pytest
import torch
from conftest import draw_picture, make_text_encoder, make_tokenizer
from torch import Tensor

pytest.importorskip("triton")

from millicent.engine.capture import GraphRecorder
from millicent.engine.fast_encoder import quantize_encoder
from millicent.engine.planner import TENSOR_CORES
from millicent.engine.reading import TOKENS_MULTIPLE, Reader
from millicent.formats.fp8 import FP8Linear
from millicent.model.picture_processor import PictureProcessor
from millicent.model.text_encoder import TextEncoder
from millicent.model.tokenizer import PromptTokenizer

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
PLENTY_BYTES = 1 << 30
LANDSCAPE, PORTRAIT = draw_picture(56, 84), draw_picture(112, 56, seed=1)
PICTURES = [PORTRAIT, LANDSCAPE]
PROMPTS = ("navy", "make the shirt navy blue", "", "a wooden table, in front of a red brick wall, with a long shadow", "navy")
FORMATS = ["plain", "bf16", "fp8"]
# e4m3's mean error of 2^-5.4 a side of a product, through a dozen products, whose squares add up; BF16 rounds by up to 2^-9,
# and about 60 roundings lie one behind another
LARGEST_ERROR = {"fp8": 2**-5.4 * (2 * 12) ** 0.5, "bf16": 2**-9 * 60**0.5, "plain": 2**-9 * 60**0.5}


def make_encoder(name: str) -> TextEncoder:
    tokenizer = make_tokenizer()
    network = make_text_encoder(tokenizer).model.requires_grad_(False).eval()
    if name != "truth":
        network = network.to(CUDA, torch.bfloat16)
    if name in ("bf16", "fp8"):
        quantize_encoder(network, CUDA, name)
    pictures = PictureProcessor(least_area_px=28 * 28)
    words = PromptTokenizer(tokenizer.backend_tokenizer, tokenizer.pad_token_id)
    return TextEncoder(network, words, pictures, template="edit-plus", max_prompt_tokens=64)


@pytest.fixture(scope="module", params=FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "fp8" and torch.cuda.get_device_capability() not in TENSOR_CORES["fp8"]:
        pytest.skip("no FP8 on this card")
    return str(request.param)


@pytest.fixture(scope="module")
def encoder(name: str) -> TextEncoder:
    return make_encoder(name)


@pytest.fixture
def debug_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def recorded(reader: Reader) -> int:
    assert reader.replays is not None
    return len(reader.replays)


def test_what_is_read_is_near_transformers_in_fp32(name: str, encoder: TextEncoder) -> None:
    reader = Reader(encoder, 0)
    truth = make_encoder("truth")
    for prompt in PROMPTS:
        expected, _ = truth.encode([prompt], [PICTURES])
        found = reader.read(prompt, PICTURES).float().cpu()
        assert ((found - expected).norm() / expected.norm()).item() < LARGEST_ERROR[name]
    assert bool([module for module in encoder.network.modules() if isinstance(module, FP8Linear)]) == (name == "fp8")


@pytest.mark.parametrize("budget_bytes", [0, PLENTY_BYTES])
def test_neither_graphs_nor_caches_show_in_a_single_bit(encoder: TextEncoder, budget_bytes: int) -> None:
    plain = Reader(encoder, 0, uses_graphs=False)
    reader = Reader(encoder, budget_bytes)
    for images in ([LANDSCAPE], PICTURES, [LANDSCAPE]):
        for prompt in PROMPTS:
            assert torch.equal(reader.read(prompt, images), plain.read(prompt, images))
    assert plain.replays is None
    assert recorded(reader)


def test_other_pictures_of_a_shape_are_read_by_the_same_graphs(encoder: TextEncoder) -> None:
    plain, reader = Reader(encoder, 0, uses_graphs=False), Reader(encoder, 0)
    for seed in range(4):
        images = [draw_picture(112, 56, seed=seed)]
        assert torch.equal(reader.read("navy", images), plain.read("navy", images))
    assert recorded(reader) == 3


def test_what_was_read_stays_as_it_was(encoder: TextEncoder) -> None:
    reader = Reader(encoder, PLENTY_BYTES)
    read: list[tuple[Tensor, Tensor]] = []
    for seed in range(3):
        for prompt in PROMPTS[:3]:
            found = reader.read(prompt, [draw_picture(112, 56, seed=seed)])
            read.append((found, found.clone()))
    assert all(torch.equal(found, copied) for found, copied in read)


def test_many_shapes_keep_few_graphs(encoder: TextEncoder) -> None:
    plain, reader = Reader(encoder, 0, uses_graphs=False), Reader(encoder, 0)
    shapes = [(28 * rows, 28 * columns) for rows in (2, 3, 4) for columns in (2, 3, 5)]
    for _ in range(3):
        for height, width in shapes:
            images = [draw_picture(height, width)]
            assert torch.equal(reader.read("navy", images), plain.read("navy", images))
    assert recorded(reader) <= 12


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_never_waits_when_all_is_warm(encoder: TextEncoder, debug_mode: None) -> None:
    reader = Reader(encoder, PLENTY_BYTES)
    seeds = iter(range(100))

    def read(prompt: str) -> None:
        reader.read(prompt, [draw_picture(112, 56, seed=next(seeds))])

    for _ in range(3):
        read("navy")
    torch.cuda.set_sync_debug_mode("error")
    read("navy")
    read("blue")


def test_graphs_recorded_in_inference_mode_serve_outside_of_it(encoder: TextEncoder) -> None:
    reader = Reader(encoder, 0)
    with torch.inference_mode():
        inside = [reader.read("navy", [LANDSCAPE]) for _ in range(3)]
    assert torch.equal(reader.read("navy", [LANDSCAPE]), inside[0])
    with torch.inference_mode():
        assert torch.equal(reader.read("navy", [LANDSCAPE]), inside[2])


def test_the_embedding_table_may_stay_on_the_host(encoder: TextEncoder) -> None:
    expected = Reader(encoder, 0).read("navy", PICTURES)
    table = encoder.network.language_model.embed_tokens
    table.to("cpu")
    try:
        reader = Reader(encoder, 0)
        for _ in range(3):
            assert torch.equal(reader.read("navy", PICTURES), expected)
    finally:
        table.to(CUDA)


def test_a_recording_without_memory_harms_nothing() -> None:
    recorder, calls = GraphRecorder(CUDA), []

    def second_fails(x: Tensor) -> tuple[Tensor]:
        calls.append(x)
        y = x * 2
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        return (y,)

    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):  # its own, or that of ending the recording
        recorder.record(second_fails, (torch.ones(8, device=CUDA),))
    assert torch.cuda.current_stream() == stream
    x = torch.arange(8.0, device=CUDA)
    assert torch.equal(recorder.record(lambda x: (x * 3,), (torch.ones(8, device=CUDA),))(x)[0], x * 3)


def test_nothing_recorded_is_used_after_clear(encoder: TextEncoder) -> None:
    reader = Reader(encoder, PLENTY_BYTES)
    for prompt in ("navy", "blue", "make it"):
        reader.read(prompt, [LANDSCAPE])
    assert recorded(reader)
    reader.clear()
    assert recorded(reader) == 0
    assert torch.equal(reader.read("navy", [LANDSCAPE]), Reader(encoder, 0).read("navy", [LANDSCAPE]))


def test_prompts_of_many_lengths_share_a_graph(encoder: TextEncoder) -> None:
    reader = Reader(encoder, PLENTY_BYTES)
    lengths = set()
    for words in range(1, 5):
        text = "navy " * words
        reader.read(text, [LANDSCAPE])
        lengths.add(len(encoder.tokenize(text)))
    assert len(lengths) == 4
    assert max(lengths) + 16 < TOKENS_MULTIPLE
    assert recorded(reader) == 1  # of prompts: the picture and the opening came once
