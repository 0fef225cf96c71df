"""`python -m distill`: the catalogue, the latent cache, the distillation of students, the making of the mini teacher."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro

from distill.checkpoints.sources import WORKDIR
from distill.common.errors import UserError, exit_on_user_error, require_above, require_least
from distill.common.launcher import program
from distill.data.samples import SmallPictures, Text
from distill.training.options import (
    Accumulation,
    BenchOptions,
    Fsdp,
    GradientCheckpointing,
    Optimizer,
    Precision,
    TrainOptions,
    Workdir,
)

app = tyro.extras.SubcommandApp()


@app.command
def catalogue(
    *,
    depths: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = (),
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """List every architecture with its parameters, transformer blocks and TFLOP per UNet call (batch 2, base size).

    Args:
        depths: Depth patterns of your own to list as well, e.g. -/2,2/4,4:0:4,4,10/2,1,1/-
        json_output: Print JSON instead of a table.
    """
    from rich.console import Console
    from rich.table import Table

    from distill.models.architectures import ARCHITECTURES, find_architecture
    from distill.models.catalogue import catalogue_row

    rows = [catalogue_row(a) for a in [*ARCHITECTURES.values(), *map(find_architecture, depths)]]
    if json_output:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table("architecture", title="UNets, counted on the meta device")
    for column in ("parameters", "down", "mid", "up", "blocks", "TFLOP/call"):
        table.add_column(column, justify="right")
    table.add_column("depth (down:mid:up)")
    for row in rows:
        counts = (f"{n:,}" for n in (row.parameters, row.down, row.mid, row.up))
        table.add_row(row.name, *counts, str(row.transformer_blocks), f"{row.tflop_per_call:.4g}", row.depth)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@app.command
def fetch(*, model: str, workdir: Workdir = WORKDIR) -> None:
    """Print the local diffusers folder of a model, making, converting or downloading it first.

    Args:
        model: A Hugging Face id, a diffusers folder, a .safetensors file, random:NAME, mini:sdxl or mini:sd.
    """
    from distill.checkpoints.sources import resolve

    print(resolve(model, workdir))


@app.command
def surgery(*, model: str, student: str, layer_map: str = "first", out: Path, workdir: Workdir = WORKDIR) -> None:
    """Make a student by copying chosen transformer blocks of a teacher, untrained, as a whole pipeline folder.

    Args:
        model: The teacher, as `fetch` takes it.
        student: An architecture of the catalogue, or a depth pattern of your own.
        layer_map: Which teacher blocks it keeps: first, spread, similarity, or a JSON file (importance.json).
        out: The folder to write; its surgery.json says where each tensor came from and which are unused.
    """
    from distill.checkpoints.folder import find_architecture_of
    from distill.checkpoints.sources import resolve
    from distill.checkpoints.surgery import make_student
    from distill.models.architectures import find_architecture
    from distill.models.module_map import read_layer_map

    teacher = resolve(model, workdir)
    spec = find_architecture(student, find_architecture_of(teacher).family)
    copied = make_student(teacher, spec, read_layer_map(layer_map), out)
    print(f"{out}: {len(copied.sources)} tensors copied; the teacher's {len(copied.unused)} others are in surgery.json")


@app.command
def cache(
    *,
    data: str,
    model: str = "mini:sdxl",
    out: Path,
    seed: int = 0,
    batch: int = 4,
    small_pictures: SmallPictures | None = None,
    flip: bool = True,
    variants: int = 1,
    text: Text = "cached",
    workdir: Workdir = WORKDIR,
) -> None:
    """Precompute VAE latents and text embeddings of a data set. Under torchrun the processes share the shards.

    Args:
        data: shapes:N, a folder of captioned pictures, shards or parquet, WebDataset SHARDS.tar, or hf:ORG/NAME. Shards may
            be URLs (https://, s3://, gs://, hf://datasets/ORG/NAME/…), with braces and wildcards: they are streamed.
        model: The checkpoint whose VAE and text encoders are used, as `fetch` takes it.
        out: The cache folder; an unfinished one there is continued.
        seed: Of crops, flips, the draws of the VAE, and the pictures of shapes:N.
        batch: Pictures encoded at once; at 1024x1024 each takes some GB of GPU memory.
        small_pictures: Scale up or skip pictures smaller than their resolution; if not given, scale them up for a UNet
            that is told their original size (SDXL's), skip them for others.
        flip: Mirror half of the pictures, never one whose caption names a side or writing.
        variants: Samples made of each picture, each with its own crop, flip and draw of the VAE.
        text: online keeps the captions' tokens alone, a third of the bytes; the trainer then runs the text encoders in
            each step.
    """
    from distill.checkpoints.sources import resolve
    from distill.data.make_cache import make_cache
    from distill.data.samples import Fitting

    fitting = Fitting(small_pictures=small_pictures, flip=flip, variants=variants)
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    checkpoint = resolve(model, workdir)
    make_cache(
        checkpoint, data, out, seed=seed, batch=batch, fitting=fitting, text=text, rank=rank, processes=processes
    )


@app.command
def recipe(name: tyro.conf.Positional[str], /, *, student: str | None = None, layer_map: str | None = None) -> None:
    """Print a recipe as JSON: stages, teachers, losses, steps. Changed and saved, it is a recipe of your own.

    Args:
        name: A recipe's name, as ssd-1b (an unknown one is answered with all), or the slimxl.json of a finished student.
        student: Another student by the same road: an architecture or a depth pattern; if not given, the recipe's own.
        layer_map: first, spread, similarity, or a JSON file (importance.json); if not given, the recipe's own.
    """
    from distill.training.recipes import find_recipe

    print(json.dumps(find_recipe(name, student=student, layer_map=layer_map).as_dict(), indent=1))


@app.command
def train(
    *,
    recipe: str,
    cache: str,
    out: Path,
    student: str | None = None,
    layer_map: str | None = None,
    start: Path | None = None,
    workdir: Workdir = WORKDIR,
    options: Annotated[TrainOptions, tyro.conf.arg(name="")],
) -> None:
    """Distil a student by a recipe. Start it with torchrun for many GPUs or nodes. First it tells the memory it needs.

    Args:
        recipe: A recipe's name, as ssd-1b (an unknown one is answered with all), or a .json file that `distill recipe`
            has begun.
        cache: A latent cache made by `distill cache` with the teacher's VAE and text encoders, a folder or its URL (https://,
            s3://, gs://, hf://); a stage of the recipe may name its own.
        out: Becomes a diffusers pipeline folder; an unfinished run there is continued.
        student: Another student by the same road: an architecture or a depth pattern; if not given, the recipe's own.
        layer_map: Which teacher blocks it keeps: first, spread, similarity, or a JSON file (importance.json); if not
            given, as the recipe says.
        start: A finished student to begin from instead of the teacher.
    """
    from distill.training.recipes import find_recipe
    from distill.training.trainer import train

    if start is not None and not (start / "slimxl.json").is_file():
        raise UserError(f"--start {start} is no student made by `distill train`: it has no slimxl.json")
    chosen = find_recipe(recipe, student=student, layer_map=layer_map)
    train(chosen, cache=cache, out=out, workdir=workdir, start=start, options=options)


@app.command
def memory(
    *,
    recipe: str,
    student: str | None = None,
    processes: int = 1,
    accumulation: Accumulation = 1,
    mixed_precision: Precision = "no",
    optimizer: Optimizer = "adamw",
    fsdp: Fsdp = False,
    text: Text = "cached",
    memory_gb: float | None = None,
) -> None:
    """Tell what a training needs of each GPU's memory, with and without gradient checkpointing; nothing is loaded.

    Args:
        recipe: A recipe's name, as ssd-1b (an unknown one is answered with all), or a .json file.
        student: Another student by the same road: an architecture or a depth pattern; if not given, the recipe's own.
        processes: GPUs that share the batch.
        text: online, as the cache was made, adds the text encoders and says what part of the step's arithmetic they are.
        memory_gb: The GPU's memory in units of 1e9 bytes; if not given, that of the device at hand.
    """
    from distill.training.accelerator import COMPUTE_DTYPE, check_fsdp
    from distill.training.memory import count_recipe_memory, describe_memory, device_memory
    from distill.training.recipes import find_recipe, peek_teacher

    require_least(1, processes=processes, accumulation=accumulation)
    if memory_gb is not None:
        require_above(0, memory_gb=memory_gb)
    chosen = find_recipe(recipe, student=student)
    if fsdp:
        adapters = any(stage.student.adapter for stage in chosen.stages)
        check_fsdp(processes, mixed_precision, optimizer, adapters=adapters)
    title, uses = count_recipe_memory(
        chosen,
        peek_teacher(chosen),
        half=COMPUTE_DTYPE[mixed_precision],
        optimizer=optimizer,
        processes=processes,
        accumulation=accumulation,
        fsdp=fsdp,
        text=text,
    )
    device = ("the GPU", int(memory_gb * 1e9)) if memory_gb else device_memory()
    print("\n".join(describe_memory(uses, title, *device)))


@app.command
def budget(
    *,
    recipe: str,
    samples: int = 20_000_000,
    gpus: tuple[int, ...] = (1, 8, 64),
    text: Text = "cached",
    gradient_checkpointing: GradientCheckpointing = True,
    peak_tflops: float = 312.0,
    share_of_peak: float = 0.38,
) -> None:
    """Predict bytes of cache, hours and GPU-hours of a recipe, from its counted arithmetic; nothing is measured.

    Args:
        recipe: A recipe's name, as ssd-1b (an unknown one is answered with all), or a .json file.
        samples: Pictures of the data set.
        gpus: How many GPUs share the work, a line for each.
        text: As the cache is made.
        peak_tflops: Of a GPU, in half precision with fp32 accumulation; if not given, an A100's.
        share_of_peak: What is reached of it; if not given, what diffusers reaches with SSD-1B on an A100, as published.
    """
    from distill.studies.budget import count_budget, describe_budget
    from distill.training.recipes import find_recipe, peek_teacher

    require_least(1, samples=samples)
    chosen = find_recipe(recipe)
    counted = count_budget(chosen, peek_teacher(chosen), samples, text=text, checkpointing=gradient_checkpointing)
    title = f"{chosen.name} on {samples:,} pictures, text {text}"
    lines = describe_budget(counted, title, gpus, peak_tflops=peak_tflops, share_of_peak=share_of_peak)
    print("\n".join(lines))


@app.command
def bench(*, out: Path, options: Annotated[BenchOptions, tyro.conf.arg(name="")]) -> None:
    """Measure the training step beside the published loop, with and without the cache, at each feature level.

    Args:
        out: The JSON file for the raw samples.
    """
    from distill.studies.bench import bench_loops, describe

    print("\n".join(describe(bench_loops(options, out))))


@app.command
def bench_data(*, samples: int = 20_000_000, out: Path) -> None:
    """Measure what a cache of millions of samples costs a training process: to open it, and for each step.

    Args:
        samples: SDXL's, in sparse shards that take no disk.
        out: The JSON file for the measurement.
    """
    from distill.studies.scale import bench_data, describe

    print("\n".join(describe(bench_data(samples, out))))


@app.command
def ablate(
    *,
    variants: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: all)")] = (),
    teacher: str = "mini:sdxl",
    student: str = "mini-vega",
    seeds: int = 3,
    steps: int = 400,
    samples: int = 3600,
    held_out: int = 180,
    pictures: int = 90,
    picture_steps: int = 20,
    jobs: int = 2,
    out: Path = Path("out/ablation"),
    results: Path = Path("distill/results"),
    workdir: Workdir = WORKDIR,
) -> None:
    """Compare losses, starts and roads on the mini family; what is finished is kept.

    Args:
        variants: Only these: from-scratch, task, output, block, sub-block, layer, self-attention, layer-progressive.
        teacher: A mini checkpoint, as `fetch` takes it.
        student: A mini architecture or a depth pattern.
        seeds: Runs of each variant, with the seeds 0, 1, ...
        steps: Optimiser steps of every run.
        samples: Captioned pictures to train on.
        held_out: And to measure the loss on, by 20 of one resolution: 180 are 20 of each.
        pictures: Pictures by which each student is judged, over the nine resolutions.
        picture_steps: Denoising steps of each.
        jobs: Runs at once.
        out: Where runs and caches are kept.
        results: Where ablation.json, .md and .svg go.
    """
    from distill.checkpoints.sources import resolve
    from distill.studies.ablate import VARIANTS, run_ablation

    run_ablation(
        resolve(teacher, workdir),
        out,
        results,
        variants=variants or tuple(VARIANTS),
        seeds=seeds,
        steps=steps,
        samples=samples,
        held_out=held_out,
        student=student,
        pictures=pictures,
        picture_steps=picture_steps,
        jobs=jobs,
    )


@app.command
def few_steps(
    models: tyro.conf.Positional[tuple[str, ...]],
    /,
    *,
    pictures: int = 90,
    results: Path = Path("distill/results"),
    workdir: Workdir = WORKDIR,
) -> None:
    """Compare mini models drawn in few steps: caption-following against the compute of a picture.

    Args:
        models: NAME=MODEL@STEPS,STEPS, any number, as teacher=mini:sdxl@4,25 lcm=out/lcm@1,4; the first is what others
            are told against.
        pictures: Pictures by which each is judged, over the nine resolutions.
        results: Where few-steps.json, .md and .svg go.
    """
    from distill.studies.few_steps import compare_steps, parse_point, table

    points = [point for model in models for point in parse_point(model, workdir)]
    print(table(compare_steps(points, results, pictures=pictures)))


@app.command
def importance(
    *,
    model: str,
    cache: str,
    student: str,
    out: Path,
    samples: int = 8,
    timesteps: int = 5,
    workdir: Workdir = WORKDIR,
) -> None:
    """Rank a model's transformer blocks by what leaving each out changes; propose a layer map for a student.

    Args:
        model: The teacher, as `fetch` takes it.
        cache: A latent cache of its VAE and text encoders, a folder or its URL.
        student: The wanted architecture or depth pattern.
        out: A folder for importance.json and importance.svg.
        samples: Pictures to average over.
        timesteps: Noise levels to average over.
    """
    from distill.checkpoints.sources import resolve
    from distill.studies.importance import report_importance

    report_importance(resolve(model, workdir), cache, student, out, samples=samples, timesteps=timesteps)


@app.command
def teach(
    *,
    out: Path,
    architecture: str = "mini-sdxl",
    start: str | None = None,
    vae_steps: int = 3000,
    vae_whole_steps: int = 1200,
    minutes: float = 120,
    learning_rate: float = 8e-4,
    batch: int = 32,
    decoder_steps: int = 3000,
    seed: int = 0,
) -> None:
    """Make a mini teacher anew: its VAE, then its UNet and text encoders, on the shapes world.

    Args:
        out: The pipeline folder to write.
        architecture: What is taught: mini-sdxl or mini-sd-1.5.
        start: A mini checkpoint, as `fetch` takes it; what fits of its networks is taught further, but for its VAE's
            encoder, which stays as it is. Of a UNet of another architecture that is a part, which is told.
        vae_steps: Optimiser steps of the VAE on crops.
        vae_whole_steps: And on whole pictures.
        minutes: Training time of the UNet and text encoders; 0 leaves them as they are.
        learning_rate: Of the UNet and text encoders, at its highest.
        batch: Pictures a step of the UNet and text encoders, all of one size.
        decoder_steps: Optimiser steps of the VAE's decoder alone, last.
        seed: Of the first weights, the pictures and the noise.
    """
    from distill.mini.teach import teach_mini

    result = teach_mini(
        out,
        architecture=architecture,
        start=start,
        vae_steps=vae_steps,
        vae_whole_steps=vae_whole_steps,
        minutes=minutes,
        learning_rate=learning_rate,
        batch=batch,
        decoder_steps=decoder_steps,
        seed=seed,
    )
    print(json.dumps(result, indent=1))


@app.command
def judge(
    *, model: str, count: int = 90, steps: int | None = None, held_out: str | None = None, workdir: Workdir = WORKDIR
) -> None:
    """How often a mini model's pictures of unseen captions show what they say, read exactly from the pixels (JSON).

    Args:
        model: A mini checkpoint, as `fetch` takes it.
        count: Pictures in all, as many of each resolution of its family.
        steps: Denoising steps. None: those that a few-step model was taught, else 25.
        held_out: A latent cache that it was not trained on, a folder or its URL: the mean square error of its noise_pred
            over that too.
    """
    from distill.checkpoints.sources import resolve
    from distill.mini.judge import judge_checkpoint
    from distill.studies.ablate import held_out_loss

    folder = resolve(model, workdir)
    loss = {} if held_out is None else {"held_out_loss": held_out_loss(folder, held_out)}
    print(json.dumps(loss | judge_checkpoint(folder, count=count, steps=steps), indent=1))


def main() -> int:
    return exit_on_user_error(lambda: app.cli(prog=program("distill"), description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
