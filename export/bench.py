"""This exporter beside `optimum-cli export onnx` on the same checkpoint: interleaved rounds, ratios.

Both export the whole pipeline in float32 and include their own check against torch, as a user would run them.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from distill.common.errors import UserError, require_least
from distill.common.files import size_text, write_json
from distill.common.ownership import require_our_folder
from export.checks.parity import cpu_session
from export.components import COMPONENTS
from export.job import library_versions, make_config

MARKER = "exports.json"
"""Says that a folder of exports is one of ours, which the next comparison makes anew."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One export: wall and CPU time, and the largest resident memory of the process."""

    exporter: str
    wall_s: float
    cpu_s: float
    peak_bytes: int


def _run(exporter: str, command: list[str], log: Path) -> Run:
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = log.read_text().strip().splitlines()
        raise UserError(f"{exporter} failed with exit code {process.returncode}: {lines[-1] if lines else 'no output'}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(exporter=exporter, wall_s=time.monotonic() - started, cpu_s=cpu_s, peak_bytes=usage.ru_maxrss * 1024)


def _sizes(folder: Path) -> dict[str, dict[str, int]]:
    import onnx

    sizes = {}
    for name in COMPONENTS:
        if (folder / name / "model.onnx").is_file():
            nodes = len(onnx.load(folder / name / "model.onnx", load_external_data=False).graph.node)
            sizes[name] = {
                "nodes": nodes,
                "bytes": sum(file.stat().st_size for file in (folder / name).glob("model.onnx*")),
            }
    return sizes


def unet_latency(folders: dict[str, Path], checkpoint: Path, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of one UNet call of batch 2 on a small picture, one thread, interleaved."""
    from export.write import trace_resolution

    config = make_config(checkpoint, "unet")
    specs = COMPONENTS["unet"].inputs(config, trace_resolution("unet", config), 2, "fp32")
    rng = np.random.default_rng(0)
    feeds = {spec.name: rng.standard_normal(spec.shape) for spec in specs}
    sessions = {name: cpu_session(folder / "unet" / "model.onnx", threads=1) for name, folder in folders.items()}
    kinds = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(float16)": "float16"}
    times: dict[str, list[float]] = {name: [] for name in folders}
    for index in range(rounds + 2):
        for name, session in sessions.items():
            typed = {
                value.name: feeds[value.name]
                .astype(kinds[value.type])
                .reshape(feeds[value.name].shape if value.shape else ())
                for value in session.get_inputs()  # optimum's timestep has no dimension
            }
            started = time.process_time()
            session.run(None, typed)
            if index >= 2:
                times[name].append((time.process_time() - started) * 1e3)
    return times


def bench_export(
    checkpoint: Path,
    workdir: Path,
    *,
    rounds: int = 3,
    latency_rounds: int = 20,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Figures of both and their ratios (optimum / ours: above 1 is in our favour), medians over `rounds`.

    Raises UserError for no round, where optimum is not installed, or an export fails.
    """
    require_least(1, rounds=rounds, latency_rounds=latency_rounds)
    if find_spec("optimum") is None or find_spec("optimum.exporters.onnx") is None:
        raise UserError("optimum is not installed: pip install optimum-onnx 'transformers<4.58'")
    require_our_folder(workdir, "exports to compare", [MARKER], ("checkpoint",))
    folders = {name: workdir / name for name in ("ours", "optimum")}
    model = str(checkpoint)
    commands = {
        "ours": ["-m", "export", "onnx", "--model", model, "--precision", "fp32", "--out", str(folders["ours"])],
        "optimum": ["-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", model],
    }
    commands["optimum"] += ["--task", "text-to-image", str(folders["optimum"])]
    write_json(workdir / MARKER, {"checkpoint": model})
    runs: list[Run] = []
    for number in range(rounds):
        for name, words in commands.items():
            shutil.rmtree(folders[name], ignore_errors=True)
            runs.append(_run(name, [sys.executable, *words], workdir / f"{name}.log"))
            run = runs[-1]
            progress(
                f"round {number + 1} {name}: {run.wall_s:.1f} s, {run.cpu_s:.1f} s CPU, {size_text(run.peak_bytes)}"
            )
    by_name = {name: [run for run in runs if run.exporter == name] for name in commands}
    ratios = {
        measure: statistics.median(
            getattr(theirs, measure) / getattr(ours, measure)
            for ours, theirs in zip(by_name["ours"], by_name["optimum"], strict=True)
        )
        for measure in ("wall_s", "cpu_s", "peak_bytes")
    }
    latencies = unet_latency(folders, checkpoint, latency_rounds)
    pairs = zip(latencies["ours"], latencies["optimum"], strict=True)
    ratios["unet_latency"] = statistics.median(theirs / ours for ours, theirs in pairs)
    return {
        "checkpoint": checkpoint.name,
        "runs": [asdict(run) for run in runs],
        "graphs": {name: _sizes(folder) for name, folder in folders.items()},
        "unet_latency_ms": {name: statistics.median(values) for name, values in latencies.items()},
        "ratios": ratios,
        "cpus": os.cpu_count(),
        "versions": library_versions() | {"optimum": version("optimum-onnx")},
    }
