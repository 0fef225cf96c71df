"""Runtimes behind one small interface: `build` writes an engine's files, `load` opens them, `run` runs them.

A new runtime is one more module with a class like `Flavor`, an entry in `_MODULES`, and its name
among the `choices`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from distill.common.errors import UserError, unknown
from engines import gpus
from engines.bundle import Engine, Options, Profile, TensorInfo

if TYPE_CHECKING:
    import torch

    from engines.flavors.weights import Added
    from engines.onnx_folder import OnnxComponent

Report = Callable[[str, float], None]
"""Called with the name of the phase and the fraction done, 0 to 1."""


class BuildRequest(BaseModel):
    """All that a build needs; sent as JSON to the process that builds. Paths are absolute."""

    model_config = ConfigDict(frozen=True)

    component: str
    flavor: str
    onnx_files: list[Path]
    out: Path
    profiles: list[Profile]
    outputs: list[str]
    compute_capabilities: list[str]
    options: Options = {}
    timing_cache: Path | None = None


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How engines are run; a flavor ignores what it has no use for. `runtime_cache` is a folder for compiled kernels."""

    device: str
    cuda_graphs: bool = True
    specialization: str | None = None
    """TensorRT-RTX only: `eager` compiles for a new shape before its first run, `lazy` beside it, `none` not at all."""
    runtime_cache: Path | None = None
    vram_bytes: int | None = None
    """Of the GPU's memory: what weights, activations and buffers may take together."""
    most_shapes: int = 20
    """Shapes that a plan of TensorRT stays ready for; each keeps inputs, outputs and a CUDA graph in the GPU's memory. Nine
    sizes with and without guidance are 18."""
    weights: Mapping[str, OnnxComponent] = field(default_factory=dict)
    """By the key of a plan (built with --refit or --strip): the component whose weights it takes."""


class LoadedEngine(Protocol):
    """An engine that is ready. Inputs and outputs are torch tensors on the engine's device."""

    def run(self, inputs: dict[str, torch.Tensor], profile: Profile) -> dict[str, torch.Tensor]:
        """Enqueues one call on the device's current stream; the result may not be computed yet."""

    def require_exchangeable(self) -> None:
        """Raises UserError where its weights cannot be changed."""

    def add_to_weights(self, added: Added) -> None:
        """Takes the weights it was built from, with this added and nothing that was added before."""


class Flavor(Protocol):
    """What a runtime must offer."""

    name: str
    targets: frozenset[str] | None
    """Compute capabilities it can build for; None for a runtime that runs anywhere."""

    def version(self) -> str:
        """The installed version. Raises UserError where there is none, with the command that installs it."""

    def default_device(self) -> str: ...

    def check_build(self, compute_capabilities: tuple[str, ...], options: Options) -> None:
        """Raises UserError where this machine cannot build for these GPUs."""

    def build(self, request: BuildRequest, report: Report) -> list[TensorInfo]:
        """Writes the files below `request.out` and returns the outputs they have. Runs in a process of its own."""

    def check_load(self, engine: Engine, device: str) -> None:
        """Raises UserError, before a byte is opened, where GPU, driver or version do not fit the engine."""

    def check_room(self, engines: list[Engine], options: LoadOptions) -> None:
        """Raises UserError, before a byte is opened, where `options.vram_bytes` cannot be kept."""

    def open_bundle(self, options: LoadOptions) -> Any:
        """What all engines of one bundle share (a stream, activation memory); passed to each `load`."""

    def load(self, bundle: Path, engine: Engine, shared: Any) -> LoadedEngine:
        """Opens its files. Their hashes were compared before, all at once (`integrity.find_faults`)."""

    def settle(self, shared: Any) -> None:
        """Once all engines are open. Raises UserError where `vram_bytes` turn out to be too few for one of them."""


_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt", "onnxruntime": "onnxruntime"}
FLAVORS = tuple(_MODULES)


def find_flavor(name: str) -> Flavor:
    """Raises UserError for an unknown name. The runtime itself is imported at first use only."""
    if name not in FLAVORS:
        raise unknown("flavor", name, FLAVORS)
    module = import_module(f"engines.flavors.{_MODULES[name]}")
    flavor: Flavor = module.make(name)
    return flavor


def why_not_here(flavor: Flavor) -> str | None:
    """Why this machine cannot run a flavor: it is not installed, or has no target for the GPU at hand. None where neither
    is so."""
    try:
        version = flavor.version()
    except UserError as error:
        return str(error)
    gpu = gpus.gpu_at_hand()
    if flavor.targets is None or (gpu and gpu[1] in flavor.targets):
        return None
    found = f"{gpu[0]} (compute capability {gpu[1]})" if gpu else "no GPU"
    built = "; it builds for other GPUs here" if flavor.name == "tensorrt-rtx" else ""
    return f"{version} runs on compute capability {', '.join(sorted(flavor.targets, key=float))}, found {found}{built}"
