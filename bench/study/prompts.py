"""What is drawn: 200 prompts in five categories that ship with slimxl, or the user's own."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bench.quality.fidelity import read_captions
from bench.workload import family_prompts
from distill.common.errors import UserError
from distill.common.files import read_json
from distill.models.families import Family

SHIPPED = Path(__file__).with_name("prompts.json")


def choose_prompts(path: Path | None, count: int | None, family: Family) -> list[tuple[str, str]]:
    """`count` times (prompt, category), or all there are, the categories taken in turn. Without a `path`: captions of the
    shapes world for a family that knows nothing else, and the shipped list for any other.

    Raises UserError where there are fewer, and for a file that holds none.
    """
    if path is None and family.vocabulary is not None:
        return [(caption, "shapes") for caption in family_prompts(family, count or 200)]
    path = path or SHIPPED
    rows = zip_longest(*([(one, category) for one in prompts] for category, prompts in _read(path).items()))
    prompts = [one for row in rows for one in row if one is not None]
    if count is not None and len(prompts) < count:
        raise UserError(f"--count {count}: {path} holds {len(prompts)} prompts; give at most so many")
    return prompts[:count]


def _read(path: Path) -> dict[str, list[str]]:
    """A .json file is {category: [prompt, ...]}, any other is text with one prompt a line."""
    if path.suffix != ".json":
        return {"own": read_captions(path, 1 << 31, "--prompts")}
    try:
        categories = TypeAdapter(dict[str, list[str]]).validate_python(read_json(path), strict=True)
    except ValidationError:
        raise UserError(f'{path} is not of the form {{"category": ["prompt", ...]}}') from None
    if not any(categories.values()) or not all(one.strip() for prompts in categories.values() for one in prompts):
        raise UserError(f"{path} holds no prompts, or an empty one")
    return categories
