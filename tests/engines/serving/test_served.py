"""What a real Triton answers over the mini bundle, and the load that is put on it. One server does for nearly all."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import engines
from distill.checkpoints.sampling import Sampling
from distill.common.errors import UserError
from engines.__main__ import main
from engines.bundle import read_manifest, write_manifest
from engines.serving.environment import Environment
from engines.serving.load_file import read_load
from engines.serving.options import Serving
from engines.serving.repository import write_repository
from engines.serving.server import Server
from tests.engines.serving.triton_here import ROOT, ask, drawing, free_address

pytestmark = pytest.mark.slow


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
        server.wait()


@pytest.fixture(scope="module")
def few_step_bundle(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It says that it was taught two steps, of a hundred at most."""
    bundle = shutil.copytree(mini_bundle, tmp_path_factory.mktemp("few") / "bundle")
    manifest = read_manifest(bundle)
    source = manifest.source.model_copy(update={"sampling": Sampling(steps=2, most_steps=100)})
    write_manifest(bundle, manifest.model_copy(update={"source": source}))
    return bundle


@pytest.fixture(scope="module")
def server(few_step_bundle: Path, start: Callable[..., Server]) -> Server:
    return start(few_step_bundle)


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
    (drawing(steps=101), "101 steps are more than this model's schedule has (100); it was taught to draw in 2"),
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


def test_json_gets_its_picture_in_base64(server: Server) -> None:
    """Without Triton's client; the same picture as its clients get as bytes."""

    def draw(name: str) -> list[Any]:
        inputs = [{"name": "prompt", "shape": [1, 1], "datatype": "BYTES", "data": ["a red circle"]}]
        body = json.dumps({"inputs": inputs, "outputs": [{"name": name}]}).encode()
        url = f"http://127.0.0.1:{server.address.http_port}/v2/models/slimxl/infer"
        with urlopen(url, body, timeout=60) as answer:
            return json.load(answer)["outputs"][0]["data"]

    (text,) = draw("png_base64")
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).reshape(-1).tolist() == draw("image")


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


def test_load_is_measured(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*words: str) -> int:
        out = ["--out", str(tmp_path / "load.json"), "--workdir", str(ROOT / "out/serving")]
        monkeypatch.setattr("sys.argv", ["engines", "load-test", *out, *words])
        return main()

    assert load("--server", f"127.0.0.1:{server.address.http_port}") == 2
    assert "no slimxl model answers" in capsys.readouterr().err, "not gRPC's port"
    where = ["--server", f"127.0.0.1:{server.address.grpc_port}"]
    assert load(*where, "--concurrency", "1,3", "--minutes", "0.04", "--size", "160x96") == 0
    result = read_load(tmp_path / "load.json")
    assert (result.workload.width, result.workload.height) == (160, 96)
    assert (result.workload.steps, result.workload.guidance) == (2, 5.0), "the model's own, where nothing is told"
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
