"""What a study consists of: the folder that raters get, and the key beside it, which says whose each picture is."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from bench.results import parse_as
from distill.common.errors import UserError
from distill.common.files import read_json

STUDY_SCHEMA: Final = "slimxl.bench.study/1"
KEY_SCHEMA: Final = "slimxl.bench.study.key/1"
MARKER = "study.json"


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rated(Record):
    """One prompt and the names of its pictures. The order says nothing: names are random, and sorted."""

    prompt: str
    pictures: list[str]


class Study(Record):
    """What a rater's browser may know. A rater sees `pairs` pairs, then so many `repeats` of them with the sides changed,
    and `same` pairs of a picture with itself."""

    schema_version: Literal["slimxl.bench.study/1"] = STUDY_SCHEMA
    study: str
    items: list[Rated]
    pairs: int
    repeats: int
    same: int


class Model(Record):
    """As named on the command line of `bench run`, with its own steps and guidance."""

    name: str
    spec: str
    steps: int
    guidance_scale: float


class Item(Record):
    """One prompt; every model draws it from the same seed at the same size."""

    prompt: str
    category: str
    seed: int
    resolution: str


class Key(Record):
    """The maker's own file. `secret` turns a model and a prompt into the name of a picture, which nobody else can do."""

    schema_version: Literal["slimxl.bench.study.key/1"] = KEY_SCHEMA
    study: str
    secret: str = Field(pattern=r"^[0-9a-f]{32}$")
    models: list[Model] = Field(min_length=2)
    items: list[Item]
    scheduler: str
    pairs: int
    repeats: int
    same: int

    def picture(self, item: int, model: int) -> str:
        """The name of a picture, without its ending."""
        said = f"{item} {self.models[model].name}".encode()
        return hmac.digest(bytes.fromhex(self.secret), said, "sha256").hex()[:16]

    def pictures(self) -> dict[str, tuple[int, int]]:
        """Name -> (item, model)."""
        places = ((item, model) for item in range(len(self.items)) for model in range(len(self.models)))
        return {self.picture(*place): place for place in places}

    def public(self) -> Study:
        """All of it that raters get."""
        models = range(len(self.models))
        items = [
            Rated(prompt=one.prompt, pictures=sorted(self.picture(index, model) for model in models))
            for index, one in enumerate(self.items)
        ]
        return Study(study=self.study, items=items, pairs=self.pairs, repeats=self.repeats, same=self.same)


def key_path(folder: Path) -> Path:
    """Beside the folder, never in it."""
    return folder.resolve().with_name(f"{folder.resolve().name}.key.json")


def picture_path(folder: Path, name: str) -> Path:
    return folder / "pictures" / f"{name}.png"


def read_key(path: Path) -> Key:
    """Raises UserError for any other file."""
    return parse_as(KEY_SCHEMA, Key, read_json(path), path)


def read_study(folder: Path) -> Study:
    """Raises UserError for a folder that is no finished study: one without its page, or with a picture missing."""
    if not (folder / MARKER).is_file():
        raise UserError(f"{folder} is no study (no {MARKER}): make one with python -m bench study make")
    study = parse_as(STUDY_SCHEMA, Study, read_json(folder / MARKER), folder / MARKER)
    needed = [picture_path(folder, name) for item in study.items for name in item.pictures]
    missing = [path for path in (folder / "index.html", *needed) if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}{more} is missing; the same python -m bench study make draws what is not there")
    return study
