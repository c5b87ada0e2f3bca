"""LoRA files: a small change to some of a network's weights, added into them when the model opens.

Every key of a file must be read, paired and find its layer, or the file is refused: half a LoRA draws something else. The
styles of names are in lora_keys.py. The kinds, each for a weight W of N rows and K columns:

    LoRA       D = alpha / r up @ down; rsLoRA has alpha / sqrt(r)                  arXiv 2106.09685, 2312.03732
    LoHa       D = alpha / r (w1_a @ w1_b) * (w2_a @ w2_b), * entry by entry        arXiv 2108.06098
    LoKr       D = alpha / r kron(w1, w2), each whole or a product                  arXiv 2309.14859
    full       D = diff, on weights, biases and norms; set_weight is the new W itself
    DoRA       W' = m (W + D) / ||W + D||, by rows or by columns, over any D above  arXiv 2402.09353

An absent alpha, or no r to divide it by, gives the factor 1. A strength s takes W to W + s D, or to W + s (W' - W).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from millicent.checkpoint.folder import show_some
from millicent.checkpoint.lora_keys import (
    ADAPTER_METADATA,
    PEFT_PREFIX,
    TEXT_ENCODER,
    Key,
    choose_by_pattern,
    layer_table,
    nearest_layer,
    read_adapter_config,
    split_key,
)
from millicent.errors import CheckpointError, InputError, WeightsMismatchError

PLAIN_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FIX = "Use a LoRA made for this model."
_FETCH = "Fetch the LoRA again."
# some trainers store alpha as an integer
_ALPHA_DTYPES = (*PLAIN_DTYPES, torch.int64, torch.int32)
_ASIDE = ("alpha", "dora_scale", "magnitude", "diff_b")


@dataclass(frozen=True, slots=True)
class Kind:
    """factors: each the name of a tensor, or of two whose product it is. join: makes D of the factors."""

    factors: tuple[tuple[str, ...], ...]
    join: Callable[..., Tensor]

    @property
    def parts(self) -> set[str]:
        return {part for factor in self.factors for part in factor}


def _alone(factor: Tensor) -> Tensor:
    return factor


LORA = Kind((("up", "down"),), _alone)
LOHA = Kind((("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")), torch.mul)
LOKR = [
    Kind((w1, w2), torch.kron)
    for w1 in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
    for w2 in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
]
DIFF = Kind((("diff",),), _alone)
BIAS_DIFF = Kind((("diff_b",),), _alone)
SET = Kind((("set_weight",),), _alone)
KINDS = (LORA, LOHA, *LOKR, DIFF, SET)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of one file. name: the file's. reals: the model's, three where the file has them as one."""

    path: Path
    name: str
    reals: tuple[str, ...]
    parts: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Change:
    """What one file does to one parameter, or to three that it holds as one.

    parameters: the model's names; W is their rows, one below the other. parts: the tensors of `kind`, as stored.
    scale: what D is multiplied by. magnitude: DoRA's m, (N, 1) or (1, K), or None.
    """

    parameters: tuple[str, ...]
    kind: Kind
    parts: Mapping[str, Tensor]
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def replaces(self) -> bool:
        """Whether it makes the new weight itself, not what is added to the old one."""
        return self.kind is SET or self.magnitude is not None

    def make(self, weights: Sequence[Tensor]) -> Tensor:
        """The parameters -> D, or the new W if it replaces; FP32, where they lie."""
        device = weights[0].device

        def factor(names: tuple[str, ...]) -> Tensor:
            tensors = [self.parts[name].to(device, torch.float32) for name in names]
            return tensors[0] @ tensors[1] if len(tensors) == 2 else tensors[0]

        made = self.scale * self.kind.join(*(factor(names) for names in self.kind.factors))
        if self.magnitude is None:
            return made
        moved = torch.cat([weight.float() for weight in weights]) + made
        norm = moved.norm(dim=1 if self.magnitude.shape[1] == 1 else 0, keepdim=True)
        # a row of zeros has no direction, and stays
        return self.magnitude.to(device, torch.float32) * (moved / norm.clamp_min(torch.finfo(torch.float32).tiny))


def fuse_loras(
    module: nn.Module, loras: Sequence[tuple[Path, float]], make_room: Callable[[int], None] = lambda size_bytes: None
) -> int:
    """Change the module's weights by LoRA files, each with its strength, which may be negative.

    All changes of a weight are made from the weight as it was and added up in FP32, then cast once. Their order does not
    matter. A file of strength 0 is checked, and changes nothing. Returns the number of layers changed.
    make_room: told before that of how many bytes new weights will be; what it raises passes.
    Raises, before anything is changed, WeightsMismatchError for a file that does not fit the module, CheckpointError for
    one that cannot be read, InputError for a strength that is not finite.
    """
    parameters = dict(module.named_parameters())
    uses = read_loras(loras, parameters, layer_table(module))
    make_room(sum(parameters[name].nbytes for name in uses))
    with torch.no_grad():
        for name, changes in uses.items():
            layer, _, kind = name.rpartition(".")
            setattr(module.get_submodule(layer), kind, nn.Parameter(fuse(name, changes, parameters), requires_grad=False))
            if all(change.parameters == (name,) for change, _ in changes):
                # nothing else is made from the old weight, and a whole model of them would not fit beside the new
                del parameters[name]
    return len({name.rpartition(".")[0] for name in uses})


def read_loras(
    loras: Sequence[tuple[Path, float]], parameters: Mapping[str, Tensor], table: Mapping[str, tuple[str, ...]]
) -> dict[str, list[tuple[Change, float]]]:
    """What files, each with its strength, do to each parameter that they change; arguments and errors as fuse_loras, read_lora."""
    uses: dict[str, list[tuple[Change, float]]] = defaultdict(list)
    # a sum of floats depends on its order in the last bit
    for path, strength in sorted(loras):
        if not math.isfinite(strength):
            raise InputError(f"The strength of the LoRA {path} is {strength}.", "Give a number, such as 1.0.")
        for change in read_lora(path, parameters, table):
            for name in change.parameters if strength else ():
                uses[name].append((change, strength))
    return dict(uses)


def fuse(name: str, changes: Sequence[tuple[Change, float]], parameters: Mapping[str, Tensor]) -> Tensor:
    """The new value of one parameter, a new tensor: the old one may be mapped from its file."""
    old = parameters[name]
    fused = torch.zeros_like(old, dtype=torch.float32)
    kept = 1.0
    for change, strength in changes:
        weights = [parameters[each] for each in change.parameters]
        rows = change.make(weights).split([len(weight) for weight in weights])
        fused.add_(rows[change.parameters.index(name)], alpha=strength)
        kept -= strength if change.replaces else 0.0
    return fused.add_(old, alpha=kept).to(old.dtype)


def read_lora(path: Path, parameters: Mapping[str, Tensor], table: Mapping[str, tuple[str, ...]]) -> list[Change]:
    """The changes that a file holds, matched and checked against a module's parameters.

    table: a file's name for a layer -> the module's (lora_keys.layer_table). Raises as fuse_loras.
    """
    tensors, metadata = _read_file(path)
    layers: dict[str, list[tuple[Key, Tensor]]] = defaultdict(list)
    for key, found in _split_keys(path, list(tensors)).items():
        layers[found.layer].append((found, tensors[key]))
    _check_layers(path, list(layers), table)
    try:
        config = read_adapter_config(metadata)
        if any(name.startswith(PEFT_PREFIX) for name in layers):
            config = read_adapter_config(_read_peft_config(path))
        return [
            change
            for name, keys in layers.items()
            for change in _read_layer(Layer(path, name, table[name], _unite(path, name, keys)), parameters, config)
        ]
    except ValueError as error:
        raise WeightsMismatchError(f"The LoRA {path} describes itself in metadata that we cannot read: {error}.", _FETCH) from error


def lightning_steps(path: Path) -> int | None:
    """The steps that a Lightning distillation was made for; None if the file is none, as far as can be told.

    The file's metadata has the word (schedule "lightning" and steps); where it is silent, as in the published files, the
    name may tell ("lightning" and "4steps"). A name is only a name: a renamed file passes for what it is called.
    Raises CheckpointError for a file that is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: {error}.", _FETCH) from error
    if metadata.get("schedule") == "lightning" and re.fullmatch(r"[1-9]\d?", metadata.get("steps", "")):
        return int(metadata["steps"])
    steps = re.search(r"(?<!\d)([1-9]\d?)[-_ ]?steps?", path.name.lower())
    return int(steps[1]) if steps and "lightning" in path.name.lower() else None


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor, still mapped from the file, and the header's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"The LoRA {path} is no whole safetensors file: {error}.", _FETCH) from error
    for key, tensor in tensors.items():
        if tensor.dtype not in (_ALPHA_DTYPES if key.endswith(".alpha") else PLAIN_DTYPES):
            raise _misfit(path, f"stores {key} as {str(tensor.dtype).removeprefix('torch.')}", "Use the BF16 LoRA.")
        if not tensor.numel() or not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
            raise _misfit(path, f"holds {'values that are not finite' if tensor.numel() else 'nothing'} in {key}", _FETCH)
    return tensors, metadata


def _read_peft_config(path: Path) -> dict[str, str]:
    """PEFT's own files (base_model.model.…) keep alpha beside them; as the header's metadata would have it."""
    beside = path.with_name("adapter_config.json")
    if not beside.is_file():
        raise _misfit(
            path, f"is one of PEFT's own, whose alpha is in {beside.name}, and that is missing", "Put it beside the LoRA."
        )
    return {ADAPTER_METADATA: beside.read_text(encoding="utf-8")}


def _split_keys(path: Path, keys: Sequence[str]) -> dict[str, Key]:
    if not keys:
        raise _misfit(path, "holds no keys", _FETCH)
    if text := [key for key in keys if TEXT_ENCODER.match(key)]:
        raise _misfit(path, f"changes the text encoder: {show_some(text)}", "Use one for the transformer alone.")
    found = {key: split_key(key) for key in keys}
    unknown = [key for key, split in found.items() if split is None]
    if len(unknown) == len(keys) and any(key.endswith(".weight") for key in keys):
        raise _misfit(path, f"is a whole model, not a LoRA: {show_some(unknown)}", "Give the model as the model.")
    if unknown:
        raise _misfit(path, f"has {len(unknown)} of {len(keys)} keys of no kind that we read: {show_some(unknown)}")
    return {key: split for key, split in found.items() if split is not None}


def _check_layers(path: Path, layers: Sequence[str], table: Mapping[str, tuple[str, ...]]) -> None:
    if unmatched := [layer for layer in layers if layer not in table]:
        near = nearest_layer(unmatched[0], dict.fromkeys(real for reals in table.values() for real in reals))
        example = unmatched[0] + (f" (nearest: {near})" if near else "")
        count = "none" if len(unmatched) == len(layers) else f"{len(layers) - len(unmatched)}"
        raise _misfit(path, f"changes {len(layers)} layers, of which the model has {count}; it lacks, for one, {example}")
    takers: dict[str, str] = {}
    for layer in layers:
        for real in table[layer]:
            if real in takers:
                raise _misfit(path, f"has two styles for the layer {real}: {takers[real]} and {layer}", _FETCH)
            takers[real] = layer


def _unite(path: Path, layer: str, keys: Sequence[tuple[Key, Tensor]]) -> dict[str, Tensor]:
    """The tensors of one layer by part. Refuses two styles, and two tensors for one part."""
    spellings = sorted({key.spelling for key, _ in keys if key.spelling})
    parts = {key.part: tensor for key, tensor in keys}
    if len(spellings) > 1:
        raise _misfit(path, f"has two styles for the layer {layer}: {' and '.join(spellings)}", _FETCH)
    if len(parts) < len(keys) or {"dora_scale", "magnitude"} <= parts.keys():
        raise _misfit(path, f"holds one thing twice for {layer}: {', '.join(sorted(key.part for key, _ in keys))}", _FETCH)
    return parts


def _read_layer(layer: Layer, parameters: Mapping[str, Tensor], config: Mapping[str, Any]) -> list[Change]:
    """One layer's changes: of its weight, of its bias, or of both."""
    changes = []
    if layer.parts.keys() - {"diff_b"}:
        kind = _find_kind(layer)
        weights = _check_shape(layer, "weight", kind, parameters)
        scale, magnitude = _read_scale(layer, kind, config), _read_magnitude(layer, kind, weights, parameters)
        changes.append(Change(weights, kind, layer.parts, scale, magnitude))
    if "diff_b" in layer.parts:
        biases = _check_shape(layer, "bias", BIAS_DIFF, parameters)
        changes.append(Change(biases, BIAS_DIFF, layer.parts))
    return changes


def _find_kind(layer: Layer) -> Kind:
    found = {part for part in layer.parts if part not in _ASIDE}
    if not found:
        raise _misfit(layer.path, f"has nothing but {', '.join(sorted(layer.parts))} for {layer.name}", _FETCH)
    kind = min(KINDS, key=lambda kind: (not kind.parts & found, len(kind.parts ^ found)))
    if missing := sorted(kind.parts - found):
        raise _misfit(layer.path, f"lacks {', '.join(missing)} for {layer.name}", _FETCH)
    if extra := sorted(found - kind.parts):
        raise _misfit(layer.path, f"holds {', '.join(extra)} for {layer.name} beside {', '.join(sorted(kind.parts))}", _FETCH)
    return kind


def _check_shape(layer: Layer, leaf: str, kind: Kind, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the parameters that a change of this kind fits. leaf: "weight" or "bias"."""
    names = tuple(f"{real}.{leaf}" for real in layer.reals)
    if missing := [name for name in names if name not in parameters]:
        raise _misfit(layer.path, f"changes {missing[0]}, which the model lacks")
    if odd := [name for name in names if parameters[name].dtype not in PLAIN_DTYPES]:
        raise _misfit(layer.path, f"changes {odd[0]}, which is quantized", "Use the BF16 weights.")
    wanted, found = _stacked_shape(names, parameters), _product_shape(kind, layer.parts)
    if found is None:
        shapes = ", ".join(f"{part} {tuple(layer.parts[part].shape)}" for part in sorted(kind.parts))
        raise _misfit(layer.path, f"has shapes that do not pair for {layer.name}: {shapes}", _FETCH)
    if found != wanted:
        raise _misfit(layer.path, f"changes the {leaf} of {layer.name} as {found}; the model has {wanted}")
    return names


def _stacked_shape(names: Sequence[str], parameters: Mapping[str, Tensor]) -> tuple[int, ...]:
    return (sum(len(parameters[name]) for name in names), *parameters[names[0]].shape[1:])


def _product_shape(kind: Kind, parts: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The shape of D; None where its tensors cannot be multiplied."""
    factors = [[tuple(parts[name].shape) for name in names] for names in kind.factors]
    if len(factors) == len(factors[0]) == 1:
        return factors[0][0]
    if any(len(shape) != 2 for factor in factors for shape in factor):
        return None
    if any(len(factor) == 2 and factor[0][1] != factor[1][0] for factor in factors):
        return None
    shapes = [(factor[0][0], factor[-1][1]) for factor in factors]
    if kind is LOHA and shapes[0] != shapes[1]:
        return None
    return (math.prod(rows for rows, _ in shapes), math.prod(columns for _, columns in shapes)) if kind in LOKR else shapes[0]


def _read_scale(layer: Layer, kind: Kind, config: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA. alpha: the layer's own tensor, else the metadata's."""
    alpha = _read_alpha(layer, config)
    ranks = {len(layer.parts[names[1]]) for names in kind.factors if len(names) == 2}
    if len(ranks) > 1:
        raise _misfit(layer.path, f"has the ranks {sorted(ranks)} for {layer.name}, wanted one", _FETCH)
    if not ranks:
        return 1.0
    rank = ranks.pop()
    told_rank = choose_by_pattern(config.get("rank_pattern", {}), layer.name, config.get("r"))
    if told_rank not in (None, rank):
        raise _misfit(layer.path, f"has the rank {rank} for {layer.name}, and {told_rank} in its metadata", _FETCH)
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_alpha(layer: Layer, config: Mapping[str, Any]) -> float | None:
    told = choose_by_pattern(config.get("alpha_pattern", {}), layer.name, config.get("lora_alpha"))
    if "alpha" not in layer.parts:
        return told
    alpha = layer.parts["alpha"]
    if alpha.numel() != 1:
        raise _misfit(layer.path, f"has an alpha of shape {tuple(alpha.shape)} for {layer.name}, wanted one number", _FETCH)
    value = float(alpha.item())
    if told is not None and told != value:
        raise _misfit(layer.path, f"has the alpha {value:g} for {layer.name}, and {told:g} in its metadata", _FETCH)
    return value


def _read_magnitude(layer: Layer, kind: Kind, weights: Sequence[str], parameters: Mapping[str, Tensor]) -> Tensor | None:
    """DoRA's m as (N, 1) or (1, K).

    LyCORIS writes (N, 1) or (1, K), which tells the axis even for a square weight. PEFT's vector has one value for each row
    by convention. A bare dora_scale is told by its length, and refused where N = K leaves two readings.
    """
    found = layer.parts.get("magnitude", layer.parts.get("dora_scale"))
    if found is None:
        return None
    shape, wanted = tuple(found.shape), _stacked_shape(weights, parameters)
    if len(wanted) != 2 or kind is SET:
        raise _misfit(layer.path, f"has a magnitude for {layer.name}, which is a vector or replaced", _FETCH)
    rows, columns = wanted
    if shape == (rows,) and rows == columns and "dora_scale" in layer.parts:
        readings = f"has a dora_scale {shape} for {layer.name} {wanted}: by rows or by columns"
        raise _misfit(layer.path, readings, f"Use a LoRA that stores it as {(rows, 1)} or {(1, columns)}.")
    if shape in ((rows,), (rows, 1)):
        return found.reshape(rows, 1)
    if shape in ((columns,), (1, columns)) and "dora_scale" in layer.parts:
        return found.reshape(1, columns)
    raise _misfit(layer.path, f"has a magnitude {shape} for {layer.name}; the model has {wanted}")


def _misfit(path: Path, found: str, fix: str = _FIX) -> WeightsMismatchError:
    return WeightsMismatchError(f"The LoRA {path} {found}.", fix)
