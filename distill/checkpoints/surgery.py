"""Teacher to student: every tensor accounted for, and copied from safetensors file to safetensors file, so that the
memory it takes does not depend on the model's size."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.checkpoints.folder import copy_index, left_out, network_folders, read_config
from distill.checkpoints.tensors import (
    WritableTensor,
    component_tensors,
    component_weights,
    plain_names,
    write_index,
    write_safetensors,
    zeros,
)
from distill.common.errors import UserError
from distill.common.files import read_json, replacing, require_free_disk, write_json
from distill.models.architectures import Architecture
from distill.models.depth import Depth
from distill.models.module_map import LayerMap, ModuleMap, make_module_map


@dataclass(frozen=True)
class CopiedTensors:
    """Student key -> teacher key, and the teacher's keys that nothing uses."""

    sources: dict[str, str]
    unused: tuple[str, ...]


def plan_surgery(
    teacher: Mapping[str, tuple[int, ...]], student: Mapping[str, tuple[int, ...]], modules: ModuleMap
) -> CopiedTensors:
    """Accounts for every tensor; both mappings are key -> shape. Raises UserError for a student tensor that the
    teacher has not, or has in another shape."""
    sources = {}
    for key, shape in student.items():
        source = modules.source(key)
        if source not in teacher:
            raise UserError(f"the teacher has no tensor {source}, which the student's {key} is made from")
        if tuple(teacher[source]) != tuple(shape):
            raise UserError(f"{source} has shape {list(teacher[source])} in the teacher, {list(shape)} in the student")
        sources[key] = source
    return CopiedTensors(sources, tuple(sorted(set(teacher) - set(sources.values()))))


def unet_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the UNet that a config means and its shape, without memory for any."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return {key: tuple(value.shape) for key, value in unet.state_dict().items()}


def files_but_unet(checkpoint: Path) -> dict[str, Path]:
    """What a pipeline needs beside its UNet: its place in a copy -> where it lies in `checkpoint`.

    Of weights these are the ones that `component_weights` reads, under plain names: from_pretrained finds a variant only
    where the whole pipeline is one. Whatever else lies in the folder is no part of it.
    """
    index = checkpoint / "model_index.json"
    files, networks, foreign = {index.name: index}, network_folders(checkpoint), {"unet", *left_out(checkpoint)}
    for component, stated in read_json(index).items():
        if component in foreign or not isinstance(stated, list) or stated[0] is None:
            continue
        folder = checkpoint / component
        if component in networks:
            needed = {"config.json": folder / "config.json", **plain_names(component_weights(folder))}
        else:
            needed = {path.name: path for path in folder.iterdir() if path.is_file()}
        files |= {f"{component}/{name}": path for name, path in needed.items()}
    return files


def copy_all_but_unet(checkpoint: Path, out: Path) -> None:
    """Copies `files_but_unet` into the folder `out`, with an index where a network's weights lie in several files."""
    for name, path in files_but_unet(checkpoint).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name == "model_index.json":
            copy_index(checkpoint, out / name)
        else:
            shutil.copyfile(path, out / name)
    for component in network_folders(checkpoint):
        if component != "unet":
            write_index(out / component, plain_names(component_weights(checkpoint / component)))


def student_config(source: Path, student: Architecture) -> dict[str, Any]:
    """The student's config.json: the one of the checkpoint folder `source` at the student's depth."""
    config = read_config(source, "unet")
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    return {"_class_name": "UNet2DConditionModel", **student.depth.applied(kept)}


def make_student_unet(
    source: Path, student: Architecture, modules: ModuleMap, out: Path, *, beside_bytes: int = 0
) -> CopiedTensors:
    """Writes the student's `unet/` folder to `out`, every tensor copied from the checkpoint folder `source`, whose modules
    `modules` names.

    Returns what came from where. Raises UserError where the source cannot give the student what it needs, or the disk
    has no room for it and `beside_bytes` more.
    """
    records = component_tensors(source / "unet")
    merged = student_config(source, student)
    copied = plan_surgery({key: record.shape for key, record in records.items()}, unet_shapes(merged), modules)
    size = sum(records[name].nbytes for name in copied.sources.values())
    require_free_disk(out.parent, size + beside_bytes, f"the student {student.name}")
    with replacing(out) as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
        chosen = {key: records[name] for key, name in copied.sources.items()}
        write_safetensors(temporary / "diffusion_pytorch_model.safetensors", chosen)
    return copied


def extend_unet(folder: Path, entries: Mapping[str, Any]) -> None:
    """Gives the UNet in its own `folder` the `entries` of its config, unless it has them; the weights that come with
    them are zeros."""
    config = read_json(folder / "config.json")
    if all(config.get(name) == value for name, value in entries.items()):
        return
    records: dict[str, WritableTensor] = dict(component_tensors(folder))
    dtype = next(iter(records.values())).dtype
    for key, shape in unet_shapes(config | entries).items():
        records.setdefault(key, zeros(dtype, shape))
    with replacing(folder) as temporary:
        temporary.mkdir()
        write_json(temporary / "config.json", {**config, **entries})
        write_safetensors(temporary / "diffusion_pytorch_model.safetensors", records)


def student_modules(checkpoint: Path, student: Architecture, layer_map: str | LayerMap) -> tuple[ModuleMap, ModuleMap]:
    """The module map of a student made from `checkpoint`, twice: in the names of the original teacher, and in the names of
    the checkpoint. The two differ where the checkpoint is itself a student, since a layer map always counts the blocks of
    the original teacher.

    Raises UserError for a student of another family, one that the checkpoint is not deep enough for, and a layer map
    that is not nested in its own.
    """
    if not student.family.fits(read_config(checkpoint, "unet")):
        raise UserError(
            f"{student.name} is of the family {student.family.name}, {checkpoint} is not: give a student of its family, or "
            "a depth"
        )
    base = ModuleMap.of_student(checkpoint)
    teacher = base.teacher if base else Depth.from_config(read_config(checkpoint, "unet"))
    modules = make_module_map(layer_map, teacher, student.depth, base)
    return modules, modules.relative_to(base)


def make_student(checkpoint: Path, student: Architecture, layer_map: str | LayerMap, out: Path) -> CopiedTensors:
    """Writes the untrained student as a whole pipeline folder: its UNet, everything else as the checkpoint has it, and
    `surgery.json`, which accounts for every tensor of both. Raises UserError as `student_modules` and
    `make_student_unet` do, and for an `out` that exists."""
    if os.path.lexists(out):
        raise UserError(f"{out} exists already; choose another --out or remove it")
    modules, relative = student_modules(checkpoint, student, layer_map)
    beside_bytes = sum(path.stat().st_size for path in files_but_unet(checkpoint).values())
    with replacing(out) as temporary:
        copied = make_student_unet(checkpoint, student, relative, temporary / "unet", beside_bytes=beside_bytes)
        copy_all_but_unet(checkpoint, temporary)
        write_json(temporary / "surgery.json", asdict(copied))
        about = {"student": student.name, "module_map": modules.as_dict(), "stages_done": 0}
        write_json(temporary / "slimxl.json", about)
    return copied
