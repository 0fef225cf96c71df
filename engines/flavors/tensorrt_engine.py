"""Runs one plan at any shape of its profiles, without making the host wait for the GPU."""

from __future__ import annotations

from mmap import mmap
from typing import Any

import torch

from distill.common.errors import UserError
from engines.bundle import Engine, Profile
from engines.flavors.kernel_cache import KernelCache
from engines.flavors.shared_runtime import SharedRuntime
from engines.flavors.tensorrt_context import ShapeContext, Shapes, needed_bytes
from engines.flavors.tensorrt_plan import create_context, deserialise_plan, refit_plan, refit_weights
from engines.flavors.weights import Added
from engines.onnx_folder import OnnxComponent


class TensorRTEngine:
    """One deserialised plan. Each shape gets an execution context at its first call; of more than `most_shapes` the one used
    longest ago goes. Threads take turns: a call is enqueued whole, and the GPU has one stream for all."""

    def __init__(
        self,
        engine: Engine,
        plan: mmap | bytes,
        shared: SharedRuntime,
        rebuild: str,
        weights: OnnxComponent | None = None,
    ) -> None:
        """`rebuild` says what to do where the plan does not run here; `weights` replace the plan's. Raises UserError for a
        plan that does not run here, and torch.OutOfMemoryError where the GPU's memory is too small."""
        # CPython frees attributes in the order they were set. Contexts must go before their config, and that before its
        # kernel cache: TensorRT-RTX does not keep them alive.
        self._contexts: dict[tuple[int, Shapes], ShapeContext] = {}
        self._config: Any = None
        self.record = engine
        self._shared = shared
        self._is_rtx = engine.flavor == "tensorrt-rtx"
        self._source, self._changed = weights, frozenset[str]()
        self._bytes, self._rebuild = plan, rebuild
        self._plan: Any = None
        self.activation_bytes = 0
        stripped = bool(engine.options.get("strip"))
        if stripped and weights is None:
            raise UserError(
                f"{engine.files[0].path} is a plan without weights: name the ONNX folder that holds them, "
                "engines.load(bundle, weights=FOLDER)"
            )
        with shared.device.current():
            if shared.residency.is_limited and not self._is_rtx:
                shared.residency.enter(self)  # TensorRT opens a plan with its weights only
            else:
                self._open()
            if weights is not None and (stripped or not weights.is_source_of(engine)):
                self.refit(weights)
            if self._is_rtx:
                self._config = self._make_config()
            self.activation_bytes = self._measure_activations()
            shared.residency.admit(self)
            if self._config:  # only now: measuring a shape must not compile kernels for it
                self._config.dynamic_shapes_kernel_specialization_strategy = self._specialization()

    def run(self, inputs: dict[str, torch.Tensor], profile: Profile) -> dict[str, torch.Tensor]:
        """Enqueues one call and returns tensors that the caller owns."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items())
        key = (profile.index, shapes)
        with self._shared.lock, self._shared.device.current():
            self._shared.residency.enter(self)
            if is_new := (context := self._contexts.pop(key, None)) is None:
                if len(self._contexts) >= self._shared.options.most_shapes:
                    self._shared.device.synchronize()  # what is dropped may be at work still
                    del self._contexts[next(iter(self._contexts))]
                context = self._open_context(profile, shapes)
            self._contexts[key] = context  # the last one used stands last
            self._shared.residency.enter(self, context.needed_bytes)
            outputs = context.run(inputs)
        if is_new and self._is_rtx:
            self.cache.save()
        return outputs

    def _open(self) -> None:
        """Under a budget a plan of TensorRT-RTX has no weights yet: its contexts can be made without."""
        shared = self._shared
        if shared.residency.is_limited and self._is_rtx:
            shared.runtime.defer_weights_loading = True  # of the next plan only
        self._plan = deserialise_plan(shared, self._bytes, self.record, self._rebuild)
        if not shared.residency.is_limited:
            self._bytes = b""

    def load_weights(self) -> None:
        """Raises torch.OutOfMemoryError where the GPU has no room for them."""
        if self._plan is None:
            self._open()
        elif not self._plan.load_weights(self._bytes):
            raise torch.OutOfMemoryError(
                f"{self.record.flavor} could not bring back the weights of {self.record.component}; its own message stands "
                "above"
            )

    def unload_weights(self) -> None:
        """TensorRT-RTX keeps the contexts. A plan of TensorRT is closed, and opened anew."""
        if not self._is_rtx:
            self._contexts.clear()
            self._plan = None
        elif not self._plan.unload_weights():
            raise RuntimeError(
                f"{self.record.flavor} could not take the weights of {self.record.component} off the GPU"
            )

    def refit(self, weights: OnnxComponent) -> None:
        """See `refit_plan`. Contexts are made anew, since a CUDA graph may hold the old weights, TensorRT-RTX's own too."""
        self._require_unlimited()
        with self._shared.lock:
            refit_plan(self._shared, self._plan, self.record, weights)
            self._source, self._changed = weights, frozenset()
            self._contexts.clear()

    def require_exchangeable(self) -> None:
        """Raises UserError for a plan built without --refit, and where the ONNX file is not named that holds its weights."""
        self._own_weights()

    def _own_weights(self) -> OnnxComponent:
        path = self.record.files[0].path
        self._require_unlimited()
        if not self.record.options.get("refit"):
            raise UserError(
                f"{path} was built without --refit and keeps its weights: rebuild it with --refit on its GPU, or fuse the "
                "LoRA before the build (python -m export onnx --lora FILE)"
            )
        if self._source is None:
            raise UserError(
                f"a plan does not give its weights back, and a LoRA is added to them: name the ONNX folder that {path} was "
                "built from, engines.load(bundle, weights=FOLDER)"
            )
        return self._source

    def _require_unlimited(self) -> None:
        if self._shared.residency.is_limited:
            raise UserError(
                "vram_gb: a plan gets its own weights back, others and LoRAs would be lost; load without it"
            )

    def add_to_weights(self, added: Added) -> None:
        """Refits what is changed now, and what was before."""
        if not added and not self._changed:
            return
        given: dict[str, Any] = dict.fromkeys(self._changed) | dict(added)
        with self._shared.lock:
            refit_weights(self._shared, self._plan, self.record, self._own_weights(), given)
            self._changed = frozenset(added)
            self._contexts.clear()

    def _make_config(self) -> Any:
        """TensorRT-RTX's settings for execution contexts; kernels are not specialised yet."""
        trt, options = self._shared.trt, self._shared.options
        config = self._plan.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        strategies = trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if options.cuda_graphs else strategies.DISABLED
        none = trt.DynamicShapesKernelSpecializationStrategy.NONE
        config.dynamic_shapes_kernel_specialization_strategy = none
        cache = config.create_runtime_cache()
        title = f"{self.record.component}-{self.record.key[:8]}_{self._shared.device.title}"
        self.cache = KernelCache(options.runtime_cache, title, cache)
        config.set_runtime_cache(cache)
        return config

    def _specialization(self) -> Any:
        """How contexts of TensorRT-RTX specialise kernels. By default a ranged profile does it for each shape before its
        first run; an exact profile was specialised by the build."""
        exact = all(shape.min == shape.max for profile in self.record.profiles for shape in profile.shapes.values())
        name = self._shared.options.specialization or ("none" if exact else "eager")
        return getattr(self._shared.trt.DynamicShapesKernelSpecializationStrategy, name.upper())

    def _measure_activations(self) -> int:
        """The activation memory of the largest image size. A ranged profile is measured at each of its sizes, because the
        range itself reaches further than any of them."""
        needed = 0
        for profile in self.record.profiles:
            if len(profile.resolutions) == 1 or all(s.min[2:] == s.max[2:] for s in profile.shapes.values()):
                needed = max(needed, int(self._plan.get_device_memory_size_for_profile_v2(profile.index)))
                continue
            context = create_context(self._shared, self._plan, self._config, self.record)
            self._select_profile(context, profile)
            for resolution in profile.resolutions:
                for name, shape in _largest_shapes(profile, resolution):
                    if not context.set_input_shape(name, shape):
                        raise RuntimeError(f"{self.record.files[0].path}: input {name} cannot be {shape}")
                needed = max(needed, needed_bytes(context, self.record))
        return needed

    def _open_context(self, profile: Profile, shapes: Shapes) -> ShapeContext:
        context = create_context(self._shared, self._plan, self._config, self.record)
        with self._shared.device.ordered():
            self._select_profile(context, profile)
        return ShapeContext(context, self._shared, self.record, shapes)

    def _select_profile(self, context: Any, profile: Profile) -> None:
        """Enqueued once for each context."""
        stream = self._shared.device.stream_handle
        if len(self.record.profiles) > 1 and not context.set_optimization_profile_async(profile.index, stream):
            raise RuntimeError(f"{self.record.files[0].path} has no profile {profile.index}")


def _largest_shapes(profile: Profile, resolution: str) -> list[tuple[str, tuple[int, ...]]]:
    """The inputs' shapes at one image size and the largest batch. The scale from image to input is that of the profile's
    first size, which its `opt` shapes are for."""
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
