"""How fast a distillation step is: teacher forward, student forward and backward, optimiser, at full size.

The work is that of the trainer's inner step on random latents; what a data loader would add is left out, since it
runs beside the device.
"""

from __future__ import annotations

import time
from typing import Any

from bench.peaks import Peak
from bench.roofline import architecture_configs, component_costs
from bench.stats import median_interval
from bench.workload import Workload
from distill.architectures import ARCHITECTURES, Resolution


def step_flops(teacher: str, student: str, resolution: Resolution, batch: int) -> float:
    """FLOPs of one step: one teacher forward, and three times the student's forward (backward is two of them)."""
    workload = Workload(resolution=resolution, steps=1, batch=batch, guidance_scale=1.0)
    costs = [component_costs(architecture_configs(name), workload)["unet"][1].flops for name in (teacher, student)]
    return costs[0] + 3 * costs[1]


def measure_training(
    teacher: str, student: str, *, device: str, batch: int, peak: Peak | None, steps: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Samples per second and MFU of the distillation step in bf16, the first two steps left out as warm-up."""
    import torch
    from diffusers import UNet2DConditionModel

    family = ARCHITECTURES[teacher].family
    resolution = family.resolutions[0]
    torch.manual_seed(seed)
    with torch.device(device):
        teacher_unet = UNet2DConditionModel(**ARCHITECTURES[teacher].unet_config).to(torch.bfloat16)
        student_unet = UNet2DConditionModel(**ARCHITECTURES[student].unet_config).train()
    teacher_unet.eval().requires_grad_(False)
    student_unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(student_unet.parameters(), lr=1e-5, fused=device.startswith("cuda"))
    side = family.vae_scale_factor
    tokens = family.text_encoder["max_position_embeddings"]
    pooled = family.text_encoder_2["projection_dim"]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    latents = random(batch, 4, resolution.height // side, resolution.width // side)
    hidden = random(batch, tokens, family.unet["cross_attention_dim"])
    added = {"text_embeds": random(batch, pooled), "time_ids": torch.full((batch, 6), 1024.0, device=device)}
    timesteps = torch.full((batch,), 500, device=device)
    half = {key: value.to(torch.bfloat16) for key, value in added.items()}

    def step() -> float:
        with torch.no_grad():
            target = teacher_unet(latents.bfloat16(), timesteps, hidden.bfloat16(), added_cond_kwargs=half).sample
        with torch.autocast(device.partition(":")[0], torch.bfloat16):
            noise_pred = student_unet(latents, timesteps, hidden, added_cond_kwargs=added).sample
            loss = torch.nn.functional.mse_loss(noise_pred.float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    seconds = []
    for index in range(steps + 2):
        begin = time.perf_counter()
        step()
        if index >= 2:
            seconds.append(time.perf_counter() - begin)
    median = median_interval(seconds)
    flops = step_flops(teacher, student, resolution, batch)
    return {
        "kind": "measured",
        "teacher": teacher,
        "student": student,
        "resolution": str(resolution),
        "batch": batch,
        "seconds_per_step": seconds,
        "samples_per_s": batch / median.value,
        "mfu": flops / median.value / (peak.tflops * 1e12) if peak else None,
        "mfu_why": None if peak else "no peak is known for this device",
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else None,
        "recomputation": "gradient checkpointing; its extra forward is not counted as useful FLOPs",
    }
