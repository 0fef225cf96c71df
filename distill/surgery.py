"""Teacher to student: which transformer block of the teacher feeds which block of the student, and the copying.

The layer map is data, because no published list says which of ten blocks SSD-1B kept. The copying moves bytes from
safetensors file to safetensors file, so its memory does not depend on the model's size.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.architectures import Architecture, Depth
from distill.errors import UserError, unknown
from distill.files import read_json, replacing, require_free_disk, write_json
from distill.sources import read_config
from distill.tensors import component_tensors, write_safetensors

LayerMap = Mapping[str, tuple[int, ...]]
"""Module path of a Transformer2DModel (`down_blocks.2.attentions.0`) -> the teacher's block index for each of the
student's blocks, in order. A transformer that the student lacks is absent."""

_BLOCK_KEY = re.compile(r"(?P<path>.*attentions\.\d+)\.transformer_blocks\.(?P<index>\d+)\.(?P<rest>.*)")


def transformer_depths(depth: Depth) -> dict[str, int]:
    """Module path -> number of transformer blocks, in the order of the forward pass."""
    depths = {f"down_blocks.{i}.attentions.{j}": n for i, block in enumerate(depth.down) for j, n in enumerate(block)}
    if depth.mid:
        depths["mid_block.attentions.0"] = depth.mid
    return depths | {
        f"up_blocks.{i}.attentions.{j}": n for i, block in enumerate(depth.up) for j, n in enumerate(block)
    }


def _first(teacher: int, student: int) -> tuple[int, ...]:
    return tuple(range(student))


def _spread(teacher: int, student: int) -> tuple[int, ...]:
    """Evenly over the teacher's depth, first and last kept."""
    return tuple(round(i * (teacher - 1) / max(1, student - 1)) for i in range(student))


_SIMILARITY = {(10, 4): (0, 1, 2, 6), (10, 2): (0, 6), (2, 1): (0,)}


def _similarity(teacher: int, student: int) -> tuple[int, ...]:
    """What a cosine-similarity study of the published SSD-1B weights suggests was kept of ten
    blocks in four and of two in one; two of ten follow it, nested in the four."""
    if teacher == student:
        return tuple(range(student))
    if (teacher, student) not in _SIMILARITY:
        raise UserError(
            f"layer map 'similarity' knows no way from {teacher} blocks to {student}, only "
            f"{', '.join(f'{t} to {s}' for t, s in _SIMILARITY)}; use 'first', 'spread' or explicit indices"
        )
    return _SIMILARITY[teacher, student]


PRESETS = {"first": _first, "spread": _spread, "similarity": _similarity}


def make_layer_map(spec: str | LayerMap, teacher: Depth, student: Depth) -> LayerMap:
    """The full layer map from a preset's name or from explicit indices (absent transformers use 'first').

    Raises UserError for an unknown preset, a path that is no transformer of the student, an index that the teacher
    lacks, or a student deeper than its teacher anywhere.
    """
    if isinstance(spec, str) and spec not in PRESETS:
        raise unknown("layer map", spec, PRESETS)
    teacher_depths, student_depths = transformer_depths(teacher), transformer_depths(student)
    if not isinstance(spec, str):
        for path in spec:
            if path not in student_depths:
                raise unknown("transformer in the layer map", path, student_depths)
    layer_map = {}
    for path, count in student_depths.items():
        available = teacher_depths.get(path, 0)
        if count > available:
            raise UserError(f"the student has {count} blocks at {path}, its teacher only {available}")
        explicit = None if isinstance(spec, str) else spec.get(path)
        indices = tuple(explicit) if explicit else PRESETS[spec if isinstance(spec, str) else "first"](available, count)
        if len(indices) != count or sorted(set(indices)) != list(indices) or indices[-1] >= available:
            raise UserError(f"layer map at {path}: {list(indices)} must be {count} rising indices below {available}")
        layer_map[path] = indices
    return layer_map


def read_layer_map(spec: str) -> str | LayerMap:
    """A preset's name as it is; a .json file as the explicit indices it holds, or as its `layer_map`. Raises UserError."""
    if not spec.endswith(".json"):
        return spec
    stated = read_json(Path(spec))
    stated = stated.get("layer_map", stated) if isinstance(stated, dict) else None
    if not isinstance(stated, dict) or not all(isinstance(blocks, list) for blocks in stated.values()):
        raise UserError(f'{spec} is no layer map; it should read like {{"down_blocks.2.attentions.0": [0, 1, 2, 6]}}')
    return {path: tuple(blocks) for path, blocks in stated.items()}


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


def unet_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every parameter of the architecture's UNet and its shape, without memory for any."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture.unet_config)
    return {key: tuple(value.shape) for key, value in unet.state_dict().items()}


def make_student_unet(teacher: Path, student: Architecture, layer_map: str | LayerMap, out: Path) -> SurgeryPlan:
    """Writes the student's `unet/` folder to `out`, every tensor copied from the checkpoint folder `teacher`.

    Returns what came from where. Raises UserError where the teacher cannot give the student what it needs.
    """
    records = component_tensors(teacher / "unet")
    config = read_config(teacher, "unet")
    full_map = make_layer_map(layer_map, Depth.from_config(config), student.depth)
    plan = plan_surgery({key: record.shape for key, record in records.items()}, unet_shapes(student), full_map)
    size = sum(records[source].nbytes for source in plan.sources.values())
    require_free_disk(out.parent, size, f"the student {student.name}")
    with replacing(out) as temporary:
        temporary.mkdir()
        kept = {key: value for key, value in config.items() if not key.startswith("_")}
        merged = {"_class_name": "UNet2DConditionModel", **kept, **student.unet_config}
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
    with replacing(out) as temporary:
        shutil.copytree(teacher, temporary, ignore=shutil.ignore_patterns("unet", "samples*", "*.jsonl", "slimxl.json"))
        plan = make_student_unet(teacher, student, full_map, temporary / "unet")
        write_json(temporary / "surgery.json", asdict(plan))
        mapped = {path: list(blocks) for path, blocks in full_map.items()}
        write_json(temporary / "slimxl.json", {"student": student.name, "layer_map": mapped, "stages_done": 0})
    return plan
