"""What search.json says, as others read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

SEARCH_SCHEMA = "slimxl.bench.search/1"


def work_of(workload: Mapping[str, Any]) -> dict[str, Any]:
    """Of a workload's fields those that a latency is predicted for."""
    fields = ("steps", "batch", "guidance_scale")
    return {"resolution": str(workload["resolution"])} | {name: workload[name] for name in fields}


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Predicted(_Record):
    """With its 90 % interval."""

    value: float
    low: float
    high: float


class FoundStudent(_Record):
    """`way` is greedy, search, one-shot, random or published; `change` is of noise_pred before any training."""

    way: str
    name: str
    depth: str
    parameters: int
    latency_ms: Predicted
    speedup: Predicted
    change: float


class FrontFile(_Record):
    """`workload` is as of `work_of`; `gpu` is the peak's name."""

    schema_version: Literal["slimxl.bench.search/1"]
    teacher: str
    depth: str
    family: str
    gpu: str
    runtime: str
    workload: dict[str, Any]
    latency_stands_on: str
    students: list[FoundStudent]
