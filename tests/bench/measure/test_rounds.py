from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bench.contestants.contestant import STAGES
from bench.contestants.fake import FakeContestant
from bench.contestants.pictures import Pictures
from bench.measure.clock import CpuClock, timed_draw
from bench.measure.cold_start import cold_start
from bench.measure.rounds import Cell, Rounds, measure_cells, measure_rounds
from bench.results import record_cell
from bench.workload import Workload
from distill.common.errors import UserError
from distill.models.resolution import Resolution

WORKLOAD = Workload(resolution=Resolution(64, 64), steps=4)
DELAYS = {"prepare": 2.0, "tokenise": 1.0, "text_encoders": 4.0, "denoise": 10.0, "vae_decode": 8.0, "post_process": 3}


def test_the_known_delays_come_back_exactly(virtual_time):
    sample, _ = timed_draw(FakeContestant("fake", DELAYS), WORKLOAD, CpuClock())
    for stage, delay in DELAYS.items():
        expected = delay * (WORKLOAD.steps if stage == "denoise" else 1)
        assert sample.stages_ms[stage] == pytest.approx(expected, abs=1e-3), stage
    assert sample.steps_ms == pytest.approx([10.0] * WORKLOAD.steps, abs=1e-3)
    assert sample.total_ms == pytest.approx(58, abs=1e-3)
    assert sample.unaccounted < 1e-4


def test_the_known_delays_come_back_from_the_real_clock():
    """The least of as many short runs as it takes: whatever else the machine does can only add time."""
    fake = FakeContestant("fake", dict.fromkeys(STAGES, 1.0))
    expected = {stage: 4.0 if stage == "denoise" else 1.0 for stage in STAGES}
    least, unaccounted = dict.fromkeys(STAGES, np.inf), np.inf
    for _ in range(2000):
        run, _pictures = timed_draw(fake, WORKLOAD, CpuClock())
        least = {stage: min(least[stage], run.stages_ms[stage]) for stage in STAGES}
        unaccounted = min(unaccounted, run.unaccounted)
        if least == pytest.approx(expected, rel=0.02) and unaccounted < 0.01:
            break
    assert least == pytest.approx(expected, rel=0.02)
    assert unaccounted < 0.01


def test_the_harness_adds_less_than_one_percent():
    """All that a call of 50 steps costs beyond its delays, none here, against the shortest picture worth timing (20 ms).
    The least of many: whatever else the machine does can only add time."""
    fake, clock = FakeContestant("fake", {}), CpuClock()
    added_ms = min(timed_draw(fake, replace(WORKLOAD, steps=50), clock)[0].total_ms for _ in range(200))
    assert 0 < added_ms / 20 < 0.01


def test_rounds_are_interleaved_and_turn():
    order = []

    class Logged(FakeContestant):
        def draw(self, workload, mark):
            order.append(self.name)
            return super().draw(workload, mark)

    fakes = [Logged(name, {"denoise": 0.1}) for name in "abc"]
    cell = Cell(WORKLOAD)
    measure_rounds(fakes, cell, Rounds(min_rounds=6, max_rounds=6, max_warmup=1), 0.0)
    rounds = ["".join(order[begin : begin + 3]) for begin in range(3, 21, 3)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert [len(samples) for samples in cell.samples.values()] == [6, 6, 6]
    follows = Counter(pair for one in rounds for pair in (one[:2], one[1:]))
    assert set(follows.values()) == {2} and len(follows) == 6, "each comes after each as often"


def test_what_is_wrong_with_a_picture_refuses_its_row_and_what_is_not_warm_is_told():
    class Black(FakeContestant):
        def draw(self, workload, mark):
            pictures = super().draw(workload, mark)
            return Pictures(np.zeros_like(pictures.images))

    cell = Cell(WORKLOAD)
    measure_rounds([Black("black", {"denoise": 0.1}), FakeContestant("good", {"denoise": 0.1})], cell, Rounds(), 0.0)
    cell.unsettled["good"] = 0.2
    black, good = record_cell(cell, costs={}, peak=None, faults={}).rows
    assert black.refused and black.speedup is None and black.diagnosis[0].startswith("refused: picture 0 is black")
    assert not good.refused and "still differed by 20%" in "; ".join(good.diagnosis)


def test_a_contestant_that_fails_is_recorded_and_the_others_go_on():
    class Broken(FakeContestant):
        def draw(self, workload, mark):
            raise RuntimeError("no kernel")

    cell = Cell(WORKLOAD)
    measure_rounds([Broken("bad", {}), FakeContestant("good", {})], cell, Rounds(max_rounds=3), 0.0)
    assert cell.failures == {"bad": "RuntimeError: no kernel"}
    assert len(cell.samples["good"]) == 3


def test_the_cold_start_stands_apart(virtual_time):
    cold = cold_start(FakeContestant("fake", {"denoise": 1.0}, load_ms=30.0), WORKLOAD)
    assert cold["load_ms"] == pytest.approx(30, abs=1e-3)
    assert cold["first_image_ms"] == pytest.approx(4, abs=1e-3)


@pytest.mark.parametrize("text", ["sleep=3", "denoise=fast", "denoise=-1", "denoise"])
def test_bad_delays_are_a_users_mistake(text):
    with pytest.raises(UserError):
        FakeContestant.parse("fake", text)


def test_every_workload_is_visited_there_and_back_again():
    workloads = [WORKLOAD, replace(WORKLOAD, steps=2), replace(WORKLOAD, steps=1)]
    rounds = Rounds(min_rounds=4, max_rounds=4, max_warmup=1)
    cells = list(measure_cells([FakeContestant("fake", {})], workloads, rounds, 60.0))
    visits = [(cell.workload.steps, is_done) for cell, is_done in cells]
    assert visits == [(4, False), (2, False), (1, False), (1, True), (2, True), (4, True)]
    assert [sample.round for sample in cells[0][0].samples["fake"]] == [0, 1, 2, 3]


def test_a_machine_far_too_slow_still_gets_every_workload_done():
    workloads = [WORKLOAD, replace(WORKLOAD, steps=2)]
    visits = list(measure_cells([FakeContestant("fake", {"denoise": 0.2})], workloads, Rounds(min_rounds=20), 0.0))
    counts = [len(cell.samples["fake"]) for cell, is_done in reversed(visits) if is_done]
    assert counts == [20, 2], "the main one gets what an interval needs"
