"""The GPUs an engine can be built for, by name, and what a set of names means to each flavor."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from distill.common.errors import UserError, unknown


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`compute_capability` as CUDA writes it, "8.9" for SM89."""

    name: str
    title: str
    compute_capability: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a100", title="NVIDIA A100", compute_capability="8.0"),
        Gpu(name="a10", title="NVIDIA A10", compute_capability="8.6"),
        Gpu(name="rtx3090", title="NVIDIA GeForce RTX 3090", compute_capability="8.6"),
        Gpu(name="rtx4090", title="NVIDIA GeForce RTX 4090", compute_capability="8.9"),
        Gpu(name="l40s", title="NVIDIA L40S", compute_capability="8.9"),
        Gpu(name="h100", title="NVIDIA H100", compute_capability="9.0"),
        Gpu(name="h200", title="NVIDIA H200", compute_capability="9.0"),
        Gpu(name="rtx5090", title="NVIDIA GeForce RTX 5090", compute_capability="12.0"),
    )
}
LEAST_CAPABILITY = {"int8": "7.5", "fp8": "8.9"}
"""The oldest compute capability with arithmetic of this precision; others run on all that a flavor targets."""
PORTABLE = ("8.6", "8.9", "12.0")
"""What `rtx` stands for: the generations of RTX 3090, 4090 and 5090, in one plan."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The GPUs that one plan serves. `compute_capabilities` is sorted; empty for a flavor that does not care."""

    gpus: tuple[str, ...]
    compute_capabilities: tuple[str, ...]

    @property
    def label(self) -> str:
        """As it stands in a file name: `sm80-sm89`, or `any`."""
        return "-".join(f"sm{value.replace('.', '')}" for value in self.compute_capabilities) or "any"


def gpu_at_hand(position: int = 0) -> tuple[str, str] | None:
    """Title and compute capability of the CUDA device at this position among the visible ones, by NVML; None where
    there is no such GPU or no driver."""
    import pynvml

    try:
        handle = nvml_handle(position)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        return str(pynvml.nvmlDeviceGetName(handle)), f"{major}.{minor}"
    except pynvml.NVMLError:
        return None


def free_vram_bytes() -> int | None:
    """Of the first visible GPU, which is the one that builds; None where there is none."""
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(nvml_handle()).free)
    except pynvml.NVMLError:
        return None


def gpu_count() -> int:
    """As torch numbers them."""
    import torch

    return torch.cuda.device_count()


def gpu_of_device(device: str) -> tuple[str, str] | None:
    """Title and compute capability of a torch device such as "cuda:1"; None where torch has no such GPU. What is to run a
    plan is asked of torch: unless CUDA_DEVICE_ORDER says otherwise, CUDA numbers the fastest GPU first and NVML does not."""
    import torch

    if not torch.cuda.is_available() or (torch.device(device).index or 0) >= torch.cuda.device_count():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"{major}.{minor}"


def memory_of_device(device: str) -> int | None:
    """All the memory of a torch device such as "cuda:1", in bytes; None where torch has no such GPU."""
    import torch

    if gpu_of_device(device) is None:
        return None
    return int(torch.cuda.get_device_properties(device).total_memory)


def nvml_handle(position: int = 0) -> Any:
    """NVML's handle of the CUDA device at this position among the visible ones. Both number GPUs alike where
    CUDA_DEVICE_ORDER is PCI_BUS_ID, which slimxl's commands see to. Raises pynvml.NVMLError where there is none."""
    import pynvml

    pynvml.nvmlInit()
    name: str | None = str(position)
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = list(takewhile(lambda part: part not in ("", "-1"), map(str.strip, visible.split(","))))
        name = names[position] if position < len(names) else None
    if name is None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def driver_at_hand() -> tuple[str, int] | None:
    """The driver's version and the newest major version of CUDA it runs, or None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion()), int(pynvml.nvmlSystemGetCudaDriverVersion_v2()) // 1000
    except pynvml.NVMLError:
        return None


def version_tuple(text: str) -> tuple[int, ...]:
    """The numbers of a version or a compute capability, to be compared: "10.9" comes before "10.14"."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def resolve_targets(names: list[str], flavor: str, supported: frozenset[str] | None) -> list[Target]:
    """What is built for `names`: one plan that serves them all where the flavor can (TensorRT-RTX), else one each.

    `supported` holds the compute capabilities that the flavor can target, None for a flavor that runs anywhere.
    Raises UserError for an unknown GPU, one the flavor cannot target, any for a flavor that has no targets, and `auto` where
    there is none.
    """
    if supported is None:
        if set(names) - {"auto"}:
            raise UserError(
                f"{flavor} engines run on any machine: leave out --gpus {','.join(names)}, or choose TensorRT"
            )
        return [Target(gpus=(), compute_capabilities=())]
    if not names:
        raise UserError(f"no GPU named: pass --gpus with some of {', '.join(sorted(GPUS))}, auto, rtx")
    wanted: dict[str, list[str]] = {}
    for name in names:
        for gpu, capability in _expand(name):
            if capability not in supported:
                able = ", ".join(sorted(supported, key=version_tuple))
                other = (
                    "" if flavor == "tensorrt" else f"build {gpu} with --flavor tensorrt on a machine that has one, or "
                )
                raise UserError(
                    f"{flavor} cannot target {gpu} (compute capability {capability}): it targets {able}; {other}use "
                    "--flavor onnxruntime"
                )
            wanted.setdefault(capability, []).append(gpu)
    capabilities = sorted(wanted, key=version_tuple)
    if flavor == "tensorrt-rtx":
        gpus = tuple(dict.fromkeys(gpu for capability in capabilities for gpu in wanted[capability]))
        return [Target(gpus=gpus, compute_capabilities=tuple(capabilities))]
    return [Target(gpus=tuple(dict.fromkeys(wanted[c])), compute_capabilities=(c,)) for c in capabilities]


def has_arithmetic(capability: str, precision: str) -> bool:
    return version_tuple(capability) >= version_tuple(LEAST_CAPABILITY.get(precision, "0"))


def require_arithmetic(precision: str, targets: list[Target]) -> None:
    """Raises UserError where a GPU among the targets has no arithmetic of this precision."""
    for target in targets:
        for capability in target.compute_capabilities:
            if not has_arithmetic(capability, precision):
                known = {gpu: GPUS[gpu].compute_capability for gpu in target.gpus if gpu in GPUS}
                named = [gpu for gpu in target.gpus if known.get(gpu, capability) == capability]
                instead = (
                    "take int8 there (make engines PRECISION=int8, or python -m export quantise --precision int8)"
                    if precision == "fp8"
                    else "leave it out"
                )
                raise UserError(
                    f"{precision} needs compute capability {LEAST_CAPABILITY[precision]} or later, {', '.join(named)} has "
                    f"{capability}: {instead}"
                )


def _expand(name: str) -> list[tuple[str, str]]:
    """(GPU, compute capability) pairs that one word of --gpus names."""
    if name == "rtx":
        return [("rtx", capability) for capability in PORTABLE]
    if name == "auto":
        found = gpu_at_hand()
        if found is None:
            raise UserError(
                f"--gpus auto found no GPU (no NVIDIA driver answers): name one of {', '.join(sorted(GPUS))}, or rtx"
            )
        return [found]
    if name not in GPUS:
        raise unknown("GPU", name, [*GPUS, "auto", "rtx"])
    return [(name, GPUS[name].compute_capability)]
