"""What the tests of serving share: Triton's own client at work, a repository's config as it reads it, and free ports."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from engines.serving.environment import Environment
from engines.serving.options import Serving
from engines.serving.repository import write_repository
from engines.serving.server import Address

ROOT = Path(__file__).resolve().parents[3]
CLIENT = Path(__file__).with_name("triton_client.py")


def ask(environment: Environment, address: Address, *asks: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of the client in the server's environment."""
    line = [environment.python, CLIENT, str(address.http_port), str(address.grpc_port)]
    paths = os.environ | {"PYTHONPATH": str(ROOT / "engines/serving")}
    done = subprocess.run(
        line, input=json.dumps(asks), capture_output=True, text=True, timeout=300, env=paths, check=False
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def free_address() -> Address:
    """On two ports, both held until both are chosen."""
    with socket.socket() as http, socket.socket() as grpc:
        http.bind(("127.0.0.1", 0))
        grpc.bind(("127.0.0.1", 0))
        return Address("127.0.0.1", http.getsockname()[1], grpc.getsockname()[1])


def drawing(over: str = "http", **inputs: Any) -> dict[str, Any]:
    return {"do": "draw", "over": over, "inputs": {"prompt": "a red circle", "steps": 2, "seed": 5} | inputs}


def parse(environment: Environment, text: str) -> dict[str, Any]:
    """config.pbtxt as Triton reads it; fields that are 0 or false are absent."""
    (config,) = ask(environment, Address(), {"do": "parse_config", "text": text})
    assert "error" not in config, config
    return config


def repository_config(bundle: Path, out: Path, serving: Serving, environment: Environment) -> dict[str, Any]:
    write_repository(bundle, out, serving)
    return parse(environment, (out / "slimxl/config.pbtxt").read_text())
