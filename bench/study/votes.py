"""Votes on disk: the file that a rater saves, and the line that the server appends. Both are checked against the study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.common.errors import UserError
from distill.common.progress import say

Pictures = Mapping[str, int]
"""The name of each picture of a study -> its prompt's place in it."""
Name = Field(pattern=r"^[0-9a-f]{16}$")


class Vote(BaseModel):
    """One answer of one rater. `index` is the place in the rater's order; `first` and `second` are the pictures as they
    stood, left or top first; `ms` is how long they were looked at, `at` when, in milliseconds since 1970. `missing`: one of
    them was not there to be seen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    study: str
    rater: str = Name
    index: int = Field(ge=0, le=100_000)
    first: str = Name
    second: str = Name
    choice: Literal["first", "second", "tie", "missing"]
    ms: int = Field(ge=0, le=10**10)
    at: int = Field(ge=0, le=10**15)

    @property
    def chosen(self) -> str:
        """The picture that was preferred, or `tie`."""
        return {"first": self.first, "second": self.second}.get(self.choice, "tie")

    def as_line(self) -> bytes:
        return self.model_dump_json().encode() + b"\n"


class Sheet(BaseModel):
    """Votes as a browser saves or sends them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    schema_version: Literal["slimxl.bench.votes/1"] = "slimxl.bench.votes/1"
    votes: list[Vote]
    checksum: int


def checksum(votes: Iterable[Vote]) -> int:
    """FNV-1a over all fields, as the page works it out: it finds a slip of an editor, not fraud."""
    value = 0x811C9DC5
    for byte in "\n".join(" ".join(map(str, vote.model_dump().values())) for vote in votes).encode():
        value = (value ^ byte) * 0x01000193 % 2**32
    return value


def read_sheet(text: str, where: str, study: str, pictures: Pictures) -> list[Vote]:
    """Raises UserError for what is no file of votes, was cut off or edited, or belongs to another study."""
    try:
        sheet = Sheet.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where} is no file of votes, or was cut off or edited ({_first(error)}); {ASK}") from None
    votes = _checked(sheet.votes, where, study, pictures)
    if sheet.checksum != checksum(votes):
        raise UserError(f"{where} was edited after it was saved: its checksum does not fit its votes; {ASK}")
    return votes


ASK = "ask the rater to save it again, or leave it out"


def read_lines(path: Path, study: str, pictures: Pictures) -> list[Vote]:
    """What the server has written. A last line without an end was never confirmed to its rater, who sends it again: it is
    left out. Raises UserError for any other line that is no vote on `study`, and a last that does not begin as one."""
    *whole, rest = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(whole, 1):
        try:
            found.append(Vote.model_validate_json(line))
        except ValidationError as error:
            raise UserError(f"{path}, line {number}: no vote, or an edited one ({_first(error)})") from None
    if rest:
        begun = f'{{"study":"{study}"'.encode()
        if rest[: len(begun)] != begun[: len(rest)]:  # the server takes away what was cut off
            raise UserError(f"{path}, line {len(whole) + 1}: no vote, not even one on {study} that was cut off")
        say(f"{path}: the last line was cut off and is left out")
    return _checked(found, str(path), study, pictures)


def read_votes(paths: list[Path], study: str, pictures: Pictures) -> list[Vote]:
    """Every vote once, by rater, whatever number of files hold it: where a rater has changed one, the latest counts.

    Raises UserError for a file that cannot be used.
    """
    latest: dict[tuple[str, int], Vote] = {}
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} does not exist, or is a folder; --votes takes files of votes")
        if path.suffix == ".jsonl":
            votes = read_lines(path, study, pictures)
        else:
            votes = read_sheet(path.read_text(encoding="utf-8", errors="replace"), str(path), study, pictures)
        for vote in votes:
            place = (vote.rater, vote.index)
            if place not in latest or vote.at >= latest[place].at:
                latest[place] = vote
    return [latest[place] for place in sorted(latest)]


def _checked(votes: list[Vote], where: str, study: str, pictures: Pictures) -> list[Vote]:
    for vote in votes:
        if vote.study != study:
            raise UserError(f"{where} holds votes of the study {vote.study}, not of {study}; leave it out")
        if pictures.get(vote.first, -1) != pictures.get(vote.second, -2):
            raise UserError(f"{where} was edited: vote {vote.index} compares pictures that are no pair of this study")
    return votes


def _first(error: ValidationError) -> str:
    fault = error.errors()[0]
    return ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))[:160]
