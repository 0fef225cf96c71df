"""What all plans of one bundle share: TensorRT's runtime, a CUDA stream, and one buffer for activations.

Components run one after another on one stream, so the buffer is as large as the largest need, not as the sum.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from engines.flavors import LoadOptions
from engines.flavors.cuda import CudaDevice

ALIGNMENT = 256


class ActivationMemory:
    """One growing buffer. `generation` counts its moves: an execution context that was bound before must bind it again."""

    def __init__(self, device: CudaDevice) -> None:
        self.generation = 0
        self._device = device
        self._buffer = device.empty([0], torch.uint8)

    @property
    def address(self) -> int:
        """Aligned as TensorRT needs it."""
        return -(-self._buffer.data_ptr() // ALIGNMENT) * ALIGNMENT

    @property
    def size_bytes(self) -> int:
        """From `address` on."""
        return max(0, self._buffer.numel() - ALIGNMENT)

    def reserve(self, needed_bytes: int) -> None:
        """Makes the buffer larger where it is too small."""
        if needed_bytes > self.size_bytes or not self._buffer.numel():
            self._buffer = self._device.empty([0], torch.uint8)  # frees the old one before the new one is allocated
            self._buffer = self._device.empty([needed_bytes + ALIGNMENT], torch.uint8)
            self.generation += 1


class SharedRuntime:
    """`trt` is the module of TensorRT or TensorRT-RTX; `lock` is held while a call is enqueued, since all share buffers."""

    def __init__(self, trt: Any, options: LoadOptions, device: CudaDevice | None = None) -> None:
        self.trt = trt
        self.options = options
        self.device = device or CudaDevice(options.device)
        self.memory = ActivationMemory(self.device)
        self.lock = threading.RLock()
        self.logger = trt.Logger(trt.Logger.WARNING)
        with self.device.current():
            self.runtime = trt.Runtime(self.logger)
