"""The quality benchmark: its figures against scikit-image's and known values, and two scenes end to end on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from benchmarks import quality
from benchmarks.quality import BASELINE, CONFIGURATIONS, HeldOut, Scores, compare, draw, held_out, is_done, spread
from millicent.engine.settings import FORMATS
from millicent.errors import MachineError
from recipes.demo.evaluate import to_pixels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes() -> HeldOut:
    return held_out(2, CPU)


def with_configurations(*names: str) -> list[quality.Configuration]:
    chosen = [configuration for configuration in CONFIGURATIONS if configuration.name in names]
    assert len(chosen) == len(names)
    return chosen


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict], list[str]]:
    """The exit status, the JSON lines and the table's lines."""
    monkeypatch.setattr(sys, "argv", ["quality", "--device", "cpu", "--scenes", "2", *arguments])
    status = quality.main()
    lines = capsys.readouterr().out.splitlines()
    return (
        status,
        [json.loads(line) for line in lines if line.startswith("{")],
        [line for line in lines if line[:1] not in ("{", "")],
    )


def test_distances_are_scikit_images(scenes: HeldOut) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = 0.05 * torch.randn(scenes.sources.shape, generator=generator)
    a, b = scenes.sources, (scenes.sources + noise).clamp(0, 1)
    found = compare(b, a)
    for i in range(len(a)):
        x, y = (pictures[i].permute(1, 2, 0).double().numpy() for pictures in (a, b))
        wanted_ssim = structural_similarity(
            x, y, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11
        )
        # FP32 sums of 200,000 squares
        assert found["psnr_db"][i].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-3)
        # both in float64, ours kept in FP32
        assert found["ssim"][i].item() == pytest.approx(wanted_ssim, abs=1e-6)
        # both in float64, ours kept in FP32 for each pixel
        assert found["ciede2000"][i].item() == pytest.approx(deltaE_ciede2000(rgb2lab(x), rgb2lab(y)).mean(), abs=1e-4)


def test_the_same_picture_has_no_distance(scenes: HeldOut) -> None:
    found = compare(scenes.sources, scenes.sources)
    assert found["psnr_db"].tolist() == [100.0, 100.0]
    assert found["ssim"].numpy() == pytest.approx(np.ones(2), abs=1e-6)  # rounding of FP32
    assert found["ciede2000"].tolist() == [0.0, 0.0]


def test_the_worst_is_the_lowest_of_what_is_better_high() -> None:
    values = torch.arange(11.0)
    assert spread(values, is_better_high=True) == {"mean": 5.0, "worst_decile": 1.0, "worst": 0.0}
    assert spread(values, is_better_high=False) == {"mean": 5.0, "worst_decile": 9.0, "worst": 10.0}


def test_an_edit_is_done_when_half_the_difference_is_gone() -> None:
    unedited = {"de_inside": torch.tensor([10.0, 10.0, 2.0])}
    edited = {"de_inside": torch.tensor([4.9, 5.0, 4.9])}
    assert is_done(edited, unedited).tolist() == [True, False, False]


def test_scores_tell_a_lost_edit_from_changed_pixels(scenes: HeldOut) -> None:
    scores = Scores(scenes, scenes.targets)
    perfect = scores.score(scenes.targets)
    assert (perfect["identical"], perfect["edits_done"], perfect["edits_lost"], perfect["edits_gained"]) == (2, 2, 0, 0)
    assert perfect["task"]["de_inside"] == 0
    # a level of 255 brighter: every pixel has changed, and every edit is done
    brighter = scores.score((scenes.targets + 1 / 255).clamp(0, 1))
    assert (brighter["identical"], brighter["edits_done"], brighter["edits_lost"]) == (0, 2, 0)
    one_lost = scores.score(torch.stack([scenes.targets[0], scenes.sources[1]]))
    assert (one_lost["identical"], one_lost["edits_done"], one_lost["edits_lost"]) == (1, 1, 1)
    gained = Scores(scenes, scenes.sources).score(scenes.targets)
    assert (gained["edits_done"], gained["edits_lost"], gained["edits_gained"]) == (2, 0, 2)


def test_scenes_are_those_of_evaluate_whatever_their_number(scenes: HeldOut) -> None:
    """Each comes with its own seed, wording and pictures; only the order follows the prompt's length."""
    more = held_out(3, CPU)
    seeds = [request.seed for request in more.requests]
    assert sorted(seeds) == [0, 1, 2]
    for number, request in enumerate(scenes.requests):
        i = seeds.index(request.seed)
        assert request.prompt == more.requests[i].prompt
        assert torch.equal(scenes.sources[number], more.sources[i])
        assert torch.equal(to_pixels(request.images[0]), scenes.sources[number])
        assert torch.equal(scenes.masks[number], more.masks[i])


def test_every_format_has_a_row() -> None:
    assert {configuration.settings.format for configuration in CONFIGURATIONS} >= set(FORMATS)
    assert len({configuration.name for configuration in CONFIGURATIONS}) == len(CONFIGURATIONS)


def test_two_scenes_end_to_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "quality.jsonl"
    monkeypatch.setattr(quality, "RESULTS", saved)
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    status, rows, table = run(monkeypatch, capsys, "--save", "--only", "bf16", "fp8")
    assert status == 0
    assert [json.loads(line) for line in saved.read_text().splitlines()] == rows
    unedited, bf16, fp8 = rows
    assert [row["configuration"] for row in rows] == ["unedited", "bf16", "fp8"]
    assert bf16["identical"] == 2  # the same seeds and the same arithmetic
    # the demo does edit, and FP8's three bits of mantissa leave the edit as it is
    assert bf16["edits_done"] == fp8["edits_done"] == 2
    assert unedited["edits_done"] == 0
    assert fp8["identical"] == 0
    assert unedited["psnr_db"]["mean"] < 30 < fp8["psnr_db"]["worst"] < 60
    assert fp8["ciede2000"]["worst"] < 2 < unedited["ciede2000"]["mean"]
    for row in rows:
        assert row["scenes"] == 2
        assert row["card"]
        assert row["versions"]["torch"] == torch.__version__
    assert len(table) == 3 + len(rows)


def test_what_does_not_run_is_a_row_that_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A refusal is kept; a failure is told by the exit status and not kept; neither stops the others."""

    def fake(configuration: quality.Configuration, requests: object, device: torch.device) -> Tensor:
        if configuration.name == "int8":
            raise RuntimeError("a kernel broke")
        if configuration.name == "nvfp4":
            raise MachineError("This card does not run nvfp4.", "Use fp8.")
        return torch.zeros(2, 3, 256, 256)

    monkeypatch.setattr(quality, "draw", fake)
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.jsonl")
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    status, rows, table = run(monkeypatch, capsys, "--save", "--only", "int8", "nvfp4", "reuse")
    assert status == 1
    assert [row["configuration"] for row in rows] == ["unedited", "int8", "nvfp4", "reuse"]
    assert rows[1]["failed"] == "RuntimeError: a kernel broke"
    assert rows[2]["not_run"] == "This card does not run nvfp4. Use fp8."
    assert not {"psnr_db", "task"} & (rows[1].keys() | rows[2].keys())
    assert rows[3]["identical"] == 2
    assert "FAILED: RuntimeError: a kernel broke" in table[-3]
    assert "not run: This card does not run nvfp4." in table[-2]
    assert [json.loads(line)["configuration"] for line in quality.RESULTS.read_text().splitlines()] == [
        "unedited",
        "nvfp4",
        "reuse",
    ]


def test_other_seeds_draw_other_pictures_of_the_same_edit(scenes: HeldOut) -> None:
    [other] = with_configurations("bf16+other-seeds")
    scores = Scores(scenes, draw(BASELINE, scenes.requests, CPU))
    row = scores.score(draw(other, scenes.requests, CPU))
    assert row["identical"] == 0
    assert row["edits_done"] == 2
