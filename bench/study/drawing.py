"""`study make`: every model draws every prompt from the same seed, and what is drawn already stays."""

from __future__ import annotations

import gc
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from bench.contestants.contestant import Contestant, find_family
from bench.contestants.inventory import parse_artifacts
from bench.contestants.spec import check_device, default_device, make_contestant, parse_specs
from bench.measure.clock import make_clock, timed_draw
from bench.study.files import MARKER, Item, Key, Model, key_path, picture_path, read_key
from bench.study.options import MakeOptions
from bench.study.page import write_page
from bench.study.prompts import choose_prompts
from bench.workload import Workload, check_scheduler, family_resolutions, parse_scales
from distill.checkpoints.sampling import Sampling
from distill.common.errors import UserError, describe_error, parse_counts, require_between, require_least
from distill.common.files import exclusive, read_json, remove_leftovers, replacing, write_json
from distill.common.ownership import require_our_folder, require_writable_file
from distill.common.progress import say, track
from distill.models.resolution import Resolution

Number = TypeVar("Number", int, float)
PARTS = {"models": "models, steps or guidance", "items": "prompts, seeds or sizes"}
NUMBERS = ("scheduler", "pairs", "repeats", "same")
DRAWN_AT = 1_000_000_000
"""The time that all pictures bear, in seconds since 1970: when one was drawn would tell by whom."""


def make_study(options: MakeOptions) -> Key:
    """Draws what is not drawn yet, then writes the page; returns the key.

    Raises UserError for bad input before anything is loaded, and where a model cannot draw.
    """
    require_between(1, 10_000, count=options.count or 1, pairs=options.pairs)
    require_least(0, seed=options.seed, repeats=options.repeats, same=options.same)
    check_scheduler(options.scheduler)
    if options.device is not None:
        check_device(options.device)
    folder, key_file = options.out, key_path(options.out)
    require_our_folder(folder, "a study", [MARKER], ("schema_version", "study", "items"))
    require_writable_file(key_file, ("schema_version", "study", "secret"))
    contestants = _contestants(options)
    planned = _plan(options, contestants)
    with exclusive(key_file, say):
        key = _begun(folder, key_file, planned) or planned
        write_json(key_file, key.model_dump())  # first: what is drawn is worth nothing without it
        write_json(folder / MARKER, key.public().model_dump())
        remove_leftovers(folder / "pictures")
        for index in range(len(contestants)):
            _draw(_contestants(options)[index], key, index, folder)
        write_page(folder, key.public())
    say(f"wrote {folder / 'index.html'}; {key_file} says whose the pictures are: keep it to yourself")
    return key


def _contestants(options: MakeOptions) -> list[Contestant]:
    """Checked, not loaded."""
    specs = parse_specs(options.models)
    if len(specs) < 2:
        raise UserError("--models names one model; a comparison needs two or more")
    artifacts = parse_artifacts(options.artifacts, [spec.name for spec in specs])
    device = options.device or default_device()
    made = [make_contestant(spec, device, workdir=options.workdir, artifacts=artifacts[spec.name]) for spec in specs]
    for contestant in made:
        contestant.check()
    return made


def _plan(options: MakeOptions, contestants: list[Contestant]) -> Key:
    family = find_family(contestants)
    sizes = family_resolutions(options.resolutions, family)
    counts = None if options.steps is None else parse_counts("--steps", options.steps, most=1000)
    steps = _of_each("--steps", counts, contestants)
    scales = _of_each("--guidance", None if options.guidance is None else parse_scales(options.guidance), contestants)
    prompts = choose_prompts(options.prompts, options.count, family)
    return Key(
        study=secrets.token_hex(6),
        secret=secrets.token_hex(16),
        models=[_model(one, count, scale) for one, count, scale in zip(contestants, steps, scales, strict=True)],
        items=[
            Item(
                prompt=prompt,
                category=category,
                seed=options.seed + index,
                resolution=str(sizes[index % len(sizes)]),
            )
            for index, (prompt, category) in enumerate(prompts)
        ],
        scheduler=options.scheduler,
        pairs=options.pairs,
        repeats=options.repeats,
        same=options.same,
    )


def _of_each(option: str, given: list[Number] | None, contestants: list[Contestant]) -> Sequence[Number | None]:
    """None where nothing is given."""
    if given is None:
        return [None] * len(contestants)
    if len(given) not in (1, len(contestants)):
        raise UserError(
            f"{option} has {len(given)} numbers for {len(contestants)} models; give one for all or one for each"
        )
    return given * len(contestants) if len(given) == 1 else given


def _model(contestant: Contestant, steps: int | None, scale: float | None) -> Model:
    """Drawn as it is told, else as it was taught, else in 30 steps under guidance 5; behind +taught as it was taught."""
    taught = contestant.sampling or Sampling()
    if scale is None:
        scale = 5.0 if taught.guidance_scale is None else taught.guidance_scale
    steps = int(contestant.taught.get("steps", steps or taught.steps or 30))
    scale = contestant.taught.get("guidance_scale", scale)
    return Model(name=contestant.name, spec=contestant.spec, steps=steps, guidance_scale=scale)


def _begun(folder: Path, key_file: Path, planned: Key) -> Key | None:
    """The key of a study that an earlier call began in this folder; None where none did. Raises UserError where that was
    another study: votes on it would be lost."""
    marker = folder / MARKER
    if not key_file.exists():
        if marker.exists():
            raise UserError(f"{folder} is a study whose key {key_file} is gone; bring it back or choose another --out")
        return None
    key = read_key(key_file)
    if marker.exists() and read_json(marker).get("study") != key.study:
        raise UserError(f"{key_file} is the key of another study than {folder}; choose another --out")
    if key.model_copy(update={"study": planned.study, "secret": planned.secret}) != planned:
        changed = [f"other {said}" for name, said in PARTS.items() if getattr(key, name) != getattr(planned, name)]
        numbers = [name for name in NUMBERS if getattr(key, name) != getattr(planned, name)]
        changed += [f"--{name} {getattr(key, name)} (not {getattr(planned, name)})" for name in numbers]
        raise UserError(f"{folder} was begun with {' and '.join(changed)}; ask for the same, or choose another --out")
    return key


def _draw(contestant: Contestant, key: Key, model: int, folder: Path) -> None:
    """Every picture of one model that is not there, each whole or not at all. It is loaded only where one is missing."""
    names = {item: key.picture(item, model) for item in range(len(key.items))}
    todo = [item for item, name in names.items() if not picture_path(folder, name).exists()]
    if not todo:
        return
    about, clock = key.models[model], make_clock(contestant.device)
    try:
        contestant.load()
        for item in track(todo, about.name, "picture", done=len(names) - len(todo)):
            one = key.items[item]
            workload = Workload(
                resolution=Resolution.parse(one.resolution),
                steps=about.steps,
                guidance_scale=about.guidance_scale,
                scheduler=key.scheduler,
                seed=one.seed,
                prompts=(one.prompt,),
            )
            pictures = timed_draw(contestant, workload, clock)[1]
            for fault in pictures.faults():
                say(f"  {about.name}, {one.prompt!r}: {fault}")
            _save(pictures.images[0], picture_path(folder, names[item]))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{about.name} could not draw: {describe_error(error)}; what is drawn stays, the same command goes on"
        ) from None
    finally:
        del contestant
        gc.collect()  # its memory is the next one's


def _save(image: np.ndarray, path: Path) -> None:
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG")
        os.utime(temporary, (DRAWN_AT, DRAWN_AT))
