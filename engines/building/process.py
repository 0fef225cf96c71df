"""The parent's side of a build in a process of its own: progress comes up, and too much memory ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any

import psutil

from distill.common.errors import UserError
from engines.building.progress import BuildProgress
from engines.flavors import BuildRequest


def run_worker(request: BuildRequest, budget_bytes: int, progress: BuildProgress) -> dict[str, Any]:
    """Runs one build in a process of its own and returns its last event.

    Raises UserError where it fails, dies, or goes over its memory budget (it is ended then, before the system picks
    a victim of its own).
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "engines.building.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # the GPU that was looked at before is NVML's first, and CUDA's only in this order
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        )
        assert process.stdin and process.stdout
        watch = _MemoryWatch(process, budget_bytes)
        try:
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
        finally:
            watch.stop()
            if process.poll() is None:
                process.kill()
                process.wait()
        if watch.exceeded_bytes:
            raise UserError(
                f"building {request.component} went over its memory budget of {budget_bytes / 1e9:.1f} GB and was "
                "stopped; use --layout ranged, fewer resolutions, raise --memory-gb, or build on a larger machine"
            )
        if process.returncode or "outputs" not in result:
            log.seek(0)
            lines = [text.strip() for text in log.read().decode(errors="replace").splitlines() if text.strip()]
            errors = [line for line in lines if "[E]" in line or "Error" in line]
            if "error" in result:
                reasons = [result["error"], *errors[-1:]]
            else:
                reasons = [f"the builder ended with status {process.returncode}", *(errors or lines)[-1:]]
            raise UserError(": ".join([f"building {request.component} failed", *reasons])[:1000])
        return result


class _MemoryWatch:
    """Looks at the process's resident memory a few times a second and kills it over the budget."""

    def __init__(self, process: subprocess.Popen[bytes], budget_bytes: int) -> None:
        self.exceeded_bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(process, budget_bytes), daemon=True)
        self._thread.start()

    def _watch(self, process: subprocess.Popen[bytes], budget_bytes: int) -> None:
        while not self._stopped.wait(0.25):
            try:
                used = psutil.Process(process.pid).memory_info().rss
            except psutil.Error:
                return
            if used > budget_bytes:
                self.exceeded_bytes = used
                process.kill()
                return

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
