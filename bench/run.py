"""One run of the bench: contestants loaded cold, measured in interleaved rounds, guarded, drawn, written as JSON."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import median
from typing import Any

from bench.contestants.contestant import Contestant, find_family
from bench.contestants.inventory import parse_artifacts
from bench.contestants.spec import default_device, make_contestant, parse_specs
from bench.floor.peaks import Peak, find_peak
from bench.floor.roofline import measure_cpu_peak
from bench.measure.clock import make_clock, timed_draw
from bench.measure.cold_start import import_libraries, measure_cold_start
from bench.measure.gpu import Gpu, energy_per_image
from bench.measure.host import describe_host
from bench.measure.kernels import kernels_of
from bench.measure.rounds import Cell, Rounds, measure_cells
from bench.measure.watch import Watch
from bench.options import RunOptions, check_options, unfinished
from bench.quality.pictures import draw_pictures
from bench.quality.reference import judge
from bench.results import ContestantRecord, Results, record_cell, write_results
from bench.workload import Workload, family_prompts, family_resolutions, make_workloads, parse_scales
from distill.common.errors import UserError, describe_error, parse_counts
from distill.common.progress import say
from distill.data.shapes import shares
from engines.building.worker import peak_rss_bytes

STOPPED = "the run was stopped before this"


def taught(contestants: list[Contestant], name: str, otherwise: str) -> str:
    """What the `sampling` of every contestant says of `name`, where they say the same; else `otherwise`."""
    [value, *others] = {getattr(contestant.sampling, name, None) for contestant in contestants}
    return otherwise if others or value is None else str(value)


def run_bench(options: RunOptions) -> Results:
    """Raises UserError for bad input before anything is loaded. Writes `unfinished(options.out)`, a results file too, after
    each visit to a workload and again as kernels, guard, energy and pictures are done; at the end that becomes
    `options.out`. Returns what it wrote."""
    begin = time.monotonic()
    specs = parse_specs(options.contestants)
    baseline = check_options(options, specs)
    artifacts = parse_artifacts(options.artifacts, [spec.name for spec in specs])
    device = options.device or default_device()
    contestants = [
        make_contestant(spec, device, workdir=options.workdir, artifacts=artifacts[spec.name]) for spec in specs
    ]
    for contestant in contestants:
        contestant.check()
        _ = contestant.configs  # what cannot be had is told before anything is loaded
    family = find_family(contestants)
    workloads = make_workloads(
        family_resolutions(options.resolutions, family),
        parse_counts("--steps", options.steps or taught(contestants, "steps", "30"), most=1000),
        batches=parse_counts("--batches", options.batches),
        guidance_scales=parse_scales(options.guidance or taught(contestants, "guidance_scale", "5")),
        scheduler=options.scheduler,
        seed=options.seed,
        prompts=tuple(family_prompts(family, 6)),
    )
    picture_steps = options.picture_steps or int(taught(contestants, "steps", "20"))
    for sampling in filter(None, (contestant.sampling for contestant in contestants)):
        for steps in [picture_steps, *(workload.steps for workload in workloads)]:
            sampling.check(steps)
    main, gpu = workloads[0], Gpu(device)
    identity, before = gpu.identity(), gpu.state()
    precisions = {contestant.precision for contestant in contestants}
    peak = find_peak(identity["name"], identity["mig_mode"]) if device == "cuda" else measure_cpu_peak(precisions)

    import_libraries(device, family.conditioning)
    say(f"bench on {device}: {', '.join(spec.name for spec in specs)}; workloads: {len(workloads)}; cold start")
    notes: list[str] = []
    loaded = load_all(contestants, main, gpu, notes)
    contestants, names = [contestant for contestant, _ in loaded], [record.name for _, record in loaded]
    if baseline not in names:
        notes.append(f"the baseline {baseline} did not load; speed-ups are against {names[0]}")
        baseline = names[0]
    results = Results(
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        command="python -m bench " + shlex.join(sys.argv[1:]),
        seconds=0.0,
        baseline=baseline,
        family=family.name,
        environment=describe_host(device),
        gpu={"identity": identity, "before": before, "after": before, "missing": gpu.missing, "reason": gpu.reason},
        peak=peak,
        contestants=[record for _, record in loaded],
        cells=[],
        pictures=[],
        notes=notes,
    )

    def save() -> None:
        results.seconds = time.monotonic() - begin
        results.environment["peak_rss_bytes"] = peak_rss_bytes()
        write_results(unfinished(options.out), results)

    say("timed rounds, interleaved")
    measure(contestants, workloads, options, results, peak, gpu, save)

    timed = []
    for contestant, record in loaded:
        if why := results.cells[0].failures.get(contestant.name):
            record.energy = {"j_per_image": None, "why": f"it failed in the timed rounds: {why}"}
            record.quality = {"passed": False, "words": ["it failed in the timed rounds"], "fidelity": None}
        else:
            timed.append((contestant, record))
    drawing = [contestant for contestant, _ in timed]

    if options.kernels:
        say("kernels of the denoise loop")
        step_ms = {row.contestant: row.step_ms for row in results.cells[0].rows}
        for contestant, record in timed:
            record.kernels = kernels_of(contestant, main, step_ms.get(record.name))

    say("quality against the fp32 reference")
    verdicts = judge(drawing, main, options.fidelity, options.reference, device)
    for _, record in timed:
        record.quality = verdicts[record.name]
    save()

    for contestant, record in timed:
        record.energy = energy_of(contestant, main, gpu, options.energy_seconds, results.notes)
    save()

    if options.pictures:
        say(f"pictures: {options.pictures} prompts, the same seeds for all")
        results.pictures = draw_pictures(drawing, main, family, options.pictures, picture_steps, results.notes)
        for _, record in timed:
            seen = [one.follows for one in results.pictures if one.contestant == record.name and one.follows]
            record.follows = shares(seen) | {"count": len(seen)} if seen else None
    save()
    unfinished(options.out).replace(options.out)
    say(f"wrote {options.out} after {results.seconds:.0f} s")
    return results


def load_all(
    contestants: list[Contestant], main: Workload, gpu: Gpu, notes: list[str]
) -> list[tuple[Contestant, ContestantRecord]]:
    """Those that loaded, each with the record that the run fills; `notes` say why one did not: out of memory on one leaves
    the others their turn.

    Raises UserError where a contestant says itself what is wrong with it, or where none is left.
    """
    loaded = []
    for contestant in contestants:
        try:
            cold, memory = measure_cold_start(contestant, main, gpu)
        except UserError:
            raise
        except Exception as error:
            notes.append(f"{contestant.name} did not load: {describe_error(error)}")
            say(f"  {notes[-1]}")
            continue
        loaded.append((contestant, make_record(contestant, main, cold, memory)))
        load_s, first_s = cold["load_ms"] / 1e3, cold["first_image_ms"] / 1e3
        say(f"  {contestant.name}: loaded in {load_s:.1f} s, first image {first_s:.2f} s")
    if not loaded:
        raise UserError(f"no contestant could be loaded; {notes[0]}")
    return loaded


def make_record(
    contestant: Contestant, main: Workload, cold: dict[str, float], memory: dict[str, Any]
) -> ContestantRecord:
    """What is known of a contestant once it is loaded."""
    costs = contestant.costs(main)
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
    )


def measure(
    contestants: list[Contestant],
    workloads: list[Workload],
    options: RunOptions,
    results: Results,
    peak: Peak | None,
    gpu: Gpu,
    save: Callable[[], None],
) -> None:
    """The timed rounds: fills the cells of `results`, and saves them after each visit to one."""
    rounds, watch = Rounds(options.min_rounds, options.max_rounds, options.max_warmup), Watch(gpu)
    records = {}
    visits = measure_cells(contestants, workloads, rounds, options.seconds, on_round=watch.look)
    for visit, (cell, is_done) in enumerate(visits, 1):
        faults, device = watch.visited(cell.workload.name)
        costs = {contestant.name: contestant.costs(cell.workload) for contestant in contestants}
        precisions = {contestant.name: contestant.precision for contestant in contestants}
        record = record_cell(cell, costs=costs, peak=peak, faults=faults, precisions=precisions)
        records[cell.workload.name] = record.model_copy(update={"device": device})
        results.cells = list(records.values())
        results.gpu["after"] = gpu.state()
        save()
        _say_visit(f"[{visit}/{2 * len(workloads)}]", cell, is_done)
        for row in records[cell.workload.name].rows if is_done else ():
            for fault in row.eight_bit_faults():
                say(f"    warning: {row.contestant} {fault}")


def _say_visit(position: str, cell: Cell, is_done: bool) -> None:
    totals = {name: median(one.total_ms for one in samples) for name, samples in cell.samples.items() if samples}
    told = ", ".join(f"{name} {total:.0f} ms" for name, total in totals.items())
    say(f"  {position} {cell.workload.name}: {told}")
    for name, why in cell.failures.items() if is_done else ():
        say(f"    {name} failed: {why}")


def energy_of(contestant: Contestant, main: Workload, gpu: Gpu, seconds: float, notes: list[str]) -> dict[str, Any]:
    """Joules an image over at least `seconds` of drawing `main`, or why they are not known; `notes` say what raised."""
    clock = make_clock(contestant.device)

    def draw() -> int:
        timed_draw(contestant, main, clock)
        return main.batch

    try:
        return energy_per_image(gpu, draw, seconds)
    except Exception as error:
        notes.append(f"{contestant.name} failed while its energy was read: {describe_error(error)}")
        say(f"  {notes[-1]}")
        return {"j_per_image": None, "why": notes[-1]}
