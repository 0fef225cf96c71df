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
    contestants: list[Contestant], workloads: list[Workload], family: Family, count: int, notes: list[str]
) -> list[PictureRecord]:
    """The same prompts and seeds for everyone, with the main steps. A family whose pictures can be read exactly draws them
    with every number of steps that was timed, going round its resolutions. A contestant that raises is asked no further,
    and `notes` say so."""
    main, records, drawing = workloads[0], [], list(contestants)
    judged = family.vocabulary is not None
    sizes = family.resolutions if judged else (main.resolution,)
    timed = dict.fromkeys(workload.steps for workload in workloads) if judged else [main.steps]
    asked = [(steps, *prompt) for steps in timed for prompt in enumerate(family_prompts(family, count))]
    for steps, index, prompt in asked:
        workload = replace(main, steps=steps).for_picture(prompt, 1000 + index, sizes[index % len(sizes)])
        is_kept = steps == main.steps and index < SHOWN
        for contestant in list(drawing):
            if steps != main.steps and "steps" in contestant.taught:
                continue  # it would draw the same again
            try:
                image = timed_draw(contestant, workload, make_clock(contestant.device))[1].images[0]
            except Exception as error:
                notes.append(
                    f"{contestant.name} failed at the pictures, {workload.resolution}: {describe_error(error)}"
                )
                say(f"  {notes[-1]}")
                drawing.remove(contestant)
                continue
            records.append(
                PictureRecord(
                    contestant=contestant.name,
                    prompt=prompt,
                    seed=workload.seed,
                    resolution=str(workload.resolution),
                    steps=contestant.asked(workload).steps,
                    guidance_scale=contestant.asked(workload).guidance_scale,
                    png_base64=png_base64(image) if is_kept else None,
                    follows=follows_caption(prompt, image),
                )
            )
    return records
