"""An engine of the flavors tensorrt and tensorrt-rtx with numpy and cuda-bindings: numpy arrays in, numpy arrays out."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart


def cuda(returned: tuple) -> Any:
    if returned[0] != cudart.cudaError_t.cudaSuccess:
        raise SystemExit(cudart.cudaGetErrorString(returned[0])[1].decode())
    return returned[1] if len(returned) > 1 else None


def runs_here(engine: dict) -> bool:
    built_for, gpu = engine["compute_capabilities"], cuda(cudart.cudaGetDeviceProperties(0))
    fits = f"{gpu.major}.{gpu.minor}" in built_for or (gpu.major >= 8 and "ampere+" in engine["options"].values())
    return fits and import_module(engine["flavor"].replace("-", "_")).__version__ == engine["flavor_version"]


class Engine:
    def __init__(self, bundle: Path, engine: dict) -> None:
        """`engine` is one of the manifest's, its files checked. Activation memory is the caller's: USER_MANAGED."""
        self.record, trt = engine, import_module(engine["flavor"].replace("-", "_"))
        self.stream, self.runtime = cuda(cudart.cudaStreamCreate()), trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self.plan = self.runtime.deserialize_cuda_engine((bundle / engine["files"][0]["path"]).read_bytes())
        self.context = self.plan.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.buffers: dict[tuple[str, int], int] = {}

    def buffer(self, name: str, size_bytes: int) -> int:
        if (name, size_bytes) not in self.buffers:
            self.buffers[name, size_bytes] = cuda(cudart.cudaMalloc(size_bytes))
        return self.buffers[name, size_bytes]

    def __call__(self, feed: dict[str, np.ndarray], size: str) -> dict[str, np.ndarray]:
        index = next(p["index"] for p in self.record["profiles"] if size in p["resolutions"])
        self.context.set_optimization_profile_async(index, self.stream)
        kinds, outputs = cudart.cudaMemcpyKind, {}
        for name, value in feed.items():
            address, value = self.buffer(name, value.nbytes), np.ascontiguousarray(value)
            cuda(cudart.cudaMemcpy(address, value.ctypes.data, value.nbytes, kinds.cudaMemcpyHostToDevice))
            if not self.context.set_input_shape(name, value.shape):
                raise SystemExit(f"profile {index} of the plan takes no {name} of shape {value.shape}")
            self.context.set_tensor_address(name, address)
        for tensor in self.record["outputs"]:
            array = outputs[tensor["name"]] = np.empty(self.context.get_tensor_shape(tensor["name"]), tensor["dtype"])
            self.context.set_tensor_address(tensor["name"], self.buffer(tensor["name"], array.nbytes))
        needed = self.context.update_device_memory_size_for_shapes()
        self.context.set_device_memory(self.buffer("activations", needed), needed)
        if not self.context.execute_async_v3(self.stream):
            raise SystemExit("TensorRT could not run the plan; its own message stands above")
        cuda(cudart.cudaStreamSynchronize(self.stream))
        for name, array in outputs.items():
            address, count = self.buffer(name, array.nbytes), array.nbytes
            cuda(cudart.cudaMemcpy(array.ctypes.data, address, count, kinds.cudaMemcpyDeviceToHost))
        return outputs
