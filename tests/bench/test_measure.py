from dataclasses import replace

import pytest

from bench.fake import FakeContestant, busy_wait
from bench.measure import STAGES, Cell, CpuClock, Plan, cold_start, measure_cells, measure_rounds, timed_draw
from bench.workload import Workload
from distill.architectures import Resolution
from distill.errors import UserError

WORKLOAD = Workload(resolution=Resolution(64, 64), steps=4)
DELAYS = {
    "prepare": 2.0,
    "tokenise": 1.0,
    "text_encoders": 4.0,
    "denoise": 10.0,
    "vae_decode": 8.0,
    "post_process": 3.0,
}


def best(runs):
    """The least of each stage over several runs: others on the machine can only add time."""
    return {stage: min(run.stages_ms[stage] for run in runs) for stage in STAGES}


def test_the_known_delays_come_back():
    fake = FakeContestant("fake", DELAYS)
    runs = [timed_draw(fake, WORKLOAD, CpuClock())[0] for _ in range(8)]
    found = best(runs)
    for stage, delay in DELAYS.items():
        expected = delay * (WORKLOAD.steps if stage == "denoise" else 1)
        assert found[stage] == pytest.approx(expected, rel=0.02, abs=0.3), stage
    for run in runs:
        assert len(run.steps_ms) == WORKLOAD.steps
        assert run.unaccounted < 0.01


def test_the_harness_adds_less_than_one_percent():
    """The least total over the delays themselves, for a call of 20 ms: far shorter than a real one."""
    fake = FakeContestant("fake", {"denoise": 5.0})
    clock = CpuClock()

    def bare() -> float:
        clock.start()
        for _ in range(4):
            busy_wait(5.0)
        clock.mark("all")
        return clock.finish()[0][0][1]

    least_bare = min(bare() for _ in range(10))
    least_timed = min(
        sample.total_ms - sample.stages_ms["post_process"]  # drawing the fake picture is the contestant's own work
        for sample in (timed_draw(fake, WORKLOAD, clock)[0] for _ in range(10))
    )
    assert (least_timed - least_bare) / least_bare < 0.01


def test_rounds_are_interleaved_and_turn():
    order = []

    class Logged(FakeContestant):
        def draw(self, workload, mark):
            order.append(self.name)
            return super().draw(workload, mark)

    fakes = [Logged(name, {"denoise": 0.1}) for name in "abc"]
    cell = Cell(WORKLOAD)
    measure_rounds(fakes, cell, Plan(min_rounds=3, max_rounds=3, warmup=1, max_warmup=1), 0.0)
    assert "".join(order[3:]) == "abcbcacab"
    assert [len(samples) for samples in cell.samples.values()] == [3, 3, 3]


def test_a_contestant_that_fails_is_recorded_and_the_others_go_on():
    class Broken(FakeContestant):
        def draw(self, workload, mark):
            raise RuntimeError("out of memory")

    cell = Cell(WORKLOAD)
    measure_rounds([Broken("bad", {}), FakeContestant("good", {})], cell, Plan(max_rounds=3), 0.0)
    assert cell.failures == {"bad": "RuntimeError: out of memory"}
    assert len(cell.samples["good"]) == 3


def test_the_cold_start_stands_apart():
    fake = FakeContestant("fake", {"denoise": 1.0}, load_ms=30.0)
    cold = cold_start(fake, WORKLOAD)
    assert cold.load_ms == pytest.approx(30, rel=0.2)
    assert cold.first_image_ms < 20


@pytest.mark.parametrize("text", ["sleep=3", "denoise=fast", "denoise=-1", "denoise"])
def test_bad_delays_are_a_users_mistake(text):
    with pytest.raises(UserError):
        FakeContestant.parse("fake", text)


def test_every_workload_is_visited_there_and_back_again():
    visits = []
    workloads = [WORKLOAD, replace(WORKLOAD, steps=2), replace(WORKLOAD, steps=1)]
    cells = measure_cells(
        [FakeContestant("fake", {})],
        workloads,
        Plan(min_rounds=4, max_rounds=4, max_warmup=1),
        0.0,
        on_visit=lambda cell, last: visits.append((cell.workload.steps, last)),
    )
    assert visits == [(4, False), (2, False), (1, False), (1, True), (2, True), (4, True)]
    assert [sample.round for sample in cells[0].samples["fake"]] == [0, 1, 2, 3]
