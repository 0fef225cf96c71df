"""The examples run, and give what the pipeline gives."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import engines
from engines.bundle import Manifest
from tests.engines.fake_tensorrt import FakeCudart, OnnxPlans

EXAMPLES = Path(engines.__file__).with_name("examples")


@pytest.fixture(autouse=True)
def examples_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do when they are run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def load_example(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 70


def test_service_draws_what_the_pipeline_draws_and_answers_bad_requests(toy_bundle: Path) -> None:
    handler = load_example("service").make_handler(str(toy_bundle))
    handler.timeout = 2
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(body: bytes) -> bytes:
        url = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
            return answer.read()

    request = {"prompt": "a red circle", "width": 224, "height": 96, "steps": 2, "seed": 3}
    picture = Image.open(io.BytesIO(ask(json.dumps(request).encode())))
    pipeline = engines.load(toy_bundle, flavor="onnxruntime")
    generator = torch.Generator().manual_seed(3)
    expected = pipeline("a red circle", width=224, height=96, num_inference_steps=2, generator=generator).images[0]
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    for body, message in [
        (json.dumps(request | {"width": 999}).encode(), "sizes 128x128"),
        (json.dumps(request | {"steps": 0}).encode(), "1-100 steps"),
        (json.dumps(request | {"guidance": float("nan")}).encode(), "guidance 0-50"),
        (json.dumps(request | {"seed": -1}).encode(), "a seed from 0"),
        (json.dumps(request | {"steps": 2.5}).encode(), "1-100 steps"),
        (json.dumps(request | {"seed": True}).encode(), "a seed from 0"),
        (json.dumps(request | {"guidance": "5"}).encode(), "guidance 0-50"),
        (b"x" * 5000, "5000 bytes"),
        (b"{", "Expecting"),
        (json.dumps({"width": 128}).encode(), "missing"),
        (b"\xff", "codec|utf"),
    ]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(body)
        text = caught.value.read().decode()
        assert caught.value.code == 400 and any(word in text for word in message.split("|")), text
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as silent:
        silent.sendall(b"POST / HTTP/1.0\r\nContent-Length: 9\r\n\r\n{")
        assert b" 503 " in silent.recv(100), "one that sends no more is let go"
    assert ask(json.dumps(request).encode())[:4] == b"\x89PNG"
    server.shutdown()


def test_latent_without_torch_is_the_pipelines(toy_bundle: Path) -> None:
    noise = np.random.default_rng(1).standard_normal((1, 4, 12, 28))
    example = load_example("without_torch")
    latent = example.text_to_latent(toy_bundle, "A red  circle, xyz!", "224x96", 5, 5.0, noise, "onnxruntime")
    pipeline = engines.load(toy_bundle, flavor="onnxruntime")
    expected = pipeline(
        "A red  circle, xyz!",
        width=224,
        height=96,
        num_inference_steps=5,
        guidance_scale=5.0,
        latents=torch.from_numpy(noise).float(),
        output_type="latent",
    ).images.numpy()
    assert np.abs(latent - expected).max() < 1e-3 * np.abs(expected).max()


def test_the_same_program_reads_plans(
    toy_bundle: Path, toy_onnx_fp16: Path, toy_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes, profiles, shapes, addresses, copies: against a TensorRT that runs each plan's ONNX file instead. What a
    GPU does with a plan is tested in tests/gpu."""
    plans = [engine for engine in toy_manifest.engines if engine.flavor == "tensorrt-rtx"]
    graphs = {
        (toy_bundle / plan.files[0].path).read_bytes(): toy_onnx_fp16 / plan.component / "model.onnx" for plan in plans
    }
    cudart = FakeCudart((8, 9))
    bindings = ModuleType("cuda.bindings")
    bindings.runtime = cudart  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", OnnxPlans(graphs, cudart, plans[0].flavor_version))
    monkeypatch.delitem(sys.modules, "run_tensorrt", raising=False)
    noise = np.random.default_rng(1).standard_normal((1, 4, 12, 28))
    example = load_example("without_torch")
    arguments = (toy_bundle, "a red circle", "224x96", 4, 5.0, noise)
    latent, expected = (example.text_to_latent(*arguments, flavor) for flavor in ("tensorrt-rtx", "onnxruntime"))
    assert np.abs(latent - expected).max() < 1e-2 * np.abs(expected).max(), "fp16 against fp32"
    manifest = json.loads((toy_bundle / "manifest.json").read_text())
    unet = next(e for e in manifest["engines"] if (e["component"], e["flavor"]) == ("unet", "tensorrt-rtx"))
    changes = ({"compute_capabilities": ["8.6"]}, {"flavor_version": "1.0"}, {"options": {"strip": True}})
    others = [unet | change | {"files": [{"path": "not/this.plan", "sha256": ""}]} for change in changes]
    chosen = load_example("checked_engine").open_engine(
        toy_bundle, {"engines": [unet, *others]}, "unet", "tensorrt-rtx", "224x96"
    )
    assert chosen[1] is unet, "whole, of the GPU and the TensorRT at hand, not the newest of all"
    cudart.cudaGetDeviceProperties = FakeCudart((9, 0)).cudaGetDeviceProperties
    with pytest.raises(SystemExit, match=r"no unet \(tensorrt-rtx\) serves 224x96, .* and runs here; .*'8.0', '8.9'"):
        example.text_to_latent(*arguments, "tensorrt-rtx")
    runs_here = load_example("run_tensorrt").runs_here
    assert runs_here(unet | {"options": {"hardware_compatible": "ampere+"}}) and not runs_here(unet)
    monkeypatch.delitem(sys.modules, "run_tensorrt")


def test_a_damaged_file_is_not_opened_without_torch(toy_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(toy_bundle, bundle)
    damaged = next(bundle.glob("text_encoder/*/model.onnx.data"))
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    noise = np.zeros((1, 4, 16, 16))
    with pytest.raises(SystemExit, match="is not what the manifest says"):
        load_example("without_torch").text_to_latent(bundle, "a", "128x128", 1, 5.0, noise, "onnxruntime")


@pytest.mark.parametrize("text", ["a red circle", "A  RED circle!! 42 it's", "", "ünïcode 🎈", "red " * 90])
def test_tokens_without_transformers(toy_bundle: Path, text: str) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(toy_bundle / "tokenizer")
    expected = tokenizer(text, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    assert load_example("clip_tokens").tokenize(toy_bundle / "tokenizer", text)[0].tolist() == expected


def test_without_torch_really_is(toy_bundle: Path, tmp_path: Path) -> None:
    code = (
        "import os, runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = os.path.dirname(sys.argv[0]); "
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    script, out = str(EXAMPLES / "without_torch.py"), tmp_path / "latent.npy"
    arguments = [script, str(toy_bundle), "a red circle", "160x96", str(out)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=120)
    done = subprocess.run([sys.executable, *arguments[:3]], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "usage: python engines/examples/without_torch.py BUNDLE" in done.stderr
    latent = np.load(out)
    assert latent.shape == (1, 4, 12, 20) and np.isfinite(latent).all()
