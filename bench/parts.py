"""The parts of the GPU suite, each in a process of its own: `python -m bench.parts JOB`, the job as JSON.

A part writes its file as it goes, so that one that is stopped, or takes its process down, leaves what it has.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError, exit_on_user_error
from distill.files import write_json


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

    @property
    def subject(self) -> str:
        """What follows the colon in the part's name: a model."""
        return self.part.partition(":")[2]

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def precision(self) -> str:
        return "fp16" if self.on_gpu else "fp32"

    @property
    def first_resolution(self) -> str:
        return self.resolutions.split(",")[0]

    def left_s(self) -> float:
        return self.seconds - (time.time() - self.began)

    def bench(self, contestants: list[str], seconds: float, **changes: Any) -> None:
        """One `bench run` into `out`, its timed rounds within `seconds`. Once a third of the time is gone, no further
        contestant begins to load: the largest is loaded last, and compiles as long as all before it."""
        from bench.options import RunOptions
        from bench.run import run_bench

        values: dict[str, Any] = {
            "contestants": contestants,
            "out": Path(self.out),
            "resolutions": self.first_resolution,
            "steps": str(self.steps),
            "seconds": min(seconds, max(1.0, 0.4 * self.left_s())),
            "load_seconds": 0.35 * self.left_s(),
            "min_rounds": 6,
            "max_rounds": 40,
            "max_warmup": 2,
            "pictures": 0,
            "energy_seconds": 0.0,
            "kernels": True,
            "device": self.device,
            "workdir": Path(self.workdir),
        }
        run_bench(RunOptions(**(values | changes)))


def eager(job: Job) -> None:
    """All models side by side in diffusers, at every size asked for: what everything else is held against."""
    specs = [f"{model}=eager@{job.precision}:random:{model}" for model in job.models]
    job.bench(specs, 50.0, resolutions=job.resolutions, energy_seconds=10.0 if job.on_gpu else 0.0)


def compiled(job: Job) -> None:
    """torch.compile of all models, eager beside it in the same rounds. The smallest loads first: compiling the largest
    takes longest, and is what is left out where time is short."""
    specs = [f"{model} eager=eager@{job.precision}:random:{model}" for model in job.models]
    specs += [f"{model} compiled=compiled@{job.precision}:random:{model}" for model in reversed(job.models)]
    job.bench(specs, 45.0, baseline=f"{job.models[0]} compiled")


def batch(job: Job) -> None:
    """Four pictures at once."""
    specs = [f"{model}=eager@{job.precision}:random:{model}" for model in job.models]
    job.bench(specs, 40.0, batches="4", reference=False)


def compiled_batch(job: Job) -> None:
    specs = [f"{model} compiled=compiled@{job.precision}:random:{model}" for model in reversed(job.models)]
    job.bench(specs, 40.0, batches="4", reference=False, baseline=f"{job.models[0]} compiled")


def bf16(job: Job) -> None:
    specs = [f"{model} bf16=eager@bf16:random:{model}" for model in job.models]
    job.bench(specs, 30.0)


def training(job: Job) -> None:
    """The distillation step of the first model into one other."""
    from bench.gpu import Gpu
    from bench.host import describe_host
    from bench.peaks import find_peak
    from bench.training import SCHEMA, VARIANTS, measure_training

    identity = Gpu().identity() if job.on_gpu else {"name": None}
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        about = {"schema_version": SCHEMA, "gpu": identity, "environment": describe_host(job.device)}
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
        peak=find_peak(identity["name"]),
        steps=5 if job.on_gpu else 2,
        variants=VARIANTS if job.on_gpu else tuple(one for one in VARIANTS if not one.compiled),
        left_s=job.left_s,
        on_row=keep,
    )
    if all(row["failed"] for row in rows):
        raise UserError(rows[0]["failed"])


def acceptance(job: Job) -> None:
    """Whether TensorRT-RTX and ONNX Runtime's GPU providers take this GPU, in their own words."""
    from bench.acceptance import SCHEMA, measure_acceptance
    from bench.gpu import Gpu

    name = Gpu().identity()["name"]

    def keep(rows: list[dict[str, Any]]) -> None:
        write_json(Path(job.out), {"schema_version": SCHEMA, "gpu": name, "rows": rows})

    for row in measure_acceptance(keep):
        print(f"  {row['target']}: {row['reached']}{': ' + row['messages'][-1] if row['messages'] else ''}", flush=True)


def _command(job: Job, *arguments: str) -> None:
    """Another room's command. Raises UserError with its last line where it fails or finds no time."""
    try:
        command = [sys.executable, "-m", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, job.left_s()), check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{' '.join(arguments[:2])} found no time to end") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise UserError(f"{' '.join(arguments[:2])}: {lines[-1].removeprefix('error: ') if lines else done.returncode}")


def _checkpoint(job: Job, model: str) -> Path:
    """The random model as a folder, for the rooms that take one."""
    import torch

    from bench.random_weights import random_pipeline
    from distill.files import replacing

    folder = Path(job.workdir) / f"{model}-{job.precision}"
    if not folder.exists():
        dtype = torch.float16 if job.on_gpu else torch.float32
        with replacing(folder) as temporary:
            random_pipeline(model, job.device, dtype).save_pretrained(temporary)
    return folder


def flavor(job: Job) -> None:
    """One model by one of our flavors: exported, built for the first size, and run beside diffusers."""
    name, model = job.part.partition(":")[0], job.subject
    folder, work = _checkpoint(job, model), Path(job.workdir)
    onnx, bundle = work / f"onnx-{model}-{job.precision}", work / f"bundle-{name}-{model}"
    _command(
        job, "export", "onnx", "--model", str(folder), "--out", str(onnx), "--precision", job.precision, "--no-check",
        "--components", "unet,vae_decoder,text_encoder,text_encoder_2", "--vae-precision", job.precision,
    )  # fmt: skip
    where = ["--layout", "ranged"] if name == "onnxruntime" else ["--layout", "per-resolution", "--gpus", "auto"]
    _command(
        job, "engines", "build", "--onnx", str(onnx), "--out", str(bundle), "--flavor", name, *where,
        "--resolutions", job.first_resolution, "--replace",
    )  # fmt: skip
    ours = f"{model} {name}"
    job.bench(
        [f"{model} eager=eager@{job.precision}:{folder}", f"{ours}=bundle@{name}:{bundle}"],
        30.0,
        artifacts=[f"{ours}={part}" for part in (folder, onnx, bundle)],
    )


FUNCTIONS: dict[str, Callable[[Job], None]] = {
    "eager": eager,
    "acceptance": acceptance,
    "compiled": compiled,
    "training": training,
    "batch": batch,
    "tensorrt": flavor,
    "tensorrt-rtx": flavor,
    "onnxruntime": flavor,
    "bf16": bf16,
    "compiled-batch": compiled_batch,
}


def as_argument(job: Job) -> str:
    return json.dumps(asdict(job))


def main() -> int:
    job = Job(**json.loads(sys.argv[1]))
    sys.argv[1:] = job.command  # what the results will say they were made by

    def run() -> int:
        FUNCTIONS[job.part.partition(":")[0]](job)
        return 0

    return exit_on_user_error(run)


if __name__ == "__main__":
    sys.exit(main())
