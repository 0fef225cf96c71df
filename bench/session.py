"""The contestants of one run in one process: loaded, timed, drawn and freed, side by side or one after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from bench.contestants.contestant import Contestant
from bench.measure.cold_start import measure_cold_start
from bench.measure.gpu import Gpu
from bench.measure.kernels import kernels_of
from bench.measure.rounds import Cell, DoNotFitError, Rounds, measure_cells, out_of_memory_beside
from bench.measure.sustained import draw_sustained
from bench.measure.watch import Sampler, Watch
from bench.options import RunOptions, unfinished
from bench.quality.pictures import draw_pictures
from bench.quality.reference import Drawn, draw_for_guard, judge
from bench.results import CellRecord, ContestantRecord, Results, Trace, record_cell, write_results
from bench.workload import Workload
from distill.common.errors import UserError, describe_error
from distill.common.progress import say
from distill.data.shapes import shares
from distill.models.families import Family
from engines.building.worker import peak_rss_bytes

STOPPED = "the run was stopped before this"
SAVE_EVERY_S = 30.0


@dataclass
class Session:
    """Fills `results`, and saves them as it goes."""

    options: RunOptions
    workloads: list[Workload]
    family: Family
    gpu: Gpu
    results: Results
    begun_s: float = field(default_factory=time.monotonic)
    _loaded: dict[str, Contestant] = field(default_factory=dict)
    _drawn: dict[str, Drawn] = field(default_factory=dict)
    _cells: dict[str, CellRecord] = field(default_factory=dict)
    _saved_s: float = 0.0

    def save(self) -> None:
        self.results.seconds, self._saved_s = time.monotonic() - self.begun_s, time.monotonic()
        self.results.environment["peak_rss_bytes"] = peak_rss_bytes()
        write_results(unfinished(self.options.out), self.results)

    def measure_together(self, contestants: list[Contestant]) -> None:
        """All in memory at once, in interleaved rounds. Raises DoNotFitError, with all freed, where that is too much."""
        loaded: list[Contestant] = []
        try:
            for contestant in contestants:
                if self.load(contestant, beside=loaded):
                    loaded.append(contestant)
            self._require_some()
            say("timed rounds, interleaved")
            self.time_rounds(loaded, self.options.seconds)
            for contestant in loaded:
                self.finish(contestant)
        finally:
            for contestant in loaded:
                contestant.unload()

    def measure_in_turns(self, contestants: list[Contestant], why: str) -> None:
        """One in memory at a time: loaded, timed, drawn and freed before the next one is loaded."""
        say(f"one contestant after the other: {why}")
        self.results.cells, self.results.pictures, self.results.contestants, self.results.notes = [], [], [], []
        self._loaded, self._drawn, self._cells, self.results.in_turns = {}, {}, {}, why
        cells = [Cell(workload) for workload in self.workloads]
        for contestant in contestants:
            if self.load(contestant):
                self.time_rounds([contestant], self.options.seconds / len(contestants), cells)
                self.finish(contestant)
            contestant.unload()
        self._require_some()

    def _require_some(self) -> None:
        """Raises UserError where none was loaded; speed-ups are against the first that was, where the baseline is not."""
        names = [record.name for record in self.results.contestants]
        if not names:
            raise UserError(f"no contestant could be loaded; {self.results.notes[0]}")
        if self.results.baseline not in names:
            self.results.notes.append(
                f"the baseline {self.results.baseline} did not load; speed-ups are against {names[0]}"
            )
            self.results.baseline = names[0]

    def load(self, contestant: Contestant, beside: Sequence[Contestant] = ()) -> bool:
        """Whether it loaded; the notes say why not: out of memory on one leaves the others their turn.

        Raises UserError where a contestant says itself what is wrong with it, and DoNotFitError where those beside it take
        its memory.
        """
        try:
            cold, memory = measure_cold_start(contestant, self.workloads[0], self.gpu)
            self.results.contestants.append(make_record(contestant, self.workloads, cold, memory))
        except UserError:
            raise
        except Exception as error:
            contestant.unload()
            if out_of_memory_beside(error, [*beside, contestant]):
                raise DoNotFitError(f"{contestant.name} ran out of memory beside {len(beside)} other(s)") from error
            self.results.notes.append(f"{contestant.name} did not load: {describe_error(error)}")
            say(f"  {self.results.notes[-1]}")
            return False
        self._loaded[contestant.name] = contestant
        load_s, first_s = cold["load_ms"] / 1e3, cold["first_image_ms"] / 1e3
        say(f"  {contestant.name}: loaded in {load_s:.1f} s, first image {first_s:.2f} s")
        return True

    def time_rounds(self, contestants: list[Contestant], seconds: float, cells: Sequence[Cell] = ()) -> None:
        """The timed rounds. What a visit has is saved now and then, and where it is stopped."""
        options, visiting = self.options, None
        rounds = Rounds(options.min_rounds, options.max_rounds, options.max_warmup)

        def on_round(cell: Cell) -> None:
            nonlocal visiting
            visiting = cell
            if time.monotonic() - self._saved_s > SAVE_EVERY_S:
                self._keep(cell, {}, {})

        with Sampler(self.gpu) as sampler:
            watch = Watch(sampler)
            visits = measure_cells(contestants, self.workloads, rounds, seconds, on_round=on_round, cells=cells)
            try:
                for visit, (cell, is_done) in enumerate(visits, 1):
                    visiting = None
                    self._keep(cell, *watch.visited(cell))
                    self.results.gpu["after"] = self.gpu.state()
                    self.save()
                    _say_visit(f"[{visit}/{2 * len(self.workloads)}]", cell, is_done)
                    for row in self._cells[cell.workload.name].rows if is_done else ():
                        for fault in row.eight_bit_faults():
                            say(f"    warning: {row.contestant} {fault}")
            finally:
                if visiting is not None:
                    self._keep(visiting, *watch.visited(visiting))

    def _keep(self, cell: Cell, faults: dict[str, Any], device: dict[str, list[float] | None]) -> None:
        """Puts what is known of a workload into the file."""
        record = record_cell(
            cell,
            costs={name: contestant.costs(cell.workload) for name, contestant in self._loaded.items()},
            peak=self.results.peak,
            faults=faults,
            precisions={name: contestant.precision for name, contestant in self._loaded.items()},
        )
        self._cells[cell.workload.name] = record.model_copy(update={"device": device})
        self.results.cells = list(self._cells.values())
        self.save()

    def finish(self, contestant: Contestant) -> None:
        """Kernels, energy, pictures and the guard's picture of a contestant that was timed; it may be freed then."""
        main, options, record = self.workloads[0], self.options, self.results.contestant(contestant.name)
        cell = next((one for one in self.results.cells if one.name == main.name), None)
        if cell is not None and (why := cell.failures.get(contestant.name)):
            record.energy = {"j_per_image": None, "why": f"it failed in the timed rounds: {why}"}
            record.quality = {"passed": False, "words": ["it failed in the timed rounds"], "fidelity": None}
            return
        if options.kernels:
            row = cell.row(contestant.name) if cell is not None else None
            record.kernels = kernels_of(contestant, main, row.step_ms if row else None)
        record.energy, record.sustained = self._energy(contestant)
        self.save()
        if options.pictures:
            say(f"  {contestant.name}: {options.pictures} pictures")
            pictures = draw_pictures(contestant, self.workloads, self.family, options.pictures, self.results.notes)
            steps = contestant.asked(main).steps
            seen = [one.follows for one in pictures if one.follows and one.steps == steps]
            record.follows = shares(seen) | {"count": len(seen)} if seen else None
            self.results.pictures = sorted([*self.results.pictures, *pictures], key=lambda one: one.seed)
        self._drawn[contestant.name] = draw_for_guard(contestant, main, options.fidelity)
        self.save()

    def _energy(self, contestant: Contestant) -> tuple[dict[str, Any], Trace | None]:
        """Joules an image, or why they are not known, and the trace of a sustained run; the notes say what raised."""
        sustained_s = self.options.sustained_seconds
        try:
            energy, trace = draw_sustained(
                contestant, self.workloads[0], self.gpu, sustained_s or self.options.energy_seconds, bool(sustained_s)
            )
            return energy, Trace(**trace) if sustained_s else None
        except Exception as error:
            self.results.notes.append(f"{contestant.name} failed while its energy was read: {describe_error(error)}")
            say(f"  {self.results.notes[-1]}")
            return {"j_per_image": None, "why": self.results.notes[-1]}, None

    def judge(self, contestants: list[Contestant]) -> None:
        """The quality guard; all contestants are freed by now."""
        say("quality against the fp32 reference")
        device = contestants[0].device
        verdicts = judge(self._drawn, contestants, self.workloads[0], self.options.reference, device)
        for name, verdict in verdicts.items():
            self.results.contestant(name).quality = verdict
        self.save()


def _say_visit(position: str, cell: Cell, is_done: bool) -> None:
    totals = {name: median(one.total_ms for one in samples) for name, samples in cell.samples.items() if samples}
    told = ", ".join(f"{name} {total:.0f} ms" for name, total in totals.items())
    say(f"  {position} {cell.workload.name}: {told}")
    for name, why in cell.failures.items() if is_done else ():
        say(f"    {name} failed: {why}")


def make_record(
    contestant: Contestant, workloads: list[Workload], cold: dict[str, float], memory: dict[str, Any]
) -> ContestantRecord:
    """What is known of a contestant once it is loaded."""
    main = workloads[0]
    costs, (weights_sha256, weights_of) = contestant.costs(main), contestant.weights_hash()
    return ContestantRecord(
        name=contestant.name,
        spec=contestant.spec,
        runtime=contestant.runtime,
        precision=contestant.precision,
        device=contestant.device,
        parameters=costs["unet"][1].parameters if costs else None,
        costs={name: {"calls": calls} | asdict(cost) for name, (calls, cost) in costs.items()} if costs else None,
        costs_why=contestant.why_no_costs,
        cold=cold,
        memory=memory,
        energy={"j_per_image": None, "why": STOPPED},
        quality={"passed": None, "words": [STOPPED], "fidelity": None},
        follows=None,
        artifacts=list(contestant.artifacts.values()),
        configs=dict(contestant.configs.texts) if contestant.configs else None,
        engines=contestant.engines,
        accumulates_fp32=contestant.accumulates_fp32,
        vae_dtype=contestant.vae_dtype,
        weights_sha256=weights_sha256,
        weights_of=weights_of,
        random_weights=contestant.random_weights,
        taught=contestant.taught if any(contestant.asked(one) != one for one in workloads) else {},
    )
