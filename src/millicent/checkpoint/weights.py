"""Tensors into memory, all of them or none.

Loading is strict: every tensor that the network has must be in the files, with its shape, finite and in a plain float
format, and every tensor in the files must be wanted. Anything else is refused with its name; half a model draws static.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from millicent.checkpoint.folder import FETCH_AGAIN, show_some
from millicent.errors import CheckpointError, WeightsMismatchError

PLAIN_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def read_weights(files: Sequence[Path], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the files, cast to `dtype`; where it has that dtype already, it stays mapped from the file.

    Raises CheckpointError for a broken file, a quantized tensor or one with NaN or infinity.
    """
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    weights[key] = _check_plain(key, file.get_tensor(key), path).to(dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is no whole safetensors file: {error}.", FETCH_AGAIN) from error
    return weights


def _check_plain(key: str, tensor: Tensor, path: Path) -> Tensor:
    if tensor.dtype not in PLAIN_DTYPES:
        stored = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{key} in {path} is stored as {stored}; this version loads plain weights only.",
            "Use the BF16 weights.",
        )
    # the extremes alone tell, and take no second tensor; empty ones have none
    if tensor.numel() and not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        raise CheckpointError(f"{key} in {path} holds values that are not finite.", FETCH_AGAIN)
    return tensor


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Put `weights` into a module that was built on the meta device; nothing is copied.

    Raises WeightsMismatchError if a tensor is missing, left over or of another shape.
    """
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - weights.keys())
    unexpected = sorted(weights.keys() - wanted.keys())
    misshapen = [
        f"{key} {tuple(weights[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    faults = {"missing": missing, "not wanted": unexpected, "of another shape": misshapen}
    if any(faults.values()):
        told = "; ".join(f"{len(keys)} {fault}: {show_some(keys)}" for fault, keys in faults.items() if keys)
        raise WeightsMismatchError(f"{source} does not fit its config.json: {told}.", FETCH_AGAIN)
    module.load_state_dict(dict(weights), assign=True)
    module.requires_grad_(False)
