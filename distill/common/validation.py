"""What a user states in a JSON file, checked by pydantic against the types of a dataclass: the one place where an unknown
name, a value out of range, NaN or infinity is refused."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from distill.common.options import whole_number

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Of every dataclass that is read so: no unknown field, no text for a number, no number that is not finite."""
Stated = TypeVar("Stated")


def first_fault(error: ValidationError, whole: str = "the whole") -> str:
    """Place and words of the first thing that pydantic refused, as every room's messages tell it:
    `stages.0.steps: input should be greater than 0`. `whole` names the place where all of the value is wrong."""
    fault = error.errors()[0]
    where = ".".join(map(str, fault["loc"])) or whole
    return f"{where}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


def from_json(kind: type[Stated], value: Any) -> Stated:
    """The dataclass that JSON data states. Raises ValueError with the `first_fault`, and for numbers beyond 64 bits."""
    text = json.dumps(value)
    json.loads(text, parse_int=whole_number)
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None
