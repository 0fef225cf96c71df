"""`python -m bench gpu`: all that one session on a GPU can say, in the order of its worth, within a given time.

Every part runs in a process of its own, which is stopped when the time is over: one that fails, hangs or takes its
process down leaves the others their turn. A part that does not fit the time left is not begun. The session file says
what became of each; the same command again goes on with the parts that are not done, those never tried first.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import psutil

from bench.parts import FUNCTIONS, LAYOUTS, PARTIAL, Job, as_argument
from bench.results import SESSION_SCHEMA
from bench.retry import set_aside, settle
from distill.common.errors import UserError, require_least, unknown
from distill.common.files import read_json, write_json
from distill.common.progress import say
from distill.models.architectures import find_architecture

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx", "onnxruntime": "onnxruntime"}
REPORT_S = 25.0  # kept back for the report
STOP_S = 10.0  # between what a part is told to keep within and the moment it is stopped
NEEDS_S = {  # less than this and a part is not begun: what it takes on an 80 GB-class GPU to leave one figure
    "eager": 120, "acceptance": 20, "compiled": 100, "training": 90, "published": 240, "tensorrt": 120, "tensorrt-rtx": 90,
    "onnxruntime": 90, "layouts": 240,
}  # fmt: skip
MOST_S = {"eager": 220.0, "acceptance": 50.0, "training": 110.0}
"""At its first try, while a compiled model waits for its own, in a command of the default time (a longer one gives as
much more): so the first command reaches one, whatever these meet with."""


@dataclass(kw_only=True)
class SuiteOptions:
    """The models of one family with random weights, over every runtime that is there; latency does not depend on the
    weights."""

    out: Path = Path("bench/results")
    """Folder for the JSON files and the report."""
    workdir: Path = Path("out/gpu")
    """Folder for checkpoints, ONNX, bundles, compiled kernels and logs."""
    models: str = "sdxl,ssd-1b,vega"
    """Architectures of one family, comma-separated, the largest first: it is the baseline, and the teacher."""
    resolutions: str = "1024x1024,1536x640,640x1536"
    """WIDTHxHEIGHT, comma-separated: every part draws the first, and some the others too."""
    steps: int = 30
    """Denoising steps of a picture."""
    minutes: float = 8.5
    """The whole command ends within this time; what does not fit is left for the next. 0 makes the report alone."""
    device: str = "cuda"
    """cuda; or cpu, to try the suite out with --models mini-ssd-1b,mini-vega --resolutions 128x128 --steps 2."""
    parts: str = ""
    """Only these, comma-separated; all of them if not given. A name (compiled:vega, eager:batch) or a whole kind: eager,
    acceptance, training, compiled, published, tensorrt, tensorrt-rtx, onnxruntime, layouts."""


@dataclass
class Session:
    """The parts and what became of them: done, partial, failed, stopped or not run, with the reason."""

    options: SuiteOptions
    models: list[str]
    stem: str
    deadline: float
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic() - REPORT_S

    def path(self, part: str) -> Path:
        return self.options.out / f"{self.stem}_{part.replace(':', '-')}.json"

    def state(self, part: str) -> str | None:
        """None where it was never thought of."""
        return self.records[part]["state"] if part in self.records else None

    def tried(self, part: str) -> bool:
        """It was begun before, and is not whole."""
        return self.state(part) in ("partial", "stopped", "failed")

    @property
    def settings(self) -> dict[str, Any]:
        """What must agree for one command to go on with the parts of another."""
        chosen = asdict(self.options)
        return {key: chosen[key] for key in ("models", "resolutions", "steps", "device")}

    def record(
        self, part: str, state: str, why: str | None = None, seconds: float | None = None, log: list[str] | None = None
    ) -> None:
        self.records[part] = {"part": part, "state": state, "why": why, "seconds": seconds, "log": log}
        value = {"schema_version": SESSION_SCHEMA, "settings": self.settings, "parts": list(self.records.values())}
        write_json(self.path("session"), value)
        if state != "done":
            say(f"  {part}: {state}: {why}")


def part_names(models: list[str], resolutions: str) -> list[str]:
    """In the order of their worth."""
    small_first = models[::-1]
    return [
        "eager",
        "acceptance",
        *(f"training:{model}" for model in models[1:2]),
        *(f"compiled:{model}" for model in small_first),
        *(f"published:{model}" for model in models[1:2]),
        *(f"training:{model}" for model in models[2:]),
        "eager:batch",
        *(f"{flavor}:{model}" for flavor in MODULES for model in small_first),
        *(f"layouts:{flavor}" for flavor in LAYOUTS),
        "compiled:batch",
        "eager:bf16",
        *(f"compiled:{size}" for size in resolutions.split(",")[1:]),
        "compiled:bf16",
    ]


def _chosen(options: SuiteOptions, models: list[str]) -> list[str]:
    names = part_names(models, options.resolutions)
    wanted = [name for name in options.parts.split(",") if name]
    for name in wanted:
        if name not in names and name not in FUNCTIONS:
            raise unknown("part", name, [*FUNCTIONS, *(name for name in names if ":" in name)])
    kinds = [name for name in wanted if name not in names]  # `training` is all of training:..., `eager` is itself
    return [name for name in names if not wanted or name in wanted or name.partition(":")[0] in kinds]


def _open_session(options: SuiteOptions) -> Session:
    """Raises UserError for a number out of range, an unknown model, where there is no GPU and none was waived, and for
    results of a session with other settings."""
    from bench.contestants.contestants import default_device
    from bench.measure.gpu import Gpu
    from bench.measure.workload import parse_resolutions

    require_least(1, steps=options.steps)
    require_least(0, minutes=options.minutes)
    models = [name for name in options.models.split(",") if name]
    families = {find_architecture(name).family.name: find_architecture(name).family for name in models}
    if len(families) != 1:
        raise UserError(f"models {options.models!r}: one or more architectures of one family are needed")
    [(family_name, family)] = families.items()
    parse_resolutions(options.resolutions, family)
    if options.device not in ("cuda", "cpu"):
        raise unknown("device", options.device, ("cuda", "cpu"))
    if options.device == "cuda" and default_device() != "cuda":
        raise UserError(
            f"torch sees no NVIDIA GPU here{_driver()}; to try the suite out: --device cpu --models mini-sdxl,mini-vega "
            "--resolutions 128x128 --steps 2"
        )
    name = str(Gpu().identity()["name"] if options.device == "cuda" else "cpu")
    words = "-".join(name.lower().replace("nvidia", "").replace("geforce", "").split())
    stem = f"{family_name}_{words}_{date.today()}"
    session = Session(options, models, stem, time.monotonic() + 60 * options.minutes)
    if session.path("session").exists():
        earlier = read_json(session.path("session"))
        if earlier.get("settings") != session.settings:
            raise UserError(
                f"{session.path('session')} is of a session with other settings ({earlier.get('settings')}); choose "
                "another --out, or remove it"
            )
        session.records = {one["part"]: one for one in earlier["parts"]}
    for part in part_names(models, options.resolutions):  # that was tried again by a command that was killed
        settle(session.path(part))
    return session


def _driver() -> str:
    """What may be why torch sees none: a driver that is older than the CUDA it was made for."""
    import torch

    from engines.gpus import driver_at_hand

    found = driver_at_hand()
    made_for = f", torch {torch.__version__} is made for CUDA {torch.version.cuda or 'none'}"
    return f" (driver {found[0]} runs CUDA {found[1]} at most{made_for})" if found else ""


def _absent(part: str, device: str) -> str | None:
    """Why this machine cannot run a part whatever the time, where that can be told without trying."""
    kind = part.removeprefix("layouts:").partition(":")[0]
    module = MODULES.get(kind)
    if module is None:
        return None
    needed = (
        module,
        "onnx_ir",
        "onnxscript",
        *(["polygraphy"] if kind.startswith("tensorrt") else []),
    )  # built, exported
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        return f"the Python package {absent[0]} is not installed"
    if kind == "onnxruntime" and device == "cuda":
        import onnxruntime

        providers = onnxruntime.get_available_providers()
        if "CUDAExecutionProvider" not in providers:
            return f"this onnxruntime has no CUDAExecutionProvider, only {', '.join(providers)}"
    elif kind != "onnxruntime":
        return _not_targeted(kind) if device == "cuda" else f"{kind} runs on an NVIDIA GPU only"
    return None


def _not_targeted(flavor: str) -> str | None:
    """Said before half a minute of export is spent on a GPU that the flavor names no target for."""
    from engines.flavors import find_flavor
    from engines.gpus import gpu_at_hand

    found, targets = gpu_at_hand(), find_flavor(flavor).targets
    if found is None or targets is None or found[1] in targets:
        return None
    return (
        f"{flavor} has no target for {found[0]} (compute capability {found[1]}); what it says itself is in acceptance"
    )


def _kernel_folder(part: str, models: list[str]) -> str:
    """Where a part keeps what torch compiles; one folder for those of one model each, since the larger run the smaller."""
    kind, _, subject = part.partition(":")
    return f"kernels-{kind}" if subject in models else f"kernels-{part.replace(':', '-')}"


def _stop(process: subprocess.Popen[Any]) -> None:
    """The part, where it still runs, and whatever of its own it has left behind: compilers, builders, memory on the GPU."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in psutil.pids():  # the commands of other rooms have groups of their own within the part's session
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == process.pid:
                os.killpg(os.getpgid(pid), signal.SIGKILL)
    process.wait()


def _run_part(session: Session, part: str, hold: bool = False) -> None:
    """To its end, or until the time is over: the session's, or with `hold` the part's own share."""
    options, began = session.options, time.time()
    timeout_s = session.left_s
    if hold:
        longer = max(1.0, options.minutes / SuiteOptions.minutes)
        timeout_s = min(timeout_s, longer * MOST_S.get(part.partition(":")[0], math.inf))
    kernels = _kernel_folder(part, session.models)
    alike = [one for one in session.records if _kernel_folder(one, session.models) == kernels]
    again = any(session.state(one) in ("done", "partial", "stopped") for one in alike)
    job = Job(
        part=part,
        command=sys.argv[1:],
        out=str(session.path(part)),
        workdir=str(options.workdir),
        models=session.models,
        resolutions=options.resolutions,
        steps=options.steps,
        device=options.device,
        seconds=timeout_s - STOP_S,
        began=began,
        again=again,
    )
    options.workdir.mkdir(parents=True, exist_ok=True)
    log = options.workdir / f"{part.replace(':', '-')}.log"
    set_aside(session.path(part))
    if not again:  # compilation is timed from nothing
        shutil.rmtree(options.workdir / kernels, ignore_errors=True)
    with log.open("wb") as errors:
        command = [sys.executable, "-m", "bench.parts", as_argument(job)]
        environment = os.environ | {
            "PYTHONUNBUFFERED": "1",  # what a stopped part has said is not lost
            "TORCHINDUCTOR_CACHE_DIR": str((options.workdir / kernels).resolve()),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        process = subprocess.Popen(command, stderr=errors, start_new_session=True, env=environment)
        try:
            code: int | None = process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
            stands = settle(session.path(part), done=code == 0)
    seconds = round(time.time() - began, 1)
    state, why, said = _outcome(code, seconds, log.read_text(errors="replace").strip().splitlines())
    if stands:  # and so does what is recorded of it
        say(f"  {part}: {state}: {why}; what it had before is more, and stands")
    else:
        session.record(part, state, why, seconds, said)


def _outcome(code: int | None, seconds: float, said: list[str]) -> tuple[str, str | None, list[str] | None]:
    """(state, why, the last lines said) by a part's exit code, None where it was stopped."""
    if code == 0:
        return "done", None, None
    if code == PARTIAL:
        return "partial", said[-1], None
    if code is None:
        return "stopped", f"not done after {seconds:.0f} s", said[-20:]
    why = said[-1].removeprefix("error: ") if said and code > 0 else None
    return "failed", why or (f"ended by signal {-code}" if code < 0 else f"exit code {code}"), said[-20:]


def run_suite(options: SuiteOptions) -> int:
    """Runs the parts that fit and are not done yet, then makes the report of all that is there; 1 where no part is
    done."""
    session = _open_session(options)
    chosen = _chosen(options, session.models)
    order = sorted(chosen, key=session.tried)
    for position, part in enumerate(order):
        if session.state(part) == "done" and session.path(part).exists():
            say(f"{part}: done earlier")
            continue
        needed = NEEDS_S[part.partition(":")[0]]
        why = _absent(part, options.device)
        if why is None and session.left_s < needed:
            why = f"{max(0.0, session.left_s):.0f} s left, it needs about {needed}"
        if why is None:
            say(f"{part}: {session.left_s:.0f} s left")
            compiled = {f"compiled:{model}" for model in session.models}
            waiting = any(one in compiled and not session.tried(one) for one in order[position + 1 :])
            _run_part(session, part, hold=waiting and not session.tried(part))
        elif session.tried(part):  # what it has stands
            say(f"  {part}: {session.state(part)}, not tried again: {why}")
        else:
            session.record(part, "not run", why)
    names = part_names(session.models, options.resolutions)
    from bench.report.inputs import read_inputs
    from bench.report.report import write_report

    files = []
    for path in (session.path(part) for part in names if session.path(part).exists()):
        try:
            read_inputs([path])
        except UserError as error:
            say(f"left out of the report: {error}")
        else:
            files.append(path)
    if not any(one["state"] in ("done", "partial") for one in session.records.values()):
        return 1
    if read_inputs(files).results:
        title = "slimxl on one GPU" if options.device == "cuda" else "slimxl's GPU suite, tried out on a CPU"
        write_report([*files, session.path("session")], options.out / f"{session.stem}_report", title)
    return 0
