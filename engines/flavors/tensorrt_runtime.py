"""Runs plans on the GPU: one activation arena for all of them, a CUDA graph for each shape, no wait for the host.

Memory: components run one after another on one stream, so all their contexts share one activation buffer, as large
as the largest needs for the sizes the bundle serves; weights are held once for each plan, whatever its profiles.
Latency: a step of the UNet is thousands of small kernels. Captured as a CUDA graph, they are launched with one call.
TensorRT-RTX captures by itself (its CUDA-graph strategy); for TensorRT it is done here. A graph is bound to
addresses, so inputs and outputs have fixed buffers for each shape; an input that is the same tensor as last time
(prompt embeddings, all through the denoise loop) is not copied again.
"""

from __future__ import annotations

import atexit
import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.common.errors import UserError
from distill.common.files import replacing
from engines.bundle import Engine, Profile
from engines.flavors import LoadOptions
from engines.flavors.cuda import CudaDevice
from engines.modules import TORCH_DTYPES
from engines.onnx_folder import OnnxComponent

ALIGNMENT = 256
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Arena:
    """What all plans of a bundle share: the runtime, the stream, and the activation memory."""

    def __init__(self, trt: Any, bundle: Path, options: LoadOptions, device: CudaDevice | None = None) -> None:
        self.trt = trt
        self.options = options
        self.bundle = bundle
        self.device = device or CudaDevice(options.device)
        self.logger = trt.Logger(trt.Logger.WARNING)
        with self.device.current():
            self.runtime = trt.Runtime(self.logger)
        self.generation = 0
        self._buffer = self.device.empty([0], torch.uint8)

    @property
    def size_bytes(self) -> int:
        return self._buffer.numel()

    @property
    def address(self) -> int:
        return -(-self._buffer.data_ptr() // ALIGNMENT) * ALIGNMENT

    def reserve(self, needed_bytes: int) -> None:
        """Grows the buffer where it is too small. Contexts see by `generation` that it moved."""
        if needed_bytes + ALIGNMENT > self.size_bytes:
            self._buffer = self.device.empty([0], torch.uint8)  # the old one goes before the new one comes
            self._buffer = self.device.empty([needed_bytes + ALIGNMENT], torch.uint8)
            self.generation += 1


class RuntimeCache:
    """TensorRT-RTX's just-in-time compiled kernels, kept in a file so that only the first start compiles.

    The file begins with the sha256 of the rest; one that does not agree is ignored, and so is one that TensorRT-RTX
    finds made for another GPU, driver or version.
    """

    def __init__(self, folder: Path | None, title: str, cache: Any) -> None:
        self._path = folder / f"{title}.kernels" if folder else None
        self._cache = cache
        self._saved = b""
        if self._path and self._path.is_file():
            content = self._path.read_bytes()
            digest, blob = content[:32], content[32:]
            if hashlib.sha256(blob).digest() == digest and cache.deserialize(blob):
                self._saved = digest
        save = weakref.WeakMethod(self.save)  # at exit too, since some kernels are compiled beside a run
        atexit.register(lambda: (alive := save()) and alive())

    def save(self) -> None:
        """Writes the file anew where kernels were added; a folder that cannot be written to is no fault."""
        if self._path is None:
            return
        content = self._cache.serialize()
        if content is None:
            return
        blob = bytes(content)
        digest = hashlib.sha256(blob).digest()
        if digest == self._saved:
            return
        try:
            with replacing(self._path) as temporary:
                temporary.write_bytes(digest + blob)
        except OSError:
            self._path = None
        self._saved = digest


class TensorRTEngine:
    """One deserialised plan. A context is made for each shape when it is first met."""

    def __init__(
        self, engine: Engine, plan: bytes, arena: Arena, mend: str, weights: OnnxComponent | None = None
    ) -> None:
        """Raises UserError where the plan does not fit this machine, by its header first and then by the whole, and
        torch.OutOfMemoryError where the GPU has no room for it."""
        # CPython frees attributes in the order they were set: contexts go before the settings and the cache that they
        # use, which TensorRT-RTX does not keep alive for them
        self._contexts: dict[tuple[int, Shapes], _Context] = {}
        self.record = engine
        self._arena = arena
        self._is_rtx = engine.flavor == "tensorrt-rtx"
        stripped = bool(engine.options.get("strip"))
        if stripped and weights is None:
            raise UserError(
                f"{engine.files[0].path} is a plan without weights: name the ONNX folder that holds them, "
                "engines.load(bundle, weights=FOLDER)"
            )
        with arena.device.current():
            self._plan = self._deserialise(plan, mend)
            if weights is not None and (stripped or not weights.made(engine)):
                self.refit(weights)
            self._configure()
            arena.reserve(self._activation_bytes())
            self._specialise()  # not before: to measure a shape must not compile for it

    def _deserialise(self, plan: bytes, mend: str) -> Any:
        doubt = _check_header(self._arena, plan, self.record, mend)
        runtime, flavor, path = self._arena.runtime, self.record.flavor, self.record.files[0].path
        if self.record.options.get("version_compatible"):
            runtime.engine_host_code_allowed = True  # such a plan brings its runtime along; its hash was compared
        engine, free = self._insist(lambda: runtime.deserialize_cuda_engine(plan))
        if engine is None:
            if free < len(plan):
                raise torch.OutOfMemoryError(
                    f"{path} takes {_gb(len(plan))} of the GPU's memory, of which {_gb(free)} are free"
                )
            why = f" ({doubt})" if doubt else ""
            raise UserError(f"{flavor} refused {path}{why}; its own message stands above; {mend}")
        return engine

    def _configure(self) -> None:
        """TensorRT-RTX's settings for contexts; no kernels are specialised yet."""
        trt = self._arena.trt
        self._config: Any = None
        if not self._is_rtx:
            return
        config = self._config = self._plan.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        graphs = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if self._arena.options.cuda_graphs else None
        config.cuda_graph_strategy = graphs or trt.CudaGraphStrategy.DISABLED
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.NONE
        cache = config.create_runtime_cache()
        title = f"{self.record.component}-{self.record.key[:8]}_{self._arena.device.title}"
        self.cache = RuntimeCache(self._arena.options.runtime_cache, title, cache)
        config.set_runtime_cache(cache)

    def _specialise(self) -> None:
        """What contexts made from now on do, by the layout: a range is specialised for the shapes it meets, exact profiles
        have nothing left for that."""
        if not self._is_rtx:
            return
        exact = all(shape.min == shape.max for profile in self.record.profiles for shape in profile.shapes.values())
        strategy = self._arena.options.specialization or ("none" if exact else "eager")
        strategies = self._arena.trt.DynamicShapesKernelSpecializationStrategy
        self._config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, strategy.upper())

    def make_context(self) -> Any:
        """An execution context that brings no activation memory of its own. Raises torch.OutOfMemoryError where TensorRT
        gives none."""
        strategy = self._arena.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        how = strategy if self._config is None else self._config
        context, free = self._insist(lambda: self._plan.create_execution_context(how))
        if context is None:
            raise torch.OutOfMemoryError(
                f"{self.record.flavor} gave {self.record.component} no execution context with {_gb(free)} of the GPU's "
                "memory free; its own message stands above"
            )
        return context

    def _insist(self, make: Callable[[], Any]) -> tuple[Any, int]:
        """What TensorRT makes, and what the GPU then has free. It tries a second time where torch held memory in reserve."""
        made = make()
        if made is not None:
            return made, 0
        free = self._arena.device.free_bytes()
        return make(), free

    def _activation_bytes(self) -> int:
        """The most that any size of the bundle needs. A range reaches wider than its sizes, so it is asked for each."""
        needed = 0
        for profile in self.record.profiles:
            if len(profile.resolutions) == 1 or all(s.min[2:] == s.max[2:] for s in profile.shapes.values()):
                needed = max(needed, int(self._plan.get_device_memory_size_for_profile_v2(profile.index)))
                continue
            context = self.make_context()
            self.select_profile(context, profile)
            for text in profile.resolutions:
                for name, shape in _largest_shapes(profile, text):
                    context.set_input_shape(name, shape)
                needed = max(needed, int(context.update_device_memory_size_for_shapes()))
        return needed

    def select_profile(self, context: Any, profile: Profile) -> None:
        """Enqueued, once for each context."""
        if len(self.record.profiles) > 1 and not context.set_optimization_profile_async(
            profile.index, self._arena.device.stream_handle
        ):
            raise RuntimeError(f"{self.record.files[0].path} has no profile {profile.index}")

    def run(self, inputs: dict[str, torch.Tensor], profile: Profile) -> dict[str, torch.Tensor]:
        """Enqueues one call and returns tensors that the caller owns; the host does not wait."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items())
        key = (profile.index, shapes)
        with self._arena.device.current():
            if (context := self._contexts.get(key)) is not None:
                return context.run(inputs)
            context = self._contexts[key] = _Context(self, self._arena, profile, shapes)
            outputs = context.run(inputs)
        if self._is_rtx:
            self.cache.save()
        return outputs

    def refit(self, weights: OnnxComponent) -> None:
        """Exchanges the weights for those of an ONNX file of the same graph (a fine-tune, a merged LoRA); contexts stay,
        CUDA graphs are captured anew. Raises UserError where the plan or the file does not fit."""
        trt, path, onnx = self._arena.trt, self.record.files[0].path, weights.model
        if not self.record.options.get("refit") and not (
            self.record.options.get("strip") and weights.made(self.record)
        ):
            kept = (
                "takes back only the weights it was built from" if self.record.options.get("strip") else "keeps its own"
            )
            raise UserError(f"{path} was built without --refit and {kept}; rebuild it with --refit to use {onnx}")
        device = self._arena.device
        with device.current(), device.ordered():
            refitter = trt.Refitter(self._plan, self._arena.logger)
            parser = trt.OnnxParserRefitter(refitter, self._arena.logger)
            fits = parser.refit_from_file(str(onnx))
            missing = list(refitter.get_missing_weights())
            if not fits or missing:
                said = [parser.get_error(index).desc() for index in range(parser.num_errors)]
                said += [f"without {', '.join(missing[:3])}"] * bool(missing)
                raise UserError(f"{onnx} does not fit {path} ({'; '.join(said[:2])}): export the same architecture")
            if not refitter.refit_cuda_engine_async(device.stream_handle):
                raise UserError(f"{self.record.flavor} could not refit {path} from {onnx}")
            device.synchronize()  # the weights are on their way from memory that goes with the refitter
        for context in self._contexts.values():
            context.forget_graph()


def _check_header(arena: Arena, plan: bytes, engine: Engine, mend: str) -> str:
    """TensorRT-RTX says from the first bytes whether a plan can run here, and why not. Returns what it doubts but what
    only deserialising decides: version 1.6 has called plans unfit for a GPU on which they then ran."""
    size = getattr(arena.runtime, "engine_header_size", None)
    if engine.flavor != "tensorrt-rtx" or size is None:
        return ""
    validity, reasons = arena.runtime.get_engine_validity(plan[:size])
    if validity != arena.trt.EngineValidity.INVALID:
        return ""
    kinds = arena.trt.EngineInvalidityDiagnostics.__members__
    found = [name.lower().replace("_", " ") for name, kind in kinds.items() if reasons & int(kind)]
    if found == ["unsupported cc"]:
        return "unsupported cc"
    if found == ["insufficient gpu memory"]:
        raise torch.OutOfMemoryError(f"{engine.files[0].path} finds too little memory free on this GPU")
    if found == ["old cuda driver"]:
        mend = "update the NVIDIA driver"
    raise UserError(f"{engine.files[0].path} cannot run here: {', '.join(found) or 'not a plan'}; {mend}")


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _largest_shapes(profile: Profile, resolution: str) -> list[tuple[str, tuple[int, ...]]]:
    """The inputs of one size at the largest batch: from the first size of the profile, whose shape is known, the
    scale between image and input follows."""
    width, height = map(int, resolution.split("x"))
    first_width, _ = map(int, profile.resolutions[0].split("x"))
    shapes = []
    for name, shape in profile.shapes.items():
        sides = list(shape.max)
        if len(sides) == 4:
            scale = first_width // shape.opt[3]
            sides[2:] = height // scale, width // scale
        shapes.append((name, tuple(sides)))
    return shapes


class _Context:
    """One plan at one shape: fixed buffers, bound once, and the graph that was captured from them."""

    def __init__(self, engine: TensorRTEngine, arena: Arena, profile: Profile, shapes: Shapes) -> None:
        self._arena = arena
        self._context = engine.make_context()
        self._captures = arena.options.cuda_graphs and engine.record.flavor == "tensorrt"
        self._replay: Callable[[], None] | None = None
        self._last: dict[str, tuple[torch.Tensor, int]] = {}
        with arena.device.ordered():
            engine.select_profile(self._context, profile)
            for name, shape in shapes:
                if not self._context.set_input_shape(name, shape):
                    raise RuntimeError(f"{engine.record.component}: input {name} cannot be {shape}")
        dtypes = {tensor.name: TORCH_DTYPES[tensor.dtype] for tensor in (*engine.record.inputs, *engine.record.outputs)}
        self._inputs = {name: arena.device.empty(list(shape), dtypes[name]) for name, shape in shapes}
        self._outputs = {
            tensor.name: arena.device.empty(list(self._context.get_tensor_shape(tensor.name)), dtypes[tensor.name])
            for tensor in engine.record.outputs
        }
        for name, tensor in (self._inputs | self._outputs).items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        self._needed_bytes = int(self._context.update_device_memory_size_for_shapes())
        self._generation = -1

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `TensorRTEngine.run`. Outputs are copied out of the fixed buffers: a multi-step scheduler keeps them."""
        owned = {name: torch.empty_like(tensor) for name, tensor in self._outputs.items()}
        with self._arena.device.ordered():
            for name, tensor in inputs.items():
                version = -1 if tensor.is_inference() else tensor._version  # -1: changes are not tracked
                last = self._last.get(name)
                if version < 0 or last is None or last[0] is not tensor or last[1] != version:
                    self._inputs[name].copy_(tensor, non_blocking=True)
                    self._last[name] = (tensor, version)
            self._launch()
            for name, tensor in owned.items():
                tensor.copy_(self._outputs[name], non_blocking=True)
        return owned

    def forget_graph(self) -> None:
        """The next run binds the memory and captures anew."""
        self._generation = -1

    def _launch(self) -> None:
        self._arena.reserve(self._needed_bytes)
        if self._generation != self._arena.generation:  # the arena is new or has moved: bind it, drop the old graph
            self._context.set_device_memory(self._arena.address, self._arena.size_bytes - ALIGNMENT)
            self._replay = None
            self._enqueue()  # also lets the plan allocate what it allocates once, before anything is captured
            if self._captures:
                self._replay = self._arena.device.capture(self._enqueue)
            self._generation = self._arena.generation
            return
        if self._replay is not None:
            self._replay()
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._arena.device.stream_handle):
            raise RuntimeError("TensorRT could not enqueue the plan; its own message stands above")
