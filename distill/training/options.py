"""What can be chosen of how a recipe is run on the machine at hand, and of how its step is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from distill.checkpoints.sources import WORKDIR
from distill.common.errors import require_least

Precision = Annotated[
    Literal["no", "fp16", "bf16"],
    arg(
        help="The teacher's weights and the student's arithmetic; the student's own weights stay in fp32. no is fp32 "
        "throughout, fp16 needs a GPU."
    ),
]
Optimizer = Annotated[
    Literal["adamw", "adamw-8bit"], arg(help="adamw-8bit keeps its moments in 8 bits (package bitsandbytes).")
]
Accumulation = Annotated[
    int, arg(help="Micro-batches per optimiser step and process; the more, the less memory a step takes.")
]
GradientCheckpointing = Annotated[
    bool, arg(help="Recompute the student's activations in the backward pass: less memory, more work.")
]
Fsdp = Annotated[
    bool, arg(help="Share weights, moments and gradients over the processes instead of copying them (DDP).")
]
Workdir = Annotated[Path, arg(help="Where a model that has to be made or converted is kept.")]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to run a recipe on this machine. Only `mixed_precision` and `optimizer` change what is learned."""

    mixed_precision: Precision = "no"
    optimizer: Optimizer = "adamw"
    accumulation: Accumulation = 1
    gradient_checkpointing: GradientCheckpointing = False
    compile: bool = False
    """Compile each transformer block of both nets by torch.compile."""
    fsdp: Fsdp = False
    report_to: str = ""
    """Trackers that get the losses as curves too, by accelerate: tensorboard (into OUT/trackers), wandb, mlflow, …, several
    with commas, or all that are installed."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    checkpoint_minutes: int = 30
    """Minutes between checkpoints, at the most."""
    keep_checkpoints: int = 2
    """How many of the newest stay, in OUT/state."""
    validate_every: int = 0
    """Steps between pictures at fixed seeds, in OUT/samples; 0 draws them only after each stage."""
    log_every: int = 10
    """Steps between lines of OUT/losses.jsonl."""

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range."""
        above_zero = ("accumulation", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "log_every")
        require_least(1, **{name: getattr(self, name) for name in above_zero})
        require_least(0, validate_every=self.validate_every)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What the training loops are timed on, all at the model's base resolution."""

    model: str = "mini:sdxl"
    """The teacher, as `distill fetch` takes it; random:sdxl has the true size and is made on the device itself."""
    student: str | None = None
    """An architecture of the catalogue or a depth pattern; if not given, SSD-1B's depth."""
    batch: int = 8
    """Samples a step."""
    rounds: int = 12
    """Timed steps of each loop, taken in turn."""
    loops: Annotated[tuple[str, ...], arg(help_behavior_hint="(default: all)")] = ()
    """Only these: published, block, sub-block, layer, self-attention, "output only", "sub-block, no cache",
    "sub-block, text online", "sub-block, compiled", "published LCM", LCM."""
    kernels: bool = False
    """Say by kernel family where each loop's time goes, by torch's profiler, after the timed steps."""
    mixed_precision: Precision = "no"
    gradient_checkpointing: GradientCheckpointing = False
    optimizer: Optimizer = "adamw"
    workdir: Workdir = WORKDIR

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range."""
        require_least(1, batch=self.batch, rounds=self.rounds)
