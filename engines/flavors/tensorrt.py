"""TensorRT and TensorRT-RTX, which share one API under two module names: what they can build, and building it.

TensorRT builds for the GPU it runs on. TensorRT-RTX builds for named compute capabilities, also with no GPU at all,
and leaves the last step of compilation to the GPU that runs the plan. Networks are strongly typed: an fp16 engine is
an fp16 ONNX file. Running a plan is `tensorrt_runtime.py`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.common.errors import UserError
from distill.common.files import replacing
from engines.bundle import Engine, Options, TensorInfo, checked_bytes, rebuild_command
from engines.flavors import BuildRequest, LoadOptions, Report
from engines.gpus import driver_at_hand, gpu_at_hand, gpu_of_device, version_tuple

if TYPE_CHECKING:
    from engines.flavors.tensorrt_runtime import Arena, TensorRTEngine


def import_tensorrt(flavor: str) -> Any:
    """The runtime's module; its package has the flavor's name. Raises UserError where it is not installed."""
    try:
        return import_module(flavor.replace("-", "_"))
    except ImportError as error:
        raise UserError(
            f"flavor {flavor} needs the Python package {flavor}, which cannot be imported ({error}); "
            f"{sys.executable} -m pip install {flavor}"
        ) from None


@dataclass(frozen=True)
class TensorRTFlavor:
    """See `engines.flavors.Flavor`."""

    name: str
    targets: frozenset[str] | None

    def version(self) -> str:
        return str(import_tensorrt(self.name).__version__)

    def default_device(self) -> str:
        return "cuda:0"

    def check_build(self, compute_capabilities: tuple[str, ...], options: Options) -> None:
        if options.get("refit") and self.name == "tensorrt" and self.version().startswith("11.3"):
            raise UserError("TensorRT 11.3 gives wrong output from --refit plans; install another version, or omit it")
        self.version()
        if self.name == "tensorrt-rtx":
            return
        found = gpu_at_hand()
        wanted = compute_capabilities[0]
        if found is None or found[1] != wanted:
            at_hand = "no GPU" if found is None else f"{found[0]} (compute capability {found[1]})"
            raise UserError(
                f"TensorRT builds on the GPU that will run the plan: found {at_hand}, needed compute capability "
                f"{wanted}; run this command there, or build ahead of time with --flavor tensorrt-rtx"
            )

    def build(self, request: BuildRequest, report: Report) -> list[TensorInfo]:
        """Parses the ONNX file, keeps the wanted outputs, and streams the plan into `request.out` as it is made, so
        that the plan never stands in memory as a whole beside the network."""
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if self.name == "tensorrt-rtx" else "0"
        from polygraphy.backend.trt import (
            CreateConfig,
            ModifyNetworkOutputs,
            NetworkFromOnnxPath,
            SetDecomposableAttentions,
        )
        from polygraphy.logger import G_LOGGER

        trt = import_tensorrt(self.name)
        G_LOGGER.module_severity = G_LOGGER.WARNING
        report("parsing", 0.0)
        parsed = NetworkFromOnnxPath(str(request.onnx_files[0]), strongly_typed=True)
        # the VAE's one wide fp32 attention head has no fused kernel over a range of sizes: then, and only then,
        # it may be split into matrix products and a softmax
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
        if self.name == "tensorrt-rtx":  # TensorRT has neither, and needs neither
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # one activation arena, and always capturable
            target_capabilities(trt, config, request.compute_capabilities)
        with request.out.open("wb") as file:
            writer = make_writer(trt, file)
            built = builder.build_serialized_network_to_stream(network, config, writer)
            if writer.fault:
                raise writer.fault
            if not built:
                raise UserError(f"{self.name} could not build {request.component}")
            file.flush()
            os.fsync(file.fileno())
        _save_timing_cache(config, request.timing_cache)
        del parser
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        return [TensorInfo(name=o.name, dtype=_dtype_name(trt, o.dtype), shape=_shape(o)) for o in outputs]

    def check_load(self, engine: Engine, device: str) -> None:
        if not device.startswith("cuda"):
            raise UserError(
                f"{self.name} engines run on a GPU, not on device {device}: use device cuda, or flavor onnxruntime"
            )
        installed, built_by = self.version(), engine.flavor_version
        is_newer = version_tuple(installed) >= version_tuple(built_by)
        if installed != built_by and not (engine.options.get("version_compatible") and is_newer):
            raise UserError(
                f"the {engine.component} engine was built by {self.name} {built_by}, installed is {installed}; install that "
                f"version (pip install {self.name}=={built_by}) or rebuild with: {rebuild_command(Path('BUNDLE'), engine)}"
            )
        driver, needed = driver_at_hand(), self.cuda_major()
        if driver and needed and driver[1] < needed:
            raise UserError(
                f"{self.name} {installed} is made for CUDA {needed}, driver {driver[0]} runs CUDA {driver[1]} at most; "
                f"update the NVIDIA driver, or pip install {self.name}-cu{driver[1]}=={installed} if there is one"
            )
        found = gpu_of_device(device)
        if found is None:
            raise UserError(
                f"{self.name} engines need an NVIDIA GPU of compute capability "
                f"{' or '.join(engine.compute_capabilities)}, found no GPU or no driver; for this machine build "
                "onnxruntime engines: python -m engines build --flavor onnxruntime, or make engines FLAVOR=onnxruntime"
            )
        title, capability = found
        if not engine.serves(capability):
            wanted: dict[str, Any] = {"gpus": ["auto"]}
            if capability not in (self.targets or ()):
                wanted["flavor"] = "tensorrt"  # which is for every GPU that it is built on
            raise UserError(
                f"the {engine.component} plan is for compute capability {', '.join(engine.compute_capabilities)} "
                f"({', '.join(engine.gpus)}), this GPU is {title} with {capability}; "
                f"rebuild with: {rebuild_command(Path('BUNDLE'), engine.model_copy(update=wanted))}"
            )

    def cuda_major(self) -> int | None:
        """Of the installed wheels: the CUDA that the driver must be able to run."""
        packages = (f"{self.name}-cu{major}" for major in range(20, 11, -1))
        return next((int(name.rpartition("cu")[2]) for name in packages if _is_installed(name)), None)

    def open_bundle(self, bundle: Path, options: LoadOptions) -> Arena:
        from engines.flavors.tensorrt_runtime import Arena

        return Arena(import_tensorrt(self.name), bundle, options)

    def load(self, bundle: Path, engine: Engine, shared: Arena) -> TensorRTEngine:
        from engines.flavors.tensorrt_runtime import TensorRTEngine

        mend = f"mend it with: {rebuild_command(bundle, engine)}"
        plan = checked_bytes(bundle, engine.files[0], mend)
        return TensorRTEngine(engine, plan, shared, mend, shared.options.weights.get(engine.key))


def _is_installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


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
    """An IStreamWriter that appends to `file`. TensorRT drops what `write` raises, goes on and calls the build a success:
    the caller finds it in `fault`."""

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

    A profile is done when "Determining refit engines" is. Within one, "Optimizing graph" counts for a tenth and "Timing
    graph nodes" for the rest, by their steps; TensorRT-RTX has no such phase and then jumps from profile to profile.
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
            words = f"profile {min(self.profiles_done + 1, profiles)} of {profiles}" if profiles > 1 else phase
            report(words, min(0.99, (self.profiles_done + share * within) / profiles))

    return Monitor()


def make(name: str) -> TensorRTFlavor:
    if name == "tensorrt":
        return TensorRTFlavor(name, frozenset({"7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"}))
    return TensorRTFlavor(name, frozenset({"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"}))
