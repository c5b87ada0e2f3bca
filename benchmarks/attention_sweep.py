"""8-bit attention in every tiling against torch's exact kernels: `python -m benchmarks.attention_sweep`, on a CUDA card.

Each tiling is first held against float64; one that is wrong is reported as such, with no speed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import describe_machine
from millicent.kernels import attention
from millicent.kernels.attention import ADA_CONFIG, AMPERE_CONFIG, HOPPER_CONFIGS, AttentionConfig

SIZES = ((8448, 8448), (4352, 8448))
"""Queries and keys: an edit with one reference at 1024x1024, and the same when the reference's queries are not needed."""
HEADS, WIDTH = 24, 128
LARGEST_RELATIVE_ERROR = 0.06
CHECKED_ROWS = 256


def sample(q_tokens: int, k_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a fused projection; keys with a bias of each channel, as trained ones have."""
    generator = torch.Generator("cuda").manual_seed(20)
    fused = torch.randn(k_tokens, 3, HEADS, WIDTH, generator=generator, device="cuda")
    fused[:, 1] += 4.0 * torch.randn(HEADS, WIDTH, generator=generator, device="cuda")
    fused = fused.bfloat16()
    return fused[:q_tokens, 0], fused[:, 1], fused[:, 2]


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


def exact_rows(q: Tensor, k: Tensor, v: Tensor, runs: int) -> Iterator[dict[str, object]]:
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(query, key, value)[0].transpose(0, 1).flatten(1)
            ms = median_ms(lambda: F.scaled_dot_product_attention(query, key, value), runs)
        yield {"kernel": backend.name, "error": relative_error(out, q, k, v), "ms": ms, "attend_ms": ms}


def int8_row(q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, runs: int) -> dict[str, object]:
    """`ms` counts the quantization of q, k and v; `attend_ms` does not. A wrong result has no times."""
    out = torch.full((q.shape[0], HEADS * WIDTH), torch.nan, dtype=torch.bfloat16, device="cuda")
    row: dict[str, object] = {"kernel": "int8", "config": asdict(config)}
    row["error"] = error = relative_error(attention.attention_int8(q, k, v, out, config), q, k, v)
    if not error < LARGEST_RELATIVE_ERROR:
        return row | {"refused": f"relative error of {error:.4f}"}
    codes, scale = attention.quantize_queries(q)
    keys_values = attention.quantize_keys_values(k, v, config.columns, config.fp8_values)
    tokens = q.shape[0], k.shape[0]
    row["ms"] = median_ms(lambda: attention.attention_int8(q, k, v, out, config), runs)
    row["attend_ms"] = median_ms(lambda: attention.attend(codes, scale, keys_values, *tokens, out, config), runs)
    return row


def configs_of_this_card() -> tuple[AttentionConfig, ...]:
    capability = torch.cuda.get_device_capability()
    if capability[0] == 9:
        return HOPPER_CONFIGS
    return (ADA_CONFIG, AMPERE_CONFIG) if capability >= (8, 9) else (AMPERE_CONFIG,)


def measure(q_tokens: int, k_tokens: int, runs: int) -> Iterator[dict[str, object]]:
    q, k, v = sample(q_tokens, k_tokens)
    yield from exact_rows(q, k, v, runs)
    for config in configs_of_this_card():
        yield int8_row(q, k, v, config, runs)


def show(row: dict[str, object], q_tokens: int, k_tokens: int) -> str:
    config = row.get("config")
    words = " ".join(f"{key}={value}" for key, value in config.items()) if isinstance(config, dict) else ""
    if "refused" in row:
        return f"{row['kernel']:16} REFUSED: {row['refused']}  {words}"
    ms, attend_ms = row["ms"], row["attend_ms"]
    assert isinstance(ms, float)
    assert isinstance(attend_ms, float)
    return (
        f"{row['kernel']:16} {ms:8.3f} ms {tflops(q_tokens, k_tokens, ms):6.0f} TFLOP/s   without quantization "
        f"{attend_ms:8.3f} ms {tflops(q_tokens, k_tokens, attend_ms):6.0f}   error {row['error']:.4f}  {words}"
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
