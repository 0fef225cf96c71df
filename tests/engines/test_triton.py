"""The model repository, and a real server over it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import engines
from distill.errors import UserError
from engines.bundle import Manifest, read_manifest
from engines.triton import parse_devices, plan_config, quote, write_repository
from engines.triton_server import Environment, command, make_environment, variables

CLIENT = Path(__file__).with_name("triton_client.py")
ENVIRONMENT = Path(__file__).resolve().parents[2] / "out/triton/environment"


def test_repository(toy_bundle: Path, tmp_path: Path) -> None:
    names = write_repository(toy_bundle, tmp_path / "repo", flavor="onnxruntime", gpus=[0, 1], instances=2)
    assert names == ["slimxl"]
    text = (tmp_path / "repo/slimxl/config.pbtxt").read_text()
    assert "{ kind: KIND_GPU count: 2 gpus: [ 0 ] }, { kind: KIND_GPU count: 2 gpus: [ 1 ] }" in text
    assert f'string_value: "{toy_bundle}"' in text and "response_cache { enable: false }" in text
    assert (tmp_path / "repo/slimxl/1/model.py").read_text().startswith('"""The text-to-image model inside Triton')
    write_repository(toy_bundle, tmp_path / "repo", decoupled=True)
    text = (tmp_path / "repo/slimxl/config.pbtxt").read_text()
    assert "decoupled: true" in text and "KIND_CPU count: 1" in text


def test_damaged_bundle_is_not_served(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(toy_bundle, bundle)
    path = bundle / read_manifest(bundle).engines[0].files[0].path
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="the manifest says"):
        write_repository(bundle, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"flavor": "tensorrt"}, "has no tensorrt engines"),
        ({"plans": True}, "no tensorrt plans"),
        ({"instances": 0}, "--instances 0"),
    ],
)
def test_what_cannot_be_served(toy_bundle: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_repository(toy_bundle, tmp_path / "repo", **change)


def test_devices() -> None:
    assert parse_devices("") == [] and parse_devices("0, 3") == [0, 3]
    with pytest.raises(UserError, match="not a list of CUDA device numbers"):
        parse_devices("rtx4090")


def test_plan_config_comes_from_the_manifest(toy_manifest: Manifest) -> None:
    unet = next(e for e in toy_manifest.engines if e.flavor == "tensorrt-rtx" and e.component == "unet")
    text = plan_config("unet", unet, [1])
    assert '{ name: "sample" data_type: TYPE_FP16 dims: [ -1, 4, -1, -1 ] }' in text
    assert '{ name: "timestep" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }' in text
    assert 'gpus: [ 1 ] profile: [ "0" ]' in text
    assert quote('a "b"\n\\') == '"a \\"b\\"\\n\\\\"'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    def __init__(self, environment: Environment, repository: Path, log: Path) -> None:
        self.environment = environment
        self.ports = (_free_port(), _free_port())
        line = command(repository, environment, "127.0.0.1", *self.ports)
        with log.open("wb") as file:
            self.process = subprocess.Popen(line, env=variables(environment), stdout=file, stderr=file)
        for _ in range(240):
            if self.is_ready():
                return
            assert self.process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        raise AssertionError(log.read_text()[-3000:])

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def ask(self, *requests: dict[str, Any]) -> list[dict[str, Any]]:
        line = [str(self.environment.python), str(CLIENT), *map(str, self.ports)]
        result = subprocess.run(
            line, input=json.dumps(requests), capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr
        answers: list[dict[str, Any]] = json.loads(result.stdout)
        return answers


@pytest.fixture(scope="module")
def server(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    try:
        environment = make_environment(ENVIRONMENT)
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("triton")
    write_repository(toy_bundle, folder / "repo", flavor="onnxruntime", execution_env=environment.folder)
    server = Server(environment, folder / "repo", folder / "log")
    yield server
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)


def _request(over: str = "http", **inputs: Any) -> dict[str, Any]:
    return {"over": over, "inputs": {"prompt": "a red circle", "steps": 2, "seed": 5} | inputs}


@pytest.mark.slow
def test_every_size_is_the_picture_of_the_bundle_in_process(server: Server, toy_bundle: Path) -> None:
    pipeline = engines.load(toy_bundle, flavor="onnxruntime")
    pipeline.set_progress_bar_config(disable=True)
    sizes = [tuple(map(int, text.split("x"))) for text in pipeline.unet.component.resolutions]
    assert len(sizes) == 9
    for over in ("http", "grpc"):
        answers = server.ask(*(_request(over, width=width, height=height) for width, height in sizes))
        for (width, height), answer in zip(sizes, answers, strict=True):
            assert answer.get("shape") == [1, height, width, 3], answer
            generator = torch.Generator().manual_seed(5)
            image = pipeline(
                "a red circle", width=width, height=height, num_inference_steps=2, generator=generator
            ).images[0]
            assert answer["sha256"] == hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
            assert answer["png"] == "89504e47" and all(value > 0 for value in answer["timings_ms"])


@pytest.mark.slow
def test_bad_requests_get_an_error_and_the_server_lives_on(server: Server) -> None:
    bad = [
        (_request(width=100), "size 100x128 is not served: allowed are 128x128"),
        (_request(steps=0), "steps is 0, allowed are 1 to 200"),
        (_request(prompt="x" * 100_000), "prompt has 100000 bytes, allowed are 8192"),
        (_request(prompt={"hex": "fffe"}), "prompt is not UTF-8"),
        (_request(images=999), "images is 999"),
        (_request(guidance=float("nan")), "guidance is nan"),
        (_request() | {"types": {"steps": "FP32"}}, "steps"),
    ]
    for over in ("http", "grpc"):
        answers = server.ask(*(request | {"over": over} for request, _ in bad))
        for (_, message), answer in zip(bad, answers, strict=True):
            assert message in answer.get("error", ""), answer
    assert "sha256" in server.ask(_request())[0]


@pytest.mark.slow
def test_sigterm_drains(server: Server) -> None:
    """A request that is under way when the signal comes is still answered."""
    line = [str(server.environment.python), str(CLIENT), *map(str, server.ports)]
    client = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert client.stdin and client.stdout and client.stderr
    client.stdin.write(json.dumps([_request(steps=200, images=16)]))
    client.stdin.close()
    assert client.stderr.readline() == "sending\n"
    time.sleep(1)
    server.process.send_signal(signal.SIGTERM)
    (answer,) = json.loads(client.stdout.read())
    client.wait(60)
    assert answer.get("shape") == [16, 128, 128, 3], answer
    assert server.process.wait(90) == 0
