"""LoRA files: a low-rank change to some of the transformer's weights, added into them when the model opens.

Every key of the file must be read, paired and find its layer, or the file is refused: half a LoRA draws something else.
So far one style of names is read, that of the Lightning files:
`transformer_blocks.0.attn.to_q.lora_down.weight`, `….lora_up.weight` and `….alpha`.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from millicent.checkpoint.folder import show_some
from millicent.checkpoint.weights import read_weights
from millicent.errors import WeightsMismatchError

# what a key ends in -> what it holds; what stands before it is the layer's name
_ENDINGS = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}
_FIX = "Use a LoRA made for this model."


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one layer's weight: scale up @ down, with up (N, r) and down (r, K), all FP32."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        return self.scale * (self.up @ self.down)


def read_lora(path: Path) -> dict[str, LowRank]:
    """Layer name -> its change. Raises WeightsMismatchError for a key that is unknown, unpaired or misshapen."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown: list[str] = []
    for key, tensor in read_weights([path], torch.float32).items():
        for ending, part in _ENDINGS.items():
            if key.endswith(ending):
                parts[key.removesuffix(ending)][part] = tensor
                break
        else:
            unknown.append(key)
    if unknown or not parts:
        found = f"the unknown {show_some(unknown)}" if unknown else "no keys"
        raise WeightsMismatchError(f"The LoRA {path} holds {found}.", "Use a LoRA with lora_down and lora_up keys.")
    return {layer: _pair(layer, tensors, path) for layer, tensors in parts.items()}


def _pair(layer: str, tensors: Mapping[str, Tensor], path: Path) -> LowRank:
    if missing := [part for part in ("down", "up") if part not in tensors]:
        raise WeightsMismatchError(f"The LoRA {path} lacks lora_{missing[0]} for {layer}.", "Fetch the LoRA again.")
    down, up = tensors["down"], tensors["up"]
    alpha = tensors.get("alpha")
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0] or (alpha is not None and alpha.numel() != 1):
        shapes = f"up {tuple(up.shape)}, down {tuple(down.shape)}"
        raise WeightsMismatchError(f"The LoRA {path} has shapes that do not pair for {layer}: {shapes}.", _FIX)
    rank = down.shape[0]
    return LowRank(down, up, 1.0 if alpha is None else alpha.item() / rank)


def fuse_lora(module: nn.Module, path: Path, strength: float = 1.0) -> int:
    """Add a LoRA into the module's weights: W + strength alpha / rank up @ down, computed in FP32, cast back.

    Returns the number of layers changed. Raises WeightsMismatchError, before anything is changed, if a layer is not
    found or has another shape.
    """
    lora = read_lora(path)
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    _check_layers(lora, linears, path)
    with torch.no_grad():
        for name, change in lora.items():
            weight = linears[name].weight
            delta = change.delta().to(weight.device)
            # a new tensor: the old one may be mapped from the file
            fused = (weight.float() + strength * delta).to(weight.dtype)
            linears[name].weight = nn.Parameter(fused, requires_grad=False)
    return len(lora)


def _check_layers(lora: Mapping[str, LowRank], linears: Mapping[str, nn.Linear], path: Path) -> None:
    if unmatched := [name for name in lora if name not in linears]:
        example = unmatched[0] + _nearest(unmatched[0], list(linears))
        count = f"{len(unmatched)} of {len(lora)} layers"
        raise WeightsMismatchError(f"{count} of the LoRA {path} are not in the model, such as {example}.", _FIX)
    for name, change in lora.items():
        wanted, found = tuple(linears[name].weight.shape), (change.up.shape[0], change.down.shape[1])
        if wanted != found:
            raise WeightsMismatchError(f"The LoRA {path} changes {name} as {found}; the model has {wanted}.", _FIX)


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (nearest: {near[0]})" if near else ""
