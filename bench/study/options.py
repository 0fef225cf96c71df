"""What `python -m bench study make` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from distill.checkpoints.sources import WORKDIR


@dataclass(kw_only=True)
class MakeOptions:
    """Draws the pictures of a study and writes the folder that raters get."""

    models: list[str]
    """NAME=KIND[@OPTION]:SOURCE, two or more, as in `bench run`; the others are told against the first."""
    out: Path
    """The folder to make; OUT.key.json beside it says whose the pictures are, and stays with you."""
    prompts: Path | None = None
    """A .json file {"category": ["prompt", ...]}, or text with one prompt a line. None: the list that ships."""
    count: int | None = None
    """How many of the prompts, the categories taken in turn. None: all of them."""
    steps: str | None = None
    """Denoising steps: one number, or one for each model, comma-separated; by itself what each was taught, else 30."""
    guidance: str | None = None
    """Guidance scales in the same way, else 5; 1 and below mean no guidance."""
    resolutions: str = "first"
    """`all` or `first` of the model family's, or WIDTHxHEIGHT,...; prompts take them in turn."""
    scheduler: str = "default"
    """default (the checkpoint's own), euler, euler-a, ddim, dpm++, unipc, lcm, or a scheduler class of diffusers."""
    seed: int = 0
    """Of the first prompt's noise; the next prompt's is one higher."""
    pairs: int = 40
    """Pairs that one rater sees."""
    repeats: int = 6
    """How many of them come again, the sides changed."""
    same: int = 4
    """How many pairs show one picture twice."""
    artifacts: list[str] = field(default_factory=list)
    """NAME=FOLDER, any number: a model's checkpoint, where its own source does not say its family and sizes."""
    device: str | None = None
    """cpu or cuda; the GPU if there is one."""
    workdir: Path = WORKDIR
    """Folder for checkpoints that have to be made or converted."""
