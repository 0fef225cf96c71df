"""A training run: every stage of a recipe in succession, on one process or on many (accelerate)."""

from __future__ import annotations

import gc
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from distill.common.errors import UserError, explaining_full_memory
from distill.common.files import exclusive, read_json, remove_leftovers, require_free_disk, sha256_json, write_json
from distill.common.progress import say
from distill.data.cache import LatentCache
from distill.models.module_map import ModuleMap
from distill.models.sources import check_successor, checkpoint_hash, find_architecture_of, load_component, resolve
from distill.models.surgery import files_but_unet
from distill.training.accelerator import COMPUTE_DTYPE, make_accelerator
from distill.training.checkpoints import STATE_FORMAT, draw_validation, stage_folder, student_dtype
from distill.training.memory_plan import MemoryPlan, describe_plan, device_memory, plan_recipe
from distill.training.options import TrainOptions
from distill.training.recipes import Recipe, stage_modules
from distill.training.sharding import check_fsdp
from distill.training.stage import StageRun


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
    is; an unfinished one goes on from its last checkpoint. Raises UserError for an `out` of another recipe or that
    another process is training into, layer maps that are not nested, a teacher that cannot succeed the one before, a
    disk or GPU too small (the last checkpoint stays), and a loss that is no longer finite or has diverged.
    """
    options = options or TrainOptions()
    accelerator = make_accelerator(options, out)
    if options.fsdp:
        check_fsdp(accelerator.num_processes, options.mixed_precision, options.optimizer)
    recipe.micro_batch(accelerator.num_processes, options.accumulation)  # refuses what cannot be shared
    if options.validate_every and not recipe.validation_prompts:
        raise UserError(
            "--validate-every draws the recipe's validation_prompts, and it has none: add some, or leave it out"
        )
    latents = LatentCache(cache, batch_size=recipe.batch_size, seed=recipe.seed)
    teachers = {stage.teacher: resolve(stage.teacher, workdir) for stage in recipe.stages}
    for teacher in teachers.values():  # the first too: what it predicts is checked
        check_successor(next(iter(teachers.values())), teacher)
        if (told := latents.check_teacher(teacher)) and accelerator.is_main_process:
            say(told)
    architecture = find_architecture_of(next(iter(teachers.values())))
    modules = stage_modules(recipe, architecture, ModuleMap.of_student(start) if start else None)
    run = {
        "recipe": recipe.as_dict(),
        "teachers": {name: checkpoint_hash(folder) for name, folder in teachers.items()},
        "start": checkpoint_hash(start) if start else None,
        "cache": latents.key,
        "mixed_precision": options.mixed_precision,
        "optimizer": options.optimizer,
    }
    run["key"] = sha256_json(run)

    def refuse(_waiting: str) -> None:
        raise UserError(f"another process is training into {out}; wait for its end or choose another --out")

    # the first process alone says: a shared disk may go on hiding from another what that one has missed once
    [finished] = broadcast_object_list([_is_finished(out, run["key"])])
    if not finished:
        with exclusive(out, refuse, out / ".lock") if accelerator.is_main_process else nullcontext():
            _train_stages(accelerator, recipe, modules, latents, teachers, start, out, run, options)
    elif accelerator.is_main_process:
        say(f"{out} is finished, nothing is to do")
    accelerator.end_training()


def _is_finished(out: Path, key: str) -> bool:
    """Raises UserError where `out` belongs to something else, or was begun by a version whose state is not read."""
    stated = [out / name for name in ("run.json", "slimxl.json", "model_index.json") if (out / name).exists()]
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


def _train_stages(
    accelerator: Accelerator,
    recipe: Recipe,
    modules: list[ModuleMap],
    latents: LatentCache,
    teachers: dict[str, Path],
    start: Path | None,
    out: Path,
    run: dict[str, Any],
    options: TrainOptions,
) -> None:
    """The stages that `out` does not hold yet; `run` is what it belongs to."""
    [done] = broadcast_object_list([_stages_done(recipe, out) if accelerator.is_main_process else None])
    if done is None:
        return
    plans: dict[str, MemoryPlan] = {}
    if accelerator.is_main_process and done < len(recipe.stages):
        remove_leftovers(out / "stages")
        remove_leftovers(out / "state")
        plans = _look_ahead(recipe, teachers[recipe.stages[0].teacher], out, options, accelerator)
        write_json(out / "run.json", run | {"format": STATE_FORMAT})
    if options.tensorboard:
        accelerator.init_trackers("tensorboard")
    accelerator.wait_for_everyone()
    previous = stage_folder(recipe, done - 1, out) if done else start
    micro_batch = recipe.micro_batch(accelerator.num_processes, options.accumulation)
    with explaining_full_memory(_memory_advice(options, accelerator.num_processes, micro_batch, plans, out)):
        for number in range(done, len(recipe.stages)):
            if number and accelerator.is_main_process:
                _draw_samples(stage_folder(recipe, number - 1, out), recipe)
            folder = teachers[recipe.stages[number].teacher]
            run_stage = StageRun(accelerator, recipe, number, folder, modules[number], latents, out, options)
            previous = run_stage.run(previous)
            gc.collect()  # accelerate's wrappers hold the student in a cycle
            torch.cuda.empty_cache()
    if accelerator.is_main_process:
        _finish(out, recipe, run)


def _stages_done(recipe: Recipe, out: Path) -> int | None:
    """The last one done says that all before it were: each takes the place of the one before. None where another run
    has finished `out` since it was looked at."""
    if (out / "slimxl.json").exists():
        return None
    numbers = range(len(recipe.stages), 0, -1)
    return next((n for n in numbers if (stage_folder(recipe, n - 1, out) / "slimxl.json").exists()), 0)


def _look_ahead(
    recipe: Recipe, teacher: Path, out: Path, options: TrainOptions, accelerator: Accelerator
) -> dict[str, MemoryPlan]:
    """Tells the memory plan before anything is loaded, and returns it.

    Raises UserError where the disk cannot hold the run: its checkpoints and one more while that is written, the student
    that a stage begins with, and whole pipelines of the stage before and of this.
    """
    title, plans = plan_recipe(
        recipe,
        find_architecture_of(teacher),
        half=COMPUTE_DTYPE[options.mixed_precision],
        optimizer=options.optimizer,
        processes=accelerator.num_processes,
        accumulation=options.accumulation,
        fsdp=options.fsdp,
    )
    for line in describe_plan(plans, title, *device_memory()):
        say(line)
    plan = next(iter(plans.values()))
    shards = accelerator.num_processes if options.fsdp else 1
    state_bytes = (plan.student + plan.ema + plan.optimizer) * shards
    initial_bytes = plan.student * shards
    unet_bytes = initial_bytes * student_dtype(teacher).itemsize // 4
    pipeline_bytes = unet_bytes + sum(path.stat().st_size for path in files_but_unet(teacher).values())
    needed = (options.keep_checkpoints + 1) * state_bytes + initial_bytes + 2 * pipeline_bytes
    held = sum(
        path.stat().st_size for kept in ("state", "stages") for path in (out / kept).rglob("*") if path.is_file()
    )
    require_free_disk(out, needed - held, "what this run has yet to keep")
    return plans


def _memory_advice(
    options: TrainOptions, processes: int, micro_batch: int, plans: dict[str, MemoryPlan], out: Path
) -> str:
    """What was planned, and what of all that saves memory is left to try."""
    planned = ", ".join(f"{plan.total / 1e9:.1f} GB {name}" for name, plan in plans.items())
    left = []
    if not options.gradient_checkpointing:
        left.append("--gradient-checkpointing")
    if micro_batch > 1:
        left.append(f"--accumulation above {options.accumulation}")
    if not options.fsdp:
        left.append("--fsdp" if processes > 1 else "--fsdp on several GPUs")
    anew = "" if options.fsdp or options.optimizer != "adamw" else "; or start anew with --optimizer adamw-8bit"
    return (
        f"{f'planned were {planned}; ' if planned else ''}go on from the last checkpoint in {out / 'state'} with the same "
        f"command and {' or '.join(left) or 'more GPUs'}{anew}"
    )


def _draw_samples(folder: Path, recipe: Recipe) -> None:
    """What the stored student of `folder` draws, unless that is there: a run that goes on makes up for a kill."""
    path = folder / "samples.png"
    if recipe.validation_prompts and not path.exists():
        student = load_component(folder, "unet", student_dtype(folder))
        draw_validation(student, folder, recipe.validation_prompts, path)


def _finish(out: Path, recipe: Recipe, run: dict[str, Any]) -> None:
    """Moves the last stage's pipeline up to `out`; slimxl.json comes last and says that all is there."""
    last = stage_folder(recipe, len(recipe.stages) - 1, out)
    about = read_json(last / "slimxl.json")
    for item in last.iterdir():
        if item.name != "slimxl.json":
            item.rename(out / item.name)
    _draw_samples(out, recipe)
    write_json(out / "slimxl.json", about | run)
    for left in ("stages", "state"):
        shutil.rmtree(out / left, ignore_errors=True)
    say(f"the student is in {out}")
