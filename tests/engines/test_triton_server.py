"""A real Triton server over the mini bundle, its clients, and the load that is put on it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import engines
from distill.errors import UserError
from engines.bundle import Manifest, read_manifest
from engines.load_file import read_load
from engines.triton import backend_flags, write_repository
from engines.triton_load import find_server, make_request, measure_load
from engines.triton_options import Serving, Workload
from engines.triton_server import (
    ANSWERED,
    READY,
    SERVER_PACKAGES,
    Address,
    Environment,
    Server,
    _is_alive,
    alone_in,
    command,
    make_client_environment,
    make_environment,
    reason,
    require_unexposed,
)
from tests.engines.serving import CLIENT, ROOT, ask, drawing, free_address


def test_a_taken_port_and_a_dead_server_are_told_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port} .*--grpc-port"):
            Address("127.0.0.1", free_address().http_port, port).require_free()
        assert find_server(port) is None, "a tunnel's memory is not the server's"
    log = tmp_path / "log"
    log.write_text("I1 started\nE1 'failed to load 'slimxl' version 1: Internal: UserError: the bundle is gone\n")
    assert reason(log) == "the bundle is gone"


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
                changed.setattr(f"engines.triton_server.{name}", value)
            make_environment(tmp_path)
    assert len(set(cleared)) == 2 and whole.folder not in cleared


def test_where_it_may_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number, since Triton takes a name as 255.255.255.255; and only here, where a malformed request can crash it."""
    local = Address.resolve("localhost", 1, 2)
    assert local == Address("127.0.0.1", 1, 2) and local.is_loopback
    for name in ("::1", "nowhere.invalid"):
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
        (["--plans"], "--plans needs Triton's tensorrt backend"),
        (["--flavor", "tensorrt-rtx", "--gpus", "0,1"], "capability 8.0, 8.9 (a100, rtx4090), this GPU is NVIDIA H100"),
        (["--queue", "-1"], "--queue is -1"),
        (["--address", "a..b"], "--address 'a..b' has no IPv4 number"),
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
    from engines.__main__ import main

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


def test_a_server_is_told_of_plans_that_bring_their_runtime(toy_manifest: Manifest, tmp_path: Path) -> None:
    plan = toy_manifest.engines[0].model_copy(update={"flavor": "tensorrt", "options": {"version_compatible": True}})
    manifest = toy_manifest.model_copy(update={"engines": [plan]})
    told = [backend_flags(manifest, Serving(plans=plans)) for plans in (True, False)]
    assert told == [["--backend-config=tensorrt,version-compatible=true"], []]
    assert command(tmp_path, None, Address(), "key", told[0])[-1:] == told[0]


def test_a_killed_load_test_ends_its_clients(tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text('import json, os, time; print(json.dumps({"pid": os.getpid()}), flush=True); time.sleep(60)')
    code = (
        "import sys; from pathlib import Path; from engines import triton_load; triton_load.CLIENT = Path(sys.argv[1])\n"
        "for event in triton_load.run_client(sys.executable, {}): print(event['pid'], flush=True)"
    )
    with subprocess.Popen([sys.executable, "-c", code, script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as load:
        assert load.stdout
        client = psutil.Process(int(load.stdout.readline()))
        load.kill()
    ends = time.monotonic() + 10
    while _is_alive(client):
        assert time.monotonic() < ends


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server and its model that do nothing, SIGTERM or not."""
    script = "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    script += "subprocess.Popen(['sleep', '60']); print(flush=True); signal.pause()"
    monkeypatch.setattr("engines.triton_server.command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr(Server, "is_ready", lambda self: bool(self.log.read_text()))
    server = Server(tmp_path, None, Address(), tmp_path / "log")
    server.wait_ready()
    yield server
    server.process.kill()


def test_a_dead_model_ends_the_server(pretended: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton would, the parent of this process notices nothing."""
    monkeypatch.setattr("engines.triton_server.DRAIN_SECONDS", 0.1)
    psutil.Process(pretended.process.pid).children()[0].kill()
    with pytest.raises(UserError, match="a process of the model ended by itself"):
        pretended.wait()
    assert pretended.process.poll() is not None


def test_a_server_that_answered_all_and_hangs_is_ended(
    pretended: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engines.triton_server.WATCH_SECONDS", 0.1)
    monkeypatch.setattr("engines.triton_server.UNLOAD_SECONDS", 0.1)
    model = psutil.Process(pretended.process.pid).children()[0]
    pretended.stop()
    pretended.log.write_text("I1122 server.cc:331] All models are stopped, unloading models\n")
    assert pretended.wait() == 0
    assert "every request was answered, but Triton kept its model" in capsys.readouterr().out
    ends = time.monotonic() + 10
    while _is_alive(model):
        assert time.monotonic() < ends


@pytest.fixture(scope="module")
def start(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    servers = []

    def start_one(bundle: Path, **options: Any) -> Server:
        folder = tmp_path_factory.mktemp("triton")
        serving = Serving(flavor="onnxruntime", gpus="none", execution_env=environment.folder, **options)
        write_repository(bundle, folder / "repo", serving)
        server = Server(folder / "repo", environment, free_address(), folder / "log")
        servers.append(server)
        server.wait_ready()
        return server

    yield start_one
    for server in servers:
        server.stop()
    for server in servers:
        server.process.wait(60)


@pytest.fixture(scope="module")
def server(mini_bundle: Path, start: Callable[..., Server]) -> Server:
    return start(mini_bundle)


def in_process(pipeline: Any, seed: int = 5, **inputs: Any) -> dict[str, Any]:
    """Hash and shape of what the bundle draws without a server."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 2} | inputs
    pictures = np.stack([np.asarray(one) for one in pipeline(**options, generator=generator).images])[None]
    return {"sha256": hashlib.sha256(pictures.tobytes()).hexdigest(), "shape": list(pictures.shape)}


@pytest.fixture(scope="module")
def pipeline(mini_bundle: Path) -> Any:
    pipeline = engines.load(mini_bundle, flavor="onnxruntime")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.slow
def test_every_size_is_the_picture_of_the_bundle_in_process(
    server: Server, environment: Environment, pipeline: Any
) -> None:
    """Nine sizes over both protocols at once: requests of one size meet, and are drawn together or not."""
    sizes = [tuple(map(int, text.split("x"))) for text in pipeline.unet.component.resolutions]
    assert len(sizes) == 9
    asks = [drawing(over, width=width, height=height) for width, height in sizes for over in ("http", "grpc")]
    answers = ask(environment, server.address, *asks)
    for (width, height), pair in zip(sizes, zip(answers[::2], answers[1::2], strict=True), strict=True):
        wanted = in_process(pipeline, width=width, height=height)
        assert wanted["shape"] == [1, 1, height, width, 3]
        for answer in pair:
            assert wanted.items() <= answer.items(), answer
            assert answer["png"] == "89504e47" and all(value > 0 for value in answer["timings_ms"])
    log = server.log.read_text()
    assert "warmed up 9 sizes on cpu" in log


@pytest.mark.slow
def test_requests_that_agree_are_drawn_together_and_stay_the_same(
    server: Server, environment: Environment, pipeline: Any
) -> None:
    """Ten clients at once, two kinds of request: the batches are real, and every picture is bit-identical to the one
    it is alone."""
    kinds = [{"steps": 3, "prompt": "a blue square"}, {"steps": 2, "guidance": 1.0, "negative_prompt": "a circle"}]
    several = drawing("grpc", seed=40, images=2)
    asks = [drawing("grpc", seed=seed, **kinds[seed % 2]) for seed in range(10)] + [several]
    answers = ask(environment, server.address, *asks)
    for seed, answer in enumerate(answers[:10]):
        values = dict(kinds[seed % 2])
        options = {"num_inference_steps": values.pop("steps"), "guidance_scale": values.pop("guidance", 5.0)} | values
        assert in_process(pipeline, seed, **options).items() <= answer.items(), answer
    assert max(answer["batch"] for answer in answers) > 1
    assert in_process(pipeline, 40, num_images_per_prompt=2).items() <= answers[10].items()
    (counts,) = ask(environment, server.address, {"do": "statistics"})
    stats = counts["model_stats"][0]
    assert int(stats["inference_count"]) > int(stats["execution_count"])


@pytest.mark.slow
def test_the_same_request_is_drawn_again(server: Server, environment: Environment) -> None:
    """No response cache: what is answered was drawn for it."""
    before, first, second, after = (
        ask(environment, server.address, one)[0]
        for one in ({"do": "statistics"}, drawing(), drawing(), {"do": "statistics"})
    )
    assert first["sha256"] == second["sha256"]
    drawn = [int(one["model_stats"][0].get("inference_count", 0)) for one in (before, after)]
    assert drawn[1] == drawn[0] + 2
    assert after["model_stats"][0]["inference_stats"]["cache_hit"] == {}


def text(values: list[list[str]]) -> list[Any]:
    return ["object", "BYTES", values]


BAD: list[tuple[dict[str, Any], str]] = [
    (drawing(width=100), "size 100x128 is not served: allowed are 128x128"),
    (drawing(width=0, height=0), "size 0x0 is not served"),
    (drawing(width=-128), "size -128x128 is not served"),
    (drawing(steps=0), "steps is 0, allowed are 1 to 200"),
    (drawing(steps=10**9), "steps is 1000000000, allowed"),
    (drawing(images=999), "images is 999, allowed"),
    (drawing(seed=-1), "seed is -1, allowed"),
    (drawing(guidance=float("nan")), "guidance is nan, allowed"),
    (drawing(steps=100, images=9), "images times steps is 900, allowed are up to 800"),
    (drawing(prompt="é" * 100_000), "prompt has 100000 characters, allowed are 2000"),
    (drawing(negative_prompt="x" * 2001), "negative_prompt has 2001 characters"),
    (drawing() | {"raw": {"prompt": ["hex", "BYTES", "fffe"]}}, "prompt is not UTF-8"),
    (
        drawing() | {"raw": {"steps": ["float32", "FP32", [[2.0]]]}},
        "'steps' data-type is 'FP32', but model 'slimxl' expects 'INT32'",
    ),
    (drawing() | {"raw": {"steps": ["int32", "INT32", [[2, 3]]]}}, "unexpected shape for input 'steps'"),
    (drawing() | {"raw": {"steps": ["int32", "INT32", [2]]}}, "unexpected shape for input 'steps'"),
    (drawing() | {"raw": {"sampler": ["int32", "INT32", [[2]]]}}, "unexpected inference input 'sampler'"),
    ({"do": "draw", "over": "http", "inputs": {"steps": 2}}, "the request has no prompt"),
    ({"do": "draw", "over": "http", "inputs": {}, "raw": {"prompt": text([["a"], ["b"]])}}, "prompt has 2 values"),
]


@pytest.mark.slow
def test_bad_requests_get_an_error_and_the_server_lives_on(server: Server, environment: Environment) -> None:
    asks = [one | {"over": over} for one, _ in BAD for over in ("http", "grpc")]
    answers = ask(environment, server.address, *asks)
    for index, (_, message) in enumerate(BAD):
        for answer in answers[2 * index : 2 * index + 2]:
            assert message in answer.get("error", ""), (message, answer)
            assert answer["error"].startswith(("[400]", "[StatusCode.INVALID_ARGUMENT]")), answer
    good = ask(environment, server.address, drawing(), drawing("grpc"))
    assert all("sha256" in answer for answer in good)
    inputs = [{"name": "prompt", "shape": [1, 1], "datatype": "BYTES", "data": ["a red circle"]}]
    body = json.dumps({"id": "\udcff", "inputs": inputs, "outputs": [{"name": "step"}]}, ensure_ascii=False)
    (answer,) = ask(environment, server.address, {"do": "fetch", "path": "v2/models/slimxl/infer", "body": body})
    assert answer["status"] == 200, answer  # an id is any bytes


@pytest.mark.slow
def test_nothing_but_drawing_is_open(server: Server, environment: Environment) -> None:
    """No model is loaded or unloaded from outside, no shared memory registered, no log or trace redirected."""
    refused = [
        ("v2/repository/models/slimxl/unload", "{}"),
        ("v2/repository/models/other/load", '{"parameters": {"config": "{}"}}'),
        ("v2/repository/index", "{}"),
        ("v2/systemsharedmemory/region/x/register", '{"key": "/x", "offset": 0, "byte_size": 8}'),
        ("v2/cudasharedmemory/region/x/register", "{}"),
        ("v2/logging", '{"log_file": "/tmp/x"}'),
        ("v2/trace/setting", '{"trace_file": "/tmp/x"}'),
    ]
    answers = ask(environment, server.address, *({"do": "fetch", "path": path, "body": body} for path, body in refused))
    assert [answer["status"] for answer in answers] == [403] * len(refused), answers
    calls = [("load_model", ["slimxl"]), ("unload_model", ["slimxl"]), ("get_log_settings", [])]
    calls += [("register_system_shared_memory", ["x", "/x", 8]), ("get_trace_settings", [])]
    closed = ask(
        environment, server.address, *({"do": "grpc_call", "method": name, "arguments": rest} for name, rest in calls)
    )
    assert all("This protocol is restricted" in answer.get("error", "") for answer in closed), closed
    heard = {
        one.laddr.ip for one in psutil.Process(server.process.pid).net_connections("tcp") if one.status == "LISTEN"
    }
    assert heard == {"127.0.0.1", "::ffff:127.0.0.1"}


@pytest.mark.slow
def test_load_is_measured(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engines.__main__ import main

    def load(*words: str) -> int:
        out = ["--out", str(tmp_path / "load.json"), "--workdir", str(ROOT / "out/triton")]
        monkeypatch.setattr("sys.argv", ["engines", "load", *out, *words])
        return main()

    assert load("--server", f"127.0.0.1:{server.address.http_port}") == 2
    assert "no slimxl model answers" in capsys.readouterr().err, "not gRPC's port"
    where = ["--server", f"127.0.0.1:{server.address.grpc_port}", "--steps", "1"]
    assert load(*where, "--concurrency", "1,3", "--minutes", "0.04", "--size", "160x96") == 0
    result = read_load(tmp_path / "load.json")
    assert (result.workload.width, result.workload.height) == (160, 96)
    assert result.bundle.source == "random-mini-vega" and len(result.bundle.manifest_sha256) == 64
    assert result.server.max_batch_size == 4 and result.server.instances == ["KIND_CPU"]
    assert [level.concurrency for level in result.levels] == [1, 3]
    for level in result.levels:
        assert level.requests == len(level.latencies_ms) > 0 and level.failures == 0
        assert level.latency_ms["median"] == pytest.approx(np.median(level.latencies_ms), rel=1e-3)
        assert level.latency_ms["p99"] is None  # so few requests cannot know it
        assert level.images_per_s == pytest.approx(level.requests / level.seconds)
        assert level.seconds >= 2.4 and level.mean_batch and 1 <= level.mean_batch <= 4
        assert level.server_rss and level.server_rss.peak_bytes > 100e6
    assert load(*where, "--concurrency", "3", "--minutes", "0.005", "--rate", "0.4", "--size", "104x104") == 1
    (failed,) = read_load(tmp_path / "load.json").levels
    assert failed.seconds < 2.5  # the next request was due then, and nobody waits for it
    assert failed.failures == failed.requests > 0 and "size 104x104 is not served" in str(failed.first_error)
    assert failed.latency_ms["median"] is None
    (tmp_path / "load.json").write_text('{"schema_version": "slimxl.load/2"}')
    with pytest.raises(UserError, match=r"does not keep to slimxl\.load/1: schema_version"):
        read_load(tmp_path / "load.json")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--server", "here"], "--server 'here' is not HOST:PORT"),
        (["--concurrency", "0"], "--concurrency '0' is not a list"),
        (["--concurrency", "²"], "--concurrency '²' is not a list"),
        (["--rate", "0"], "--minutes and --rate must be above 0"),
        (["--minutes", "nan"], "--minutes and --rate must be above 0"),
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
    from engines.__main__ import main

    rest = ["--out", str(tmp_path / "x.json"), "--workdir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["engines", "load", *rest, *words])
    assert main() == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_was_measured_is_written_when_the_clients_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By themselves or by Ctrl-C. And three requests in a batch of two and one of one are two batches."""
    told = {"bundle": "b", "manifest_sha256": "0" * 64, "source": "toy", "flavor": "onnxruntime"}
    about = {"server": {"name": "triton", "version": "2"}, "parameters": told, "instances": [], "max_batch_size": 2}
    level = {"seconds": 2.0, "latencies_ms": [1.0, 2.0, 3.0], "batches": [2, 2, 1], "failures": 0, "first_error": None}
    request = make_request(Workload(size="128x128"))
    events = [about, {"request": request}, {"started": 1}, {"finished": 1} | level, {"started": 2}]
    monkeypatch.setattr("engines.triton_load.run_client", lambda python, job: iter(events))
    monkeypatch.setattr("engines.triton_load.make_client_environment", Environment)
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

    monkeypatch.setattr("engines.triton_load.run_client", stopped)
    out.unlink()
    assert measure() == 130
    assert len(read_load(out).levels) == 1 and "stopped after 1 of 2 levels" in capsys.readouterr().err


@pytest.mark.slow
def test_steps_are_told_as_they_are_done_and_a_full_queue_refuses(
    start: Callable[..., Server], environment: Environment, mini_bundle: Path, pipeline: Any
) -> None:
    """Decoupled, over a gRPC stream; the same picture as without, also where requests are drawn together."""
    server = start(mini_bundle, decoupled=True, warm_up=False, queue=2)
    assert "warmed up" not in server.log.read_text()
    (answer,) = ask(environment, server.address, drawing(steps=4) | {"do": "stream"})
    assert answer["steps"] == [1, 2, 3, 4] and answer["step"] == 4
    assert in_process(pipeline, num_inference_steps=4).items() <= answer.items()
    answers = ask(environment, server.address, *[drawing(steps=20, seed=n) | {"do": "stream"} for n in range(12)])
    drawn = [answer for answer in answers if "error" not in answer]
    refused = [answer["error"] for answer in answers if "error" in answer]
    assert drawn and refused and all("Exceeds maximum queue size" in error for error in refused), answers
    assert all(answer["steps"] == list(range(1, 21)) for answer in drawn)
    assert max(answer["batch"] for answer in drawn) == 2
    (bad,) = ask(environment, server.address, drawing(steps=0) | {"do": "stream"})
    assert "steps is 0" in bad["error"]


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
    paths = os.environ | {"PYTHONPATH": str(ROOT / "engines")}
    pipe = subprocess.PIPE
    client = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=paths)
    assert client.stdin and client.stdout and client.stderr
    client.stdin.write(json.dumps([drawing(steps=50, images=16)] * 8))
    client.stdin.close()
    assert [client.stderr.readline() for _ in range(8)] == ["sending\n"] * 8
    time.sleep(0.5)
    serving.send_signal(signal.SIGTERM)
    answers = json.loads(client.stdout.read())
    client.wait(60)
    assert [answer.get("shape") for answer in answers] == [[1, 16, 128, 128, 3]] * 8, answers
    assert serving.wait(90) == 0
    assert "stopping: requests under way are finished" in serving.stdout.read()
    assert ANSWERED in (tmp_path / str(address.http_port) / "log").read_text()


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
