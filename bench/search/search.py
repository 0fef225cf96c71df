"""`python -m bench search`: from a teacher, a cache and a budget to recipes of students.

It stands in this room because a latency is predicted by what this room knows: floors, published figures, and results files
of what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import adaptive_avg_pool2d

from bench.floor.peaks import PEAKS
from bench.results import read_results
from bench.search.costs import StudentCosts, measured_costs, published_costs
from bench.search.options import SearchOptions
from bench.search.output import write_front
from bench.search.quality import Quality
from bench.search.shrink import Budget, Shrinking, Student
from bench.search.space import first_cuts, smallest
from bench.workload import Workload, family_resolutions
from distill.checkpoints.folder import alphas_cumprod_of, checkpoint_hash, find_architecture_of
from distill.checkpoints.load import load_component
from distill.checkpoints.sources import resolve
from distill.common.errors import UserError, unknown
from distill.common.files import read_object, write_json
from distill.common.ownership import require_our_folder
from distill.common.progress import say
from distill.data.cache import LatentCache
from distill.models.architectures import ARCHITECTURES, Architecture
from distill.models.conditioning import unet_multiple
from distill.models.depth import Depth
from distill.models.module_map import ModuleMap, make_module_map
from distill.training.text import TextEncoders

SETTINGS = "settings.json"
BATCH = 4
"""Pictures of one UNet pass, of one resolution."""


def run_search(options: SearchOptions) -> None:
    """Writes the front and the recipes. Raises UserError for an unknown GPU or runtime, a budget that no student meets, a
    cache of another model, or an `out` that holds something else."""
    require_our_folder(options.out, "a search", [SETTINGS], ("teacher_hash", "cache"))
    results = read_results(options.measured) if options.measured else None
    gpu = find_gpu(options.gpu)
    checkpoint = resolve(options.model, options.workdir)
    architecture = find_architecture_of(checkpoint)
    resolution = family_resolutions(options.resolution, architecture.family)[0]
    workload = Workload(resolution=resolution, steps=options.steps)
    if results:
        costs = measured_costs(architecture, results, workload, options.runtime)
    else:
        costs = published_costs(architecture, checkpoint, gpu, options.runtime or "TensorRT", workload)
    budgets = make_budgets(options, costs)
    latents = LatentCache(options.cache, batch_size=min(BATCH, options.samples), seed=0)
    _check_cache(latents, checkpoint)
    multiple = unet_multiple(architecture.unet_config)
    batches = [
        batch | {"latents": downscaled(batch["latents"], options.downscale, multiple)}
        for batch in map(latents.batch, range(max(1, options.samples // BATCH)))
    ]
    settings = {
        "teacher_hash": checkpoint_hash(checkpoint),
        "cache": latents.digest,
        "samples": options.samples,
        "timesteps": options.timesteps,
        "downscale": options.downscale,
    }
    _keep_settings(options.out / SETTINGS, settings)
    quality = make_quality(checkpoint, batches, latents.holds_text, options)
    shrinking = Shrinking(architecture.depth, quality, costs.expected_ms, say)
    _tell_cost(architecture.depth, quality, budgets, options)
    students = list(_students(architecture, budgets, shrinking, options))
    write_front(options.out, options.model, architecture, costs, students)


def find_gpu(name: str) -> str:
    """The key of `PEAKS` for a GPU's name or the first part of it: the peak that published figures are held against. Raises
    UserError."""
    known = [key for key, peak in PEAKS.items() if not peak.floor_only]
    found = [key for key in known if key == name or key.startswith(name)] if name else []
    if not found:
        raise unknown("GPU", name, known)
    return found[0]


def make_budgets(options: SearchOptions, costs: StudentCosts) -> list[Budget]:
    """Raises UserError for one that no student of the space meets."""
    whole = costs.expected_ms(costs.teacher)
    budgets = [Budget(f"{n:g}x", partial(_within, costs.expected_ms, whole / n)) for n in options.speedup]
    budgets += [Budget(f"{n:g} ms", partial(_within, costs.expected_ms, n)) for n in options.latency_ms]
    budgets += [Budget(f"{n:,} parameters", partial(_within, costs.parameters, n)) for n in options.parameters]
    least = smallest(costs.architecture.depth)
    least_ms = costs.expected_ms(least)
    for budget in budgets:
        if not budget.met(least):
            raise UserError(
                f"no student meets {budget.text}: the smallest, {least.student}, takes {least_ms:.4g} of the teacher's "
                f"{whole:.4g} ms ({whole / least_ms:.3g}x) and has {costs.parameters(least):,} parameters; fewer steps "
                "save beyond that (--steps, and recipes as lcm-sdxl)"
            )
    return budgets


def _within(cost: Callable[[ModuleMap], float], most: float, modules: ModuleMap) -> bool:
    return cost(modules) <= most


def _check_cache(latents: LatentCache, checkpoint: Path) -> None:
    if others := latents.check_teacher(checkpoint):
        raise UserError(
            f"the cache was made with another {' and '.join(others)} than {checkpoint} has; make one with this model: "
            f"python -m distill cache --model {checkpoint}"
        )


def _keep_settings(path: Path, settings: dict[str, object]) -> None:
    """Raises UserError where a search by other settings was begun."""
    if path.exists() and (before := read_object(path)) != settings:
        other = [name for name in settings if before.get(name) != settings[name]]
        raise UserError(f"{path.parent} holds a search with another {', '.join(other)}; choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def make_quality(
    checkpoint: Path, batches: Sequence[dict[str, torch.Tensor]], holds_text: bool, options: SearchOptions
) -> Quality:
    """Loads the UNet in fp32, and the text encoders where `batches` hold tokens alone, for as long as they are needed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not holds_text:
        encoders = TextEncoders.load(checkpoint, torch.float32, torch.device("cpu"))
        batches = [encoders.encoded(batch) for batch in batches]
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    levels = [round((i + 0.5) * 1000 / options.timesteps) for i in range(options.timesteps)]
    unet = load_component(checkpoint, "unet", torch.float32).to(device)
    return Quality(unet, batches, alphas_cumprod_of(checkpoint).to(device), levels, options.out / "scores.jsonl")


def downscaled(latents: torch.Tensor, factor: int, multiple: int) -> torch.Tensor:
    """Latents (batch, channels, height, width) averaged to one part in `factor` of each side, rounded to a multiple of
    `multiple`, as the UNet's levels need."""
    height, width = (max(multiple, round(side / factor / multiple) * multiple) for side in latents.shape[-2:])
    return adaptive_avg_pool2d(latents, (height, width))


def _tell_cost(teacher: Depth, quality: Quality, budgets: Sequence[Budget], options: SearchOptions) -> None:
    """Before anything is computed: how many UNet passes the search will take."""
    first = len(first_cuts(teacher))
    later = 3 * sum(n - 1 for n in teacher.transformers.values())
    beside = len(budgets) * (options.exchanges + options.random_cuts + 1)
    scores = first + later + beside
    say(
        f"about {scores} scores of {quality.passes} UNet passes each, of {min(BATCH, options.samples)} pictures: {first} of "
        f"single cuts, up to {later} on the way down, {beside} beside it; each is kept, so a stopped search goes on"
    )


def _students(
    architecture: Architecture, budgets: Sequence[Budget], shrinking: Shrinking, options: SearchOptions
) -> Iterator[Student]:
    """The way down, the proposals, and what stands beside them."""
    shrinking.score_alone()
    path, reached = shrinking.greedy(budgets)
    yield from path
    for budget in budgets:
        yield shrinking.exchanged(reached[budget.text], budget, options.exchanges)
        yield shrinking.one_shot(budget)
        for seed in range(options.random_cuts):
            yield shrinking.at_random(budget, seed)
    yield from _published(architecture, shrinking)


def _published(architecture: Architecture, shrinking: Shrinking) -> Iterator[Student]:
    """The catalogue's students of the same levels, where the teacher is deep enough for them."""
    for known in ARCHITECTURES.values():
        if known.family is architecture.family and len(known.depth.down) == len(architecture.depth.down):
            try:
                modules = make_module_map("first", architecture.depth, known.depth)
            except UserError:
                continue
            yield Student("published", modules, shrinking.change(modules), name=known.title)
