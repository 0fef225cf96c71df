"""What a search may leave out of a teacher, and the student that is left.

Four kinds of cut: one transformer block; the middle's attention with its second ResNet (SSD-1B, Vega); the whole middle
block (KOALA-700M, BK-SDM-Small); and a layer of a level, a ResNet with its transformer, on the way down and on the way up
(KOALA, BK-SDM). Each leaves a UNet that diffusers' config can express.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from distill.common.errors import UserError
from distill.models.depth import Depth
from distill.models.module_map import ModuleMap, make_module_map

Cut = frozenset[str]
"""Module paths of the teacher that are left out together."""
MID_TRANSFORMER = "mid_block.attentions.0"


def cuts_of(teacher: Depth, removed: Collection[str], change: Mapping[Cut, float]) -> list[Cut]:
    """Every next cut after `removed`, those with attention in the middle first. `change` is what each block alone changes.

    A middle block with attention must be as deep as the first transformer of the last down level (diffusers' config says
    one number for both): there the two blocks that change least go together.
    """
    alive = {path: _blocks(path, count, removed) for path, count in teacher.transformers.items() if path not in removed}
    if "mid_block" in removed:
        alive.pop(MID_TRANSFORMER, None)
    tied = [MID_TRANSFORMER, f"down_blocks.{len(teacher.down) - 1}.attentions.0"]
    if not all(path in alive for path in tied):
        tied = []
    cuts = _middle(teacher, removed) + _layers(teacher, removed)
    cuts += [
        frozenset({block}) for path, blocks in alive.items() if path not in tied and len(blocks) > 1 for block in blocks
    ]
    if tied and all(len(alive[path]) > 1 for path in tied):
        cuts.append(frozenset(min(alive[path], key=lambda block: change.get(frozenset({block}), 0.0)) for path in tied))
    return [cut for cut in cuts if is_student(teacher, cut.union(removed))]


def first_cuts(teacher: Depth) -> list[Cut]:
    """What is scored alone: every transformer block of a transformer with several, and every other first cut."""
    blocks = [
        frozenset({block})
        for path, count in teacher.transformers.items()
        if count > 1
        for block in _blocks(path, count, ())
    ]
    return [*dict.fromkeys([*blocks, *(cut for cut in cuts_of(teacher, (), {}) if not _is_pair(cut))])]


def _is_pair(cut: Cut) -> bool:
    return len(cut) > 1 and all("transformer_blocks" in path for path in cut)


def _blocks(transformer: str, count: int, removed: Collection[str]) -> list[str]:
    paths = [f"{transformer}.transformer_blocks.{index}" for index in range(count)]
    return [path for path in paths if path not in removed]


def _middle(teacher: Depth, removed: Collection[str]) -> list[Cut]:
    if teacher.mid is None or "mid_block" in removed:
        return []
    attention = [frozenset({MID_TRANSFORMER, "mid_block.resnets.1"})]
    return [*(attention if teacher.mid and MID_TRANSFORMER not in removed else []), frozenset({"mid_block"})]


def _kept_layers(side: str, level: int, count: int, removed: Collection[str]) -> list[int]:
    return [layer for layer in range(count) if f"{side}_blocks.{level}.resnets.{layer}" not in removed]


def _layers(teacher: Depth, removed: Collection[str]) -> list[Cut]:
    """Of each level the last layer on the way down, and on the way up the last but one: the last takes the skip connection
    from the level above, with its width."""
    cuts = []
    for level, layers in enumerate(teacher.down):
        mirror = len(teacher.down) - 1 - level
        down = _kept_layers("down", level, len(layers), removed)
        up = _kept_layers("up", mirror, len(teacher.up[mirror]), removed)
        if len(down) > 1:
            places = (f"down_blocks.{level}", down[-1], layers), (f"up_blocks.{mirror}", up[-2], teacher.up[mirror])
            cuts.append(
                frozenset(
                    f"{block}.{kind}.{layer}"
                    for block, layer, blocks in places
                    for kind in ("resnets", *(("attentions",) if blocks[layer] else ()))
                )
            )
    return cuts


def _cut_depth(teacher: Depth, removed: Collection[str]) -> tuple[Depth, dict[str, tuple[int, ...]]]:
    """The depth after cuts, and the teacher's blocks that each transformer of the student keeps."""
    layer_map: dict[str, tuple[int, ...]] = {}

    def blocks(source: str, count: int, path: str) -> int:
        kept = tuple(i for i in range(count) if f"{source}.transformer_blocks.{i}" not in removed)
        if kept:
            layer_map[path] = kept
        return len(kept)

    def side(name: str, levels: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(
                blocks(f"{name}_blocks.{i}.attentions.{j}", level[j], f"{name}_blocks.{i}.attentions.{place}")
                for place, j in enumerate(_kept_layers(name, i, len(level), removed))
            )
            for i, level in enumerate(levels)
        )

    mid = teacher.mid
    if mid is not None and "mid_block" in removed:
        mid = None
    elif mid and MID_TRANSFORMER in removed:
        mid = 0
    elif mid:
        mid = blocks(MID_TRANSFORMER, mid, MID_TRANSFORMER)
    return Depth(down=side("down", teacher.down), mid=mid, up=side("up", teacher.up)), layer_map


def is_student(teacher: Depth, removed: Collection[str]) -> bool:
    """Whether diffusers can express what is left."""
    try:
        _cut_depth(teacher, removed)[0].check()
    except UserError:
        return False
    return True


def student_after(teacher: Depth, removed: Collection[str]) -> ModuleMap:
    """The student that is left after cuts. Raises UserError where diffusers cannot express it."""
    depth, layer_map = _cut_depth(teacher, removed)
    depth.check()
    return make_module_map(layer_map, teacher, depth)


def smallest(teacher: Depth) -> ModuleMap:
    """All cuts made."""
    removed: frozenset[str] = frozenset()
    while cuts := cuts_of(teacher, removed, {}):
        removed |= max(cuts, key=len)
    return student_after(teacher, removed)


def layer_map_of(modules: ModuleMap) -> dict[str, tuple[int, ...]]:
    """The indices that `distill train --layer-map` takes."""
    return {path: modules.blocks(path) for path in modules.student.transformers}
