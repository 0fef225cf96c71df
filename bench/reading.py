"""Reading what a report or a comparison is made from: each file by its schema, results held against themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from bench import shapes
from bench.consistency import contradictions
from bench.results import (
    ACCEPTANCE_SCHEMA,
    LOOPS_SCHEMA,
    SCHEMA,
    SESSION_SCHEMA,
    TRAINING_SCHEMA,
    Results,
)
from distill.common.errors import UserError
from distill.common.files import read_json
from engines.serving.load_file import LOAD_SCHEMA, LoadFile, read_load

ModelT = TypeVar("ModelT", bound=BaseModel)


def _keeping_to(schema: str, model: type[ModelT], value: Any, path: Path) -> ModelT:
    """Raises UserError with the first place where `value` does not."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} does not keep to {schema}: {where}: {first['msg']}; make it anew") from None


def read_results(path: Path) -> Results:
    """Raises UserError for a file that is absent, not JSON, of another schema, without a single run, or that contradicts
    itself."""
    value = read_json(path)
    found = value.get("schema_version") if isinstance(value, dict) else None
    if found != SCHEMA:
        raise UserError(
            f"{path} is no results file of this version: it says {found!r}, needed is {SCHEMA!r}; "
            "make it anew with python -m bench run"
        )
    results = _keeping_to(SCHEMA, Results, value, path)
    _keeping_to(SCHEMA, shapes.ResultsParts, value, path)
    if not any(cell.rows for cell in results.cells):
        raise UserError(f"{path} holds no finished run; python -m bench run makes one")
    for fault in contradictions(results):
        raise UserError(f"{path} contradicts itself: {fault}; make it anew with python -m bench run")
    return results


@dataclass
class Inputs:
    """What a report is made from: results, load tests, and the GPU suite's other files as they were written."""

    results: list[Results] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    published_loops: list[dict[str, Any]] = field(default_factory=list)
    acceptance: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    loads: list[LoadFile] = field(default_factory=list)


def read_inputs(paths: list[Path]) -> Inputs:
    """Each file by its schema. Raises UserError for a file of none of them, or that does not keep to its own."""
    inputs = Inputs()
    others: dict[str, tuple[list[dict[str, Any]], type[BaseModel]]] = {
        TRAINING_SCHEMA: (inputs.training, shapes.TrainingFile),
        LOOPS_SCHEMA: (inputs.published_loops, shapes.LoopsFile),
        ACCEPTANCE_SCHEMA: (inputs.acceptance, shapes.AcceptanceFile),
        SESSION_SCHEMA: (inputs.sessions, shapes.SessionFile),
    }
    for path in paths:
        value = read_json(path)
        schema = value.get("schema_version") if isinstance(value, dict) else None
        if schema == LOAD_SCHEMA:
            inputs.loads.append(read_load(path))
        elif schema in others:
            kept, shape = others[schema]
            _keeping_to(schema, shape, value, path)
            kept.append(value)
        else:
            inputs.results.append(read_results(path))
    return inputs
