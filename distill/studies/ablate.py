"""On the mini family: which losses, which first weights and which stages make a better student.

Every variant distils the same student from the same teacher in the same number of optimiser steps, under several
seeds, and is judged twice: by the task loss on held-out samples, and by how often its pictures of unseen captions
show what they say, read exactly from the pixels. A finished run is kept, so the same command goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from distill.checkpoints.folder import (
    alphas_cumprod_of,
    checkpoint_hash,
    find_architecture_of,
    find_family,
    prediction_type_of,
)
from distill.checkpoints.load import load_component
from distill.common.errors import quiet_libraries, require_least, unknown
from distill.common.files import read_json, replacing, write_json
from distill.common.ownership import require_our_files, require_our_folder
from distill.common.progress import say
from distill.data.cache import LatentCache
from distill.data.make_cache import make_cache
from distill.data.shapes import ATTRIBUTES
from distill.mini.judge import READER, check_pictures, judge_checkpoint
from distill.models.architectures import find_architecture
from distill.training.objectives import Distill
from distill.training.objectives.distill import task_target
from distill.training.objectives.taps import Level
from distill.training.options import TrainOptions
from distill.training.recipes import Recipe, Stage, shortened
from distill.training.schedule import Schedule
from distill.training.step import add_noise, predict
from distill.training.student import Pruned
from distill.training.trainer import train


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table: what is taught, and how the student begins."""

    objective: Distill
    from_scratch: bool = False
    progressive: bool = False


def _features(level: Level) -> Distill:
    return Distill(output=1.0, feature=0.2, level=level, normalize=True)


HELD_OUT_BATCH = 20
_TASK = Distill(output=0.0, feature=0.0)
VARIANTS = {
    "from-scratch": Variant(objective=_TASK, from_scratch=True),
    "task": Variant(objective=_TASK),
    "output": Variant(objective=replace(_TASK, output=1.0)),
    "block": Variant(objective=_features("block")),
    "sub-block": Variant(objective=_features("sub-block")),
    "layer": Variant(objective=_features("layer")),
    "self-attention": Variant(objective=_features("self-attention")),
    "layer-progressive": Variant(objective=_features("layer"), progressive=True),
}
"""Each adds to the one before: surgery, the output loss, features from coarse to fine; the last divides
the same steps into stages."""


def make_recipe(name: str, variant: Variant, *, teacher: str, student: str, steps: int, seed: int) -> Recipe:
    """One-shot, or middle and up shortened first, a sixth of the same `steps` each."""
    source = find_architecture_of(Path(teacher))
    tuned: dict[str, Any] = {
        "objective": variant.objective,
        "learning_rate": 4e-4,
        "schedule": Schedule(warmup_steps=10),
    }
    before: tuple[Stage, ...] = ()
    if variant.progressive:
        target = find_architecture(student, source.family).depth
        before = shortened(max(1, steps // 6), teacher, target, source.depth, "first", **tuned)[:-1]
        steps -= sum(stage.steps for stage in before)
    pruned = Pruned(architecture=student, layer_map="first", from_scratch=variant.from_scratch)
    whole = Stage(name="whole", teacher=teacher, student=pruned, steps=steps, **tuned)
    return Recipe(
        name=name,
        stages=(*before, whole),
        batch_size=16,
        weight_decay=1e-4,
        ema_decay=None,
        seed=seed,
        validation_prompts=(),
    )


@torch.no_grad()
def held_out_loss(checkpoint: Path, cache: str | Path) -> float:
    """Mean square error of a UNet's prediction over a cache, HELD_OUT_BATCH samples of one resolution at a time; noise and
    timesteps are always the same."""
    latents = LatentCache(cache, batch_size=HELD_OUT_BATCH, seed=0)
    unet = load_component(checkpoint, "unet", torch.float32)
    alphas_cumprod = alphas_cumprod_of(checkpoint)
    errors = []
    for step in range(len(latents) // HELD_OUT_BATCH):
        batch = add_noise(Distill(), latents.batch(step), alphas_cumprod, seed=("held out", step), caption_dropout=0.0)
        target = task_target(batch, alphas_cumprod, prediction_type_of(checkpoint))
        errors.append((predict(unet, batch) - target).square().mean().item())
    return mean(errors)


def _run(name: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """One variant under one seed, trained and judged; runs in a process of its own."""
    torch.set_num_threads(settings["threads"])
    out = Path(settings["out"]) / "runs" / f"{name}-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    path = out / "result.json"
    earlier = read_json(path) if path.exists() else {}  # trained, then judged otherwise than is asked now
    cpu, wall = time.process_time(), time.monotonic()
    recipe = make_recipe(
        name,
        VARIANTS[name],
        teacher=settings["teacher"],
        student=settings["student"],
        steps=settings["steps"],
        seed=seed,
    )
    with (out / "run.log").open("a", encoding="utf-8") as log, redirect_stdout(log):
        cache = Path(settings["out"]) / "cache"
        train(recipe, cache=cache, out=out, workdir=out, options=TrainOptions(checkpoint_every=100))
        trained = time.process_time()
        result = {
            "variant": name,
            "seed": seed,
            "held_out_loss": held_out_loss(out, Path(settings["out"]) / "held-out"),
            "followed": judge_checkpoint(out, count=settings["pictures"], steps=settings["picture_steps"]),
            "training_cpu_s": earlier.get("training_cpu_s", round(trained - cpu, 1)),
            "wall_s": round(time.monotonic() - wall, 1),
        }
    write_json(path, result | {"settings": settings})
    return result


def run_ablation(
    teacher: Path,
    out: Path,
    results: Path,
    *,
    variants: Sequence[str],
    seeds: int,
    steps: int,
    samples: int,
    held_out: int,
    student: str,
    pictures: int,
    picture_steps: int,
    jobs: int,
) -> None:
    """Runs what is not yet there under `out`, then writes ablation.json, .md and .svg into `results`.

    Raises UserError for an unknown variant, a number out of range, or a cache of something else.
    """
    require_our_folder(out, "an ablation", ["cache/cache.json"], ("seed", "shards"))
    written = [f"ablation.{kind}" for kind in ("json", "md", "svg")]
    require_our_files(results, written, written[0], ("settings", "runs"), "--results")
    check_pictures(pictures, picture_steps, find_family(teacher).resolutions)
    require_least(1, seeds=seeds, steps=steps, samples=samples, jobs=jobs)
    require_least(HELD_OUT_BATCH, held_out=held_out)
    for name in variants:
        if name not in VARIANTS:
            raise unknown("variant", name, VARIANTS)
    teacher = teacher.resolve()
    make_cache(teacher, f"shapes:{samples}", out / "cache", seed=0)
    make_cache(teacher, f"shapes:{held_out}", out / "held-out", seed=1)
    settings = {
        "teacher": str(teacher),
        "teacher_hash": checkpoint_hash(teacher),
        "student": student,
        "steps": steps,
        "samples": samples,
        "held_out": held_out,
        "pictures": pictures,
        "picture_steps": picture_steps,
        "reader": READER,
        "threads": max(1, torch.get_num_threads() // jobs),
        "out": str(out),
    }
    wanted = [(name, seed) for seed in range(seeds) for name in variants]
    done = {}
    for name, seed in wanted:
        path = out / "runs" / f"{name}-{seed}" / "result.json"
        if path.exists():
            stated = read_json(path)
            if _deciding_settings(stated.pop("settings")) == _deciding_settings(settings):
                done[name, seed] = stated
    todo = [pair for pair in wanted if pair not in done]
    started = time.monotonic()
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload([__name__])  # torch and diffusers are imported once, not by each job
    waiting, earlier = iter(todo), len(done)
    with ProcessPoolExecutor(jobs, mp_context=forkserver, initializer=quiet_libraries) as pool:
        running = {pool.submit(_run, *pair, settings) for pair in islice(waiting, jobs)}
        while running:  # no more than run at once: where one has failed, no other begins
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                result = future.result()
                done[result["variant"], result["seed"]] = result
                number = len(done) - earlier
                left = (time.monotonic() - started) / number * (len(todo) - number)
                say(f"{number}/{len(todo)} {_in_words(result)}; {left / 60:.0f} min left")
            running |= {pool.submit(_run, *pair, settings) for pair in islice(waiting, len(ended))}
    reference = _reference(teacher, out, pictures, picture_steps)
    report = {
        "settings": _deciding_settings(settings),
        "teacher": reference,
        "runs": [done[pair] for pair in wanted],
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    write_json(results / "ablation.json", report)
    with replacing(results / "ablation.md") as temporary:
        temporary.write_text(_table(report), encoding="utf-8")
    _plot(report, results / "ablation.svg")
    say(_table(report))


def _deciding_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a result depends on: not where it lies, nor on how many threads it ran."""
    return {key: value for key, value in settings.items() if key not in ("teacher", "threads", "out")}


def _reference(teacher: Path, out: Path, pictures: int, picture_steps: int) -> dict[str, Any]:
    """The teacher, judged as its students are."""
    path = out / "teacher.json"
    key = {
        "hash": checkpoint_hash(teacher),
        "pictures": pictures,
        "picture_steps": picture_steps,
        "reader": READER,
    }
    if not path.exists() or read_json(path)["key"] != key:
        followed = judge_checkpoint(teacher, count=pictures, steps=picture_steps)
        write_json(path, {"key": key, "held_out_loss": held_out_loss(teacher, out / "held-out"), "followed": followed})
    return read_json(path)


def _in_words(result: Mapping[str, Any]) -> str:
    return (
        f"{result['variant']}, seed {result['seed']}: held-out loss {result['held_out_loss']:.5f}, "
        f"{result['followed']['all']:.0%} of pictures right in everything, {result['training_cpu_s']:.0f} CPU s"
    )


def _by_variant(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        runs.setdefault(run["variant"], []).append(run)
    return runs


def _table(report: Mapping[str, Any]) -> str:
    """Markdown: one row a variant, mean and spread over the seeds."""
    columns = (*ATTRIBUTES, "all")
    lines = [
        f"| variant | held-out loss | {' | '.join(columns)} | CPU s |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    teacher = report["teacher"]
    shares = " | ".join(f"{teacher['followed'][name]:.0%}" for name in columns)
    lines.append(f"| teacher | {teacher['held_out_loss']:.5f} | {shares} | |")
    for name, runs in _by_variant(report).items():
        losses = [run["held_out_loss"] for run in runs]
        spread = f" ± {stdev(losses):.5f}" if len(losses) > 1 else ""
        shares = " | ".join(f"{mean(run['followed'][name] for run in runs):.0%}" for name in columns)
        cpu = mean(run["training_cpu_s"] for run in runs)
        lines.append(f"| {name} | {mean(losses):.5f}{spread} | {shares} | {cpu:.0f} |")
    settings = json.dumps(report["settings"], sort_keys=True)
    seeds = len({run["seed"] for run in report["runs"]})
    return "\n".join([*lines, "", f"Mean over {seeds} seeds (± one standard deviation). {settings}", ""])


def _plot(report: Mapping[str, Any], path: Path) -> None:
    """A row a variant, a dot a seed: the loss, and the share of right pictures; the teacher is a line. A loss half
    as high again as the teacher's is off the scale and told in words."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    by_variant = _by_variant(report)
    teacher = report["teacher"]
    limit = 1.5 * teacher["held_out_loss"]
    figure, (losses, pictures) = plt.subplots(
        1, 2, figsize=(8, 0.8 + 0.4 * len(by_variant)), sharey=True, layout="constrained"
    )
    for row, runs in enumerate(by_variant.values()):
        values = [run["held_out_loss"] for run in runs]
        inside = [value for value in values if value <= limit]
        losses.scatter(inside, [row] * len(inside), color="C0", alpha=0.7)
        if len(inside) < len(values):
            losses.annotate(f"off the scale: {mean(values):.4f} →", (limit, row), ha="right", va="center", fontsize=8)
        pictures.scatter([run["followed"]["all"] for run in runs], [row] * len(runs), color="C1", alpha=0.7)
    for axes, value in ((losses, teacher["held_out_loss"]), (pictures, teacher["followed"]["all"])):
        axes.axvline(value, color="black", linestyle="--", linewidth=1, label="teacher")
        axes.grid(axis="y", alpha=0.3)
    pictures.legend(fontsize=8, loc="lower left")
    losses.set(xlabel="held-out loss", yticks=range(len(by_variant)), yticklabels=list(by_variant))
    losses.set_xlim(right=limit * 1.01)
    losses.invert_yaxis()
    pictures.set(xlabel="pictures right in everything", xlim=(-0.02, 1.02))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
