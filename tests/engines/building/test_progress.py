"""What a run of builds says of the time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from engines.building.progress import BuildProgress
from engines.flavors.tensorrt import import_tensorrt, make_monitor


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def begin(costs: list[float], clock: Clock) -> BuildProgress:
    progress = BuildProgress(costs, Console(file=io.StringIO()), clock)
    progress.start("unet")
    return progress


def test_before_any_milestone_the_expected_cost_runs_down(clock: Clock) -> None:
    progress = begin([60.0, 40.0], clock)
    clock.seconds += 15
    assert progress.left == "about 1 min 25 s left"


def test_a_job_that_overruns_its_expected_cost_does_not_promise_an_end(clock: Clock) -> None:
    progress = begin([60.0], clock)
    clock.seconds += 200
    assert progress.left == "longer than the 1 min 00 s expected"


def test_milestones_of_the_builder_outweigh_the_expected_cost(clock: Clock) -> None:
    progress = begin([60.0], clock)  # nine profiles, 30 s each instead of 7
    clock.seconds += 30
    progress.update("Computing profile costs", 1 / 9)
    assert progress.left == "about 4 min 00 s left"
    clock.seconds += 60  # and between two milestones the same speed holds
    assert progress.left == "about 3 min 00 s left"
    progress.update("Timing graph nodes", 1 / 9)  # no news: the milestone stays where it was
    assert progress.left == "about 3 min 00 s left"


def test_finished_jobs_set_the_pace_of_those_to_come(clock: Clock) -> None:
    progress = begin([10.0, 10.0], clock)
    clock.seconds += 30
    progress.finish("built")
    progress.start("vae_decoder")
    assert progress.left == "about 30 s left"
    clock.seconds += 20
    assert progress.left == "about 10 s left"
    clock.seconds += 20
    assert progress.left == "longer than the 30 s expected"


def test_the_builders_phases_become_one_fraction_and_a_profile() -> None:
    told: list[tuple[str, float]] = []
    monitor = make_monitor(import_tensorrt("tensorrt-rtx"), 3, lambda words, fraction: told.append((words, fraction)))
    monitor.phase_start("Optimizing graph", "Building engine from subgraph", 4)
    assert monitor.step_complete("Optimizing graph", 3)
    assert told[-1] == ("profile 1 of 3", pytest.approx(0.1 / 3))
    for number in (1, 2, 3):
        monitor.phase_start("Determining refit engines", "Computing profile costs", 1)
        monitor.phase_finish("Determining refit engines")
        assert told[-1] == (f"profile {min(number + 1, 3)} of 3", pytest.approx(min(0.99, number / 3)))
