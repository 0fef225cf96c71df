"""`python -m distill`: the catalogue, the latent cache, the distillation of students, the making of the mini teacher."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro

from distill.errors import UserError, exit_on_user_error

app = tyro.extras.SubcommandApp()
WORKDIR = Path("out/models")


@app.command
def catalogue(*depths: str, json_output: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """List every architecture with its parameters, transformer blocks and TFLOP per UNet call (batch 2, base size).

    Args:
        depths: Depth patterns of your own to list as well, e.g. -/2,2/4,4:0:4,4,10/2,1,1/-
        json_output: Print JSON instead of a table.
    """
    from rich.console import Console
    from rich.table import Table

    from distill.architectures import ARCHITECTURES, find_architecture
    from distill.catalogue import catalogue_row

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
def fetch(*, model: str, workdir: Path = WORKDIR) -> None:
    """Print the local diffusers folder of a model, making, converting or downloading it first.

    Args:
        model: A Hugging Face id, a diffusers folder, a .safetensors file, random:NAME or mini:sdxl.
        workdir: Where what has to be made is kept.
    """
    from distill.sources import resolve

    print(resolve(model, workdir))


@app.command
def surgery(*, model: str, student: str, layer_map: str = "first", out: Path, workdir: Path = WORKDIR) -> None:
    """Make a student by copying chosen transformer blocks of a teacher, untrained, as a whole pipeline folder.

    Args:
        model: The teacher.
        student: An architecture of the catalogue, or a depth pattern of your own.
        layer_map: first, spread, similarity, or a JSON file of indices, as importance.json has them.
        out: The folder to write; its surgery.json says where each tensor came from and which are unused.
    """
    from distill.architectures import find_architecture
    from distill.sources import find_architecture_of, resolve
    from distill.surgery import make_student, read_layer_map

    teacher = resolve(model, workdir)
    spec = find_architecture(student, find_architecture_of(teacher).family)
    plan = make_student(teacher, spec, read_layer_map(layer_map), out)
    print(f"{out}: {len(plan.sources)} tensors copied; the teacher's {len(plan.unused)} others are in surgery.json")


@app.command
def cache(
    *, data: str, model: str = "mini:sdxl", out: Path, seed: int = 0, batch: int = 16, workdir: Path = WORKDIR
) -> None:
    """Precompute VAE latents and text embeddings of a data set. Under torchrun the processes share the shards.

    Args:
        data: shapes:N, a folder of pictures with captions, WebDataset SHARDS.tar, or hf:ORG/NAME.
        model: The checkpoint whose VAE and text encoders are used.
        out: The cache folder.
    """
    from distill.cache import make_cache
    from distill.sources import resolve

    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    make_cache(resolve(model, workdir), data, out, seed=seed, batch=batch, rank=rank, processes=processes)


@app.command
def train(
    *,
    recipe: str,
    cache: Path,
    out: Path,
    start: Path | None = None,
    workdir: Path = WORKDIR,
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
    accumulation: int = 1,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    checkpoint_every: int = 500,
) -> None:
    """Distil a student by a recipe. Start it with torchrun or `accelerate launch` for many GPUs or nodes.

    Args:
        recipe: ssd-1b, vega, mini-ssd-1b or mini-vega.
        cache: A latent cache made by `distill cache` with the teacher's VAE and text encoders.
        out: Becomes a diffusers pipeline folder; an unfinished run there is continued.
        start: A finished student to begin from instead of the teacher.
        accumulation: Micro-batches per optimiser step and process.
    """
    from distill.recipes import find_recipe
    from distill.trainer import TrainOptions, train

    options = TrainOptions(
        mixed_precision=mixed_precision,
        accumulation=accumulation,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        checkpoint_every=checkpoint_every,
    )
    if start is not None and not (start / "slimxl.json").is_file():
        raise UserError(f"--start {start} is no student made by `distill train`: it has no slimxl.json")
    train(find_recipe(recipe), cache=cache, out=out, workdir=workdir, start=start, options=options)


@app.command
def importance(
    *, model: str, cache: Path, student: str, out: Path, samples: int = 8, timesteps: int = 5, workdir: Path = WORKDIR
) -> None:
    """Rank a model's transformer blocks by what leaving each out changes; propose a layer map for a student.

    Args:
        model: The teacher.
        cache: A latent cache of its VAE and text encoders.
        student: The wanted architecture or depth pattern.
        out: A folder for importance.json and importance.svg.
        samples: Pictures to average over.
        timesteps: Noise levels to average over.
    """
    from distill.importance import report_importance
    from distill.sources import resolve

    report_importance(resolve(model, workdir), cache, student, out, samples=samples, timesteps=timesteps)


@app.command
def teach(
    *,
    out: Path,
    start: Path | None = None,
    vae_steps: int = 3000,
    vae_whole_steps: int = 1200,
    minutes: float = 120,
    decoder_steps: int = 3000,
    seed: int = 0,
) -> None:
    """Make the mini teacher anew: its VAE, then its UNet and text encoders, on the shapes world.

    Args:
        out: The pipeline folder to write.
        start: A mini pipeline folder to teach further instead of a new one; its VAE's encoder stays as it is.
        vae_steps: Optimiser steps of the VAE on crops.
        vae_whole_steps: And on whole pictures.
        minutes: Training time of the UNet and text encoders.
        decoder_steps: Optimiser steps of the VAE's decoder alone, last.
    """
    from distill.teach import teach_mini

    result = teach_mini(
        out,
        start=start,
        vae_steps=vae_steps,
        vae_whole_steps=vae_whole_steps,
        minutes=minutes,
        decoder_steps=decoder_steps,
        seed=seed,
    )
    print(json.dumps(result, indent=1))


@app.command
def judge(*, model: str, count: int = 90, steps: int = 25, workdir: Path = WORKDIR) -> None:
    """How often a mini model's pictures of unseen captions show what they say, read exactly from the pixels (JSON).

    Args:
        model: A mini checkpoint.
        count: Pictures, spread over the nine resolutions.
        steps: Denoising steps.
    """
    import torch

    from distill.sources import load_pipeline, resolve
    from distill.teach import judge as judge_pipeline

    pipe = load_pipeline(resolve(model, workdir), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    print(json.dumps(judge_pipeline(pipe, count=count, steps=steps), indent=1))


def main() -> int:
    return exit_on_user_error(lambda: app.cli(prog="python -m distill", description=__doc__))


if __name__ == "__main__":
    sys.exit(main())
