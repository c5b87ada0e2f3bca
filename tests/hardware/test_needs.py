"""What a model needs, against the shapes of the true network."""

import math
from pathlib import Path

import pytest

from benchmarks.load import TRUE_BLOCKS, true_config
from millicent.checkpoint.architecture import transformer_tensors
from millicent.errors import InputError, ModelNotFoundError
from millicent.facts.models import find_any_card
from millicent.hardware import needs
from millicent.hardware.machine import GIB, from_json
from millicent.hardware.needs import FORMATS, Needs, needs_of, weights_bytes

MACHINE = from_json((Path(__file__).parent.parent / "machines" / "rtx-4090.json").read_text())


def test_the_numbers_of_parameters_are_the_true_network_s() -> None:
    sizes = {key: math.prod(shape) for key, shape in transformer_tensors(true_config(TRUE_BLOCKS)).items()}
    assert sum(sizes.values()) == needs.TRANSFORMER_PARAMETERS
    assert sum(size for key, size in sizes.items() if "_mod.1." in key) == needs.MODULATION_PARAMETERS


def test_fp8_stays_within_22_gib() -> None:
    assert 21 * GIB < weights_bytes("fp8") + needs.WORKING_BYTES < 22 * GIB


def test_smaller_formats_take_less() -> None:
    assert (
        weights_bytes("nvfp4")
        < weights_bytes("fp8")
        < weights_bytes("int8")
        == weights_bytes("int8-weight")
        < weights_bytes("bf16")
    )


def test_what_is_here_is_not_fetched_again() -> None:
    whole = needs_of("qwen-image-edit-2511", None, MACHINE)
    rest = needs_of("qwen-image-edit-2511", None, MACHINE, present_bytes=50 * 10**9)
    assert whole.download_bytes - rest.download_bytes == 50 * 10**9
    assert needs_of("qwen-image-edit-2511", None, MACHINE, present_bytes=10**12).download_bytes == 0
    assert whole.disk_bytes == int(whole.download_bytes * 1.1)


def test_a_lora_needs_its_model_too() -> None:
    lora = find_any_card("qwen-image-edit-2511-lightning-4steps")
    base = needs_of("qwen-image-edit-2511", None, MACHINE)
    assert needs_of(lora.name, None, MACHINE).download_bytes == base.download_bytes + (lora.size_bytes or 0)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ModelNotFoundError):
        needs_of("qwen-image-edit-3000", None, MACHINE)
    with pytest.raises(InputError, match="fp16"):
        needs_of("qwen-image-edit-2511", "fp16", MACHINE)


@pytest.mark.parametrize("name", FORMATS)
def test_pinned_blocks_are_rounded_up_to_powers_of_two(name: str) -> None:
    model = needs_of("qwen-image-edit-2511", name, MACHINE)
    assert model.pinned_bytes(model.card_bytes) == 0
    one = model.pinned_bytes(model.card_bytes - 1)
    assert one.bit_count() == 1
    assert model.block_bytes <= one < 2 * model.block_bytes
    assert model.pinned_bytes(model.card_bytes - 3 * model.block_bytes) == 3 * one


def test_five_blocks_of_1_2_gib_lock_10_gib() -> None:
    block = int(1.2 * GIB)
    model = Needs(model="", format="bf16", download_bytes=0, resident_bytes=5 * block, block_bytes=block, working_bytes=0)
    assert model.pinned_bytes(0) == 10 * GIB
