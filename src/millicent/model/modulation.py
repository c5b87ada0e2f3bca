"""The modulation table: what the transformer makes of the timestep alone, computed once for each timestep of a schedule.

The embedded time, every block's img_mod and txt_mod, and norm_out's linear see nothing but the timestep: 6.9 of the 20.4
billion weights for a handful of vectors. A table holds those vectors, and the weights need not be in memory. It is computed
by the network's own modules, one timestep at a time, which is the way they see it when a whole batch shares its timestep as
(1,): a product of one row and one of several are summed in different orders, so that vectors made for a batch of timesteps
would be others in the last bit. For the same reason the vector for t = 0 (zero_cond_t) is kept once for each timestep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from millicent.errors import ScheduleError, WeightsMismatchError
from millicent.model.layers import Block, FinalNorm

if TYPE_CHECKING:
    from millicent.model.mmdit import MMDiT

TIMESTEPS = "timesteps"  # the table's own tensor beside those that are named after modules
FINAL = "norm_out"
# a card divides by 1000 as a product with 0.001, which can be a unit in FP32's last place off
SAME_TIMESTEP = 1e-6


@dataclass(frozen=True, slots=True)
class ModulationTable:
    """timesteps: S of them, as the network sees them, which is rounded to its dtype.

    vectors: by the module that they stand in for: transformer_blocks.N.img_mod (S, 1, 6D), or (S, 2, 6D) with zero_cond_t,
    the second for t = 0; transformer_blocks.N.txt_mod (S, 1, 6D); norm_out (S, 1, 2D), scale and shift.
    """

    timesteps: tuple[float, ...]
    vectors: Mapping[str, Tensor]

    @classmethod
    def from_stored(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The table of one dtype as `stored` gives it. Raises WeightsMismatchError where its timesteps are missing."""
        if TIMESTEPS not in tensors or tensors[TIMESTEPS].ndim != 1:
            raise WeightsMismatchError("The modulation table has no timesteps.", "Convert the model again.")
        vectors = {name: tensor for name, tensor in tensors.items() if name != TIMESTEPS}
        return cls(tuple(tensors[TIMESTEPS].tolist()), vectors)

    def stored(self) -> dict[str, Tensor]:
        """The vectors, and the timesteps as FP32 (S,), which holds BF16's values too."""
        return {TIMESTEPS: torch.tensor(self.timesteps, dtype=torch.float32), **self.vectors}


class TimestepRows(nn.Module):
    """In the place of the time's embedding: timesteps to rows of the table."""

    def __init__(self, timesteps: Sequence[float], dtype: torch.dtype) -> None:
        super().__init__()
        self.timesteps = tuple(timesteps)
        self.dtype = dtype

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """timestep (B,) -> rows (B,). Raises as find. Reading the values waits for the card, once a step."""
        assert dtype == self.dtype, f"a table of {self.dtype} in a network that computes in {dtype}"
        rows = [self.find(value) for value in timestep.to(dtype).tolist()]
        return torch.tensor(rows, device=timestep.device)

    def find(self, timestep: float) -> int:
        """The row of a timestep that was rounded to the dtype. Raises ScheduleError for one that the table lacks."""
        row = min(range(len(self.timesteps)), key=lambda row: abs(self.timesteps[row] - timestep))
        if abs(self.timesteps[row] - timestep) <= SAME_TIMESTEP:
            return row
        held = ", ".join(f"{value:g}" for value in self.timesteps)
        raise ScheduleError(
            f"The noise level {timestep:g} is not in this model's modulation table, which holds {held}.",
            "Leave out the schedule, the sigmas and the steps, or use weights that keep their modulation "
            "(millicent convert --keep-modulation).",
        )


class TabulatedModulation(nn.Module):
    """In the place of a block's SiLU and linear: rows of the table to vectors."""

    vectors: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        # not persistent: the network's state_dict then names what a file without the linears must still bring
        self.register_buffer("vectors", vectors, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """rows (B,) -> (B, 1 or 2, channels)."""
        return self.vectors[rows]


class TabulatedFinalNorm(FinalNorm):
    """norm_out whose scale and shift come from the table."""

    def __init__(self, vectors: Tensor) -> None:
        nn.Module.__init__(self)  # without FinalNorm's linear
        self.table = TabulatedModulation(vectors)

    def modulation(self, rows: Tensor) -> Tensor:
        """rows (B,) -> (B, 1, 2D)."""
        vectors: Tensor = self.table(rows)
        return vectors


def table_shapes(mmdit: MMDiT, timesteps: int) -> dict[str, tuple[int, int, int]]:
    """The module that each of a table's tensors stands in for, and the tensor's shape, for so many timesteps."""
    dim, img_rows = mmdit.config.dim, 2 if mmdit.config.zero_cond_t else 1
    shapes = {}
    for number in range(mmdit.config.num_layers):
        shapes[f"transformer_blocks.{number}.img_mod"] = (timesteps, img_rows, 6 * dim)
        shapes[f"transformer_blocks.{number}.txt_mod"] = (timesteps, 1, 6 * dim)
    return {**shapes, FINAL: (timesteps, 1, 2 * dim)}


def tabulate(mmdit: MMDiT, timesteps: Tensor) -> ModulationTable:
    """The table of a network in memory, computed where and in the dtype in which its timesteps lie.

    timesteps: (S,), in the network's dtype, each as the network is given it (sampler.round_timestep).
    """
    embedded = embed_timesteps(mmdit, timesteps)
    vectors = {name: tabulate_module(mmdit, name, embedded) for name in table_shapes(mmdit, len(timesteps))}
    return ModulationTable(tuple(timesteps.tolist()), vectors)


@torch.no_grad()
def embed_timesteps(mmdit: MMDiT, timesteps: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What modulates pictures and what modulates text, for each timestep; needs the time's embedding alone."""
    return [mmdit.embed(timestep, timesteps.dtype) for timestep in timesteps.split(1)]


@torch.no_grad()
def tabulate_module(mmdit: MMDiT, name: str, embedded: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One tensor of the table; of the network it needs the weights of module `name` alone."""
    module = mmdit.get_submodule(name)
    modulate = module.modulation if isinstance(module, FinalNorm) else module
    return torch.cat([modulate(img_vec if name.endswith("img_mod") else txt_vec) for img_vec, txt_vec in embedded])


def attach(mmdit: MMDiT, table: ModulationTable) -> None:
    """Put the table in the place of the modules that it was made from, whose weights are let go.

    Before weights are loaded as well as after: state_dict then lacks what the table stands in for. The tensors move with
    the network, and their dtype is the one in which the network must run. Raises WeightsMismatchError for another's table.
    """
    wanted = table_shapes(mmdit, len(table.timesteps))
    found = {name: tuple(tensor.shape) for name, tensor in table.vectors.items()}
    dtypes = {tensor.dtype for tensor in table.vectors.values()}
    if found != wanted or len(dtypes) != 1 or not table.timesteps:
        odd = sorted(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
        told = f"{odd[0]} is {found.get(odd[0])}, the network has {wanted.get(odd[0])}" if odd else f"dtypes {dtypes}"
        raise WeightsMismatchError(f"The modulation table is another network's: {told}.", "Convert the model again.")
    mmdit.time_text_embed = TimestepRows(table.timesteps, dtypes.pop())
    for number, block in enumerate(mmdit.transformer_blocks):
        assert isinstance(block, Block)
        block.img_mod = TabulatedModulation(table.vectors[f"transformer_blocks.{number}.img_mod"])
        block.txt_mod = TabulatedModulation(table.vectors[f"transformer_blocks.{number}.txt_mod"])
    mmdit.norm_out = TabulatedFinalNorm(table.vectors[FINAL])
