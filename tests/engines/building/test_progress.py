"""What a run of builds says of the time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from engines.building.progress import BuildProgress
from engines.flavors.tensorrt import import_tensorrt
from engines.flavors.tensorrt_build import make_monitor


def test_the_time_left() -> None:
    """As expected until something is done; then nearer to the pace so far; no promise once it took longer."""
    now = 100.0
    progress = BuildProgress([60.0, 40.0], Console(file=(said := io.StringIO())), lambda: now)
    progress.start("unet")
    now += 15
    assert progress.left == "about 1 min 25 s left"
    progress.update("profile 2 of 4", 0.25)
    assert progress.left == "about 1 min 25 s left"
    now += 15
    progress.update("profile 2 of 4", 0.25)
    assert progress.left == "about 1 min 10 s left", "without news it counts down"
    progress.update("profile 3 of 4", 0.3)  # 18 of the 30 seconds' work, and 10 of the expectation's
    assert progress.left == "about 1 min 57 s left"
    progress.finish("built")
    progress.start("vae_decoder")
    assert progress.left == "about 23 s left"
    assert "[1/2] unet: profile 2 of 4, about 1 min 25 s left" in said.getvalue()
    late = BuildProgress([60.0], Console(file=io.StringIO()), lambda: now)
    late.start("unet")
    now += 200
    assert late.left == "longer than the 1 min 00 s expected"


def test_the_builders_phases_become_one_fraction_and_a_profile() -> None:
    heard: list[tuple[str, float]] = []
    monitor = make_monitor(import_tensorrt("tensorrt-rtx"), 3, lambda text, fraction: heard.append((text, fraction)))
    monitor.phase_start("Optimizing graph", "Building engine from subgraph", 4)
    assert monitor.step_complete("Optimizing graph", 3)
    assert heard[-1] == ("profile 1 of 3", pytest.approx(0.1 / 3))
    for number in (1, 2, 3):
        monitor.phase_start("Determining refit engines", "Computing profile costs", 1)
        monitor.phase_finish("Determining refit engines")
        assert heard[-1] == (f"profile {min(number + 1, 3)} of 3", pytest.approx(min(0.99, number / 3)))
