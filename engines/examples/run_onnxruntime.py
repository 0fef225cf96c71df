"""An engine of the flavor onnxruntime: numpy arrays in, numpy arrays out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime


def runs_here(engine: dict) -> bool:
    return True


class Engine:
    """`engine` is one entry of the manifest's "engines"; its files have been checked."""

    def __init__(self, bundle: Path, engine: dict) -> None:
        self.outputs = [tensor["name"] for tensor in engine["outputs"]]
        model = bundle / engine["files"][0]["path"]
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def __call__(self, feed: dict[str, np.ndarray], size: str) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
