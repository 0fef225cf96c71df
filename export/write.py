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

from distill.architectures import Resolution
from distill.errors import UserError
from distill.files import replacing, sha256_file, write_json
from distill.sources import load_component
from export.components import COMPONENTS, FLOAT_DTYPES, Config
from export.folder import CHECK_BELOW_BYTES, Job, library_versions
from export.graph import specialise
from export.parity import Parity, compare
from export.trace import trace
from export.vae_safety import require_finite
from export.weights import load_shapes, on_meta
from export.wrappers import wrap

TORCH_DTYPES = {name: getattr(torch, dtype) for name, dtype in FLOAT_DTYPES.items()}


def trace_resolution(name: str, config: Config) -> Resolution:
    """A small picture with unequal sides: what a graph with open dimensions is first checked at."""
    step = config["vae_scale_factor"] * COMPONENTS["unet"].size_multiple(config) if name == "unet" else 16
    return Resolution(5 * step, 4 * step)


def parameters_and_flops(name: str, checkpoint: Path, config: Config, resolution: Resolution) -> tuple[int, int]:
    """Parameters the component uses, and the floating-point operations of one call of batch 1 at `resolution`."""
    network = on_meta(checkpoint, COMPONENTS[name].source)
    other_half = {"vae_decoder": ("encoder.", "quant_conv."), "vae_encoder": ("decoder.", "post_quant_conv.")}
    unused = other_half.get(name, ("-",))
    parameters = sum(tensor.numel() for key, tensor in network.named_parameters() if not key.startswith(unused))
    inputs = COMPONENTS[name].inputs(config, resolution, 1, "fp32")
    arguments = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in inputs]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        wrap(name, network.to("meta").float())(*arguments)
    return parameters, counter.get_total_flops()


def _save(model: ir.Model, folder: Path, job: Job, resolutions: Sequence[Resolution]) -> dict[str, str]:
    """Writes the weights once, and one graph for each resolution, or the open one where there are none.

    Returns the file name of each resolution's graph. model.onnx is the first one's.
    """
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    graphs = {}
    for resolution in resolutions:
        fixed = ir.load(folder / "model.onnx")
        inputs = COMPONENTS[job.name].inputs(job.config, resolution, job.options.batch, job.precision)
        specialise(fixed, inputs)
        graphs[str(resolution)] = f"model.{resolution}.onnx"
        ir.save(fixed, folder / graphs[str(resolution)])
    if graphs:
        first = str(resolutions[0])
        (folder / graphs[first]).replace(folder / "model.onnx")
        graphs[first] = "model.onnx"
    return graphs


def _require_valid(file: Path, name: str) -> None:
    """Raises UserError where onnx.checker, with types and shapes inferred, refuses a graph."""
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name}: onnx.checker refuses the exported graph, which was not kept: {reason}; try --opset 18"
        ) from None


def write_component(job: Job, folder: Path, progress: Callable[[str], None]) -> None:
    """Raises UserError, and leaves `folder` as it was, where the graph is invalid or disagrees with torch."""
    started = time.monotonic()
    options, name = job.options, job.name
    component = COMPONENTS[name]
    dtype = TORCH_DTYPES[job.precision]
    module = wrap(name, load_shapes(job.checkpoint, component.source, dtype))
    fixed = options.resolutions[:1] if name.startswith("text") else options.resolutions  # no picture goes in
    resolution = fixed[0] if fixed else trace_resolution(name, job.config)
    inputs = component.inputs(job.config, resolution, options.batch, job.precision)
    outputs = component.outputs(job.config, resolution, options.batch, job.precision)
    model = trace(component, module, job.config, inputs, outputs, options.opset)
    traced = time.monotonic()
    with replacing(folder) as temporary:
        temporary.mkdir()
        graphs = _save(model, temporary, job, fixed)
        nodes = len(list(model.graph))
        del model
        write_json(temporary / "config.json", job.config)
        saved = time.monotonic()
        for file in temporary.glob("*.onnx"):
            _require_valid(file, name)
        if name == "vae_decoder":
            require_finite(temporary / "model.onnx", job.config, resolution, options.batch, job.precision)
        checked: list[Parity] = []
        if options.check and sum(file.stat().st_size for file in temporary.iterdir()) < CHECK_BELOW_BYTES:
            batches = (options.batch,) if fixed else (1, 3)
            real = wrap(name, load_component(job.checkpoint, component.source, dtype))
            model_file = temporary / "model.onnx"
            checked = list(compare(name, model_file, real, job.config, [resolution], batches, job.precision))
            for result in checked:
                if not result.passed:
                    raise UserError(
                        f"{name}: the exported graph disagrees with torch and was not kept: {result}; try --opset 18, or "
                        "--precision fp32"
                    )
        verified = time.monotonic()
        parameters, flops = parameters_and_flops(name, job.checkpoint, job.config, job.base)
        write_json(
            temporary / "export.json",
            {
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
                "sha256": {path.name: sha256_file(path) for path in sorted(temporary.glob("model*.onnx*"))},
                "checked": [asdict(result) for result in checked],
                "versions": library_versions(),
            },
        )
    seconds = [
        ("trace", traced - started),
        ("save", saved - traced),
        ("check", verified - saved),
        ("describe", time.monotonic() - verified),
    ]
    steps = ", ".join(f"{step} {duration:.1f}" for step, duration in seconds)
    progress(f"{name}: {job.precision}, {nodes} nodes, {time.monotonic() - started:.1f} s ({steps})")
