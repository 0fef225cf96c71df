"""What `python -m bench run` can be told, and what is wrong with it before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.fidelity import FidelityOptions, check_references
from bench.workload import check_scheduler
from distill.errors import UserError, unknown
from distill.files import require_writable_file

if TYPE_CHECKING:
    from bench.contestants import Spec


@dataclass(kw_only=True)
class RunOptions:
    """Measures contestants on the machine at hand and writes one results file."""

    contestants: list[str]
    """NAME=KIND[@OPTION]:SOURCE, kinds eager, compiled, optimum, bundle, fake."""
    out: Path
    """The results file to write."""
    artifacts: list[str] = field(default_factory=list)
    """NAME=FOLDER: checkpoint, ONNX and bundle folders of a contestant: its sizes, losses, hashes, fp32 reference."""
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
    """default (the checkpoint's own), euler, euler-a, ddim, dpm++, unipc, lcm, or a scheduler class of diffusers."""
    seed: int = 0
    seconds: float = 60.0
    """Time for the timed rounds of all cells together; every cell gets at least `min-rounds`."""
    min_rounds: int = 6
    max_rounds: int = 100
    max_warmup: int = 3
    pictures: int = 9
    """Pictures each contestant draws, the same prompts and seeds for all; 0 for none."""
    picture_steps: int = 20
    energy_seconds: float = 10.0
    kernels: bool = False
    """Say by kernel family where the denoise loop's time goes, by torch's profiler, after the timed rounds."""
    load_seconds: float | None = None
    """Contestants that would not be loaded by then, taking as long as the one before, are left out, and said so."""
    reference: bool = True
    """Compare each contestant with its checkpoint in fp32 (needs a checkpoint among its artifacts)."""
    fidelity: FidelityOptions = field(default_factory=FidelityOptions)
    device: str | None = None
    """cpu or cuda; the GPU if there is one."""
    workdir: Path = Path("out/sources")


def check_options(options: RunOptions, specs: list[Spec]) -> str:
    """Raises UserError for what can be known to be wrong before anything is loaded; returns the baseline's name."""
    if options.min_rounds < 1 or options.max_rounds < options.min_rounds:
        raise UserError(
            f"rounds from {options.min_rounds} to {options.max_rounds}: at least 1 is needed, and the most must not be "
            "below the least"
        )
    if options.max_warmup < 1:
        raise UserError(f"--max-warmup {options.max_warmup}: at least 1 is needed")
    check_scheduler(options.scheduler)
    if options.device not in (None, "cpu", "cuda"):
        raise unknown("device", str(options.device), ("cpu", "cuda"))
    from bench.contestants import default_device

    if options.device == "cuda" and default_device() != "cuda":
        raise UserError("device cuda: torch sees no NVIDIA GPU here; leave --device away to run on the CPU")
    check_references(options.fidelity)
    require_writable_file(options.out)
    names = [spec.name for spec in specs]
    baseline = options.baseline or names[0]
    if baseline not in names:
        raise unknown("baseline", baseline, names)
    return baseline
