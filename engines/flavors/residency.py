"""What lies in the GPU's memory when: one buffer for activations and, under a budget, the weights that there is room for.

Components run one after another on one stream, so the buffer is as large as the largest need, not as the sum. Under a budget
(`engines.load(…, vram_gb=8)`) a call first makes room for its plan: the buffer shrinks to what the call needs, then the
weights used longest ago leave. They wait in host memory until their plan is called again.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable
from typing import Protocol
from weakref import WeakKeyDictionary

import torch

from distill.common.errors import UserError
from distill.common.files import size_text
from engines.bundle import Engine
from engines.flavors.cuda import CudaDevice

ALIGNMENT = 256
RESERVE_BYTES = 300_000_000
"""Of a budget: for inputs and outputs of each shape, execution contexts and CUDA graphs, which are not counted singly."""


class ActivationMemory:
    """One buffer. `generation` counts its moves: an execution context that was bound before must bind it again."""

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
            self.release()  # the old one goes before the new one is allocated
            self._buffer = self._device.empty([needed_bytes + ALIGNMENT], torch.uint8)

    def release(self) -> None:
        """Gives its memory back to the driver."""
        self._buffer = self._device.empty([0], torch.uint8)
        self._device.free_bytes()
        self.generation += 1


class Plan(Protocol):
    """A plan whose weights can leave the GPU and come back. `activation_bytes` are those of its largest size."""

    record: Engine
    activation_bytes: int

    def load_weights(self) -> None: ...

    def unload_weights(self) -> None:
        """No call of the plan is at work any more."""


class Residency:
    """Which plans of a bundle have their weights on the GPU. Its methods are called by one thread at a time."""

    def __init__(self, device: CudaDevice, budget_bytes: int | None) -> None:
        """Without a budget all weights stay from the load on."""
        self.memory = ActivationMemory(device)
        self._device = device
        self._room = None if budget_bytes is None else min(budget_bytes, device.free_bytes())
        self._plans: WeakKeyDictionary[Plan, int] = WeakKeyDictionary()  # how often each was fetched
        self._here: WeakKeyDictionary[Plan, None] = WeakKeyDictionary()  # the one used last stands last

    @property
    def is_limited(self) -> bool:
        return self._room is not None

    def admit(self, plan: Plan) -> None:
        """Takes note of an open plan. Without a budget it gets its activation memory at once."""
        self._plans.setdefault(plan, 0)
        if not self.is_limited:
            self.memory.reserve(plan.activation_bytes)

    def settle(self) -> None:
        """Once all plans are open. Raises UserError where the budget does not hold each of them alone."""
        if self._room is not None:
            require_room([(plan.record, plan.activation_bytes) for plan in self._plans], self._room)

    def enter(self, plan: Plan, activation_bytes: int = 0) -> None:
        """Before a call: the plan's weights are there, and room for its activations. Raises UserError where the budget does
        not hold both, as it may be for a size that the plan's range only reaches."""
        if self._room is None:
            return
        weights = plan.record.size_bytes
        if weights + activation_bytes + RESERVE_BYTES > self._room:
            require_room([(plan.record, activation_bytes)], self._room)
        free = self._room - RESERVE_BYTES - weights
        others = [one for one in self._here if one is not plan]
        held = sum(one.record.size_bytes for one in others)
        shrinks = self.memory.size_bytes > max(activation_bytes, free - held)
        leaving = []
        while held + activation_bytes > free:
            leaving.append(others.pop(0))
            held -= leaving[-1].record.size_bytes
        is_away = plan not in self._here
        if shrinks or leaving or is_away:
            self._device.synchronize()  # a call may be at work
        if shrinks:
            self.memory.release()
        for one in leaving:
            del self._here[one]
            one.unload_weights()
        if is_away:
            self._fetch(plan)
        self._here.pop(plan, None)
        self._here[plan] = None

    def _fetch(self, plan: Plan) -> None:
        """Says once for each plan what it takes that its weights had left."""
        self._device.free_bytes()  # what torch holds in reserve is the driver's again
        started = time.perf_counter()
        plan.load_weights()
        self._device.synchronize()
        seconds = time.perf_counter() - started
        count = self._plans[plan] = self._plans.get(plan, 0) + 1
        if count == 2:
            warnings.warn(
                f"vram_gb: the weights of the {plan.record.component} had left the GPU, and came back in {seconds:.2f} s "
                f"({size_text(plan.record.size_bytes)}); that is the price each time, and a larger vram_gb saves it",
                stacklevel=2,
            )


def require_room(needs: Iterable[tuple[Engine, int]], room_bytes: int) -> None:
    """Each engine with the bytes of its activations, 0 where they are not known yet. Raises UserError with the least that
    works where one does not fit by itself."""
    engine, activations = max(needs, key=lambda need: need[0].size_bytes + need[1])
    least = engine.size_bytes + activations + RESERVE_BYTES
    if least > room_bytes:
        what = f"{size_text(engine.size_bytes)} of weights"
        what += f", {size_text(activations)} of activations" if activations else ""
        words = "the least that works is" if activations else "with activations it takes more than"
        raise UserError(
            f"{size_text(room_bytes)} of the GPU's memory may be used, and the {engine.component} takes {what} and "
            f"{size_text(RESERVE_BYTES)} for buffers: {words} vram_gb={math.ceil(least / 1e8) / 10:g}; or build for fewer "
            "--resolutions and --batches, or an int8 UNet (python -m export quantise)"
        )
