"""`millicent convert`: a model folder, or a transformer file, into another format.

Here is decided what goes into the new file: which LoRAs, whether its schedule allows a modulation table, and what it says of
itself. checkpoint/convert.py makes the file. A folder's other parts are copied as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from millicent.checkpoint.convert import (
    Conversion,
    Format,
    OnUnit,
    Report,
    check_target,
    check_whole,
    convert_transformer,
    read_changes,
)
from millicent.checkpoint.converted import ConvertedMetadata, FusedLora
from millicent.checkpoint.digests import file_sha256
from millicent.checkpoint.files import JoinedSource
from millicent.checkpoint.folder import open_folder, read_json
from millicent.checkpoint.recognize import Component, Distilled, recognize
from millicent.engine.editor import find_model
from millicent.engine.modulation import LightningTable
from millicent.engine.parts import find_part, fused_steps, with_distillation
from millicent.engine.rewrite import check_replaceable, copy_parts, publish_folder, working_folder
from millicent.errors import CheckpointError, IncompleteModelError, OutputError, ScheduleError
from millicent.facts.models import ModelCard, find_card
from millicent.model.config import MMDiTConfig

TRANSFORMER_FILE = Path("transformer") / "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """loras: files, each with its strength, beside the one that the model's card names.

    steps: of the Lightning schedule that the table is for; None for those that the model is distilled for. keep_modulation:
    keep the weights that a table makes superfluous, so that any schedule can be drawn. distilled_steps: as Editor.open's.
    zero_cond_t: whether a transformer's file of which nothing tells is 2511's kind.
    """

    format: Format
    loras: tuple[tuple[Path, float], ...] = ()
    steps: int | None = None
    keep_modulation: bool = False
    distilled_steps: int | None = None
    zero_cond_t: bool | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class _Found:
    """The transformer to convert. folder: of the whole model; None for a file alone. own_lora: the one that the card names."""

    name: str
    component: Component
    source: JoinedSource
    distilled: Distilled | None
    card: ModelCard
    zero_cond_t: bool | None
    folder: Path | None = None
    own_lora: Path | None = None


def convert(source: str | Path, target: Path, request: ConvertRequest, on_unit: OnUnit | None = None) -> Report:
    """Convert a model folder, or the demo by its name, to the folder `target`, or a transformer's file to the file `target`.

    Raises CheckpointError and its kinds for a source or a LoRA that cannot be used, ScheduleError for a table that cannot be,
    OutputError for a target that is in the way, cannot be written or finds no room.
    """
    check_target(target, request.overwrite)
    found = _find_file(Path(source), request.zero_cond_t) if Path(source).is_file() else _find_model(source)
    if request.zero_cond_t not in (None, found.zero_cond_t):
        raise CheckpointError(f"{source} says of itself that zero_cond_t is {found.zero_cond_t}.", "Leave that option out.")
    check_whole(found.component, found.source.name)
    asked, card = _plan(found, request)
    inputs = [*(Path(file.name) for file in found.source.files), *(lora for lora, _ in asked.loras)]
    try:
        if found.folder is None:
            _check_file(target, inputs)
            return convert_transformer(found.component, found.source, target, asked, on_unit)
        check_replaceable(target, [found.folder, *inputs])
        read_changes(found.component, asked.loras)  # a LoRA that does not fit should not cost the copies
        return _convert_folder(found, found.folder, target, asked, card, on_unit)
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {error}.", "Mend that and run the same again: it goes on where it was."
        ) from error


def _convert_folder(
    found: _Found, folder: Path, target: Path, asked: Conversion, card: ModelCard, on_unit: OnUnit | None
) -> Report:
    work = working_folder(target)
    # before the transformer: when that is whole, nothing is left to be interrupted
    copy_parts(folder, work, replace(card, lora=None), TRANSFORMER_FILE)
    report = convert_transformer(found.component, found.source, work / TRANSFORMER_FILE, asked, on_unit)
    publish_folder(work, target)
    return replace(report, target=target)


def _find_file(path: Path, said_zero_cond_t: bool | None) -> _Found:
    recognized = recognize(path)
    if "transformer" not in recognized.components:
        what = recognized.part.replace("_", " ")
        raise CheckpointError(f"{path} is a {what}, and a transformer is wanted.", "Give a transformer, or a model's folder.")
    component = recognized.components["transformer"]
    zero_cond_t = said_zero_cond_t if component.zero_cond_t is None else component.zero_cond_t
    # of a card only the base schedule matters here, which all the published ones have
    card = find_card("qwen-image-edit-2511" if zero_cond_t else "qwen-image-edit-2509")
    return _Found(path.name, component, recognized.source, recognized.distilled, card, zero_cond_t)


def _find_model(source: str | Path) -> _Found:
    name, folder, card = find_model(source)
    open_folder(folder)
    part = find_part("transformer", folder / "transformer", None, folder)
    zero_cond_t = bool(read_json(folder / "transformer" / "config.json").get("zero_cond_t", False))
    own_lora = None if card.lora is None else folder / card.lora
    return _Found(name, part.component, part.source, part.distilled, card, zero_cond_t, folder, own_lora)


def _check_file(target: Path, inputs: Sequence[Path]) -> None:
    if target.suffix != ".safetensors" or target.is_dir():
        raise OutputError(f"{target} is no name for a transformer's file.", "Give a name that ends in .safetensors.")
    if target.exists() and any(target.samefile(path) for path in inputs):
        raise OutputError(f"{target} is one of the inputs, and writing would replace it.", "Choose another name.")


def _plan(found: _Found, request: ConvertRequest) -> tuple[Conversion, ModelCard]:
    """What to make, and the card of what comes out."""
    fused = fused_steps(found.distilled, request.distilled_steps)
    own = [] if found.own_lora is None or fused else [found.own_lora]
    for lora in own:
        if not lora.is_file():
            raise IncompleteModelError(
                f"The LoRA {lora}, which the model's card names, is missing.", "Fetch the whole model again."
            )
    card = with_distillation(found.card, fused, own, request.loras)
    loras = (*((lora, 1.0) for lora in own), *request.loras)
    steps = _table_steps(found, card, request)
    # what is drawn without being asked for must be what the table holds
    card = card if steps is None else replace(card, steps=steps)
    metadata = ConvertedMetadata(
        format=request.format,
        distilled_steps=card.steps if card.schedule == "lightning" else 0,
        schedule=card.schedule,
        steps=steps,
        modulation_table=steps is not None,
        modulation_weights=request.keep_modulation,
        zero_cond_t=found.zero_cond_t,
        source=found.name,
        loras=tuple(FusedLora(lora.name, file_sha256(lora), strength) for lora, strength in sorted(loras)),
    )
    table = None
    if steps is not None:
        config = {key: value for key, value in found.component.config.items() if key != "quantization_config"}
        table = LightningTable(MMDiTConfig.from_dict({**config, "zero_cond_t": found.zero_cond_t}), card.schedule, steps)
    return Conversion(request.format, loras, table, metadata), card


def _table_steps(found: _Found, card: ModelCard, request: ConvertRequest) -> int | None:
    """The steps of the table; None for no table, which is for a model that is not distilled and keeps its modulation weights."""
    if card.schedule != "lightning":
        if request.keep_modulation and request.steps is None:
            return None
        raise ScheduleError(
            f"{found.name} draws on the base schedule, which depends on the picture's size: no modulation table can hold it.",
            "Add a Lightning LoRA, or give --keep-modulation and no --steps.",
        )
    if found.zero_cond_t is None:
        raise CheckpointError(
            f"Nothing in {found.name} says whether it is 2511's kind, and its modulation table depends on that.",
            "Give the model's folder, or say --zero-cond-t for 2511 and --no-zero-cond-t for 2509 and before.",
        )
    return card.steps if request.steps is None else request.steps
