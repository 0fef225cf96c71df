"""What `python -m bench run` can be told, and what is wrong with it before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.quality.fidelity import FidelityOptions, check_references
from bench.workload import check_scheduler
from distill.checkpoints.sources import WORKDIR
from distill.common.errors import UserError, require_between, require_least, unknown
from distill.common.ownership import require_writable_file

if TYPE_CHECKING:
    from bench.contestants.spec import Spec


def unfinished(out: Path) -> Path:
    """Where a run keeps what it has until it is done: an earlier file of the name stays until then."""
    return out.parent / f"{out.stem}.unfinished.json"


@dataclass(kw_only=True)
class RunOptions:
    """Measures contestants on the machine at hand and writes one results file."""

    contestants: list[str]
    """NAME=KIND[@OPTION]:SOURCE, one or more; KIND[@OPTION]:SOURCE is one of
    eager@fp16:MODEL (diffusers; fp32, bf16 or fp16, any MODEL that distill takes; behind +taught a few-step model draws in
    its own steps, whatever --steps and --guidance say),
    compiled@fp16:MODEL (with torch.compile),
    bundle@FLAVOR:FOLDER (a slimxl bundle; +LAYOUT and +no-graphs may follow FLAVOR),
    optimum:FOLDER (an ONNX folder),
    fake:denoise=10,vae_decode=25 (waits so many milliseconds)."""
    out: Path
    """The results file to write, .json."""
    artifacts: list[str] = field(default_factory=list)
    """NAME=FOLDER, any number; NAME is one of --contestants, FOLDER its checkpoint, ONNX folder or bundle (told by what it
    holds), e.g. vega=out/students/vega vega=out/bundles/vega. From there: sizes, losses, hashes, the fp32 reference."""
    baseline: str | None = None
    """The contestant that speed-ups are told against; the first one if not given."""
    resolutions: str = "first"
    """`all` or `first` of the model family's, or of those that all bundles have; or WIDTHxHEIGHT,...; the first is the main
    one."""
    steps: str | None = None
    """Denoising steps of a picture, comma-separated; the first is the main one. None: what each was taught, else 30."""
    batches: str = "1"
    """Pictures drawn by one call, comma-separated; the first is the main one."""
    guidance: str | None = None
    """Guidance scales, comma-separated; the first is the main one, 1 and below mean no guidance. None: what each was
    taught, else 5."""
    scheduler: str = "default"
    """default (the checkpoint's own), euler, euler-a, ddim, dpm++, unipc, lcm, or a scheduler class of diffusers."""
    mlperf: bool = False
    """Draw as MLPerf inference does: 20 Euler steps, guidance 8, its negative prompt, and one noise for all --captions."""
    seed: int = 0
    """Of the noise that the timed pictures begin with, the same for all contestants."""
    seconds: float = 60.0
    """Time for the timed rounds of all workloads together; each gets at least --min-rounds whatever that takes."""
    min_rounds: int = 6
    """Timed calls of each contestant at each workload, at the least; below 6 a median has no interval."""
    max_rounds: int = 100
    """And at the most."""
    max_warmup: int = 3
    """Calls before them that are not timed, at the most; fewer once two in a row agree within 5 %."""
    pictures: int = 9
    """Prompts that each contestant draws with the main steps, of the mini family with each of --steps, the same seeds for
    all; 0 for none. The report shows the first nine."""
    energy_seconds: float = 10.0
    """Seconds each contestant draws while the GPU's energy counter is read; 0 reads none."""
    sustained_seconds: float = 0.0
    """Seconds each contestant draws without a pause, every picture's time, clocks, power and temperature kept: 180 or more
    show what a warm board does. The energy is then of this time. 0 for none."""
    launches: int = 1
    """Processes that measure one after the other and share --seconds and --min-rounds: 3 or more give the intervals that
    `bench compare` needs on a machine that is not quiet."""
    in_turns: bool = False
    """Load and measure one contestant at a time. It is done so anyway where they do not fit into memory together; their
    ratios are then not of the same rounds."""
    kernels: bool = False
    """Say by kind of kernel where the denoise loop's time goes, by torch's profiler, after the timed rounds."""
    reference: bool = True
    """Compare each contestant with its checkpoint in fp32 (for bundle and optimum: one among its --artifacts)."""
    fidelity: FidelityOptions = field(default_factory=FidelityOptions)
    device: str | None = None
    """cpu or cuda; the GPU if there is one."""
    workdir: Path = WORKDIR
    """Folder for checkpoints that have to be made or converted, and for the fp32 reference pictures."""


def check_options(options: RunOptions, specs: list[Spec]) -> str:
    """Raises UserError for what can be known to be wrong before anything is loaded; returns the baseline's name."""
    for path in (options.out, unfinished(options.out)):
        require_writable_file(path, ("schema_version", "contestants", "cells"))
    require_least(1, min_rounds=options.min_rounds, max_warmup=options.max_warmup)
    require_between(1, 100, launches=options.launches)
    require_least(
        0,
        seed=options.seed,
        seconds=options.seconds,
        pictures=options.pictures,
        energy_seconds=options.energy_seconds,
        sustained_seconds=options.sustained_seconds,
    )
    if options.max_rounds < options.min_rounds:
        raise UserError(f"--max-rounds {options.max_rounds} is below --min-rounds {options.min_rounds}")
    from bench.contestants.spec import check_device

    check_scheduler(options.scheduler)
    if options.mlperf and (options.steps or options.guidance or options.scheduler != "default"):
        raise UserError("--mlperf sets --steps, --guidance and --scheduler itself; leave them out")
    if options.device is not None:
        check_device(options.device)
    check_references(options.fidelity)
    names = [spec.name for spec in specs]
    baseline = options.baseline or names[0]
    if baseline not in names:
        raise unknown("baseline", baseline, names)
    return baseline
