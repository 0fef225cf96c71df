"""Pictures that a student draws while it is trained: always the same prompts and seeds, one row a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from distill.checkpoints.folder import find_family
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.sampling import Sampling
from distill.common.files import replacing
from distill.common.progress import say


def draw_samples(
    student: UNet2DConditionModel,
    checkpoint: Path,
    prompts: tuple[str, ...],
    path: Path,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> None:
    """Draws each prompt by the pipeline folder `checkpoint` with `student` as its UNet, at the first size of its family and
    as `sampling` says (None: in 20 steps), and writes the pictures side by side to `path`. Writes nothing, and says so,
    where the GPU has no memory left beside the training."""
    from PIL import Image

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = load_pipeline(checkpoint, dtype, without=("unet",))
    pipe.unet = student
    pipe.set_progress_bar_config(disable=True)
    size = find_family(checkpoint).resolutions[0]
    called: dict[str, Any] = {"num_inference_steps": 20, "width": size.width, "height": size.height}
    called |= sampling.call_arguments if sampling else {}
    if sampling and sampling.scheduler:
        pipe.scheduler = sampling.make_scheduler(pipe.scheduler.config)
    try:
        pipe.to(device, dtype)
        images = [
            pipe(prompt, **called, generator=torch.Generator().manual_seed(seed + i)).images[0]
            for i, prompt in enumerate(prompts)
        ]
    except torch.OutOfMemoryError:
        say(f"{path.name} was not drawn: the GPU has no memory left for it")
        return
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        row.paste(image, (i * image.width, 0))
    with replacing(path) as temporary:
        row.save(temporary, format="PNG")
