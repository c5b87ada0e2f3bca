"""What can be turned off in an engine, or on: the rows of benchmarks.switches, each a model with one thing changed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import diffusers
import torch
from torch import Tensor

from benchmarks.peers import (
    SIGMA,
)
from benchmarks.systems import draw_together, forget
from benchmarks.true_size import Size, make_card, to_millicent
from millicent.edits import EditRequest
from millicent.engine import fast_vae
from millicent.engine.editor import Editor
from millicent.engine.fast_vae import CapturedVAE
from millicent.engine.laying_out import FastDrawing
from millicent.engine.loading import Model, speed_up_model
from millicent.engine.planner import EncoderFormat, Plan, plan
from millicent.engine.reading import Reader
from millicent.engine.settings import Settings
from millicent.engine.weighing import TEXT_CACHE_BYTES
from millicent.kernels import Kernels, reference
from millicent.model.layers import FinalNorm

Before = Callable[[Model], object]
Turn = Callable[[Model], AbstractContextManager[Model]]
DrawMany = Callable[[Editor, Sequence[EditRequest]], None]


@contextmanager
def as_it_is(model: Model) -> Iterator[Model]:
    yield model


def nothing(model: Model) -> None:
    pass


def draw_one_by_one(editor: Editor, requests: Sequence[EditRequest]) -> None:
    for request in requests:
        editor.edit(request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """One row: the model of its group with one thing switched.

    turn: switches it, and switches it back on leaving. before_step, before_edit: run, and counted, at the beginning of each.
    times_step, times_edit: whether it is about a step, about an edit. draw_many: how a row of pictures is drawn, where it is
    about that.
    """

    name: str
    state: Literal["baseline", "again", "off", "on"] = "off"
    turn: Turn = as_it_is
    before_step: Before = nothing
    before_edit: Before = forget
    times_step: bool = False
    times_edit: bool = True
    draw_many: DrawMany | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Switches of one model, which is opened once for them all."""

    open: Callable[[], Model]
    switches: tuple[Switch, ...]


def fast_of(model: Model) -> FastDrawing:
    assert model.fast is not None
    return model.fast


def with_network(**attributes: object) -> Turn:
    """FastMMDiT with other attributes, and none of what it has recorded with its own."""

    @contextmanager
    def turn(model: Model) -> Iterator[Model]:
        network = fast_of(model).network
        before = {name: getattr(network, name) for name in attributes}
        try:
            for name, value in attributes.items():
                setattr(network, name, value)
            network.forget()
            yield model
        finally:
            for name, value in before.items():
                setattr(network, name, value)
            network.forget()

    return turn


def make_vectors(model: Model) -> dict[str, Tensor]:
    """What a network without a table computes at every step, by module: one timestep through each modulation linear."""
    timestep = torch.tensor([SIGMA], device=model.device, dtype=model.dtype)
    img_vec, txt_vec = model.mmdit.embed(timestep, model.dtype)
    made = {}
    for name, module in fast_of(model).modulation._modules.items():
        modulate = module.modulation if isinstance(module, FinalNorm) else module
        made[name] = modulate(img_vec if name.endswith("img_mod") else txt_vec)
    return made


def forget_table(model: Model) -> None:
    fast_of(model).modulation._made.clear()


def forget_all(model: Model) -> None:
    """The table too: as many timesteps through each linear as the edit has steps, which is what no table costs."""
    forget(model)
    forget_table(model)


def forget_all_but(*kept: Literal["pictures", "openings", "embeddings", "latents"]) -> Before:
    """Before an edit: only these caches keep what earlier edits left there."""

    def before(model: Model) -> None:
        reader = model.reader
        assert reader is not None
        clears = {name: getattr(reader, name).clear for name in ("pictures", "openings", "embeddings")}
        if model.latents is not None:
            clears["latents"] = model.latents.clear
        for name, clear in clears.items():
            if name not in kept:
                clear()

    return before


@contextmanager
def with_eager_reader(model: Model) -> Iterator[Model]:
    yield dataclasses.replace(model, reader=Reader(model.text_encoder, TEXT_CACHE_BYTES, uses_graphs=False))


def with_vae(pipeline: diffusers.QwenImageEditPlusPipeline, size: Size, *, kernel: bool, graphs: bool) -> Turn:
    """A VAE that is channels-last in any case."""

    @contextmanager
    def turn(model: Model) -> Iterator[Model]:
        vae = to_millicent(pipeline, make_card(size)).vae
        assert not isinstance(vae, CapturedVAE)
        fast_vae.speed_up(vae, kernel=kernel)
        yield dataclasses.replace(model, vae=CapturedVAE(vae, graphs=graphs))

    return turn


def with_plain_vae(pipeline: diffusers.QwenImageEditPlusPipeline, size: Size) -> Turn:
    @contextmanager
    def turn(model: Model) -> Iterator[Model]:
        yield dataclasses.replace(model, vae=to_millicent(pipeline, make_card(size)).vae)

    return turn


def choose_plan(settings: Settings, device: torch.device, encoder: EncoderFormat | None = None) -> Plan:
    """encoder: the text encoder's format, where it is not the plan's own."""
    is_cuda = device.type == "cuda"
    if not is_cuda and settings.format is None:
        settings = dataclasses.replace(settings, format="bf16")
    chosen = plan(settings, torch.cuda.get_device_capability(device) if is_cuda else None, "this card")
    assert chosen is not None
    return chosen if encoder is None else dataclasses.replace(chosen, text_encoder=encoder)


@torch.inference_mode()
def open_model(pipeline: diffusers.QwenImageEditPlusPipeline, size: Size, chosen: Plan) -> Model:
    return speed_up_model(to_millicent(pipeline, make_card(size)), chosen)


@torch.inference_mode()
def open_without_reader(pipeline: diffusers.QwenImageEditPlusPipeline, size: Size, chosen: Plan) -> Model:
    """transformers runs the encoder: on a copy of its weights, so that its memory is told as the others' is."""
    encoder = to_millicent(pipeline, make_card(size)).text_encoder
    encoder.network = copy.deepcopy(encoder.network)
    return dataclasses.replace(open_model(pipeline, size, chosen), text_encoder=encoder, reader=None)


def make_groups(pipeline: diffusers.QwenImageEditPlusPipeline, size: Size) -> list[Group]:
    """Every row of this machine, the baseline first. On a CPU nothing is recorded, and the kernels are the reference's."""
    device = pipeline.transformer.device
    settings, base = Settings(), choose_plan(Settings(), device)

    def opener(chosen: Plan) -> Callable[[], Model]:
        return lambda: open_model(pipeline, size, chosen)

    on_card = device.type == "cuda"
    again = Switch(name="everything again", state="again", times_step=True)
    groups = [
        Group(opener(base), (*shared_switches(), *(transformer_switches() if on_card else ()), again)),
        # of their own, and each before what it replaces is used: else the graphs of that would count as its memory
        *([Group(opener(base), edge_switches(pipeline, size))] if on_card else []),
        Group(lambda: open_without_reader(pipeline, size, base), (Switch(name="fast text encoder", draw_many=draw_together),)),
    ]
    if base.text_encoder != "bf16":
        joined = choose_plan(settings, device, "bf16")
        groups.append(Group(opener(joined), (Switch(name=f"{base.text_encoder} text encoder"),)))
    if base.format != "bf16":
        plain = choose_plan(Settings(format="bf16"), device, base.text_encoder)
        groups.append(Group(opener(plain), (Switch(name=base.format, times_step=True),)))
    quick = dataclasses.replace(settings, attention="int8")
    for name, changed in (
        ("8-bit attention", quick),
        ("reuse of the reference", dataclasses.replace(settings, reuse_reference=True)),
        ("8-bit attention and reuse", dataclasses.replace(quick, reuse_reference=True)),
    ):
        switch = Switch(name=name, state="on", times_step=True)
        fresh = Switch(name=f"{name}, coded anew", state="on", turn=with_network(keeps_codes=False), times_step=True)
        switches = (switch, fresh) if changed.attention == "int8" else (switch,)
        groups.append(Group(opener(choose_plan(changed, device)), switches))
    return groups


def shared_switches() -> tuple[Switch, ...]:
    return (
        Switch(name="everything", state="baseline", times_step=True, draw_many=draw_together),
        Switch(name="edit_many", times_edit=False, draw_many=draw_one_by_one),
        Switch(name="modulation table", times_step=True, before_step=make_vectors, before_edit=forget_all),
        Switch(name="the picture as read", state="on", before_edit=forget_all_but("pictures", "openings")),
        Switch(name="picture and prompt as read", state="on", before_edit=forget_all_but("pictures", "openings", "embeddings")),
        Switch(name="the picture's latents", state="on", before_edit=forget_all_but("latents")),
        Switch(name="all of an edit but its seed", state="on", before_edit=nothing),
    )


def transformer_switches() -> tuple[Switch, ...]:
    plain_kernels = with_network(kernels=cast("Kernels", reference))
    return (
        Switch(name="transformer graphs", turn=with_network(uses_graphs=False), times_step=True, draw_many=draw_together),
        Switch(name="text beside pictures", turn=with_network(overlaps_text=False), times_step=True),
        Switch(name="fused kernels", turn=plain_kernels, times_step=True),
    )


def edge_switches(pipeline: diffusers.QwenImageEditPlusPipeline, size: Size) -> tuple[Switch, ...]:
    return (
        Switch(name="VAE graphs", turn=with_vae(pipeline, size, kernel=True, graphs=False), draw_many=draw_together),
        Switch(name="VAE fused norm", turn=with_vae(pipeline, size, kernel=False, graphs=True)),
        Switch(name="VAE graphs and fused norm", turn=with_vae(pipeline, size, kernel=False, graphs=False)),
        Switch(name="fast VAE", turn=with_plain_vae(pipeline, size)),
        Switch(name="text encoder graphs", turn=with_eager_reader, draw_many=draw_together),
    )
