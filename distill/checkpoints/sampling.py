"""How a checkpoint that was taught to draw in few steps, or in one pass a step, wants to be drawn with.

It stands in the checkpoint's slimxl.json as `sampling`, goes on into the ONNX folder's and into a bundle's manifest; the
scheduler itself lies in the pipeline's folder, where diffusers finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, PositiveInt

from distill.common.errors import UserError
from distill.common.files import read_object, write_json
from distill.common.validation import STRICT, from_json


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """`scheduler` is a class of diffusers with some of its `settings`, None where the checkpoint keeps its own. `steps` are
    those that it was taught (None: any), `most_steps` the most that its schedule has. `guidance_scale` is diffusers'; where
    it is `one_pass`, the UNet is called once a step at every scale."""

    __pydantic_config__ = STRICT
    scheduler: str | None = None
    settings: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    steps: PositiveInt | None = None
    most_steps: PositiveInt | None = None
    guidance_scale: NonNegativeFloat | None = None
    one_pass: bool = False

    @property
    def call_arguments(self) -> dict[str, Any]:
        """What a pipeline of diffusers is called with."""
        stated = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}
        return {name: value for name, value in stated.items() if value is not None}

    def check(self, steps: int) -> None:
        """Raises UserError for more steps than there are."""
        if self.most_steps and steps > self.most_steps:
            raise UserError(
                f"{steps} steps are more than this model's schedule has ({self.most_steps}); it was taught to draw in "
                f"{self.steps or self.most_steps}"
            )

    def make_scheduler(self, config: Mapping[str, Any]) -> Any:
        """The scheduler with the noise levels of another one's `config`."""
        import diffusers

        return getattr(diffusers, str(self.scheduler)).from_config(dict(config), **self.settings)

    def write_scheduler(self, folder: Path) -> None:
        """Puts the scheduler in place of the one that a pipeline folder has."""
        if self.scheduler is None:
            return
        self.make_scheduler(read_object(folder / "scheduler" / "scheduler_config.json")).save_pretrained(
            folder / "scheduler"
        )
        index = read_object(folder / "model_index.json")
        write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", self.scheduler]})


def sampling_of(folder: Path) -> Sampling | None:
    """What the slimxl.json of a checkpoint or an ONNX folder says; None where it says nothing. Raises UserError for what
    cannot be."""
    path = folder / "slimxl.json"
    stated = read_object(path).get("sampling") if path.is_file() else None
    if stated is None:
        return None
    try:
        return from_json(Sampling, stated)
    except ValueError as error:
        raise UserError(f"{path} is damaged at sampling.{error}; make the folder again") from None
