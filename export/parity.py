"""Does the exported graph compute what torch computes? ONNX Runtime against the network, on random inputs.

The reference is torch in float32 with the weights as they are in the graph (for fp16: rounded to it). The bounds:

fp32  Both sides round each operation to 2^-24 relative, in different order. Over the ~10^3 operations in a row of these
      networks that is seen as 1e-7 to 5e-6; a wrong graph is off by 1e-2 or more. Bound 1e-4.
fp16  The graph rounds each result to 2^-11 = 4.9e-4. Residual streams add the roundings of some dozen blocks as random
      errors, seen as 1e-3 to 3e-3. Bound 2e-2, and cosine 0.9998 (1 - e²/2 for that error).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distill.architectures import Resolution
from distill.errors import UserError, unknown
from distill.files import read_json
from export.components import COMPONENTS, Config

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Bound:
    relative: float
    cosine: float


BOUNDS = {"fp32": Bound(relative=1e-4, cosine=1 - 1e-7), "fp16": Bound(relative=2e-2, cosine=0.9998)}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """One output at one size: |got - reference| / |reference| in the 2-norm, the largest difference, the cosine."""

    output: str
    resolution: str
    relative: float
    largest: float
    cosine: float
    seed: int


def _metrics(got: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    got, reference = got.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    norm, difference = float(np.linalg.norm(reference)), got - reference
    cosine = float(got @ reference) / max(float(np.linalg.norm(got)) * norm, 1e-300)
    return float(np.linalg.norm(difference)) / max(norm, 1e-300), float(np.abs(difference).max()), cosine


def cpu_session(model: Path, threads: int = 0) -> InferenceSession:
    """ONNX Runtime on the CPU. Its threads sleep when they wait: spinning would starve torch and other processes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def compare(
    name: str,
    model: Path,
    module: nn.Module,
    config: Config,
    resolutions: Iterable[Resolution],
    batches: Iterable[int],
    precision: str,
    seed: int | None = None,
) -> Iterable[Parity]:
    """Runs `model` in ONNX Runtime and `module` (`wrappers.wrap`) in float32 on the same random inputs, for every
    resolution and batch. A seed of None is drawn afresh and reported."""
    import torch

    from export.wrappers import example

    seed = secrets.randbits(31) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    session = cpu_session(model)
    reference = module.float()
    top = config.get("vocab_size", 2)
    for resolution in resolutions:
        for batch in batches:
            specs = COMPONENTS[name].inputs(config, resolution, batch, precision)
            arguments = [example(spec.dtype, spec.shape, generator, top) for spec in specs]
            feeds = {spec.name: value.numpy() for spec, value in zip(specs, arguments, strict=True)}
            got = session.run(None, feeds)
            with torch.no_grad():
                floats = [value.float() if value.is_floating_point() else value for value in arguments]
                expected = reference(*floats)
            outputs = COMPONENTS[name].outputs(config, resolution, batch, precision)
            for spec, ours, theirs in zip(outputs, got, expected, strict=True):
                if ours.shape != spec.shape or ours.dtype.name != spec.dtype:
                    raise RuntimeError(f"{name}: output {spec.name} is {ours.dtype} {ours.shape}, expected {spec}")
                relative, largest, cosine = _metrics(ours, theirs.numpy())
                yield Parity(
                    output=spec.name,
                    resolution=f"{batch} of {resolution}",
                    relative=relative,
                    largest=largest,
                    cosine=cosine,
                    seed=seed,
                )


def within_bounds(results: Iterable[Parity], precision: str) -> bool:
    """A NaN is outside of every bound."""
    bound = BOUNDS[precision]
    return all(result.relative <= bound.relative and result.cosine >= bound.cosine for result in results)


def verify_folder(
    folder: Path,
    checkpoint: Path,
    *,
    components: Sequence[str] = (),
    sizes: Sequence[Resolution] = (),
    batch: int = 2,
    seed: int | None = None,
    workdir: Path = Path("out/models"),
) -> dict[str, list[Parity]]:
    """Compares every component of an ONNX folder with its checkpoint, in `sizes` or every resolution of slimxl.json.

    A component that fails is renamed to NAME.failed. Raises UserError where the checkpoint is another one than the
    folder was made from.
    """
    from distill.sources import checkpoint_hash, load_component
    from export.checkpoint import prepare
    from export.wrappers import wrap
    from export.write import TORCH_DTYPES

    seed = secrets.randbits(31) if seed is None else seed
    about = read_json(folder / "slimxl.json")
    if checkpoint_hash(checkpoint) != about["source"]["sha256"]:
        made_from = about["source"]["name"]
        raise UserError(f"{folder} was made from {made_from}, not from {checkpoint}; give its own --model")
    loras = [(Path(lora["file"]), lora["scale"]) for lora in about["loras"]]
    prepared = prepare(checkpoint, about["vae"]["identity"], loras, workdir)
    results: dict[str, list[Parity]] = {}
    present = [name for name in COMPONENTS if (folder / name / "export.json").is_file()]
    for name in components or present:
        if name not in present:
            raise unknown("component of this folder", name, present)
        export, config = read_json(folder / name / "export.json"), read_json(folder / name / "config.json")
        network = load_component(prepared, COMPONENTS[name].source, TORCH_DTYPES[export["precision"]])
        module = wrap(name, network)
        resolutions = list(sizes) or [Resolution.parse(text) for text in about["resolutions"]]
        if name.startswith("text"):  # no picture goes in
            resolutions = resolutions[:1]
        graphs: dict[str, list[Resolution]] = {}
        for resolution in resolutions:
            if name.startswith("text"):
                graphs["model.onnx"] = [resolution]
                continue
            if export["graphs"] and str(resolution) not in export["graphs"]:
                raise unknown("resolution of this folder's static graphs", str(resolution), export["graphs"])
            graphs.setdefault(export["graphs"].get(str(resolution), "model.onnx"), []).append(resolution)
        batches = [batch if export["dynamic"] else export["inputs"][0]["shape"][0]]
        results[name] = [
            parity
            for file, fitting in graphs.items()
            for parity in compare(
                name, folder / name / file, module, config, fitting, batches, export["precision"], seed
            )
        ]
        if not within_bounds(results[name], export["precision"]):
            (folder / name).rename(folder / f"{name}.failed")
    return results
