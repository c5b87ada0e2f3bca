"""A recognized network's parameters into memory: decoded one matrix at a time, checked, and all of them or none.

Where a file holds 8-bit codes with one scale, or one for each row, which are also formats of ours, its codes and scales are
kept as they are: a round trip through BF16 would lose bits for nothing.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from millicent.checkpoint.decode import decode_stored, read_codes
from millicent.checkpoint.files import JoinedSource
from millicent.checkpoint.folder import FETCH_AGAIN, show_some
from millicent.checkpoint.header import TensorInfo
from millicent.checkpoint.layout import Joined, Layout, StoredMatrix
from millicent.checkpoint.recognize import Component
from millicent.errors import CheckpointError, WeightsMismatchError
from millicent.formats.scaled import ScaledLinear

# safetensors' names; block types of GGUF stay bytes
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.uint8,  # exponents, read as numbers by the formats that have them
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MappedFiles:
    """Tensors of files here, mapped rather than copied: what is never touched is never read."""

    def __init__(self, source: JoinedSource) -> None:
        self._source = source
        self._maps: dict[str, mmap.mmap] = {}

    def tensor(self, info: TensorInfo) -> Tensor:
        """The tensor as it is stored: (bytes,) uint8 for GGUF's block types."""
        dtype = TORCH_DTYPES.get(info.dtype)
        shape = info.shape if dtype is not None else (info.end - info.begin,)
        dtype = dtype or torch.uint8
        if not info.values:
            return torch.empty(shape, dtype=dtype)
        file, begin = self._source.locate(info.begin)
        data = torch.frombuffer(self._map(file.name), dtype=torch.uint8, count=info.end - info.begin, offset=begin)
        # a view in another dtype must begin at a multiple of its size, which a header does not promise
        data = data if data.data_ptr() % dtype.itemsize == 0 else data.clone()
        return data.view(dtype).reshape(shape)

    def parts(self, stored: StoredMatrix) -> dict[str, Tensor]:
        return {suffix: self.tensor(info) for suffix, info in stored.parts.items()}

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            try:
                with Path(name).open("rb") as file:
                    # private and copy-on-write: torch wants memory that it may write to, the file stays as it is
                    self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise CheckpointError(
                    f"{name} cannot be read: {error.strerror}.", "Give a file that is on this machine."
                ) from error
        return self._maps[name]


def read_parameters(component: Component, source: JoinedSource) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its full name, one stored tensor at a time: plain ones mapped as they are, decoded ones in FP32.

    Raises CheckpointError for a value that cannot be.
    """
    files = MappedFiles(source)
    if component.layout is None:
        for key, info in component.tensors.items():
            yield key, _check_finite(key, files.tensor(info))
        return
    yield from _join_pieces(_read_stored(component.layout, files), component.layout.joined)


def _read_stored(layout: Layout, files: MappedFiles) -> Iterator[tuple[str, Tensor]]:
    for key, info in layout.vectors.items():
        yield key, read_vector(key, info, files)
    for layer, stored in layout.matrices.items():
        yield from read_matrix(layer, stored, files).items()


def _join_pieces(parameters: Iterable[tuple[str, Tensor]], joined: Mapping[str, Joined]) -> Iterator[tuple[str, Tensor]]:
    """Parameters as they come, those in pieces as soon as the last piece is there: in the widest dtype of its pieces."""
    owners = {piece: key for key, join in joined.items() for piece in join.pieces}
    held: dict[str, Tensor] = {}
    for name, tensor in parameters:
        if name not in owners:
            yield name, tensor
            continue
        held[name] = tensor
        join = joined[owners[name]]
        if all(piece in held for piece in join.pieces):
            yield owners[name], torch.stack([held.pop(piece) for piece in join.pieces], join.axis).reshape(join.shape)
    assert not held, sorted(held)


def read_vector(key: str, info: TensorInfo, files: MappedFiles) -> Tensor:
    """A norm or bias; where a whole file was cast to FP8, they are FP8 too."""
    tensor = files.tensor(info)
    return _check_finite(key, tensor.float() if tensor.element_size() == 1 else tensor)


def read_matrix(layer: str, stored: StoredMatrix, files: MappedFiles) -> dict[str, Tensor]:
    """What one stored matrix yields, by parameter."""
    if stored.scheme.name == "plain":
        return {f"{layer}.weight": _check_finite(f"{layer}.weight", files.tensor(stored.parts["weight"]))}
    return decode_stored(layer, stored, files.parts(stored))


def _check_finite(key: str, tensor: Tensor) -> Tensor:
    # the extremes alone tell, and take no second tensor; empty ones have none
    if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
        raise CheckpointError(f"{key} holds values that are not finite.", FETCH_AGAIN)
    return tensor


def load_network(
    module: nn.Module,
    component: Component,
    source: JoinedSource,
    dtype: torch.dtype,
    keep_codes: bool,
    *,
    checks_codes: bool = True,
) -> int:
    """Fill a module that was built on the meta device; returns how many of its linears hold 8-bit codes.

    dtype: what all that is not kept as codes becomes. keep_codes: keep codes and scales where the file holds such as are ours.
    checks_codes: False reads nothing of codes that are kept; whoever reads them has to see that each is a number.
    Raises CheckpointError for a value that cannot be, WeightsMismatchError where the module has other parameters.
    """
    if component.layout is None or not keep_codes:
        state = {key: tensor.to(dtype) for key, tensor in read_parameters(component, source)}
        fill(module, state, source.name)
        return 0
    files = MappedFiles(source)
    state = {key: read_vector(key, info, files).to(dtype) for key, info in component.layout.vectors.items()}
    linears = {name for name, submodule in module.named_modules() if isinstance(submodule, nn.Linear)}
    kept = 0
    for layer, stored in component.layout.matrices.items():
        codes = read_codes(layer, stored, files.parts(stored), checks=checks_codes) if layer in linears else None
        if codes is None:
            state |= {key: tensor.to(dtype) for key, tensor in read_matrix(layer, stored, files).items()}
            continue
        linear = ScaledLinear(*codes, state.get(f"{layer}.bias"))
        module.set_submodule(layer, linear)
        state |= {f"{layer}.{name}": buffer for name, buffer in linear.named_buffers()}
        kept += 1
    fill(module, dict(_join_pieces(state.items(), component.layout.joined)), source.name)
    return kept


def check_codes(component: Component, source: JoinedSource) -> None:
    """Read all codes that load_network keeps unread where it is told to. Raises CheckpointError, which names the layer."""
    files = MappedFiles(source)
    for layer, stored in component.layout.matrices.items() if component.layout is not None else ():
        read_codes(layer, stored, files.parts(stored))


def fill(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Put tensors into a module that was built on the meta device; nothing is copied.

    Raises WeightsMismatchError if one is missing, left over or of another shape.
    """
    wanted = module.state_dict()
    faults = {
        "missing": sorted(wanted.keys() - state.keys()),
        "not wanted": sorted(state.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(tensor.shape)}"
            for key, tensor in wanted.items()
            if key in state and state[key].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(keys)} {fault}: {show_some(keys)}" for fault, keys in faults.items() if keys)
        raise WeightsMismatchError(f"{name} does not fit its config.json: {told}.", FETCH_AGAIN)
    module.load_state_dict(dict(state), assign=True)
    module.requires_grad_(False)
