"""What is timed: text to image end to end, prompt in, PNG-ready uint8 array out.

A workload says everything that changes the amount of work: resolution, batch, steps, guidance, scheduler. The seed
and the prompts are part of it too, so that two contestants can be asked for the very same picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from distill.common.errors import UserError, unknown
from distill.common.options import finite_number
from distill.models.families import Family
from distill.models.resolution import Resolution, parse_resolutions

SCHEDULERS = {  # name on the command line -> class in diffusers; "default" is the checkpoint's own
    "default": None,
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}

MLPERF_NEGATIVE_PROMPT = "normal quality, low quality, worst quality, low res, blurry, nsfw, nude"
"""What MLPerf inference draws every caption with, and the same noise for all (mlcommons/inference, text_to_image)."""

PROMPTS = (
    "a lighthouse on a cliff at dusk, long exposure",
    "a bowl of ramen on a wooden table, steam rising",
    "an astronaut reading a newspaper in a park",
    "a red fox in fresh snow, early light",
    "a street market in the rain, neon reflections",
    "a paper ship on a calm lake, soft fog",
)


def check_scheduler(name: str) -> None:
    """Raises UserError for what is neither a short name nor a scheduler class of diffusers."""
    import diffusers

    if name not in SCHEDULERS and not (name.endswith("Scheduler") and hasattr(diffusers, name)):
        raise unknown("scheduler", name, [*SCHEDULERS, "any scheduler class of diffusers, e.g. HeunDiscreteScheduler"])


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One cell of a benchmark. `batch` counts images; under guidance the UNet sees twice as many latents. With `one_noise`
    every picture of another prompt begins with the same noise too."""

    resolution: Resolution
    steps: int
    batch: int = 1
    guidance_scale: float = 5.0
    scheduler: str = "default"
    seed: int = 0
    negative_prompt: str | None = None
    one_noise: bool = False
    prompts: tuple[str, ...] = PROMPTS

    @property
    def guided(self) -> bool:
        """Classifier-free guidance runs the UNet on a doubled batch; diffusers does so where the scale is above 1."""
        return self.guidance_scale > 1

    @property
    def unet_batch(self) -> int:
        return self.batch * (2 if self.guided else 1)

    @property
    def name(self) -> str:
        guidance = f"guidance {self.guidance_scale:g}" if self.guided else "no guidance"
        scheduler = "" if self.scheduler == "default" else f", {self.scheduler}"
        negative = "" if self.negative_prompt is None else ", negative prompt"
        return f"{self.resolution}, {self.steps} steps, batch {self.batch}, {guidance}{scheduler}{negative}"

    def batch_prompts(self) -> list[str]:
        """The prompts of one call, the list taken round as often as the batch needs."""
        return [self.prompts[index % len(self.prompts)] for index in range(self.batch)]

    def for_picture(self, prompt: str, seed: int, resolution: Resolution) -> Workload:
        seed = self.seed if self.one_noise else seed
        return replace(self, prompts=(prompt,), seed=seed, batch=1, resolution=resolution)


def family_prompts(family: Family, count: int) -> list[str]:
    """Prompts that the family has learnt: captions of the shapes world, or plain prompts."""
    if family.vocabulary is None:
        return [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    import numpy as np

    from distill.data.shapes import random_scene

    rng = np.random.default_rng(2024)
    return [random_scene(rng).caption for _ in range(count)]


def common_sizes(family: Family, sizes: Mapping[str, Sequence[Resolution] | None]) -> tuple[Resolution, ...]:
    """The family's resolutions, or those that all have whose `sizes` by name are not None. Raises UserError where these have
    none in common."""
    limited = {name: ours for name, ours in sizes.items() if ours is not None}
    if not limited:
        return family.resolutions
    first, *others = limited.values()
    common = tuple(size for size in first if all(size in ours for ours in others))
    if not common:
        told = "; ".join(f"{name} has {', '.join(map(str, ours))}" for name, ours in limited.items())
        raise UserError(f"the bundles have no size in common: {told}; build one more into one of them")
    return common


def family_resolutions(
    text: str, family: Family, sizes: Mapping[str, Sequence[Resolution] | None] | None = None
) -> tuple[Resolution, ...]:
    """`all` or `first` of the family's, or WIDTHxHEIGHT,... of any size that it draws, and that everyone has whose `sizes`
    are given. Raises UserError."""
    sizes = sizes or {}
    resolutions, multiple = parse_resolutions(text, common_sizes(family, sizes)), family.size_multiple
    for one in resolutions:
        if any(side == 0 or side % multiple for side in (one.width, one.height)):
            near = Resolution(*(max(multiple, round(side / multiple) * multiple) for side in (one.width, one.height)))
            raise UserError(
                f"resolution {one}: both sides must be multiples of {multiple} in the {family.name} family; "
                f"the nearest is {near}"
            )
        for name, ours in sizes.items():
            if ours is not None and one not in ours:
                raise UserError(f"{name} has no engine for {one}; it has {', '.join(map(str, ours))}")
    return resolutions


def parse_scales(text: str) -> list[float]:
    """A comma-separated list of guidance scales. Raises UserError."""
    try:
        scales = [finite_number(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"guidance {text!r} is not a comma-separated list of finite numbers, e.g. 5,1") from None
    if not all(scale >= 0 for scale in scales):
        raise UserError(f"guidance {text!r}: every scale must be a number of at least 0, e.g. 5,1")
    return scales


def make_workloads(
    resolutions: Sequence[Resolution],
    steps: list[int],
    *,
    batches: list[int],
    guidance_scales: list[float],
    scheduler: str,
    seed: int,
    prompts: tuple[str, ...],
    mlperf: bool = False,
) -> list[Workload]:
    """The first of each list makes the main workload; every other value is tried with the rest held at the first.

    A full product of nine resolutions, three step counts and two batches would mostly repeat itself, and cost hours.
    """
    main = Workload(
        resolution=resolutions[0],
        steps=steps[0],
        batch=batches[0],
        guidance_scale=guidance_scales[0],
        scheduler=scheduler,
        seed=seed,
        negative_prompt=MLPERF_NEGATIVE_PROMPT if mlperf else None,
        one_noise=mlperf,
        prompts=prompts,
    )
    others = [
        *(replace(main, resolution=resolution) for resolution in resolutions[1:]),
        *(replace(main, steps=count) for count in steps[1:]),
        *(replace(main, batch=batch) for batch in batches[1:]),
        *(replace(main, guidance_scale=scale) for scale in guidance_scales[1:]),
    ]
    return list(dict.fromkeys([main, *others]))
