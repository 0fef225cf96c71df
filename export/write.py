"""One component, from its weights to a checked folder with its final name."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.checkpoints.load import load_component
from distill.common.errors import UserError
from distill.common.files import replacing, sha256_file, write_json
from distill.models.resolution import Resolution
from export.checks.parity import Parity, compare
from export.checks.vae_safety import require_finite
from export.components import COMPONENTS, GUIDED, TEXT_ENCODERS, Config
from export.graph.passes import specialise
from export.graph.trace import trace
from export.graph.weights import load_shapes, on_meta
from export.graph.wrappers import TORCH_DTYPES, wrap
from export.job import CHECK_BELOW_BYTES, Job, library_versions


def trace_resolution(name: str, config: Config) -> Resolution:
    """A small picture with unequal sides: what a graph with open dimensions is first checked at."""
    step = config["vae_scale_factor"] * COMPONENTS[name].size_multiple(config) if name in GUIDED else 16
    return Resolution(5 * step, 4 * step)


def parameters_and_flops(name: str, checkpoint: Path, config: Config, resolution: Resolution) -> tuple[int, int]:
    """Parameters the component uses, and the floating-point operations of one call of batch 1 at `resolution`."""
    component = COMPONENTS[name]
    network = on_meta(checkpoint, component.source)
    used = (tensor for key, tensor in network.named_parameters() if not key.startswith(component.unused))
    parameters = sum(tensor.numel() for tensor in used)
    inputs = component.inputs(config, resolution, 1, "fp32")
    arguments = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in inputs]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        wrap(name, network.to("meta").float())(*arguments)
    return parameters, counter.get_total_flops()


def _fixfile_sizes(folder: Path, job: Job, resolutions: Sequence[Resolution]) -> dict[str, str]:
    """Puts a static graph for each resolution, over the same weights, in the place of the open model.onnx.

    Returns the file name of each resolution's graph. model.onnx is the first one's.
    """
    graphs = {}
    for resolution in resolutions:
        fixed = ir.load(folder / "model.onnx")
        rows = job.options.rows(job.name)
        specialise(fixed, COMPONENTS[job.name].inputs(job.config, resolution, rows, job.precision))
        graphs[str(resolution)] = f"model.{resolution}.onnx"
        ir.save(fixed, folder / graphs[str(resolution)])
        require_valid(folder / graphs[str(resolution)], job.name)
    first = str(resolutions[0])
    (folder / graphs[first]).replace(folder / "model.onnx")
    return graphs | {first: "model.onnx"}


def require_valid(file: Path, name: str) -> None:
    """Raises UserError where onnx.checker, with types and shapes inferred, refuses a graph."""
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name}: onnx.checker refuses the exported graph, which was not kept: {reason}; try --opset 18"
        ) from None


def _compare_with_torch(job: Job, model: Path) -> list[Parity]:
    """Of an open graph, on one small picture, with the longest prompt too. Raises UserError where one of them disagrees."""
    network = load_component(job.checkpoint, COMPONENTS[job.name].source, TORCH_DTYPES[job.precision])
    resolution = trace_resolution(job.name, job.config)
    module = wrap(job.name, network)
    results = list(compare(job.name, model, module, job.config, [resolution], (1, 3), job.precision))
    if lengths := job.config.get("text_lengths"):
        longest = job.config | {"text_length": lengths[-1]}
        results += compare(job.name, model, module, longest, [resolution], (2,), job.precision)
    for result in results:
        if not result.passed:
            raise UserError(
                f"{job.name}: the exported graph disagrees with torch and was not kept: {result}; try --opset 18, or "
                "--precision fp32"
            )
    return results


def write_component(job: Job, folder: Path, progress: Callable[[str], None]) -> None:
    """Raises UserError, and leaves `folder` as it was, where the graph is invalid or disagrees with torch."""
    started = time.monotonic()
    options, name = job.options, job.name
    component = COMPONENTS[name]
    module = wrap(name, load_shapes(job.checkpoint, component.source, TORCH_DTYPES[job.precision]))
    small = trace_resolution(name, job.config)
    inputs, outputs = (make(job.config, small, 2, job.precision) for make in (component.inputs, component.outputs))
    model = trace(component, module, job.config, inputs, outputs, options.opset)
    nodes = len(list(model.graph))
    traced = time.monotonic()
    with replacing(folder) as temporary:
        temporary.mkdir()
        ir.save(model, temporary / "model.onnx", external_data="model.onnx.data")
        del model
        write_json(temporary / "config.json", job.config)
        saved = time.monotonic()
        require_valid(temporary / "model.onnx", name)
        if component.source == "vae":
            require_finite(name, temporary / "model.onnx", job.config, small, job.precision)
        checked: list[Parity] = []
        if options.check and sum(file_sizes(temporary).values()) < CHECK_BELOW_BYTES:
            checked = _compare_with_torch(job, temporary / "model.onnx")
        verified = time.monotonic()
        graphs: dict[str, str] = {}
        fixed = options.resolutions[:1] if name in TEXT_ENCODERS else options.resolutions
        if fixed:
            graphs = _fixfile_sizes(temporary, job, fixed)
            rows = options.rows(name)
            inputs, outputs = (
                make(job.config, fixed[0], rows, job.precision) for make in (component.inputs, component.outputs)
            )
        parameters, flops = parameters_and_flops(name, job.checkpoint, job.config, job.base)
        described = {
            "key": job.key,
            "component": name,
            "source_sha256": job.source_sha256,
            "precision": job.precision,
            "opset": options.opset,
            "dynamic": not fixed,
            "graphs": graphs,
            "inputs": [asdict(spec) for spec in inputs],
            "outputs": [asdict(spec) for spec in outputs],
            "nodes": nodes,
            "parameters": parameters,
            "flops_per_call": flops,
            "flops_at": {"resolution": str(job.base), "batch": 1},
            "bytes": file_sizes(temporary),
            "sha256": {path.name: sha256_file(path) for path in sorted(temporary.iterdir())},
            "checked": [asdict(result) for result in checked],
            "versions": library_versions(),
        }
        seconds = round(time.monotonic() - started, 1)
        write_json(temporary / "export.json", described | {"seconds": seconds})
    steps = {"trace": traced - started, "save": saved - traced, "check": verified - saved}
    told = ", ".join(f"{step} {duration:.1f}" for step, duration in steps.items())
    weights = ", ".join(job.source_sha256)
    progress(f"{name}: {job.precision} from {weights}, {nodes} nodes, {seconds:.1f} s ({told})")


def file_sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
