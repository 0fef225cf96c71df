"""The model that Triton's Python backend runs, without a server around it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import engines
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.sampling import Sampling
from distill.checkpoints.sources import MINI_TEACHERS
from distill.common.errors import UserError
from engines.serving.environment import Environment
from engines.serving.options import Serving
from tests.engines.serving.triton_here import ROOT, repository_config


class Error(SimpleNamespace):
    INTERNAL, CANCELLED, INVALID_ARG = "internal", "cancelled", "invalid"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message=message, code=code)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """engines/serving/model.py as a module."""
    backend = ModuleType("triton_python_backend_utils")
    backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    backend.using_decoupled_model_transaction_policy = lambda config: False  # type: ignore[attr-defined]
    backend.TritonError = Error  # type: ignore[attr-defined]
    backend.InferenceResponse = SimpleNamespace  # type: ignore[attr-defined]
    backend.Logger = SimpleNamespace(log_info=print, log_error=print)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    spec = importlib.util.spec_from_file_location("triton_model", ROOT / "engines/serving/model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def initialize(model: ModuleType, config: dict[str, Any], kind: str, device: str) -> Any:
    instance = model.TritonPythonModel()
    instance.initialize(
        {"model_config": json.dumps(config), "model_instance_kind": kind, "model_instance_device_id": device}
    )
    return instance


def test_an_instance_loads_onto_its_gpu_and_no_other_bundle(
    model: ModuleType, toy_bundle: Path, tmp_path: Path, environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = repository_config(toy_bundle, tmp_path / "repo", Serving(gpus="none", warm_up=False), environment)
    opened: list[Any] = []

    def load(bundle: Path, flavor: str, device: str, runtime_cache: None) -> Any:
        opened.append((bundle, flavor, device))
        component = SimpleNamespace(resolutions=["128x128"])
        return SimpleNamespace(set_progress_bar_config=lambda **_: None, unet=SimpleNamespace(component=component))

    monkeypatch.setattr(engines, "load", load)
    initialize(model, config, "GPU", "3")
    initialize(model, config, "CPU", "0")
    assert opened == [(toy_bundle, "onnxruntime", "cuda:3"), (toy_bundle, "onnxruntime", "cpu")]
    config["parameters"]["manifest_sha256"]["string_value"] = "0" * 64
    with pytest.raises(UserError, match="this repository was written for 000000000000"):
        initialize(model, config, "GPU", "3")
    assert len(opened) == 2


@pytest.mark.parametrize(
    "profiles, requests, together",
    [
        ([(1, 8)], [(1, 5.0)] * 5, 4),  # a range takes four guided pictures
        ([(1, 8)], [(3, 5.0), (2, 5.0)], 1),  # five pictures are too many
        ([(2, 2), (8, 8)], [(1, 5.0)] * 3, 1),  # exact profiles of one and four: three would be padded
        ([(2, 2), (8, 8)], [(1, 5.0)] * 5, 4),
        ([(2, 2)], [(1, 1.0)] * 3, 2),  # two without guidance are one with
        ([(2, 2)], [(16, 5.0)], 1),  # more than any: drawn in pieces
    ],
)
def test_how_many_are_drawn_together(
    model: ModuleType, profiles: list[tuple[int, int]], requests: list[tuple[int, float]], together: int
) -> None:
    def profile(low: int, high: int) -> Any:
        return SimpleNamespace(resolutions=["128x128"], least_rows=low, most_rows=high)

    instance = model.TritonPythonModel()
    engine = SimpleNamespace(profiles=[profile(*one) for one in profiles])
    component = SimpleNamespace(engines=[(engine, None)])
    config = SimpleNamespace(time_cond_proj_dim=None)
    instance.pipeline = SimpleNamespace(unet=SimpleNamespace(component=component, config=config))
    group = [{"width": 128, "height": 128, "images": images, "guidance": guidance} for images, guidance in requests]
    assert instance.most_together(group) == together


class Sender:
    """A client that waits, or cancelled; one whose pictures do not go through shared memory fails at the first try. What was
    sent as final is the last, even where that failed (Triton's response_sender.cc)."""

    def __init__(self, cancelled: bool = False, fails: bool = False) -> None:
        self.cancelled, self.fails, self.closed = cancelled, fails, False
        self.sent: list[Any] = []

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.closed
        self.closed = flags == 1
        if self.fails:
            self.fails = False
            raise RuntimeError("no space in /dev/shm")
        if response is not None:
            self.sent.append(response)


@pytest.mark.parametrize("room", [True, False])
def test_a_request_that_cannot_be_read_leaves_the_others(
    model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], room: bool
) -> None:
    """Neither its inputs nor its id, which over HTTP may be any bytes. Without room for all answers none is sent before the
    others are returned."""

    def request(name: bytes, sender: Sender) -> Any:
        return SimpleNamespace(
            name=name,
            request_id=name.decode,
            get_response_sender=lambda: sender,
            requested_output_names=lambda: ["png"],
        )

    def read_inputs(request: Any) -> dict[str, Any]:
        if request.name == b"torn":
            raise EOFError("half an input")
        return {"prompt": np.array([b"a circle"], object), "steps": np.array([len(request.name)])}

    three_pngs = 3 * 128 * 128 * 3
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * three_pngs + room))
    monkeypatch.setattr(model, "read_inputs", read_inputs)
    instance = model.TritonPythonModel()
    instance.sizes, instance.decoupled, instance.instances = ["128x128"], False, 2
    instance.sampling = Sampling()
    instance.most_together = len
    instance.answer = lambda batch: [values["request"] for values, _ in batch]
    requests = [request(name, Sender()) for name in (b"early", b"\xff", b"torn", b"g")]
    returned = instance.execute(requests)
    sent = [one.get_response_sender().sent for one in requests]
    if room:
        assert returned == [None, "'?'", None, "'g'"] and sent[0] == ["'early'"] and not sent[1] and not sent[3]
    else:
        assert [*returned[:2], returned[3]] == ["'early'", "'?'", "'g'"] and not any(sent)
    refusal = sent[2][0] if room else returned[2]
    assert refusal.error.code == "invalid" and "half an input" in refusal.error.message
    assert "request 'torn' refused" in capsys.readouterr().out


def test_one_answer_that_cannot_be_sent_leaves_the_others(
    model: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    senders = [Sender(), Sender(fails=True), Sender()]
    batch = [({"request": f"'{n}'"}, sender) for n, sender in enumerate(senders)]
    model.deliver(batch, [f"picture {n}" for n in range(3)], decoupled=True)
    assert senders[0].sent == ["picture 0"] and senders[2].sent == ["picture 2"]
    assert "no space in /dev/shm" in senders[1].sent[0].error.message and all(sender.closed for sender in senders)
    assert "request '1': the answer could not be sent" in capsys.readouterr().out


def test_a_process_that_lost_its_gpu_ends(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the failed requests are answered; a runtime's other errors leave it alive."""

    def fail(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    ended: list[int] = []
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    instance = model.TritonPythonModel()
    instance.device, instance.draw, instance.decoupled = "cuda:0", fail, False
    (response,) = instance.answer([({"request": "''"}, sender := Sender())])
    assert response.error.code == "internal" and not sender.sent and not ended
    monkeypatch.setattr("torch.cuda.synchronize", fail)
    instance.answer([({"request": "''"}, sender)])
    assert sender.sent[0].error.code == "internal" and ended == [1]


def test_what_was_left_for_the_exit_is_done(model: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that Triton's backend ends: nothing is taken down in it."""
    done: list[Any] = []
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: done.append("kernels"))
    monkeypatch.setattr("os._exit", done.append)
    model.TritonPythonModel().finalize()
    assert done == ["kernels", 0]


def test_what_nobody_waits_for_is_not_drawn(model: ModuleType, toy_bundle: Path) -> None:
    """All of a batch must be cancelled; and no prompt stays in a tokenizer's memory."""
    instance = model.TritonPythonModel()
    instance.device, instance.decoupled = "cpu", False
    instance.pipeline = engines.load(toy_bundle, "onnxruntime")
    values = model.DEFAULTS | {"prompt": "zyxwv <|STARTOFTEXT|> qponm", "width": 128, "height": 128}
    values |= {"steps": 2, "outputs": [], "request": "''"}
    alike = dict(instance.pipeline.tokenizer.cache)
    gone, waiting = Sender(cancelled=True), Sender()
    instance.draw = lambda group, senders: (
        model.TritonPythonModel.draw(instance, group, senders) and ["drawn"] * len(group)
    )
    model.pb_utils.Tensor = lambda name, values: (name, values)
    (response,) = instance.answer([(values, gone)])
    assert response.error.code == "cancelled"
    assert instance.answer([(values, gone), (values, waiting)]) == ["drawn", "drawn"]
    assert instance.pipeline.tokenizer.cache == alike


def test_a_request_to_sd_is_drawn_as_diffusers_draws_it(model: ModuleType) -> None:
    """One encoder, nothing pooled, and no prompt is not zeros."""
    instance = model.TritonPythonModel()
    instance.pipeline = pipeline = load_pipeline(MINI_TEACHERS["sd"], torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    values = model.DEFAULTS | {"prompt": "a large red ring at the top", "guidance": 5.0, "images": 2}
    options = {"width": 128, "height": 128, "num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np"}
    wanted, drawn = (
        pipeline(**asked, **options, generator=torch.Generator().manual_seed(0)).images
        for asked in (
            {"prompt": values["prompt"], "num_images_per_prompt": 2},
            instance.encode([values]),
        )
    )
    assert np.array_equal(drawn, wanted) and drawn.std() > 0.01
