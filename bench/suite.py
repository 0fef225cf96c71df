"""`python -m bench gpu`: all that a GPU can be measured for with random weights, job by job.

Each job leaves a results file of its own, and is skipped where that file is there: the same call again goes on with what
is missing. A job that fails is told in a line with its log, and the next begins.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.jobs import Job, Jobs
from distill.common.errors import UserError, require_between, require_least
from distill.common.files import read_json, write_json
from distill.common.options import parse_names
from distill.common.ownership import require_our_folder
from distill.common.progress import say
from distill.models.architectures import find_architecture

ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(kw_only=True)
class SuiteOptions:
    """The models of one family with random weights, on every runtime that is there. The arithmetic is the same with any
    weights; power, and clocks where power is the limit, are not."""

    out: Path = Path("out/bench-gpu")
    """Folder for the JSON files, the report, logs and engines; copy what is to stay to bench/results."""
    models: str = "sdxl,ssd-1b,vega"
    """Two or more architectures of one family, comma-separated, the largest first: it is the baseline, and the teacher."""
    resolutions: str = "1024x1024,1536x640,640x1536"
    """WIDTHxHEIGHT, comma-separated: every job draws the first, and some the others too."""
    steps: int = 30
    """Denoising steps of a picture."""
    minutes: float = 60.0
    """No job begins after this time; one that has begun is finished. 0 makes the report alone."""
    device: str = "cuda"
    """cuda; or cpu, to try the suite out with --models mini-ssd-1b,mini-vega --resolutions 128x128 --steps 2."""
    jobs: str = ""
    """Only those whose names begin so, comma-separated, e.g. eager,training; all of them if not given."""


def _check(options: SuiteOptions) -> None:
    """Raises UserError for a number out of range, an unknown model or device, and for results of other settings."""
    from bench.contestants.spec import check_device
    from bench.workload import family_resolutions

    require_between(1, 1000, steps=options.steps)
    require_least(0, minutes=options.minutes)
    architectures = [find_architecture(name) for name in options.models.split(",")]
    if len(architectures) < 2 or len({one.family.name for one in architectures}) > 1:
        raise UserError(f"--models {options.models}: two or more architectures of one family are needed")
    family_resolutions(options.resolutions, architectures[0].family)
    check_device(options.device)
    settings = {key: asdict(options)[key] for key in ("models", "resolutions", "steps", "device")}
    kept = options.out / "settings.json"
    require_our_folder(options.out, "a folder of `bench gpu`", [kept.name], settings)
    if kept.exists() and read_json(kept) != settings:
        raise UserError(f"{options.out} holds results of other settings ({kept}); choose another --out, or remove it")
    write_json(kept, settings)


def _flavors(device: str) -> list[str]:
    """Those that are installed and run here; of the others is said why not."""
    from engines.flavors import FLAVORS, find_flavor, why_not_here

    runnable = []
    for name in FLAVORS:
        flavor = find_flavor(name)
        why = "it runs on an NVIDIA GPU only" if device == "cpu" and flavor.targets else why_not_here(flavor)
        if why:
            say(f"{name} is left out: {why}")
        else:
            runnable.append(name)
    return runnable


def _gpu_at_hand() -> dict[str, Any]:
    """The name that `engines build --gpus` takes for one like it, and the precisions of 8 bits that it has."""
    from engines.choices import EIGHT_BITS
    from engines.gpus import GPUS, gpu_at_hand, has_arithmetic

    if (found := gpu_at_hand()) is None:
        return {}
    name = next((gpu.name for gpu in GPUS.values() if gpu.compute_capability == found[1]), None)
    return {"gpu": name, "eight_bits": [one for one in EIGHT_BITS if has_arithmetic(found[1], one)]}


def _run(job: Job, out: Path, ended: dict[Job, bool]) -> bool:
    """Whether the job ended well; what several jobs need is run once."""
    if job not in ended:
        ended[job] = all(_run(needed, out, ended) for needed in job.needs) and _run_alone(job, out)
    return ended[job]


def _run_alone(job: Job, out: Path) -> bool:
    log, kernels, begin = out / "logs" / f"{job.name}.log", out / "work" / "kernels", time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(kernels, ignore_errors=True)  # compilation is timed from nothing
    environment = os.environ | ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(kernels.resolve())}
    if job.hide_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = "-1"
    say(f"{job.name}: python -m {shlex.join(job.command[:2])} …")
    with log.open("w") as file:
        print(f"python -m {shlex.join(job.command)}", file=file, flush=True)
        command = [sys.executable, "-m", *job.command]
        ended = subprocess.run(command, check=False, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if ended.returncode:
        said = log.read_text(errors="replace").strip().splitlines()[-1].removeprefix("error: ")
        say(f"  failed after {time.monotonic() - begin:.0f} s (exit code {ended.returncode}): {said}; its log is {log}")
    return ended.returncode == 0


def run_suite(options: SuiteOptions) -> int:
    """Runs the jobs whose files are not there, then makes the report of all files; 1 where there is none."""
    _check(options)
    end, ended = time.monotonic() + 60 * options.minutes, dict[Job, bool]()
    wanted = tuple(parse_names(options.jobs)) or ("",)
    jobs = Jobs(
        out=options.out,
        models=options.models.split(","),
        resolutions=options.resolutions.split(","),
        steps=options.steps,
        device=options.device,
        flavors=_flavors(options.device),
        **(_gpu_at_hand() if options.device == "cuda" else {}),
    ).in_order()
    if strange := [one for one in wanted if not any(job.name.startswith(one) for job in jobs)]:
        raise UserError(f"no job's name begins with {strange[0]!r}: there are {', '.join(job.name for job in jobs)}")
    files = {job: options.out / f"{job.name}.json" for job in jobs}
    missing = [job for job in jobs if job.name.startswith(wanted) and not files[job].exists()]
    for position, job in enumerate(missing):
        if time.monotonic() >= end:
            say(f"left for another call: {', '.join(one.name for one in missing[position:])}")
            break
        _run(job, options.out, ended)
    done = [job for job in jobs if files[job].exists()]
    if any(job.command[0] == "bench" for job in done):
        from bench.report.report import write_report

        title = "slimxl on one GPU" if options.device == "cuda" else "slimxl's GPU suite, tried out on a CPU"
        write_report([files[job] for job in done], options.out / "report", title)
    return 0 if done else 1
