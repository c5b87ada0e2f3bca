"""Modulation tables and schedules: which noise levels a table is for, and whether one holds those of an edit.

Only Lightning's schedule has the same levels for every picture. The base schedule moves with the picture's size, so that a
table of it would serve one size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from millicent.checkpoint.converted import TABLE_PREFIX, table_of
from millicent.checkpoint.write import DTYPE_NAMES, Entry
from millicent.engine.sampler import lightning_sigmas, round_timestep
from millicent.errors import ScheduleError
from millicent.model.config import MMDiTConfig
from millicent.model.mmdit import MMDiT
from millicent.model.modulation import (
    TIMESTEPS,
    ModulationTable,
    TimestepRows,
    attach,
    embed_timesteps,
    table_shapes,
    tabulate_module,
)

# a table for each dtype that an edit may compute in: their timesteps differ, as BF16 rounds 0.9 to 0.8984375
TABLE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def rounded_timesteps(sigmas: Sequence[float], dtype: torch.dtype) -> Tensor:
    """The levels as the network sees them in an edit that computes in `dtype`: (S,), each once, without the final 0."""
    one = torch.empty(1, dtype=dtype)
    rounded = torch.cat([round_timestep(torch.tensor(sigma), one) for sigma in sigmas[:-1]])
    # in BF16 neighboring levels of many steps are the same
    return torch.tensor(list(dict.fromkeys(rounded.tolist())), dtype=dtype)


def table_timesteps(schedule: str, steps: int, dtype: torch.dtype) -> Tensor:
    """The timesteps of a table for every edit of so many steps. Raises ScheduleError for a schedule that can have none."""
    if schedule != "lightning":
        raise ScheduleError(
            f"The {schedule} schedule depends on the picture's size, so no modulation table can hold its noise levels.",
            "Add a Lightning LoRA, whose schedule does not, or keep the modulation weights (--keep-modulation).",
        )
    if steps < 1:
        raise ScheduleError(f"A schedule of {steps} steps was asked for.", "Give at least 1.")
    return rounded_timesteps(lightning_sigmas(steps), dtype)


def check_schedule(mmdit: MMDiT, sigmas: Sequence[float]) -> None:
    """Raises ScheduleError for sigmas that the network's modulation table lacks; nothing for one that computes with weights.

    sigmas: of one edit, the final 0 included. Called before drawing begins.
    """
    rows = mmdit.time_text_embed
    if isinstance(rows, TimestepRows):
        for timestep in rounded_timesteps(sigmas, rows.dtype).tolist():
            rows.find(timestep)


def attach_stored(mmdit: MMDiT, table: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give a network the table that a converted file holds for edits in `dtype`; before its other weights are filled in.

    table: the file's tensors that are the table's, with their prefix (converted.split_table).
    Raises WeightsMismatchError for a table of another network, or none for `dtype`.
    """
    [name] = [name for name, stored in TABLE_DTYPES.items() if stored == dtype]
    attach(mmdit, ModulationTable.from_stored(table_of(table, name)))


class LightningTable:
    """Makes the tables of a converted file (checkpoint/convert.py), one module's weights in memory at a time."""

    def __init__(self, config: MMDiTConfig, schedule: str, steps: int) -> None:
        """Raises as table_timesteps."""
        with torch.device("meta"):
            self._mmdit = MMDiT(config)
        self._timesteps = {name: table_timesteps(schedule, steps, dtype) for name, dtype in TABLE_DTYPES.items()}
        self._embedded: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.entries: dict[str, dict[str, Entry]] = {TIMESTEPS: {}}
        for name, timesteps in self._timesteps.items():
            self.entries[TIMESTEPS][f"{TABLE_PREFIX}{name}.{TIMESTEPS}"] = Entry("F32", (len(timesteps),))
            for module, shape in table_shapes(self._mmdit, len(timesteps)).items():
                entry = Entry(DTYPE_NAMES[TABLE_DTYPES[name]], shape)
                self.entries.setdefault(module, {})[f"{TABLE_PREFIX}{name}.{module}"] = entry

    def make(self, module: str, parameter: Callable[[str], Tensor]) -> Mapping[str, Tensor]:
        """Tabulator.make. In one thread, as several sum in another order, and a file's bytes should not tell how many."""
        if module == TIMESTEPS:
            return {f"{TABLE_PREFIX}{name}.{TIMESTEPS}": timesteps.float() for name, timesteps in self._timesteps.items()}
        with _one_thread():
            return {f"{TABLE_PREFIX}{name}.{module}": self._tabulate(module, name, parameter) for name in self._timesteps}

    def _tabulate(self, module: str, name: str, parameter: Callable[[str], Tensor]) -> Tensor:
        if name not in self._embedded:
            with self._filled("time_text_embed", TABLE_DTYPES[name], parameter):
                self._embedded[name] = embed_timesteps(self._mmdit, self._timesteps[name])
        with self._filled(module, TABLE_DTYPES[name], parameter):
            return tabulate_module(self._mmdit, module, self._embedded[name])

    @contextmanager
    def _filled(self, module: str, dtype: torch.dtype, parameter: Callable[[str], Tensor]) -> Iterator[None]:
        """One module of the network with its weights; without them again afterwards."""
        submodule = self._mmdit.get_submodule(module)
        state = {name: parameter(f"{module}.{name}").to(dtype) for name in submodule.state_dict()}
        submodule.load_state_dict(state, assign=True)
        try:
            yield
        finally:
            submodule.to("meta")


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
