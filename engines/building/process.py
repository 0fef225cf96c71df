"""Runs a build in a process of its own, from the parent's side: passes progress on, and stops it over its memory budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import psutil

from distill.common.errors import UserError
from distill.common.files import size_text
from engines.building.progress import BuildProgress
from engines.flavors import BuildRequest
from engines.memory import MemoryWatch

WATCH_SECONDS = 0.25


def run_worker(request: BuildRequest, budget_bytes: int, progress: BuildProgress) -> dict[str, Any]:
    """Runs one build and returns the worker's last event.

    Raises UserError where the build fails, its process dies, or it goes over its memory budget. It is stopped then, before
    the system kills a process of its own choice.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "engines.building.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # the GPU that was checked is NVML's first, which is CUDA's first only in this order
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        )
        over_budget = False

        def check(resident_bytes: int) -> None:
            nonlocal over_budget
            if resident_bytes > budget_bytes:
                over_budget = True
                process.kill()

        try:
            with MemoryWatch(psutil.Process(process.pid), WATCH_SECONDS, check):
                result = _talk(process, request, progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if over_budget:
            raise UserError(
                f"building {request.component} went over its memory budget of {size_text(budget_bytes)} and was "
                "stopped; use --layout ranged, fewer resolutions, raise --memory-gb, or build on a larger machine"
            )
        if process.returncode or "outputs" not in result:
            log.seek(0)
            raise UserError(_failure(request, process.returncode, result, log.read().decode(errors="replace")))
        return result


def _talk(process: subprocess.Popen[bytes], request: BuildRequest, progress: BuildProgress) -> dict[str, Any]:
    """Sends the request, passes progress on, and returns the last event once the process has ended."""
    assert process.stdin and process.stdout
    process.stdin.write(request.model_dump_json().encode() + b"\n")
    process.stdin.flush()
    result: dict[str, Any] = {}
    for line in process.stdout:
        event = json.loads(line)
        if "phase" in event:
            progress.update(event["phase"], event["fraction"])
        else:
            result = event
    process.wait()
    return result


def _failure(request: BuildRequest, status: int, result: dict[str, Any], log: str) -> str:
    """Why the build failed, in one line: the worker's error, or its exit status, and the last error of the log."""
    lines = [text.strip() for text in log.splitlines() if text.strip()]
    errors = [line for line in lines if "[E]" in line or "Error" in line]
    if "error" in result:
        reasons = [result["error"], *errors[-1:]]
    else:
        reasons = [f"the builder ended with status {status}", *(errors or lines)[-1:]]
    return ": ".join([f"building {request.component} failed", *reasons])[:1000]
