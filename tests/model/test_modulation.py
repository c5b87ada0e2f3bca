"""The modulation table against the linears that it stands in for, bit for bit."""

import copy
import re

import pytest
import torch
from conftest import HIDDEN, draw_weights, make_transformer
from torch import Tensor

from millicent.engine.modulation import LightningTable, check_schedule, rounded_timesteps, table_timesteps
from millicent.engine.sampler import BaseSchedule, base_sigmas, lightning_sigmas, round_timestep
from millicent.errors import ScheduleError, WeightsMismatchError
from millicent.model.config import MMDiTConfig
from millicent.model.mmdit import MMDiT
from millicent.model.modulation import ModulationTable, attach, table_shapes, tabulate

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(4, 6), (5, 5)]
BOTH = pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
IN_BOTH = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def make_mmdit(zero_cond_t: bool, dtype: torch.dtype = torch.float32) -> MMDiT:
    mmdit = MMDiT(MMDiTConfig.from_dict(make_transformer(zero_cond_t).config))
    draw_weights(mmdit, seed=1, gain=2.0)
    return mmdit.to(dtype).requires_grad_(False)


def with_table(mmdit: MMDiT, timesteps: Tensor) -> MMDiT:
    made = copy.deepcopy(mmdit)
    attach(made, tabulate(mmdit, timesteps))
    return made


def draw(mmdit: MMDiT, timestep: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    img = torch.randn(batch, sum(h * w for h, w in SHAPES), 64, generator=generator).to(dtype)
    txt = torch.randn(batch, 7, HIDDEN, generator=generator).to(dtype)
    with torch.inference_mode():
        return mmdit(img, txt, timestep, SHAPES)


@BOTH
@IN_BOTH
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_table_draws_what_the_linears_draw(zero_cond_t: bool, dtype: torch.dtype, batch: int, steps: int) -> None:
    mmdit = make_mmdit(zero_cond_t, dtype)
    tabulated = with_table(mmdit, table_timesteps("lightning", steps, dtype))
    latents = torch.empty(1, dtype=dtype)
    velocities = []
    for sigma in lightning_sigmas(steps)[:-1]:
        timestep = round_timestep(torch.tensor(sigma), latents)  # (1,): of the whole batch
        velocities.append(draw(mmdit, timestep, batch, dtype))
        assert torch.equal(draw(tabulated, timestep, batch, dtype), velocities[-1])
    # the timestep matters, or the wrong row would pass
    assert all(not torch.equal(velocities[0], other) for other in velocities[1:])


@BOTH
@IN_BOTH
def test_each_picture_of_a_batch_gets_its_own_row(zero_cond_t: bool, dtype: torch.dtype) -> None:
    mmdit = make_mmdit(zero_cond_t, dtype)
    timesteps = table_timesteps("lightning", 4, dtype)
    tabulated = with_table(mmdit, timesteps)
    mixed = timesteps[torch.tensor([2, 0, 3])]
    together = draw(tabulated, mixed, 3, dtype)
    for row in range(3):
        same = draw(tabulated, mixed[row : row + 1], 3, dtype)
        assert torch.equal(together[row], same[row])


@BOTH
def test_a_network_with_a_table_has_no_weights_that_see_the_timestep_alone(zero_cond_t: bool) -> None:
    mmdit = make_mmdit(zero_cond_t)
    tabulated = with_table(mmdit, table_timesteps("lightning", 4, torch.float32))
    gone = mmdit.state_dict().keys() - tabulated.state_dict().keys()
    assert tabulated.state_dict().keys() < mmdit.state_dict().keys()
    assert all(re.match(r"time_text_embed\.|norm_out\.|transformer_blocks\.\d\.(img|txt)_mod\.", name) for name in gone)
    assert len(gone) == 4 + 2 + 2 * 2 * 2  # weights and biases: two of the time's, the last, two in each of two blocks
    assert tabulated.to("meta").transformer_blocks[0].img_mod.vectors.is_meta  # it moves with the network


def test_a_table_goes_on_before_the_weights_as_well_as_after() -> None:
    mmdit = make_mmdit(zero_cond_t=True)
    timesteps = table_timesteps("lightning", 4, torch.float32)
    with torch.device("meta"):
        empty = MMDiT(mmdit.config)
    attach(empty, tabulate(mmdit, timesteps))
    empty.load_state_dict({name: mmdit.state_dict()[name] for name in empty.state_dict()}, assign=True)
    assert torch.equal(draw(empty, timesteps[1:2], 2, torch.float32), draw(mmdit, timesteps[1:2], 2, torch.float32))


@IN_BOTH
def test_what_is_stored_is_the_table(dtype: torch.dtype) -> None:
    table = tabulate(make_mmdit(zero_cond_t=True, dtype=dtype), table_timesteps("lightning", 4, dtype))
    again = ModulationTable.from_stored(table.stored())
    assert again.timesteps == table.timesteps
    assert again.vectors.keys() == table.vectors.keys()
    assert all(torch.equal(again.vectors[name], vectors) and vectors.dtype == dtype for name, vectors in table.vectors.items())


@BOTH
@IN_BOTH
def test_the_table_made_module_by_module_is_the_networks(zero_cond_t: bool, dtype: torch.dtype) -> None:
    mmdit = make_mmdit(zero_cond_t, torch.bfloat16)
    state = mmdit.state_dict()
    maker = LightningTable(mmdit.config, "lightning", 4)
    prefix = "modulation.bf16." if dtype == torch.bfloat16 else "modulation.fp32."
    made = {key: tensor for module in maker.entries for key, tensor in maker.make(module, state.__getitem__).items()}
    whole = tabulate(mmdit.to(dtype), table_timesteps("lightning", 4, dtype)).stored()
    assert {key for key in made if key.startswith(prefix)} == {prefix + name for name in whole}
    assert all(torch.equal(made[prefix + name], tensor) for name, tensor in whole.items())
    for module, entries in maker.entries.items():
        assert {key: entry.shape for key, entry in entries.items()} == {
            key: tuple(tensor.shape) for key, tensor in maker.make(module, state.__getitem__).items()
        }


def test_a_files_table_does_not_tell_how_many_threads_made_it() -> None:
    """At the true width, where several threads sum a BF16 product of two rows in another order than one does."""
    maker = LightningTable(MMDiTConfig(num_layers=1, zero_cond_t=True), "lightning", 1)
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (18432, 3072), "bias": (18432,)}
    linear = {name: torch.randn(shape, generator=generator).bfloat16() / 50 for name, shape in shapes.items()}
    embedder = "time_text_embed.timestep_embedder."
    wide = {"linear_1.weight": (3072, 256), "linear_1.bias": (3072,), "linear_2.weight": (3072, 3072), "linear_2.bias": (3072,)}
    time = {embedder + name: torch.randn(shape, generator=generator).bfloat16() / 20 for name, shape in wide.items()}

    def parameter(name: str) -> Tensor:
        return time[name] if name in time else linear[name.rpartition(".")[2]]

    threads = torch.get_num_threads()
    tables = []
    for count in (1, 2):
        torch.set_num_threads(count)
        tables.append(maker.make("transformer_blocks.0.img_mod", parameter))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert all(torch.equal(tables[0][key], tables[1][key]) for key in tables[0])


def test_the_lightning_levels_in_bf16_are_those_the_network_is_given() -> None:
    assert table_timesteps("lightning", 4, torch.bfloat16).tolist() == [1.0, 0.8984375, 0.75390625, 0.5]
    many = table_timesteps("lightning", 99, torch.bfloat16).tolist()
    assert len(many) == len(set(many)) < 99  # neighbors fall together


@pytest.mark.parametrize("one_off", [0.9, 900.0000610 / 1000])
def test_a_last_place_in_fp32_does_not_matter(one_off: float) -> None:
    """A card divides by 1000 as a product with 0.001: 0.90000004 where a CPU has 0.9."""
    mmdit = make_mmdit(zero_cond_t=True)
    tabulated = with_table(mmdit, table_timesteps("lightning", 4, torch.float32))
    exact = draw(tabulated, torch.tensor([0.9]), 1, torch.float32)
    assert torch.equal(draw(tabulated, torch.tensor([one_off]), 1, torch.float32), exact)


@IN_BOTH
@pytest.mark.parametrize("wrong", [0.0, 0.25, 0.874])
def test_a_timestep_outside_of_the_table_is_refused(dtype: torch.dtype, wrong: float) -> None:
    tabulated = with_table(make_mmdit(zero_cond_t=True, dtype=dtype), table_timesteps("lightning", 4, dtype))
    with pytest.raises(ScheduleError, match=r"not in this model's modulation table, which holds 1, 0\.(9|898438), "):
        draw(tabulated, torch.tensor([wrong], dtype=dtype), 1, dtype)


@IN_BOTH
def test_a_schedule_is_checked_before_drawing(dtype: torch.dtype) -> None:
    mmdit = make_mmdit(zero_cond_t=True, dtype=dtype)
    base = base_sigmas(4, 4096, BaseSchedule())
    check_schedule(mmdit, base)  # with its weights the network draws any
    tabulated = with_table(mmdit, table_timesteps("lightning", 4, dtype))
    check_schedule(tabulated, lightning_sigmas(4))
    for sigmas in (base, lightning_sigmas(8), [1.0, 0.6, 0.0]):
        with pytest.raises(ScheduleError):
            check_schedule(tabulated, sigmas)


def test_every_level_that_a_check_accepts_is_found_in_the_edit() -> None:
    """Rounding for the check and rounding for the network are one: sigmas of any value, each its own table."""
    mmdit = make_mmdit(zero_cond_t=False, dtype=torch.bfloat16)
    for sigma in torch.linspace(0.01, 1, 50).tolist():
        tabulated = with_table(mmdit, rounded_timesteps([sigma, 0.0], torch.bfloat16))
        check_schedule(tabulated, [sigma, 0.0])
        draw(tabulated, round_timestep(torch.tensor(sigma), torch.empty(1, dtype=torch.bfloat16)), 1, torch.bfloat16)


def test_the_base_schedule_can_have_no_table() -> None:
    with pytest.raises(ScheduleError, match="depends on the picture's size"):
        table_timesteps("base", 4, torch.float32)
    with pytest.raises(ScheduleError, match="0 steps"):
        table_timesteps("lightning", 0, torch.float32)


def test_another_networks_table_is_refused() -> None:
    plain, zeroed = make_mmdit(zero_cond_t=False), make_mmdit(zero_cond_t=True)
    timesteps = table_timesteps("lightning", 4, torch.float32)
    table = tabulate(plain, timesteps)
    with pytest.raises(WeightsMismatchError, match=r"img_mod is \(4, 1, 288\), the network has \(4, 2, 288\)"):
        attach(zeroed, table)
    without = {name: vectors for name, vectors in table.vectors.items() if name != "norm_out"}
    with pytest.raises(WeightsMismatchError, match="norm_out is None"):
        attach(plain, ModulationTable(table.timesteps, without))
    mixed = {**table.vectors, "norm_out": table.vectors["norm_out"].bfloat16()}
    with pytest.raises(WeightsMismatchError, match="dtypes"):
        attach(plain, ModulationTable(table.timesteps, mixed))
    with pytest.raises(WeightsMismatchError, match="no timesteps"):
        ModulationTable.from_stored(without)
    assert table_shapes(plain, 4) == {name: tuple(vectors.shape) for name, vectors in table.vectors.items()}
