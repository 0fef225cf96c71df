"""Builds a plan with TensorRT or TensorRT-RTX. Networks are strongly typed: an fp16 engine is an fp16 ONNX file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distill.common.errors import UserError
from distill.common.files import replacing
from engines.bundle import Options, TensorInfo
from engines.flavors import BuildRequest, Report


def build_plan(trt: Any, request: BuildRequest, report: Report) -> list[TensorInfo]:
    """Parses the ONNX file, keeps the wanted outputs, and streams the plan into `request.out` while it is made: the whole
    plan is never in memory beside the network. Returns the outputs."""
    is_rtx = request.flavor == "tensorrt-rtx"
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if is_rtx else "0"
    from polygraphy.backend.trt import (
        CreateConfig,
        ModifyNetworkOutputs,
        NetworkFromOnnxPath,
        SetDecomposableAttentions,
    )
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    report("parsing", 0.0)
    parsed = NetworkFromOnnxPath(str(request.onnx_files[0]), strongly_typed=True)
    # the VAE's one wide fp32 attention head has no fused kernel for a range of sizes; only then is it split into matrix
    # products and a softmax
    decomposable = SetDecomposableAttentions(parsed)
    builder, network, parser = ModifyNetworkOutputs(decomposable, outputs=request.outputs)()
    config = CreateConfig(
        tf32=True,
        profiles=[_polygraphy_profile(profile.shapes) for profile in request.profiles],
        load_timing_cache=_existing(request.timing_cache),
        progress_monitor=make_monitor(trt, len(request.profiles), report),
        version_compatible=bool(request.options.get("version_compatible")),
        refittable=bool(request.options.get("refit")),
        strip_plan=bool(request.options.get("strip")),
        hardware_compatibility_level=_hardware_level(trt, request.options),
    )(builder, network)
    if feature := getattr(trt.PreviewFeature, "RUNTIME_ACTIVATION_RESIZE_10_10", None):
        config.set_preview_feature(feature, True)  # a size of a range then takes its own memory, not the range's corner
    if is_rtx:  # TensorRT has neither, and needs neither
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # for one activation buffer, and always capturable
        target_capabilities(trt, config, request.compute_capabilities)
    with request.out.open("wb") as file:
        writer = make_writer(trt, file)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.fault:
            raise writer.fault
        if not built:
            raise UserError(f"{request.flavor} could not build {request.component}")
        file.flush()
        os.fsync(file.fileno())
    _save_timing_cache(config, request.timing_cache)
    del parser
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return [TensorInfo(name=o.name, dtype=_dtype_name(trt, o.dtype), shape=_shape(o)) for o in outputs]


def target_capabilities(trt: Any, config: Any, capabilities: list[str]) -> None:
    """Names the GPUs the plan is for, in place of the one at hand."""
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), index)


def _polygraphy_profile(shapes: dict[str, Any]) -> Any:
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for name, shape in shapes.items():
        profile.add(name, min=shape.min, opt=shape.opt, max=shape.max)
    return profile


def _existing(path: Path | None) -> str | None:
    return str(path) if path and path.is_file() else None


def _hardware_level(trt: Any, options: Options) -> Any:
    levels = {"ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
    name = levels.get(str(options.get("hardware_compatible")))
    return getattr(trt.HardwareCompatibilityLevel, name) if name else None


def _save_timing_cache(config: Any, path: Path | None) -> None:
    cache = config.get_timing_cache() if path else None
    if path and cache is not None:
        with replacing(path) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))


def _dtype_name(trt: Any, dtype: Any) -> Any:
    names = {
        "HALF": "float16",
        "FLOAT": "float32",
        "BF16": "bfloat16",
        "INT64": "int64",
        "INT32": "int32",
        "BOOL": "bool",
    }
    return names[dtype.name]


def _shape(tensor: Any) -> list[int | str]:
    return [f"dim{axis}" if size < 0 else int(size) for axis, size in enumerate(tensor.shape)]


def make_writer(trt: Any, file: Any) -> Any:
    """An IStreamWriter that appends to `file`. TensorRT ignores an exception of `write` and reports success, so the error is
    kept in `fault` for the caller."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.fault: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return int(file.write(data))
            except OSError as error:
                error.filename = file.name
                self.fault = error
                return 0

    return Writer()


def make_monitor(trt: Any, profiles: int, report: Report) -> Any:
    """An IProgressMonitor that turns TensorRT's nested phases into one fraction.

    A profile is done when its phase "Determining refit engines" is. Within a profile "Optimizing graph" is the first tenth
    and "Timing graph nodes" the rest, by their steps. TensorRT-RTX has no timing phase: it jumps with each profile.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.profiles_done = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0.0)

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)
            if phase_name == "Determining refit engines":
                self.profiles_done += 1
            self._tell(phase_name, 0.0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in ("Timing graph nodes", "Optimizing graph"):
                self._tell(phase_name, (step + 1) / self.steps.get(phase_name, step + 1))
            return True

        def _tell(self, phase: str, within: float) -> None:
            share = 0.1 if phase == "Optimizing graph" else 0.9
            text = f"profile {min(self.profiles_done + 1, profiles)} of {profiles}" if profiles > 1 else phase
            report(text, min(0.99, (self.profiles_done + share * within) / profiles))

    return Monitor()
