"""The text-to-image model inside Triton's Python backend. It is copied into the repository as model.py.

Triton hands over the requests that wait together. Those of equal size, steps and guidance are drawn as one batch. Each
has the noise of its own seed, so a picture is the same as if it were drawn alone. Every request is checked before anything
is drawn: a bad one gets an error, and the others are not affected.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import shutil
import sys
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# the backend's embedded interpreter ignores PYTHONPATH. Its own packages stay first: it needs the NumPy that it was
# compiled for
sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

import engines
from distill.common.errors import UserError
from distill.common.files import sha256_file
from engines.bundle import read_manifest
from engines.serving.request import BATCHED_BY, DEFAULTS, read_values

FORMS = {"image": 1, "png": 1, "png_base64": 2}
"""What an answer's pictures take at the most, in their pixels: a PNG is hardly ever larger, its base64 a third more."""
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def read_inputs(request: Any) -> dict[str, np.ndarray]:
    """The arrays that the client sent, by name."""
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in ("prompt", *DEFAULTS)}
    return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}


def read_id(request: Any) -> str:
    """The id that the client gave, for the log. Over HTTP Triton takes any bytes as one."""
    try:
        return repr(request.request_id()[:64])
    except UnicodeDecodeError:
        return "'?'"


class AllCancelled(Exception):
    """Every request of a batch was cancelled."""


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
        cache = parameters.get("runtime_cache")
        self.pipeline = engines.load(bundle, parameters["flavor"], device=self.device, runtime_cache=cache)
        self.pipeline.set_progress_bar_config(disable=True)
        self.sizes = self.pipeline.unet.component.resolutions
        self.sampling = read_manifest(bundle).source.sampling
        self.instances = sum(group["count"] * max(1, len(group.get("gpus", []))) for group in config["instance_group"])
        self.step_done: torch.cuda.Event | None = None
        if parameters["warm_up"] == "true":
            self.warm_up(config["max_batch_size"])

    def warm_up(self, max_images: int) -> None:
        """Draws every size once under guidance, so that few requests pay for what a runtime prepares on first use.

        A GPU has a CUDA graph for each number of pictures, so it draws every number up to `max_images`; the CPU draws one
        and `max_images`."""
        started = time.perf_counter()
        for size in self.sizes:
            width, height = map(int, size.split("x"))
            for images in sorted({1, max_images}) if self.device == "cpu" else range(1, max_images + 1):
                self.pipeline("", width=width, height=height, num_inference_steps=1, num_images_per_prompt=images)
        seconds = time.perf_counter() - started
        pb_utils.Logger.log_info(f"warmed up {len(self.sizes)} sizes on {self.device} in {seconds:.1f} s")

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Answers each request as soon as its own batch is drawn. Only the last batch is returned instead of sent.

        The reason: a client that has its picture before this function ends may ask for the next one while no instance is
        waiting, and Triton's batcher then sleeps for half a second (its core, dynamic_batch_scheduler.cc).

        All answers are returned where they might not fit into the shared memory. If one does not fit, Triton fails all of
        them, and crashes if some were already sent (it deletes their response factories twice)."""
        returned: list[Any] = [None] * len(requests)

        def hand_over(batch: list[tuple[dict[str, Any], Any]], responses: list[Any], send: bool) -> None:
            if send:
                deliver(batch, responses, self.decoupled)
            else:
                for (values, _), response in zip(batch, responses, strict=True):
                    returned[values["position"]] = response

        groups: dict[tuple[Any, ...], list[tuple[dict[str, Any], Any]]] = {}
        refused, answer_bytes = [], 0
        for position, request in enumerate(requests):
            sender, name = request.get_response_sender(), read_id(request)
            about = {"request": name, "position": position}
            try:
                values = read_values(read_inputs(request), self.sizes, self.sampling) | about
                values["outputs"] = request.requested_output_names()
            except Exception as error:  # whatever is wrong with a request concerns no other
                message = str(error) if isinstance(error, UserError) else f"the request cannot be read: {error!r}"
                pb_utils.Logger.log_info(f"request {name} refused: {message}")
                refused.append(((about, sender), failure(message, pb_utils.TritonError.INVALID_ARG)))
                continue
            groups.setdefault(tuple(values[name] for name in BATCHED_BY), []).append((values, sender))
            forms = sum(FORMS.get(output, 0) for output in values["outputs"])
            answer_bytes += values["images"] * values["width"] * values["height"] * 3 * forms
        early = self.decoupled or has_room(answer_bytes * self.instances)  # the others may be answering too
        for asked, refusal in refused:
            hand_over([asked], [refusal], early)
        batches = []
        for group in groups.values():
            while group:
                count = self.most_together([values for values, _ in group])
                batches.append(group[:count])
                del group[:count]
        for batch in batches:
            hand_over(batch, self.answer(batch), self.decoupled or (early and batch is not batches[-1]))
        return None if self.decoupled else returned

    def is_doubled(self, values: dict[str, Any]) -> bool:
        """Whether the UNet sees each picture twice, with and without its prompt, as diffusers decides it."""
        return values["guidance"] > 1 and not self.pipeline.unet.config.time_cond_proj_dim

    def ranges(self, values: dict[str, Any]) -> list[tuple[float, float]]:
        """The fewest and the most pictures that each profile of the UNet takes at the request's size and guidance."""
        size, rows = f"{values['width']}x{values['height']}", 2 if self.is_doubled(values) else 1
        return [
            (profile.least_rows / rows, profile.most_rows / rows)
            for engine, _ in self.pipeline.unet.component.engines
            for profile in engine.profiles
            if size in profile.resolutions
        ]

    def most_together(self, group: list[dict[str, Any]]) -> int:
        """How many of these requests, counted from the first, make a batch that fits one profile of the UNet exactly."""
        ranges, best, images = self.ranges(group[0]), 1, 0
        for count, values in enumerate(group, 1):
            images += values["images"]
            if any(low <= images <= high for low, high in ranges):
                best = count
        return best

    def answer(self, batch: list[tuple[dict[str, Any], Any]]) -> list[Any]:
        """A response for each request of the batch; an error where drawing fails. Ends the process where the GPU is lost."""
        names = ", ".join(values["request"] for values, _ in batch)
        try:
            return self.draw([values for values, _ in batch], [sender for _, sender in batch])
        except AllCancelled:
            pb_utils.Logger.log_info(f"request {names} cancelled")
            return [failure("cancelled", pb_utils.TritonError.CANCELLED) for _ in batch]
        except Exception as error:  # any error of a runtime concerns these requests only, unless the GPU is lost
            pb_utils.Logger.log_error(f"request {names}: drawing failed: {error!r}")
            failures = [failure(f"drawing failed: {error}", pb_utils.TritonError.INTERNAL) for _ in batch]
            if not self.is_device_sound():
                deliver(batch, failures, self.decoupled)
                pb_utils.Logger.log_error(
                    f"{self.device} answers no more: this process ends, since it cannot draw again"
                )
                os._exit(1)
            return failures

    def is_device_sound(self) -> bool:
        """False after one of CUDA's sticky errors (an illegal address, a launch that timed out): all later calls fail."""
        try:
            self.now()
        except Exception:
            return False
        return True

    def draw(self, group: list[dict[str, Any]], senders: list[Any]) -> list[Any]:
        """A response for each request: its pictures (images, height, width, 3) and PNGs where asked for, and the
        milliseconds of text encoding, denoising and decoding of the batch. In decoupled mode every step is sent as well.

        Raises AllCancelled once all requests are cancelled."""
        marks = [self.now()]
        first = group[0]
        total = sum(values["images"] for values in group)
        at_once = min(total, int(max(high for _, high in self.ranges(first))) or 1)

        def progress(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.wait_for_last_step()
            if all(sender.is_cancelled() for sender in senders):
                raise AllCancelled
            for sender in senders if self.decoupled else []:
                sender.send(pb_utils.InferenceResponse(output_tensors=[tensor("step", [[step + 1]], np.int32)]))
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
        askers = [values for values in group for _ in range(values["images"])]
        with ThreadPoolExecutor() as pool:  # compressing leaves the interpreter to others
            asked = zip(pictures, askers, strict=True)
            pngs = pool.map(
                png, [picture for picture, values in asked if "png" in values["outputs"] or in_base64(values)]
            )
        responses = []
        for values in group:
            mine, pictures = pictures[: values["images"]], pictures[values["images"] :]
            outputs = [tensor("timings_ms", timings, np.float32), tensor("step", [[first["steps"]]], np.int32)]
            outputs.append(tensor("batch", [[at_once]], np.int32))
            if "image" in values["outputs"]:
                outputs.append(tensor("image", [[np.asarray(picture) for picture in mine]], np.uint8))
            if "png" in values["outputs"]:
                outputs.append(tensor("png", [[next(pngs) for _ in mine]], np.object_))
            elif in_base64(values):
                outputs.append(tensor("png_base64", [[b64encode(next(pngs)) for _ in mine]], np.object_))
            responses.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return responses

    def wait_for_last_step(self) -> None:
        """Keeps the host at most one step ahead of the GPU. Else it would queue all steps at once, report steps that are
        not drawn yet, and notice a cancelled request too late."""
        if self.device != "cpu":
            last, self.step_done = self.step_done, torch.cuda.current_stream(self.device).record_event()
            if last:
                last.synchronize()

    def encode(self, group: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The embeddings of diffusers' `encode_prompt`, for all pictures. Each prompt is encoded alone: that costs
        little, and an absent negative prompt means zeros while an empty one does not."""
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        encoded = [
            self.pipeline.encode_prompt(
                values["prompt"],
                negative_prompt=values["negative_prompt"],
                num_images_per_prompt=values["images"],
                do_classifier_free_guidance=self.is_doubled(values),
                device=self.pipeline.device,
            )
            for values in group
        ]
        for name, part in self.pipeline.components.items():
            if name.startswith("tokenizer"):
                clear_cache(part)
        parts = dict(zip(names, zip(*encoded, strict=True), strict=False))  # the pooled ones are SDXL's alone
        return {name: torch.cat(part) for name, part in parts.items() if part[0] is not None}

    def now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def finalize(self) -> None:
        """Runs the exit handlers (they keep kernels that were compiled late) and ends the process at once. Triton waits for
        this; to take Python and torch down would cost seconds, and half a minute on a busy machine."""
        atexit._run_exitfuncs()
        os._exit(0)


def has_room(size_bytes: int) -> bool:
    """Whether answers of this size fit into the shared memory that carries them to Triton."""
    return shutil.disk_usage("/dev/shm").free > size_bytes


def deliver(batch: list[tuple[dict[str, Any], Any]], responses: list[Any], decoupled: bool) -> None:
    """Sends each request its response, and that it is the last.

    In decoupled mode an error follows where the response does not fit into the shared memory. Nothing can follow a message
    marked final, even one that failed, so there the mark is sent on its own."""
    for (values, sender), response in zip(batch, responses, strict=True):
        try:
            if not decoupled:
                sender.send(response, flags=FINAL)
                continue
            try:
                sender.send(response)
            except Exception as error:
                pb_utils.Logger.log_error(f"request {values['request']}: the answer could not be sent: {error!r}")
                sender.send(failure(f"the answer could not be sent: {error}", pb_utils.TritonError.INTERNAL))
            sender.send(flags=FINAL)
        except Exception as error:  # the other requests of the batch are still to be answered
            pb_utils.Logger.log_error(f"request {values['request']} could not be answered: {error!r}")


def clear_cache(tokenizer: Any) -> None:
    """Transformers 4's tokenizer for CLIP keeps the tokens of every word it met, for ever."""
    if hasattr(tokenizer, "cache"):
        tokenizer.cache = {word: word for word in tokenizer.all_special_tokens if word in tokenizer.cache}


def failure(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def tensor(name: str, values: Any, dtype: Any) -> Any:
    return pb_utils.Tensor(name, np.ascontiguousarray(np.asarray(values, dtype=dtype)))


def in_base64(values: dict[str, Any]) -> bool:
    """A client that names no outputs is asked for all: it gets the PNGs once, as they are."""
    return "png_base64" in values["outputs"] and "png" not in values["outputs"]


def png(picture: Any) -> bytes:
    """Lightly compressed: zlib's default takes up to five times as long to save a tenth, and the GPU waits for it."""
    picture.save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return buffer.getvalue()
