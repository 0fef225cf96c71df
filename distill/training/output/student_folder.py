"""The student that a stage ends with, as a whole pipeline folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from distill.checkpoints.folder import find_family
from distill.checkpoints.sampling import Sampling
from distill.common.files import read_json, replacing, write_json
from distill.training.accelerator import trained_parameters
from distill.training.prepare import PreparedStage
from distill.training.recipes import Recipe

LOCAL_PATHS = {"_name_or_path", "name_or_path"}
"""Under which diffusers and transformers note the folder that a network was loaded from."""


def student_dtype(teacher_folder: Path) -> torch.dtype:
    """What a student is stored in: fp16 at full size, fp32 where it is small."""
    return getattr(torch, find_family(teacher_folder).dtype)


def save_student(
    student: UNet2DConditionModel, prepared: PreparedStage, recipe: Recipe, sampling: Sampling | None = None
) -> None:
    """Writes what the stage leaves in its folder, whole or not at all: a pipeline folder with the VAE and text encoders of
    its `pipeline` and the scheduler that `sampling` names, or adapters alone. It depends on nothing but these: no config
    says where it was made."""
    with replacing(prepared.folder) as temporary:
        temporary.mkdir()
        trained = prepared.stage.student
        trained.save(student, prepared.pipeline, temporary, student_dtype(prepared.pipeline))
        if sampling and not trained.adapter:
            sampling.write_scheduler(temporary)
        for path in temporary.rglob("*.json"):
            stated = read_json(path)
            if isinstance(stated, dict) and stated.keys() & LOCAL_PATHS:
                write_json(path, {key: value for key, value in stated.items() if key not in LOCAL_PATHS})
        write_json(
            temporary / "slimxl.json",
            {
                "student": trained.title,
                "module_map": prepared.modules.as_dict(),
                "stages_done": prepared.number + 1,
                "parameters": sum(p.numel() for p in trained_parameters(student)),
                "recipe": recipe.as_dict(),
            }
            | ({"sampling": asdict(sampling)} if sampling else {}),
        )
