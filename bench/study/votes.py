"""Votes on disk: the file that a rater saves, and the line that the server appends. Both are checked against the study."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.common.errors import UserError
from distill.common.progress import say

Name = Field(pattern=r"^[0-9a-f]{16}$")


class Vote(BaseModel):
    """`first` and `second` are pictures as they stood, left or top first; `index` is the place in the rater's order, `ms`
    how long the pair was looked at, `at` when, in milliseconds since 1970. `missing`: a picture was not there to be seen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    index: int = Field(ge=0, le=100_000)
    first: str = Name
    second: str = Name
    choice: Literal["first", "second", "tie", "missing"]
    ms: int = Field(ge=0, le=10**10)
    at: int = Field(ge=0, le=10**15)


class Line(Vote):
    """One vote as the server writes it."""

    study: str
    rater: str = Name

    def vote(self) -> Vote:
        return Vote(**self.model_dump(exclude={"study", "rater"}))


class Sheet(BaseModel):
    """One rater's votes, as a browser saves or sends them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    schema_version: Literal["slimxl.bench.votes/1"] = "slimxl.bench.votes/1"
    study: str
    rater: str = Name
    votes: list[Vote]
    checksum: int

    def lines(self) -> list[Line]:
        return [Line(study=self.study, rater=self.rater, **vote.model_dump()) for vote in self.votes]


def checksum(rater: str, votes: Iterable[Vote]) -> int:
    """FNV-1a over the votes, as the page works it out: it finds slips of an editor, not fraud."""
    lines = "\n".join(" ".join(map(str, vote.model_dump().values())) for vote in votes)
    value = 0x811C9DC5
    for byte in f"{rater}\n{lines}".encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return value


def read_sheet(text: str, where: str, study: str, pictures: dict[str, int]) -> list[Line]:
    """The votes of one rater on `study`, whose `pictures` map each name to its prompt.

    Raises UserError for what is no such file, was cut off or edited, or belongs to another study.
    """
    try:
        sheet = Sheet.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where} is no file of votes, or was cut off or edited ({_first(error)}); {ASK}") from None
    if sheet.checksum != checksum(sheet.rater, sheet.votes):
        raise UserError(f"{where} was edited after it was saved: its checksum does not fit its votes; {ASK}")
    return _checked(sheet.lines(), where, study, pictures)


ASK = "ask the rater to save it again, or leave it out"


def read_lines(path: Path, study: str, pictures: dict[str, int]) -> list[Line]:
    """What the server has written. A last line without an end was never confirmed to its rater, who sends it again: it is
    left out. Raises UserError for any other line that is no vote on `study`."""
    *whole, rest = path.read_bytes().split(b"\n")
    if rest:
        say(f"{path}: the last line was cut off and is left out")
    found = []
    for number, line in enumerate(whole, 1):
        try:
            found.append(Line.model_validate_json(line))
        except ValidationError as error:
            raise UserError(f"{path}, line {number}: no vote, or an edited one ({_first(error)})") from None
    return _checked(found, str(path), study, pictures)


def read_votes(paths: list[Path], study: str, pictures: dict[str, int]) -> list[Line]:
    """Every vote once, whatever number of files hold it: where a rater has changed one, the latest counts.

    Raises UserError for a file that cannot be used.
    """
    latest: dict[tuple[str, int], Line] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} does not exist, or is a folder; --votes takes files of votes")
        if path.suffix == ".jsonl":
            lines = read_lines(path, study, pictures)
        else:
            lines = read_sheet(path.read_text(encoding="utf-8", errors="replace"), str(path), study, pictures)
        for line in lines:
            place = (line.rater, line.index)
            if place not in latest or line.at >= latest[place].at:
                latest[place] = line
    return sorted(latest.values(), key=lambda line: (line.rater, line.index))


def as_line(line: Line) -> bytes:
    return json.dumps(line.model_dump(), separators=(",", ":")).encode() + b"\n"


def _checked(lines: list[Line], where: str, study: str, pictures: dict[str, int]) -> list[Line]:
    for line in lines:
        if line.study != study:
            raise UserError(f"{where} holds votes of the study {line.study}, not of {study}; leave it out")
        if pictures.get(line.first, -1) != pictures.get(line.second, -2):
            raise UserError(f"{where} was edited: vote {line.index} compares pictures that are no pair of this study")
    return lines


def _first(error: ValidationError) -> str:
    fault = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))[:160]
