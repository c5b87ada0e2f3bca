"""A transformer into another format: read, changed by LoRAs, quantized and written one tensor at a time.

The matrices of the blocks become 8-bit codes with one FP32 scale a row (formats/quantize.py), stored as X.weight and
X.weight_scale, the schemes "fp8 per row" and "int8 per row" of schemes.py; all else is BF16. Codes that a source has already
are copied, as a round trip would lose bits for nothing. Nothing that comes out depends on the time, or on where files lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from millicent.checkpoint.architecture import transformer_tensors
from millicent.checkpoint.converted import TABLE_PREFIX, ConvertedMetadata, sees_timestep_alone, without_modulation
from millicent.checkpoint.decode import read_codes
from millicent.checkpoint.files import JoinedSource
from millicent.checkpoint.folder import show_some
from millicent.checkpoint.load import MappedFiles, read_matrix, read_vector
from millicent.checkpoint.lora import Change, fuse, read_loras
from millicent.checkpoint.lora_keys import name_table
from millicent.checkpoint.recognize import Component
from millicent.checkpoint.write import Entry, ResumableFile, outline
from millicent.errors import CheckpointError, OutputError
from millicent.formats.quantize import CODE_DTYPES, RowFormat, quantize_rows

Format = Literal["fp8", "int8", "bf16"]
FORMATS: tuple[Format, ...] = ("fp8", "int8", "bf16")
OnUnit = Callable[[int, int], None]  # how many units are done, and how many there are

_STORED_CODES: dict[RowFormat, str] = {"fp8": "F8_E4M3", "int8": "I8"}
_SCALE = "_scale"


class Tabulator(Protocol):
    """What makes the modulation table; made in engine, where the network and its schedules can be reached."""

    @property
    def entries(self) -> Mapping[str, Mapping[str, Entry]]:
        """By the module that a part of the table stands in for, the tensors that are stored for it."""
        ...

    def make(self, module: str, parameter: Callable[[str], Tensor]) -> Mapping[str, Tensor]:
        """The tensors of one module's entries; parameter: a network's parameter by name as a file keeps it, BF16."""
        ...


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is asked for. tabulator: None for no table. metadata: what the file will say of itself."""

    format: Format
    loras: tuple[tuple[Path, float], ...]
    tabulator: Tabulator | None
    metadata: ConvertedMetadata


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """One weight matrix. error: ||W' - W|| / ||W||, of W with the LoRAs in it. is_copied: its codes are the source's."""

    name: str
    format: Format
    error: float
    is_copied: bool
    is_fused: bool


@dataclass(frozen=True, slots=True)
class Report:
    """layers: every matrix. counts: parameters by what they are stored as, and how many are left out.

    resumed_units: of an interrupted run. started_anew: whether an interrupted run's work did not fit and was thrown away.
    """

    target: Path
    layers: tuple[ConvertedLayer, ...]
    counts: Mapping[str, int]
    table_tensors: int
    bytes_before: int
    bytes_after: int
    units: int
    resumed_units: int
    started_anew: bool


class StoredParameters(Mapping[str, Tensor]):
    """The parameters of a stored transformer by their full names, FP32, each read when it is asked for."""

    def __init__(self, component: Component, source: JoinedSource) -> None:
        assert component.layout is not None
        self._layout, self._source = component.layout, source
        self._owners = {name: layer for layer, stored in self._layout.matrices.items() for name in stored.parameters}
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __getitem__(self, name: str) -> Tensor:
        # a new map for each: what a map has read counts as our memory until it is closed
        files = MappedFiles(self._source)
        if name in self._layout.vectors:
            return read_vector(name, self._layout.vectors[name], files).float()
        layer = self._owners[name]
        if self._last[0] != layer:  # a layer that packs several parameters is read once
            self._last = (layer, read_matrix(layer, self._layout.matrices[layer], files))
        return self._last[1][name].float()

    def __iter__(self) -> Iterator[str]:
        return iter({**self._layout.vectors, **self._owners})

    def __len__(self) -> int:
        return len(self._layout.vectors) + len(self._owners)

    def codes(self, name: str, row_format: RowFormat) -> tuple[Tensor, Tensor] | None:
        """The stored codes (N, K) and scales (N, 1) of a weight, if it has them in this format already."""
        layer = self._owners[name]
        stored = self._layout.matrices[layer]
        found = read_codes(layer, stored, MappedFiles(self._source).parts(stored)) if stored.parameters == (name,) else None
        if found is None or found[0].dtype != CODE_DTYPES[row_format]:
            return None
        return found[0], found[1].expand(stored.shape[0], 1)


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter becomes codes: the matrices within the blocks, which are 98 % of what is computed with.

    Norms and biases are vectors, and small. What stands before and after the blocks is small too, and its errors reach every
    block, or the picture, undamped. Modulation scales and shifts whole channels of every token at once: its errors do not
    average out over tokens, and with a table it is not there at all.
    """
    return name.startswith("transformer_blocks.") and len(shape) == 2 and not sees_timestep_alone(name)


def convert_transformer(
    component: Component, source: JoinedSource, target: Path, asked: Conversion, on_unit: OnUnit | None = None
) -> Report:
    """Write the transformer as `target`, which must not be there yet or may be replaced.

    Peak memory: a few times the largest matrix in FP32, 226 MB each, and the LoRAs' factors. A run that was killed is gone on
    with where the same is asked for again; the bytes are those of a run in one go.
    Raises CheckpointError and its kinds for a source or a LoRA that cannot be read, OutputError for a disk without room.
    """
    expected = transformer_tensors(component.config)
    kept = expected if asked.metadata.modulation_weights else without_modulation(expected)
    modules = {} if asked.tabulator is None else asked.tabulator.entries
    entries = {key: entry for name, shape in kept.items() for key, entry in _entries(name, shape, asked.format).items()}
    entries |= {key: entry for of_module in modules.values() for key, entry in of_module.items()}
    converter = _Converter(asked, StoredParameters(component, source), read_changes(component, asked.loras), expected)
    # a module's parameters lie together in the list
    units = {unit: tuple(names) for unit, names in groupby(kept, key=lambda name: name.rpartition(".")[0])}
    table_units = {TABLE_PREFIX + module: module for module in modules}
    plan = outline(entries, asked.metadata.to_header())
    with ResumableFile(target, plan, _inputs(source)) as file:
        resumed, started_anew, count = len(file.done), file.started_anew, len(units) + len(table_units)
        for number, unit in enumerate([*units, *table_units], 1):
            if unit not in file.done:
                if unit in table_units:
                    converter.write_table(table_units[unit], file)
                told = [asdict(layer) for name in units.get(unit, ()) for layer in converter.write(name, file)]
                file.finish_unit(unit, told)
            if on_unit is not None:
                on_unit(number, count)
        file.publish()
        told_layers = tuple(ConvertedLayer(**layer) for unit in units for layer in file.done[unit])
    counts: Counter[str] = Counter(asked.format if is_quantized(name, shape) else "bf16" for name, shape in kept.items())
    return Report(
        target=target,
        layers=told_layers,
        counts={**counts, "left out": len(expected) - len(kept)},
        table_tensors=sum(len(of_module) for of_module in modules.values()),
        bytes_before=sum(info.end - info.begin for info in component.tensors.values()),
        bytes_after=plan.size_bytes,
        units=count,
        resumed_units=resumed,
        started_anew=started_anew,
    )


def read_changes(component: Component, loras: Sequence[tuple[Path, float]]) -> dict[str, list[tuple[Change, float]]]:
    """What LoRAs do to each parameter. Raises as checkpoint.lora.fuse_loras; nothing is read of the transformer itself."""
    expected = transformer_tensors(component.config)
    blank = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    return read_loras(loras, blank, name_table([name.removesuffix(".weight") for name in expected if name.endswith(".weight")]))


def _entries(name: str, shape: tuple[int, ...], wanted: Format) -> dict[str, Entry]:
    if wanted == "bf16" or not is_quantized(name, shape):
        return {name: Entry("BF16", shape)}
    return {name: Entry(_STORED_CODES[wanted], shape), name + _SCALE: Entry("F32", (shape[0], 1))}


def _inputs(source: JoinedSource) -> dict[str, object]:
    """What the bytes depend on beside what the header says. A file that is written again has another time."""
    files = []
    for file in source.files:
        try:
            stat = Path(file.name).stat()
        except OSError as error:
            raise CheckpointError(f"{file.name} is not on this machine.", "Download it first.") from error
        files.append([str(Path(file.name).resolve()), stat.st_size, stat.st_mtime_ns])
    return {"files": files, "torch": torch.__version__}


@dataclass(frozen=True, slots=True)
class _Converter:
    """Makes each parameter and writes it. changes: what LoRAs do to each."""

    asked: Conversion
    parameters: StoredParameters
    changes: Mapping[str, Sequence[tuple[Change, float]]]
    shapes: Mapping[str, tuple[int, ...]]

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """FP32, with the LoRAs in it."""
        return fuse(name, self.changes[name], self.parameters) if name in self.changes else self.parameters[name]

    def plain(self, name: str) -> Tensor:
        return self.weight(name).to(torch.bfloat16)

    def write(self, name: str, file: ResumableFile) -> list[ConvertedLayer]:
        """Write one parameter; tells of it if it is a matrix."""
        is_matrix, wanted = len(self.shapes[name]) == 2, self.asked.format
        if wanted == "bf16" or not is_quantized(name, self.shapes[name]):
            weight = self.weight(name)
            made = weight.to(torch.bfloat16)
            file.write(name, made)
            return [self._tell(name, "bf16", _relative_error(made.float(), weight))] if is_matrix else []
        copied = None if name in self.changes else self.parameters.codes(name, wanted)
        if copied is not None:
            codes, scale = copied
            error = 0.0
        else:
            weight = self.weight(name)
            codes, scale = quantize_rows(weight, wanted)
            error = _relative_error(codes.float().mul_(scale), weight)
        file.write(name, codes)
        file.write(name + _SCALE, scale)
        return [self._tell(name, wanted, error, is_copied=copied is not None)]

    def _tell(self, name: str, stored_as: Format, error: float, is_copied: bool = False) -> ConvertedLayer:
        return ConvertedLayer(name.removesuffix(".weight"), stored_as, error, is_copied, name in self.changes)

    def write_table(self, module: str, file: ResumableFile) -> None:
        assert self.asked.tabulator is not None
        for key, tensor in self.asked.tabulator.make(module, self.plain).items():
            file.write(key, tensor)


def _relative_error(made: Tensor, weight: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(weight))
    return float(torch.linalg.vector_norm(made.sub_(weight))) / norm if norm else 0.0


def check_whole(component: Component, name: str) -> None:
    """Raises CheckpointError for a file that was converted before and has left out what a new one is made of."""
    assert component.layout is not None
    held = {*component.layout.vectors, *(key for stored in component.layout.matrices.values() for key in stored.parameters)}
    if missing := sorted(transformer_tensors(component.config).keys() - held):
        raise CheckpointError(f"{name} was converted and left out {show_some(missing)}.", "Convert the model that it was made of.")


def check_target(target: Path, overwrite: bool) -> None:
    """Raises OutputError for a target that is there already, or has no folder to be in."""
    if target.exists() and not overwrite:
        raise OutputError(f"{target} is there already.", "Choose another name, or give --overwrite.")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"The folder {target.parent} is missing.", "Make it first.")
