"""What a stage trains. Each kind is one file and a member of the union `Student`; `kind` says in a recipe which it is.

A kind is a frozen dataclass, a part of a recipe. The loop asks it for these:

    adapter                            whether the net that it begins on stays as it is, and what is trained lies apart
    title                              how tables call it
    check()                            raises UserError for what is wrong whatever the teacher
    family                             of a teacher that is not at hand
    architecture_of(teacher)           what the student's UNet is
    modules(teacher, held)             what it is made from, in the teacher's names
    begin(source, …, folder)           its first weights; returns the folder whose `unet` the training loads
    dtype(half), prepare(unet)         how that net is held, and which of its weights have gradients
    save(unet, pipeline, folder, …)    what is left of it
    load(folder, base, dtype)          and read again

Only weights with gradients have moments and an average, and only they are in a checkpoint of the training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Discriminator, Tag

from distill.training.student.lora import Lora
from distill.training.student.pruned import Pruned

__all__ = ["Lora", "Pruned", "Student"]


def _kind(stated: Any) -> str:
    if isinstance(stated, str):
        return "name"
    return stated.get("kind", "pruned") if isinstance(stated, dict) else getattr(stated, "kind", "pruned")


def _from_name(stated: Any) -> Any:
    return Pruned(architecture=stated) if isinstance(stated, str) else stated


if TYPE_CHECKING:
    Student = Pruned | Lora
else:
    Student = Annotated[
        Annotated[str, Tag("name")] | Annotated[Pruned, Tag("pruned")] | Annotated[Lora, Tag("lora")],
        Discriminator(_kind),
        AfterValidator(_from_name),
    ]
