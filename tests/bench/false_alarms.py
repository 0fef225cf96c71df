"""How often `bench compare` cries wolf, and whether it finds a true slowdown, on this machine as busy as it is.

    python -m tests.bench.false_alarms [LAUNCHES]

Six runs of one command and six of the same with one contestant given 10 % more work, launches of the two in turn; every pair
of runs is compared. The contestants do real work on the CPU (a product that stays in the cache, a sort, a copy that does
not), so that neighbours slow them down, each differently, for 20 to 100 ms, as long as the shortest pictures worth timing.
No torch: a launch takes five seconds, or nine beside others, all of it five to ten minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from typing import Any

import numpy as np

from bench.compare import compare_results
from bench.contestants.fake import FakeContestant
from bench.launches import join
from bench.measure.gpu import Gpu
from bench.measure.rounds import Rounds, measure_cells
from bench.measure.watch import Sampler, Watch
from bench.results import ContestantRecord, Results, record_cell
from bench.workload import Workload
from distill.models.resolution import Resolution

RUNS, ROUNDS, SLOWER = 6, 24, 1.1
WORK = {"products": 400, "sort": 200, "copy": 200, "slowed": 400}
MATRIX = np.random.default_rng(0).random((160, 160))
MANY = np.random.default_rng(1).random(20_000)
LARGE = np.zeros(1 << 19)
TASKS = {
    "products": lambda: MATRIX @ MATRIX,
    "sort": lambda: np.sort(MANY),
    "copy": lambda: LARGE + 1,
    "slowed": lambda: MATRIX @ MATRIX,
}


class Working(FakeContestant):
    """Does its task so many times for each picture."""

    times = 0

    def draw(self, workload: Workload, mark: Any) -> Any:
        for _ in range(self.times):
            TASKS[self.name]()
        return super().draw(workload, mark)


def launch(factor: float) -> Results:
    """One launch: interleaved rounds of all four."""
    contestants = []
    for name, times in WORK.items():
        contestants.append(Working(name, {}))
        contestants[-1].times = round(times * factor) if name == "slowed" else times
    rounds, records = Rounds(ROUNDS, ROUNDS, 3), {}
    with Sampler(Gpu("cpu")) as sampler:
        watch = Watch(sampler)
        for cell, _ in measure_cells(contestants, [Workload(resolution=Resolution(64, 64), steps=1)], rounds, 0.0):
            faults, _device = watch.visited(cell)
            records[cell.workload.name] = record_cell(cell, costs={}, peak=None, faults=faults)
    about = {"runtime": "", "precision": "", "device": "cpu", "parameters": None, "costs": None, "costs_why": None}
    about |= {"cold": {}, "memory": {}, "energy": {}, "quality": {}, "follows": None, "artifacts": []}
    return Results(
        created_utc="",
        command="",
        seconds=0.0,
        baseline="products",
        family="sdxl",
        environment={"cpu": {"model": None}},
        gpu={"identity": {"name": None}, "after": None},
        peak=None,
        contestants=[ContestantRecord(name=name, spec="", **about) for name in WORK],
        cells=list(records.values()),
        pictures=[],
    )


def launch_apart(factor: float) -> Results:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.false_alarms", "--launch", str(factor)]
    one_thread = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # threads that wait for each other on a busy machine measure that
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread).stdout
    return Results.model_validate(json.loads(text))


def count(runs: dict[float, list[Results]]) -> None:
    """Prints what became of every comparison."""
    same = [one for side in runs.values() for pair in combinations(side, 2) for one in compare_results(*pair)]
    slower = [one for pair in product(*runs.values()) for one in compare_results(*pair)]
    rows = [row for side in runs.values() for results in side for row in results.cells[0].rows]
    doubted = sum(bool(row.diagnosis) for row in rows)
    print(f"{rows[0].launches} launch(es) a run; {doubted} of {len(rows)} rows have a diagnosis")
    for title, changes in (
        ("the same thing", same + [one for one in slower if one.contestant != "slowed"]),
        (f"{SLOWER - 1:.0%} slower", [one for one in slower if one.contestant == "slowed"]),
    ):
        spread = sorted(one.ratio.value for one in changes if one.ratio)
        verdicts = ", ".join(f"{many} {verdict}" for verdict, many in Counter(one.verdict for one in changes).items())
        print(f"{title}: {len(changes)} comparisons: {verdicts}; ratios {spread[0]:.3f} to {spread[-1]:.3f}")


def main(launches: int) -> None:
    done: dict[float, list[list[Results]]] = {1.0: [], SLOWER: []}
    for _ in range(RUNS):
        parts = [(launch_apart(1.0), launch_apart(SLOWER)) for _ in range(launches)]
        for runs, ours in zip(done.values(), zip(*parts, strict=True), strict=True):
            runs.append(list(ours))
        print(f"load average {os.getloadavg()[0]:.1f}", flush=True)
    for many in sorted({1, 3, launches}):
        count({factor: [join(parts[:many]) for parts in runs] for factor, runs in done.items()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--launch"]:
        print(launch(float(sys.argv[2])).model_dump_json())
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
