"""Which module of the teacher each module of the student is made from: the one thing that knows what was left out.

A `ModuleMap` has an entry for every level, ResNet, transformer and transformer block of the student. Two depths and a
*layer map* generate one: the depths say how many modules there are, the layer map which of the teacher's transformer
blocks are kept, because no published list says which of ten blocks SSD-1B kept. Surgery copies by the map, taps compare
by it, importance proposes its layer map.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

from distill.common.errors import UserError, unknown
from distill.common.files import read_json, read_object
from distill.models.depth import Depth

LayerMap = Mapping[str, tuple[int, ...] | str]
"""Module path of a transformer of the student (`down_blocks.2.attentions.0`) -> the indices of the teacher's blocks that
it keeps at least, in order; or the path of a ResNet, a transformer or a block of the student -> the teacher's module that it
is made from, of the same kind."""


@dataclass(frozen=True)
class ModuleMap:
    """`paths`: module path in the student -> module path in the teacher; modules outside of the levels are called alike
    in both."""

    teacher: Depth
    student: Depth
    paths: Mapping[str, str]

    def source(self, name: str) -> str:
        """Where in the teacher the student's module or tensor `name` comes from: by its nearest mapped ancestor."""
        ancestor = name
        while ancestor and ancestor not in self.paths:
            ancestor = ancestor.rpartition(".")[0]
        return f"{self.paths[ancestor]}{name.removeprefix(ancestor)}" if ancestor else name

    def blocks(self, transformer: str) -> tuple[int, ...]:
        """The indices of the teacher's blocks that a transformer of the student keeps, in order."""
        count = self.student.transformers[transformer]
        return tuple(_index(self.paths[f"{transformer}.transformer_blocks.{i}"]) for i in range(count))

    @property
    def dropped(self) -> frozenset[str]:
        """The teacher's modules that nothing of the student is made from."""
        return frozenset(_modules(self.teacher) - set(self.paths.values()))

    def relative_to(self, base: ModuleMap | None) -> ModuleMap:
        """The same modules as they are called in an earlier student, whose own map is `base` (None: in the teacher).

        Raises UserError where the earlier student has dropped one.
        """
        if base is None:
            return self
        places = {source: path for path, source in base.paths.items()}
        missing = [(path, source) for path, source in self.paths.items() if source not in places]
        if missing:
            path, source = missing[0]
            raise UserError(
                f"{path} is made from the teacher's {source}, which the student that it starts from has dropped; it can be "
                "no deeper than that one, and its layer map must be nested in that one's"
            )
        return ModuleMap(base.student, self.student, {path: places[source] for path, source in self.paths.items()})

    def as_dict(self) -> dict[str, Any]:
        """What a student's slimxl.json holds of it."""
        return {"teacher": str(self.teacher), "student": str(self.student), "paths": dict(self.paths)}

    @classmethod
    def of_student(cls, folder: Path) -> ModuleMap | None:
        """What the student in a pipeline folder holds of its teacher; None where the folder is no student of slimxl's.

        Raises UserError for a record that is damaged.
        """
        path = folder / "slimxl.json"
        if not path.is_file():
            return None
        record = read_object(path).get("module_map")
        fields = (
            [record.get(key) for key in ("teacher", "student", "paths")] if isinstance(record, dict) else [None] * 3
        )
        teacher, student, paths = fields
        if isinstance(teacher, str) and isinstance(student, str) and isinstance(paths, dict):
            made = cls(Depth.parse(teacher), Depth.parse(student), paths)
            blocks = {
                f"{name}.transformer_blocks.{i}" for name, n in made.student.transformers.items() for i in range(n)
            }
            stated = all(re.fullmatch(r"[a-z_]+[0-9]*(\.\w+)*", str(source)) for source in paths.values())
            of_blocks = all(
                re.fullmatch(r".+\.transformer_blocks\.[0-9]{1,5}", str(paths.get(name))) for name in blocks
            )
            if stated and of_blocks:
                return made
        raise UserError(f"{path} has no module_map: it is damaged, or of another version; distil the student again")


def _index(path: str) -> int:
    return int(path.rpartition(".")[2])


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


def make_module_map(
    layer_map: str | LayerMap, teacher: Depth, student: Depth, base: ModuleMap | None = None
) -> ModuleMap:
    """The whole map, from a preset's name or from explicit entries; `base` is the map of the earlier student, if any.

    An entry may name fewer blocks than its transformer has: the first of the teacher's others are added. A transformer
    without an entry keeps the blocks that `base` has there where it is as deep, else the preset's (the first, where there
    are explicit entries).

    Of a level with fewer ResNets, a down level keeps the first, an up level the first and the last (BK-SDM, arXiv
    2305.15798, section 3.1). Fewer levels are the teacher's first on the way down and its last on the way up.

    Raises UserError for an unknown preset, a path that is no module of the student, an index or a path that the teacher
    lacks, or a student with more anywhere than its teacher.
    """
    if isinstance(layer_map, str) and layer_map not in PRESETS:
        raise unknown("layer map", layer_map, [*PRESETS, "FILE.json (for --layer-map; a recipe holds what is in it)"])
    explicit: LayerMap = {} if isinstance(layer_map, str) else layer_map
    choose = PRESETS[layer_map if isinstance(layer_map, str) else "first"]
    paths = _levels(teacher, student)
    if base:
        paths |= _kept_places(paths, student, base)
    _check_entries(explicit, paths, teacher, student)
    paths |= {path: entry for path, entry in explicit.items() if isinstance(entry, str) and path in paths}
    places = {source: path for path, source in base.paths.items()} if base else {}
    for path, count in student.transformers.items():
        source, given = paths[path], explicit.get(path)
        available = teacher.transformers.get(source, 0)
        if count > available:
            raise UserError(f"the student has {count} blocks at {path}, its teacher only {available}")
        if isinstance(given, tuple):
            kept = _fill_up(path, given, count, available)
        elif base and (there := places.get(source)) and len(base.blocks(there)) == count:
            kept = base.blocks(there)
        else:
            kept = choose(available, count)
        ours, theirs = f"{path}.transformer_blocks", f"{source}.transformer_blocks"
        blocks = [str(explicit.get(f"{ours}.{j}", f"{theirs}.{i}")) for j, i in enumerate(kept)]
        if not all(block.startswith(f"{theirs}.") for block in blocks) or not _is_rising(list(map(_index, blocks))):
            raise UserError(
                f"layer map at {path}: its blocks must be rising ones of the teacher's {source}, got {blocks}"
            )
        paths |= {f"{ours}.{j}": block for j, block in enumerate(blocks)}
    known = _modules(teacher)
    for path, source in paths.items():
        if source not in known:
            raise UserError(f"the student has {path}, its teacher has no {source}")
    return ModuleMap(teacher, student, paths)


def _modules(depth: Depth) -> set[str]:
    blocks = {f"{path}.transformer_blocks.{i}" for path, n in depth.transformers.items() for i in range(n)}
    return set(_levels(depth, depth)) | blocks


def _check_entries(explicit: LayerMap, paths: Mapping[str, str], teacher: Depth, student: Depth) -> None:
    """Raises UserError for an entry of no module of the student, or with none of the teacher that is of its kind."""
    ours, theirs = _modules(student), _modules(teacher)
    for path, entry in explicit.items():
        if path not in ours:
            raise _unknown("module of the student in the layer map", path, ours)
        if not isinstance(entry, str):
            if path not in student.transformers:
                transformer = next(iter(student.transformers))
                raise UserError(f"layer map at {path}: indices are for transformers, as {transformer}")
            continue
        if entry not in theirs:
            raise _unknown(f"module of the teacher in the layer map at {path}:", entry, theirs)
        if _kind(path) == "level" and entry != paths[path]:
            raise UserError(f"layer map at {path}: a level is not moved as a whole; name its ResNets and transformers")
        if _kind(path) != _kind(entry):
            raise UserError(f"layer map at {path}: {entry} is a module of another kind")


def _kind(path: str) -> str:
    return path.split(".")[-2] if path.count(".") > 1 or path.startswith("mid_block.") else "level"


def _unknown(what: str, got: str, names: Collection[str]) -> UserError:
    near = get_close_matches(got, sorted(names), n=3, cutoff=0)
    return UserError(f"unknown {what} {got!r}; the nearest are {', '.join(near)}")


def _kept_places(paths: Mapping[str, str], student: Depth, base: ModuleMap) -> dict[str, str]:
    """Where the ResNets and transformers of an earlier student come from, in the levels that have as many now."""
    now, then = student.layers, base.student.layers
    kept = {}
    for path in paths:
        level = next(level for level in now if path == level or path.startswith(f"{level}."))
        if path in base.paths and now[level] == then.get(level) and base.paths[level] == paths[level]:
            kept[path] = base.paths[path]
    return kept


def _is_rising(indices: Sequence[int]) -> bool:
    return all(one < other for one, other in pairwise(indices))


def _fill_up(path: str, given: Sequence[int], count: int, available: int) -> tuple[int, ...]:
    if not given or len(given) > count or not _is_rising(given) or given[0] < 0 or given[-1] >= available:
        raise UserError(f"layer map at {path}: {list(given)} must be {count} rising indices below {available}")
    others = [index for index in range(available) if index not in given]
    return tuple(sorted([*given, *others[: count - len(given)]]))


def _levels(teacher: Depth, student: Depth) -> dict[str, str]:
    """Levels, ResNets and transformers of the student -> those of the teacher, in the order of the forward pass."""
    paths: dict[str, str] = {}

    def add(student_level: str, teacher_level: str, kept: Sequence[int], has_attention: bool) -> None:
        paths[student_level] = teacher_level
        for j, i in enumerate(kept):
            paths[f"{student_level}.resnets.{j}"] = f"{teacher_level}.resnets.{i}"
            if has_attention:
                paths[f"{student_level}.attentions.{j}"] = f"{teacher_level}.attentions.{i}"

    for i, level in enumerate(student.down):
        add(f"down_blocks.{i}", f"down_blocks.{i}", range(len(level)), any(level))
    if student.mid is not None:
        if teacher.mid is None:
            raise UserError("the student has a middle block, its teacher none")
        paths |= {"mid_block": "mid_block", "mid_block.resnets.0": "mid_block.resnets.0"}
        if student.mid:
            paths |= {"mid_block.resnets.1": "mid_block.resnets.1", "mid_block.attentions.0": "mid_block.attentions.0"}
    dropped = len(teacher.up) - len(student.up)
    for i, level in enumerate(student.up):
        layers = len(teacher.up[i + dropped]) if 0 <= i + dropped < len(teacher.up) else len(level)
        kept = [*range(len(level) - 1), max(layers, len(level)) - 1]
        add(f"up_blocks.{i}", f"up_blocks.{i + dropped}", kept, any(level))
    return paths


def read_layer_map(spec: str) -> str | LayerMap:
    """A preset's name as it is; a .json file as the entries it holds, as its `layer_map`, or as the module map that a
    student's slimxl.json is. Raises UserError."""
    if not spec.endswith(".json"):
        return spec
    stated = read_json(Path(spec))
    if isinstance(stated, dict) and isinstance(stated.get("module_map"), dict):
        stated = {"layer_map": stated["module_map"].get("paths")}
    stated = stated.get("layer_map", stated) if isinstance(stated, dict) else None
    if isinstance(stated, str):
        return stated
    if not isinstance(stated, dict) or not all(map(_is_entry, stated.values())):
        raise UserError(f'{spec} is no layer map; it should read like {{"down_blocks.2.attentions.0": [0, 1, 2, 6]}}')
    return {path: entry if isinstance(entry, str) else tuple(entry) for path, entry in stated.items()}


def _is_entry(value: Any) -> bool:
    """Whether it is a list of whole numbers, not empty, or a module's path."""
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(type(number) is int for number in value)
    )
