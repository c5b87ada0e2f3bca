"""Which formats and kernels run on a card, each with its reason; never what the tensor cores lack."""

from typing import get_args

import pytest

from millicent.engine.planner import FORMAT_BYTES, TENSOR_CORES, Plan, plan
from millicent.engine.settings import Format, Settings
from millicent.errors import MachineError
from millicent.facts.gpus import find_gpu, read_gpus

DEFAULTS = {
    "RTX 3090": ("int8", "bf16", "flash"),
    "A100 80GB SXM": ("int8", "bf16", "flash"),
    "RTX 4090": ("fp8", "fp8", "flash"),
    "L40S": ("fp8", "fp8", "flash"),
    "H100 SXM": ("fp8", "fp8", "cudnn"),
    "H200 SXM": ("fp8", "fp8", "cudnn"),
    "B200": ("fp8", "fp8", "cudnn"),
    "B300": ("fp8", "fp8", "cudnn"),
    "RTX 5090": ("fp8", "fp8", "flash"),
}


def planned(card: str, settings: Settings = Settings(attention="exact")) -> Plan:  # noqa: B008
    made = plan(settings, find_gpu(card).capability, card)
    assert made is not None
    return made


@pytest.mark.parametrize(("card", "wanted"), DEFAULTS.items())
def test_what_each_card_runs_by_default(card: str, wanted: tuple[str, str, str]) -> None:
    made = planned(card)
    assert (made.format, made.text_encoder, made.attention) == wanted
    assert len(made.because) == 3
    assert card in made.because[0]


@pytest.mark.parametrize("number_format", get_args(Format))
def test_a_format_runs_where_the_tensor_cores_run_it_and_nowhere_else(number_format: Format) -> None:
    for gpu in read_gpus():
        runs = gpu.capability in TENSOR_CORES[number_format]
        settings = Settings(format=number_format)
        if runs:
            assert planned(gpu.name, settings).format == number_format
        else:
            with pytest.raises(MachineError, match=r"do not run|for none of our formats"):
                plan(settings, gpu.capability, gpu.name)


def test_int8_is_not_taken_for_granted_on_newer_cards() -> None:
    """10.3 lost its INT8."""
    assert planned("B200", Settings(format="int8")).format == "int8"
    with pytest.raises(MachineError, match="do not run int8"):
        plan(Settings(format="int8"), find_gpu("B300").capability, "B300")


def test_8_bit_attention_is_refused_where_it_would_be_slower() -> None:
    assert planned("B200", Settings(attention="int8")).attention == "int8"
    with pytest.raises(MachineError, match="no faster than BF16"):
        plan(Settings(attention="int8"), find_gpu("B300").capability, "B300")


def test_the_plain_network_and_a_cpu_without_wishes_have_no_plan() -> None:
    assert plan(Settings(plain=True), (9, 0), "a card") is None
    assert plan(Settings(), None, "this CPU") is None


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("transformer_blocks.7.attn.to_q", "fp8"),
        ("transformer_blocks.7.img_mlp.net.2", "bf16"),
        ("transformer_blocks.1.attn.to_q", "bf16"),
        ("transformer_blocks.58.attn.to_q", "bf16"),
        ("transformer_blocks.57.attn.to_q", "fp8"),
        ("img_in", "bf16"),
    ],
)
def test_the_format_of_one_linear(name: str, wanted: str) -> None:
    assert Plan("fp8", "fp8", "cudnn", False, True, 2, ()).format_of(name, 60) == wanted


def test_every_format_has_its_bytes() -> None:
    assert set(FORMAT_BYTES) == set(TENSOR_CORES) == set(get_args(Format))
