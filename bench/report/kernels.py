"""What the device does in one step, of drawing or of training, by kind of kernel."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from bench.report.cards import contestant_cell
from bench.report.elements.formatting import milliseconds, percent
from bench.report.elements.tables import Cell, Column, Table, make_table, measured
from bench.report.training import LoopsFile
from bench.results import Results


@dataclass(frozen=True)
class Profile:
    """One step by kind of kernel. `families_ms` need not sum to `step_ms`, which was timed without the profiler."""

    name: Cell
    step_ms: float | None
    families_ms: dict[str, float]

    def share(self, family: str) -> float:
        return self.families_ms[family] / sum(self.families_ms.values())


def profiles(all_results: list[Results], loops: list[LoopsFile]) -> list[Profile]:
    """Denoising steps of every run that was profiled, then training steps. Of runs that profiled the same the first
    stands."""
    found: dict[tuple[Any, ...], Profile] = {}
    for results in all_results:
        for record in results.contestants:
            key = (results.cells[0].name, record.parameters or record.name, record.runtime, record.precision)
            if record.kernels and record.kernels["families_ms"]:
                told = record.kernels.get("step_ms"), record.kernels["families_ms"]
                found.setdefault(key, Profile(contestant_cell(record), *told))
    training = [
        Profile(
            Cell(file.title, small=(f"training, {loop.name}",)), loop.kernels["step_ms"], loop.kernels["families_ms"]
        )
        for file in loops
        for loop in file.loops
        if loop.kernels
    ]
    return [*found.values(), *training]


def kernel_table(found: list[Profile]) -> Table:
    """The family with the largest shares first."""
    shares: Counter[str] = Counter()
    for one in found:
        shares.update({family: one.share(family) for family in one.families_ms})

    def column(family: str) -> Column[Profile]:
        def write(one: Profile) -> Cell | None:
            if family not in one.families_ms:
                return None
            return measured(milliseconds(one.families_ms[family]), percent(one.share(family)))

        return Column(family, write)

    return make_table(
        found,
        Column("contestant", lambda one: one.name),
        Column("step", lambda one: measured(milliseconds(one.step_ms))),
        *(column(family) for family, _ in shares.most_common()),
        dense=True,
    )
