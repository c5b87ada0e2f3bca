"""Our forward pass against transformers' own, on the same modules."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from conftest import draw_picture, draw_weights, make_text_encoder, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from millicent import demo
from millicent.checkpoint.architecture import text_encoder_name
from millicent.checkpoint.folder import read_json
from millicent.checkpoint.load import fill
from millicent.errors import CheckpointError
from millicent.model.prompt import edit_plus_prompt
from millicent.model.qwen_vl import (
    KeyValues,
    check_config,
    encode_vision,
    plan_vision,
    put_pictures,
    rotary_text,
    run_language,
)
from millicent.model.text_encoder import build_network, build_plain_network, lay_out_tokens

# FP32 with sums in another order, through a handful of layers: some units in the last place of the largest value
RELATIVE = 1e-5

# in tokens: 2x3, 4x2 and 5x3, so that windows of 2 and of 4 tokens a side are cut off below, at the right, or both
PICTURES = [draw_picture(56, 84), draw_picture(112, 56, seed=1), draw_picture(140, 84, seed=2)]


def assert_close(found: Tensor, expected: Tensor, relative: float = RELATIVE) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=relative * expected.abs().max().item())


@dataclasses.dataclass
class Tiny:
    network: Any
    tokenizer: Any
    image_processor: Any

    def prepare(self, prompt: str, images: Sequence[Image.Image]) -> tuple[list[int], Tensor, Any]:
        processed = self.image_processor(images=list(images), return_tensors="pt")
        grids = [(height // 2, width // 2) for _, height, width in processed["image_grid_thw"].tolist()]
        ids = self.tokenizer(edit_plus_prompt(prompt, len(images)))["input_ids"]
        return *lay_out_tokens(ids, grids, self.network.config.image_token_id), processed

    def reference(self, ids: list[int], positions: Tensor, processed: Any) -> Tensor:
        inputs = {"pixel_values": processed["pixel_values"], "image_grid_thw": processed["image_grid_thw"]}
        network = self.network
        return network(input_ids=torch.tensor([ids]), position_ids=positions[:, None], **inputs).last_hidden_state

    def embeds(self, ids: list[int], processed: Any) -> Tensor:
        plan = plan_vision(processed["image_grid_thw"].tolist(), self.network.config.vision_config)
        features, _ = encode_vision(self.network.visual, processed["pixel_values"], plan)
        tokens = torch.tensor(ids)
        places = (tokens == self.network.config.image_token_id).nonzero().flatten()
        return put_pictures(self.network.language_model.embed_tokens(tokens), features, places)

    def run(self, embeds: Tensor, positions: Tensor, past: KeyValues | None = None) -> tuple[Tensor, KeyValues]:
        return run_language(self.network.language_model, embeds, *rotary_text(positions, self.network.config.text_config), past)


def load_random() -> Tiny:
    tokenizer = make_tokenizer()
    return Tiny(make_text_encoder(tokenizer).model, tokenizer, Qwen2VLImageProcessorPil(min_pixels=28 * 28))


def load_demo() -> Tiny:
    folder = demo.folder()
    network = build_plain_network(read_json(folder / "text_encoder" / "config.json"))
    state = load_file(folder / "text_encoder" / "model.safetensors")
    fill(network, {text_encoder_name(key): tensor for key, tensor in state.items() if not key.startswith("lm_head.")}, "demo")
    images = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    return Tiny(network.float(), Qwen2Tokenizer.from_pretrained(folder / "tokenizer"), images)


@pytest.fixture(scope="module", params=[load_random, load_demo], ids=["random", "demo"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    made: Tiny = request.param()
    made.network.requires_grad_(False)
    return made


@pytest.mark.parametrize("images", [PICTURES[:1], PICTURES[:2], PICTURES[::-1]], ids=["one", "two", "three"])
def test_hidden_states_equal_transformers(tiny: Tiny, images: list[Image.Image]) -> None:
    ids, positions, processed = tiny.prepare("make the shirt navy blue", images)
    hidden, past = tiny.run(tiny.embeds(ids, processed), positions)
    assert past.tokens == len(ids)
    assert_close(hidden, tiny.reference(ids, positions, processed))


def test_a_prompt_goes_on_where_anothers_pictures_ended(tiny: Tiny) -> None:
    first, first_positions, processed = tiny.prepare("a table", PICTURES[:2])
    ids, positions, _ = tiny.prepare("make the shirt navy blue on a table", PICTURES[:2])
    shared = max(place for place, token in enumerate(ids) if token == tiny.network.config.vision_end_token_id) + 1
    assert ids[:shared] == first[:shared]
    assert ids[shared] != first[shared]
    _, past = tiny.run(tiny.embeds(first, processed), first_positions)
    embeds = tiny.embeds(ids, processed)
    hidden, whole = tiny.run(embeds[:, shared:], positions[:, shared:], KeyValues.unpack(past.pack()[..., :shared, :]))
    expected, expected_whole = tiny.run(embeds, positions)
    assert_close(hidden, expected[:, shared:])
    assert whole.tokens == len(ids)
    for found, wanted in zip((*whole.keys, *whole.values), (*expected_whole.keys, *expected_whole.values), strict=True):
        assert_close(found, wanted)


def test_what_is_packed_is_all_that_is_kept_alive(tiny: Tiny) -> None:
    ids, positions, processed = tiny.prepare("navy", PICTURES[:1])
    _, past = tiny.run(tiny.embeds(ids, processed), positions)
    packed = past.pack()
    assert packed.untyped_storage().nbytes() == packed.numel() * packed.element_size()
    unpacked = KeyValues.unpack(packed)
    for found, wanted in zip((*unpacked.keys, *unpacked.values), (*past.keys, *past.values), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("all_windowed", [False, True])
@pytest.mark.parametrize("window_px", [28, 56, 112, 140])
@pytest.mark.parametrize("grids", [[(1, 4, 6)], [(1, 10, 14), (1, 8, 4)], [(3, 6, 10), (1, 6, 10)], [(1, 2, 2)]])
def test_vision_equals_transformers(grids: list[tuple[int, int, int]], window_px: int, all_windowed: bool) -> None:
    config = transformers.models.qwen2_5_vl.Qwen2_5_VLVisionConfig(
        depth=3,
        hidden_size=48,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=40,
        window_size=window_px,
        fullatt_block_indexes=[] if all_windowed else [1],
    )
    network = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config)
    visual = draw_weights(network, seed=4, gain=1.5).requires_grad_(False)
    patches = sum(frames * height * width for frames, height, width in grids)
    pixels = torch.randn(patches, 1176, generator=torch.Generator().manual_seed(5))
    grid_thw = torch.tensor(grids)
    expected = visual(pixels, grid_thw=grid_thw)
    tokens, hidden = encode_vision(visual, pixels, plan_vision(grids, config))
    assert_close(tokens, expected.pooler_output)
    # theirs come window by window
    window_index, _ = transformers_window_index(visual, grid_thw)
    assert_close(hidden.unflatten(0, (-1, 4))[window_index].flatten(0, 1), expected.last_hidden_state)


def transformers_window_index(visual: Any, grid_thw: Tensor) -> tuple[Tensor, Any]:
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(grid_thw, 2, visual.config.window_size, 14)


def test_windows_matter_in_these_tests(tiny: Tiny) -> None:
    processed = tiny.image_processor(images=[draw_picture(168, 168)], return_tensors="pt")
    [grid] = processed["image_grid_thw"].tolist()
    plans = []
    for window_px in (56, 112, 1680):
        config = copy.copy(tiny.network.config.vision_config)
        config.window_size = window_px
        plans.append(plan_vision([grid], config))
    small, large, whole = (encode_vision(tiny.network.visual, processed["pixel_values"], plan)[0] for plan in plans)
    assert (small - large).abs().max() > 1e-2
    assert (large - whole).abs().max() > 1e-2


@settings(max_examples=30)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), frames=st.integers(1, 2), window=st.integers(1, 6))
def test_a_plan_holds_every_token_once_in_few_batches(rows: int, columns: int, frames: int, window: int) -> None:
    config = transformers.models.qwen2_5_vl.Qwen2_5_VLVisionConfig(window_size=28 * window)
    plan = plan_vision([(frames, 2 * rows, 2 * columns)], config)
    count = frames * rows * columns
    assert plan.order.sort().values.tolist() == list(range(count))
    assert plan.order[plan.restore].tolist() == list(range(count))
    assert sum(windows * length for windows, length in plan.windows) == 4 * count == len(plan.cos)
    assert plan.frames == ((frames, 4 * rows * columns),)
    # whole ones, those cut off below, at the right, and at the corner
    assert len(plan.windows) <= 4 * frames


def test_no_value_is_asked_for_on_the_way() -> None:
    # tensors on the meta device have no values: what a GPU's host would wait for raises here
    config = read_json(demo.folder() / "text_encoder" / "config.json")
    network: Any = build_network(config)
    meta = torch.device("meta")
    plan = plan_vision([(1, 10, 14), (1, 8, 4)], network.config.vision_config).to(meta)
    tokens, hidden = encode_vision(network.visual, torch.empty(172, 1176, device=meta), plan)
    assert (tokens.shape, hidden.shape) == ((43, 128), (172, 96))
    ids, places = (torch.zeros(count, dtype=torch.long, device=meta) for count in (60, 43))
    embeds = put_pictures(network.language_model.embed_tokens(ids), tokens, places)
    positions = torch.zeros(3, 60, dtype=torch.long, device=meta)
    past = None
    for total in (60, 120):
        states, past = run_language(network.language_model, embeds, *rotary_text(positions, network.config.text_config), past)
        assert (states.shape, past.tokens) == ((1, 60, 128), total)


class Doubled(nn.Module):
    """Not a Linear, and without a weight of that name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / 2 + self.inner(x) / 2


def test_replaced_linears_are_called() -> None:
    tiny = load_random()
    tiny.network.requires_grad_(False)
    ids, positions, processed = tiny.prepare("navy", PICTURES[:1])
    expected = tiny.reference(ids, positions, processed)
    linears = [(name, module) for name, module in tiny.network.named_modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 2 * 7 + 2 * 5 + 2
    for name, linear in linears:
        parent, _, leaf = name.rpartition(".")
        setattr(tiny.network.get_submodule(parent), leaf, Doubled(linear))
    hidden, _ = tiny.run(tiny.embeds(ids, processed), positions)
    assert_close(hidden, expected)


def test_bfloat16_is_no_further_from_the_truth_than_transformers() -> None:
    tiny = load_random()
    tiny.network.requires_grad_(False)
    tiny.network.bfloat16()
    rounded = copy.deepcopy(tiny)
    rounded.network.float()
    # transformers keeps its rotary buffers beside the weights, and a cast rounds them
    for network in (tiny.network, rounded.network):
        for rotary in (network.language_model.rotary_emb, network.visual.rotary_pos_emb):
            rotary.inv_freq = type(rotary)(rotary.config).inv_freq
    ids, positions, processed = tiny.prepare("make the shirt navy blue", PICTURES[:2])
    truth = rounded.reference(ids, positions, processed)
    theirs = (tiny.reference(ids, positions, processed).float() - truth).norm() / truth.norm()
    hidden, _ = tiny.run(tiny.embeds(ids, processed), positions)
    ours = (hidden.float() - truth).norm() / truth.norm()
    assert hidden.dtype == torch.bfloat16
    assert 1e-4 < ours < 1.1 * theirs  # the same number of roundings or fewer, which fall as they fall


@pytest.mark.parametrize("changes", [{"layer_types": ["full_attention", "sliding_attention"]}, {"rope_type": "yarn"}])
def test_what_is_not_computed_is_refused(changes: dict[str, Any]) -> None:
    config = load_random().network.config
    check_config(config)
    if "rope_type" in changes:
        config.text_config.rope_parameters = {**config.text_config.rope_parameters, **changes}
    else:
        config.text_config.layer_types = changes["layer_types"]
    with pytest.raises(CheckpointError, match=r"yarn|sliding_attention"):
        check_config(config)
