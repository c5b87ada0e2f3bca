"""8-bit attention in every tiling against torch's exact kernels: `python -m benchmarks.attention_sweep`, on a CUDA card.

Each tiling is first held against float64; one that is wrong is reported as such, with no speed, and the exit status is 1.
Exact attention needs q and k normed and turned first; the 8-bit one does that with its codes. "int8 kept" is a later step of an
edit: what the first one found of all tokens is there, and so are the codes of the tokens that do not ask.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import describe_machine
from millicent.kernels import elementwise, reference
from millicent.kernels.attention import (
    ADA_CONFIG,
    AMPERE_CONFIG,
    HOPPER_CONFIGS,
    AttentionConfig,
    attend,
    attend_kept_int8,
    attend_normed_int8,
    make_kept,
)
from millicent.kernels.attention_codes import NormRope, quantize_keys_values, survey
from millicent.kernels.attention_kept import code

SIZES = ((8448, 8448), (4352, 8448))
"""Queries and keys: an edit with one reference at 1024x1024, and the same when the reference's queries are not needed."""
TEXT_TOKENS = 256
HEADS, WIDTH = 24, 128
LARGEST_RELATIVE_ERROR = 0.06
CHECKED_ROWS = 256


@dataclass(frozen=True)
class Layer:
    """What attention is given: qkv (S, 3, H, D), of which the last `q_tokens` rows ask and are still to be normed."""

    qkv: Tensor
    weights: Tensor
    cos: Tensor
    sin: Tensor
    q_tokens: int

    @property
    def first_row(self) -> int:
        return len(self.qkv) - self.q_tokens

    @property
    def queries(self) -> slice:
        return slice(self.first_row, len(self.qkv))

    @property
    def img_rows(self) -> int:
        return len(self.qkv) - TEXT_TOKENS

    def normed(self) -> Tensor:
        """A copy, normed and turned by the specification."""
        made, first = self.qkv.clone(), self.first_row
        reference.qk_norm_rope(made[first:], self.weights, self.cos[first:], self.sin[first:], self.img_rows - first)
        return made


def sample(q_tokens: int, k_tokens: int) -> Layer:
    """Keys have a bias of each channel, as trained ones have."""
    generator = torch.Generator("cuda").manual_seed(20)
    qkv = torch.randn(k_tokens, 3, HEADS, WIDTH, generator=generator, device="cuda")
    qkv[:, 1] += 4.0 * torch.randn(HEADS, WIDTH, generator=generator, device="cuda")
    weights = 0.5 + torch.rand(2, 2, WIDTH, generator=generator, device="cuda")
    angles = 6.28 * torch.rand(k_tokens, WIDTH // 2, generator=generator, device="cuda")
    return Layer(qkv.bfloat16(), weights.bfloat16(), angles.cos(), angles.sin(), q_tokens)


def relative_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Of evenly spaced rows of `out`, against float64."""
    rows = torch.linspace(0, q.shape[0] - 1, CHECKED_ROWS, device="cuda").long()
    difference = norm = 0.0
    for head in range(HEADS):
        scores = q[rows, head].double() @ k[:, head].double().T / WIDTH**0.5
        wanted = scores.softmax(dim=-1) @ v[:, head].double()
        found = out[rows, head * WIDTH : (head + 1) * WIDTH].double()
        difference += float((found - wanted).square().sum())
        norm += float(wanted.square().sum())
    return float((difference / norm) ** 0.5)


def median_ms(call: Callable[[], object], runs: int) -> float:
    """Device time of one call, by CUDA events around each; launches are queued behind a sleep so that none is waited for."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    torch.cuda._sleep(20_000_000)
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def tflops(q_tokens: int, k_tokens: int, ms: float) -> float:
    return 4 * q_tokens * k_tokens * HEADS * WIDTH / ms / 1e9


def norm_ms(layer: Layer, runs: int) -> float:
    """Device time of norm and rope in a launch of their own."""
    rows, cos, sin = layer.qkv.clone()[layer.first_row :], layer.cos[layer.first_row :], layer.sin[layer.first_row :]
    img = layer.img_rows - layer.first_row
    return median_ms(lambda: elementwise.qk_norm_rope(rows, layer.weights, cos, sin, img), runs)


def exact_rows(layer: Layer, normed: Tensor, runs: int) -> Iterator[dict[str, object]]:
    """`ms` counts norm and rope; `attend_ms` does not."""
    q, k, v = normed[layer.queries, 0], normed[:, 1], normed[:, 2]
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
    before = norm_ms(layer, runs)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(1)
            ms = median_ms(lambda: F.scaled_dot_product_attention(query, key, value), runs)
        times = {"ms": before + ms, "attend_ms": ms, "norm_rope_ms": before}
        yield {"kernel": backend.name, "error": relative_error(out, q, k, v), **times}


def int8_row(layer: Layer, normed: Tensor, config: AttentionConfig, runs: int) -> dict[str, object]:
    """`ms` is of all, `survey_ms` and `codes_ms` of the two launches before attention. A wrong result has no times."""
    out = torch.full((layer.q_tokens, HEADS * WIDTH), torch.nan, dtype=torch.bfloat16, device="cuda")
    row: dict[str, object] = {"kernel": "int8", "config": asdict(config)}
    # keys are written in place: each run norms them anew, which costs the same and keeps their size
    qkv, columns, fp8 = layer.qkv.clone(), config.columns, config.fp8_values
    norm_rope = NormRope(layer.weights, layer.cos, layer.sin, layer.img_rows, layer.first_row)

    def run() -> Tensor:
        place = layer.img_rows, layer.first_row, layer.queries
        return attend_normed_int8(qkv, layer.weights, layer.cos, layer.sin, *place, out, config)

    row["error"] = error = relative_error(run(), normed[layer.queries, 0], normed[:, 1], normed[:, 2])
    if not error < LARGEST_RELATIVE_ERROR:
        return row | {"refused": f"relative error of {error:.4f}"}
    q, k, v = qkv.unbind(1)
    made = survey(q, k, v, layer.queries, fp8, norm_rope)
    codes = quantize_keys_values(k, v, made, columns, fp8)
    row["ms"] = median_ms(run, runs)
    row["attend_ms"] = median_ms(lambda: attend(made, codes, layer.q_tokens, len(k), out, config), runs)
    row["survey_ms"] = median_ms(lambda: survey(q, k, v, layer.queries, fp8, norm_rope), runs)
    row["codes_ms"] = median_ms(lambda: quantize_keys_values(k, v, made, columns, fp8), runs)
    return row


def kept_row(layer: Layer, normed: Tensor, config: AttentionConfig, runs: int) -> dict[str, object]:
    """`ms` is of all, `codes_ms` of the launch before attention. A wrong result has no times."""
    out = torch.full((layer.q_tokens, HEADS * WIDTH), torch.nan, dtype=torch.bfloat16, device="cuda")
    row: dict[str, object] = {"kernel": "int8 kept", "config": asdict(config)}
    first, img = layer.first_row, layer.img_rows - layer.first_row
    kept = make_kept(1, first, HEADS, WIDTH, out.device, config).layer(0)
    place = layer.img_rows, first, layer.queries
    attend_normed_int8(layer.qkv.clone(), layer.weights, layer.cos, layer.sin, *place, out, config, kept=kept)
    new, cos, sin, queries = layer.qkv[first:], layer.cos[first:], layer.sin[first:], slice(0, layer.q_tokens)

    def run() -> Tensor:
        return attend_kept_int8(new, layer.weights, cos, sin, img, queries, out, kept, config)

    out.fill_(torch.nan)
    row["error"] = error = relative_error(run(), normed[layer.queries, 0], normed[:, 1], normed[:, 2])
    if not error < LARGEST_RELATIVE_ERROR:
        return row | {"refused": f"relative error of {error:.4f}"}
    (q, k, v), norm_rope = new.unbind(1), NormRope(layer.weights, cos, sin, img, 0)
    made, codes = code(q, k, v, queries, config.columns, config.fp8_values, norm_rope, kept)
    row["ms"] = median_ms(run, runs)
    row["attend_ms"] = median_ms(lambda: attend(made, codes, layer.q_tokens, len(k), out, config, kept), runs)
    row["codes_ms"] = median_ms(lambda: code(q, k, v, queries, config.columns, config.fp8_values, norm_rope, kept), runs)
    return row


def configs_of_this_card() -> tuple[AttentionConfig, ...]:
    capability = torch.cuda.get_device_capability()
    if capability[0] == 9:
        return HOPPER_CONFIGS
    return (ADA_CONFIG, AMPERE_CONFIG) if capability >= (8, 9) else (AMPERE_CONFIG,)


def measure(q_tokens: int, k_tokens: int, runs: int) -> Iterator[dict[str, object]]:
    layer = sample(q_tokens, k_tokens)
    normed = layer.normed()
    yield from exact_rows(layer, normed, runs)
    for config in configs_of_this_card():
        yield int8_row(layer, normed, config, runs)
        yield kept_row(layer, normed, config, runs)


def show(row: dict[str, object], q_tokens: int, k_tokens: int) -> str:
    config = row.get("config")
    words = " ".join(f"{key}={value}" for key, value in config.items()) if isinstance(config, dict) else ""
    if "refused" in row:
        return f"{row['kernel']:16} REFUSED: {row['refused']}  {words}"
    parts = " ".join(f"{name} {row[name]:.3f}" for name in ("norm_rope_ms", "survey_ms", "codes_ms", "attend_ms") if name in row)
    attend_ms = row["attend_ms"]
    assert isinstance(attend_ms, float)
    return (
        f"{row['kernel']:16} whole {row['ms']:.3f} ms = {parts} ({tflops(q_tokens, k_tokens, attend_ms):.0f} TFLOP/s)   "
        f"error {row['error']:.4f}  {words}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    results = []
    for q_tokens, k_tokens in SIZES:
        print(f"{q_tokens} queries, {k_tokens} keys, {HEADS} heads of {WIDTH}")
        for row in measure(q_tokens, k_tokens, runs):
            print(show(row, q_tokens, k_tokens), flush=True)
            results.append({"q_tokens": q_tokens, "k_tokens": k_tokens, **row})
    print(json.dumps({"benchmark": "attention_sweep", **describe_machine(torch.device("cuda")), "results": results}))
    return int(any("refused" in row for row in results))


if __name__ == "__main__":
    sys.exit(main())
