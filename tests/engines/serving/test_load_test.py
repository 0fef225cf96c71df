"""The load test without a model behind it: what it refuses, and what it leaves when it is ended."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from distill.common.errors import UserError
from engines.__main__ import main
from engines.serving.environment import Environment
from engines.serving.load_file import read_load
from engines.serving.load_test import make_request, measure_load
from engines.serving.options import Workload
from engines.serving.server import is_alive
from tests.engines.serving.triton_here import ROOT


@pytest.mark.parametrize(
    "words, message",
    [
        (["--server", "here"], "--server 'here' is not HOST:PORT"),
        (["--concurrency", "0"], "--concurrency '0' is not a list"),
        (["--concurrency", "²"], "--concurrency '²' is not a list"),
        (["--rate", "0"], "--rate is 0.0; it must be above 0"),
        (["--minutes", "-1"], "--minutes is -1.0; it must be above 0"),
        (["--steps", "201"], "--steps is 201; the most is 200"),
        (["--server", "127.0.0.1:1"], "nothing listens at 127.0.0.1:1"),
        (["--server", "a..b:1"], "nothing listens at a..b:1"),
        (["--out", "."], "--out . is a folder"),
    ],
)
def test_bad_load(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Told before anything is installed or measured."""
    rest = ["--out", str(tmp_path / "x.json"), "--workdir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["engines", "load-test", *rest, *words])
    assert main() == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_was_measured_is_written_when_the_clients_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By themselves or by Ctrl-C. And three requests in a batch of two and one of one are two batches."""
    told = {"bundle": "b", "manifest_sha256": "0" * 64, "source": "toy", "flavor": "onnxruntime"}
    about = {"server": {"name": "triton", "version": "2"}, "parameters": told, "instances": [], "max_batch_size": 2}
    level = {"seconds": 2.0, "latencies_ms": [1.0, 2.0, 3.0], "batches": [2, 2, 1], "failures": 0, "first_error": None}
    request = make_request(Workload(size="128x128", steps=25, guidance=5.0))
    events = [about, {"request": request}, {"started": 1}, {"finished": 1} | level, {"started": 2}]
    monkeypatch.setattr("engines.serving.load_test.run_client", lambda python, job: iter(events))
    monkeypatch.setattr("engines.serving.load_test.make_client_environment", Environment)
    out = tmp_path / "load.json"

    def measure() -> int:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = f"127.0.0.1:{listening.getsockname()[1]}"
            return measure_load(out, server, Workload(), [1, 2], 1.0, None, tmp_path)

    with pytest.raises(UserError, match="the clients ended after 1 of 2 levels"):
        measure()
    (written,) = read_load(out).levels
    assert written.requests == 3 and written.mean_batch == pytest.approx(1.5)

    def stopped(python: Path, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from events
        raise KeyboardInterrupt

    monkeypatch.setattr("engines.serving.load_test.run_client", stopped)
    out.unlink()
    assert measure() == 130
    assert len(read_load(out).levels) == 1 and "stopped after 1 of 2 levels" in capsys.readouterr().err


def test_a_killed_load_test_ends_its_clients(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text('import json, os, time; print(json.dumps({"pid": os.getpid()}), flush=True); time.sleep(60)')
    code = (
        "import sys; from pathlib import Path; from engines.serving import load_test; load_test.CLIENT = Path(sys.argv[1])\n"
        "for event in load_test.run_client(sys.executable, {}): print(event['pid'], flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as load:
        assert load.stdout
        client = psutil.Process(int(load.stdout.readline()))
        load.kill()
    ends = time.monotonic() + 10
    while is_alive(client):
        assert time.monotonic() < ends
