"""The text-to-image model inside Triton's Python backend. It is copied into the repository as model.py.

Triton hands over the requests that wait together. Those of equal size, steps and guidance are drawn as one batch, each
with noise of its own seed, so that a picture is the one it would be alone. Every request is checked before anything is
drawn, and a bad one is answered with an error of its own; the model and the other requests live on.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# the backend's embedded interpreter does not look at PYTHONPATH by itself; behind its own packages, because the NumPy
# that the backend was compiled for has to stay the first one
sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

import engines
from distill.errors import UserError
from distill.files import sha256_file

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
LONGEST_PROMPT_BYTES = 8192
DEFAULTS: dict[str, Any] = {"negative_prompt": None, "width": None, "height": None}
DEFAULTS |= {"steps": 25, "guidance": 5.0, "seed": 0, "images": 1}
LIMITS = {"steps": (1, 200), "guidance": (0.0, 50.0), "images": (1, 16), "seed": (0, 2**63 - 1)}
ALIKE = ("width", "height", "steps", "guidance")
"""What requests have in common that are drawn as one batch."""


def read_request(request: Any, sizes: list[str]) -> dict[str, Any]:
    """The request's inputs by name. Raises UserError for one that cannot be drawn: got, allowed."""
    values = dict(DEFAULTS)
    for name in ("prompt", *DEFAULTS):
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is None:
            continue
        array = tensor.as_numpy()
        if array.size != 1:
            raise UserError(f"{name} has {array.size} values, a request takes one; send a request for each prompt")
        value = array.reshape(-1)[0]
        values[name] = read_text(name, value) if isinstance(value, bytes) else value.item()
    if "prompt" not in values:  # Triton counts the inputs, it does not look for those that are not optional
        raise UserError("the request has no prompt")
    for name, (low, high) in LIMITS.items():
        if not low <= values[name] <= high:
            raise UserError(f"{name} is {values[name]}, allowed are {low} to {high}")
    width, height = (int(side) for side in sizes[0].split("x"))
    values["width"] = width if values["width"] is None else values["width"]
    values["height"] = height if values["height"] is None else values["height"]
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
        """Raises UserError where the bundle is no longer the one that the repository was written for."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        bundle = Path(parameters["bundle"])
        if (found := sha256_file(bundle / "manifest.json")) != parameters["manifest_sha256"]:
            raise UserError(
                f"the manifest of {bundle} has sha256 {found[:12]}…, this repository was written for "
                f"{parameters['manifest_sha256'][:12]}…; write it again with: python -m engines triton"
            )
        on_gpu = args["model_instance_kind"] == "GPU"
        self.device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.pipeline = engines.load(bundle, parameters["flavor"], device=self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.sizes = self.pipeline.unet.component.resolutions
        if parameters["warm_up"] == "true":
            self.warm_up(config["max_batch_size"])

    def warm_up(self, most: int) -> None:
        """Every size, one picture and `most` at once, so that no request pays for what a runtime prepares at first."""
        started = time.perf_counter()
        for size in self.sizes:
            width, height = map(int, size.split("x"))
            for images in sorted({1, most}):
                self.pipeline("", width=width, height=height, num_inference_steps=1, num_images_per_prompt=images)
        seconds = time.perf_counter() - started
        pb_utils.Logger.log_info(f"warmed up {len(self.sizes)} sizes on {self.device} in {seconds:.1f} s")

    def execute(self, requests: list[Any]) -> None:
        """Each request is answered as soon as its own batch is drawn, whatever else came with it."""
        groups: dict[tuple[Any, ...], list[tuple[dict[str, Any], Any]]] = {}
        for request in requests:
            sender = request.get_response_sender()
            try:
                values = read_request(request, self.sizes)
            except UserError as error:
                sender.send(failure(str(error), pb_utils.TritonError.INVALID_ARG), flags=FINAL)
                continue
            values["outputs"] = request.requested_output_names()
            groups.setdefault(tuple(values[name] for name in ALIKE), []).append((values, sender))
        for group in groups.values():
            while group:
                count = self.most_together([values for values, _ in group])
                self.answer(group[:count])
                del group[:count]

    def most_together(self, group: list[dict[str, Any]]) -> int:
        """How many of these requests, from the first, make a batch that one profile of the UNet takes as it is."""
        size = f"{group[0]['width']}x{group[0]['height']}"
        rows_each = 2 if group[0]["guidance"] > 1 else 1
        ranges = [
            (profile.shapes["sample"].min[0], profile.shapes["sample"].max[0])
            for engine, _ in self.pipeline.unet.component.engines
            for profile in engine.profiles
            if size in profile.resolutions
        ]
        best, rows = 1, 0
        for count, values in enumerate(group, 1):
            rows += rows_each * values["images"]
            if any(low <= rows <= high for low, high in ranges):
                best = count
        return best

    def answer(self, group: list[tuple[dict[str, Any], Any]]) -> None:
        """Draws a group and answers every request in it, with an error where drawing fails."""
        senders = [sender for _, sender in group]
        try:
            responses = self.draw([values for values, _ in group], senders if self.decoupled else [])
        except Exception as error:  # whatever a runtime raises concerns these requests only
            pb_utils.Logger.log_error(f"drawing failed: {error!r}")
            responses = [failure(f"drawing failed: {error}", pb_utils.TritonError.INTERNAL) for _ in senders]
        for sender, response in zip(senders, responses, strict=True):
            sender.send(response, flags=FINAL)

    def draw(self, group: list[dict[str, Any]], watchers: list[Any]) -> list[Any]:
        """A response for each: what was asked for of the pictures (images, height, width, 3), their PNGs, and the
        milliseconds of text encoding, denoising and decoding of the batch. `watchers` are told every step."""
        marks = [self.now()]
        first = group[0]

        def progress(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            for watcher in watchers:
                watcher.send(pb_utils.InferenceResponse(output_tensors=[tensor("step", [[step + 1]], np.int32)]))
            if step + 1 == pipeline.num_timesteps:
                marks.append(self.now())
            return {}

        embeddings = self.encode(group)
        marks.append(self.now())
        pictures = self.pipeline(
            **embeddings,
            width=first["width"],
            height=first["height"],
            num_inference_steps=first["steps"],
            guidance_scale=first["guidance"],
            generator=[
                generator
                for values in group
                for generator in [torch.Generator().manual_seed(values["seed"])] * values["images"]
            ],
            callback_on_step_end=progress,
        ).images
        marks.append(self.now())
        timings = np.diff(marks)[None] * 1000
        responses = []
        for values in group:
            mine, pictures = pictures[: values["images"]], pictures[values["images"] :]
            outputs = [tensor("timings_ms", timings, np.float32), tensor("step", [[first["steps"]]], np.int32)]
            outputs.append(tensor("batch", [[sum(one["images"] for one in group)]], np.int32))
            if "image" in values["outputs"]:
                outputs.append(tensor("image", [[np.asarray(picture) for picture in mine]], np.uint8))
            if "png" in values["outputs"]:
                outputs.append(tensor("png", [[png(picture) for picture in mine]], np.object_))
            responses.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return responses

    def encode(self, group: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The four embeddings of diffusers' `encode_prompt`, of all pictures. Each prompt is encoded alone: it costs
        little, and an absent negative prompt means zeros where an empty one does not."""
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        encoded = [
            self.pipeline.encode_prompt(
                values["prompt"],
                negative_prompt=values["negative_prompt"],
                num_images_per_prompt=values["images"],
                do_classifier_free_guidance=values["guidance"] > 1,
                device=self.pipeline.device,
            )
            for values in group
        ]
        parts = dict(zip(names, zip(*encoded, strict=True), strict=True))
        return {name: torch.cat(part) for name, part in parts.items() if part[0] is not None}

    def now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def finalize(self) -> None:
        del self.pipeline


def failure(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def tensor(name: str, values: Any, dtype: Any) -> Any:
    return pb_utils.Tensor(name, np.ascontiguousarray(np.asarray(values, dtype=dtype)))


def png(picture: Any) -> bytes:
    picture.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()
