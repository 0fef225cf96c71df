"""The command `serve`: writes the model repository, finds a server, runs it until Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from distill.common.errors import UserError
from distill.common.ownership import require_our_folder
from engines.bundle import read_manifest
from engines.serving.environment import Environment, find_environment
from engines.serving.options import Serving
from engines.serving.placement import choose_placement, parse_devices, require_runs_here
from engines.serving.repository import MODEL, is_ours, write_repository
from engines.serving.server import DRAIN_SECONDS, Address, Server


def serve_bundle(bundle: Path, serving: Serving, workdir: Path, address: Address) -> int:
    """Serves until Ctrl-C or SIGTERM, then finishes the requests under way. Returns the server's exit status.

    Raises UserError where the bundle does not run here, before a server is installed, and where the server or a process of
    its model ends by itself.
    """
    address.require_free()
    manifest = read_manifest(bundle)
    place = choose_placement(manifest, serving.flavor, parse_devices(serving.gpus))
    if not serving.execution_env:  # it may hold another TensorRT than this Python
        require_runs_here(manifest, place)
    environment = find_environment(workdir)
    if environment and not serving.execution_env:
        serving = replace(serving, execution_env=environment.folder)
    folder = workdir / str(address.http_port)
    with alone_in(folder):
        require_our_server(folder)
        write_repository(bundle, folder / "models", serving)
        first = "a picture of every size is drawn first" if serving.warm_up else "nothing is drawn first"
        print(f"starting Triton with {bundle} {place}; {first}", flush=True)
        return _run(folder / "models", environment, address, folder / "log")


def require_our_server(folder: Path) -> None:
    """Raises UserError for a folder that holds something and no model repository of ours."""
    if not is_ours(folder / "models" / MODEL / "config.pbtxt"):
        require_our_folder(folder, "a server's folder", [], (), option="--workdir")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises UserError where another process serves from `folder`. The system frees the lock of a killed process."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"another serve has its model in {folder}; choose another --http-port or another --workdir"
        ) from None


def _run(repository: Path, environment: Environment | None, address: Address, log: Path) -> int:
    server = Server(repository, environment, address, log)

    def stop(number: int, frame: object) -> None:
        print(f"stopping: requests under way are finished, for {DRAIN_SECONDS} s at most", flush=True)
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.wait_ready()
    if not server.stopping:
        grpc = f"{address.host}:{address.grpc_port}"
        print(
            f"ready: HTTP http://{address.host}:{address.http_port}/v2/models/slimxl, gRPC {grpc}"
            f"\nmeasure it with: python -m engines load-test --server {grpc} --out out/load.json"
            "\nCtrl-C or SIGTERM stops it",
            flush=True,
        )
        if not address.is_loopback:
            print(f"listening on {address.host}: whoever reaches it can draw, there is no authentication", flush=True)
    return server.wait()
