"""The machine and the software under the measurement: CPU, memory, versions, commit. Absent readings are None."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "onnx", "onnxruntime", "onnxruntime-gpu", "optimum",
    "optimum-onnx", "tensorrt", "tensorrt_rtx", "numpy", "nvidia-ml-py",
)  # fmt: skip


def package_versions() -> dict[str, str | None]:
    """Installed versions; None means not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def cpu_identity() -> dict[str, Any]:
    """Model, cores, governor and memory of this machine, with the reason for whatever cannot be read."""
    missing: dict[str, str] = {}
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    governor_file = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    governor = governor_file.read_text().strip() if governor_file.exists() else None
    if governor is None:
        missing["governor"] = "the kernel shows no cpufreq here (a virtual machine, usually)"
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        frequency = None
    if frequency is None or not frequency.current:
        missing["mhz"] = "the kernel shows no clock frequency"
    return {
        "model": model,
        "architecture": platform.machine(),
        "cores_logical": os.cpu_count(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "mhz": frequency.current if frequency and frequency.current else None,
        "governor": governor,
        "memory_bytes": psutil.virtual_memory().total,
        "missing": missing,
    }


def machine_id() -> str | None:
    """Tells this machine from others of its model, and from nothing else: a hash of systemd's id, which is not to be
    shown itself (man machine-id). None where there is none."""
    for path in (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id")):
        with contextlib.suppress(OSError):
            if text := path.read_text().strip():
                return hashlib.sha256(f"slimxl {text}".encode()).hexdigest()[:16]
    return None


def commit_hash(folder: Path) -> str | None:
    """The checked-out commit, with `+changes` where the tree differs; None outside a repository."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


class OtherLoad:
    """How much CPU others used between `__init__` and `percent`: the machine's busy time less our own and that of what we
    started, compilers for instance."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._busy, self._own = self._busy_s(), self._own_s()

    @staticmethod
    def _busy_s() -> float:
        times = psutil.cpu_times()
        return times.user + times.system + getattr(times, "nice", 0.0)

    @staticmethod
    def _own_s() -> float:
        seconds, this = 0.0, psutil.Process()
        for process in (this, *this.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
        return seconds

    def percent(self) -> float:
        """Percent of one core; 100 means one core was wholly taken by others."""
        elapsed = max(1e-3, time.monotonic() - self._begin)
        return max(0.0, 100 * ((self._busy_s() - self._busy) - (self._own_s() - self._own)) / elapsed)


def describe_host(device: str) -> dict[str, Any]:
    """Everything the environment section of a report states, apart from the GPU."""
    import torch

    return {
        "cpu": cpu_identity(),
        "machine_id": machine_id(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "commit": commit_hash(Path(__file__).parent),
        "device": device,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "thread_variables": {
            key: os.environ[key] for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if key in os.environ
        },
    }
