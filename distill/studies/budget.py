"""What a recipe takes on GPUs of a known speed, predicted: bytes of cache, hours, GPU-hours. Nothing here is measured.

The arithmetic is counted on meta tensors, and divided by a share of the GPU's peak: of the teacher and the student in half
precision at the peak, the VAE in TF32 at half of it, the cache's text encoders in fp32 at a sixteenth (an A100's ratios).
What the disk, the network between GPUs and the optimiser take is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.common.errors import require_above, require_between, require_least
from distill.common.files import size_text
from distill.data.make_cache import sample_bytes
from distill.data.samples import Text
from distill.models.architectures import Architecture
from distill.models.catalogue import meta_unet, text_tflop, unet_tflop
from distill.models.families import Family
from distill.models.networks import make_network
from distill.training.recipes import Recipe

TF32, FP32 = 1 / 2, 1 / 16


@dataclass(frozen=True, kw_only=True)
class Budget:
    """TFLOP at the GPU's full rate, for the cache of all samples and for all steps."""

    cache_bytes: int
    cache_tflop: float
    training_tflop: float


def vae_encoder_tflop(family: Family) -> float:
    """Compute of encoding one picture of the base size, in units of 1e12 floating-point operations."""
    size = family.resolutions[0]
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        make_network("vae", family.vae).encode(torch.empty(1, 3, size.height, size.width))
    return counter.get_total_flops() / 1e12


def count_budget(recipe: Recipe, teacher: Architecture, samples: int, *, text: Text, checkpointing: bool) -> Budget:
    """Of a recipe whose data are `samples` pictures of the base size. A step is the teacher's pass and three times the
    student's, four where its activations are recomputed."""
    family = teacher.family
    size = family.resolutions[0]
    students = [stage.student.architecture_of(teacher) for stage in recipe.stages]
    forward = {str(one.depth): unet_tflop(meta_unet(one), one, size, batch=1) for one in students}
    of_teacher, of_text = unet_tflop(meta_unet(teacher), teacher, size, batch=1), text_tflop(family)
    training = sum(
        stage.steps
        * recipe.batch_size
        * (
            stage.objective.needs_teacher * of_teacher
            + (3 + checkpointing) * forward[str(student.depth)]
            + (text == "online") * of_text
        )
        for stage, student in zip(recipe.stages, students, strict=True)
    )
    cached = vae_encoder_tflop(family) / TF32 + (text == "cached") * of_text / FP32
    return Budget(
        cache_bytes=samples * sample_bytes(family, text),
        cache_tflop=samples * cached,
        training_tflop=training,
    )


def describe_budget(
    budget: Budget, title: str, gpus: Sequence[int], *, peak_tflops: float, share_of_peak: float
) -> list[str]:
    """An aligned table, one line for each number of GPUs. Raises UserError for numbers out of range."""
    require_above(0, peak_tflops=peak_tflops)
    require_between(0.01, 1, share_of_peak=share_of_peak)
    rate = peak_tflops * share_of_peak * 3600
    lines = [
        f"predicted, not measured: {title}, {share_of_peak:.0%} of {peak_tflops:g} TFLOP/s; "
        f"cache {size_text(budget.cache_bytes)}",
        f"{'GPUs':>5} {'cache, hours':>14} {'training, hours':>16} {'GPU-hours':>10}",
    ]
    for count in gpus:
        require_least(1, gpus=count)
        cache, training = budget.cache_tflop / rate, budget.training_tflop / rate
        lines.append(f"{count:5} {cache / count:14,.1f} {training / count:16,.1f} {cache + training:10,.0f}")
    return lines
