"""Where everything lies: what fits stays, more memory never streams more, and what cannot fit is refused with its numbers."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.engine.machine_plan import block_sizes
from millicent.engine.placement import CONTEXT_BYTES, HOST_BASE_BYTES, SLACK_BYTES, Components, Placement, place, weigh
from millicent.engine.planner import plan
from millicent.engine.predictions import draw_of
from millicent.engine.settings import Settings
from millicent.errors import MachineError
from millicent.facts.measured import Run, read_measured
from millicent.model.sizes import ModelSizes, Workload

HOST = 64 << 30
GB = 10**9


WORK = Workload()


@cache
def components(number_format: Any = "fp8", attention: Any = "exact", reuses: bool = False, work: Workload = WORK) -> Components:
    formats = plan(Settings(format=number_format, attention=attention, reuse_reference=reuses), (9, 0), "a card")
    assert formats is not None
    model = ModelSizes()
    return weigh(
        model,
        work,
        block_sizes(model.transformer, formats),
        number_format=number_format,
        text_encoder=formats.text_encoder,
        attention=attention,
        reuses=reuses,
    )


def put(free_gb: float, **of: Any) -> Placement:
    return place(components(**of), round(free_gb * GB), HOST)


def where(placement: Placement) -> dict[str, str]:
    return {part.name: part.where for part in placement.parts}


# as measured


@pytest.mark.parametrize("run", read_measured().runs, ids=lambda run: run.system)
def test_the_predicted_peak_is_what_was_measured(run: Run) -> None:
    """PyTorch's own count, of which edges and VAE are left out, and CUDA's own, slack and recorded graphs too.

    The table of embeddings is left out as well: commit 72ea680ce887 had it on the card, but before the edit, in held_before_gib.
    """
    # this commit kept references as they came, under 8-bit attention too
    of = components(run.format, "exact" if run.commit == "72ea680ce887" else run.attention, run.reuse_reference)
    assert draw_of(run).text_encoder == ("bf16" if run.format == "bf16" else "fp8")
    predicted = of.transformer + of.text_encoder + of.table + of.kept + of.caches + of.phases.largest
    error = predicted / run.added_bytes - 1
    print(f"{run.system}: {predicted / GB:.2f} GB predicted, {run.added_bytes / GB:.2f} measured, {error:+.1%}")
    assert abs(error) < 0.02


def test_codes_are_kept_in_half_the_bytes_of_what_they_are_of() -> None:
    kept = 4096 * 2 * 3072 * 60 * 2
    assert components("fp8", "exact", True).kept == kept
    assert components("fp8", "int8", True).kept == kept // 2
    assert components().kept == 0


# what stays


def test_a_24_gb_card_keeps_everything_in_fp8() -> None:
    placement = put(25.76)
    assert not placement.in_turn
    assert placement.streamed_step_bytes == placement.exchanged_bytes == placement.pinned_bytes == 0
    assert where(placement)["transformer"] == where(placement)["text encoder"] == "card"


def test_the_table_of_embeddings_stays_on_the_host_of_every_card() -> None:
    for gb in (80, 25.76, 24, 17, 12, 8):
        placement = put(gb)
        table = next(part for part in placement.parts if part.name == "table of embeddings")
        assert (table.where, table.card_bytes, table.host_bytes) == ("host", 0, 152064 * 3584 * 2)
        # the host holds it, and itself, even where nothing else waits there
        assert placement.needed_host_bytes >= HOST_BASE_BYTES + table.host_bytes
    assert put(80).needed_host_bytes == HOST_BASE_BYTES + components().embedding


def test_graphs_go_before_weights_do() -> None:
    with_graphs, without = put(25), put(24)
    assert (with_graphs.records_graphs, without.records_graphs) == (True, False)
    assert not without.in_turn
    assert "graphs are not recorded" in without.because


def test_only_what_today_s_engine_does_is_called_carried_out() -> None:
    assert [put(gb).is_carried_out for gb in (80, 25.76, 24, 17, 12)] == [True, True, False, False, False]


def test_whole_is_what_the_first_placement_takes_and_least_the_last() -> None:
    parts = components()
    assert place(parts, parts.whole, HOST).is_carried_out
    assert place(parts, parts.whole, HOST).peak_bytes == parts.whole
    assert not place(parts, parts.whole - 1, HOST).is_carried_out
    assert place(parts, parts.least, HOST).resident_blocks == 0
    with pytest.raises(MachineError):
        place(parts, parts.least - 1, HOST)
    # 22 GiB in all is the goal, with the graphs and the caches that only speed it up left out
    assert parts.whole - parts.caches - parts.phases.recorded + parts.phases.largest < 22 << 30
    assert parts.weights < 19.6 * (1 << 30)


def test_a_16_gb_card_takes_turns_and_streams_nothing_in_a_step() -> None:
    placement = put(17.17)
    assert placement.in_turn
    assert placement.streamed_step_bytes == 0
    assert placement.exchanged_bytes == components().transformer + components().text_encoder


def test_a_12_gb_card_streams_some_blocks() -> None:
    placement = put(12.88)
    assert placement.in_turn
    assert 0 < placement.resident_blocks < 60
    streamed = 60 - placement.resident_blocks
    assert placement.streamed_step_bytes == streamed * components().blocks[0]
    assert placement.streamed_text_bytes == 0


def test_an_8_gb_card_streams_the_text_encoder_too() -> None:
    placement = put(8.2)
    assert placement.streamed_text_bytes == components().text_encoder
    assert placement.exchanged_bytes == components().transformer - placement.streamed_step_bytes


def test_a_card_that_is_too_small_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        MachineError, match=r"takes \d\.\d GiB of the card's memory even with all weights streamed, and 1\.9 GiB are free"
    ):
        put(2)
    with pytest.raises(MachineError, match=r"2\.8 GiB of them keys and values that are kept"):
        put(4, reuses=True)


def test_a_host_that_is_too_small_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        MachineError, match=r"needs 24\.4 GiB of memory, 20\.4 GiB of them for weights that wait there, and has 7\.5 GiB"
    ):
        place(components(), 12 * GB, 8 * GB)
    with pytest.raises(MachineError, match=r"needs 5\.0 GiB of memory, 1\.0 GiB of them"):
        place(components(), 80 * GB, 5 * GB)


# properties

settings_of = st.fixed_dictionaries(
    {
        "number_format": st.sampled_from(["bf16", "fp8", "int8", "int8-weight"]),
        "attention": st.sampled_from(["exact", "int8"]),
        "reuses": st.booleans(),
        "work": st.sampled_from([Workload(), Workload(references=3), Workload(width=512, height=512), Workload(guided=True)]),
    }
)


def moved(placement: Placement) -> tuple[int, ...]:
    return (placement.streamed_step_bytes, placement.streamed_text_bytes, placement.in_turn, -placement.resident_blocks)


@given(settings_of, st.integers(4 * GB, 60 * GB), st.integers(0, 20 * GB))
def test_more_memory_never_streams_more(of: dict[str, Any], free: int, more: int) -> None:
    try:
        small = place(components(**of), free, 10**12)
    except MachineError:
        return
    large = place(components(**of), free + more, 10**12)
    assert all(one >= other for one, other in zip(moved(small), moved(large), strict=True))


@given(settings_of, st.integers(1 * GB, 90 * GB))
def test_what_is_placed_fits_and_is_all_there(of: dict[str, Any], free: int) -> None:
    parts = components(**of)
    try:
        placement = place(parts, free, 10**12)
    except MachineError:
        return
    assert placement.peak_bytes <= free
    sizes = {part.name: part.size_bytes for part in placement.parts}
    assert sizes["transformer"] == parts.transformer
    assert sizes["text encoder"] == parts.text_encoder
    assert sizes.get("kept keys and values", 0) == parts.kept
    if not placement.in_turn:
        assert placement.peak_bytes == sum(part.card_bytes for part in placement.parts)
    else:
        assert placement.peak_bytes <= sum(part.card_bytes for part in placement.parts)


@given(settings_of, st.integers(4 * GB, 60 * GB))
def test_the_same_bytes_are_the_same_placement(of: dict[str, Any], free: int) -> None:
    try:
        assert place(components(**of), free, HOST) == place(components(**of), free, HOST)
    except MachineError as error:
        with pytest.raises(MachineError, match=str(error.message[:20]).replace("(", ".")):
            place(components(**of), free, HOST)


def test_what_lies_on_the_card_always_counts() -> None:
    parts = components()
    assert parts.steady > CONTEXT_BYTES + SLACK_BYTES
    assert replace(parts, caches=parts.caches + 1).steady == parts.steady + 1
