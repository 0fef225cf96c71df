"""A load test of a running Triton server: pictures per second and latency of a request, at rising concurrency.

Each client has one request under way and sends the next when it is answered (a closed loop). A latency is what the client
waits, Triton's queue included. Under a rate it counts from the moment the request was due, so waiting for a free client
counts too. The result is one JSON file with every latency (`load_file.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from distill.common.errors import UserError, require_above
from distill.common.files import write_json
from distill.common.ownership import require_writable_file
from distill.models.resolution import Resolution
from engines.memory import MemoryWatch
from engines.serving.environment import make_client_environment
from engines.serving.load_file import (
    LoadBundle,
    LoadClient,
    LoadFile,
    LoadLevel,
    LoadServer,
    LoadWorkload,
    ServerMemory,
)
from engines.serving.options import Workload
from engines.serving.quantiles import percentiles
from engines.serving.server import terminate_with_parent

CLIENT = Path(__file__).with_name("load_client.py")
PROMPT = "a small red circle to the left of a large blue square"
SAMPLE_SECONDS = 1.0
"""How often the server's memory is read."""


def make_request(workload: Workload) -> dict[str, Any]:
    """The inputs by name; for those that are None the clients take the server's defaults, count the seed up and end each
    prompt with another word. Raises UserError for a size that cannot be read."""
    resolution = Resolution.parse(workload.size) if workload.size else None
    return {
        "prompt": PROMPT,
        "width": resolution.width if resolution else None,
        "height": resolution.height if resolution else None,
        "steps": workload.steps,
        "guidance": workload.guidance,
        "images": workload.images,
    }


def find_server(host: str, port: int) -> psutil.Process | None:
    """The tritonserver of this machine and user that listens there. None for any other listener: it may be a tunnel to
    another machine."""
    if host not in ("localhost", "127.0.0.1", "::1", platform.node()):
        return None
    with contextlib.suppress(psutil.Error):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == port and one.pid:
                process = psutil.Process(one.pid)
                return process if process.name() == "tritonserver" else None
    return None


def require_listening(host: str, port: int) -> None:
    """Raises UserError where nothing takes a connection; asked before the clients are installed."""
    try:
        socket.create_connection((host, port), timeout=10).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(
            f"nothing listens at {host}:{port} ({error}); start a server with: python -m engines serve --bundle BUNDLE"
        ) from None


def server_memory(samples: list[tuple[float, int]], begin: float) -> ServerMemory | None:
    """Of the (time.monotonic(), bytes) since `begin`; None where there are none."""
    chosen = [(moment - begin, size) for moment, size in samples if begin <= moment]
    if not chosen:
        return None
    tenth = max(1, len(chosen) // 10)
    return ServerMemory(
        first_bytes=int(statistics.median(size for _, size in chosen[:tenth])),
        last_bytes=int(statistics.median(size for _, size in chosen[-tenth:])),
        peak_bytes=max(size for _, size in chosen),
        samples=[(round(moment, 1), size) for moment, size in chosen],
    )


def measure_load(
    out: Path,
    server: str,
    workload: Workload,
    concurrency: list[int],
    seconds: float,
    rate: float | None,
    workdir: Path,
) -> int:
    """Loads the server at each concurrency for `seconds` and writes `out`. Returns 1 where a request failed, and 130 after
    Ctrl-C; the levels finished until then are written.

    Raises UserError for an `out` that cannot be written, where no slimxl server answers, and where the clients ended too
    early; the levels finished until then are written first.
    """
    host, _, port = server.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port):
        raise UserError(f"--server {server[:80]!r} is not HOST:PORT of a gRPC endpoint, e.g. 127.0.0.1:8001")
    require_above(0, minutes=seconds / 60, rate=1 if rate is None else rate)
    job = {
        "server": server,
        "request": make_request(workload),
        "concurrency": concurrency,
        "seconds": seconds,
        "rate": rate,
    }
    require_writable_file(out, ("schema_version", "levels"))
    host = host.strip("[]")
    require_listening(host, int(port))
    about: dict[str, Any] = {}
    samples: list[tuple[float, int]] = []
    levels: list[LoadLevel] = []
    stopped = False
    python = make_client_environment(workdir).python
    try:
        process = find_server(host, int(port))
        with MemoryWatch(process, SAMPLE_SECONDS, lambda size: samples.append((time.monotonic(), size))):
            begin = 0.0
            for event in run_client(python, job):
                if "error" in event:
                    raise UserError(
                        f"no slimxl model answers at {server} ({event['error']}); start one with: python -m engines serve "
                        "--bundle BUNDLE"
                    )
                if "started" in event:
                    begin = time.monotonic()
                    print(f"{event['started']} client(s) for {seconds:.0f} s", flush=True)
                elif "finished" in event:
                    levels.append(summarise(event, workload.images, server_memory(samples, begin)))
                else:
                    about |= event
    except KeyboardInterrupt:
        stopped = True
    if levels:
        write_json(out, describe(about, job, levels).model_dump(mode="json"))
        print_levels(levels)
        print(f"wrote {out}", flush=True)
    if stopped:
        print(f"stopped after {len(levels)} of {len(concurrency)} levels", file=sys.stderr)
        return 130
    if len(levels) < len(concurrency):
        raise UserError(f"the clients ended after {len(levels)} of {len(concurrency)} levels; see what they said above")
    return 1 if any(level.failures for level in levels) else 0


def run_client(python: Path, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The clients' lines of JSON, as they come."""
    pipe = subprocess.PIPE
    command: list[str | Path] = [python, CLIENT]
    with subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        text=True,
        start_new_session=True,  # so that Ctrl-C is for this process alone
        preexec_fn=terminate_with_parent,  # noqa: PLW1509, for it calls only prctl
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        try:
            for line in process.stdout:
                yield json.loads(line)
        finally:
            process.terminate()


def summarise(event: dict[str, Any], images: int, memory: ServerMemory | None) -> LoadLevel:
    """The record of one concurrency; `images` is how many each request asks for."""
    latencies = event["latencies_ms"]
    return LoadLevel(
        concurrency=event["finished"],
        requests=len(latencies) + event["failures"],
        failures=event["failures"],
        first_error=event["first_error"],
        seconds=event["seconds"],
        images_per_s=len(latencies) * images / event["seconds"],
        # each picture reports the size of its batch, so the harmonic mean is all pictures over all batches
        mean_batch=statistics.harmonic_mean(event["batches"]) if event["batches"] else None,
        latency_ms={"median": statistics.median(latencies) if latencies else None, **percentiles(latencies)},
        latencies_ms=[round(value, 3) for value in latencies],
        server_rss=memory,
    )


def describe(about: dict[str, Any], job: dict[str, Any], levels: list[LoadLevel]) -> LoadFile:
    """The whole file; `about` is what the server says of itself."""
    parameters = about["parameters"]
    return LoadFile(
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "engines", *sys.argv[1:]]),
        server=LoadServer(
            address=job["server"],
            name=about["server"]["name"],
            version=about["server"]["version"],
            instances=about["instances"],
            max_batch_size=about["max_batch_size"],
        ),
        bundle=LoadBundle(
            path=parameters["bundle"],
            manifest_sha256=parameters["manifest_sha256"],
            source=parameters["source"],
            flavor=parameters["flavor"],
        ),
        client=LoadClient(system=platform.platform(), cores=os.cpu_count()),
        workload=LoadWorkload(**about["request"], rate_per_s=job["rate"]),
        levels=levels,
    )


def print_levels(levels: list[LoadLevel]) -> None:
    columns = ("clients", "requests", "failed", "images/s", "median ms", "p90", "p95", "p99", "batch", "server MB")
    print("".join(f"{name:>11}" for name in columns))
    for level in levels:
        memory = level.server_rss
        cells = [str(level.concurrency), str(level.requests), str(level.failures), f"{level.images_per_s:.2f}"]
        cells += ["-" if value is None else f"{value:.0f}" for value in level.latency_ms.values()]
        cells.append("-" if level.mean_batch is None else f"{level.mean_batch:.1f}")
        cells.append("-" if memory is None else f"{memory.first_bytes / 1e6:.0f}-{memory.last_bytes / 1e6:.0f}")
        print("".join(f"{cell:>11}" for cell in cells))
        if level.failures:
            print(f"first failure: {level.first_error}")
