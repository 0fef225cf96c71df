"""The few things a plan needs of CUDA, so that what is done with them can be tested without a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

_CAPTURE = threading.Lock()


class CudaDevice:
    """A stream of its own on one GPU. TensorRT synchronises with the host when it is given the default stream, so
    every plan runs here, and the two streams are ordered by events, which the host does not wait for."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device)

    @property
    def stream_handle(self) -> int:
        return int(self.stream.cuda_stream)

    @property
    def title(self) -> str:
        """GPU and driver, as part of a file name: what compiled kernels belong to."""
        import pynvml

        pynvml.nvmlInit()
        name = torch.cuda.get_device_name(self.device).replace(" ", "-").replace("/", "-")
        return f"{name}_{pynvml.nvmlSystemGetDriverVersion()}"

    def empty(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def free_bytes(self) -> int:
        """What the driver can still hand out, once torch has given back what it keeps in reserve: TensorRT allocates
        from the driver, not from torch."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def current(self) -> AbstractContextManager[None]:
        """CUDA's current device inside: TensorRT has no other way of being told one, and each thread starts with 0."""
        return torch.cuda.device(self.device)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Work inside comes after what the caller's stream has been given, and before what it is given next."""
        callers = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(callers)
        with torch.cuda.stream(self.stream):
            yield
        callers.wait_stream(self.stream)

    def synchronize(self) -> None:
        """Waits for all that the stream was given."""
        self.stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """The kernels that `work` launches, as one CUDA graph to be launched again at the cost of one call. Other threads
        may go on with their pipelines, and wait only to capture graphs of their own."""
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE:
            self.synchronize()  # once for each shape: capture must not meet work that is still in flight
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                work()
        return graph.replay
