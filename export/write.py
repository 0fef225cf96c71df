"""One component, from its weights to a checked folder with its final name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.architectures import Resolution
from distill.files import replacing, sha256_file, write_json
from distill.sources import load_component
from export.components import COMPONENTS, FLOAT_DTYPES, Config
from export.folder import CHECK_BELOW_BYTES, Job, library_versions
from export.parity import compare, within_bounds
from export.trace import trace
from export.wrappers import wrap

TORCH_DTYPES = {name: getattr(torch, dtype) for name, dtype in FLOAT_DTYPES.items()}


def trace_resolution(name: str, config: Config) -> Resolution:
    """A small picture with unequal sides: what a graph with open dimensions is traced and first checked at."""
    step = 8 * 2 ** (len(config.get("block_out_channels") or (1,)) - 1) if name == "unet" else 32
    return Resolution(5 * step, 4 * step)


def parameters_and_flops(name: str, network: nn.Module, config: Config, resolution: Resolution) -> tuple[int, int]:
    """Parameters the component uses, and the floating-point operations of one call of batch 1 at `resolution`."""
    meta = wrap(name, network)
    used = meta.vae.decoder if name == "vae_decoder" else meta.vae.encoder if name == "vae_encoder" else meta
    parameters = sum(parameter.numel() for parameter in used.parameters())  # type: ignore[union-attr, operator]
    inputs = COMPONENTS[name].inputs(config, resolution, 1, "fp32")
    arguments = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in inputs]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta.to_empty(device="meta").float()(*arguments)
    return parameters, counter.get_total_flops()


def write_component(job: Job, folder: Path, progress: Callable[[str], None]) -> None:
    """Raises RuntimeError, and leaves `folder` as it was, where the graph is invalid or disagrees with torch."""
    started = time.monotonic()
    options, name = job.options, job.name
    component = COMPONENTS[name]
    network = load_component(job.checkpoint, component.source, TORCH_DTYPES[job.precision])
    module = wrap(name, network)
    dynamic = not options.resolutions
    resolution = trace_resolution(name, job.config) if dynamic else options.resolutions[0]
    inputs = component.inputs(job.config, resolution, options.batch, job.precision)
    outputs = component.outputs(job.config, resolution, options.batch, job.precision)
    model = trace(component, module, job.config, inputs, outputs, opset=options.opset, dynamic=dynamic)
    traced = time.monotonic()
    with replacing(folder) as temporary:
        temporary.mkdir()
        ir.save(model, temporary / "model.onnx", external_data="model.onnx.data")
        nodes = len(list(model.graph))
        del model
        write_json(temporary / "config.json", job.config)
        onnx.checker.check_model(str(temporary / "model.onnx"), full_check=True)
        checked: list[dict[str, Any]] = []
        if options.check and (temporary / "model.onnx.data").stat().st_size < CHECK_BELOW_BYTES:
            results = compare(
                name, temporary / "model.onnx", module, job.config, resolution, options.batch, job.precision
            )
            if not within_bounds(results, job.precision):
                raise RuntimeError(f"{name}: the graph disagrees with torch at {resolution}: {results}")
            checked = [asdict(result) for result in results]
        del module
        parameters, flops = parameters_and_flops(name, network, job.config, job.base)
        write_json(
            temporary / "export.json",
            {
                "key": job.key,
                "component": name,
                "precision": job.precision,
                "opset": options.opset,
                "dynamic": dynamic,
                "inputs": [asdict(spec) for spec in inputs],
                "outputs": [asdict(spec) for spec in outputs],
                "nodes": nodes,
                "parameters": parameters,
                "flops_per_call": flops,
                "flops_at": {"resolution": str(job.base), "batch": 1},
                "sha256": {path.name: sha256_file(path) for path in sorted(temporary.glob("model*.onnx*"))},
                "checked": checked,
                "versions": library_versions(),
            },
        )
    seconds = time.monotonic() - started
    progress(f"{name}: {job.precision}, {nodes} nodes, {seconds:.1f} s (graph {traced - started:.1f} s)")
