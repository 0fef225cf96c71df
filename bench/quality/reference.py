"""Each contestant's picture held against the same weights in fp32, drawn once and kept between runs."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import asdict, dataclass
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
from bench.quality.guard import Quality, guard, with_control
from bench.workload import Workload
from distill.common.errors import UserError, describe_error
from distill.common.files import replacing
from distill.common.progress import say
from engines.choices import EIGHT_BITS

CONTROL = "that is not told its prompt"
"""What the deliberately wrong UNet, the guard's control, lacks."""


@dataclass
class Drawn:
    """One contestant's picture of the main workload, or `failure`; `scores` are FID and CLIP score, where asked for."""

    pictures: Pictures | None
    scores: dict[str, Any] | None = None
    failure: str = ""


def draw_for_guard(contestant: Contestant, workload: Workload, fidelity: FidelityOptions) -> Drawn:
    """Raises UserError for captions and references that cannot be used."""
    try:
        pictures = contestant.draw_watched(contestant.asked(workload))
        pictures.latents = pictures.latents_array()  # the contestant is freed before it is judged
        return Drawn(pictures, _fidelity(contestant, workload, fidelity))
    except UserError:
        raise
    except Exception as error:
        return Drawn(None, failure=describe_error(error))


def judge(
    drawn: dict[str, Drawn], contestants: list[Contestant], workload: Workload, reference: bool, device: str
) -> dict[str, dict[str, Any]]:
    """For each contestant that was drawn the guard's verdict. The contestants are not needed in memory: the fp32 references
    come one by one."""
    judged = [contestant for contestant in contestants if contestant.name in drawn]
    references = _references(judged, workload, device) if reference else {}
    verdicts = {}
    for contestant in judged:
        one = drawn[contestant.name]
        quality = _verdict(one, references.get(contestant.name, "the reference was switched off"), contestant.precision)
        if one.scores is not None and one.scores["words"]:
            quality.passed = False
            quality.words += one.scores["words"]
        verdicts[contestant.name] = asdict(quality) | {"fidelity": one.scores}
        verdict = {True: "passed", False: "FAILED", None: "not checked"}[quality.passed]
        psnr = "identical" if quality.identical else f"{quality.psnr_db:.0f} dB" if quality.psnr_db else ""
        say(f"  {contestant.name}: {verdict} {psnr} {'; '.join(quality.words)}".rstrip())
    return verdicts


def _verdict(one: Drawn, expected: Reference | str, precision: str) -> Quality:
    if one.pictures is None:
        return Quality(False, [one.failure])
    if isinstance(expected, str):
        return guard(one.pictures, None, expected)
    quality = guard(one.pictures, expected.right, eight_bits=precision in EIGHT_BITS)
    return with_control(quality, guard(expected.wrong, expected.right, eight_bits=precision in EIGHT_BITS), CONTROL)


@dataclass
class Reference:
    """The fp32 pictures of a model, and those of the control: the same with a wrong UNet."""

    right: Pictures
    wrong: Pictures


def _references(contestants: list[Contestant], workload: Workload, device: str) -> dict[str, Reference | str]:
    """For each contestant its fp32 reference, or why there is none. One checkpoint is loaded at a time, then dropped;
    contestants with the same weights share a reference, and so do runs on the same device."""
    import torch

    drawn: dict[tuple[str | None, Workload], Reference | str] = {}
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
            drawn[source, asked] = _draw_reference(reference, asked)
        except torch.OutOfMemoryError:
            drawn[source, asked] = "no fp32 reference: the device has too little memory for it"
        except Exception as error:
            drawn[source, asked] = f"no fp32 reference: {describe_error(error)}"
        torch.set_num_threads(threads)
        reference.unload()
    return {one.name: drawn[one.checkpoint, one.asked(workload)] for one in contestants}


def _draw_reference(reference: EagerContestant, workload: Workload) -> Reference:
    """Drawn without TF32, or as an earlier run drew it."""
    import torch

    kept = _kept_reference(reference, workload)
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(kept) as file:
        right, wrong = (Pictures(*(file[f"{which}_{part}"] for part in PARTS)) for which in ("right", "wrong"))
        return Reference(right, wrong)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        right = reference.draw_watched(workload)
        hook = reference.pipe.unet.register_forward_pre_hook(_forget_prompt, with_kwargs=True)
        wrong = reference.draw_watched(workload)
        hook.remove()
    for one in (right, wrong):
        one.latents = one.latents_array()
    arrays = {
        f"{which}_{part}": getattr(one, part) for which, one in (("right", right), ("wrong", wrong)) for part in PARTS
    }
    with (
        suppress(OSError),
        replacing(kept) as temporary,
        temporary.open("wb") as file,
    ):  # drawn again where it is not kept
        np.savez(file, **arrays)
    return Reference(right, wrong)


PARTS = ("images", "latents", "noise_preds")


def _forget_prompt(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"encoder_hidden_states": 0 * kwargs["encoder_hidden_states"]}


def _kept_reference(reference: EagerContestant, workload: Workload) -> Path:
    """Where the picture lies that this drew in an earlier run: all that could change it is in the name."""
    import diffusers
    import torch

    device = torch.cuda.get_device_name() if reference.device.startswith("cuda") else cpu_identity()["model"]
    files: list[object] = []
    if not reference.source.startswith("random:"):
        paths = sorted(path for path in reference.folder.rglob("*") if path.is_file())
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = [CONTROL, reference.source, workload, device, torch.__version__, diffusers.__version__, files]
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:20]
    return reference.workdir / "references" / f"{name}.npz"


def _fidelity(contestant: Contestant, workload: Workload, options: FidelityOptions) -> dict[str, Any] | None:
    clock = make_clock(contestant.device)

    def draw(caption: str, seed: int) -> Any:
        one = workload.for_picture(caption, seed, workload.resolution)
        return timed_draw(contestant, one, clock)[1].images[0]

    return measure_fidelity(draw, options, contestant.device)
