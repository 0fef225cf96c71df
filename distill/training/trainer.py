"""A training run: every stage of a recipe in succession, on one process or on many (accelerate)."""

from __future__ import annotations

import gc
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from distill.checkpoints.folder import checkpoint_hash, find_architecture_of
from distill.checkpoints.surgery import files_but_unet
from distill.common.errors import UserError, explaining_full_memory
from distill.common.files import (
    exclusive,
    read_json,
    remove_leftovers,
    require_free_disk,
    sha256_json,
    size_text,
    write_json,
)
from distill.common.ownership import require_our_folder
from distill.common.progress import say
from distill.training.accelerator import COMPUTE_DTYPE, check_fsdp, decided_by_first, make_accelerator
from distill.training.memory import MemoryUse, count_recipe_memory, describe_memory, device_memory
from distill.training.options import TrainOptions
from distill.training.output.card import write_card
from distill.training.output.state import STATE_FORMAT
from distill.training.output.student_folder import student_dtype
from distill.training.prepare import PreparedStage, prepare_stages
from distill.training.recipes import PREVIOUS, Recipe
from distill.training.stage import StageRun


def train(
    recipe: Recipe,
    *,
    cache: str | Path,
    out: Path,
    workdir: Path,
    start: Path | None = None,
    options: TrainOptions | None = None,
) -> None:
    """Runs all stages of `recipe`; `out` becomes a diffusers pipeline folder of the last student.

    `cache` is the latent cache of all stages that name none of their own, `start` an earlier student to begin from
    (default: the first stage's teacher). A finished `out` is left as it is; an unfinished one goes on from its last
    checkpoint.

    Raises UserError for an `out` of another recipe, of something else, or that another process is training into; for layer
    maps that are not nested, a teacher that cannot succeed the one before, or a cache that a teacher does not fit; for a
    disk or GPU too small (the last checkpoint stays), and for a loss that is no longer finite or has diverged.
    """
    options = options or TrainOptions()
    accelerator = make_accelerator(options, out)
    decided_by_first(lambda: _require_our_run(out, workdir))
    if options.fsdp:
        adapters = any(stage.student.adapter for stage in recipe.stages)
        check_fsdp(accelerator.num_processes, options.mixed_precision, options.optimizer, adapters=adapters)
    recipe.micro_batch(accelerator.num_processes, options.accumulation)  # refuses what cannot be shared
    if options.validate_every and not recipe.validation_prompts:
        raise UserError(
            "--validate-every draws the recipe's validation_prompts, and it has none: add some, or leave it out"
        )
    prepared = prepare_stages(recipe, str(cache), start, out, workdir)
    run = decided_by_first(lambda: _describe_run(recipe, prepared, options))
    stages = [
        StageRun(accelerator=accelerator, recipe=recipe, prepared=one, out=out, options=options) for one in prepared
    ]

    def refuse(_waiting: str) -> None:
        raise UserError(f"another process is training into {out}; wait for its end or choose another --out")

    # the first process decides: a shared disk may show another an older state
    if decided_by_first(lambda: _is_finished(out, run["key"])):
        if accelerator.is_main_process:
            say(f"{out} is finished, nothing is to do")
    else:
        with exclusive(out, refuse, out / ".lock") if accelerator.is_main_process else nullcontext():
            _train_stages(stages, run)
    accelerator.end_training()


def _describe_run(recipe: Recipe, stages: list[PreparedStage], options: TrainOptions) -> dict[str, Any]:
    """All that the student depends on, and a `key` over it. A cache counts by its hash, not by the name of its data."""
    teachers = {one.stage.teacher: one.teacher for one in stages if one.stage.teacher != PREVIOUS}
    start = stages[0].previous
    run = {
        "recipe": recipe.as_dict(),
        "teachers": {name: checkpoint_hash(folder) for name, folder in teachers.items()},
        "start": checkpoint_hash(start) if start else None,
        "caches": [{name: value for name, value in one.latents.key.items() if name != "data"} for one in stages],
        "mixed_precision": options.mixed_precision,
        "optimizer": options.optimizer,
    }
    return run | {"key": sha256_json(run)}


def _require_our_run(out: Path, workdir: Path) -> None:
    """Raises UserError where `out` holds something that no training wrote. The work folder may be `out` itself or lie
    below it: the models that a command has made in it are ours. run.log is what an ablation's runs say."""
    made = (path for path in workdir.resolve().glob("*/made.json") if path.is_relative_to(out.resolve()))
    models = [path.relative_to(out.resolve()).parts[0] for path in made]
    require_our_folder(
        out, "a training run", ["run.json", "slimxl.json"], ("recipe", "key"), leftovers=[*models, "run.log"]
    )


def _is_finished(out: Path, key: str) -> bool:
    """Raises UserError where `out` belongs to another run, or was begun by a version whose state is not read."""
    stated = [out / name for name in ("run.json", "slimxl.json") if (out / name).exists()]
    if not stated:
        return False
    about = read_json(stated[0])
    if about.get("key") != key:
        raise UserError(
            f"{out} belongs to another recipe, teacher, --start, cache, --mixed-precision or --optimizer; choose another "
            "--out or remove it"
        )
    finished = (out / "slimxl.json").exists()
    if not finished and about.get("format") != STATE_FORMAT:
        raise UserError(f"{out} was begun by another version of slimxl: finish it with that one, or remove it")
    return finished


def _train_stages(stages: list[StageRun], run: dict[str, Any]) -> None:
    """Runs the stages that `out` does not hold yet; `run` says which run it is of."""
    first = stages[0]
    accelerator, recipe, out, options = first.accelerator, first.recipe, first.out, first.options
    done = decided_by_first(lambda: _stages_done(stages, out))
    if done is None:
        return
    uses: dict[str, MemoryUse] = {}
    if accelerator.is_main_process and done < len(stages):
        remove_leftovers(out / "stages")
        remove_leftovers(out / "state")
        uses = _look_ahead(first)
        write_json(out / "run.json", run | {"format": STATE_FORMAT})
    if options.report_to:
        settings = {"recipe": recipe.name, "batch_size": recipe.batch_size, "seed": recipe.seed}
        (out / "trackers").mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(
            "slimxl",
            settings | {"mixed_precision": options.mixed_precision},
            {"wandb": {"dir": str(out / "trackers"), "name": out.name}},
        )
    accelerator.wait_for_everyone()
    micro_batch = recipe.micro_batch(accelerator.num_processes, options.accumulation)
    with explaining_full_memory(_memory_advice(options, accelerator.num_processes, micro_batch, uses, out)):
        for number in range(done, len(stages)):
            if number and accelerator.is_main_process:
                stages[number - 1].draw_finished()
            stages[number].run()
            gc.collect()  # accelerate's wrappers hold the student in a cycle
            torch.cuda.empty_cache()
    if accelerator.is_main_process:
        _finish(stages, run)


def _stages_done(stages: list[StageRun], out: Path) -> int | None:
    """How many stages `out` holds. The last one is enough to tell: a finished stage removes the folders of those before.
    None where another run has finished `out` since it was looked at."""
    if (out / "slimxl.json").exists():
        return None
    done = [one.prepared.number + 1 for one in stages if (one.prepared.folder / "slimxl.json").exists()]
    return max(done, default=0)


def _look_ahead(stage: StageRun) -> dict[str, MemoryUse]:
    """Prints the memory that the run needs, before anything is loaded, and returns it; `stage` is its first.

    Raises UserError where the disk cannot hold the run: its checkpoints and one more while that is written, the student
    that a stage begins with, and whole pipelines of the stage before and of this (of a LoRA its two files).
    """
    options, processes, out, prepared = stage.options, stage.accelerator.num_processes, stage.out, stage.prepared
    title, uses = count_recipe_memory(
        stage.recipe,
        find_architecture_of(prepared.teacher),
        half=COMPUTE_DTYPE[options.mixed_precision],
        optimizer=options.optimizer,
        processes=processes,
        accumulation=options.accumulation,
        fsdp=options.fsdp,
        text="cached" if prepared.latents.holds_text else "online",
        started=prepared.previous is not None,
    )
    for line in describe_memory(uses, title, *device_memory()):
        say(line)
    for one in stage.recipe.stages:
        if one.schedule.warmup_steps > one.steps:
            say(
                f"stage {one.name}: its warm-up of {one.schedule.warmup_steps} steps is longer than its {one.steps}; the "
                f"learning rate gets to {one.learning_rate_at(one.steps - 1):.3g}, not to {one.learning_rate:.3g}"
            )
    use = next(iter(uses.values()))
    shards = processes if options.fsdp else 1
    state_bytes = (use.student + use.ema + use.optimizer) * shards
    initial_bytes = use.student * shards
    unet_bytes = initial_bytes * student_dtype(prepared.teacher).itemsize // 4
    others = {} if stage.recipe.stages[-1].student.adapter else files_but_unet(prepared.pipeline)
    pipeline_bytes = unet_bytes + sum(path.stat().st_size for path in others.values())
    needed = (options.keep_checkpoints + 1) * state_bytes + initial_bytes + 2 * pipeline_bytes
    kept_bytes = sum(
        path.stat().st_size for kept in ("state", "stages") for path in (out / kept).rglob("*") if path.is_file()
    )
    require_free_disk(out, needed - kept_bytes, "what this run has yet to keep")
    return uses


def _memory_advice(
    options: TrainOptions, processes: int, micro_batch: int, uses: dict[str, MemoryUse], out: Path
) -> str:
    """What was expected, and what of all that saves memory is left to try."""
    expected = ", ".join(f"{size_text(use.total)} {name}" for name, use in uses.items())
    left = []
    if not options.gradient_checkpointing:
        left.append("--gradient-checkpointing")
    if micro_batch > 1:
        left.append(f"--accumulation above {options.accumulation}")
    if not options.fsdp:
        left.append("--fsdp" if processes > 1 else "--fsdp on several GPUs")
    anew = "" if options.fsdp or options.optimizer != "adamw" else "; or start anew with --optimizer adamw-8bit"
    return (
        f"{f'expected were {expected}; ' if expected else ''}go on from the last checkpoint in {out / 'state'} with the "
        f"same command and {' or '.join(left) or 'more GPUs'}{anew}"
    )


def _finish(stages: list[StageRun], run: dict[str, Any]) -> None:
    """Moves the last stage's pipeline up to `out`; slimxl.json comes last and says that all is there."""
    last = stages[-1]
    folder, out = last.prepared.folder, last.out
    about = read_json(folder / "slimxl.json")
    for item in folder.iterdir():
        if item.name != "slimxl.json":
            item.replace(out / item.name)
    last.draw_finished(out)
    write_card(out, last.recipe, [one.prepared for one in stages], about, run)
    write_json(out / "slimxl.json", about | run)
    for left in ("stages", "state"):
        shutil.rmtree(out / left, ignore_errors=True)
    say(f"the student is in {out}")
