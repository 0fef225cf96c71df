"""A whole student that lacks modules of its teacher: all of its weights are trained, in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import UNet2DConditionModel

from distill.checkpoints.folder import find_family
from distill.checkpoints.load import load_component
from distill.checkpoints.surgery import (
    copy_all_but_unet,
    extend_unet,
    make_student_unet,
    plan_surgery,
    student_config,
    unet_shapes,
)
from distill.common.errors import UserError
from distill.common.files import replacing
from distill.common.validation import STRICT
from distill.models.architectures import Architecture, find_architecture
from distill.models.families import Family
from distill.models.module_map import LayerMap, ModuleMap, make_module_map


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """`architecture` is a name of the catalogue or a depth pattern; `layer_map` says which of the *teacher's* blocks each
    block is made from, so maps of successive stages must be nested. A student `from_scratch` copies nothing: it begins
    with random weights, as a comparison. In a file its architecture alone may stand for it: `"student": "ssd-1b"`."""

    __pydantic_config__ = STRICT
    kind: Literal["pruned"] = "pruned"
    adapter: ClassVar[bool] = False
    architecture: str
    layer_map: str | LayerMap = "similarity"
    from_scratch: bool = False

    @property
    def title(self) -> str:
        return self.architecture

    def check(self) -> None:
        """Raises UserError for what is wrong whatever the teacher: an unknown architecture."""
        find_architecture(self.architecture)

    @property
    def family(self) -> Family | None:
        """None for a depth pattern, which is of its teacher's."""
        return None if ":" in self.architecture else find_architecture(self.architecture).family

    def architecture_of(self, teacher: Architecture) -> Architecture:
        return find_architecture(self.architecture, teacher.family)

    def modules(self, teacher: Architecture, held: ModuleMap | None) -> ModuleMap:
        """What the student is made from, in the teacher's names; `held` is the map of the student it starts from.

        Raises UserError for a student deeper than what it starts from, and a layer map that does not fit the teacher or is
        not nested in `held`.
        """
        student = self.architecture_of(teacher)
        if held and held.teacher != teacher.depth:
            raise UserError(
                f"the student to start from was made from a teacher of depth {held.teacher}, this one has {teacher.depth}; "
                "start from a student of this teacher"
            )
        modules = make_module_map(self.layer_map, teacher.depth, student.depth, held)
        if not self.from_scratch:
            modules.relative_to(held)
        if not isinstance(self.layer_map, str):  # entries of one's own may name modules of other shapes
            plan_surgery(unet_shapes(teacher.unet_config), unet_shapes(student.unet_config), modules)
        return modules

    def begin(
        self,
        source: Path,
        modules: ModuleMap,
        held: ModuleMap | None,
        folder: Path,
        *,
        config: Mapping[str, Any],
        seed: int,
    ) -> Path:
        """Writes the student's first weights to `folder`/unet, unless they are there: copied from the pipeline folder
        `source`, whose own map is `held` (None: it is the teacher), or random by `seed`, and extended by the entries of
        `config`. Returns `folder`."""
        unet = folder / "unet"
        if not unet.exists():
            student = find_architecture(self.architecture, find_family(source))
            if self.from_scratch:
                torch.manual_seed(seed)
                with replacing(unet) as temporary:
                    UNet2DConditionModel.from_config(student_config(source, student)).save_pretrained(temporary)
            else:
                make_student_unet(source, student, modules.relative_to(held), unet)
        extend_unet(unet, config)
        return folder

    def dtype(self, half: torch.dtype) -> torch.dtype:
        """The dtype of the weights while they are trained: fp32, whatever the step computes in (`half`)."""
        return torch.float32

    def prepare(self, unet: UNet2DConditionModel, *, seed: int = 0) -> None:
        """All of the loaded net is trained as it is."""

    def save(self, unet: UNet2DConditionModel, pipeline: Path, folder: Path, dtype: torch.dtype) -> None:
        """Writes a whole pipeline to `folder`: the trained UNet in `dtype`, everything else as in the folder `pipeline`."""
        copy_all_but_unet(pipeline, folder)
        unet.to(dtype).save_pretrained(folder / "unet", safe_serialization=True)

    def load(self, folder: Path, base: Path, dtype: torch.dtype) -> UNet2DConditionModel:
        """The finished student that `save` left in `folder`; `base` is the checkpoint that it began with."""
        return load_component(folder, "unet", dtype)
