"""The parts of the GPU suite, each in a process of its own: `python -m bench.parts JOB`, the job as JSON.

A part writes its file as it goes, so that one that is stopped, or takes its process down, leaves what it has.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from bench.results import ACCEPTANCE_SCHEMA, TRAINING_SCHEMA
from distill.common.errors import UserError, exit_on_user_error
from distill.common.files import write_json

LAYOUTS = {  # the flavor's default first
    "tensorrt-rtx": ("ranged", "shared", "per-resolution"),
    "tensorrt": ("shared", "ranged", "per-resolution"),
}
PUBLISHED_LOOPS = ("published", "sub-block, no cache", "sub-block", "sub-block, compiled")
PARTIAL = 3
"""The exit code of a part that has its figures, but not all of them."""
ROUNDS_S = 45.0  # asked for; six rounds of large models take as long as they take
MEASURING_S = 150.0  # of the time for the layouts, not to be spent on building


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one part is told. `seconds` is what it should keep within (it is stopped a little later), `command` what the
    user typed after `python -m bench`."""

    part: str
    command: list[str]
    out: str
    workdir: str
    models: list[str]
    resolutions: str
    steps: int
    device: str
    seconds: float
    began: float
    again: bool = False
    """An earlier try of this part, or the same part of a smaller model, has left what it compiled."""

    @property
    def subject(self) -> str:
        """What follows the colon in the part's name: a model, a flavor, a size, `batch` or `bf16`."""
        return self.part.partition(":")[2]

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def precision(self) -> str:
        if self.subject == "bf16":
            return "bf16"
        return "fp16" if self.on_gpu else "fp32"

    @property
    def first_resolution(self) -> str:
        sizes = self.resolutions.split(",")
        return self.subject if self.subject in sizes else sizes[0]

    def left_s(self) -> float:
        return self.seconds - (time.time() - self.began)

    def bench(self, contestants: list[str], **changes: Any) -> list[str]:
        """One `bench run` into `out`. No contestant begins to load that would not be there once a third of the time is
        gone: the largest is loaded last, and compiles as long as all before it. Returns what was left out."""
        from bench.options import RunOptions
        from bench.results import write_results
        from bench.run import LEFT_OUT, run_bench

        values: dict[str, Any] = {
            "contestants": contestants,
            "out": Path(self.out),
            "resolutions": self.first_resolution,
            "steps": str(self.steps),
            "batches": "4" if self.subject == "batch" else "1",
            "reference": self.subject != "batch",  # it was compared one by one
            "seconds": min(ROUNDS_S, max(1.0, 0.4 * self.left_s())),
            "load_seconds": 0.35 * self.left_s(),
            "min_rounds": 6,
            "max_rounds": 40,
            "max_warmup": 2,
            "pictures": 0,
            "energy_seconds": 10.0 if self.on_gpu else 0.0,
            "kernels": True,
            "device": self.device,
            "workdir": Path(self.workdir),
        }
        results = run_bench(RunOptions(**(values | changes)), meanwhile=Path(self.out))
        left_out = [shorten(note, 300, placeholder=" …") for note in results.notes if LEFT_OUT.search(note)]
        if self.again and any("=compiled" in one for one in contestants):
            note = "what was compiled before was kept: a compiled cold start is not from nothing"
            write_results(Path(self.out), results.model_copy(update={"notes": [*results.notes, note]}))
        return left_out


def eager(job: Job) -> list[str]:
    """All models side by side in diffusers, at every size asked for: what everything else is held against."""
    sizes = job.first_resolution if job.subject else job.resolutions
    return job.bench([f"{model}=eager@{job.precision}:random:{model}" for model in job.models], resolutions=sizes)


def compiled(job: Job) -> list[str]:
    """torch.compile: of one model, beside eager and beside the smaller models compiled before it, so that the largest,
    which is last, has the speed-ups of all; or of all models at another batch, precision or size."""
    small_first, beside = job.models[::-1], []
    if job.subject in job.models:
        small_first = small_first[: small_first.index(job.subject) + 1]
        beside = [f"{job.subject} eager=eager@{job.precision}:random:{job.subject}"]
    *known, last = [f"{model} compiled=compiled@{job.precision}:random:{model}" for model in small_first]
    return job.bench([*known, *beside, last], baseline=last.partition("=")[0])


def training(job: Job) -> list[str]:
    """The distillation step of the first model into one other."""
    from bench.floor.peaks import find_peak
    from bench.measure.gpu import Gpu
    from bench.measure.host import describe_host
    from bench.training import NO_TIME, VARIANTS, measure_training

    identity = Gpu().identity() if job.on_gpu else {"name": None}
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        about = {"schema_version": TRAINING_SCHEMA, "gpu": identity, "environment": describe_host(job.device)}
        write_json(Path(job.out), about | {"rows": rows})
        told = row["failed"] or f"{row['samples_per_s']:.2f} samples/s" + (
            f", MFU {row['mfu']:.0%}" if row["mfu"] else ""
        )
        print(f"  {job.subject}: {row['title']}: {told}", flush=True)

    measure_training(
        job.models[0],
        job.subject,
        device=job.device,
        batch=4 if job.on_gpu else 1,
        peak=find_peak(identity["name"], identity.get("mig_mode")),
        steps=6 if job.on_gpu else 2,
        variants=VARIANTS if job.on_gpu else tuple(one for one in VARIANTS if not one.compiled),
        left_s=job.left_s,
        on_row=keep,
    )
    if all(row["failed"] for row in rows):
        raise UserError(rows[0]["failed"])
    return [f"{row['title']}: {row['failed']}" for row in rows if (row["failed"] or "").startswith(NO_TIME)]


def published(job: Job) -> list[str]:
    """The trainer's step beside the published loop, in turn, by the distill room's own benchmark; the levels of features
    are `training`'s. It writes the times before it goes on to the memory."""
    folder = _checkpoint(job, job.models[0])
    small = (
        ["--batch", "4", "--mixed-precision", "bf16", "--gradient-checkpointing"] if job.on_gpu else ["--batch", "1"]
    )
    try:
        _command(
            job, "distill", "bench", "--model", str(folder), "--student", job.subject, "--out", job.out,
            "--workdir", job.workdir, "--rounds", "6", *small, "--loops", *PUBLISHED_LOOPS,
        )  # fmt: skip
    except UserError as error:
        if not Path(job.out).exists():
            raise
        return [f"not all of the memory is measured: {error}"]
    return []


def acceptance(job: Job) -> None:
    """Whether TensorRT-RTX and ONNX Runtime's GPU providers take this GPU, in their own words."""
    from bench.acceptance import measure_acceptance
    from bench.measure.gpu import Gpu

    name = Gpu().identity()["name"]

    def keep(rows: list[dict[str, Any]]) -> None:
        write_json(Path(job.out), {"schema_version": ACCEPTANCE_SCHEMA, "gpu": name, "rows": rows})

    for row in measure_acceptance(keep):
        print(f"  {row['target']}: {row['reached']}{': ' + row['messages'][-1] if row['messages'] else ''}", flush=True)


def _command(job: Job, *arguments: str, hide_gpus: bool = False, keep_s: float = 0.0) -> None:
    """Another room's command, of the time left all but `keep_s`. Raises UserError with its last line where it fails or
    finds no time."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": "-1"} if hide_gpus else {})
    command, pipe = [sys.executable, "-m", *arguments], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, process_group=0) as process:
        try:
            out, errors = process.communicate(timeout=max(1.0, job.left_s() - keep_s))
        except subprocess.TimeoutExpired:
            raise UserError(f"{' '.join(arguments[:2])} found no time to end") from None
        finally:  # a builder left alone would go on beside what is measured next
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = (errors.strip() or out.strip()).splitlines()
        raise UserError(
            f"{' '.join(arguments[:2])}: {lines[-1].removeprefix('error: ') if lines else process.returncode}"
        )


def _checkpoint(job: Job, model: str) -> Path:
    """The random model as a folder, for the rooms that take one."""
    import torch

    from bench.contestants.random_weights import random_pipeline
    from distill.common.files import replacing

    folder = Path(job.workdir) / f"{model}-{job.precision}"
    if not folder.exists():
        dtype = torch.float16 if job.on_gpu else torch.float32
        with replacing(folder) as temporary:
            random_pipeline(model, job.device, dtype).save_pretrained(temporary)
        gc.collect()  # diffusers' pipelines are cycles, and what is measured next needs the GPU's memory
        torch.cuda.empty_cache()
    return folder


def _exported(job: Job, model: str) -> tuple[Path, Path]:
    """The same as a checkpoint folder and as an ONNX folder."""
    folder = _checkpoint(job, model)
    onnx = Path(job.workdir) / f"onnx-{model}-{job.precision}"
    _command(
        job, "export", "onnx", "--model", str(folder), "--out", str(onnx), "--precision", job.precision, "--no-check",
        "--components", "unet,vae_decoder,text_encoder,text_encoder_2", "--vae-precision", job.precision,
    )  # fmt: skip
    return folder, onnx


def _build(
    job: Job,
    onnx: Path,
    bundle: Path,
    flavor: str,
    layout: str,
    sizes: str,
    *,
    batches: str = "1",
    gpu: str = "auto",
    keep_s: float = 0.0,
) -> None:
    """Adds one layout to a bundle. A GPU that is named, not `auto`, is built for with no GPU in sight."""
    _command(
        job, "engines", "build", "--onnx", str(onnx), "--out", str(bundle), "--flavor", flavor, "--layout", layout,
        "--gpus", gpu, "--resolutions", sizes, "--batches", batches, "--replace", hide_gpus=gpu != "auto", keep_s=keep_s,
    )  # fmt: skip


def flavor(job: Job) -> list[str]:
    """One model by one of our flavors, exported, built and run on the spot, beside diffusers and beside the models that
    came before it: with the largest, which is last, the speed-ups of all on the same runtime. Every size and batch 4
    too, but for TensorRT, which would build each for minutes."""
    name, model, work = job.part.partition(":")[0], job.subject, Path(job.workdir)
    folder, onnx = _exported(job, model)
    layout, sizes, batches = ("ranged", job.resolutions, "1,4")
    if name == "tensorrt":
        layout, sizes, batches = ("per-resolution", job.first_resolution, "1")
    _build(job, onnx, work / f"bundle-{name}-{model}", name, layout, sizes, batches=batches)
    runs = [f"{model} eager=eager@{job.precision}:{folder}"]
    artifacts = []
    for one in (model, *(other for other in job.models if other != model)):
        bundle, ours = work / f"bundle-{name}-{one}", f"{one} {name}"
        if (bundle / "manifest.json").is_file():
            runs.append(f"{ours}=bundle@{name}:{bundle}")
            artifacts += [
                f"{ours}={part}"
                for part in (work / f"{one}-{job.precision}", work / f"onnx-{one}-{job.precision}", bundle)
            ]
    return job.bench(runs, resolutions=sizes, batches=batches, artifacts=artifacts)


def layouts(job: Job) -> list[str]:
    """The smallest model by one flavor in every layout, at every size: latency, memory, first picture, change of size.
    Beside them CUDA graphs switched off, and what TensorRT-RTX builds ahead of time, without a GPU. Raises UserError
    for what could not be built, once the rest is measured."""
    from engines.gpus import GPUS, gpu_at_hand

    name, model, work = job.subject, job.models[-1], Path(job.workdir)
    folder, onnx = _exported(job, model)
    bundle, ahead = work / f"layouts-{name}-{model}", work / f"ahead-{name}-{model}"
    found, default = gpu_at_hand(), LAYOUTS[name][0]
    names = [gpu.name for gpu in GPUS.values() if found and gpu.compute_capability == found[1]]
    wanted = [(layout, bundle, layout, "auto") for layout in LAYOUTS[name]]
    if name == "tensorrt-rtx" and names:
        wanted.append((f"{default} built ahead", ahead, default, names[0]))
    runs, failed, left_out = [], [], []
    for title, out, layout, gpu in wanted:
        try:
            _build(job, onnx, out, name, layout, job.resolutions, gpu=gpu, keep_s=MEASURING_S)
            runs.append(f"{model} {title}=bundle@{name}+{layout}:{out}")
        except UserError as error:
            failed.append(f"{title}: {error}")
    if runs:
        first = runs[0].partition("+")[2].partition(":")[0]
        runs.append(f"{model} {first} no graphs=bundle@{name}+{first}+no-graphs:{bundle}")
        artifacts = [f"{one.partition('=')[0]}={folder}" for one in runs]
        left_out = job.bench(runs, resolutions=job.resolutions, artifacts=artifacts, energy_seconds=0.0)
    if failed:
        raise UserError("; ".join(failed))
    return left_out


FUNCTIONS: dict[str, Callable[[Job], list[str] | None]] = {
    "eager": eager,
    "acceptance": acceptance,
    "compiled": compiled,
    "training": training,
    "published": published,
    "tensorrt": flavor,
    "tensorrt-rtx": flavor,
    "onnxruntime": flavor,
    "layouts": layouts,
}


def as_argument(job: Job) -> str:
    return json.dumps(asdict(job))


def main() -> int:
    job = Job(**json.loads(sys.argv[1]))
    sys.argv[1:] = job.command  # what the results will say they were made by

    def run() -> int:
        left_out = FUNCTIONS[job.part.partition(":")[0]](job)
        if left_out:
            print("; ".join(left_out), file=sys.stderr)
        return PARTIAL if left_out else 0

    return exit_on_user_error(run)


if __name__ == "__main__":
    sys.exit(main())
