"""What all plans of one bundle share: TensorRT's runtime, a CUDA stream, and the GPU's memory."""

from __future__ import annotations

import threading
from typing import Any

from engines.flavors import LoadOptions
from engines.flavors.cuda import CudaDevice
from engines.flavors.residency import Residency


class SharedRuntime:
    """`trt` is the module of TensorRT or TensorRT-RTX; `lock` is held while a call is enqueued, since all share buffers."""

    def __init__(self, trt: Any, options: LoadOptions, device: CudaDevice | None = None) -> None:
        self.trt = trt
        self.options = options
        self.device = device or CudaDevice(options.device)
        self.residency = Residency(self.device, options.vram_bytes)
        self.memory = self.residency.memory
        self.lock = threading.RLock()
        self.logger = trt.Logger(trt.Logger.WARNING)
        with self.device.current():
            self.runtime = trt.Runtime(self.logger)
