"""The one training loop: every stage of every recipe, on one process or on many (accelerate).

What makes a run exactly repeatable is that nothing depends on history but the weights and the optimiser: the batch,
the noise, the timesteps and the dropped captions of a step are functions of (seed, stage, step, sample), so a run that
was killed ends in the same bytes as one that was not, and N processes see what one would.

The teacher is never given to accelerate's `prepare`: its save hooks receive every prepared model, and so a teacher
was once saved over its student.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from distill.architectures import Depth, find_architecture
from distill.cache import LatentCache, seed_of
from distill.checkpoints import alphas_cumprod_of, resume, save_state, save_student
from distill.errors import UserError
from distill.files import read_json, replacing, sha256_json, write_json
from distill.losses import feature_losses, min_snr_weight, prediction_loss
from distill.progress import track
from distill.recipes import Recipe, Stage
from distill.sources import checkpoint_hash, find_architecture_of, load_component, read_config, resolve
from distill.surgery import LayerMap, make_layer_map, make_student_unet
from distill.taps import FeatureRecorder, make_taps


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to run a recipe on this machine; nothing here changes what is learned but the precision."""

    mixed_precision: str = "no"
    accumulation: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoint_every: int = 500
    log_every: int = 10


def relative_map(layer_map: LayerMap, held: LayerMap | None) -> LayerMap:
    """The layer map from what an earlier student holds: both maps name blocks of the original teacher.

    `held` None is the teacher itself. Raises UserError where the new student wants a block the earlier one dropped.
    """
    if held is None:
        return layer_map
    relative = {}
    for path, wanted in layer_map.items():
        missing = sorted(set(wanted) - set(held.get(path, ())))
        if missing:
            raise UserError(
                f"{path}: the stage keeps teacher blocks {list(wanted)}, but the student it starts from has only "
                f"{list(held.get(path, ()))}; use nested layer maps"
            )
        relative[path] = tuple(held[path].index(block) for block in wanted)
    return relative


def check_successor(first: Path, teacher: Path) -> None:
    """Raises UserError where a later teacher differs from the first in architecture or prediction type."""
    ignored = ("_class_name", "_diffusers_version", "_name_or_path", "sample_size")
    before, now = (read_config(folder, "unet") for folder in (first, teacher))
    for key in sorted((before.keys() | now.keys()) - set(ignored)):
        if before.get(key) != now.get(key):
            raise UserError(
                f"teacher {teacher} cannot succeed {first}: UNet {key} is {now.get(key)!r}, was {before.get(key)!r}"
            )
    for folder in (first, teacher):
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
        if scheduler.get("prediction_type", "epsilon") != "epsilon":
            raise UserError(
                f"teacher {folder} predicts {scheduler['prediction_type']!r}; SDXL's distillation needs 'epsilon'"
            )


def train(
    recipe: Recipe,
    *,
    cache: Path,
    out: Path,
    workdir: Path,
    start: Path | None = None,
    options: TrainOptions | None = None,
) -> None:
    """Runs all stages of `recipe` on the latent cache; `out` becomes a diffusers pipeline folder of the last student.

    `start` is an earlier student to begin from (default: the first stage's teacher). A finished `out` is left as it
    is; an unfinished one goes on from its last checkpoint. Raises UserError for an `out` of another recipe, layer maps
    that are not nested, a teacher that cannot succeed the one before, and a loss that is no longer finite.
    """
    options = options or TrainOptions()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else each process of a GPU-less torchrun thinks it is alone
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulation,
        step_scheduler_with_optimizer=False,
    )
    per_process, rest = divmod(recipe.batch_size, accelerator.num_processes * options.accumulation)
    if rest or not per_process:
        raise UserError(
            f"batch size {recipe.batch_size} cannot be shared by {accelerator.num_processes} processes x "
            f"{options.accumulation} accumulation steps"
        )
    latents = LatentCache(cache, batch_size=recipe.batch_size, seed=recipe.seed)
    teachers = {stage.teacher: resolve(stage.teacher, workdir) for stage in recipe.stages}
    for teacher in list(teachers.values())[1:]:
        check_successor(next(iter(teachers.values())), teacher)
    run = {
        "recipe": recipe.as_dict(),
        "teachers": {name: checkpoint_hash(folder) for name, folder in teachers.items()},
        "start": checkpoint_hash(start) if start else None,
        "cache": latents.key,
        "mixed_precision": options.mixed_precision,
    }
    run["key"] = sha256_json(run)
    if (out / "slimxl.json").exists() and read_json(out / "slimxl.json")["key"] == run["key"]:
        return
    if (out / "run.json").exists() and read_json(out / "run.json")["key"] != run["key"]:
        raise UserError(f"{out} belongs to another recipe, teacher or cache; choose another --out or remove it")
    if accelerator.is_main_process:
        write_json(out / "run.json", run)
    accelerator.wait_for_everyone()
    previous = start
    for number, stage in enumerate(recipe.stages):
        previous = _run_stage(accelerator, recipe, number, teachers[stage.teacher], previous, latents, out, options)
    if accelerator.is_main_process:
        _finish(out, previous or teachers[recipe.stages[0].teacher], run)
    accelerator.wait_for_everyone()


def _finish(out: Path, last: Path, run: dict[str, Any]) -> None:
    """Moves the last stage's pipeline up to `out`; slimxl.json comes last and says that all is there."""
    about = read_json(last / "slimxl.json")
    for item in last.iterdir():
        target = out / item.name
        if item.name != "slimxl.json":
            with replacing(target) as temporary:
                shutil.copytree(item, temporary) if item.is_dir() else shutil.copy2(item, temporary)
    write_json(out / "slimxl.json", about | run)
    shutil.rmtree(out / "stages")


def _layer_map_of(folder: Path) -> LayerMap:
    return {path: tuple(blocks) for path, blocks in read_json(folder / "slimxl.json")["layer_map"].items()}


def _run_stage(
    accelerator: Accelerator,
    recipe: Recipe,
    number: int,
    teacher_folder: Path,
    previous: Path | None,
    latents: LatentCache,
    out: Path,
    options: TrainOptions,
) -> Path:
    stage = recipe.stages[number]
    folder = out / "stages" / f"{number + 1:02d}-{stage.name}"
    if (folder / "slimxl.json").exists():
        return folder
    family = find_architecture_of(teacher_folder).family
    student_spec = find_architecture(stage.student, family)
    teacher_depth = Depth.from_config(read_config(teacher_folder, "unet"))
    layer_map = make_layer_map(stage.layer_map, teacher_depth, student_spec.depth)
    initial = out / "stages" / f"{number + 1:02d}-initial"
    if accelerator.is_main_process and not initial.exists():
        source = previous or teacher_folder
        make_student_unet(
            source, student_spec, relative_map(layer_map, _layer_map_of(previous) if previous else None), initial
        )
    accelerator.wait_for_everyone()

    device = accelerator.device
    half = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.mixed_precision]
    teacher = load_component(teacher_folder, "unet", half).to(device).requires_grad_(False)
    student = UNet2DConditionModel.from_pretrained(initial, torch_dtype=torch.float32).train()
    ema = EMAModel(student.parameters(), decay=recipe.ema_decay) if recipe.ema_decay else None
    taps = make_taps(stage.losses.level, teacher_depth, student_spec.depth, layer_map) if stage.losses.feature else ()
    recorders = (
        FeatureRecorder(student, [tap.student for tap in taps]),
        FeatureRecorder(teacher, sorted({tap.teacher for tap in taps})),
    )
    if options.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if options.compile:
        student.compile_repeated_blocks()
        teacher.compile_repeated_blocks()
    optimizer = torch.optim.AdamW(student.parameters(), lr=stage.learning_rate, weight_decay=recipe.weight_decay)
    model, optimizer = accelerator.prepare(student, optimizer)
    if ema:
        ema.to(device)
        accelerator.register_for_checkpointing(ema)

    state = out / "state"
    first_step = resume(accelerator, state, number, out / "losses.jsonl")
    alphas_cumprod = alphas_cumprod_of(teacher_folder).to(device)
    started = time.monotonic()
    steps = range(first_step, stage.steps)
    title = f"{recipe.name} {number + 1}/{len(recipe.stages)} {stage.name}"
    for step in track(steps, title, done=first_step) if accelerator.is_main_process else steps:
        terms = _step(
            accelerator,
            recipe,
            number,
            step,
            latents,
            model,
            teacher,
            taps,
            recorders,
            alphas_cumprod,
            optimizer,
            options,
        )
        if ema:
            ema.step(student.parameters())
        if not math.isfinite(terms["total"]):
            broken = [name for name, value in terms.items() if not math.isfinite(value)]
            raise UserError(
                f"{title}: step {step} is not finite ({', '.join(broken[:4])}); the last good state is in {state}; lower "
                " the learning rate or use bf16 instead of fp16"
            )
        done = step + 1
        if accelerator.is_main_process and (done % options.log_every == 0 or done == stage.steps):
            line = {
                "stage": f"{number + 1}-{stage.name}",
                "step": done,
                "seconds": round(time.monotonic() - started, 3),
                "lr": optimizer.param_groups[0]["lr"],
                "loss": terms.pop("total"),
                "terms": terms,
            }
            with (out / "losses.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if done % options.checkpoint_every == 0 and done < stage.steps:
            save_state(accelerator, state, number, done)
    accelerator.wait_for_everyone()
    for recorder in recorders:
        recorder.remove()
    if accelerator.is_main_process:
        if ema:
            ema.copy_to(student.parameters())
        save_student(accelerator.unwrap_model(model).eval(), teacher_folder, folder, layer_map, recipe, number)
        shutil.rmtree(initial)
        if state.exists():
            shutil.rmtree(state)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    return folder


def _step(
    accelerator: Accelerator,
    recipe: Recipe,
    number: int,
    step: int,
    latents: LatentCache,
    model: Any,
    teacher: Any,
    taps: Any,
    recorders: tuple[FeatureRecorder, FeatureRecorder],
    alphas_cumprod: torch.Tensor,
    optimizer: Any,
    options: TrainOptions,
) -> dict[str, float]:
    """One optimiser step over the global batch; returns every loss term, averaged over it, and their `total`."""
    stage = recipe.stages[number]
    losses = stage.losses
    warm = min(1.0, (step + 1) / max(1, losses.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = stage.learning_rate * _schedule(step, stage)
    batch = _noised(latents.batch(_global_step(recipe, number, step)), recipe, number, step, alphas_cumprod.cpu())
    per_process = recipe.batch_size // (accelerator.num_processes * options.accumulation)
    totals: dict[str, torch.Tensor] = {}
    for micro in range(options.accumulation):
        begin = (accelerator.process_index * options.accumulation + micro) * per_process
        part = {name: value[begin : begin + per_process].to(accelerator.device) for name, value in batch.items()}
        with accelerator.accumulate(model):
            inputs = {"added_cond_kwargs": {"text_embeds": part["pooled_prompt_embeds"], "time_ids": part["time_ids"]}}
            with torch.no_grad(), recorders[1].recording():
                dtype = teacher.dtype
                teacher_pred = teacher(
                    part["noisy"].to(dtype), part["timesteps"], part["prompt_embeds"].to(dtype), **inputs
                ).sample
            with accelerator.autocast(), recorders[0].recording():
                noise_pred = model(part["noisy"], part["timesteps"], part["prompt_embeds"], **inputs).sample
            weight = (
                min_snr_weight(alphas_cumprod, part["timesteps"], losses.min_snr_gamma)
                if losses.min_snr_gamma
                else None
            )
            terms = {
                "task": losses.task * prediction_loss(noise_pred, part["noise"], weight),
                "output": losses.output * warm * prediction_loss(noise_pred, teacher_pred, weight),
            }
            features = feature_losses(taps, recorders[0].features, recorders[1].features, normalize=losses.normalize)
            terms |= {f"feature/{name}": losses.feature * warm * value for name, value in features.items()}
            total = torch.stack(list(terms.values())).sum()
            accelerator.backward(total)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in {**terms, "total": total}.items():
            totals[name] = (
                totals.get(name, torch.zeros((), device=accelerator.device)) + value.detach() / options.accumulation
            )
    values = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean").tolist()
    return dict(zip(totals, values, strict=True))


def _schedule(step: int, stage: Stage) -> float:
    """Linear warm-up, then a half cosine to a tenth."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * progress))


def _global_step(recipe: Recipe, number: int, step: int) -> int:
    return sum(stage.steps for stage in recipe.stages[:number]) + step


def _noised(
    batch: Mapping[str, torch.Tensor], recipe: Recipe, number: int, step: int, alphas_cumprod: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Adds `noise`, `timesteps` and `noisy` to the global batch, and zeroes the text of dropped captions."""
    latents = batch["latents"]
    generator = torch.Generator().manual_seed(seed_of(recipe.seed, number, step))
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(0, len(alphas_cumprod), (len(latents),), generator=generator)
    kept = (torch.rand(len(latents), generator=generator) >= recipe.caption_dropout).float()
    signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return {
        "noise": noise,
        "timesteps": timesteps,
        "noisy": signal.sqrt() * latents + (1 - signal).sqrt() * noise,
        "prompt_embeds": batch["prompt_embeds"] * kept[:, None, None],
        "pooled_prompt_embeds": batch["pooled_prompt_embeds"] * kept[:, None],
        "time_ids": batch["time_ids"],
    }
