"""One run of the bench: contestants loaded cold, measured in interleaved rounds, guarded, drawn, written as JSON."""

from __future__ import annotations

import gc
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from bench.contestants import Spec, default_device, make_contestant, parse_specs
from bench.gpu import Gpu, energy_per_image
from bench.inventory import describe, kind_of, parse_artifacts
from bench.measure import Cell, Pictures, Plan, cold_start, make_clock, measure_cells, timed_draw
from bench.peaks import Peak, find_peak
from bench.results import CellRecord, ContestantRecord, PictureRecord, Results, write_results
from bench.summary import Costs, summarise
from bench.workload import PROMPTS, SCHEDULERS, Workload, make_workloads, parse_numbers, parse_resolutions
from distill.architectures import FAMILIES, SDXL_FAMILY, Family
from distill.errors import UserError, unknown

console = Console(highlight=False, soft_wrap=True)


@dataclass(kw_only=True)
class RunOptions:
    """Measures contestants on the machine at hand and writes one results file."""

    contestants: list[str]
    """NAME=KIND[@OPTION]:SOURCE, kinds eager, compiled, optimum, bundle, fake."""
    out: Path
    """The results file to write."""
    artifacts: list[str] = field(default_factory=list)
    """NAME=FOLDER: checkpoint, ONNX and bundle folders of a contestant, for its sizes, losses, hashes and fp32 reference."""
    baseline: str | None = None
    """The contestant that speed-ups are told against; the first one if not given."""
    resolutions: str = "first"
    """`all`, `first`, or WIDTHxHEIGHT,...; the first is the main one."""
    steps: str = "30"
    """Step counts, comma-separated; the first is the main one."""
    batches: str = "1"
    guidance: str = "5"
    """Guidance scales, comma-separated; 1 means no guidance."""
    scheduler: str = "default"
    seed: int = 0
    seconds: float = 60.0
    """Time for the timed rounds of all cells together; every cell gets at least `min-rounds`."""
    min_rounds: int = 6
    max_rounds: int = 100
    warmup: int = 1
    max_warmup: int = 3
    pictures: int = 9
    """Pictures each contestant draws, the same prompts and seeds for all; 0 for none."""
    picture_steps: int = 20
    energy_seconds: float = 10.0
    reference: bool = True
    """Compare each contestant with its checkpoint in fp32 (needs a checkpoint among its artifacts)."""
    device: str | None = None
    """cpu or cuda; the GPU if there is one."""
    workdir: Path = Path("out/sources")


@dataclass
class Entrant:
    """A contestant with what is known about it beyond drawing."""

    spec: Spec
    contestant: Any
    folders: list[Path]
    configs: Any = None
    why_no_costs: str | None = None
    cold: dict[str, float | None] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.spec.name

    def checkpoint(self) -> Path | None:
        """The diffusers folder with this contestant's weights, None where nobody said."""
        for folder in self.folders:
            if kind_of(folder) == "checkpoint":
                return folder
        return self.contestant.folder if self.spec.kind in ("eager", "compiled") else None

    def costs(self, workload: Workload) -> Costs | None:
        from bench.roofline import component_costs

        return component_costs(self.configs, workload) if self.configs is not None else None


def _say(text: str) -> None:
    console.print(text)


def _check(options: RunOptions, specs: list[Spec]) -> str:
    """Raises UserError for what can be known to be wrong before anything is loaded; returns the baseline's name."""
    if options.min_rounds < 1 or options.max_rounds < options.min_rounds:
        raise UserError(
            f"rounds from {options.min_rounds} to {options.max_rounds}: at least 1 is needed, and no more least than most"
        )
    if options.scheduler not in SCHEDULERS:
        raise unknown("scheduler", options.scheduler, SCHEDULERS)
    if options.device not in (None, "cpu", "cuda"):
        raise unknown("device", str(options.device), ("cpu", "cuda"))
    if options.device == "cuda" and default_device() != "cuda":
        raise UserError("device cuda: torch sees no NVIDIA GPU here; leave --device away to run on the CPU")
    names = [spec.name for spec in specs]
    baseline = options.baseline or names[0]
    if baseline not in names:
        raise unknown("baseline", baseline, names)
    return baseline


def _family(entrants: list[Entrant]) -> Family:
    """The family whose widths the first known UNet has; SDXL's where nobody knows."""
    for entrant in entrants:
        if entrant.configs is not None:
            widths = list(entrant.configs.parsed("unet")["block_out_channels"])
            for family in FAMILIES.values():
                if widths == list(family.unet["block_out_channels"]):
                    return family
    return SDXL_FAMILY


def _find_configs(entrant: Entrant) -> None:
    from bench.roofline import ModelConfigs

    if entrant.spec.kind == "fake":
        entrant.why_no_costs = "a fake contestant computes nothing"
        return
    folder = entrant.checkpoint()
    if folder is None:
        entrant.why_no_costs = "no checkpoint among its artifacts, so its FLOPs are not known"
        return
    entrant.configs = ModelConfigs.of_folder(folder)


def family_prompts(family: Family, count: int) -> list[str]:
    """Prompts that the family has learnt: captions of the shapes world for mini, plain prompts otherwise."""
    if family.name != "mini":
        return [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    import numpy as np

    from distill.shapes import random_scene

    rng = np.random.default_rng(2024)
    return [random_scene(rng).caption for _ in range(count)]


def _load(entrant: Entrant, workload: Workload, gpu: Gpu) -> None:
    """The cold start of one contestant, and what it added to memory."""
    import psutil

    gc.collect()
    rss = psutil.Process().memory_info().rss
    used = gpu.state()["memory_used_bytes"]
    start = cold_start(entrant.contestant, workload)
    entrant.cold = {"load_ms": start.load_ms, "first_image_ms": start.first_image_ms}
    after = gpu.state()["memory_used_bytes"]
    entrant.memory = {
        "rss_added_bytes": psutil.Process().memory_info().rss - rss,
        "device_added_bytes": after - used if after is not None and used is not None else None,
        "allocator_peak_bytes": None,
        "why": gpu.reason,
    }
    _say(f"  {entrant.name}: loaded in {start.load_ms / 1e3:.1f} s, first image {start.first_image_ms / 1e3:.2f} s")


def _measure(
    entrants: list[Entrant], workloads: list[Workload], options: RunOptions, baseline: str, peak: Peak | None, gpu: Gpu
) -> list[CellRecord]:
    from bench.host import OtherLoad

    plan = Plan(options.min_rounds, options.max_rounds, options.warmup, options.max_warmup)
    throttled: dict[str, set[str]] = {workload.name: set() for workload in workloads}
    company: dict[str, list[float]] = {workload.name: [] for workload in workloads}
    watch = {"load": OtherLoad(), "visit": 0, "reasons": set(gpu.throttle_reasons() or [])}

    def on_round(_: int) -> None:
        watch["reasons"].update(gpu.throttle_reasons() or [])

    def on_visit(cell: Cell, last: bool) -> None:
        company[cell.workload.name].append(watch["load"].percent())
        throttled[cell.workload.name] |= watch["reasons"]
        watch.update(load=OtherLoad(), reasons=set(), visit=watch["visit"] + 1)
        totals = {name: median(one.total_ms for one in samples) for name, samples in cell.samples.items() if samples}
        _say(
            f"  [{watch['visit']}/{2 * len(workloads)}] {cell.workload.name}: "
            + ", ".join(f"{name} {total:.0f} ms" for name, total in totals.items())
        )
        for name, why in cell.failures.items() if last else ():
            _say(f"    {name} failed: {why}")

    contestants = [entrant.contestant for entrant in entrants]
    cells = measure_cells(contestants, workloads, plan, options.seconds, on_round=on_round, on_visit=on_visit)
    records = []
    for cell in cells:
        name = cell.workload.name
        faults = {
            "others_cpu_percent": max(company[name]),
            "throttle_reasons": sorted(throttled[name]),
            "other_gpu_processes": gpu.other_processes() or 0,
        }
        costs = {entrant.name: entrant.costs(cell.workload) for entrant in entrants}
        records.append(summarise(cell, baseline, costs=costs, peak=peak, faults=faults))
    return records


def _references(entrants: list[Entrant], workload: Workload, device: str) -> dict[str, Pictures | str]:
    """For each contestant its fp32 picture, or why there is none. One checkpoint is loaded at a time, then dropped."""
    from bench.pipelines import EagerContestant

    found: dict[str, Pictures | str] = {}
    for entrant in entrants:
        folder = entrant.checkpoint()
        if folder is None:
            found[entrant.name] = "no fp32 reference: no checkpoint among its artifacts"
            continue
        reference = EagerContestant(f"{entrant.name} in fp32", str(folder), device)
        reference.__dict__["folder"] = folder
        found[entrant.name] = timed_draw(reference, workload, make_clock(device))[1]
        del reference
        gc.collect()
    return found


def _quality(entrants: list[Entrant], workload: Workload, options: RunOptions, device: str) -> dict[str, dict[str, Any]]:
    from bench.quality import guard

    references = _references(entrants, workload, device) if options.reference else {}
    verdicts = {}
    for entrant in entrants:
        pictures = timed_draw(entrant.contestant, workload, make_clock(entrant.contestant.device))[1]
        reference = references.get(entrant.name, "the reference was switched off")
        if isinstance(reference, str):
            quality = guard(pictures, None, reference)
        else:
            quality = guard(pictures, reference)
        verdicts[entrant.name] = asdict(quality)
        word = {True: "passed", False: "FAILED", None: "not checked"}[quality.passed]
        psnr = "identical" if quality.identical else f"{quality.psnr_db:.0f} dB" if quality.psnr_db else ""
        _say(f"  {entrant.name}: {word} {psnr} {'; '.join(quality.words)}".rstrip())
    return verdicts


def _draw(entrants: list[Entrant], main: Workload, family: Family, options: RunOptions) -> list[PictureRecord]:
    """The same prompts and seeds for everyone, going round the family's resolutions."""
    from dataclasses import replace

    from bench.quality import follows_caption, png_base64

    records = []
    sizes = family.resolutions if family.name == "mini" else (main.resolution,)
    base = replace(main, steps=options.picture_steps)
    for index, prompt in enumerate(family_prompts(family, options.pictures)):
        workload = base.for_picture(prompt, 1000 + index, sizes[index % len(sizes)])
        for entrant in entrants:
            contestant = entrant.contestant
            image = timed_draw(contestant, workload, make_clock(contestant.device))[1].images[0]
            records.append(
                PictureRecord(
                    contestant=entrant.name,
                    prompt=prompt,
                    seed=workload.seed,
                    resolution=str(workload.resolution),
                    steps=workload.steps,
                    guidance_scale=workload.guidance_scale,
                    png_base64=png_base64(image),
                    follows=follows_caption(prompt, image),
                )
            )
    return records


def _contestant_record(
    entrant: Entrant, main: Workload, pictures: list[PictureRecord], quality: dict[str, Any], energy: dict[str, Any]
) -> ContestantRecord:
    from bench.quality import share_following

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
        quality=quality,
        follows=share_following(seen),
        artifacts=[describe(folder) for folder in entrant.folders],
        configs=asdict(entrant.configs) if entrant.configs is not None else None,
    )


def _energy(entrant: Entrant, main: Workload, gpu: Gpu, seconds: float) -> dict[str, Any]:
    clock = make_clock(entrant.contestant.device)

    def draw() -> int:
        timed_draw(entrant.contestant, main, clock)
        return main.batch

    return energy_per_image(gpu, draw, seconds)


def run_bench(options: RunOptions) -> Results:
    """Raises UserError for bad input before anything is loaded. Writes `options.out` and returns what it wrote."""
    begin = time.monotonic()
    specs = parse_specs(options.contestants)
    baseline = _check(options, specs)
    folders = parse_artifacts(options.artifacts, [spec.name for spec in specs])
    device = options.device or default_device()
    entrants = [Entrant(spec, make_contestant(spec, device), folders[spec.name]) for spec in specs]
    for entrant in entrants:
        entrant.contestant.workdir = options.workdir
        _find_configs(entrant)
    family = _family(entrants)
    workloads = make_workloads(
        parse_resolutions(options.resolutions, family),
        parse_numbers(options.steps, "steps"),
        batches=parse_numbers(options.batches, "batches"),
        guidance_scales=[float(part) for part in options.guidance.split(",")],
        scheduler=options.scheduler,
        seed=options.seed,
        prompts=tuple(family_prompts(family, 6)),
    )
    for workload in workloads:
        workload.check(family)
    main = workloads[0]

    from bench.host import describe_host, peak_rss_bytes
    from bench.roofline import measure_cpu_peak

    gpu = Gpu() if device == "cuda" else _no_gpu(device)
    identity = gpu.identity()
    peak = find_peak(identity["name"]) if device == "cuda" else measure_cpu_peak()
    before = gpu.state()
    _import_quietly()
    _say(f"bench on {device}: {len(entrants)} contestants, {len(workloads)} workloads; cold start")
    for entrant in entrants:
        _load(entrant, main, gpu)
    _say("timed rounds, interleaved")
    cells = _measure(entrants, workloads, options, baseline, peak, gpu)
    energy = {entrant.name: _energy(entrant, main, gpu, options.energy_seconds) for entrant in entrants}
    after = gpu.state()
    _say("quality against the fp32 reference")
    quality = _quality(entrants, main, options, device)
    _say(f"pictures: {options.pictures} prompts, the same seeds for all")
    pictures = _draw(entrants, main, family, options)
    results = Results(
        created_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command="python -m bench " + shlex.join(sys.argv[1:]),
        seconds=time.monotonic() - begin,
        baseline=baseline,
        family=family.name,
        environment=describe_host(device) | {"peak_rss_bytes": peak_rss_bytes()},
        gpu={"identity": identity, "before": before, "after": after, "missing": gpu.missing, "reason": gpu.reason},
        peak=asdict(peak) if peak else None,
        contestants=[
            _contestant_record(entrant, main, pictures, quality[entrant.name], energy[entrant.name])
            for entrant in entrants
        ],
        cells=cells,
        pictures=pictures,
    )
    write_results(options.out, results)
    _say(f"wrote {options.out} after {results.seconds:.0f} s")
    return results


def _import_quietly() -> None:
    """Imports the common libraries now, so that the first contestant's cold start does not pay for everyone's."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    _ = (diffusers.StableDiffusionXLPipeline, transformers.CLIPTextModelWithProjection)


def _no_gpu(device: str) -> Gpu:
    """Without a GPU under test NVML's readings would be some other device's."""
    gpu = Gpu()
    if gpu.present:
        gpu._handle = None
        gpu.reason = f"measured on the {device}, so no GPU was read"
    return gpu
