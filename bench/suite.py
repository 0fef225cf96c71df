"""`python -m bench gpu`: what one session on a GPU can say, in the order of its worth, within a given time.

Each job writes its own results file as soon as it is done, so a session that is cut short keeps what it has. A job
that cannot run (no TensorRT, no memory, no time) leaves a note with the reason, and the others go on.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.options import RunOptions
from distill.architectures import ARCHITECTURES
from distill.errors import UserError, unknown
from distill.files import write_json

console = Console(highlight=False, soft_wrap=True, markup=False)
FLAVOR_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@dataclass(kw_only=True)
class SuiteOptions:
    """The models of one family with random weights, over every runtime that is there; latency does not depend on the
    weights."""

    out: Path = Path("bench/results")
    """Folder for the JSON files and the report."""
    workdir: Path = Path("out/gpu")
    """Folder for checkpoints, ONNX and bundles."""
    models: str = "sdxl,ssd-1b,vega"
    """Architectures, comma-separated, the baseline first."""
    resolutions: str = "1024x1024,1344x768,640x1536"
    steps: int = 30
    minutes: float = 8.5
    """The whole suite ends within this time; what does not fit is left out and said so."""
    max_rounds: int = 40
    device: str | None = None
    """cuda unless told otherwise; cpu only makes sense for the mini models."""
    jobs: str = "eager,training,compiled,tensorrt,tensorrt-rtx,onnxruntime"


@dataclass
class Session:
    """What the jobs share: the clock, the files written and the notes on what was left out."""

    options: SuiteOptions
    models: list[str]
    device: str
    stem: str
    deadline: float
    written: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, text: str) -> None:
        self.notes.append(text)
        console.print(f"  left out: {text}")

    def path(self, job: str) -> Path:
        return self.options.out / f"{self.stem}_{job}.json"

    def bench(self, job: str, contestants: list[str], share: float, **changes: Any) -> None:
        """One `bench run` whose timed rounds take `share` of the time left."""
        from bench.run import run_bench

        values: dict[str, Any] = {
            "contestants": contestants,
            "out": self.path(job),
            "resolutions": self.options.resolutions,
            "steps": str(self.options.steps),
            "seconds": max(5.0, share * self.left_s),
            "min_rounds": 6,
            "max_rounds": self.options.max_rounds,
            "pictures": 0,
            "energy_seconds": 10.0,
            "device": self.device,
            "workdir": self.options.workdir / "sources",
        }
        run_bench(RunOptions(**(values | changes)))
        self.written.append(self.path(job))


def _checkpoint(session: Session, model: str) -> Path:
    from distill.sources import resolve

    return resolve(f"random:{model}", session.options.workdir / "sources")


def _precision(session: Session) -> str:
    return "fp16" if session.device.startswith("cuda") else "fp32"


def run_eager(session: Session) -> None:
    """All models side by side in diffusers, three resolutions: the figure everything else is held against."""
    specs = [f"{model}=eager@{_precision(session)}:random:{model}" for model in session.models]
    session.bench("eager", specs, 0.22)


def run_training(session: Session) -> None:
    """The distillation step, teacher into each smaller model."""
    import torch

    from bench.gpu import Gpu
    from bench.peaks import find_peak
    from bench.training import measure_training

    cuda = session.device.startswith("cuda")
    peak = find_peak(Gpu().identity()["name"]) if cuda else None
    rows = []
    for student in session.models[1:]:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = measure_training(session.models[0], student, device=session.device, batch=4 if cuda else 1, peak=peak)
        rows.append(row)
        console.print(f"  {student}: {row['samples_per_s']:.2f} samples/s")
    path = session.path("training")
    write_json(path, {"schema_version": "slimxl.bench.training/1", "device": session.stem, "rows": rows})


def run_compiled(session: Session) -> None:
    """torch.compile against eager, one model at a time, smallest first: compiling the largest takes longest."""
    for model in reversed(session.models):
        if session.left_s < 100:
            session.note(f"torch.compile of {model}: {session.left_s:.0f} s left, it needs about 100")
            continue
        first = session.options.resolutions.split(",")[0]
        precision = _precision(session)
        session.bench(
            f"compiled-{model}",
            [
                f"{model} eager=eager@{precision}:random:{model}",
                f"{model} compiled=compiled@{precision}:random:{model}",
            ],
            0.12,
            resolutions=first,
            energy_seconds=0.0,
        )


def _command(session: Session, *arguments: str) -> str | None:
    """Runs a room's command within the time left; None where it went well, else why not."""
    try:
        command, timeout_s = [sys.executable, "-m", *arguments], max(1.0, session.left_s - 30)
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return "no time left"
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return None if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def _run_flavor(session: Session, flavor: str) -> None:
    """Exports, builds and runs each model that the time allows, smallest first, one static size each."""
    module = FLAVOR_MODULES.get(flavor)
    if module is not None and importlib.util.find_spec(module) is None:
        return session.note(f"{flavor}: the package {module} is not installed (pip install 'slimxl[gpu]')")
    first = session.options.resolutions.split(",")[0]
    precision = _precision(session)
    for model in reversed(session.models):
        if session.left_s < 120:
            session.note(f"{flavor} of {model}: {session.left_s:.0f} s left, it needs about 120")
            continue
        folder = _checkpoint(session, model)
        onnx, bundle = (
            session.options.workdir / f"onnx-{model}-{precision}",
            session.options.workdir / f"bundle-{model}",
        )
        why = _command(
            session, "export", "onnx", "--model", str(folder), "--out", str(onnx), "--precision", precision,
            "--components", "unet,vae_decoder,text_encoder,text_encoder_2", "--no-check",
        )  # fmt: skip
        gpus = ["--gpus", "auto"] if module is not None else []
        why = why or _command(
            session, "engines", "build", "--onnx", str(onnx), "--out", str(bundle), "--flavor", flavor,
            "--layout", "ranged" if module is None else "per-resolution", "--resolutions", first, *gpus,
        )  # fmt: skip
        if why is not None:
            session.note(f"{flavor} of {model}: {why}")
            continue
        session.bench(
            f"{flavor}-{model}",
            [f"{model} eager=eager@{precision}:random:{model}", f"{model} {flavor}=bundle@{flavor}:{bundle}"],
            0.12,
            resolutions=first,
            energy_seconds=0.0,
            artifacts=[f"{model} {flavor}={folder}", f"{model} {flavor}={onnx}", f"{model} {flavor}={bundle}"],
        )


JOBS: dict[str, Callable[[Session], None]] = {
    "eager": run_eager,
    "training": run_training,
    "compiled": run_compiled,
    "tensorrt": lambda session: _run_flavor(session, "tensorrt"),
    "tensorrt-rtx": lambda session: _run_flavor(session, "tensorrt-rtx"),
    "onnxruntime": lambda session: _run_flavor(session, "onnxruntime"),
}


def _session(options: SuiteOptions) -> tuple[Session, list[str]]:
    """Raises UserError for an unknown model or job, or where there is no GPU and none was waived."""
    from bench.contestants import default_device
    from bench.gpu import Gpu

    models = [name for name in options.models.split(",") if name]
    for name in models:
        if name not in ARCHITECTURES:
            raise unknown("architecture", name, ARCHITECTURES)
    if not models or len({ARCHITECTURES[name].family.name for name in models}) > 1:
        raise UserError(f"models {options.models!r}: one or more architectures of one family are needed")
    jobs = [name for name in options.jobs.split(",") if name]
    for name in jobs:
        if name not in JOBS:
            raise unknown("job", name, JOBS)
    device = options.device or "cuda"
    if device == "cuda" and default_device() != "cuda":
        raise UserError(
            "torch sees no NVIDIA GPU here; `--device cpu --models mini-sdxl,mini-vega` tries the suite out"
        )
    name = Gpu().identity()["name"] if device == "cuda" else "cpu"
    words = str(name).lower().replace("nvidia", "").replace("geforce", "").split()
    stem = f"{models[0].partition('-')[0] if models[0].startswith('mini') else 'sdxl'}_{'-'.join(words)}_{date.today()}"
    return Session(options, models, device, stem, time.monotonic() + 60 * options.minutes), jobs


def run_suite(options: SuiteOptions) -> int:
    """Runs the jobs that fit, writes their JSON and the report; 1 where not one of them finished."""
    session, jobs = _session(options)
    for name in jobs:
        if session.left_s < 20:
            session.note(f"{name}: no time left")
            continue
        console.print(f"{name}: {session.left_s:.0f} s left")
        try:
            JOBS[name](session)
        except UserError as error:
            session.note(f"{name}: {error}")
        except Exception as error:
            session.note(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        _forget(session.device)
    write_json(session.path("notes"), {"schema_version": "slimxl.bench.notes/1", "left_out": session.notes})
    if not session.written:
        return 1
    from bench.report import write_report

    write_report(session.written, options.out / f"{session.stem}_report", "slimxl latency report")
    return 0


def _forget(device: str) -> None:
    """Gives a finished job's memory back."""
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch._dynamo.reset()
        torch.cuda.empty_cache()
