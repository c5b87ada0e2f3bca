"""Our transformer against diffusers', with the same weights."""

import pytest
import torch
from conftest import HIDDEN, make_transformer
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from millicent.model.config import MMDiTConfig
from millicent.model.mmdit import MMDiT

# In FP64 the two must agree up to the parts that both keep in FP32 whatever the weights are: RoPE and the timestep's
# sinusoid. Velocities go up to 5.
FP64_TOLERANCE = {"atol": 5e-6, "rtol": 0.0}

SHAPES = {
    "one square reference": [(4, 4), (4, 4)],
    "one landscape reference": [(5, 4), (3, 6)],
    "two references": [(4, 6), (5, 5), (3, 7)],
    "three references": [(6, 4), (2, 2), (9, 3), (4, 5)],
}


def load_pair(zero_cond_t: bool, dtype: torch.dtype) -> tuple[QwenImageTransformer2DModel, MMDiT]:
    reference = make_transformer(zero_cond_t).to(dtype)
    with torch.device("meta"):
        ours = MMDiT(MMDiTConfig.from_dict(reference.config))
    ours.load_state_dict(reference.state_dict(), assign=True)
    return reference, ours


PAIRS = {zero_cond_t: load_pair(zero_cond_t, torch.float64) for zero_cond_t in (False, True)}


def make_inputs(shapes: list[tuple[int, int]], batch: int, txt_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    img = torch.randn(batch, sum(h * w for h, w in shapes), 64, generator=generator)
    txt = 2 * torch.randn(batch, txt_tokens, HIDDEN, generator=generator)
    return img.double(), txt.double(), torch.linspace(0.9, 0.25, batch).double()


def run_reference(model: QwenImageTransformer2DModel, img: Tensor, txt: Tensor, t: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    with torch.inference_mode():
        (velocity,) = model(
            hidden_states=img,
            encoder_hidden_states=txt,
            timestep=t,
            img_shapes=[[(1, h, w) for h, w in shapes]] * img.shape[0],
            return_dict=False,
        )
    return velocity[:, : shapes[0][0] * shapes[0][1]]


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_velocity_equals_diffusers(shapes: list[tuple[int, int]], zero_cond_t: bool) -> None:
    reference, ours = PAIRS[zero_cond_t]
    img, txt, t = make_inputs(shapes, batch=2, txt_tokens=9)
    with torch.inference_mode():
        velocity = ours(img, txt, t, shapes)
    assert velocity.shape == (2, shapes[0][0] * shapes[0][1], 64)
    assert velocity.std() > 0.5
    torch.testing.assert_close(velocity, run_reference(reference, img, txt, t, shapes), **FP64_TOLERANCE)


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
def test_each_row_of_a_padded_batch_is_what_diffusers_gives_alone(zero_cond_t: bool) -> None:
    reference, ours = PAIRS[zero_cond_t]
    shapes, lengths = [(4, 3), (5, 2)], (3, 11, 7)
    img, txt, t = make_inputs(shapes, batch=3, txt_tokens=max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    # what stands in the padding must not matter, however large
    padded = torch.where(mask[..., None], txt, 1e4 * txt)
    with torch.inference_mode():
        velocity = ours(img, padded, t, shapes, mask)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = run_reference(reference, img[one], txt[one, :length], t[one], shapes)
        torch.testing.assert_close(velocity[one], alone, **FP64_TOLERANCE)


def test_a_full_mask_changes_nothing() -> None:
    img, txt, t = make_inputs([(4, 4), (4, 4)], batch=1, txt_tokens=5)
    ours = PAIRS[True][1]
    with torch.inference_mode():
        masked = ours(img, txt, t, [(4, 4), (4, 4)], torch.ones(1, 5, dtype=torch.bool))
        torch.testing.assert_close(masked, ours(img, txt, t, [(4, 4), (4, 4)]), **FP64_TOLERANCE)


def test_zero_cond_t_changes_the_picture() -> None:
    shapes = [(4, 4), (4, 4)]
    img, txt, t = make_inputs(shapes, batch=1, txt_tokens=5)
    plain, zeroed = (run_reference(PAIRS[z][0], img, txt, t, shapes) for z in (False, True))
    assert (plain - zeroed).abs().max() > 0.1


def test_parameter_names_and_shapes_are_diffusers() -> None:
    reference, ours = PAIRS[True]
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_fp32_is_fp64_up_to_rounding(shapes: list[tuple[int, int]]) -> None:
    img, txt, t = make_inputs(shapes, batch=2, txt_tokens=9)
    reference, ours = load_pair(True, torch.float32)
    expected = run_reference(PAIRS[True][0], img, txt, t, shapes)
    with torch.inference_mode():
        velocity = ours(img.float(), txt.float(), t.float(), shapes)
    diffusers = run_reference(reference, img.float(), txt.float(), t.float(), shapes)
    error, diffusers_error = ((v - expected).norm() / expected.norm() for v in (velocity, diffusers))
    assert error < 3e-6
    assert diffusers_error < 3e-6  # the reference itself: a bound that it would not hold would say nothing


@pytest.mark.parametrize("tokens", [1, 7])
def test_bf16_stays_near_diffusers_bf16(tokens: int) -> None:
    shapes = [(4, 4), (3, 5)]
    img, txt, t = (x.bfloat16() for x in make_inputs(shapes, batch=1, txt_tokens=tokens))
    reference, ours = load_pair(True, torch.bfloat16)
    with torch.inference_mode():
        velocity = ours(img, txt, t, shapes)
    expected = run_reference(reference, img, txt, t, shapes)
    # 8 bits of mantissa through two blocks: errors of a few hundredths of the values' size
    assert (velocity - expected).norm() / expected.norm() < 0.02
