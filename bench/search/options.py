"""What `python -m bench search` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.checkpoints.sources import WORKDIR
from distill.common.errors import UserError, require_above, require_least


@dataclass(kw_only=True)
class SearchOptions:
    """Find what to leave out of a teacher for a latency: a front of students, each with a recipe to train it by."""

    model: str
    """The teacher, as `distill fetch` takes it."""
    cache: str
    """A latent cache of its VAE and text encoders: the pictures that a change is measured on."""
    out: Path
    """Folder for search.json, search.md, search.svg and recipes/; an unfinished search there is continued."""
    speedup: tuple[float, ...] = ()
    """Budgets: how many times as fast as the teacher, end to end."""
    latency_ms: tuple[float, ...] = ()
    """Budgets: milliseconds of one picture."""
    parameters: tuple[int, ...] = ()
    """Budgets: parameters of the UNet at the most."""
    gpu: str = "rtx4090"
    """The GPU to predict for, as a100, rtx4090, h100; that of the results file, where there is one."""
    measured: Path | None = None
    """A results file of `bench run` on that GPU with two or more models of the family, by which the prediction is fitted."""
    runtime: str | None = None
    """The runtime to predict for, as TensorRT, compiled or diffusers; of a results file the baseline's if not given."""
    resolution: str = "first"
    """WIDTHxHEIGHT of the picture; the family's base size if not given."""
    steps: int = 30
    """Denoising steps of the picture, with guidance."""
    samples: int = 8
    """Pictures of the cache to average over."""
    timesteps: int = 3
    """Noise levels to average over."""
    downscale: int = 1
    """Score the pictures at one part in so many of their width and height: on a CPU a full-size search takes 4 or more."""
    exchanges: int = 40
    """Scores spent on exchanging modules of each proposal, at the most."""
    random_cuts: int = 3
    """Cuts at random to show beside each proposal."""
    workdir: Path = WORKDIR
    """Where a model that has to be made or converted is kept."""

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range, and for no budget at all."""
        require_least(1, steps=self.steps, samples=self.samples, timesteps=self.timesteps, downscale=self.downscale)
        require_least(0, exchanges=self.exchanges, random_cuts=self.random_cuts)
        for name, values in (
            ("speedup", self.speedup),
            ("latency_ms", self.latency_ms),
            ("parameters", self.parameters),
        ):
            for value in values:
                require_above(1 if name == "speedup" else 0, **{name: value})
        if not (self.speedup or self.latency_ms or self.parameters):
            raise UserError("no budget: give --speedup, --latency-ms or --parameters, one or several values of each")
