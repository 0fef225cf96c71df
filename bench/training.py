"""How fast a distillation step is at full size: the trainer's own step, on random weights and random pictures.

The step is the trainer's own (`distill.training.pair`), so a change there shows here; clipping and the one wait for
the loss values are timed too, reading the cache and the moving average are not. Rows differ in one thing each: which
features are compared, whether latents and text come from the cache or are encoded in every step (as the published
scripts do), recomputation, compilation.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from bench.floor.peaks import Peak
from bench.floor.roofline import architecture_configs, component_costs
from bench.measure.kernels import by_family, kernel_times
from bench.measure.workload import Workload
from bench.stats import median_interval
from distill.models.architectures import find_architecture
from distill.models.resolution import Resolution
from distill.training.recipes import Level

WARMUP = 2
NO_TIME = "not run"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One arrangement of the step. `features` None compares predictions alone."""

    features: Level | None = "sub-block"
    cache: bool = True
    recompute: bool = True
    compiled: bool = False

    @property
    def title(self) -> str:
        parts = [f"{self.features} features" if self.features else "no features"]
        parts += ["cached latents and text" if self.cache else "VAE and text encoders in every step"]
        parts += ["gradient checkpointing"] * self.recompute + ["compiled blocks"] * self.compiled
        return ", ".join(parts)


VARIANTS = (  # in the order of their worth; the first is the recipe's, the second as published
    Variant(),
    Variant(cache=False),
    Variant(features=None),
    Variant(features="self-attention"),
    Variant(features="block"),
    Variant(features="layer"),
    Variant(recompute=False),
    Variant(compiled=True),
    Variant(recompute=False, compiled=True),
)


def step_flops(teacher: str, student: str, resolution: Resolution, batch: int) -> float:
    """FLOPs of one step: one teacher forward, and three times the student's forward (backward is two of them).
    Recomputation and encoding are not counted: they are cost, not purpose."""
    workload = Workload(resolution=resolution, steps=1, batch=batch, guidance_scale=1.0)
    costs = [component_costs(architecture_configs(name), workload)["unet"][1].flops for name in (teacher, student)]
    return costs[0] + 3 * costs[1]


class Bench:
    """Teacher, student and optimiser as the trainer pairs them, in bf16 mixed precision, for one pair of models."""

    def __init__(self, teacher: str, student: str, device: str, batch: int) -> None:
        import torch
        from accelerate import Accelerator
        from diffusers import DDPMScheduler, UNet2DConditionModel

        from distill.models.module_map import make_layer_map
        from distill.training.options import TrainOptions
        from distill.training.pair import Pair
        from distill.training.recipes import Recipe

        self.teacher_spec, self.student_spec = find_architecture(teacher), find_architecture(student)
        self.family, self.batch, self.device = self.teacher_spec.family, batch, device
        self.resolution = self.family.resolutions[0]
        torch.manual_seed(0)
        with torch.device(device):
            nets = (
                UNet2DConditionModel(**self.teacher_spec.unet_config).to(torch.bfloat16).eval(),
                UNet2DConditionModel(**self.student_spec.unet_config).train(),
            )
        schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.pair = Pair(
            Accelerator(cpu=not device.startswith("cuda"), mixed_precision="bf16"),
            *nets,
            make_layer_map("first", self.teacher_spec.depth, self.student_spec.depth),
            schedule.alphas_cumprod.float(),
            Recipe(name="bench", stages=(), batch_size=batch),
            TrainOptions(mixed_precision="bf16"),
        )

    @contextmanager
    def stepping(self, variant: Variant) -> Iterator[Callable[[int], dict[str, float]]]:
        """A function that takes one step by its number and returns the loss terms."""
        from distill.training.recipes import LossWeights

        losses = LossWeights(level=variant.features) if variant.features else LossWeights(feature=0.0)
        student = self.pair.student
        (student.enable_gradient_checkpointing if variant.recompute else student.disable_gradient_checkpointing)()
        make_batch = self._cached() if variant.cache else self._encoding()
        with self.pair.taught_by(losses) as step:
            try:
                yield lambda number: step(self.pair.noised(make_batch(number), (0, number)), learning_rate=1e-5)
            finally:
                self.pair.optimizer.zero_grad()

    def _cached(self) -> Callable[[int], dict[str, Any]]:
        """Batches as the latent cache gives them: FIELDS on the CPU, in fp32."""
        import torch

        from distill.data.cache import FIELDS

        family, side = self.family, self.family.vae_scale_factor
        shapes = (
            (4, self.resolution.height // side, self.resolution.width // side),
            (family.text_encoder["max_position_embeddings"], family.unet["cross_attention_dim"]),
            (family.text_encoder_2["projection_dim"],),
        )
        fields = dict(zip(FIELDS, (torch.randn(self.batch, *shape) for shape in shapes), strict=False))
        height, width = self.resolution.height, self.resolution.width
        fields["time_ids"] = torch.tensor([[height, width, 0, 0, height, width]] * self.batch).float()
        return lambda _number: fields

    def _encoding(self) -> Callable[[int], dict[str, Any]]:
        """VAE and text encoders at work in every step, in bf16."""
        import torch

        from bench.contestants.random_weights import random_pipeline
        from distill.studies.bench import Encoding, base_samples

        pipe = random_pipeline(self.student_spec.name, self.device, torch.bfloat16)
        pipe.unet = None
        return Encoding(pipe, base_samples(self.family, self.batch)).batch


def measure_variant(bench: Bench, variant: Variant, peak: Peak | None, steps: int) -> dict[str, Any]:
    """Samples per second of `steps` steps after two that are left out, peak memory, MFU, the first step's seconds; for
    the recipe's own arrangement and the compiled ones also where the time goes, by family of kernel."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = bench.device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    with bench.stepping(variant) as step:
        for number in range(WARMUP + steps):
            begin = time.perf_counter()
            terms = step(number)  # ends with the loss values on the host, so the device is done
            seconds.append(time.perf_counter() - begin)
        first, seconds = seconds[0], seconds[WARMUP:]
        median = median_interval(seconds)
        memory = torch.cuda.max_memory_allocated() if on_gpu else None
        kernels = None
        if variant == VARIANTS[0] or variant.compiled:
            with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
                step(WARMUP + steps)
            kernels = by_family(kernel_times(profiler, bench.device), 1, 1e3 * median.value)
    flops = step_flops(bench.teacher_spec.name, bench.student_spec.name, bench.resolution, bench.batch)
    return {
        "seconds_per_step": seconds,
        "first_step_s": first,
        "steps": steps,
        "samples_per_s": bench.batch / median.value,
        "samples_per_s_interval": [bench.batch / median.high, bench.batch / median.low]
        if median.low and median.high
        else None,
        "tflop_per_sample": flops / bench.batch / 1e12,
        "mfu": flops / median.value / (peak.tflops * 1e12) if peak else None,
        "mfu_why": None if peak else "no peak is known for this device",
        "peak_memory_bytes": memory,
        "loss_terms": len(terms.keys() - {"total", "gradient_norm"}),
        "kernels": kernels,
    }


def measure_training(
    teacher: str,
    student: str,
    *,
    device: str,
    batch: int,
    peak: Peak | None,
    steps: int = 6,
    variants: tuple[Variant, ...] = VARIANTS,
    left_s: Callable[[], float] = lambda: float("inf"),
    on_row: Callable[[dict[str, Any]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """One row per variant: what it is, and either its figures or `failed` with the reason (out of memory, no time).

    `on_row` is called after each, so that a run that is cut short keeps what it has.
    """
    bench, compiled, rows = Bench(teacher, student, device, batch), False, []
    for variant in sorted(variants, key=lambda one: one.compiled):
        row = {"kind": "measured", "teacher": teacher, "student": student, "title": variant.title, **asdict(variant)}
        row |= {"resolution": str(bench.resolution), "batch": batch, "precision": "bf16", "failed": None}
        needed_s = 40 if variant.compiled else 12
        if left_s() < needed_s:
            row["failed"] = f"{NO_TIME}: {left_s():.0f} s left, it needs about {needed_s}"
        else:
            try:
                if variant.compiled and not compiled:
                    bench.pair.compile_blocks()
                    compiled = True
                row |= measure_variant(bench, variant, peak, steps)
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                gc.collect()
        rows.append(row)
        on_row(row)
    return rows
