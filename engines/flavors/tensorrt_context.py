"""One plan at one shape: fixed buffers, and a CUDA graph captured over them.

A UNet step launches thousands of small kernels; as a CUDA graph they are launched with one call. A graph keeps the
addresses it was captured with, so inputs and outputs have fixed buffers. An input that is the same tensor as last time
(prompt embeddings, through the whole denoise loop) is not copied again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from engines.bundle import Engine
from engines.flavors.shared_runtime import SharedRuntime

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def needed_bytes(context: Any, engine: Engine) -> int:
    """The activation memory of the shapes that are set. A plan built before TensorRT 10.10 says its profile's largest."""
    count = int(context.update_device_memory_size_for_shapes())
    if count <= 0:
        raise RuntimeError(f"{engine.component}: TensorRT does not say how much memory its shapes need")
    return count


class ShapeContext:
    """An execution context with the shape of every input set."""

    def __init__(self, context: Any, shared: SharedRuntime, engine: Engine, shapes: Shapes) -> None:
        """`context` has its profile selected. TensorRT-RTX captures graphs itself, so only TensorRT's are captured here."""
        self._context, self._shared, self._component = context, shared, engine.component
        self._captures = shared.options.cuda_graphs and engine.flavor == "tensorrt"
        self._replay: Callable[[], None] | None = None
        self._generation = -1
        self._last: dict[str, tuple[torch.Tensor, int]] = {}
        for name, shape in shapes:
            if not context.set_input_shape(name, shape):
                raise RuntimeError(f"{engine.component}: input {name} cannot be {shape}")
        dtypes = {tensor.name: tensor.torch_dtype for tensor in (*engine.inputs, *engine.outputs)}
        self._inputs = {name: shared.device.empty(list(shape), dtypes[name]) for name, shape in shapes}
        self._outputs = {
            tensor.name: shared.device.empty(list(context.get_tensor_shape(tensor.name)), dtypes[tensor.name])
            for tensor in engine.outputs
        }
        for name, tensor in (self._inputs | self._outputs).items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise RuntimeError(f"{engine.component}: TensorRT takes no address for {name}")
        self.needed_bytes = needed_bytes(context, engine)

    def run(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Enqueues one call. The outputs are copies that the caller owns: a multi-step scheduler keeps several."""
        owned = {name: torch.empty_like(tensor) for name, tensor in self._outputs.items()}
        with self._shared.device.ordered():
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

    def _launch(self) -> None:
        memory = self._shared.memory
        memory.reserve(self.needed_bytes)
        if self._generation == memory.generation:
            (self._replay or self._enqueue)()
            return
        self._context.set_device_memory(memory.address, memory.size_bytes)
        self._replay = None
        self._enqueue()  # before any capture: the first run allocates what a plan allocates only once
        if self._captures:
            self._replay = self._capture()
        self._generation = memory.generation

    def _capture(self) -> Callable[[], None] | None:
        """None where CUDA refuses, as while another part of the program makes the host wait for the device."""
        try:
            return self._shared.device.capture(self._enqueue)
        except RuntimeError as error:
            self._captures = False
            warnings.warn(
                f"{self._component} runs without a CUDA graph, so its host needs longer for each step: {error}",
                stacklevel=2,
            )
            return None

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._shared.device.stream_handle):
            raise RuntimeError(f"TensorRT could not enqueue {self._component}; its own message stands above")
