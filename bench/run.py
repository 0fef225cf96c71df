"""One run of the bench: contestants loaded cold, measured in interleaved rounds, drawn, guarded, written as JSON."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from bench.contestants.contestant import Contestant, find_family
from bench.contestants.inventory import parse_artifacts
from bench.contestants.spec import default_device, make_contestant, parse_specs
from bench.floor.peaks import find_peak
from bench.floor.roofline import measure_cpu_peak
from bench.launches import run_launches
from bench.measure.cold_start import import_libraries
from bench.measure.gpu import Gpu
from bench.measure.host import describe_host
from bench.measure.rounds import DoNotFitError
from bench.options import RunOptions, check_options, unfinished
from bench.results import Results
from bench.session import Session
from bench.workload import Workload, family_prompts, family_resolutions, make_workloads, parse_scales
from distill.common.errors import UserError, parse_counts
from distill.common.progress import say
from distill.models.families import Family


def taught(contestants: list[Contestant], name: str, otherwise: str) -> str:
    """What the `sampling` of every contestant says of `name`, where they say the same; else `otherwise`."""
    [value, *others] = {getattr(contestant.sampling, name, None) for contestant in contestants}
    return otherwise if others or value is None else str(value)


@dataclass(frozen=True)
class Plan:
    """What a run does, known before anything is loaded."""

    contestants: list[Contestant]
    baseline: str
    device: str
    family: Family
    workloads: list[Workload]


def make_plan(options: RunOptions) -> Plan:
    """Raises UserError for bad input."""
    specs = parse_specs(options.contestants)
    baseline = check_options(options, specs)
    options = replace(options, steps="20", guidance="8", scheduler="euler") if options.mlperf else options
    artifacts = parse_artifacts(options.artifacts, [spec.name for spec in specs])
    device = options.device or default_device()
    contestants = [
        make_contestant(spec, device, workdir=options.workdir, artifacts=artifacts[spec.name]) for spec in specs
    ]
    for contestant in contestants:
        contestant.check()
        _ = contestant.configs  # what cannot be had is told before anything is loaded
        if contestant.as_taught and not contestant.taught:
            raise UserError(
                f"contestant {contestant.name!r} cannot draw as it was taught, since its model does not say how; leave "
                "+taught out"
            )
        contestant.as_taught |= options.steps is None and options.guidance is None
    family = find_family(contestants)
    resolutions = family_resolutions(options.resolutions, family, {one.name: one.sizes for one in contestants})
    workloads = make_workloads(
        resolutions,
        parse_counts("--steps", options.steps or taught(contestants, "steps", "30"), most=1000),
        batches=parse_counts("--batches", options.batches),
        guidance_scales=parse_scales(options.guidance or taught(contestants, "guidance_scale", "5")),
        scheduler=options.scheduler,
        seed=options.seed,
        prompts=tuple(family_prompts(family, 6)),
        mlperf=options.mlperf,
    )
    for contestant in contestants:
        if contestant.sampling:
            for workload in workloads:
                contestant.sampling.check(contestant.asked(workload).steps)
    return Plan(contestants, baseline, device, family, workloads)


def run_bench(options: RunOptions) -> Results:
    """Raises UserError for bad input before anything is loaded. Writes `unfinished(options.out)`, a results file too, as it
    goes: while rounds are timed, and again as energy, pictures and guard are done; at the end that becomes `options.out`.
    Returns what it wrote."""
    plan = make_plan(options)
    if options.launches > 1:
        return run_launches(options)
    gpu = Gpu(plan.device)
    identity, before = gpu.identity(), gpu.state()
    on_gpu, precisions = plan.device == "cuda", {contestant.precision for contestant in plan.contestants}
    results = Results(
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        command="python -m bench " + shlex.join(sys.argv[1:]),
        seconds=0.0,
        baseline=plan.baseline,
        family=plan.family.name,
        environment=describe_host(plan.device),
        gpu={"identity": identity, "before": before, "after": before, "missing": gpu.missing, "reason": gpu.reason},
        peak=find_peak(identity["name"], identity["mig_mode"]) if on_gpu else measure_cpu_peak(precisions),
        contestants=[],
        cells=[],
        pictures=[],
    )
    import_libraries(plan.device, plan.family.conditioning)
    names = ", ".join(contestant.name for contestant in plan.contestants)
    say(f"bench on {plan.device}: {names}; workloads: {len(plan.workloads)}; cold start")
    session = Session(options, plan.workloads, plan.family, gpu, results)
    try:
        if options.in_turns:
            raise DoNotFitError("asked for by --in-turns")
        session.measure_together(plan.contestants)
    except DoNotFitError as error:
        session.measure_in_turns(plan.contestants, str(error))
    session.judge(plan.contestants)
    unfinished(options.out).replace(options.out)
    say(f"wrote {options.out} after {results.seconds:.0f} s")
    return results
