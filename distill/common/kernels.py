"""Where the time of a profiled step goes, by kind of kernel: what is left to gain, and where.

torch's profiler sees every kernel of the device, whoever launched it (eager, inductor, TensorRT, a CUDA graph). On a CPU
there are no kernels, so torch's operators stand in for them. The profiler slows the host down, so the idle time of the
device is not read from it: it is the step as timed without the profiler, less the time its kernels took with it.
"""

from __future__ import annotations

import re
from typing import Any

KERNEL_KINDS = (  # the first that matches a kernel's name; cuDNN's convolutions call themselves gemm too
    # inductor names its kernels after all that was fused into them; what is no template computes no product
    ("norm", r"triton_(red|per)_\w*norm"),
    ("elementwise", r"triton_(poi|red|per)_"),
    ("optimizer", r"multi_tensor_apply|fused_?adam"),
    ("attention", r"flash|fmha|attention|sdpa|_mha"),
    ("convolution", r"conv|implicit|[fdw]prop|dgrad|wgrad|winograd"),
    # Myelin: _MeaSubMulMea..., mean
    ("norm", r"norm|rowwisemoments|fusedparams|internalgradients|gammabeta|welford|__myl\w*mea"),
    ("gemm", r"gemm|gemv|nvjet|cutlass|cublas|splitk|hmma|matmul|triton_tem|aten::(add|b|badd)?mm$|mkldnn_linear"),
    ("copy", r"memcpy|memset|copy|catarray|aten::cat|transpose|nchwtonhwc|nhwctonchw"),
    (
        "elementwise",
        r"elementwise|triton_|vectorized|reduce|softmax|aten::(mul|add|sub|div|silu|gelu|sigmoid)_?$|__myl",
    ),
)


def kernel_kind(kernel: str) -> str:
    """The kind of a kernel by its name; `other` where none is known."""
    name = kernel.lower()
    return next((kind for kind, pattern in KERNEL_KINDS if re.search(pattern, name)), "other")


def make_profiler(device: str) -> Any:
    """torch's profiler for what runs on `device`; read it by `kernel_times`."""
    from torch.profiler import ProfilerActivity, profile

    return profile(activities=[ProfilerActivity.CUDA if device.startswith("cuda") else ProfilerActivity.CPU])


def kernel_times(profiler: Any, device: str) -> dict[str, float]:
    """Kernel name -> microseconds in all; on a CPU operator name -> its own microseconds."""
    from torch.autograd import DeviceType

    if not device.startswith("cuda"):
        return {one.key: float(one.self_cpu_time_total) for one in profiler.key_averages()}
    times: dict[str, float] = {}
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            times[event.name] = times.get(event.name, 0.0) + event.time_range.elapsed_us()
    return times


def by_kind(times_us: dict[str, float], steps: int, step_ms: float | None) -> dict[str, Any]:
    """{"families_ms": per step, "step_ms", "kernels": the ten largest}. `idle` is what of the timed step no kernel
    explains: launches the device waited for, gaps, and the host's own work."""
    kinds: dict[str, float] = {}
    for name, microseconds in times_us.items():
        kind = kernel_kind(name)
        kinds[kind] = kinds.get(kind, 0.0) + microseconds / 1e3 / steps
    if step_ms is not None:
        kinds["idle"] = max(0.0, step_ms - sum(kinds.values()))
    largest = sorted(times_us.items(), key=lambda item: -item[1])[:10]
    return {
        "families_ms": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "step_ms": step_ms,
        "kernels": [
            {"name": name[:120], "ms": microseconds / 1e3 / steps, "family": kernel_kind(name)}
            for name, microseconds in largest
        ],
    }
