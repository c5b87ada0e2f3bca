"""What a step's time is told to be, of kernels whose times are known."""

from __future__ import annotations

import pytest

from benchmarks.step import Kernel, lay_out_in_time


def test_gaps_and_what_runs_at_once() -> None:
    kernels = [
        Kernel("a", 0, 10),
        Kernel("b", 12, 30),
        Kernel("c", 20, 25),
        Kernel("d", 28, 34),
        Kernel("b", 39, 40),
        Kernel("c", 40, 41),
    ]
    whole_ms, idle_ms, beside_ms, gaps_us = lay_out_in_time(kernels)
    assert whole_ms == pytest.approx(0.041)
    assert beside_ms == pytest.approx(0.007)
    assert idle_ms == pytest.approx(0.007)
    assert gaps_us == {("a", "b"): [2], ("d", "b"): [5], ("b", "c"): [0]}
