"""What each contestant is asked once its times are taken: its kernels, the quality guard, energy, pictures."""

from __future__ import annotations

import gc
import hashlib
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from bench.contestants.entrants import Entrant, family_prompts
from bench.measure.gpu import Gpu, energy_per_image
from bench.measure.host import cpu_identity
from bench.measure.measure import make_clock, timed_draw
from bench.measure.pictures import Pictures
from bench.measure.workload import Workload
from bench.options import RunOptions
from bench.quality.fidelity import measure_fidelity
from bench.quality.quality import Quality, follows_caption, guard, png_base64
from bench.results import CellRecord, PictureRecord
from distill.common.errors import UserError
from distill.common.files import replacing
from distill.common.progress import say
from distill.models.families import Family

if TYPE_CHECKING:
    from bench.contestants.pipelines import EagerContestant


def kernels_of(entrant: Entrant, main: Workload, cell: CellRecord) -> dict[str, Any]:
    """Milliseconds by kernel family in the denoise loop of `main`, whose rows `cell` holds; or why there are none."""
    from bench.measure.kernels import profile_denoise

    if entrant.contestant.device == "cpu" and entrant.spec.kind not in ("eager", "compiled"):
        return {"families_ms": None, "why": "on a CPU torch's profiler sees torch's own operators alone"}
    step_ms = next((row.step_ms for row in cell.rows if row.contestant == entrant.name), None)
    try:
        return profile_denoise(entrant.contestant, main, step_ms)
    except Exception as error:  # the profiler is torch's, and what it can read differs from driver to driver
        return {"families_ms": None, "why": f"{type(error).__name__}: {error}"}


def _references(entrants: list[Entrant], workload: Workload, device: str) -> dict[str, Pictures | str]:
    """For each contestant its fp32 picture, or why there is none. One checkpoint is loaded at a time, then dropped;
    contestants with the same weights share a picture, and so do runs on the same device."""
    import torch

    from bench.contestants.pipelines import EagerContestant

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
            drawn[source] = _reference_pictures(reference, workload)
        except torch.OutOfMemoryError:
            drawn[source] = "no fp32 reference: the device has too little memory left for it"
        except Exception as error:
            drawn[source] = f"no fp32 reference: {type(error).__name__}: {error}"
        torch.set_num_threads(threads)
        del reference
        gc.collect()
    return {entrant.name: drawn[entrant.checkpoint()] for entrant in entrants}


def _reference_pictures(reference: EagerContestant, workload: Workload) -> Pictures:
    """Drawn without TF32, or as an earlier run drew them."""
    import torch

    kept = _kept_reference(reference, workload)
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(kept) as file:
        return Pictures(file["images"], file["latents"])
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        pictures = timed_draw(reference, workload, make_clock(reference.device))[1]
    with (
        suppress(OSError),
        replacing(kept) as temporary,
        temporary.open("wb") as file,
    ):  # drawn again where it is not kept
        np.savez(file, images=pictures.images, latents=np.asarray(pictures.latents_array()))
    return pictures


def _kept_reference(reference: EagerContestant, workload: Workload) -> Path:
    """Where the picture lies that this drew in an earlier run: all that could change it is in the name."""
    import diffusers
    import torch

    device = torch.cuda.get_device_name() if reference.device.startswith("cuda") else cpu_identity()["model"]
    files: list[object] = []
    if not reference.source.startswith("random:"):
        paths = sorted(path for path in reference.folder.rglob("*") if path.is_file())
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    told = [reference.source, workload, device, torch.__version__, diffusers.__version__, files]
    name = hashlib.sha256(repr(told).encode()).hexdigest()[:20]
    return reference.workdir / "references" / f"{name}.npz"


def quality_of(
    entrants: list[Entrant], workload: Workload, options: RunOptions, device: str
) -> dict[str, dict[str, Any]]:
    """Contestant -> the guard's verdict on its picture of `workload`, with FID and CLIP score where captions were given."""
    references = _references(entrants, workload, device) if options.reference else {}
    verdicts = {}
    for entrant in entrants:
        reference = references.get(entrant.name, "the reference was switched off")
        fidelity = None
        try:
            pictures = timed_draw(entrant.contestant, workload, make_clock(entrant.contestant.device))[1]
            quality = guard(pictures, None, reference) if isinstance(reference, str) else guard(pictures, reference)
            fidelity = _fidelity(entrant, workload, options)
        except UserError:
            raise
        except Exception as error:
            quality = Quality(False, [f"{type(error).__name__}: {error}"])
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


def energy_of(entrant: Entrant, main: Workload, gpu: Gpu, seconds: float, notes: list[str]) -> dict[str, Any]:
    """Joules an image over at least `seconds` of drawing `main`, or why they are not known; `notes` say what raised."""
    clock = make_clock(entrant.contestant.device)

    def draw() -> int:
        timed_draw(entrant.contestant, main, clock)
        return main.batch

    try:
        return energy_per_image(gpu, draw, seconds)
    except Exception as error:
        return {
            "j_per_image": None,
            "why": _note_failure(notes, f"{entrant.name} failed while its energy was read", error),
        }


def _note_failure(notes: list[str], what: str, error: Exception) -> str:
    notes.append(f"{what}: {type(error).__name__}: {error}")
    say(f"  {notes[-1]}")
    return notes[-1]


def draw_pictures(
    entrants: list[Entrant], main: Workload, family: Family, options: RunOptions, notes: list[str]
) -> list[PictureRecord]:
    """The same prompts and seeds for everyone, going round the family's resolutions. A contestant that raises is asked no
    further, and `notes` say so."""
    records, drawing = [], list(entrants)
    sizes = family.resolutions if family.name == "mini" else (main.resolution,)
    base = replace(main, steps=options.picture_steps)
    for index, prompt in enumerate(family_prompts(family, options.pictures)):
        workload = base.for_picture(prompt, 1000 + index, sizes[index % len(sizes)])
        for entrant in list(drawing):
            contestant = entrant.contestant
            try:
                image = timed_draw(contestant, workload, make_clock(contestant.device))[1].images[0]
            except Exception as error:
                _note_failure(notes, f"{entrant.name} failed at the pictures, {workload.resolution}", error)
                drawing.remove(entrant)
                continue
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
