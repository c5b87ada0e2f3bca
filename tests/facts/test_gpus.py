"""The cards: each found by every name that it bears, none taken for another, and rates that agree with the chips' own numbers."""

import dataclasses
import datetime
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millicent.errors import InputError
from millicent.facts.card_formats import list_engine_formats, weigh_formats
from millicent.facts.formats import FORMAT_NAMES, list_capabilities, support, tensor_core_capabilities
from millicent.facts.gpus import (
    GPUS,
    RATES,
    AmbiguousGpuError,
    Gpu,
    UnknownGpuError,
    find_gpu,
    find_laptop,
    identify,
    list_alike,
    rate_of,
    read_gpus,
    read_table,
)

TEXT = GPUS.read_text(encoding="utf-8")
CARDS = [pytest.param(gpu, id=gpu.name) for gpu in read_gpus()]
NAMES = [name for gpu in read_gpus() for name in (gpu.name, *gpu.reported)]


@pytest.mark.parametrize("gpu", CARDS)
def test_every_card_says_where_its_facts_stand(gpu: Gpu) -> None:
    assert gpu.source
    assert datetime.date(2026, 11, 1) <= gpu.checked <= datetime.datetime.now(tz=datetime.UTC).date()
    assert gpu.reported
    assert 10_000 < gpu.memory_mib < 300_000
    assert 200 < gpu.bandwidth_gb_per_s <= 8000
    assert (gpu.pcie_lanes == 0) == (gpu.host_arch == "aarch64")


@pytest.mark.parametrize("gpu", CARDS)
def test_a_card_is_found_and_identified_by_each_of_its_names(gpu: Gpu) -> None:
    assert find_gpu(gpu.name) is gpu
    for name in gpu.reported:
        assert find_gpu(name) is gpu
        assert identify(name, gpu.capability, gpu.memory_mib) is gpu
        assert identify(name, None, None) is gpu
        assert identify(name.removeprefix("NVIDIA "), gpu.capability, None) is gpu
        assert identify(name, (gpu.capability[0] + 1, gpu.capability[1]), gpu.memory_mib) is None
        assert identify(name, gpu.capability, gpu.memory_mib // 2) is None
        assert identify(name, gpu.capability, gpu.memory_mib * 2) is gpu, "a card with more memory soldered on has its rates"


@given(st.sampled_from(NAMES), st.randoms(use_true_random=False))
def test_capitals_and_spaces_change_no_name(name: str, rng: random.Random) -> None:
    drawn = "".join(rng.choice([each.lower(), each.upper()]) for each in name)
    spaced = " " * rng.randrange(3) + re.sub(" ", lambda _: " " * rng.randrange(1, 4), drawn) + " " * rng.randrange(3)
    assert find_gpu(spaced) is find_gpu(name)
    if name not in {gpu.name for gpu in read_gpus()}:
        assert identify(spaced, None, None) is identify(name, None, None) is not None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("GeForce RTX 4090", "RTX 4090"),
        ("rtx4090d", "RTX 4090 D"),
        ("A10", "A10"),
        ("L40", "L40"),
        ("H200", "H200 SXM"),
        ("h100sxm", "H100 SXM"),
        ("A100-SXM4-80GB", "A100 80GB SXM"),
        ("A100 PCIe 40GB", "A100 40GB PCIe"),
        ("A6000", "RTX A6000"),
        ("RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("RTX PRO 5000 Blackwell", "RTX PRO 5000"),
        ("RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Max-Q"),
        ("B300", "B300"),
    ],
)
def test_names_as_people_write_them(name: str, found: str) -> None:
    assert find_gpu(name).name == found


def test_an_ambiguous_name_lists_its_readings() -> None:
    with pytest.raises(AmbiguousGpuError) as error:
        find_gpu("NVIDIA RTX 6000")
    assert error.value.exit_code == 19
    for reading in (
        "Quadro RTX 6000 (Turing, 7.5",
        "RTX A6000 (Ampere, 8.6)",
        "RTX 6000 Ada (Ada, 8.9)",
        "RTX PRO 6000 (Blackwell, 12.0",
    ):
        assert reading in error.value.message
    with pytest.raises(AmbiguousGpuError, match=r"Quadro RTX 5000.*RTX A5000.*RTX 5000 Ada.*RTX PRO 5000"):
        find_gpu("rtx 5000")
    for name, readings in {
        "A100": ("A100 40GB SXM", "A100 40GB PCIe", "A100 80GB SXM", "A100 80GB PCIe"),
        "a100 80gb": ("A100 80GB SXM", "A100 80GB PCIe"),
        "H100": ("H100 PCIe", "H100 SXM", "H100 NVL"),
        "RTX PRO 6000": ("Workstation", "Server", "Max-Q", "MIG 1g.24gb"),
    }.items():
        with pytest.raises(AmbiguousGpuError) as error:
            find_gpu(name)
        assert error.value.message.count(",") == len(readings) - 1
        assert all(reading in error.value.message for reading in readings)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("MI300X", "AMD's"),
        ("AMD Instinct MI300X", "NVIDIA's alone"),
        ("AMD Radeon RX 7900 XTX", "NVIDIA's alone"),
        ("Quadro RTX 6000", "7.5"),
        ("NVIDIA RTX 5880 Ada Generation", "China"),
        ("NVIDIA L20Y", "China"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", r"laptop's card \(Ada, compute capability 8.9\); the table has no rates"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "a slice of a card; of these the table has RTX PRO 6000 MIG 1g.24gb alone"),
        ("H100 80GB", "Near it are H100 PCIe, H100 SXM, H100 NVL"),
        ("RTX 3080", "Near it are .*RTX 3090"),
        ("RTX 5090 D v2", "Near it are RTX 5090 D"),
        ("Server", "no card named"),
        ("96GB", "no card named"),
        ("a toaster", "no card named 'a toaster'"),
        ("", "no card named ''"),
    ],
)
def test_a_name_without_a_row_is_told(name: str, told: str) -> None:
    with pytest.raises(UnknownGpuError, match=told) as error:
        find_gpu(name)
    assert (error.value.exit_code, isinstance(error.value, InputError)) == (19, True)
    assert identify(name, None, None) is None


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", (7, 5)),
        ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", (8, 6)),
        ("NVIDIA RTX A5000 Laptop GPU", (8, 6)),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9)),
        ("rtx 4070 mobile", (8, 9)),
        ("NVIDIA RTX 5000 Ada Generation Laptop GPU", (8, 9)),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", (12, 0)),
        ("NVIDIA RTX PRO 5000 Blackwell Generation Laptop GPU", (12, 0)),
        ("NVIDIA GeForce RTX 2050 Laptop GPU", None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_laptops_card_is_told_by_its_name_and_never_has_a_desktops_rates(name: str, capability: tuple[int, int] | None) -> None:
    laptop = find_laptop(name)
    assert (laptop and laptop.capability) == capability
    if laptop:
        assert identify(name, capability, 16384) is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 2g.48gb",
        "GRID A100-10C",
        "NVIDIA A40-48Q",
        "NVIDIA GeForce RTX 5090 D v2",
    ],
)
def test_a_share_or_a_variant_is_not_the_card(name: str) -> None:
    assert identify(name, None, None) is None


def test_a_slice_is_itself_whatever_engines_it_has() -> None:
    whole, part = find_gpu("RTX PRO 6000 Server"), find_gpu("RTX PRO 6000 MIG 1g.24gb")
    assert identify("NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 1g.24gb", (12, 0), 23674) is part
    assert identify("NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 1g.24gb+gfx", (12, 0), 23674) is part
    assert part.kind == "slice"
    for key in (*RATES.values(), "bandwidth_gb_per_s", "memory_mib"):
        assert getattr(part, key) == pytest.approx(getattr(whole, key) / 4, rel=0.04), key


# CUDA cores and boost clocks in GHz, as NVIDIA sells the cards: what the table's rates are checked with, from outside it
CHIPS = {
    "RTX 3090": (10496, 1.695),
    "RTX 3090 Ti": (10752, 1.86),
    "RTX 4070 Ti": (7680, 2.61),
    "RTX 4070 Ti SUPER": (8448, 2.61),
    "RTX 4080": (9728, 2.505),
    "RTX 4080 SUPER": (10240, 2.55),
    "RTX 4090": (16384, 2.52),
    "RTX 4090 D": (14592, 2.52),
    "RTX 5070 Ti": (8960, 2.452),
    "RTX 5080": (10752, 2.617),
    "RTX 5090": (21760, 2.407),
    "RTX A4000": (6144, 1.56),
    "RTX A5000": (8192, 1.695),
    "RTX A6000": (10752, 1.8),
    "A40": (10752, 1.74),
    "RTX 4000 Ada": (6144, 2.175),
    "RTX 5000 Ada": (12800, 2.55),
    "RTX 6000 Ada": (18176, 2.505),
    "L4": (7424, 2.04),
    "L40S": (18176, 2.52),
    "RTX PRO 6000 Workstation": (24064, 2.617),
}


@pytest.mark.parametrize("name", CHIPS)
def test_rates_follow_from_cores_and_clocks(name: str) -> None:
    gpu, (cores, clock_ghz) = find_gpu(name), CHIPS[name]
    fp32 = 2 * cores * clock_ghz / 1000
    is_geforce, has_fp8 = gpu.kind == "geforce", gpu.capability >= (8, 9)
    wanted = {
        "bf16_tflops": (2 if is_geforce else 4) * fp32,
        "fp16_tflops": (2 if is_geforce else 4) * fp32,
        "fp16_accumulate_fp16_tflops": 4 * fp32 if is_geforce else None,
        "int8_tops": 8 * fp32,
        "fp8_tflops": (4 if is_geforce else 8) * fp32 if has_fp8 else None,
        "fp8_fp16_accumulate_tflops": 8 * fp32 if is_geforce and has_fp8 else None,
        "fp4_tflops": 16 * fp32 if gpu.architecture == "Blackwell" else None,
    }
    for key, rate in wanted.items():
        assert getattr(gpu, key) == (rate and pytest.approx(rate, rel=0.02)), key


@pytest.mark.parametrize("gpu", CARDS)
def test_a_card_has_a_rate_for_what_its_tensor_cores_run_and_for_nothing_else(gpu: Gpu) -> None:
    for name, key in RATES.items():
        rate = rate_of(gpu, name)
        if name in ("fp8-blockwise", "mxfp8"):
            continue  # another way of scaling the same products, which has no rate of its own
        if support(name, gpu.capability).runs:
            assert rate is not None or key in gpu.unverified, (name, "a rate that nobody published is said to be missing")
        else:
            # Blackwell Ultra's INT8 is there, and slower than its BF16
            assert rate is None or (name == "int8" and gpu.bf16_tflops and rate < gpu.bf16_tflops), name
    assert rate_of(gpu, "int4") is None


@pytest.mark.parametrize("gpu", CARDS)
def test_a_cards_formats_are_weighed_beside_bf16(gpu: Gpu) -> None:
    formats = {each.support.format: each for each in weigh_formats(gpu.capability, gpu)}
    assert tuple(formats) == FORMAT_NAMES
    for each in formats.values():
        assert each.support.capability == gpu.capability
        assert each.support.runs or each.rate is None
        if each.rate and gpu.bf16_tflops:
            assert each.times_bf16 == each.rate / gpu.bf16_tflops
            assert 0.99 < each.times_bf16 < 9
    assert all(gpu.capability in tensor_core_capabilities(name) for name in list_engine_formats(gpu.capability))


def test_what_is_known_to_trip_people() -> None:
    ada, ampere, ultra = find_gpu("RTX 4090"), find_gpu("RTX 3090"), find_gpu("B300")
    weighed = {each.support.format: each.times_bf16 for each in weigh_formats(ada.capability, ada)}
    assert weighed["fp8-rowwise"] == pytest.approx(2, rel=0.01), "never the 4 times on the box"
    assert weighed["int8"] == pytest.approx(4, rel=0.01)
    assert list_engine_formats(ampere.capability) == ("bf16", "int8", "int8-weight")
    assert list_engine_formats(ultra.capability) == ("bf16", "fp8", "int8-weight", "nvfp4")
    assert list_engine_formats((7, 5)) == list_engine_formats((7, 0)) == ()
    assert all(gpu.capability in list_capabilities() for gpu in read_gpus())
    assert "RTX A6000" in list_alike(find_gpu("RTX 6000 Ada"))
    assert list_alike(ada) == ("RTX 4090 D",)


def damage(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (damage("power_w = 70", "power_kw = 70"), "gpu 1 has the unknown key power_kw"),
        (re.sub(r"\nsource = .*", "", TEXT, count=1), "gpu 1 lacks source"),
        (re.sub(r"\nchecked = .*", "", TEXT, count=1), "gpu 1 lacks checked"),
        (damage("memory_mib = 15360", 'memory_mib = "15360"'), "must be a whole number"),
        (damage("memory_mib = 15360", "memory_mib = 0"), "must be above 0"),
        (damage('kind = "data center"', 'kind = "datacenter"'), "must be one of data center"),
        (damage("capability = [7, 5]", "capability = [7.5]"), "must be a list of 2"),
        (damage('unverified = ["memory_mib"', 'unverified = ["price"'), "calls price unverified"),
        (damage('name = "A10G"', 'name = "A10"'), "A10 and A10 are named alike"),
        (damage('name = "A10G"', 'name = "NVIDIA  a10"'), "NVIDIA  a10 and A10 are named alike"),
        (damage('reported = ["NVIDIA A10G"]', 'reported = ["NVIDIA A10"]'), "A10G and A10 are named alike"),
        (damage("[[absent]]", "[[unheard]]"), "unknown table unheard"),
    ],
)
def test_a_wrong_table_is_refused(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "gpus.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=told):
        read_table(file)


def test_cards_are_values() -> None:
    gpu = find_gpu("L4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        gpu.power_w = 1  # type: ignore[misc]
    assert len({gpu, find_gpu("NVIDIA L4")}) == 1
