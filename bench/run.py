"""One run of the bench: contestants loaded cold, measured in interleaved rounds, guarded, drawn, written as JSON."""

from __future__ import annotations

import gc
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from statistics import median
from typing import Any

from rich.console import Console

from bench.contestants import default_device, make_contestant, parse_specs
from bench.entrants import Entrant, family_prompts, find_configs, find_family, import_quietly, load_entrant
from bench.gpu import Gpu, device_ranges, energy_per_image
from bench.inventory import describe, parse_artifacts
from bench.measure import Cell, Pictures, Plan, make_clock, measure_cells, timed_draw
from bench.options import RunOptions, check_options
from bench.peaks import Peak, find_peak
from bench.results import CellRecord, ContestantRecord, PictureRecord, Results, write_results
from bench.summary import summarise
from bench.workload import Workload, make_workloads, parse_numbers, parse_resolutions, parse_scales
from distill.architectures import Family
from distill.errors import UserError

STOPPED = "the run was stopped before this"
NOT_LOADED = "was not loaded"

console = Console(highlight=False, soft_wrap=True, markup=False)


def _say(text: str) -> None:
    console.print(text)


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
            notes.append(f"{entrant.name} {NOT_LOADED}: too little was left of the {seconds:.0f} s for loading")
            _say(f"  {notes[-1]}")
            continue
        try:
            load_entrant(entrant, main, gpu)
        except UserError:
            raise
        except Exception as error:
            notes.append(f"{entrant.name} did not load: {type(error).__name__}: {error}")
            _say(f"  {notes[-1]}")
            continue
        loaded.append(entrant)
        load_ms, first_ms = entrant.cold["load_ms"], entrant.cold["first_image_ms"]
        _say(f"  {entrant.name}: loaded in {load_ms / 1e3:.1f} s, first image {first_ms / 1e3:.2f} s")
    if not loaded:
        raise UserError(f"no contestant could be loaded; {notes[0]}")
    return loaded, notes


def _measure(
    entrants: list[Entrant],
    workloads: list[Workload],
    options: RunOptions,
    baseline: str,
    peak: Peak | None,
    gpu: Gpu,
    keep: Callable[[list[CellRecord]], None],
) -> None:
    """The timed rounds. `keep` is given the records of all cells met so far, after each visit to one."""
    from bench.host import OtherLoad

    plan = Plan(options.min_rounds, options.max_rounds, options.warmup, options.max_warmup)
    throttled: dict[str, set[str]] = {workload.name: set() for workload in workloads}
    company: dict[str, list[float]] = {workload.name: [] for workload in workloads}
    states: dict[str, list[dict[str, Any]]] = {workload.name: [] for workload in workloads}
    load, visit, seen = OtherLoad(), 0, [gpu.state()]
    met: dict[str, Cell] = {}

    def record_of(cell: Cell) -> CellRecord:
        name = cell.workload.name
        faults = {
            "others_cpu_percent": max(company[name]),
            "throttle_reasons": sorted(throttled[name]),
            "other_gpu_processes": gpu.other_processes() or 0,
        }
        costs = {entrant.name: entrant.costs(cell.workload) for entrant in entrants}
        record = summarise(cell, baseline, costs=costs, peak=peak, faults=faults)
        return record.model_copy(update={"device": device_ranges(states[name])})

    def on_round(_: int) -> None:
        seen.append(gpu.state())

    def on_visit(cell: Cell, last: bool) -> None:
        nonlocal load, visit
        company[cell.workload.name].append(load.percent())
        throttled[cell.workload.name].update(*(state["throttle_reasons"] or [] for state in seen))
        states[cell.workload.name] += seen
        seen.clear()
        met[cell.workload.name] = cell
        keep([record_of(one) for one in met.values()])
        load, visit = OtherLoad(), visit + 1
        totals = {name: median(one.total_ms for one in samples) for name, samples in cell.samples.items() if samples}
        _say(
            f"  [{visit}/{2 * len(workloads)}] {cell.workload.name}: "
            + ", ".join(f"{name} {total:.0f} ms" for name, total in totals.items())
        )
        for name, why in cell.failures.items() if last else ():
            _say(f"    {name} failed: {why}")

    contestants = [entrant.contestant for entrant in entrants]
    measure_cells(contestants, workloads, plan, options.seconds, on_round=on_round, on_visit=on_visit)


def _references(entrants: list[Entrant], workload: Workload, device: str) -> dict[str, Pictures | str]:
    """For each contestant its fp32 picture, or why there is none. One checkpoint is loaded at a time, then dropped;
    contestants with the same weights share a picture."""
    import torch

    from bench.pipelines import EagerContestant

    drawn: dict[str | None, Pictures | str] = {None: "no fp32 reference: no checkpoint among its artifacts"}
    threads = torch.get_num_threads()
    for entrant in entrants:
        source = entrant.checkpoint()
        if source in drawn:
            continue
        reference = EagerContestant("reference", str(source), device, workdir=entrant.contestant.workdir)
        # not timed; a narrow net gains nothing from threads, and loses much where the cores are shared
        torch.set_num_threads(1 if entrant.configs.is_narrow else threads)
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                drawn[source] = timed_draw(reference, workload, make_clock(device))[1]
        except torch.OutOfMemoryError:
            drawn[source] = "no fp32 reference: the device has too little memory left for it"
        torch.set_num_threads(threads)
        del reference
        gc.collect()
    return {entrant.name: drawn[entrant.checkpoint()] for entrant in entrants}


def _quality(
    entrants: list[Entrant], workload: Workload, options: RunOptions, device: str
) -> dict[str, dict[str, Any]]:
    from bench.quality import guard

    references = _references(entrants, workload, device) if options.reference else {}
    verdicts = {}
    for entrant in entrants:
        pictures = timed_draw(entrant.contestant, workload, make_clock(entrant.contestant.device))[1]
        reference = references.get(entrant.name, "the reference was switched off")
        quality = guard(pictures, None, reference) if isinstance(reference, str) else guard(pictures, reference)
        fidelity = _fidelity(entrant, workload, options)
        if fidelity is not None and fidelity["words"]:
            quality.passed = False
            quality.words += fidelity["words"]
        verdicts[entrant.name] = asdict(quality) | {"fidelity": fidelity}
        word = {True: "passed", False: "FAILED", None: "not checked"}[quality.passed]
        psnr = "identical" if quality.identical else f"{quality.psnr_db:.0f} dB" if quality.psnr_db else ""
        _say(f"  {entrant.name}: {word} {psnr} {'; '.join(quality.words)}".rstrip())
    return verdicts


def _fidelity(entrant: Entrant, workload: Workload, options: RunOptions) -> dict[str, Any] | None:
    """FID and CLIP score over the user's captions at the main workload; None where no captions were given."""
    if options.captions is None:
        return None
    from bench.fidelity import FidelityOptions, measure_fidelity

    clock = make_clock(entrant.contestant.device)

    def draw(caption: str, seed: int) -> Any:
        one = workload.for_picture(caption, seed, workload.resolution)
        return timed_draw(entrant.contestant, one, clock)[1].images[0]

    return measure_fidelity(
        draw,
        FidelityOptions(
            captions=options.captions,
            count=options.caption_count,
            fid_reference=options.fid_reference,
            fid_extractor=options.fid_extractor,
            clip_model=options.clip_model,
            fid_band=options.fid_band,
            clip_band=options.clip_band,
        ),
    )


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
        kernels=entrant.kernels,
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


def _kernels(entrant: Entrant, main: Workload, cell: CellRecord) -> dict[str, Any]:
    from bench.kernels import profile_denoise

    if entrant.contestant.device == "cpu" and entrant.spec.kind not in ("eager", "compiled"):
        return {"families_ms": None, "why": "on a CPU torch's profiler sees torch's own operators alone"}
    step_ms = next((row.step_ms for row in cell.rows if row.contestant == entrant.name), None)
    try:
        return profile_denoise(entrant.contestant, main, step_ms)
    except Exception as error:  # the profiler is torch's, and what it can read differs from driver to driver
        return {"families_ms": None, "why": f"{type(error).__name__}: {error}"}


def run_bench(options: RunOptions) -> Results:
    """Raises UserError for bad input before anything is loaded. Writes `options.out` after each visit to a workload,
    again when energy, guard and pictures are done, and returns what it wrote."""
    begin = time.monotonic()
    specs = parse_specs(options.contestants)
    baseline = check_options(options, specs)
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
    for workload in workloads:
        workload.check(family)
    main = workloads[0]

    from bench.host import describe_host, peak_rss_bytes
    from bench.roofline import measure_cpu_peak

    gpu = Gpu() if device == "cuda" else _no_gpu(device)
    identity = gpu.identity()
    precisions = {entrant.contestant.precision for entrant in entrants}
    peak = find_peak(identity["name"]) if device == "cuda" else measure_cpu_peak(precisions)
    before = gpu.state()
    import_quietly()
    _say(f"bench on {device}: {len(entrants)} contestants, {len(workloads)} workloads; cold start")
    entrants, notes = _load_all(entrants, main, gpu, options.load_seconds)
    if baseline not in [entrant.name for entrant in entrants]:
        notes.append(f"the baseline {baseline} did not load; speed-ups are against {entrants[0].name}")
        baseline = entrants[0].name
    cells: list[CellRecord] = []
    after = before

    def save(quality: dict[str, Any], energy: dict[str, Any], pictures: list[PictureRecord]) -> Results:
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
            notes=notes,
        )
        write_results(options.out, results)
        return results

    names = [entrant.name for entrant in entrants]
    unchecked: dict[str, Any] = {"passed": None, "words": [STOPPED], "fidelity": None}
    energy: dict[str, dict[str, Any]] = {name: {"j_per_image": None, "why": STOPPED} for name in names}

    def keep(records: list[CellRecord]) -> None:
        nonlocal after
        cells[:], after = records, gpu.state()
        save(dict.fromkeys(names, unchecked), energy, [])

    _say("timed rounds, interleaved")
    _measure(entrants, workloads, options, baseline, peak, gpu, keep)
    if options.kernels:
        _say("kernels of the denoise loop")
        for entrant in entrants:
            entrant.kernels = _kernels(entrant, main, cells[0])
    _say("quality against the fp32 reference")
    quality = _quality(entrants, main, options, device)
    save(quality, energy, [])
    energy = {entrant.name: _energy(entrant, main, gpu, options.energy_seconds) for entrant in entrants}
    if options.pictures:
        _say(f"pictures: {options.pictures} prompts, the same seeds for all")
    results = save(quality, energy, _draw(entrants, main, family, options))
    _say(f"wrote {options.out} after {results.seconds:.0f} s")
    return results


def _no_gpu(device: str) -> Gpu:
    """Without a GPU under test NVML's readings would be some other device's."""
    gpu = Gpu()
    if gpu.present:
        gpu._handle = None
        gpu.reason = f"measured on the {device}, so no GPU was read"
    return gpu
