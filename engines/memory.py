"""Memory of processes: how much a new one can use, and a watch on what a running one holds."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import psutil


def available_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The free memory of the machine, or of the container where that is less. A container's cached files (cgroup v2,
    memory.stat) count as free: the kernel gives them up first."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        available = min(available, limit - used + cached)
    return available


class MemoryWatch:
    """Inside its block `on_sample` gets the resident bytes of a process and its children every `seconds`, in a thread."""

    def __init__(self, process: psutil.Process | None, seconds: float, on_sample: Callable[[int], None]) -> None:
        """Without a process nothing is watched."""
        self._process, self._seconds, self._on_sample = process, seconds, on_sample
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while self._process and self._process.is_running() and not self._stopped.wait(self._seconds):
            with contextlib.suppress(psutil.Error):  # a process that has just ended
                family = [self._process, *self._process.children(recursive=True)]
                self._on_sample(sum(process.memory_info().rss for process in family))
