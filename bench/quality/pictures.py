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


def draw_pictures(
    contestant: Contestant, main: Workload, family: Family, count: int, steps: int, notes: list[str]
) -> list[PictureRecord]:
    """The same prompts and seeds for everyone, going round the family's resolutions, or those that the contestant has. One
    that raises is asked no further, and `notes` say so."""
    records = []
    sizes = family.resolutions if family.vocabulary else (main.resolution,)
    sizes = tuple(size for size in sizes if size in (contestant.sizes or sizes)) or (main.resolution,)
    base = replace(main, steps=steps)
    for index, prompt in enumerate(family_prompts(family, count)):
        workload = base.for_picture(prompt, 1000 + index, sizes[index % len(sizes)])
        try:
            image = timed_draw(contestant, workload, make_clock(contestant.device))[1].images[0]
        except Exception as error:
            notes.append(f"{contestant.name} failed at the pictures, {workload.resolution}: {describe_error(error)}")
            say(f"  {notes[-1]}")
            break
        records.append(
            PictureRecord(
                contestant=contestant.name,
                prompt=prompt,
                seed=workload.seed,
                resolution=str(workload.resolution),
                steps=workload.steps,
                guidance_scale=workload.guidance_scale,
                png_base64=png_base64(image),
                follows=follows_caption(prompt, image),
            )
        )
    return records
