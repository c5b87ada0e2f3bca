"""Modulation tables and schedules: which noise levels a table is for, and whether one holds those of an edit.

Only Lightning's schedule has the same levels for every picture. The base schedule moves with the picture's size, so that a
table of it would serve one size alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from millicent.checkpoint.converted import TABLE_PREFIX, table_of
from millicent.checkpoint.write import DTYPE_NAMES, Entry
from millicent.engine.blocks import Mods
from millicent.engine.sampler import lightning_sigmas, round_timestep
from millicent.engine.uploading import Upload, move, uploading
from millicent.errors import ScheduleError
from millicent.model.config import MMDiTConfig
from millicent.model.layers import FinalNorm
from millicent.model.mmdit import MMDiT
from millicent.model.modulation import (
    TIMESTEPS,
    ModulationTable,
    TabulatedFinalNorm,
    TabulatedModulation,
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


class ModulationSource:
    """Tables for the schedules of edits, each computed on the device when it is first asked for.

    The weights stay where the network was read to: mapped files on the host, which cost memory only while they are read. One
    module's weights at a time pass through the device, and its vectors are the network's own, bit for bit.
    keeps_on_host: where the device's memory is short. Each picture's size has a base schedule of its own, of which a table of 40
    steps takes 250 MB; a step reads 6 of them.
    """

    _KEPT_SCHEDULES = 4

    def __init__(self, mmdit: MMDiT, device: torch.device, dtype: torch.dtype) -> None:
        """Takes a network before its blocks are taken apart."""
        self._config, self._device, self._dtype = mmdit.config, device, dtype
        self._modules = {name: mmdit.get_submodule(name) for name in table_shapes(mmdit, 1)}
        self._embed = mmdit.embed
        self._rows = mmdit.time_text_embed if isinstance(mmdit.time_text_embed, TimestepRows) else None
        mmdit.time_text_embed.to(device)
        self.keeps_on_host = False
        self._made: OrderedDict[tuple[float, ...], Mods] = OrderedDict()

    @torch.no_grad()
    def mods(self, sigmas: Sequence[float]) -> tuple[Mods, list[int]]:
        """The table for an edit's sigmas, the final 0 included, and the row of each step. Raises as check_schedule."""
        timesteps = rounded_timesteps(sigmas, self._dtype)
        wanted = (*timesteps.tolist(),) if self._rows is None else self._rows.timesteps
        if wanted not in self._made:
            with uploading(self._device) as upload:
                table = ModulationTable(wanted, {name: self._vectors(name, timesteps, upload) for name in self._modules})
            made = Mods.lay_out(table, self._config.num_layers)
            self._made[wanted] = made.on_host() if self.keeps_on_host and self._device.type == "cuda" else made
        self._made.move_to_end(wanted)
        while len(self._made) > self._KEPT_SCHEDULES:
            self._made.popitem(last=False)
        made = self._made[wanted]
        rows = TimestepRows(made.timesteps, self._dtype)
        one = torch.empty(1, dtype=self._dtype)
        return made, [rows.find(float(round_timestep(torch.tensor(sigma), one))) for sigma in sigmas[:-1]]

    def keep_on_host(self, on_host: bool) -> None:
        """From now on; what has been made before goes."""
        if on_host != self.keeps_on_host:
            self.forget()
        self.keeps_on_host = on_host

    def forget(self) -> None:
        """Let go of every table: the memory is needed."""
        self._made.clear()

    def _vectors(self, name: str, timesteps: Tensor, upload: Upload = move) -> Tensor:
        module = self._modules[name]
        if isinstance(module, TabulatedFinalNorm):
            module = module.table
        if isinstance(module, TabulatedModulation):
            return module.vectors.to(self._device)
        linear = module.linear if isinstance(module, FinalNorm) else module[1]  # type: ignore[index]
        assert isinstance(linear, nn.Module)
        state = {key: upload(tensor, self._device) for key, tensor in linear.state_dict().items()}
        made = []
        for timestep in timesteps.to(self._device).split(1):
            img_vec, txt_vec = self._embed(timestep, self._dtype)
            made.append(functional_call(linear, state, (F.silu(img_vec if name.endswith("img_mod") else txt_vec),)))
        return torch.cat(made)


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
