"""The benchmark at its tiny size: the two sides share weights and agree, and no speed is reported on a wrong result."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.peers import STAGES, Job, System
from benchmarks.true_size import TINY, make_card, make_pipeline, to_millicent
from millicent.engine.loading import Model
from millicent.errors import InputError

CPU = torch.device("cpu")
# FP32 on either side, the sums in another order: parts in 1e6 an operation, over two blocks
FP32_ERROR = 1e-4


@pytest.fixture(scope="module")
def pipeline() -> diffusers.QwenImageEditPlusPipeline:
    return make_pipeline(TINY, CPU, torch.float32)


@pytest.fixture(scope="module")
def job(pipeline: diffusers.QwenImageEditPlusPipeline) -> Job:
    return peers.make_job(pipeline, TINY, steps=2)


@pytest.fixture(scope="module")
def model(pipeline: diffusers.QwenImageEditPlusPipeline) -> Model:
    return to_millicent(pipeline, make_card(TINY))


def system_with(velocity: Tensor, closed: list[str]) -> System:
    return System(
        "mine", "bf16", lambda: velocity, lambda: Image.new("RGB", (8, 8)), lambda: {"text": 1.0}, lambda: closed.append("mine")
    )


@torch.no_grad()
def test_velocity_agrees_with_diffusers(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job, model: Model) -> None:
    wanted = peers.make_eager(pipeline, job).step()
    found = model.mmdit(job.img, job.txt, job.timestep, list(job.img_shapes))
    assert wanted.shape == (1, job.target_tokens, 64)
    assert 0.1 < wanted.std() < 10  # of order 1, as a velocity is
    assert peers.relative_error(found, wanted) < FP32_ERROR


@torch.no_grad()
def test_the_other_parts_agree_with_diffusers(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job, model: Model) -> None:
    small = pipeline.image_processor.resize(job.picture, TINY.encoder_px, TINY.encoder_px)
    txt, mask = model.text_encoder.encode([job.prompt], [[small]])
    assert mask is None
    assert txt.shape[1] == TINY.text_tokens
    assert peers.relative_error(txt, job.txt) < FP32_ERROR
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = pipeline.vae.decode(latents[:, :, None]).sample[:, :, 0]
    assert peers.relative_error(model.vae.reconstruct(latents).clamp(-1, 1), wanted) < FP32_ERROR


def test_weights_are_shared(pipeline: diffusers.QwenImageEditPlusPipeline, model: Model) -> None:
    for our, their in ((model.mmdit, pipeline.transformer), (model.text_encoder.network, pipeline.text_encoder.model)):
        ours, theirs = dict(our.named_parameters()), dict(their.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in theirs)
        # speeding ours up must not change theirs
        assert not set(our.modules()) & set(their.modules())


def test_activations_have_the_real_outliers(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job) -> None:
    seen: list[Tensor] = []
    block = pipeline.transformer.transformer_blocks[-1]
    hooks = [
        block.img_mlp.net[2].register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        block.register_forward_hook(lambda _, args, output: seen.append(output[1])),
    ]
    peers.make_eager(pipeline, job).step()
    for hook in hooks:
        hook.remove()
    hidden, residual = (tensor.abs().amax((0, 1)) for tensor in seen)  # by channel
    assert hidden.max() > 15 * hidden.median()
    assert 1e5 < residual.max() < 1e7
    assert residual.max() > 5 * residual.median()


def test_same_seed_same_weights() -> None:
    first, second = (make_pipeline(TINY, CPU).transformer.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}


def test_stages_cover_the_edit(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(peers, "_synchronized", lambda device: float(next(ticks)))
    system = peers.make_eager(pipeline, job)
    # a clock that goes on by one at each look: begin, then begin and end of the four methods, and nothing between
    assert system.stages() == dict.fromkeys(STAGES, 1000.0)
    assert "encode_prompt" not in vars(pipeline)
    assert system.edit().size == (TINY.picture_px, TINY.picture_px)


@pytest.mark.parametrize("factor", [1.05, 0.0, float("nan")])
def test_wrong_velocity_reports_no_speed(factor: float) -> None:
    reference = torch.ones(1, 4, 64)
    closed: list[str] = []
    figures = peers.measure(lambda: system_with(factor * reference, closed), reference, CPU, images=1)
    assert "refused" in figures
    assert not any(name.endswith("_ms") for name in figures)
    assert closed == ["mine"]


def test_right_velocity_reports_speeds_and_ratios() -> None:
    reference = torch.ones(1, 4, 64)
    closed: list[str] = []
    figures = peers.measure(lambda: system_with(1.01 * reference, closed), reference, CPU, images=1)
    assert figures["velocity_error"] == pytest.approx(0.01, abs=1e-5)
    rows = peers.with_ratios(
        {
            "diffusers-a": {**figures, "step_ms": 300.0, "edit_ms": 1200.0},
            "diffusers-b": {**figures, "step_ms": 240.0, "edit_ms": 1500.0},
            "diffusers-c": {"failed": "out of memory"},
            "mine": {**figures, "step_ms": 160.0, "edit_ms": 800.0},
        }
    )
    assert rows["mine"]["best_peer_step_over_this"] == 1.5
    assert rows["mine"]["best_peer_edit_over_this"] == 1.5
    assert rows["diffusers-c"] == {"failed": "out of memory"}
    peers.show(rows)


def test_a_broken_system_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> System:
        raise torch.OutOfMemoryError("no room")

    reference = torch.ones(1, 4, 64)
    rows = peers.measure_all({"a": broken, "b": lambda: system_with(reference, [])}, reference, CPU, images=1)
    assert rows["a"] == {"failed": "OutOfMemoryError: no room"}
    assert rows["b"]["velocity_error"] == 0
    assert "no room" in capsys.readouterr().err


def test_choosing(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job) -> None:
    openers = peers.make_openers(pipeline, job)
    assert list(peers.choose(openers, "diffusers-bf16")) == ["diffusers-bf16"]
    assert peers.choose(openers, None) == openers
    with pytest.raises(InputError, match="no system nobody"):
        peers.choose(openers, "nobody")


@pytest.fixture
def compiled_block() -> Iterator[nn.Module]:
    transformer = make_pipeline(dataclasses.replace(TINY, layers=1), CPU).transformer
    transformer.compile_repeated_blocks(fullgraph=True)
    yield transformer
    torch._dynamo.reset()


def test_compiling_is_undone(compiled_block: nn.Module) -> None:
    block = compiled_block.get_submodule("transformer_blocks.0")
    assert block._compiled_call_impl is not None
    peers.undo_compile(compiled_block)
    assert block._compiled_call_impl is None
    assert "_compiled_call_impl" not in block.state_dict()


def test_what_torchao_quantizes(pipeline: diffusers.QwenImageEditPlusPipeline) -> None:
    chosen = {name for name, module in pipeline.transformer.transformer_blocks.named_modules() if peers.is_quantized(module, name)}
    attention = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    names = [f"attn.{name}" for name in attention] + [f"{s}_mlp.net.{n}" for s in ("img", "txt") for n in ("0.proj", "2")]
    assert chosen == {f"{block}.{name}" for block in range(TINY.layers) for name in names}
