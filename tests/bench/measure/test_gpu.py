"""NVML is faked here: what matters is that each reading stands alone, and that an absent one says why."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from bench.measure.gpu import Gpu, energy_per_image
from bench.measure.host import OtherLoad, cpu_identity, package_versions
from bench.measure.watch import Reading, throttled_within


def fake_gpu(**functions):
    gpu = Gpu.__new__(Gpu)
    gpu.reason, gpu.missing, gpu._handle = None, {}, "handle"
    gpu._nvml = SimpleNamespace(**functions)
    return gpu


def test_one_absent_reading_does_not_hide_the_others():
    def broken(_):
        raise RuntimeError("Not Supported")

    gpu = fake_gpu(nvmlDeviceGetName=lambda _: b"NVIDIA H200", nvmlDeviceGetUUID=broken)
    found = gpu.identity()
    assert found["name"] == "NVIDIA H200" and found["uuid"] is None
    assert gpu.missing["uuid"] == "Not Supported"


def test_throttle_reasons_are_words():
    bits = {
        f"nvmlClocksEventReason{name}": 1 << index
        for index, name in enumerate(
            ("SwPowerCap", "HwSlowdown", "SyncBoost", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
        )
    }
    gpu = fake_gpu(nvmlDeviceGetCurrentClocksEventReasons=lambda _: 0b010001, **bits)
    assert gpu.throttle_reasons() == ["power cap", "hardware thermal slowdown"]


def test_what_throttled_within_the_calls_is_told_by_counters():
    import pynvml

    def read(_handle, fields):
        state = [0] * 3 + [pynvml.NVML_ERROR_NOT_SUPPORTED] * 2
        values = [SimpleNamespace(ullVal=7_000_000_000 + 10 * one) for one in fields]
        return [SimpleNamespace(nvmlReturn=code, value=value) for code, value in zip(state, values, strict=True)]

    names = {name: getattr(pynvml, name) for name in dir(pynvml) if name.startswith("NVML_FI_DEV_CLOCKS_EVENT_REASON")}
    gpu = fake_gpu(nvmlDeviceGetFieldValues=read, NVML_SUCCESS=0, **names)
    before = gpu.throttled_ns()
    assert before["power cap"] == 7_000_000_740 and set(before) == {
        "power cap",
        "sync boost",
        "software thermal slowdown",
    }
    after = before | {"power cap": before["power cap"] + 200_000_000, "sync boost": before["sync boost"] + 1_000_000}
    quiet, said = {"throttle_reasons": []}, {"throttle_reasons": ["power cap"]}
    readings = [Reading(0.0, quiet, before), Reading(10.0, said, before), Reading(20.0, quiet, after)]
    assert throttled_within(readings, 10.5, 19.5) == ["power cap"]
    assert throttled_within(readings, 0.5, 9.5) == [], "the counters know better than a glance"
    assert throttled_within([Reading(at_s, said, None) for at_s in (1.0, 5.0)], 2.0, 6.0) == ["power cap"]
    assert throttled_within([Reading(1.0, said, None)], 2.0, 6.0) == []


def test_energy_comes_from_the_counter_over_the_whole_time():
    joules, drawn = iter([1000.0, 1300.0]), []
    gpu = fake_gpu(nvmlDeviceGetTotalEnergyConsumption=lambda _: next(joules) * 1e3)
    found = energy_per_image(gpu, lambda: drawn.append(3) or 3, seconds=0.0001)
    assert found["j_per_image"] == pytest.approx(300 / sum(drawn))
    assert found["mean_power_w"] > 0 and found["images"] == sum(drawn)


def test_without_a_gpu_everything_is_none_and_says_why():
    gpu = fake_gpu()
    gpu._handle, gpu.reason = None, "no driver"
    assert set(gpu.identity().values()) == {None} and gpu.missing["name"] == "no driver"
    assert energy_per_image(gpu, lambda: 1) == {"j_per_image": None, "why": "no driver"}


def test_the_host_says_what_it_is():
    found = cpu_identity()
    assert found["model"] and found["cores_logical"] >= 1 and found["memory_bytes"] > 1e8
    assert found["governor"] or found["missing"]["governor"]
    assert package_versions()["torch"]
    before = OtherLoad._own_s()
    busy = "import time\nwhile time.process_time() < 0.6: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert OtherLoad._own_s() - before >= 0.5, "what a child of ours used is ours"
