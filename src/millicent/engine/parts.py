"""The parts of a model before they are loaded: which files they come from, and whether they belong together and fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from millicent.checkpoint.architecture import transformer_tensors
from millicent.checkpoint.canary import check_magnitudes, compare_with_base, decide_by_base
from millicent.checkpoint.converted import sees_timestep_alone
from millicent.checkpoint.files import JoinedSource
from millicent.checkpoint.folder import read_json
from millicent.checkpoint.layout import StoredMatrix
from millicent.checkpoint.lora import lightning_steps
from millicent.checkpoint.recognize import Component, Distilled, Network, Recognized, recognize
from millicent.checkpoint.schemes import keeps_codes
from millicent.engine.planner import FORMAT_BYTES, Plan
from millicent.errors import CheckpointError, IncompleteModelError, InputNotFoundError, MachineError
from millicent.facts.models import ModelCard
from millicent.hardware.memory import free_host_bytes

NETWORKS: tuple[Network, ...] = ("transformer", "vae", "text_encoder")
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class FoundPart:
    component: Component
    source: JoinedSource
    distilled: Distilled | None
    warnings: tuple[str, ...] = ()

    @property
    def paths(self) -> list[Path]:
        return [Path(file.name) for file in self.source.files]


def find_part(network: Network, folder: Path, file: Path | None, model: Path) -> FoundPart:
    """Recognize the part of a model folder, or the file that stands in for it.

    A file's weights are compared with the folder's own, where the folder has them plain: then a layout that was read wrongly shows.
    Without them only what is beyond all reason does.
    Raises CheckpointError and its kinds.
    """
    if file is None:
        recognized = recognize(folder)
        return FoundPart(_only(recognized, network), recognized.source, recognized.distilled, recognized.warnings)
    base = _plain_base(folder, network)
    decide = None if base is None else decide_by_base(file, base.components[network], base.source)
    recognized = recognize(file, decide=decide)
    component = _only(recognized, network)
    if network == "transformer":
        _check_variant(component, recognized.name, model)
    warnings = list(recognized.warnings)
    if base is not None and component.layout is not None:
        match = compare_with_base(component, recognized.source, base.components[network], base.source)
        if match.verdict == "fine-tuned":
            told = f"by {match.error:.1%} in {match.layer}, which is more than its format explains"
            warnings.append(f"{recognized.name} differs from {model} as a fine-tune does: {told}.")
    elif network == "transformer":
        check_magnitudes(component, recognized.source)
    return FoundPart(component, recognized.source, recognized.distilled, tuple(warnings))


def _only(recognized: Recognized, network: Network) -> Component:
    if network not in recognized.components:
        what, wanted = (part.replace("_", " ").replace("lora", "LoRA").replace("vae", "VAE") for part in (recognized.part, network))
        raise CheckpointError(f"{recognized.name} is a {what}, not a {wanted}.", "Give a file that is one.")
    return recognized.components[network]


def _plain_base(folder: Path, network: Network) -> Recognized | None:
    """The folder's own weights, if it has any and they are plain; a folder may be there for its configs alone."""
    try:
        base = recognize(folder)
    except IncompleteModelError:
        return None
    layout = base.components[network].layout if network in base.components else None
    return base if layout is not None and set(layout.schemes) == {"plain"} else None


def _check_variant(component: Component, name: str, model: Path) -> None:
    said = bool(read_json(model / "transformer" / "config.json").get("zero_cond_t", False))
    if component.zero_cond_t is not None and component.zero_cond_t != said:
        kinds = {True: "Qwen-Image-Edit-2511", False: "Qwen-Image-Edit or -2509"}
        raise CheckpointError(
            f"{name} says that it is {kinds[component.zero_cond_t]}; {model} is {kinds[said]}.", "Use the folder of the same model."
        )


def with_distillation(card: ModelCard, fused: int | None, own: Sequence[Path], loras: Sequence[tuple[Path, float]]) -> ModelCard:
    """The card, as a distilled transformer (of `fused` steps) or a Lightning LoRA wants the model to be used.

    Raises CheckpointError for more than one of them.
    """
    for lora, _ in loras:
        if not lora.is_file():
            raise InputNotFoundError(f"There is no LoRA {lora}.", "Check the path.")
    brought = [(lora.name, steps) for lora, _ in loras if (steps := lightning_steps(lora))]
    distilled = [*(lora.name for lora in own if lightning_steps(lora)), *(name for name, _ in brought)]
    distilled += ["the transformer itself"] if fused else []
    if len(distilled) > 1:
        raise CheckpointError(
            f"{' and '.join(distilled)} are each distilled for few steps; one alone makes a model draw in few steps, two ruin it.",
            "Leave one out; the demo without its own is demo-base.",
        )
    steps = fused or (brought[0][1] if brought else None)
    return dataclasses.replace(card, steps=steps, schedule="lightning", true_cfg=1.0) if steps else card


def fused_steps(found: Distilled | None, said_steps: int | None) -> int | None:
    """How many steps a transformer is distilled for; said_steps: what the caller says, 0 for none.

    Raises CheckpointError for a file whose name alone says that it is distilled, until the caller says so too.
    """
    if said_steps is not None:
        return said_steps or None
    if found is None:
        return None
    if found.is_certain:
        return found.steps
    raise CheckpointError(
        f"The transformer seems to be distilled for few steps: {found.because}. Drawn with the wrong schedule it draws grids.",
        f"Say --distilled {found.steps or 4} if it is, or --distilled 0 if it is not.",
    )


def check_memory(
    parts: Sequence[FoundPart], keep_codes: bool, dtype: torch.dtype, device: torch.device, plan: Plan | None = None
) -> None:
    """Raises MachineError where the weights alone are more than the device has free. plan: None for the plain networks."""
    needed = sum(_needed_bytes(part.component, keep_codes, dtype, plan) for part in parts)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
    if needed > free:
        raise MachineError(
            f"The weights take {needed / _GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}, and {free / _GIB:.1f} GiB are free.",
            "Use a card with more memory, or weights in FP8 or INT8, which are kept as they are.",
        )


def expanded_bytes(part: FoundPart, keep_codes: bool, dtype: torch.dtype) -> int:
    """Of the host's memory, what a part takes beside its mapped file: its codes that do not stay as they are, multiplied out."""
    if part.component.layout is None:
        return 0
    matrices = part.component.layout.matrices.values()
    expanded = [each.shape for each in matrices if each.scheme.name != "plain" and not _is_kept(each, keep_codes)]
    return sum(rows * columns for rows, columns in expanded) * dtype.itemsize


def check_host(wanted_bytes: int, what: str) -> None:
    """Raises MachineError where the host has less memory than that, which `what` takes beside mapped files."""
    free = free_host_bytes()
    if wanted_bytes > free:
        raise MachineError(
            f"{what} takes {wanted_bytes / _GIB:.1f} GiB of this host's memory, and {free / _GIB:.1f} GiB are free.",
            "Use a host with more memory; or write the weights once as they will be (millicent convert SRC [--lora FILE] -o DST "
            "--format fp8), which takes little of it, and open what it writes.",
        )


def _needed_bytes(component: Component, keep_codes: bool, dtype: torch.dtype, plan: Plan | None) -> int:
    if plan is not None and component.network == "transformer":
        return _planned_bytes(component, plan, dtype)
    return _bytes(component, keep_codes or component.network == "text_encoder", dtype)


def _planned_bytes(component: Component, plan: Plan, dtype: torch.dtype) -> int:
    """Of a transformer in a plan's formats, whose modulation is a table of a few megabytes."""
    layers = int(component.config["num_layers"])
    total = 0.0
    for name, shape in transformer_tensors(component.config).items():
        if sees_timestep_alone(name):
            continue
        is_matrix = len(shape) == 2 and name.startswith("transformer_blocks.")
        planned = plan.format_of(name.removesuffix(".weight"), layers) if is_matrix else "bf16"
        total += math.prod(shape) * (dtype.itemsize if planned == "bf16" else FORMAT_BYTES[planned])
    return math.ceil(total)


def _bytes(component: Component, keep_codes: bool, dtype: torch.dtype) -> int:
    if component.layout is None:
        return sum(info.values for info in component.tensors.values()) * dtype.itemsize
    total = sum(info.values for info in component.layout.vectors.values()) * dtype.itemsize
    for stored in component.layout.matrices.values():
        rows, columns = stored.shape
        is_kept = _is_kept(stored, keep_codes)
        biases = rows * dtype.itemsize if len(stored.parameters) > 1 else 0
        total += rows * columns * (1 if is_kept else dtype.itemsize) + biases
    return total


def _is_kept(stored: StoredMatrix, keep_codes: bool) -> bool:
    return keep_codes and keeps_codes(stored.scheme.name, stored.parts, stored.shape, bool(stored.note.get("convrot")))


def tell_expanded(part: FoundPart, keep_codes: bool, dtype: torch.dtype) -> list[str]:
    """A line where a part's codes do not stay as they are: then it takes more memory than its file."""
    if part.component.layout is None:
        return []
    matrices = part.component.layout.matrices.values()
    # raw FP8 has a warning of its own
    expanded = [m for m in matrices if m.scheme.name not in ("plain", "raw fp8") and not _is_kept(m, keep_codes)]
    if not expanded:
        return []
    formats = " and ".join(sorted({matrix.scheme.format for matrix in expanded}))
    taken = f"{_bytes(part.component, keep_codes, dtype) / _GIB:.1f} GiB in {str(dtype).removeprefix('torch.')}"
    return [f"The {part.component.network.replace('_', ' ')} is stored as {formats} and expanded: it takes {taken}."]
