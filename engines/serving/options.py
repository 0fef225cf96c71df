"""Options of the commands around Triton: how a bundle is served, and what a load test asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.common.errors import require_between, require_least
from engines.serving.request import DEFAULTS, LIMITS


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a bundle is served."""

    flavor: str | None = None
    """tensorrt, tensorrt-rtx or onnxruntime. None: the first of them that runs here."""
    gpus: str = "auto"
    """CUDA device numbers as in 0,1 or `none` (the CPU), `auto` (every GPU here that runs the bundle, else the CPU)."""
    instances: int = 1
    """Copies of the model for each GPU, or on the CPU; 1 to 64."""
    decoupled: bool = False
    """Answer with every step's number before the picture (gRPC streams only)."""
    warm_up: bool = True
    """Draw pictures of every size before the model is ready."""
    queue: int = 64
    """How many requests may wait; more are refused. 0 is no limit, and spares waits on busy cores (SERVING.md)."""
    execution_env: Path | None = None
    """Virtual environment for the backend's Python, with the NumPy it was compiled for. None: Triton's own."""
    runtime_cache: Path | None = None
    """Folder for TensorRT-RTX's compiled kernels, where the bundle may not be written. None: in the bundle."""

    def __post_init__(self) -> None:
        """Raises UserError for a number below its least."""
        require_between(1, 64, instances=self.instances)
        require_least(0, queue=self.queue)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every request asks for."""

    size: str | None = None
    """Of the pictures, WIDTHxHEIGHT in pixels, e.g. 1024x1024. None: the first that is served."""
    steps: int | None = None
    """Denoising steps, 1 to 200. None: the server's default (a few-step model's own, else 25)."""
    guidance: float | None = None
    """Guidance scale, 0 to 50; up to 1 is no guidance. None: the server's default (a few-step model's own, else 5)."""
    images: int = DEFAULTS["images"]
    """Pictures for each request, 1 to 16."""

    def __post_init__(self) -> None:
        """Raises UserError for what no server takes."""
        for name in ("steps", "guidance", "images"):
            if (value := getattr(self, name)) is not None:
                require_between(*LIMITS[name], **{name: value})
