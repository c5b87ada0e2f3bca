"""How long an edit takes on a card: a roofline over the FLOP and bytes of each stage, calibrated by what was measured. Pure.

A product takes max(FLOP / (rate x share), bytes / (bandwidth x share)), attention its FLOP over its own share, and what stands
between products its bytes; a step is their sum over the share that a card holds under load, and never less than its power allows.
The shares are those of the measured card; other cards are taken to reach the same, but for the few that others published figures
of. What depends on the host, as cutting pictures into patches, is as measured too.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from millicent.facts import gpus
from millicent.facts.formats import ENGINE_FORMATS
from millicent.facts.gpus import Gpu, find_gpu
from millicent.facts.measured import Ceiling, Published, Run, read_measured
from millicent.model import sizes
from millicent.model.config import MMDiTConfig
from millicent.model.sizes import BF16_BYTES, Matrix, ModelSizes, StepFlop, Workload

Kind = Literal["measured", "calibrated", "modelled"]
# how many blocks have their eight linears in these formats
Layouts = Mapping[tuple[str, ...], int]

STAGES = ("prepare", "text", "VAE encode", "denoise", "VAE decode", "output")
# what the card does; the host's two stages go on beside it in a row of pictures (engine/stream.py)
CARD_STAGES = ("exchange", "text", "VAE encode", "denoise", "VAE decode")
# the measured workload; the defaults of Workload
MEASURED_WORK = Workload()
# bytes of a value that one kernel after the other reads and writes, where a format is not fused into its neighbors:
# a weight's to FP32 (1 + 4), scaled (8), to BF16 (6); rows to NVFP4 by separate operations, the codes as 64-bit numbers
_INT8_WEIGHT_BYTES = 19
_NVFP4_ROW_BYTES = 110
_LINK_GB_PER_S_OF_GENERATION = {3: 0.5, 4: 1.0, 5: 2.0, 6: 4.0}  # of PCIe 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds. error: relative, either way; None for what was measured."""

    seconds: float
    kind: Kind
    error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Of a card's dense rate (or bandwidth) that each kind of work reaches. sustained: of that, over a whole step under load.
    reuse: of attention's, where only target and text ask.

    tflop_per_joule: of a whole step at the power limit, one in BF16 counted as two in 8 bits; None where only the rates bound it.
    source: where they come from.
    """

    bf16: float
    fp8: float
    int8: float
    attention: float
    int8_attention: float
    reuse: float
    copy: float
    convolution: float
    sustained: float
    tflop_per_joule: float | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What decides a picture's time, apart from card and sizes. layouts: the blocks' formats. attention: "exact" or "int8".

    streamed_step_bytes: of weights, for each forward; streamed_text_bytes: in the whole reading; exchanged_bytes: for each picture,
    its share of a wave's.
    """

    layouts: Layouts
    text_encoder: str
    attention: str
    reuses: bool
    streamed_step_bytes: float = 0
    streamed_text_bytes: int = 0
    exchanged_bytes: float = 0


def predict(model: ModelSizes, work: Workload, gpu: Gpu, draw: Draw, link_gb_per_s: float) -> dict[str, float]:
    """Seconds by stage of one picture of a row, by the roofline alone. link_gb_per_s: between host and card."""
    shares = shares_of(gpu)
    host = _host_seconds()
    steps = [step_seconds(model.transformer, work, gpu, shares, draw, reuses=draw.reuses and number > 0) for number in (0, 1)]
    streamed_s = draw.streamed_step_bytes / (1e9 * link_gb_per_s)
    first, later = (max(seconds, streamed_s) for seconds in steps)
    text_s = work.forwards * _text_seconds(model, work, gpu, shares, draw.text_encoder)
    decode = sizes.vae_flop(model.vae, sizes.vae_decoder(model.vae), work.width * work.height)
    encode = work.references * sizes.vae_flop(model.vae, sizes.vae_encoder(model.vae), work.reference_px)
    convolved = 1e12 * rate_of(gpu, "bf16") * shares.convolution
    exchange_s = draw.exchanged_bytes / (1e9 * link_gb_per_s)
    return {
        **({"exchange": exchange_s} if exchange_s else {}),
        "prepare": host["prepare"] * work.references,
        "text": host["text"] + max(text_s, draw.streamed_text_bytes / (1e9 * link_gb_per_s)),
        "VAE encode": encode / convolved,
        "denoise": work.forwards * (first + (work.steps - 1) * later),
        "VAE decode": decode / convolved,
        "output": host["output"] * work.width * work.height / (MEASURED_WORK.width * MEASURED_WORK.height),
    }


def step_seconds(config: MMDiTConfig, work: Workload, gpu: Gpu, shares: Shares, draw: Draw, *, reuses: bool) -> float:
    """One forward of the transformer with all its weights on the card. reuses: a later step with the references' kept."""
    flop = sizes.step_flop(config, work, reuses=reuses)
    img = flop.tokens - work.text_tokens
    seconds = 0.0
    for formats, blocks in draw.layouts.items():
        matrices = sizes.block_matrices(config, 0)
        half = len(matrices) // 2
        for number, (matrix, number_format) in enumerate(zip(matrices, formats, strict=True)):
            rows = img if number < half else work.text_tokens
            seconds += blocks * product_seconds(gpu, shares, matrix, rows, number_format)
        seconds += blocks * _between_seconds(config, gpu, shares, flop.tokens, formats)
    # of the last block only the target's tokens are drawn from
    asked = 2.0 * config.num_layers * 12 * config.dim**2 * flop.tokens
    seconds *= flop.linear / asked
    seconds += flop.attention / (attention_rate(gpu, shares, draw.attention) * (shares.reuse if reuses else 1.0))
    if reuses:
        kept = 2 * work.reference_tokens * config.dim * config.num_layers * BF16_BYTES
        seconds += 2 * kept / _bandwidth(gpu, shares)  # read, and written where attention reads
    powered = 0.0
    if shares.tflop_per_joule is not None and gpu.power_w:
        powered = powered_tflop(flop, draw) / (shares.tflop_per_joule * gpu.power_w)
    return max(seconds / shares.sustained, powered)


def powered_tflop(flop: StepFlop, draw: Draw) -> float:
    """TFLOP of a step as its energy goes, one in BF16 counted as two in 8 bits: that explains both formats' steps on the H200."""
    weights = {"bf16": 2.0, "int8-weight": 2.0, "nvfp4": 0.5}
    linears = [weights.get(each, 1.0) for formats, blocks in draw.layouts.items() for each in formats * blocks]
    linear, attention = sum(linears) / len(linears), 1.0 if draw.attention == "int8" else 2.0
    return (flop.linear * linear + flop.attention * attention) / 1e12


def product_seconds(gpu: Gpu, shares: Shares, matrix: Matrix, rows: int, number_format: str) -> float:
    """One product of `rows` tokens with a weight, codes of both made elsewhere."""
    multiplied = "bf16" if number_format == "int8-weight" else number_format
    share = {"bf16": shares.bf16, "fp8": shares.fp8, "int8": shares.int8, "nvfp4": shares.fp8}[multiplied]
    compute = 2.0 * rows * matrix.values / (1e12 * rate_of(gpu, multiplied) * share)
    code = {"bf16": 2, "nvfp4": 0.5625}.get(multiplied, 1)
    moved = matrix.size_bytes(number_format) + rows * (code * matrix.columns + BF16_BYTES * matrix.rows)
    seconds = max(compute, moved / _bandwidth(gpu, shares))
    if number_format == "int8-weight":
        seconds += _INT8_WEIGHT_BYTES * matrix.values / _bandwidth(gpu, shares)
    if number_format == "nvfp4":
        seconds += rows * (_NVFP4_ROW_BYTES * matrix.columns + 24 * matrix.rows) / _bandwidth(gpu, shares)
    return seconds


def _between_seconds(config: MMDiTConfig, gpu: Gpu, shares: Shares, tokens: int, formats: tuple[str, ...]) -> float:
    """What stands between a block's products: two gates with norm and modulation, norm and rotation of q and k, GELU, codes."""
    code = 1 if formats[0] in ("fp8", "int8") else 2
    # each gate reads the stream and an update and writes the stream and codes; plain numbers need no codes of attention's result
    per_channel = 2 * (6 + code) + 8 + (3 if code == 1 else 0) + 8 + 4 * code
    return tokens * config.dim * per_channel / _bandwidth(gpu, shares)


def attention_rate(gpu: Gpu, shares: Shares, attention: str) -> float:
    """FLOP/s. 8-bit attention has its scores in INT8, and its sums in FP8, or in BF16 on a card that has no FP8."""
    if attention != "int8":
        return 1e12 * rate_of(gpu, "bf16") * shares.attention
    sums = gpu.fp8_tflops or rate_of(gpu, "bf16")
    return 1e12 * shares.int8_attention * 2 / (1 / rate_of(gpu, "int8") + 1 / sums)


def rate_of(gpu: Gpu, number_format: str) -> float:
    """TFLOP/s or TOP/s of a product in a format that the card runs."""
    rate = gpus.rate_of(gpu, ENGINE_FORMATS[number_format])
    assert rate is not None, f"{gpu.name} has no rate for {number_format}"
    return rate


def has_rates(gpu: Gpu, number_format: str, text_encoder: str, attention: str) -> bool:
    """Whether the table has the rates that a prediction needs; BF16's always, for the VAE."""
    wanted = ["bf16", number_format, text_encoder, *(["int8"] if attention == "int8" else [])]
    return all(gpus.rate_of(gpu, ENGINE_FORMATS[each]) is not None for each in wanted)


def link_gb_per_s(generation: int | None, lanes: int | None) -> float:
    """Between host and card: the measured PCIe 4.0 x16's, scaled. A link that is not known is taken for PCIe 3.0 x16."""
    measured = read_measured().find_published("host link", "RTX 4090").gb_per_s
    assert measured is not None
    factor = _LINK_GB_PER_S_OF_GENERATION.get(generation or 3, 0.5)
    return measured * factor * (lanes or 16) / 16


def _bandwidth(gpu: Gpu, shares: Shares) -> float:
    """Bytes a second."""
    return 1e9 * gpu.bandwidth_gb_per_s * shares.copy


def _text_seconds(model: ModelSizes, work: Workload, gpu: Gpu, shares: Shares, text_encoder: str) -> float:
    flop = sizes.encoder_flop(model.text_encoder, work)
    compute = flop / (1e12 * rate_of(gpu, text_encoder) * (shares.fp8 if text_encoder == "fp8" else shares.bf16))
    return max(compute, sizes.encoder_bytes(model.text_encoder, text_encoder) / _bandwidth(gpu, shares))


# what the shares come from


@cache
def shares_of(gpu: Gpu) -> Shares:
    """The measured card's, or what others published of this card's kind."""
    measured, published = calibrate(), read_measured().find_published
    free, bound = published("step", "RTX 4090"), published("step", "RTX 6000 Ada")
    if gpu.capability == measured_card().capability:
        return measured
    if gpu.kind == "geforce":
        shares = _of_step(measured, free)
        return _with_fp8(shares, published("fp8 product", "RTX 5090")) if gpu.capability == (12, 0) else shares
    if gpu.capability == (8, 9):
        limit = step_tflop(bound) * (bound.steps_per_s or 0) / (find_gpu(bound.gpu).power_w or math.inf)
        return replace(_of_step(measured, free), tflop_per_joule=limit, source=f"{free.source} ({free.gpu}, {bound.gpu})")
    return replace(measured, tflop_per_joule=None, source=read_measured().ceilings[-1].card)


def _of_step(measured: Shares, row: Published) -> Shares:
    """Products and attention reach what a whole step of another model did; our 8-bit kernels are as far below as on Hopper.

    GeForce cards multiply at half rate where the sums are FP32, so that neither power nor memory keeps them from it.
    """
    share = step_share(row)
    return replace(
        measured,
        bf16=share,
        fp8=share,
        int8=share * measured.int8 / measured.fp8,
        attention=share,
        int8_attention=share * measured.int8_attention / measured.attention,
        sustained=1.0,
        tflop_per_joule=None,
        source=f"{row.source} ({row.gpu})",
    )


def _with_fp8(shares: Shares, row: Published) -> Shares:
    assert row.tflops is not None
    fp8 = row.tflops / rate_of(find_gpu(row.gpu), "fp8")
    return replace(shares, fp8=fp8, source=f"{shares.source} and {row.source} ({row.gpu})")


def step_share(row: Published) -> float:
    """Of the dense rates, over a published step with FP8 products and BF16 attention."""
    gpu = find_gpu(row.gpu)
    assert row.steps_per_s is not None
    assert row.linear_tflop is not None
    assert row.attention_tflop is not None
    return row.steps_per_s * (row.linear_tflop / rate_of(gpu, "fp8") + row.attention_tflop / rate_of(gpu, "bf16"))


def step_tflop(row: Published) -> float:
    """As its energy goes, the products in FP8 and the attention in BF16."""
    assert row.linear_tflop is not None
    assert row.attention_tflop is not None
    return row.linear_tflop + 2 * row.attention_tflop


def measured_card() -> Gpu:
    """The card whose ceilings were taken last, with its runs."""
    return find_gpu(read_measured().ceilings[-1].card)


@cache
def calibrate() -> Shares:
    """Of the card that we have measured: its ceilings, and what its whole steps and stages took beside them."""
    measured, gpu = read_measured(), measured_card()
    ceiling = measured.ceilings[-1]
    first = _of_ceilings(ceiling, gpu)
    runs = [run for run in measured.runs if card_of(run) == gpu]
    whole = [run for run in runs if not run.reuse_reference]
    sustained = statistics.fmean(_step_of(run, gpu, first) / (run.step_ms / 1e3) for run in whole)
    vae = ModelSizes().vae
    encode, decode = (sizes.vae_flop(vae, convs, 1 << 20) for convs in (sizes.vae_encoder(vae), sizes.vae_decoder(vae)))
    spent = statistics.fmean(run.vae_encode_ms + run.vae_decode_ms for run in runs) / 1e3
    flop = sizes.step_flop(MMDiTConfig(), MEASURED_WORK)
    assert gpu.power_w is not None
    return replace(
        first,
        sustained=sustained,
        convolution=(encode + decode) / spent / (1e12 * rate_of(gpu, "bf16")),
        # the most that was seen; cards of the same kind with less power have no more
        tflop_per_joule=max(powered_tflop(flop, draw_of(run)) / (run.step_ms / 1e3) for run in whole) / gpu.power_w,
    )


def _of_ceilings(ceiling: Ceiling, gpu: Gpu) -> Shares:
    published = read_measured().find_published
    int8, attention = published("int8 product", "H100 SXM"), published("int8 attention", "H100 SXM")
    reuse = published("int8 attention, reuse", "H100 SXM")
    assert int8.tflops is not None
    assert attention.tflops is not None
    assert reuse.tflops is not None
    return Shares(
        bf16=ceiling.product_tflops("bf16") / rate_of(gpu, "bf16"),
        fp8=ceiling.product_tflops("fp8") / rate_of(gpu, "fp8"),
        int8=int8.tflops / rate_of(find_gpu(int8.gpu), "int8"),
        attention=ceiling.cudnn_attention_tflops / rate_of(gpu, "bf16"),
        int8_attention=attention.tflops / rate_of(find_gpu(attention.gpu), "int8"),
        reuse=reuse.tflops / attention.tflops,
        copy=ceiling.copy_gb_per_s / gpu.bandwidth_gb_per_s,
        convolution=1.0,
        sustained=1.0,
        tflop_per_joule=None,
        source=f"{ceiling.source}, {ceiling.card}, {ceiling.checked}",
    )


def _step_of(run: Run, gpu: Gpu, shares: Shares) -> float:
    return step_seconds(MMDiTConfig(), MEASURED_WORK, gpu, shares, draw_of(run), reuses=run.reuse_reference)


def draw_of(run: Run) -> Draw:
    """What a measured run was drawn with."""
    return Draw(
        layouts={(run.format,) * len(sizes.block_matrices(MMDiTConfig(), 0)): MMDiTConfig().num_layers},
        # as engine/planner.py has it
        text_encoder="fp8" if run.format != "bf16" and card_of(run).fp8_tflops else "bf16",
        attention=run.attention,
        reuses=run.reuse_reference,
    )


@cache
def _host_seconds() -> dict[str, float]:
    """What the host takes, or the card waits for: medians over the runs; of the text, beside the encoder's bytes."""
    gpu = measured_card()
    runs = [run for run in read_measured().runs if card_of(run) == gpu]
    text = [
        run.text_ms / 1e3 - _text_seconds(ModelSizes(), MEASURED_WORK, gpu, calibrate(), draw_of(run).text_encoder) for run in runs
    ]
    return {
        "prepare": statistics.median(run.prepare_ms for run in runs) / 1e3,
        "text": statistics.median(text),
        "output": statistics.median(run.to_pil_ms for run in runs) / 1e3,
    }


# how sure they are


def estimate(model: ModelSizes, work: Workload, gpu: Gpu, draw: Draw, link: float) -> dict[str, Estimate]:
    """Seconds by stage: the measured ones where this very edit was measured on this card, else the roofline's, with its error."""
    if (run := find_run(model, work, gpu, draw)) is not None:
        return {stage: Estimate(seconds, "measured", None) for stage, seconds in stages_of(run).items()}
    kind: Kind = "calibrated" if is_alike(gpu) else "modelled"
    error = calibration_error() if kind == "calibrated" else modelled_error()
    return {stage: Estimate(seconds, kind, error) for stage, seconds in predict(model, work, gpu, draw, link).items()}


def is_alike(gpu: Gpu) -> bool:
    """Whether a card has the measured one's tensor cores, at its rates and with its power: then its shares hold here too."""
    measured = measured_card()
    wanted = (measured.capability, measured.bf16_tflops, measured.fp8_tflops, measured.int8_tops)
    has_power = (gpu.power_w or 0) >= (measured.power_w or 0)
    return has_power and (gpu.capability, gpu.bf16_tflops, gpu.fp8_tflops, gpu.int8_tops) == wanted


def find_run(model: ModelSizes, work: Workload, gpu: Gpu, draw: Draw) -> Run | None:
    """The last run of this edit on this card; None where there is none."""
    # 2511's variant has the same sizes
    alike = replace(model, transformer=replace(model.transformer, zero_cond_t=False))
    if alike != ModelSizes() or draw.streamed_step_bytes or draw.streamed_text_bytes or draw.exchanged_bytes:
        return None
    for run in reversed(read_measured().runs):
        is_same = replace(MEASURED_WORK, steps=run.steps) == work and draw_of(run) == draw
        if is_same and card_of(run) == gpu:
            return run
    return None


@cache
def card_of(run: Run) -> Gpu:
    return find_gpu(run.card)


def stages_of(run: Run) -> dict[str, float]:
    """Seconds by stage."""
    taken = (run.prepare_ms, run.text_ms, run.vae_encode_ms, run.denoise_ms, run.vae_decode_ms, run.to_pil_ms)
    return {stage: ms / 1e3 for stage, ms in zip(STAGES, taken, strict=True)}


@cache
def calibration_error() -> float:
    """The worst that the roofline is off the measured edits that it was calibrated by, relative."""
    return max(abs(sum(predicted_run(run).values()) / (run.edit_ms / 1e3) - 1) for run in read_measured().runs)


@cache
def modelled_error() -> float:
    """How far the measured card's shares are off the one whole step that others published of another generation's card."""
    row, shares = read_measured().find_published("step", "RTX 4090"), calibrate()
    gpu = find_gpu(row.gpu)
    assert row.steps_per_s is not None
    assert row.linear_tflop is not None
    assert row.attention_tflop is not None
    products = row.linear_tflop / (rate_of(gpu, "fp8") * shares.fp8)
    attention = row.attention_tflop / (rate_of(gpu, "bf16") * shares.attention)
    return abs((products + attention) / shares.sustained * row.steps_per_s - 1)


def predicted_run(run: Run) -> dict[str, float]:
    """What the roofline says of a measured run, by stage."""
    return predict(ModelSizes(), replace(MEASURED_WORK, steps=run.steps), card_of(run), draw_of(run), link_gb_per_s(5, 16))
