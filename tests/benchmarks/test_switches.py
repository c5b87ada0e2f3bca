"""The rows of what each optimization buys, at the tiny size: every switch really switches, and no row is told of a wrong result."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import diffusers
import pytest
import torch

from benchmarks import peers, switch_rows, switches
from benchmarks.peers import STAGES, Job
from benchmarks.switch_rows import Group, Switch
from benchmarks.switches import Truth
from benchmarks.true_size import TINY, make_pipeline
from millicent.engine.editor import Editor
from millicent.engine.loading import Model
from millicent.engine.reading import Reader
from millicent.engine.settings import Settings
from millicent.errors import InputError, MachineError
from millicent.kernels import Kernels, reference
from millicent.model.vae import VAE

CPU = torch.device("cpu")
# FP32 on either side, the sums in another order: parts in 1e6 an operation, over two blocks, two layers or a VAE
FP32_ERROR = 1e-4
CPU_ROWS = [
    "everything",
    "off: edit_many",
    "off: modulation table",
    "on: the picture as read",
    "on: picture and prompt as read",
    "on: the picture's latents",
    "on: all of an edit but its seed",
    "everything again",
    "off: fast text encoder",
    "on: 8-bit attention",
    "on: 8-bit attention, coded anew",
    "on: reuse of the reference",
    "on: 8-bit attention and reuse",
    "on: 8-bit attention and reuse, coded anew",
]


@pytest.fixture(scope="module")
def pipeline() -> diffusers.QwenImageEditPlusPipeline:
    return make_pipeline(TINY, CPU, torch.float32)


@pytest.fixture(scope="module")
def job(pipeline: diffusers.QwenImageEditPlusPipeline) -> Job:
    return peers.make_job(pipeline, TINY, steps=2)


@pytest.fixture(scope="module")
def truth(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job) -> Truth:
    return switches.make_truth(pipeline, job)


@pytest.fixture
def model(pipeline: diffusers.QwenImageEditPlusPipeline) -> Model:
    return switch_rows.open_model(pipeline, TINY, switch_rows.choose_plan(Settings(), CPU))


@pytest.fixture(scope="module")
def rows(pipeline: diffusers.QwenImageEditPlusPipeline, job: Job, truth: Truth) -> dict[str, dict[str, Any]]:
    groups = switch_rows.make_groups(pipeline, TINY)
    return {switches.told(switch): row for switch, row in switches.measure_groups(groups, job, truth, images=1)}


def test_every_row_is_there_and_right(rows: dict[str, dict[str, Any]]) -> None:
    assert list(rows) == CPU_ROWS
    for name, row in rows.items():
        errors = row["errors"]
        if name.startswith("on: 8-bit attention"):
            # measured 0.006 on this network; BF16's bound is what a row must keep
            assert FP32_ERROR < errors["velocity"] < peers.BOUNDS["bf16"], name
        else:
            assert errors["velocity"] < FP32_ERROR, name
        assert max(errors[part] for part in ("text", "latents", "pixels")) < FP32_ERROR, name


def test_rows_tell_what_they_are_about(rows: dict[str, dict[str, Any]]) -> None:
    everything = rows["everything"]
    assert everything.keys() == {"errors", "step_ms", "edit_ms", "stages_ms", "in_a_row_ms", "images_per_s"}
    assert rows["off: edit_many"].keys() == {"errors", "in_a_row_ms", "images_per_s", "more_than_baseline"}
    for name, row in rows.items():
        if "edit_ms" in row:
            assert list(row["stages_ms"]) == list(STAGES)
        if name == "everything":
            continue
        more = row["more_than_baseline"]
        assert more
        for figure, value in more.items():
            if figure == "stages_ms":
                assert value == {stage: pytest.approx(row[figure][stage] - everything[figure][stage], abs=0.01) for stage in STAGES}
            else:
                assert value == pytest.approx(row[figure] - everything[figure], abs=0.01)  # rounded to hundredths


def test_differences() -> None:
    stages = dict.fromkeys(STAGES, 2.0)
    baseline = {"step_ms": 200.0, "edit_ms": 900.0, "peak_gib": 70.0, "stages_ms": stages}
    row = {"errors": {}, "step_ms": 210.5, "edit_ms": 890.0, "in_a_row_ms": 5.0, "stages_ms": {**stages, "text": 5.5}}
    assert switches.with_differences(row, baseline) == {
        **row,
        "more_than_baseline": {"step_ms": 10.5, "edit_ms": -10.0, "stages_ms": {**dict.fromkeys(STAGES, 0.0), "text": 3.5}},
    }
    assert switches.with_differences(row, {"failed": "out of memory"})["more_than_baseline"] == {}


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"errors": {"velocity": 0.1}, "step_ms": 200.0, "peak_gib": 70.5, "reserved_gib": 80.0}
    more = {"step_ms": 10.0, "peak_gib": -0.5}
    found = [(Switch(name="graphs"), {**row, "more_than_baseline": more}), (Switch(name="all", state="baseline"), row)]
    switches.show(found)
    titles, first, second, *_ = capsys.readouterr().out.strip().splitlines()
    assert titles.split("  ")[-1].strip() == "reserved GiB"
    assert first.split() == ["off:", "graphs", "0.1000", "200.0", "(+10.0)", "-", "-", "70.5", "(-0.5)", "80.0"]
    assert second.split() == ["all", "0.1000", "200.0", "-", "-", "70.5", "80.0"]


@pytest.mark.parametrize("part", ["velocity", "text", "latents", "pixels"])
def test_a_wrong_part_reports_no_speed(model: Model, job: Job, truth: Truth, part: str) -> None:
    wrong = dataclasses.replace(truth, **{part: 3 * getattr(truth, part)})
    figures = switches.measure(Switch(name="x", times_step=True, draw_many=switch_rows.draw_together), model, job, wrong, 1)
    assert figures.keys() == {"errors", "refused"}
    assert part in figures["refused"]
    assert figures["errors"][part] == pytest.approx(2 / 3, abs=FP32_ERROR)


def test_a_broken_row_is_told_and_the_others_go_on(
    model: Model, job: Job, truth: Truth, capsys: pytest.CaptureFixture[str]
) -> None:
    def unopened() -> Model:
        raise torch.OutOfMemoryError("no room at all")

    groups = [
        Group(lambda: model, (Switch(name="whole", state="baseline"), Switch(name="broken", turn=broken), Switch(name="next"))),
        Group(unopened, (Switch(name="first"), Switch(name="second"))),
    ]
    found = list(switches.measure_groups(groups, job, truth, images=1))
    rows = {switch.name: row for switch, row in found}
    assert list(rows) == ["whole", "broken", "next", "first", "second"]
    assert rows["broken"] == {"failed": "OutOfMemoryError: no room"}
    assert rows["first"] == rows["second"] == {"failed": "OutOfMemoryError: no room at all"}
    assert "edit_ms" in rows["next"]["more_than_baseline"]
    switches.show(found)
    told = capsys.readouterr()
    assert "no speed: OutOfMemoryError: no room" in told.out
    assert "no room" in told.err


@contextmanager
def broken(model: Model) -> Iterator[Model]:
    raise torch.OutOfMemoryError("no room")
    yield model


def test_network_is_switched_and_switched_back(model: Model, job: Job) -> None:
    network = switch_rows.fast_of(model).network
    before = network.kernels
    counted = CountingKernels()
    step = switches.make_step(model, job, switch_rows.nothing)
    wanted, drawings = step(), network._drawings
    assert len(drawings) == 1
    with switch_rows.with_network(kernels=cast("Kernels", counted), overlaps_text=False)(model) as turned:
        assert turned is model
        assert not drawings
        assert not network.overlaps_text
        assert torch.equal(switches.make_step(model, job, switch_rows.nothing)(), wanted)
    assert counted.calls > 0
    assert network.kernels is before
    assert network.overlaps_text
    assert not drawings
    with pytest.raises(ValueError, match="half-way"), switch_rows.with_network(overlaps_text=False)(model):
        raise ValueError("half-way")
    assert network.overlaps_text


class CountingKernels:
    calls = 0

    def __getattr__(self, name: str) -> object:
        type(self).calls += 1
        return getattr(reference, name)


def test_caches_are_hit_as_each_row_says(model: Model, job: Job, truth: Truth) -> None:
    reader, latents = model.reader, model.latents
    assert reader is not None
    assert latents is not None

    def hits(switch: Switch) -> dict[str, bool]:
        caches = {"openings": reader.openings, "embeddings": reader.embeddings, "latents": latents}
        editor, request = Editor("x", model), switches.make_request(job)
        editor.edit(request)
        before = {name: cache.hits for name, cache in caches.items()}
        switch.before_edit(model)
        editor.edit(request)
        return {name: cache.hits > before[name] for name, cache in caches.items()}

    found = {switch.name: hits(switch) for switch in switch_rows.shared_switches() if switch.times_edit}
    none = dict.fromkeys(("openings", "embeddings", "latents"), False)
    assert found == {
        "everything": none,
        "modulation table": none,
        "the picture as read": {**none, "openings": True},
        "picture and prompt as read": {**none, "embeddings": True},
        "the picture's latents": {**none, "latents": True},
        "all of an edit but its seed": {**none, "embeddings": True, "latents": True},
    }


def test_modulation_is_computed_as_often_as_its_row_says(model: Model, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    modulation = switch_rows.fast_of(model).modulation
    computed: list[int] = []
    make = modulation._vectors

    def count(name: str, timesteps: torch.Tensor, *upload: Any) -> torch.Tensor:
        computed.append(len(timesteps))
        return make(name, timesteps, *upload)

    monkeypatch.setattr(modulation, "_vectors", count)
    [switch] = [switch for switch in switch_rows.shared_switches() if switch.name == "modulation table"]
    linears = 2 * TINY.layers + 1  # of pictures and of text in each block, and the last norm's

    assert switch.before_step is switch_rows.make_vectors
    vectors = switch_rows.make_vectors(model)
    assert len(vectors) == linears
    wanted = {name: make(name, torch.tensor([peers.SIGMA])) for name in vectors}
    assert all(torch.equal(vectors[name], wanted[name]) for name in vectors)
    editor, request = Editor("x", model), switches.make_request(job)
    for _ in range(2):
        computed.clear()
        switch.before_edit(model)
        editor.edit(request)
        assert computed == [job.steps] * linears
    computed.clear()
    editor.edit(request)
    assert computed == []


def test_edges_are_switched(pipeline: diffusers.QwenImageEditPlusPipeline, model: Model, job: Job, truth: Truth) -> None:
    # what is recorded needs a card; what is not runs here too
    found = {switch.name: switch for switch in switch_rows.edge_switches(pipeline, TINY)}
    assert list(found)[-1] == "text encoder graphs"
    for name in ("VAE graphs", "VAE graphs and fused norm", "fast VAE", "text encoder graphs"):
        with found[name].turn(model) as turned:
            assert (turned.vae is model.vae, turned.reader is model.reader) == (name == "text encoder graphs", "VAE" in name)
            assert isinstance(turned.vae, VAE) == (name in ("fast VAE", "text encoder graphs"))
            assert isinstance(turned.reader, Reader)
            step = switches.make_step(turned, job, switch_rows.nothing)
            with torch.inference_mode():
                errors = switches.errors_of(step, found[name], turned, job, truth)
            assert max(errors.values()) < FP32_ERROR, name


def test_fused_norms_are_there_or_not(pipeline: diffusers.QwenImageEditPlusPipeline, model: Model) -> None:
    found = {switch.name: switch for switch in switch_rows.edge_switches(pipeline, TINY)}
    norms = {}
    for name in ("VAE graphs", "VAE graphs and fused norm", "fast VAE"):
        with found[name].turn(model) as turned:
            vae = turned.vae if isinstance(turned.vae, VAE) else turned.vae.vae
            norms[name] = {type(module).__name__ for module in vae.modules()}
    assert "FusedNorm" in norms["VAE graphs"]
    assert "FusedNorm" not in norms["VAE graphs and fused norm"] | norms["fast VAE"]
    assert "FastSelfAttention" in norms["VAE graphs and fused norm"]
    assert "FastSelfAttention" not in norms["fast VAE"]


def test_a_stage_is_its_own_time(model: Model, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(switches, "now_s", lambda model: float(next(ticks)))
    # a clock that goes on by one at each look: begin and end of each stage
    with torch.inference_mode():
        assert switches.time_stages(switch_rows.nothing, model, job) == dict.fromkeys(STAGES, 1000.0)


def test_an_edit_that_fails_in_a_row_is_no_speed(model: Model, job: Job) -> None:
    request = dataclasses.replace(switches.make_request(job), images=(job.picture.resize((1000, 1)),))
    with pytest.raises(InputError, match="too long"):
        switch_rows.draw_together(Editor("x", model), [request])


def test_rows_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    card = torch.device("cuda")
    fake = cast("diffusers.QwenImageEditPlusPipeline", SimpleNamespace(transformer=SimpleNamespace(device=card)))
    opened: list[tuple[str, str, str, bool]] = []

    def open_model(pipeline: object, size: object, chosen: Any) -> Model:
        opened.append((chosen.format, chosen.text_encoder, chosen.attention, chosen.reuse_reference))
        raise MachineError("no card", "none")

    monkeypatch.setattr(switch_rows, "open_model", open_model)
    groups = switch_rows.make_groups(fake, TINY)
    names = [switches.told(switch) for group in groups for switch in group.switches]
    assert names[0] == "everything"
    assert len(set(names)) == len(names)
    assert {"off: fp8", "off: fp8 text encoder", "off: fused kernels", "off: VAE graphs"} <= set(names)
    for group in groups:
        if group.switches[0].name != "fast text encoder":
            with pytest.raises(MachineError):
                group.open()
    # each but the last apart from the first two in one thing alone
    base = ("fp8", "fp8", "cudnn", False)
    assert opened == [
        base,
        base,
        ("fp8", "bf16", "cudnn", False),
        ("bf16", "fp8", "cudnn", False),
        ("fp8", "fp8", "int8", False),
        ("fp8", "fp8", "cudnn", True),
        ("fp8", "fp8", "int8", True),
    ]


def test_choosing(pipeline: diffusers.QwenImageEditPlusPipeline) -> None:
    groups = switch_rows.make_groups(pipeline, TINY)
    assert switches.choose(groups, None) == groups
    chosen = switches.choose(groups, "8-bit attention,edit_many")
    assert [[switch.name for switch in group.switches] for group in chosen] == [["everything", "edit_many"], ["8-bit attention"]]
    with pytest.raises(InputError, match="no switch nothing"):
        switches.choose(groups, "edit_many,nothing")


def test_whole_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--only", "edit_many", "--images", "1", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["switches", *arguments])
    switches.main()
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(line["switch"], line["state"]) for line in lines] == [("everything", "baseline"), ("edit_many", "off")]
    assert lines[1]["more_than_baseline"].keys() == {"in_a_row_ms"}
    assert "off: edit_many" in capsys.readouterr().out
