"""A model's networks laid out for their device: in the formats of a Plan, where a Placement has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from millicent.engine.blocks import MakeLinear, make_block
from millicent.engine.fast_encoder import quantize_encoder
from millicent.engine.layer_stack import slab_bytes
from millicent.engine.linears import linear_maker
from millicent.engine.modulation import ModulationSource
from millicent.engine.planner import EncoderFormat, Plan
from millicent.engine.residency import Residency, encoder_layers, stream_encoder
from millicent.engine.transformer import FastMMDiT
from millicent.engine.uploading import Upload, move
from millicent.model.mmdit import MMDiT
from millicent.model.text_encoder import build_network

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class FastDrawing:
    """The transformer laid out for its card; what Model.mmdit has left then is what stands before and after the blocks."""

    plan: Plan
    network: FastMMDiT
    modulation: ModulationSource


def lay_out(
    mmdit: MMDiT, plan: Plan, device: torch.device, dtype: torch.dtype, residency: Residency | None = None, upload: Upload = move
) -> FastDrawing:
    """Move a network to a device in a plan's formats, block by block; the network is left without its blocks.

    upload: brings weights there. residency: takes each block, where it has slabs. Blocks that another
    process has put there are not read again.
    """
    modulation = ModulationSource(mmdit, device, dtype)
    for name in ("txt_norm", "img_in", "txt_in", "proj_out"):
        mmdit.get_submodule(name).to(device)
    streams = residency is not None and residency.has_slabs
    if residency is not None and residency.is_filled:
        mmdit.transformer_blocks = _shapes_of(mmdit, dtype).transformer_blocks
        maker = _maker(mmdit, plan, META, dtype)
    else:
        maker = _maker(mmdit, plan, device, dtype, upload)
    take = (lambda block: residency.take(residency.transformer, block)) if residency is not None and streams else None
    network = FastMMDiT(mmdit, maker, attention=plan.attention, reuse_reference=plan.reuse_reference, take=take)
    if residency is not None and streams:
        network.stack = residency.transformer
    return FastDrawing(plan, network, modulation)


def _maker(mmdit: MMDiT, plan: Plan, device: torch.device, dtype: torch.dtype, upload: Upload = move) -> MakeLinear:
    return linear_maker(plan, mmdit.config.num_layers, device, dtype, upload)


def _shapes_of(mmdit: MMDiT, dtype: torch.dtype) -> MMDiT:
    """A network like it without values."""
    with META:
        return MMDiT(mmdit.config).to(dtype).eval()


def lay_out_encoder(
    network: Any, device: torch.device, wanted: EncoderFormat | None, residency: Residency | None = None, upload: Upload = move
) -> None:
    """Move a text encoder's network to a device, in place, layer by layer, all but its table of embeddings.

    wanted: of its linears; None leaves them as they are, for a CPU. residency: takes each layer, where it has slabs.
    """
    if residency is None or not residency.has_slabs:
        if wanted is not None:
            quantize_encoder(network, device, wanted, upload=upload)
        _move(network, device)
        return
    stack, made_on = residency.text_encoder, META if residency.is_filled else device
    if residency.is_filled:
        _take_shapes(network)
    assert wanted is not None
    quantize_encoder(network, made_on, wanted, take=lambda layer: residency.take(stack, layer), upload=upload)
    _move_around_layers(network, device)
    stream_encoder(network, stack)


def open_slabs(residency: Residency, mmdit: MMDiT, encoder: Any, plan: Plan, dtype: torch.dtype, key: str | None) -> None:
    """Host memory for the layers of both networks, as they will be laid out; before they are. Raises as Residency.open_slabs."""
    shapes, maker = _shapes_of(mmdit, dtype).transformer_blocks, _maker(mmdit, plan, META, dtype)
    blocks = [make_block(block, f"transformer_blocks.{number}", maker, META) for number, block in enumerate(shapes)]  # type: ignore[arg-type]
    network: Any = build_network(encoder.config.to_dict()).to(dtype)
    quantize_encoder(network, META, plan.text_encoder)
    residency.open_slabs(sum(slab_bytes(layer) for layer in (*blocks, *encoder_layers(network))), key)


def take_all(residency: Residency, network: FastMMDiT, encoder: Any) -> None:
    """Give the layers of networks that are laid out already slabs on the host. Raises MachineError where it lacks memory."""
    layers = encoder_layers(encoder)
    residency.open_slabs(sum(slab_bytes(layer) for layer in (*network.blocks, *layers)), None)
    for block in network.blocks:
        residency.take(residency.transformer, block)
    for layer in layers:
        residency.take(residency.text_encoder, layer)
    network.stack = residency.transformer
    stream_encoder(encoder, residency.text_encoder)


def _take_shapes(network: Any) -> None:
    """Put layers without values in place of a text encoder's own."""
    shapes: Any = build_network(network.config.to_dict()).to(network.language_model.norm.weight.dtype)
    network.visual.blocks = shapes.visual.blocks
    network.visual.merger.mlp = shapes.visual.merger.mlp
    network.language_model.layers = shapes.language_model.layers


def _move_around_layers(network: Any, device: torch.device) -> None:
    """Move what is in none of a text encoder's layers, nor in its table of embeddings."""
    tower, language = network.visual, network.language_model
    blocks, merger, layers = tower.blocks, tower.merger.mlp, language.layers
    tower.blocks, tower.merger.mlp, language.layers = nn.ModuleList(), nn.Identity(), nn.ModuleList()
    _move(network, device)
    tower.blocks, tower.merger.mlp, language.layers = blocks, merger, layers


def _move(network: Any, device: torch.device) -> None:
    """All but the table of embeddings: an edit reads a few of its 152,064 rows, which take a gigabyte."""
    language = network.language_model
    table, language.embed_tokens = language.embed_tokens, None
    network.to(device)
    language.embed_tokens = table
