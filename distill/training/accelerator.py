"""accelerate set up for the machine at hand."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from distill.common.errors import UserError
from distill.training.options import TrainOptions
from distill.training.sharding import check_no_other_fsdp

PATIENCE = timedelta(hours=2)
"""How long processes wait for one that downloads a teacher, saves a student or draws; NCCL's own ten minutes are few."""
COMPUTE_DTYPE = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(options: TrainOptions, out: Path) -> Accelerator:
    """Raises UserError for fp16 without a GPU, for a missing package, and for FSDP asked of accelerate's launcher."""
    check_no_other_fsdp()
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("--mixed-precision fp16 needs a GPU, and there is none here; use bf16 or no")
    if options.tensorboard:
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else each process of a GPU-less torchrun thinks it is alone
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulation,
        step_scheduler_with_optimizer=False,
        log_with="tensorboard" if options.tensorboard else None,
        project_dir=out,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of them
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
