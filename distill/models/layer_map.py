"""Which transformer block of the teacher feeds which block of the student: data, because no published list says which
of ten blocks SSD-1B kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill.common.errors import UserError, unknown
from distill.common.files import read_json
from distill.models.architectures import Depth

LayerMap = Mapping[str, tuple[int, ...]]
"""Module path of a Transformer2DModel (`down_blocks.2.attentions.0`) -> the teacher's block index for each of the
student's blocks, in order. A transformer that the student lacks is absent."""


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
        if len(indices) != count or sorted(set(indices)) != list(indices) or indices[0] < 0 or indices[-1] >= available:
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


def inherit_layer_map(spec: str | LayerMap, teacher: Depth, student: Depth, held: LayerMap | None) -> LayerMap:
    """The full layer map of a student made from an earlier one, whose map is `held` (None: from the teacher itself).

    A transformer that is as deep as in the earlier student keeps that one's blocks, unless `spec` has indices for it.
    """
    layer_map = dict(make_layer_map(spec, teacher, student))
    explicit = () if isinstance(spec, str) else spec
    for path, blocks in (held or {}).items():
        if path in layer_map and path not in explicit and len(blocks) == len(layer_map[path]):
            layer_map[path] = blocks
    return layer_map


def relative_map(layer_map: LayerMap, held: LayerMap | None) -> LayerMap:
    """The layer map from what an earlier student holds: both maps name blocks of the original teacher.

    `held` None is the teacher itself. Raises UserError where the new student wants a block the earlier one dropped.
    """
    if held is None:
        return layer_map
    relative = {}
    for path, wanted in layer_map.items():
        missing = sorted(set(wanted) - set(held.get(path, ())))
        if missing:
            raise UserError(
                f"{path}: the stage keeps teacher blocks {list(wanted)}, but the student it starts from has only "
                f"{list(held.get(path, ()))}; use nested layer maps"
            )
        relative[path] = tuple(held[path].index(block) for block in wanted)
    return relative
