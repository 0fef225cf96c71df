"""What NVML reports of the GPU: what it is, its state between the timed calls, and the energy it used.

Every reading may be missing on some board or driver; it is then None, and `missing` says why. Nothing is guessed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

THROTTLED_NS = {  # NVML's counters of time spent slower than it could be, since the driver was loaded
    "SW_POWER_CAP": "power cap",
    "SYNC_BOOST": "sync boost",
    "SW_THERM_SLOWDOWN": "software thermal slowdown",
    "HW_THERM_SLOWDOWN": "hardware thermal slowdown",
    "HW_POWER_BRAKE_SLOWDOWN": "power brake",
}
THROTTLE_REASONS = {  # NVML's clocks-event bits of the same, at this moment
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "software thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "power brake",
}


class Gpu:
    """One GPU through NVML. `reason` says why there is none; then every method returns None or an empty value."""

    def __init__(self, device: str = "cuda") -> None:
        """Reads nothing unless `device` is "cuda": NVML would report a GPU that is not in use."""
        self.reason: str | None = None if device == "cuda" else f"measured on the {device}, so no GPU was read"
        self.missing: dict[str, str] = {}
        self._handle: Any = None
        if self.reason:
            return
        try:
            import pynvml

            from engines.gpus import nvml_handle

            self._nvml, self._handle = pynvml, nvml_handle(0)
        except ImportError:
            self.reason = "the package nvidia-ml-py is not installed"
        except Exception as error:
            self.reason = f"no NVIDIA GPU by NVML: {error}"

    @property
    def present(self) -> bool:
        return self._handle is not None

    def read(self, what: str, query: Callable[[Any, Any], Any]) -> Any:
        """`query(nvml, handle)`, or None with the reason kept in `missing[what]`."""
        if not self.present:
            self.missing[what] = self.reason or "no GPU"
            return None
        try:
            value = query(self._nvml, self._handle)
        except Exception as error:
            self.missing[what] = str(error)
            return None
        return value.decode() if isinstance(value, bytes) else value

    def identity(self) -> dict[str, Any]:
        """Name, UUID, driver, limits and form factor: what does not change during a run."""
        read = self.read
        return {
            "name": read("name", lambda n, h: n.nvmlDeviceGetName(h)),
            "uuid": read("uuid", lambda n, h: n.nvmlDeviceGetUUID(h)),
            "driver": read("driver", lambda n, h: n.nvmlSystemGetDriverVersion()),
            "cuda_driver": read("cuda_driver", lambda n, h: n.nvmlSystemGetCudaDriverVersion_v2()),
            "compute_capability": read(
                "compute_capability", lambda n, h: ".".join(map(str, n.nvmlDeviceGetCudaComputeCapability(h)))
            ),
            "memory_total_bytes": read("memory_total_bytes", lambda n, h: n.nvmlDeviceGetMemoryInfo(h).total),
            "power_limit_w": read("power_limit_w", lambda n, h: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1e3),
            "max_sm_clock_mhz": read("max_sm_clock_mhz", lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_SM)),
            "max_memory_clock_mhz": read(
                "max_memory_clock_mhz", lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_MEM)
            ),
            "board_part_number": read("board_part_number", lambda n, h: n.nvmlDeviceGetBoardPartNumber(h)),
            "pcie_generation": read("pcie_generation", lambda n, h: n.nvmlDeviceGetMaxPcieLinkGeneration(h)),
            "persistence_mode": read("persistence_mode", lambda n, h: bool(n.nvmlDeviceGetPersistenceMode(h))),
            "mig_mode": read("mig_mode", lambda n, h: bool(n.nvmlDeviceGetMigMode(h)[0])),
        }

    def state(self) -> dict[str, Any]:
        """What changes: clocks, temperature, power, throttle reasons, memory, other processes."""
        read = self.read
        return {
            "sm_clock_mhz": read("sm_clock_mhz", lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
            "memory_clock_mhz": read("memory_clock_mhz", lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM)),
            "temperature_c": read("temperature_c", lambda n, h: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
            "power_w": read("power_w", lambda n, h: n.nvmlDeviceGetPowerUsage(h) / 1e3),
            "memory_used_bytes": read("memory_used_bytes", lambda n, h: n.nvmlDeviceGetMemoryInfo(h).used),
            "throttle_reasons": self.throttle_reasons(),
            "other_processes": self.other_processes(),
        }

    def throttle_reasons(self) -> list[str] | None:
        def query(nvml: Any, handle: Any) -> list[str]:
            bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            return [
                word for name, word in THROTTLE_REASONS.items() if bits & getattr(nvml, f"nvmlClocksEventReason{name}")
            ]

        return self.read("throttle_reasons", query)

    def throttled_ns(self) -> dict[str, int] | None:
        """Reason -> nanoseconds of it since the driver was loaded: unlike `throttle_reasons`, read between two calls, it
        tells what happened within them. None where the driver or the board does not count."""

        def query(nvml: Any, handle: Any) -> dict[str, int]:
            fields = [getattr(nvml, f"NVML_FI_DEV_CLOCKS_EVENT_REASON_{name}") for name in THROTTLED_NS]
            values = nvml.nvmlDeviceGetFieldValues(handle, fields)
            counted = {
                word: int(one.value.ullVal)
                for word, one in zip(THROTTLED_NS.values(), values, strict=True)
                if one.nvmlReturn == nvml.NVML_SUCCESS
            }
            if not counted:
                raise RuntimeError("none of the counters is supported")
            return counted

        return self.read("throttled_ns", query)

    def other_processes(self) -> int | None:
        """Compute processes on the GPU besides this one. In a container NVML may show none, or foreign numbers."""
        found = self.read("other_processes", lambda n, h: [p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(h)])
        if found is None:
            return None
        return sum(pid != os.getpid() for pid in found) if os.getpid() in found else max(0, len(found) - 1)

    def energy_j(self) -> float | None:
        """The board's energy counter since the driver was loaded, in joules (NVML counts millijoules)."""
        return self.read("energy_j", lambda n, h: n.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3)


def energy_per_image(gpu: Gpu, draw: Callable[[], int], seconds: float = 10.0) -> dict[str, Any]:
    """Joules per image over at least `seconds` of drawing; `draw` returns how many images it drew.

    The counter, not the power sensor: an A100's sensor looks only a quarter of the time (arXiv 2312.02741).
    """
    if seconds <= 0:
        return {"j_per_image": None, "why": "not asked for"}
    before = gpu.energy_j()
    if before is None:
        return {"j_per_image": None, "why": gpu.missing.get("energy_j", "no energy counter")}
    begin, images = time.monotonic(), 0
    while time.monotonic() - begin < seconds:
        images += draw()
    after, elapsed_s = gpu.energy_j(), time.monotonic() - begin
    if after is None:
        return {"j_per_image": None, "why": gpu.missing.get("energy_j", "no energy counter")}
    return {
        "j_per_image": (after - before) / images,
        "mean_power_w": (after - before) / elapsed_s,
        "seconds": elapsed_s,
        "images": images,
    }
