"""A stand-in for the TensorRT modules and for CUDA: plans that double their first input, and a record of every call.

It checks what the real library would: that memory is bound, large enough and aligned, that addresses are set, and that
the bundle's GPU is CUDA's current one in every call.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

WEIGHTS = {"scale": 2.0}


class FakeDevice:
    """CUDA's streams and graphs, by doing the work at once."""

    title = "Fake-GPU_1.0"
    stream_handle = 7
    depth: ClassVar = {"current": 0, "ordered": 0}  # CUDA's current device and stream are one for all of a thread

    def __init__(self) -> None:
        self.captures = 0
        self.free = 1 << 30
        self.fails_to_capture = False
        self.synchronized = 0

    @contextmanager
    def _inside(self, what: str) -> Iterator[None]:
        self.depth[what] += 1
        try:
            yield
        finally:
            self.depth[what] -= 1

    def current(self) -> AbstractContextManager[None]:
        return self._inside("current")

    def ordered(self) -> AbstractContextManager[None]:
        return self._inside("ordered")

    def free_bytes(self) -> int:
        return self.free

    def empty(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def synchronize(self) -> None:
        self.synchronized += 1

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A graph is captured without being run, and keeps nothing alive that it was captured from."""
        self.captures += 1
        if self.fails_to_capture:
            raise RuntimeError("operation not permitted while the stream is capturing")
        captured = weakref.WeakMethod(work)
        return lambda: (alive := captured()) and alive()


def require_current() -> None:
    assert FakeDevice.depth["current"], "called while another GPU is CUDA's current device"


class FakeContext:
    def __init__(self, plan: FakePlan) -> None:
        self.plan = plan
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.specialization = ""
        self.memory = (0, 0)
        self.profile = 0
        self.enqueued = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return index < self.plan.profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["sample"]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return 16 * int(np.prod(self.shapes["sample"]))

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        self.memory = (address, size)

    def execute_async_v3(self, stream: int) -> bool:
        require_current()
        assert stream == FakeDevice.stream_handle and FakeDevice.depth["ordered"], (
            "beside what the caller's stream does"
        )
        assert self.memory[1] >= self.update_device_memory_size_for_shapes(), "activation memory too small"
        self.enqueued += 1
        count = int(np.prod(self.shapes["sample"]))
        source = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses["sample"]))
        target = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses["out_sample"]))
        target[:] = source * self.plan.scale
        return True


class FakeConfig:
    """It does not keep the cache alive: nor does the real one."""

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache()

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        self.has_cache = True
        return True


class FakePlan:
    def __init__(self, profiles: int) -> None:
        self.profiles = profiles
        self.scale = 2.0
        self.contexts: list[FakeContext] = []
        self.lets_go = False  # do not keep the contexts alive
        self.is_full = False  # no memory for another context
        self.configs: list[Any] = []
        self.refittable, self.fused = {"kernel", "small"}, {"kernel": "small"}
        self.refits: list[dict[str, np.ndarray]] = []

    def create_runtime_config(self) -> FakeConfig:
        self.configs.append(FakeConfig())
        return self.configs[-1]

    def create_execution_context(self, how: Any) -> FakeContext | None:
        require_current()
        if self.is_full:
            return None
        context = FakeContext(self)
        context.specialization = getattr(how, "dynamic_shapes_kernel_specialization_strategy", "")
        self.contexts.append(weakref.proxy(context) if self.lets_go else context)
        return context

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return 100_000 * (index + 1)


class FakeCache:
    def __init__(self) -> None:
        self.content = b"compiled"
        self.loaded: bytes | None = None

    def deserialize(self, blob: bytes) -> bool:
        self.loaded = blob
        return True

    def serialize(self) -> bytes:
        return self.content


class FakeRefitter:
    def __init__(self, plan: FakePlan, logger: Any) -> None:
        require_current()
        self.plan = plan
        self.given: dict[str, np.ndarray] = {}

    def set_named_weights(self, name: str, weights: np.ndarray) -> bool:
        self.given[name] = weights
        return name in self.plan.refittable

    def get_missing_weights(self) -> list[str]:
        """What was fused with a weight that is given."""
        return [other for name, other in self.plan.fused.items() if name in self.given and other not in self.given]

    def refit_cuda_engine_async(self, stream: int) -> bool:
        if self.given:
            self.plan.refits.append(self.given)
        else:
            self.plan.scale = WEIGHTS["scale"]
        return True


class FakeModule:
    """What every use of a TensorRT module begins with."""

    Logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None})
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")


class FakeTensorRT(FakeModule):
    """The module. `plan` is what every deserialisation gives."""

    def __init__(self, profiles: int = 1, header_reasons: int = 0, refuses: bool = False) -> None:
        self.plan, self.refuses = FakePlan(profiles), refuses
        self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="disabled")
        self.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", LAZY="lazy", NONE="none")
        self.EngineValidity = SimpleNamespace(INVALID="invalid", VALID="valid")
        members = {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4, "INSUFFICIENT_GPU_MEMORY": 8}
        self.EngineInvalidityDiagnostics = SimpleNamespace(__members__=members)
        self.Refitter, self.Weights = FakeRefitter, np.asarray
        self.header_reasons = header_reasons

    def Runtime(self, logger: Any) -> Any:
        require_current()

        def deserialise(plan: bytes) -> FakePlan | None:
            require_current()
            return None if self.refuses else self.plan

        verdict = ("invalid" if self.header_reasons else "valid", self.header_reasons)
        return SimpleNamespace(
            engine_header_size=64, get_engine_validity=lambda header: verdict, deserialize_cuda_engine=deserialise
        )

    def OnnxParserRefitter(self, refitter: FakeRefitter, logger: Any) -> Any:
        fault = SimpleNamespace(desc=lambda: "no such file")
        return SimpleNamespace(
            refit_from_file=lambda path: Path(path).is_file(), num_errors=0, get_error=lambda index: fault
        )


class OnnxPlans(FakeModule):
    """A TensorRT module whose plans compute: each runs the ONNX file it was built from, from and to the addresses it
    is given. `graphs` maps a plan's bytes to its ONNX file. It has what a program without torch calls."""

    def __init__(self, graphs: dict[bytes, Path], devices: FakeCudart, version: str) -> None:
        self.__version__ = version

        def deserialise(plan: bytes) -> Any:
            return SimpleNamespace(create_execution_context=lambda how: OnnxContext(graphs[plan], devices, how))

        self.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialise)


class OnnxContext(FakeContext):
    def __init__(self, model: Path, devices: FakeCudart, how: str) -> None:
        import onnxruntime

        assert how == "user", "the plans of slimxl take their activation memory from the caller"
        super().__init__(FakePlan(profiles=9))
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.devices = devices

    def _feed(self) -> dict[str, np.ndarray]:
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        values = self.session.get_inputs()
        assert {value.name for value in values} == set(self.shapes)
        return {
            v.name: self.devices.read(self.addresses.get(v.name), self.shapes[v.name], kinds[v.type]) for v in values
        }

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (array,) = self.session.run([name], self._feed())
        return array.shape

    def update_device_memory_size_for_shapes(self) -> int:
        return 4096

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory[1] >= 4096
        names = [name for name in self.addresses if name not in self.shapes]
        for name, array in zip(names, self.session.run(names, self._feed()), strict=True):
            self.devices.write(self.addresses[name], array)
        return True


class FakeCudart:
    """`cuda.bindings.runtime` over host memory: every copy must lie inside one allocation."""

    def __init__(self, compute_capability: tuple[int, int]) -> None:
        major, minor = compute_capability
        self.cudaError_t = SimpleNamespace(cudaSuccess=0)
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")
        self._memory: dict[int, ctypes.Array] = {}
        self.cudaGetDeviceProperties = lambda device: (0, SimpleNamespace(major=major, minor=minor))
        self.cudaStreamCreate = lambda: (0, 7)
        self.cudaStreamSynchronize = lambda stream: (0,)
        self.cudaGetErrorString = lambda code: (0, b"a fault")

    def cudaMalloc(self, size_bytes: int) -> tuple[int, int]:
        block = (ctypes.c_char * (size_bytes + 256))()
        address = -(-ctypes.addressof(block) // 256) * 256
        self._memory[address] = block
        return 0, address

    def cudaMemcpy(self, target: int, source: int, count: int, kind: str) -> tuple[int]:
        device = target if kind == "in" else source
        assert count + 256 <= len(self._memory[device]), "copy beyond the allocation"
        ctypes.memmove(target, source, count)
        return (0,)

    def read(self, address: int | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        assert address is not None
        self.cudaMemcpy(array.ctypes.data, address, array.nbytes, "out")
        return array

    def write(self, address: int, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self.cudaMemcpy(address, array.ctypes.data, array.nbytes, "in")
