"""What every contestant is: something that draws, and what is known of it without loading it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.contestants.pictures import Pictures
from bench.floor.roofline import Costs, ModelConfigs, component_costs
from bench.workload import Workload
from distill.checkpoints.sampling import Sampling
from distill.checkpoints.sources import WORKDIR
from distill.models.architectures import find_architecture
from distill.models.families import SDXL_FAMILY, Family
from distill.models.resolution import Resolution

STAGES = ("prepare", "tokenise", "text_encoders", "denoise", "vae_decode", "post_process")
Mark = Callable[[str], None]
"""Is called with a stage's name when that stage ends."""


@dataclass
class Contestant:
    """The base of every kind, which brings its own `load` and `draw`. `device` is `cpu` or `cuda`; `runtime` and `precision`
    are text for the report; `accumulates_fp32`: its half-precision products are summed in fp32 (torch's are); `spec` is
    the contestant as the command line named it; `workdir` takes what is fetched or made. `artifacts` maps the model's
    checkpoint, ONNX and bundle folders to their descriptions by `inventory.describe`. One drawn `as_taught` takes the
    steps and the guidance scale that its model was taught, whatever a workload says."""

    name: str
    _: KW_ONLY
    device: str = "cpu"
    precision: str = "none"
    runtime: str = ""
    accumulates_fp32: bool = False
    spec: str = ""
    workdir: Path = WORKDIR
    artifacts: dict[Path, dict[str, Any]] = field(default_factory=dict)
    as_taught: bool = False

    def check(self) -> None:
        """Raises UserError, before anything is loaded, for a source that cannot be had or is of no use here."""

    def load(self) -> None:
        """Is timed as the cold start, and called once."""

    def unload(self) -> None:
        """Frees what `load` took; `load` may follow."""

    def draw(self, workload: Workload, mark: Mark) -> Pictures:
        raise NotImplementedError

    def draw_watched(self, workload: Workload) -> Pictures:
        """Not timed; with the noise_pred of each step, where the contestant has one."""
        return self.draw(workload, lambda _: None)

    @property
    def sizes(self) -> tuple[Resolution, ...] | None:
        """The only sizes that it draws, the first the main one; None where any of its family will do. Read without
        loading."""
        return None

    @property
    def vae_dtype(self) -> str | None:
        """The type that the VAE decodes in, once it is loaded; None where it cannot be seen."""
        return None

    @property
    def random_weights(self) -> bool:
        """Whether its weights are made, not taught."""
        return str(self.checkpoint).startswith("random:")

    def weights_hash(self) -> tuple[str | None, str]:
        """(sha256 of its weights, what it was taken over, or why there is none), once it is loaded."""
        return None, "it has no weights"

    @property
    def engines(self) -> list[str] | None:
        """sha256 of every engine that was loaded; None where it has none."""
        return None

    @property
    def checkpoint(self) -> str | None:
        """Where its weights come from, as a source that every room knows; None where nobody said."""
        return next((str(folder) for folder, one in self.artifacts.items() if one["kind"] == "checkpoint"), None)

    @cached_property
    def configs(self) -> ModelConfigs | None:
        """Of its checkpoint, None where it has none. Raises UserError for one that cannot be had."""
        if self.checkpoint is None:
            return None
        kind, _, name = self.checkpoint.partition(":")
        if kind == "random":
            return ModelConfigs.of(find_architecture(name).configs)
        return ModelConfigs.of_folder(self.checkpoint_folder())

    @property
    def sampling(self) -> Sampling | None:
        """How a few-step model is drawn with; None where it does not say."""
        return None

    @cached_property
    def taught(self) -> dict[str, float]:
        """What it draws with in place of a workload's `steps` and `guidance_scale`, once `as_taught` is settled."""
        known = self.sampling if self.as_taught else None
        stated = {"steps": known.steps, "guidance_scale": known.guidance_scale} if known else {}
        return {name: value for name, value in stated.items() if value is not None}

    def asked(self, workload: Workload) -> Workload:
        """What it draws where it is asked for `workload`."""
        return replace(workload, **self.taught)  # type: ignore[arg-type]

    def checkpoint_folder(self) -> Path:
        from distill.checkpoints.sources import resolve

        return resolve(str(self.checkpoint), self.workdir)

    @property
    def why_no_costs(self) -> str | None:
        return None if self.configs else "no checkpoint among its artifacts, so its FLOPs are not known"

    def costs(self, workload: Workload) -> Costs | None:
        return component_costs(self.configs, self.asked(workload)) if self.configs else None


def find_family(contestants: list[Contestant]) -> Family:
    """That of the first contestant whose checkpoint is known; SDXL where nobody's is. Raises UserError for a refiner."""
    families = {one.name: one.configs.family for one in contestants if one.configs}
    for name, family in families.items():
        family.conditioning.require_drawing_from_text(f"contestant {name!r}")
    return next(iter(families.values()), SDXL_FAMILY)
