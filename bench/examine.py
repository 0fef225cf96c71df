"""What each contestant is asked once its times are taken: its kernels, the quality guard, energy, pictures."""

from __future__ import annotations

import gc
from dataclasses import asdict, replace
from typing import Any

from bench.entrants import Entrant, family_prompts
from bench.fidelity import measure_fidelity
from bench.gpu import Gpu, energy_per_image
from bench.measure import Pictures, make_clock, timed_draw
from bench.options import RunOptions
from bench.quality import follows_caption, guard, png_base64
from bench.results import CellRecord, PictureRecord
from bench.workload import Workload
from distill.architectures import Family
from distill.progress import say


def kernels_of(entrant: Entrant, main: Workload, cell: CellRecord) -> dict[str, Any]:
    """Milliseconds by kernel family in the denoise loop of `main`, whose rows `cell` holds; or why there are none."""
    from bench.kernels import profile_denoise

    if entrant.contestant.device == "cpu" and entrant.spec.kind not in ("eager", "compiled"):
        return {"families_ms": None, "why": "on a CPU torch's profiler sees torch's own operators alone"}
    step_ms = next((row.step_ms for row in cell.rows if row.contestant == entrant.name), None)
    try:
        return profile_denoise(entrant.contestant, main, step_ms)
    except Exception as error:  # the profiler is torch's, and what it can read differs from driver to driver
        return {"families_ms": None, "why": f"{type(error).__name__}: {error}"}


def _references(entrants: list[Entrant], workload: Workload, device: str) -> dict[str, Pictures | str]:
    """For each contestant its fp32 picture, or why there is none. One checkpoint is loaded at a time, then dropped;
    contestants with the same weights share a picture."""
    import torch

    from bench.pipelines import EagerContestant

    drawn: dict[str | None, Pictures | str] = {None: "no fp32 reference: no checkpoint among its artifacts"}
    threads = torch.get_num_threads()
    for entrant in entrants:
        source = entrant.checkpoint()
        if source in drawn:
            continue
        reference = EagerContestant("reference", str(source), device, workdir=entrant.contestant.workdir)
        # not timed; a narrow net gains nothing from threads, and loses much where the cores are shared
        torch.set_num_threads(1 if entrant.configs.is_narrow else threads)
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                drawn[source] = timed_draw(reference, workload, make_clock(device))[1]
        except torch.OutOfMemoryError:
            drawn[source] = "no fp32 reference: the device has too little memory left for it"
        torch.set_num_threads(threads)
        del reference
        gc.collect()
    return {entrant.name: drawn[entrant.checkpoint()] for entrant in entrants}


def quality_of(
    entrants: list[Entrant], workload: Workload, options: RunOptions, device: str
) -> dict[str, dict[str, Any]]:
    """Contestant -> the guard's verdict on its picture of `workload`, with FID and CLIP score where captions were given."""
    references = _references(entrants, workload, device) if options.reference else {}
    verdicts = {}
    for entrant in entrants:
        pictures = timed_draw(entrant.contestant, workload, make_clock(entrant.contestant.device))[1]
        reference = references.get(entrant.name, "the reference was switched off")
        quality = guard(pictures, None, reference) if isinstance(reference, str) else guard(pictures, reference)
        fidelity = _fidelity(entrant, workload, options)
        if fidelity is not None and fidelity["words"]:
            quality.passed = False
            quality.words += fidelity["words"]
        verdicts[entrant.name] = asdict(quality) | {"fidelity": fidelity}
        word = {True: "passed", False: "FAILED", None: "not checked"}[quality.passed]
        psnr = "identical" if quality.identical else f"{quality.psnr_db:.0f} dB" if quality.psnr_db else ""
        say(f"  {entrant.name}: {word} {psnr} {'; '.join(quality.words)}".rstrip())
    return verdicts


def _fidelity(entrant: Entrant, workload: Workload, options: RunOptions) -> dict[str, Any] | None:
    clock = make_clock(entrant.contestant.device)

    def draw(caption: str, seed: int) -> Any:
        one = workload.for_picture(caption, seed, workload.resolution)
        return timed_draw(entrant.contestant, one, clock)[1].images[0]

    return measure_fidelity(draw, options.fidelity)


def energy_of(entrant: Entrant, main: Workload, gpu: Gpu, seconds: float) -> dict[str, Any]:
    """Joules an image over at least `seconds` of drawing `main`, or why they are not known."""
    clock = make_clock(entrant.contestant.device)

    def draw() -> int:
        timed_draw(entrant.contestant, main, clock)
        return main.batch

    return energy_per_image(gpu, draw, seconds)


def draw_pictures(entrants: list[Entrant], main: Workload, family: Family, options: RunOptions) -> list[PictureRecord]:
    """The same prompts and seeds for everyone, going round the family's resolutions."""
    records = []
    sizes = family.resolutions if family.name == "mini" else (main.resolution,)
    base = replace(main, steps=options.picture_steps)
    for index, prompt in enumerate(family_prompts(family, options.pictures)):
        workload = base.for_picture(prompt, 1000 + index, sizes[index % len(sizes)])
        for entrant in entrants:
            contestant = entrant.contestant
            image = timed_draw(contestant, workload, make_clock(contestant.device))[1].images[0]
            records.append(
                PictureRecord(
                    contestant=entrant.name,
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
