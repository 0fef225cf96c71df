"""Does the exported graph compute what torch computes? ONNX Runtime against the network, on random inputs.

The reference is torch in float32 with the weights as they are in the graph (for fp16: rounded to it). The bounds:

fp32  Both sides round each operation to 2^-24 relative, in different order. Over the ~10^3 operations in a row of these
      networks that is seen as 1e-7 to 5e-6; a wrong graph is off by 1e-2 or more. Bound 1e-4.
fp16  The graph rounds each result to 2^-11 = 4.9e-4. Residual streams add the roundings of some dozen blocks as random
      errors, seen as 2e-4 to 3e-3. Bound 2e-2, and cosine 0.9998 (1 - e²/2 for that error).
8 bit int8 and fp8 round inputs and weights of every layer by one to four per cent of their size, seen as 1e-2 to 8e-2 after
      the whole network. Bound 2e-1, and the cosine that goes with it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.common.errors import UserError
from distill.models.conditioning import Config
from distill.models.resolution import Resolution
from export.components import COMPONENTS

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Bound:
    relative: float
    cosine: float


BOUNDS = {
    "fp32": Bound(relative=1e-4, cosine=1 - 1e-7),
    "fp16": Bound(relative=2e-2, cosine=0.9998),
    "int8": Bound(relative=2e-1, cosine=0.98),
    "fp8": Bound(relative=2e-1, cosine=0.98),
}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """One output at one size: |got - reference| / |reference| in the 2-norm, the largest difference, the cosine."""

    output: str
    precision: str
    resolution: str
    relative: float
    largest: float
    cosine: float
    seed: int

    @property
    def passed(self) -> bool:
        """A NaN is outside of every bound."""
        bound = BOUNDS[self.precision]
        return self.relative <= bound.relative and self.cosine >= bound.cosine

    def __str__(self) -> str:
        figures = f"relative error {self.relative:.1e}, cosine {self.cosine:.8f}"
        return f"{self.output} of {self.resolution}: {figures} (bound {BOUNDS[self.precision].relative:.0e})"


def _metrics(got: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    got, reference = got.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    norm, difference = float(np.linalg.norm(reference)), got - reference
    cosine = float(got @ reference) / max(float(np.linalg.norm(got)) * norm, 1e-300)
    return float(np.linalg.norm(difference)) / max(norm, 1e-300), float(np.abs(difference).max()), cosine


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in decibel; infinite where they are equal."""
    error = np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def cpu_session(model: Path, threads: int = 0) -> InferenceSession:
    """ONNX Runtime on the CPU. Its threads sleep when they wait: spinning would starve torch and other processes.

    Raises UserError where it refuses the graph.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as refusals

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except (
        refusals.Fail,
        refusals.InvalidArgument,
        refusals.InvalidGraph,
        refusals.InvalidProtobuf,
        refusals.NoSuchFile,
        refusals.NotImplemented,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"ONNX Runtime refuses {model}: {reason}; export it again, or with --opset 18") from None


def compare(
    name: str,
    model: Path,
    module: nn.Module,
    config: Config,
    resolutions: Iterable[Resolution],
    batches: Iterable[int],
    precision: str,
    seed: int | None = None,
    *,
    bound: str | None = None,
    text: Mapping[str, Tensor] | None = None,
) -> Iterable[Parity]:
    """Runs `model` in ONNX Runtime and `module` (`wrappers.wrap`) in float32 on the same random inputs, for every
    resolution and batch. A seed of None is drawn afresh and reported. `bound` names the bound where it is not the
    precision's own; rows of `text` stand for the prompt where they are given, in place of random numbers.

    Raises UserError where an output has another type or shape than `components.py` says.
    """
    import torch

    from export.graph.wrappers import example

    seed = secrets.randbits(31) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    session = cpu_session(model)
    reference = module.float()
    for resolution in resolutions:
        for batch in batches:
            specs = COMPONENTS[name].inputs(config, resolution, batch, precision)
            arguments = [example(spec, config, generator) for spec in specs]
            for place, spec in enumerate(specs):
                if text is not None and spec.name in text:
                    rows = text[spec.name].to(arguments[place].dtype)
                    arguments[place] = rows[torch.arange(batch) % len(rows)]
            feeds = {spec.name: value.numpy() for spec, value in zip(specs, arguments, strict=True)}
            got = session.run(None, feeds)
            with torch.no_grad():
                floats = [value.float() if value.is_floating_point() else value for value in arguments]
                expected = reference(*floats)
            outputs = COMPONENTS[name].outputs(config, resolution, batch, precision)
            for spec, ours, theirs in zip(outputs, got, expected, strict=True):
                if ours.shape != spec.shape or ours.dtype.name != spec.dtype:
                    got_shape = f"{ours.dtype.name} {ours.shape}, expected {spec.dtype} {spec.shape}"
                    raise UserError(f"{name}: the graph's output {spec.name} is {got_shape}")
                relative, largest, cosine = _metrics(ours, theirs.numpy())
                yield Parity(
                    output=spec.name,
                    precision=bound or precision,
                    resolution=f"{batch} of {resolution}",
                    relative=relative,
                    largest=largest,
                    cosine=cosine,
                    seed=seed,
                )
