"""One run of the bench: contestants loaded cold, measured in interleaved rounds, guarded, drawn, written as JSON."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.contestants.contestants import default_device, make_contestant, parse_specs
from bench.contestants.entrants import Entrant, family_prompts, find_configs, find_family, import_quietly, load_entrant
from bench.contestants.inventory import parse_artifacts
from bench.examine import draw_pictures, energy_of, kernels_of, quality_of
from bench.floor.peaks import Peak, find_peak
from bench.measure.gpu import Gpu, device_ranges, throttled_meanwhile
from bench.measure.measure import Cell, Rounds, measure_cells
from bench.measure.workload import Workload, make_workloads, parse_numbers, parse_resolutions, parse_scales
from bench.options import RunOptions, check_options
from bench.results import CellRecord, ContestantRecord, PictureRecord, Results, record_cell, write_results
from distill.common.errors import UserError
from distill.common.progress import say
from distill.data.shapes import shares

STOPPED = "the run was stopped before this"
FAILED = {"passed": False, "words": ["it failed in the timed rounds"], "fidelity": None}
LEFT_OUT = re.compile(r" (was not loaded|did not load): ")
"""How a note says that a contestant was left out, for want of time or because it failed."""


def _load_all(
    entrants: list[Entrant], main: Workload, gpu: Gpu, seconds: float | None
) -> tuple[list[Entrant], list[str]]:
    """Those that loaded, and a note on each that did not: out of memory on one leaves the others their turn, and none
    begins to load that would not be done within `seconds`, if it took as long as the one before it.

    Raises UserError where a contestant says itself what is wrong with it, or where none is left.
    """
    loaded: list[Entrant] = []
    notes: list[str] = []
    begin = last = time.monotonic()
    for entrant in entrants:
        now = time.monotonic()
        last_s, last = now - last, now
        if loaded and seconds is not None and now + last_s - begin > seconds:
            notes.append(f"{entrant.name} was not loaded: too little was left of the {seconds:.0f} s for loading")
            say(f"  {notes[-1]}")
            continue
        try:
            load_entrant(entrant, main, gpu)
        except UserError:
            raise
        except Exception as error:
            notes.append(f"{entrant.name} did not load: {type(error).__name__}: {error}")
            say(f"  {notes[-1]}")
            continue
        loaded.append(entrant)
        load_ms, first_ms = entrant.cold["load_ms"], entrant.cold["first_image_ms"]
        say(f"  {entrant.name}: loaded in {load_ms / 1e3:.1f} s, first image {first_ms / 1e3:.2f} s")
    if not loaded:
        raise UserError(f"no contestant could be loaded; {notes[0]}")
    return loaded, notes


def _measure(
    entrants: list[Entrant],
    workloads: list[Workload],
    options: RunOptions,
    peak: Peak | None,
    gpu: Gpu,
    keep: Callable[[list[CellRecord]], None],
) -> None:
    """The timed rounds. `keep` is given the records of all cells met so far, after each visit to one."""
    from bench.measure.host import OtherLoad

    rounds = Rounds(options.min_rounds, options.max_rounds, options.max_warmup)
    throttled: dict[str, set[str]] = {workload.name: set() for workload in workloads}
    company: dict[str, list[float]] = {workload.name: [] for workload in workloads}
    states: dict[str, list[dict[str, Any]]] = {workload.name: [] for workload in workloads}
    load, visit, seen = OtherLoad(), 0, [gpu.state()]
    begun, counted = time.monotonic(), gpu.throttled_ns()
    met: dict[str, Cell] = {}

    def record_of(cell: Cell) -> CellRecord:
        name = cell.workload.name
        faults = {
            "others_cpu_percent": max(company[name]),
            "throttle_reasons": sorted(throttled[name]),
            "other_gpu_processes": gpu.other_processes() or 0,
        }
        costs = {entrant.name: entrant.costs(cell.workload) for entrant in entrants}
        record = record_cell(cell, costs=costs, peak=peak, faults=faults)
        return record.model_copy(update={"device": device_ranges(states[name])})

    def on_round(_: int) -> None:
        seen.append(gpu.state())

    def on_visit(cell: Cell, last: bool) -> None:
        nonlocal load, visit, begun, counted
        now, count = time.monotonic(), gpu.throttled_ns()
        throttled[cell.workload.name] |= throttled_meanwhile(counted, count, now - begun)
        company[cell.workload.name].append(load.percent())
        throttled[cell.workload.name].update(*(state["throttle_reasons"] or [] for state in seen))
        states[cell.workload.name] += seen
        seen.clear()
        met[cell.workload.name] = cell
        keep([record_of(one) for one in met.values()])
        load, visit = OtherLoad(), visit + 1
        begun, counted = now, count
        totals = {name: median(one.total_ms for one in samples) for name, samples in cell.samples.items() if samples}
        say(
            f"  [{visit}/{2 * len(workloads)}] {cell.workload.name}: "
            + ", ".join(f"{name} {total:.0f} ms" for name, total in totals.items())
        )
        for name, why in cell.failures.items() if last else ():
            say(f"    {name} failed: {why}")

    contestants = [entrant.contestant for entrant in entrants]
    measure_cells(contestants, workloads, rounds, options.seconds, on_round=on_round, on_visit=on_visit)


def _contestant_record(
    entrant: Entrant, main: Workload, pictures: list[PictureRecord], quality: dict[str, Any], energy: dict[str, Any]
) -> ContestantRecord:
    costs = entrant.costs(main)
    seen = [one.follows for one in pictures if one.contestant == entrant.name and one.follows is not None]
    return ContestantRecord(
        name=entrant.name,
        spec=str(entrant.spec),
        runtime=entrant.contestant.runtime,
        precision=entrant.contestant.precision,
        device=entrant.contestant.device,
        parameters=costs["unet"][1].parameters if costs else None,
        costs={name: {"calls": calls} | asdict(cost) for name, (calls, cost) in costs.items()} if costs else None,
        costs_why=entrant.why_no_costs,
        cold=entrant.cold,
        memory=entrant.memory,
        energy=energy,
        kernels=entrant.kernels,
        quality=quality,
        follows=shares(seen) | {"count": len(seen)} if seen else None,
        artifacts=entrant.artifacts,
        configs=asdict(entrant.configs) if entrant.configs is not None else None,
        engines=getattr(entrant.contestant, "engines", None),
    )


def unfinished(out: Path) -> Path:
    """Where a run keeps what it has until it is done: an earlier file of the name stays until then."""
    return out.parent / f"{out.stem}.unfinished.json"


def run_bench(options: RunOptions, meanwhile: Path | None = None) -> Results:
    """Raises UserError for bad input before anything is loaded. Writes `meanwhile`, a results file too, after each visit to
    a workload and again as energy, guard and pictures are done; at the end that becomes `options.out`. Returns what it
    wrote."""
    begin = time.monotonic()
    specs = parse_specs(options.contestants)
    baseline = check_options(options, specs)
    meanwhile = meanwhile or unfinished(options.out)
    folders = parse_artifacts(options.artifacts, [spec.name for spec in specs])
    device = options.device or default_device()
    entrants = [Entrant(spec, make_contestant(spec, device), folders[spec.name]) for spec in specs]
    for entrant in entrants:
        entrant.contestant.workdir = options.workdir
        find_configs(entrant)
    family = find_family(entrants)
    workloads = make_workloads(
        parse_resolutions(options.resolutions, family),
        parse_numbers(options.steps, "steps"),
        batches=parse_numbers(options.batches, "batches"),
        guidance_scales=parse_scales(options.guidance),
        scheduler=options.scheduler,
        seed=options.seed,
        prompts=tuple(family_prompts(family, 6)),
    )
    main = workloads[0]

    from bench.floor.roofline import measure_cpu_peak
    from bench.measure.host import describe_host
    from engines.building.worker import peak_rss_bytes

    gpu = Gpu(device)
    identity = gpu.identity()
    precisions = {entrant.contestant.precision for entrant in entrants}
    peak = find_peak(identity["name"], identity["mig_mode"]) if device == "cuda" else measure_cpu_peak(precisions)
    before = gpu.state()
    import_quietly(device)
    say(f"bench on {device}: {len(entrants)} contestants, {len(workloads)} workloads; cold start")
    entrants, notes = _load_all(entrants, main, gpu, options.load_seconds)
    if baseline not in [entrant.name for entrant in entrants]:
        notes.append(f"the baseline {baseline} did not load; speed-ups are against {entrants[0].name}")
        baseline = entrants[0].name
    cells: list[CellRecord] = []
    after = before

    def save(quality: dict[str, Any], energy: dict[str, Any], pictures: list[PictureRecord]) -> Results:
        results = Results(
            created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            command="python -m bench " + shlex.join(sys.argv[1:]),
            seconds=time.monotonic() - begin,
            baseline=baseline,
            family=family.name,
            environment=describe_host(device) | {"peak_rss_bytes": peak_rss_bytes()},
            gpu={"identity": identity, "before": before, "after": after, "missing": gpu.missing, "reason": gpu.reason},
            peak=peak,
            contestants=[
                _contestant_record(entrant, main, pictures, quality[entrant.name], energy[entrant.name])
                for entrant in entrants
            ],
            cells=cells,
            pictures=pictures,
            notes=notes,
        )
        write_results(meanwhile, results)
        return results

    names = [entrant.name for entrant in entrants]
    unchecked: dict[str, Any] = {"passed": None, "words": [STOPPED], "fidelity": None}
    unmeasured: dict[str, dict[str, Any]] = {name: {"j_per_image": None, "why": STOPPED} for name in names}

    def keep(records: list[CellRecord]) -> None:
        nonlocal after
        cells[:], after = records, gpu.state()
        save(dict.fromkeys(names, unchecked), unmeasured, [])

    say("timed rounds, interleaved")
    _measure(entrants, workloads, options, peak, gpu, keep)
    drawing = [entrant for entrant in entrants if entrant.name not in cells[0].failures]
    for name, why in cells[0].failures.items():
        unmeasured[name] = {"j_per_image": None, "why": f"it failed in the timed rounds: {why}"}
    if options.kernels:
        say("kernels of the denoise loop")
        for entrant in drawing:
            entrant.kernels = kernels_of(entrant, main, cells[0])
    say("quality against the fp32 reference")
    quality = dict.fromkeys(names, FAILED) | quality_of(drawing, main, options, device)
    save(quality, unmeasured, [])
    energy = unmeasured | {one.name: energy_of(one, main, gpu, options.energy_seconds, notes) for one in drawing}
    save(quality, energy, [])
    if options.pictures:
        say(f"pictures: {options.pictures} prompts, the same seeds for all")
    results = save(quality, energy, draw_pictures(drawing, main, family, options, notes))
    meanwhile.replace(options.out)
    say(f"wrote {options.out} after {results.seconds:.0f} s")
    return results
