"""Each contestant's picture held against the same weights in fp32, drawn once and kept between runs."""

from __future__ import annotations

import gc
import hashlib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from bench.contestants.contestant import Contestant
from bench.contestants.pictures import Pictures
from bench.contestants.pipelines import EagerContestant
from bench.measure.clock import make_clock, timed_draw
from bench.measure.host import cpu_identity
from bench.quality.fidelity import FidelityOptions, measure_fidelity
from bench.quality.guard import Quality, guard
from bench.workload import Workload
from distill.common.errors import UserError, describe_error
from distill.common.files import replacing
from distill.common.progress import say


def _references(contestants: list[Contestant], workload: Workload, device: str) -> dict[str, Pictures | str]:
    """For each contestant its fp32 picture, or why there is none. One checkpoint is loaded at a time, then dropped;
    contestants with the same weights share a picture, and so do runs on the same device."""
    import torch

    drawn: dict[tuple[str | None, Workload], Pictures | str] = {}
    threads = torch.get_num_threads()
    for contestant in contestants:
        source, asked = contestant.checkpoint, contestant.asked(workload)
        if source is None:
            drawn[source, asked] = "no fp32 reference: no checkpoint among its artifacts"
        if (source, asked) in drawn:
            continue
        reference = EagerContestant("reference", str(source), device=device, workdir=contestant.workdir)
        # not timed; a narrow net gains nothing from threads, and loses much where the cores are shared
        torch.set_num_threads(1 if contestant.configs and contestant.configs.is_narrow else threads)
        try:
            drawn[source, asked] = _reference_pictures(reference, asked)
        except torch.OutOfMemoryError:
            drawn[source, asked] = "no fp32 reference: the device has too little memory left for it"
        except Exception as error:
            drawn[source, asked] = f"no fp32 reference: {describe_error(error)}"
        torch.set_num_threads(threads)
        del reference
        gc.collect()
    return {one.name: drawn[one.checkpoint, one.asked(workload)] for one in contestants}


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
    key = [reference.source, workload, device, torch.__version__, diffusers.__version__, files]
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:20]
    return reference.workdir / "references" / f"{name}.npz"


def judge(
    contestants: list[Contestant], workload: Workload, fidelity: FidelityOptions, reference: bool, device: str
) -> dict[str, dict[str, Any]]:
    """For each contestant the guard's verdict on its picture of `workload`, with FID and CLIP score where captions were
    given."""
    references = _references(contestants, workload, device) if reference else {}
    verdicts = {}
    for contestant in contestants:
        expected = references.get(contestant.name, "the reference was switched off")
        scores = None
        try:
            pictures = timed_draw(contestant, workload, make_clock(contestant.device))[1]
            quality = guard(pictures, None, expected) if isinstance(expected, str) else guard(pictures, expected)
            scores = _fidelity(contestant, workload, fidelity)
        except UserError:
            raise
        except Exception as error:
            quality = Quality(False, [describe_error(error)])
        if scores is not None and scores["words"]:
            quality.passed = False
            quality.words += scores["words"]
        verdicts[contestant.name] = asdict(quality) | {"fidelity": scores}
        verdict = {True: "passed", False: "FAILED", None: "not checked"}[quality.passed]
        psnr = "identical" if quality.identical else f"{quality.psnr_db:.0f} dB" if quality.psnr_db else ""
        say(f"  {contestant.name}: {verdict} {psnr} {'; '.join(quality.words)}".rstrip())
    return verdicts


def _fidelity(contestant: Contestant, workload: Workload, options: FidelityOptions) -> dict[str, Any] | None:
    clock = make_clock(contestant.device)

    def draw(caption: str, seed: int) -> Any:
        one = workload.for_picture(caption, seed, workload.resolution)
        return timed_draw(contestant, one, clock)[1].images[0]

    return measure_fidelity(draw, options, contestant.device)
