"""TensorRT and TensorRT-RTX, which share one API under two module names: what they can build here, and load here.

TensorRT builds for the GPU it runs on. TensorRT-RTX builds for named compute capabilities, also with no GPU at all,
and leaves the last step of compilation to the GPU that runs the plan.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.common.errors import UserError
from distill.common.files import size_text
from engines.bundle import Engine, Options, TensorInfo, rebuild_command
from engines.flavors import BuildRequest, LoadOptions, Report
from engines.gpus import GPUS, driver_at_hand, gpu_at_hand, gpu_of_device, memory_of_device, version_tuple
from engines.integrity import locate, map_file

if TYPE_CHECKING:
    from engines.flavors.shared_runtime import SharedRuntime
    from engines.flavors.tensorrt_engine import TensorRTEngine


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
        from engines.flavors.tensorrt_build import build_plan

        return build_plan(import_tensorrt(self.name), request, report)

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

        if (has := memory_of_device(device)) is not None and has < engine.size_bytes:
            raise UserError(
                f"the {engine.component} plan takes {size_text(engine.size_bytes)}, {title} has {size_text(has)} of memory "
                "in all: use another GPU, or an int8 UNet (python -m export quantise)"
            )

    def doubt_board(self, engine: Engine, device: str) -> None:
        """Warns where TensorRT tuned a plan on another board of the same capability: it may run slower, or not at all."""
        found = gpu_of_device(device)
        if self.name == "tensorrt" and found and not engine.options.get("hardware_compatible"):
            boards = [GPUS[name].title if name in GPUS else name for name in engine.gpus]
            if boards and not any(board in found[0] or found[0] in board for board in boards):
                warnings.warn(
                    f"the {engine.component} plan was tuned on {', '.join(boards)}, this GPU is {found[0]}: it may be slow "
                    "or refused here; rebuild it on this GPU, or with --hardware-compatible same",
                    stacklevel=2,
                )

    def cuda_major(self) -> int | None:
        """The major version of CUDA that the installed wheels are made for."""
        packages = (f"{self.name}-cu{major}" for major in range(20, 11, -1))
        return next((int(name.rpartition("cu")[2]) for name in packages if _is_installed(name)), None)

    def check_room(self, engines: list[Engine], options: LoadOptions) -> None:
        from engines.flavors.residency import require_room

        if options.vram_bytes is None:
            return
        require_room([(engine, 0) for engine in engines], options.vram_bytes)
        if changed := next((one for one in engines if one.key in options.weights or one.options.get("strip")), None):
            raise UserError(
                f"vram_gb: a plan gets its own weights back, and the {changed.component} was to have others; leave out "
                "weights= (or vram_gb), or build plans with these weights, without --strip"
            )

    def settle(self, shared: SharedRuntime) -> None:
        shared.residency.settle()

    def open_bundle(self, options: LoadOptions) -> SharedRuntime:
        from engines.flavors.shared_runtime import SharedRuntime

        return SharedRuntime(import_tensorrt(self.name), options)

    def load(self, bundle: Path, engine: Engine, shared: SharedRuntime) -> TensorRTEngine:
        from engines.flavors.tensorrt_engine import TensorRTEngine

        rebuild = f"rebuild it with: {rebuild_command(bundle, engine)}"
        self.doubt_board(engine, shared.options.device)
        plan = map_file(locate(bundle, engine.files[0], rebuild))
        return TensorRTEngine(engine, plan, shared, rebuild, shared.options.weights.get(engine.key))


def _is_installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


def make(name: str) -> TensorRTFlavor:
    if name == "tensorrt":
        return TensorRTFlavor(name, frozenset({"7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"}))
    return TensorRTFlavor(name, frozenset({"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"}))
