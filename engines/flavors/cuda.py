"""What plans need of CUDA: a stream, allocation, graphs. Tests replace it to run without a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

_CAPTURE = threading.Lock()


class CudaDevice:
    """One GPU and a stream on it that all plans run on. TensorRT makes the host wait when it gets the default stream; events
    between this stream and the caller's do not."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device)

    @property
    def stream_handle(self) -> int:
        return int(self.stream.cuda_stream)

    @property
    def title(self) -> str:
        """GPU and driver, for the name of a kernel cache: compiled kernels fit no others."""
        import pynvml

        pynvml.nvmlInit()
        name = torch.cuda.get_device_name(self.device).replace(" ", "-").replace("/", "-")
        return f"{name}_{pynvml.nvmlSystemGetDriverVersion()}"

    def empty(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def free_bytes(self) -> int:
        """Releases the memory that torch keeps in reserve, and returns what the driver then has free: TensorRT allocates
        from the driver, not from torch."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def current(self) -> AbstractContextManager[None]:
        """Makes this GPU CUDA's current device: TensorRT uses the current one, and every thread starts with device 0."""
        return torch.cuda.device(self.device)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Work enqueued inside runs after all earlier work of the caller's stream and before all later work."""
        callers = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(callers)
        with torch.cuda.stream(self.stream):
            yield
        callers.wait_stream(self.stream)

    def synchronize(self) -> None:
        """Makes the host wait for the stream."""
        self.stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Captures the kernels that `work` launches as a CUDA graph, and returns the call that launches it. Other threads
        can run their pipelines meanwhile; only one captures at a time."""
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE:
            self.synchronize()  # once for each shape: no work may be in flight during a capture
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                work()
        return graph.replay
