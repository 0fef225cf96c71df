"""What a user states in a JSON file, checked by pydantic against the types of a dataclass: the one place where an unknown
name, a value out of range, NaN or infinity is refused."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Of every dataclass that is read so: no unknown field, no text for a number, no number that is not finite."""
Stated = TypeVar("Stated")


def from_json(kind: type[Stated], value: Any) -> Stated:
    """The dataclass that JSON data states. Raises ValueError with the place and the words of the first fault."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value))
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "the whole"
        raise ValueError(f"{where}: {fault['msg'][:1].lower()}{fault['msg'][1:]}") from None
