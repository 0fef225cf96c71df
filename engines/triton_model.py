"""The text-to-image model inside Triton's Python backend. It is copied into the repository as model.py.

Every request is checked before anything is drawn, and a bad one is answered with an error of its own; the model and
the other requests live on.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from typing import Any

# the backend's embedded interpreter does not look at PYTHONPATH by itself; behind its own packages, because the NumPy
# that the backend was compiled for has to stay the first one
sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

import engines
from distill.errors import UserError

LONGEST_PROMPT_BYTES = 8192
DEFAULTS: dict[str, Any] = {"negative_prompt": None, "width": None, "height": None}
DEFAULTS |= {"steps": 25, "guidance": 5.0, "seed": 0, "images": 1}
LIMITS = {"steps": (1, 200), "guidance": (0.0, 50.0), "images": (1, 16), "seed": (0, 2**63 - 1)}


def read_request(request: Any, sizes: list[str]) -> dict[str, Any]:
    """The request's inputs by name. Raises UserError for one that cannot be drawn: got, allowed."""
    values = dict(DEFAULTS)
    for name in ("prompt", *DEFAULTS):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        array = tensor.as_numpy()
        if array.size != 1:
            raise UserError(f"{name} has {array.size} values, it takes one")
        value = array.reshape(-1)[0]
        values[name] = read_text(name, value) if isinstance(value, bytes) else value.item()
    if "prompt" not in values:
        raise UserError("the request has no prompt")
    for name, (low, high) in LIMITS.items():
        if not low <= values[name] <= high:
            raise UserError(f"{name} is {values[name]}, allowed are {low} to {high}")
    width, height = (int(side) for side in sizes[0].split("x"))
    values["width"], values["height"] = values["width"] or width, values["height"] or height
    size = f"{values['width']}x{values['height']}"
    if size not in sizes:
        raise UserError(f"size {size} is not served: allowed are {', '.join(sizes)}")
    return values


def read_text(name: str, value: bytes) -> str:
    if len(value) > LONGEST_PROMPT_BYTES:
        raise UserError(f"{name} has {len(value)} bytes, allowed are {LONGEST_PROMPT_BYTES}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 ({error})") from None


class TritonPythonModel:
    """Triton calls `initialize` once, `execute` for each batch of requests, `finalize` at the end."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else None
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.pipeline = engines.load(parameters["bundle"], parameters["flavor"] or None, device=device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.sizes = self.pipeline.unet.component.resolutions
        if parameters["warm_up"] == "true":
            for size in self.sizes:
                width, height = map(int, size.split("x"))
                self.pipeline("", width=width, height=height, num_inference_steps=1)

    def execute(self, requests: list[Any]) -> list[Any] | None:
        responses = []
        for request in requests:
            sender = request.get_response_sender() if self.decoupled else None
            try:
                response = self.draw(read_request(request, self.sizes), sender)
            except UserError as error:
                response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
            if sender:
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            responses.append(response)
        return None if self.decoupled else responses

    def draw(self, values: dict[str, Any], sender: Any) -> Any:
        """The whole picture, its PNG, and milliseconds of text encoding, denoising and decoding."""
        marks = [time.perf_counter()]

        def progress(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if sender:
                sender.send(pb_utils.InferenceResponse(output_tensors=[tensor("step", [step + 1], np.int32)]))
            return {}

        guided = values["guidance"] > 1
        embeddings = self.pipeline.encode_prompt(
            values["prompt"],
            negative_prompt=values["negative_prompt"],
            num_images_per_prompt=values["images"],
            do_classifier_free_guidance=guided,
            device=self.pipeline.device,
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        marks.append(time.perf_counter())
        latents = self.pipeline(
            **dict(zip(names, embeddings, strict=True)),
            width=values["width"],
            height=values["height"],
            num_inference_steps=values["steps"],
            guidance_scale=values["guidance"],
            generator=torch.Generator().manual_seed(values["seed"]),
            callback_on_step_end=progress,
            output_type="latent",
        ).images
        marks.append(time.perf_counter())
        images = self.decode(latents)
        marks.append(time.perf_counter())
        timings = np.diff(marks) * 1000
        outputs = [tensor("image", images, np.uint8), tensor("timings_ms", timings, np.float32)]
        outputs += [
            tensor("png", [png(image) for image in images], np.object_),
            tensor("step", [values["steps"]], np.int32),
        ]
        return pb_utils.InferenceResponse(output_tensors=outputs)

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """Scaled latents (images, 4, height / 8, width / 8) -> uint8 (images, height, width, 3)."""
        vae = self.pipeline.vae
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        pictures = self.pipeline.image_processor.postprocess(decoded, output_type="np")
        return (pictures * 255).round().astype(np.uint8)

    def finalize(self) -> None:
        del self.pipeline


def tensor(name: str, values: Any, dtype: Any) -> Any:
    return pb_utils.Tensor(name, np.ascontiguousarray(np.asarray(values, dtype=dtype)))


def png(image: np.ndarray) -> bytes:
    """`image` uint8 (height, width, 3)."""
    from PIL import Image

    Image.fromarray(image).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()
