"""What a stage trains, and what it begins with. `Pruned` is a whole student that lacks modules of its teacher.

Another way to move a network (adapters on a finished student, say) is another class with these methods and another member of
the union `Student`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from diffusers import UNet2DConditionModel
from pydantic import AfterValidator, Discriminator, Tag

from distill.checkpoints.sources import find_family
from distill.checkpoints.surgery import make_student_unet, plan_surgery, student_config, unet_shapes
from distill.common.errors import UserError
from distill.common.files import replacing
from distill.common.validation import STRICT
from distill.models.architectures import Architecture, find_architecture
from distill.models.module_map import LayerMap, ModuleMap, make_module_map


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """`architecture` is a name of the catalogue or a depth pattern; `layer_map` says which of the *teacher's* blocks each
    block is made from, so maps of successive stages must be nested. A student `from_scratch` copies nothing: it begins
    with random weights, as a comparison. In a file its architecture alone may stand for it: `"student": "ssd-1b"`."""

    __pydantic_config__ = STRICT
    kind: Literal["pruned"] = "pruned"
    architecture: str
    layer_map: str | LayerMap = "similarity"
    from_scratch: bool = False

    def modules(self, teacher: Architecture, held: ModuleMap | None) -> ModuleMap:
        """What the student is made from, in the teacher's names; `held` is the map of the student it starts from.

        Raises UserError for a student deeper than what it starts from, and a layer map that does not fit the teacher or is
        not nested in `held`.
        """
        student = find_architecture(self.architecture, teacher.family)
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

    def make_unet(self, source: Path, modules: ModuleMap, held: ModuleMap | None, folder: Path, *, seed: int) -> None:
        """Writes the student's first weights to `folder`: copied from the pipeline folder `source`, whose own map is
        `held` (None: it is the teacher), or random by `seed`."""
        student = find_architecture(self.architecture, find_family(source))
        if not self.from_scratch:
            make_student_unet(source, student, modules.relative_to(held), folder)
            return
        torch.manual_seed(seed)
        with replacing(folder) as temporary:
            UNet2DConditionModel.from_config(student_config(source, student)).save_pretrained(temporary)


def _kind(stated: Any) -> str:
    if isinstance(stated, str):
        return "name"
    return stated.get("kind", "pruned") if isinstance(stated, dict) else getattr(stated, "kind", "pruned")


def _from_name(stated: Any) -> Any:
    return Pruned(architecture=stated) if isinstance(stated, str) else stated


if TYPE_CHECKING:
    Student = Pruned
else:
    Student = Annotated[
        Annotated[str, Tag("name")] | Annotated[Pruned, Tag("pruned")], Discriminator(_kind), AfterValidator(_from_name)
    ]
