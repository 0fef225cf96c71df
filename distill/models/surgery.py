"""Teacher to student: every tensor accounted for, and copied from safetensors file to safetensors file, so that the
memory it takes does not depend on the model's size."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.common.errors import UserError
from distill.common.files import read_json, replacing, require_free_disk, write_json
from distill.models.architectures import Architecture, Depth, family_of
from distill.models.layer_map import LayerMap, make_layer_map
from distill.models.sources import COMPONENT_FOLDERS, read_config
from distill.models.tensors import component_tensors, component_weights, weights_variant, write_safetensors

_BLOCK_KEY = re.compile(r"(?P<path>.*attentions\.\d+)\.transformer_blocks\.(?P<index>\d+)\.(?P<rest>.*)")


@dataclass(frozen=True)
class SurgeryPlan:
    """Student key -> teacher key, and the teacher's keys that nothing uses."""

    sources: dict[str, str]
    unused: tuple[str, ...]


def plan_surgery(
    teacher: Mapping[str, tuple[int, ...]], student: Mapping[str, tuple[int, ...]], layer_map: LayerMap
) -> SurgeryPlan:
    """Accounts for every tensor; both mappings are key -> shape. Raises UserError for a student tensor that the
    teacher has not, or has in another shape."""
    sources = {}
    for key, shape in student.items():
        match = _BLOCK_KEY.fullmatch(key)
        source = key
        if match:
            index = layer_map[match["path"]][int(match["index"])]
            source = f"{match['path']}.transformer_blocks.{index}.{match['rest']}"
        if source not in teacher:
            raise UserError(f"the teacher has no tensor {source}, which the student's {key} is made from")
        if tuple(teacher[source]) != tuple(shape):
            raise UserError(f"{source} has shape {list(teacher[source])} in the teacher, {list(shape)} in the student")
        sources[key] = source
    return SurgeryPlan(sources, tuple(sorted(set(teacher) - set(sources.values()))))


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
    files = {"model_index.json": checkpoint / "model_index.json"}
    for component, stated in read_json(checkpoint / "model_index.json").items():
        if component == "unet" or not isinstance(stated, list) or stated[0] is None:
            continue
        folder = checkpoint / component
        if component in COMPONENT_FOLDERS:
            needed = [folder / "config.json", *component_weights(folder)]
        else:
            needed = [path for path in folder.iterdir() if path.is_file()]
        files |= {f"{component}/{_plain_name(path)}": path for path in needed}
    return files


def _plain_name(path: Path) -> str:
    variant = weights_variant(path) if path.suffix == ".safetensors" else ""
    return path.name.replace(f".{variant}", "", 1) if variant else path.name


def copy_all_but_unet(checkpoint: Path, out: Path) -> None:
    """Copies `files_but_unet` into the folder `out`, with an index where a network's weights lie in several files."""
    for name, path in files_but_unet(checkpoint).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)
    for component in COMPONENT_FOLDERS:
        shards = sorted((out / component).glob("*.safetensors"))
        if len(shards) > 1:
            records = component_tensors(out / component)
            total = sum(record.nbytes for record in records.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {key: record.file.name for key, record in records.items()},
            }
            write_json(out / component / f"{shards[0].name.partition('-')[0]}.safetensors.index.json", index)


def make_student_unet(
    teacher: Path, student: Architecture, layer_map: str | LayerMap, out: Path, *, beside_bytes: int = 0
) -> SurgeryPlan:
    """Writes the student's `unet/` folder to `out`, every tensor copied from the checkpoint folder `teacher`.

    Returns what came from where. Raises UserError where the teacher cannot give the student what it needs, or the disk
    has no room for it and `beside_bytes` more.
    """
    records = component_tensors(teacher / "unet")
    config = read_config(teacher, "unet")
    if family_of(config["block_out_channels"]) is not student.family:
        raise UserError(
            f"{student.name} is of the family {student.family.name}, the teacher {teacher} is not: give a student of its "
            "family, or a depth"
        )
    kept = {key: value for key, value in config.items() if not key.startswith("_")}
    merged = {"_class_name": "UNet2DConditionModel", **kept, **student.unet_config}
    full_map = make_layer_map(layer_map, Depth.from_config(config), student.depth)
    plan = plan_surgery({key: record.shape for key, record in records.items()}, unet_shapes(merged), full_map)
    size = sum(records[source].nbytes for source in plan.sources.values())
    require_free_disk(out.parent, size + beside_bytes, f"the student {student.name}")
    with replacing(out) as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
        chosen = {key: records[source] for key, source in plan.sources.items()}
        write_safetensors(temporary / "diffusion_pytorch_model.safetensors", chosen)
    return plan


def make_student(teacher: Path, student: Architecture, layer_map: str | LayerMap, out: Path) -> SurgeryPlan:
    """Writes the untrained student as a whole pipeline folder: its UNet, everything else as the teacher has it, and
    `surgery.json`, which accounts for every tensor of both. Raises UserError as `make_student_unet` does."""
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or remove it")
    full_map = make_layer_map(layer_map, Depth.from_config(read_config(teacher, "unet")), student.depth)
    beside_bytes = sum(path.stat().st_size for path in files_but_unet(teacher).values())
    with replacing(out) as temporary:
        plan = make_student_unet(teacher, student, full_map, temporary / "unet", beside_bytes=beside_bytes)
        copy_all_but_unet(teacher, temporary)
        write_json(temporary / "surgery.json", asdict(plan))
        mapped = {path: list(blocks) for path, blocks in full_map.items()}
        write_json(temporary / "slimxl.json", {"student": student.name, "layer_map": mapped, "stages_done": 0})
    return plan
