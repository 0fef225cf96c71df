"""The server's process: where it listens, what it is installed from, how it ends; and `serve` as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from distill.common.errors import UserError
from engines.__main__ import load_test, main, serve
from engines.bundle import read_manifest
from engines.serving.environment import (
    READY,
    SERVER_PACKAGES,
    Environment,
    make_client_environment,
    make_environment,
)
from engines.serving.load_test import find_server
from engines.serving.options import Serving
from engines.serving.repository import write_repository
from engines.serving.serve import alone_in
from engines.serving.server import ANSWERED, SHARED_MEMORY, Address, Server, is_alive, reason, require_unexposed
from tests.engines.serving.triton_here import CLIENT, ROOT, drawing, free_address


def test_a_taken_port_and_a_dead_server_are_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port} .*--grpc-port"):
            Address("127.0.0.1", free_address().http_port, port).require_free()
        with pytest.raises(UserError, match=r"--http-port and --grpc-port are both 8000: choose two that differ"):
            Address("127.0.0.1", 8000, 8000).require_free()
        assert find_server("127.0.0.1", port) is None, "a tunnel's memory is not the server's"
    log = tmp_path / "log"
    log.write_text("I1 started\nE1 'failed to load 'slimxl' version 1: Internal: UserError: the bundle is gone\n")
    assert reason(log) == "the bundle is gone"


@pytest.mark.parametrize("command", [serve, load_test])
def test_no_folder_stands_before_a_package(command: Callable[..., int]) -> None:
    """Python started in `out/` would import a folder called `triton` in place of the package that torch looks for."""
    assert signature(command).parameters["workdir"].default.name not in {"triton", *packages_distributions()}


def test_one_serve_to_a_folder(tmp_path: Path) -> None:
    """A second would put its bundle under the first one's server."""
    refused = pytest.raises(UserError, match=r"another serve has its model in .*8000; choose another --http-port")
    with alone_in(tmp_path / "8000"), alone_in(tmp_path / "8001"), refused, alone_in(tmp_path / "8000"):
        pass


def test_what_was_installed_is_never_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Python, or other packages, go beside it."""
    whole = Environment.named("environment", SERVER_PACKAGES, tmp_path)
    whole.folder.mkdir()
    (whole.folder / READY).touch()
    assert make_environment(tmp_path) == make_client_environment(tmp_path) == whole
    cleared: list[Path] = []
    monkeypatch.setattr("venv.create", lambda folder, **_: cleared.append(folder))
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no network"))
    for change in ({"PYTHON": "3.99"}, {"SERVER_PACKAGES": ("numpy==2.0",)}):
        with monkeypatch.context() as changed, pytest.raises(UserError, match=r"cannot install .*no network"):
            for name, value in change.items():
                changed.setattr(f"engines.serving.environment.{name}", value)
            make_environment(tmp_path)
    assert len(set(cleared)) == 2 and whole.folder not in cleared


def test_where_it_may_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number, since Triton takes a name as 255.255.255.255; and only here, where a malformed request can crash it."""
    local = Address.resolve("localhost", 1, 2)
    assert local == Address("127.0.0.1", 1, 2) and local.is_loopback
    for name in ("::1", "nowhere.invalid", "a..b"):
        with pytest.raises(UserError, match=f"--address '{name}' has no IPv4 number"):
            Address.resolve(name, 1, 2)
    require_unexposed(local)
    with pytest.raises(UserError, match=r"CVE-2025-23310.*does not listen on 0\.0\.0\.0.*--allow-exposed"):
        require_unexposed(Address("0.0.0.0"))
    monkeypatch.setattr("shutil.which", lambda name: "/opt/tritonserver/bin/tritonserver")
    for version, told in (("", "of an unknown version"), ("25.06", "25.06")):
        monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", version)
        with pytest.raises(UserError, match=f"this Triton is {told}"):
            require_unexposed(Address("0.0.0.0"))
    monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", "25.07")
    require_unexposed(Address("0.0.0.0"))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--flavor", "tensorrt-rtx", "--gpus", "0,1"], "capability 8.0, 8.9 (a100, rtx4090), this GPU is NVIDIA H100"),
        (["--queue", "-1"], "--queue is -1"),
    ],
)
def test_bad_serve(
    words: list[str],
    message: str,
    toy_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Told before a server is installed."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("engines.flavors.tensorrt.driver_at_hand", lambda: None)
    gpus = {"cuda:0": ("NVIDIA RTX 4090", "8.9"), "cuda:1": ("NVIDIA H100", "9.0")}
    monkeypatch.setattr("engines.flavors.tensorrt.gpu_of_device", gpus.get)
    address = free_address()
    ports = ["--http-port", str(address.http_port), "--grpc-port", str(address.grpc_port)]
    line = ["engines", "serve", "--bundle", str(toy_bundle), "--workdir", str(tmp_path), *ports, *words]
    monkeypatch.setattr("sys.argv", line)
    assert main() == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server and its model that do nothing, SIGTERM or not."""
    script = "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    script += "subprocess.Popen(['sleep', '60']); print(flush=True); signal.pause()"
    monkeypatch.setattr("engines.serving.server.command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr(Server, "is_ready", lambda self: bool(self.log.read_text()))
    server = Server(tmp_path, None, Address(), tmp_path / "log")
    server.wait_ready()
    yield server
    server.process.kill()


def test_a_killed_model_ends_the_server_without_draining(pretended: Server) -> None:
    """The server, as Triton would, notices nothing and takes no SIGTERM; what it shares memory by is removed."""
    pretended._region = pretended.log.parent.name + "-"
    region = SHARED_MEMORY / f"{pretended._region}1"
    region.touch()
    pretended.log.write_text(
        'E1129 model.py:183] "cuda:0 answers no more: this process ends, since it cannot draw again"\n'
    )
    psutil.Process(pretended.process.pid).children()[0].kill()
    with pytest.raises(UserError, match=r"a process of the model ended by itself \(cuda:0 answers no more\)"):
        pretended.wait()
    assert pretended.process.poll() == -signal.SIGKILL and not region.exists()


def test_a_killed_server_is_told_as_killed_and_its_model_is_ended(pretended: Server) -> None:
    """Not as what its log happens to say last."""
    pretended.log.write_text("error: something of an hour ago\n")
    model = psutil.Process(pretended.process.pid).children()[0]
    pretended.process.kill()
    with pytest.raises(UserError, match="Triton ended by itself: it got SIGKILL, from somebody or from the system"):
        pretended.wait()
    assert psutil.wait_procs([model], 10)[1] == []


def test_a_server_that_answered_all_and_hangs_is_ended(
    pretended: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engines.serving.server.WATCH_SECONDS", 0.1)
    monkeypatch.setattr("engines.serving.server.UNLOAD_SECONDS", 0.1)
    model = psutil.Process(pretended.process.pid).children()[0]
    pretended.stop()
    line = 'I1122 08:24:48.521467 29566 {}:331] "{}All models are stopped, unloading models"\n'
    pretended.log.write_text(line.format("model.py", "request 'server.cc:1] "))
    assert not pretended._hangs() and pretended._answered is None, "what a client called its request"
    pretended.log.write_text(line.format("server.cc", ""))
    assert pretended.wait() == 0
    assert "every request was answered, but Triton kept its model" in capsys.readouterr().out
    ends = time.monotonic() + 10
    while is_alive(model):
        assert time.monotonic() < ends


@pytest.mark.slow
def test_serving_as_a_user_does_and_draining(environment: Environment, toy_bundle: Path, tmp_path: Path) -> None:
    """`python -m engines serve` from start to SIGTERM: requests that are under way are still answered."""
    (tmp_path / environment.folder.name).symlink_to(environment.folder)
    address = free_address()
    line = [sys.executable, "-m", "engines", "serve", "--bundle", str(toy_bundle), "--workdir", str(tmp_path)]
    line += ["--http-port", str(address.http_port), "--grpc-port", str(address.grpc_port)]
    serving = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    assert serving.stdout
    assert "(onnxruntime) on the CPU" in serving.stdout.readline()
    ready = serving.stdout.readline()
    assert f"ready: HTTP http://127.0.0.1:{address.http_port}/v2/models/slimxl" in ready, ready
    command = [str(environment.python), str(CLIENT), str(address.http_port), str(address.grpc_port)]
    paths = os.environ | {"PYTHONPATH": str(ROOT / "engines/serving")}
    pipe = subprocess.PIPE
    client = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=paths)
    assert client.stdin and client.stdout and client.stderr
    client.stdin.write(json.dumps([drawing(steps=50, images=16)] * 16))
    client.stdin.close()
    assert [client.stderr.readline() for _ in range(16)] == ["sending\n"] * 16
    time.sleep(2)  # all have arrived; to draw them takes longer
    assert client.poll() is None, "nothing was under way"
    serving.send_signal(signal.SIGTERM)
    answers = json.loads(client.stdout.read())
    client.wait(60)
    assert [answer.get("shape") for answer in answers] == [[1, 16, 128, 128, 3]] * 16, answers
    assert serving.wait(90) == 0
    assert "stopping: requests under way are finished" in serving.stdout.read()
    assert ANSWERED.search((tmp_path / str(address.http_port) / "log").read_text())


@pytest.mark.slow
def test_a_bundle_that_changed_after_the_repository_is_not_served(
    environment: Environment, toy_bundle: Path, tmp_path: Path
) -> None:
    """Nor is the server left behind: it ends, with the reason in one line."""
    bundle = tmp_path / "bundle"
    shutil.copytree(toy_bundle, bundle)
    write_repository(bundle, tmp_path / "repo", Serving(gpus="none", execution_env=environment.folder))
    path = bundle / read_manifest(bundle).engines[0].files[0].path
    path.write_bytes(path.read_bytes()[::-1])
    server = Server(tmp_path / "repo", environment, free_address(), tmp_path / "log")
    with pytest.raises(UserError, match=r"Triton did not start: .* has sha256 .* the manifest says"):
        server.wait_ready()
    assert server.process.wait(60) != 0
