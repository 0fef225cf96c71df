"""What a training run leaves on disk: its state to go on from, and each stage's student as a whole pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from distill.files import read_json, replacing, write_json
from distill.progress import say
from distill.recipes import Recipe
from distill.sources import load_pipeline, read_config
from distill.surgery import LayerMap


def save_state(accelerator: Accelerator, state: Path, number: int, step: int) -> None:
    """An atomic checkpoint: all processes write into one temporary folder, which is then renamed."""
    temporary = state.with_name(".state.partial")
    if accelerator.is_main_process and temporary.exists():
        shutil.rmtree(temporary)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary), safe_serialization=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / "progress.json", {"stage": number, "step": step})
        with replacing(state) as target:
            temporary.rename(target)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, state: Path, number: int, log: Path) -> int:
    """Loads the last checkpoint of stage `number`; returns its step and cuts the log back to it."""
    step = 0
    if (state / "progress.json").exists() and read_json(state / "progress.json")["stage"] == number:
        accelerator.load_state(str(state))
        step = read_json(state / "progress.json")["step"]
        say(f"going on from stage {number + 1}, step {step}")
    if accelerator.is_main_process and log.exists():
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line for line in lines if (int(line["stage"].split("-")[0]), line["step"]) <= (number + 1, step)]
        with replacing(log) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    accelerator.wait_for_everyone()
    return step


def save_student(
    student: UNet2DConditionModel, teacher_folder: Path, folder: Path, layer_map: LayerMap, recipe: Recipe, number: int
) -> None:
    """A whole pipeline folder: the student's UNet, everything else as the teacher has it, pictures at fixed seeds."""
    dtype = torch.float32 if read_config(teacher_folder, "unet")["block_out_channels"][0] < 320 else torch.float16
    with replacing(folder) as temporary:
        shutil.copytree(
            teacher_folder, temporary, ignore=shutil.ignore_patterns("unet", "samples", "*.jsonl", "slimxl.json")
        )
        student.to(dtype).save_pretrained(temporary / "unet", safe_serialization=True)
        write_json(
            temporary / "slimxl.json",
            {
                "student": recipe.stages[number].student,
                "layer_map": {path: list(blocks) for path, blocks in layer_map.items()},
                "stages_done": number + 1,
                "parameters": sum(p.numel() for p in student.parameters()),
                "recipe": recipe.as_dict(),
            },
        )
        _draw_validation(temporary, recipe.validation_prompts, temporary / "samples.png")


def _draw_validation(checkpoint: Path, prompts: tuple[str, ...], path: Path, *, steps: int = 20, seed: int = 0) -> None:
    """One row of pictures of `prompts`, at the model's own base resolution and a fixed seed."""
    from PIL import Image

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load_pipeline(checkpoint, torch.float16 if device == "cuda" else torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    images = pipe(list(prompts), num_inference_steps=steps, generator=generators).images
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for i, image in enumerate(images):
        row.paste(image, (i * image.width, 0))
    row.save(path, format="PNG")


def alphas_cumprod_of(teacher_folder: Path) -> torch.Tensor:
    """Signal variance per timestep, from the teacher's own scheduler config."""
    from diffusers import DDPMScheduler

    config = read_json(teacher_folder / "scheduler" / "scheduler_config.json")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    return DDPMScheduler(**{name: config[name] for name in names if name in config}).alphas_cumprod.float()
