"""What `python -m engines triton` and `serve` can be told alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a bundle is served."""

    flavor: str | None = None
    """tensorrt, tensorrt-rtx or onnxruntime; default: the first that runs here."""
    gpus: str = "auto"
    """CUDA device numbers separated by commas, `none` for the CPU, `auto` for every GPU here that runs the bundle."""
    instances: int = 1
    """Copies of the model for each GPU."""
    decoupled: bool = False
    """Answer with every step's number before the picture (gRPC streams only)."""
    plans: bool = False
    """Offer the bundle's tensorrt plans (layout ranged) as models of their own, too; the server on PyPI cannot."""
    warm_up: bool = True
    """Draw pictures of every size before the model is ready."""
    queue: int = 64
    """How many requests may wait; more are refused. 0 is no limit, and spares waits on busy cores (SERVING.md)."""
    execution_env: Path | None = None
    """Virtual environment for the backend's Python (one with the NumPy it was compiled for)."""
    runtime_cache: Path | None = None
    """Folder for TensorRT-RTX's compiled kernels, where the bundle may not be written."""
