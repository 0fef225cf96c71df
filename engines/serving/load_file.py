"""The file that a load test writes: server, bundle, workload and every latency, under a versioned schema."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.common.errors import UserError
from distill.common.files import read_json
from distill.common.validation import first_fault

LOAD_SCHEMA: Literal["slimxl.load/1"] = "slimxl.load/1"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoadServer(_Record):
    """`instances` are copies of the model, each with its kind and its CUDA devices; `address` is the gRPC endpoint."""

    address: str
    name: str
    version: str
    instances: list[str]
    max_batch_size: int


class LoadBundle(_Record):
    """As the server states it; `path` is on the server's machine."""

    path: str
    manifest_sha256: str
    source: str
    flavor: str


class LoadClient(_Record):
    """Where the clients ran."""

    system: str
    cores: int | None


class LoadWorkload(_Record):
    """What every request asked for, apart from its seed and a random word at the end of its prompt. `rate_per_s` bounds all
    clients together; None is no bound."""

    prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    images: int
    rate_per_s: float | None


class ServerMemory(_Record):
    """Resident bytes of the server and its model processes: medians of the first and the last tenth of the samples.
    `samples` are [seconds since the level began, bytes]."""

    first_bytes: int
    last_bytes: int
    peak_bytes: int
    samples: list[tuple[float, int]]


class LoadLevel(_Record):
    """One number of clients at once, each with one request under way.

    `latencies_ms` are those of the answered requests, with the time in the server's queue; under a rate they count from when
    the request was due. `latency_ms` has median, p90, p95 and p99, None where there are too few requests. `mean_batch` is
    how many pictures the UNet drew at once, averaged over its batches. `server_rss` is None for a server on another
    machine."""

    concurrency: int = Field(ge=1)
    requests: int = Field(ge=0)
    failures: int = Field(ge=0)
    first_error: str | None
    seconds: float = Field(gt=0)
    images_per_s: float = Field(ge=0)
    mean_batch: float | None
    latency_ms: dict[str, float | None]
    latencies_ms: list[float]
    server_rss: ServerMemory | None


class LoadFile(_Record):
    """The whole file."""

    schema_version: Literal["slimxl.load/1"] = LOAD_SCHEMA
    created_utc: str
    command: str
    server: LoadServer
    bundle: LoadBundle
    client: LoadClient
    workload: LoadWorkload
    levels: list[LoadLevel] = Field(min_length=1)


def read_load(path: Path) -> LoadFile:
    """Raises UserError for a file that is absent, not JSON, or does not keep to the schema."""
    try:
        return LoadFile.model_validate(read_json(path))
    except ValidationError as error:
        fault = f"{path} does not keep to {LOAD_SCHEMA}: {first_fault(error)}"
        raise UserError(f"{fault}; make it anew with python -m engines load-test") from None
