"""The examples run, and give what the pipeline gives."""

from __future__ import annotations

import importlib.util
import io
import json
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

EXAMPLES = Path(engines.__file__).with_name("examples")


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_service_is_short() -> None:
    assert len((EXAMPLES / "service.py").read_text().splitlines()) <= 60


def test_service_draws_what_the_pipeline_draws_and_answers_bad_requests(toy_bundle: Path) -> None:
    handler = load_example("service").make_handler(str(toy_bundle))
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
        (json.dumps(request | {"width": 999}).encode(), "not in the bundle|divisible"),
        (b"{", "Expecting"),
        (json.dumps({"width": 128}).encode(), "missing"),
        (b"\xff", "codec|utf"),
    ]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(body)
        text = caught.value.read().decode()
        assert caught.value.code == 400 and any(word in text for word in message.split("|")), text
    assert ask(json.dumps(request).encode())[:4] == b"\x89PNG"
    server.shutdown()


def test_latent_without_torch_is_the_pipelines(toy_bundle: Path) -> None:
    noise = np.random.default_rng(1).standard_normal((1, 4, 12, 28))
    example = load_example("without_torch")
    latent = example.text_to_latent(toy_bundle, "A red  circle, xyz!", "224x96", 5, 5.0, noise)
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


@pytest.mark.parametrize("text", ["a red circle", "A  RED circle!! 42 it's", "", "ünïcode 🎈", "red " * 90])
def test_tokens_without_transformers(toy_bundle: Path, text: str) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(toy_bundle / "tokenizer")
    expected = tokenizer(text, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    assert load_example("without_torch").tokenize(toy_bundle / "tokenizer", text)[0].tolist() == expected


def test_without_torch_really_is(toy_bundle: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    script, out = str(EXAMPLES / "without_torch.py"), tmp_path / "latent.npy"
    arguments = [script, str(toy_bundle), "a red circle", "160x96", str(out)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=120)
    latent = np.load(out)
    assert latent.shape == (1, 4, 12, 20) and np.isfinite(latent).all()
