"""The pictures of a report: the same prompts and seeds for every contestant."""

from __future__ import annotations

from dataclasses import replace

from bench.contestants.contestant import Contestant
from bench.measure.clock import make_clock, timed_draw
from bench.quality.guard import follows_caption, png_base64
from bench.results import PictureRecord
from bench.workload import Workload, family_prompts
from distill.common.errors import describe_error
from distill.common.progress import say
from distill.models.families import Family

SHOWN = 9
"""Prompts of which the pictures themselves are kept, those with the main steps."""


def draw_pictures(
    contestant: Contestant, workloads: list[Workload], family: Family, count: int, notes: list[str]
) -> list[PictureRecord]:
    """The same prompts and seeds for everyone, with the main steps. A family whose pictures can be read exactly draws them
    with every number of steps that was timed, going round its resolutions, or those that the contestant has. One that
    raises is asked no further, and `notes` say so."""
    main, records = workloads[0], []
    judged = family.vocabulary is not None
    sizes = family.resolutions if judged else (main.resolution,)
    sizes = tuple(size for size in sizes if size in (contestant.sizes or sizes)) or (main.resolution,)
    timed = dict.fromkeys(workload.steps for workload in workloads)
    if not judged or "steps" in contestant.taught:  # it would draw the same again
        timed = {main.steps: None}
    asked = [(steps, *prompt) for steps in timed for prompt in enumerate(family_prompts(family, count))]
    for steps, index, prompt in asked:
        workload = replace(main, steps=steps).for_picture(prompt, 1000 + index, sizes[index % len(sizes)])
        workload = contestant.asked(workload)
        try:
            image = timed_draw(contestant, workload, make_clock(contestant.device))[1].images[0]
        except Exception as error:
            notes.append(f"{contestant.name} failed at the pictures, {workload.resolution}: {describe_error(error)}")
            say(f"  {notes[-1]}")
            break
        is_kept = steps == main.steps and index < SHOWN
        records.append(
            PictureRecord(
                contestant=contestant.name,
                prompt=prompt,
                seed=workload.seed,
                resolution=str(workload.resolution),
                steps=workload.steps,
                guidance_scale=workload.guidance_scale,
                png_base64=png_base64(image) if is_kept else None,
                follows=follows_caption(prompt, image),
            )
        )
    return records
