"""A plan of TensorRT: deserialised with clear errors, its execution contexts created, its weights exchanged."""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from typing import Any

import torch

from distill.common.errors import UserError
from distill.common.files import size_text
from engines.bundle import Engine
from engines.flavors.cuda import CudaDevice
from engines.flavors.shared_runtime import SharedRuntime
from engines.flavors.weights import Added, with_added
from engines.onnx_folder import OnnxComponent


def deserialise_plan(shared: SharedRuntime, plan: mmap | bytes, engine: Engine, rebuild: str) -> Any:
    """TensorRT's ICudaEngine. Raises UserError where the plan does not fit this machine, with `rebuild` as what to do, and
    torch.OutOfMemoryError where the GPU's memory is too small."""
    doubt = _check_header(shared, plan, engine, rebuild)
    runtime, path = shared.runtime, engine.files[0].path
    if engine.options.get("version_compatible"):
        runtime.engine_host_code_allowed = True  # such a plan contains runtime code; its hash was checked
    found, free_bytes = _try_twice(lambda: runtime.deserialize_cuda_engine(plan), shared.device)
    if found is not None:
        return found
    if free_bytes < len(plan):
        raise torch.OutOfMemoryError(
            f"{path} takes {size_text(len(plan))} of the GPU's memory, of which {size_text(free_bytes)} are free"
        )
    why = f" ({doubt})" if doubt else ""
    raise UserError(f"{engine.flavor} refused {path}{why}; its own message stands above; {rebuild}")


def _check_header(shared: SharedRuntime, plan: mmap | bytes, engine: Engine, rebuild: str) -> str:
    """Asks TensorRT-RTX whether the header of the plan fits this machine, and raises where it does not.

    Returns a doubt that only deserialising settles: version 1.6 said "unsupported cc" for GPUs that then ran the plan.
    """
    size = getattr(shared.runtime, "engine_header_size", None)
    if engine.flavor != "tensorrt-rtx" or size is None:
        return ""
    validity, reasons = shared.runtime.get_engine_validity(plan[:size])
    if validity != shared.trt.EngineValidity.INVALID:
        return ""
    kinds = shared.trt.EngineInvalidityDiagnostics.__members__
    found = [name.lower().replace("_", " ") for name, kind in kinds.items() if reasons & int(kind)]
    if found == ["unsupported cc"]:
        return "unsupported cc"
    if found == ["insufficient gpu memory"]:
        raise torch.OutOfMemoryError(f"{engine.files[0].path} finds too little memory free on this GPU")
    remedy = "update the NVIDIA driver" if found == ["old cuda driver"] else rebuild
    raise UserError(f"{engine.files[0].path} cannot run here: {', '.join(found) or 'not a plan'}; {remedy}")


def create_context(shared: SharedRuntime, plan: Any, config: Any, engine: Engine) -> Any:
    """An IExecutionContext without activation memory; `config` is an IRuntimeConfig (TensorRT-RTX) or None. Raises
    torch.OutOfMemoryError where TensorRT creates none."""
    how = shared.trt.ExecutionContextAllocationStrategy.USER_MANAGED if config is None else config
    context, free_bytes = _try_twice(lambda: plan.create_execution_context(how), shared.device)
    if context is None:
        raise torch.OutOfMemoryError(
            f"{engine.flavor} gave {engine.component} no execution context with {size_text(free_bytes)} of the GPU's "
            "memory free; its own message stands above"
        )
    return context


def _try_twice(make: Callable[[], Any], device: CudaDevice) -> tuple[Any, int]:
    """Calls `make`, and once more where it gave None: after torch has released the memory that it keeps in reserve. Returns
    the bytes that were free then, too."""
    if (first := make()) is not None:
        return first, 0
    free_bytes = device.free_bytes()
    return make(), free_bytes


def refit_plan(shared: SharedRuntime, plan: Any, engine: Engine, weights: OnnxComponent) -> None:
    """Replaces the plan's weights by those of an ONNX file of the same graph (a fine-tune, a merged LoRA).

    Raises UserError where the plan was not built for it, or the file does not fit.
    """
    path, onnx = engine.files[0].path, weights.model
    stripped = bool(engine.options.get("strip"))
    if not engine.options.get("refit") and not (stripped and weights.is_source_of(engine)):
        kept = "takes back only the weights it was built from" if stripped else "keeps its own"
        raise UserError(f"{path} was built without --refit and {kept}; rebuild it with --refit to use {onnx}")
    device = shared.device
    with device.current(), device.ordered():
        refitter = shared.trt.Refitter(plan, shared.logger)
        parser = shared.trt.OnnxParserRefitter(refitter, shared.logger)
        fits = parser.refit_from_file(str(onnx))
        missing = list(refitter.get_missing_weights())
        if not fits or missing:
            reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            reasons += [f"without {', '.join(missing[:3])}"] * bool(missing)
            raise UserError(f"{onnx} does not fit {path} ({'; '.join(reasons[:2])}): export the same architecture")
        _refit(shared, refitter, engine, onnx)


def refit_weights(shared: SharedRuntime, plan: Any, engine: Engine, source: OnnxComponent, added: Added) -> None:
    """Replaces the named weights of a plan by those of its ONNX file with something added. What TensorRT has fused with
    them is given again. Raises UserError where a weight is not there or cannot be replaced."""
    device, onnx = shared.device, source.model
    with device.current(), device.ordered():
        refitter = shared.trt.Refitter(plan, shared.logger)
        arrays = _give(shared, refitter, engine, with_added(onnx, added))
        arrays |= _give(shared, refitter, engine, with_added(onnx, dict.fromkeys(refitter.get_missing_weights())))
        if missing := list(refitter.get_missing_weights()):
            raise UserError(f"{engine.files[0].path} wants {', '.join(missing[:3])} too: build it anew with --refit")
        _refit(shared, refitter, engine, onnx)


def _give(shared: SharedRuntime, refitter: Any, engine: Engine, arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays, which must live until the refit is done."""
    for name, array in arrays.items():
        if not refitter.set_named_weights(name, shared.trt.Weights(array)):
            raise UserError(
                f"{engine.flavor} cannot replace {name} in {engine.files[0].path}: fuse the LoRA before the build "
                "(python -m export onnx --lora FILE)"
            )
    return arrays


def _refit(shared: SharedRuntime, refitter: Any, engine: Engine, onnx: Any) -> None:
    if not refitter.refit_cuda_engine_async(shared.device.stream_handle):
        raise UserError(f"{engine.flavor} could not refit {engine.files[0].path} from {onnx}")
    shared.device.synchronize()  # the copies read memory that the refitter frees
