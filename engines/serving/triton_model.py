"""The text-to-image model inside Triton's Python backend. It is copied into the repository as model.py.

Triton hands over the requests that wait together. Those of equal size, steps and guidance are drawn as one batch, each
with noise of its own seed, so that a picture is the one it would be alone. Every request is checked before anything is
drawn, and a bad one is answered with an error of its own; the model and the other requests live on.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# the backend's embedded interpreter does not look at PYTHONPATH by itself; behind its own packages, because the NumPy
# that the backend was compiled for has to stay the first one
sys.path += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

import engines
from distill.common.errors import UserError
from distill.common.files import sha256_file

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
LONGEST_PROMPT = 2000
"""Characters; CLIP reads 77 tokens of them, and takes quadratically long for a long word."""
DEFAULTS: dict[str, Any] = {"negative_prompt": None, "width": None, "height": None}
DEFAULTS |= {"steps": 25, "guidance": 5.0, "seed": 0, "images": 1}
LIMITS = {"steps": (1, 200), "guidance": (0.0, 50.0), "images": (1, 16), "seed": (0, 2**63 - 1)}
MOST_WORK = 800
"""Images times steps: what one request may keep an instance busy with."""
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
    if (work := values["images"] * values["steps"]) > MOST_WORK:
        raise UserError(f"images times steps is {work}, allowed are up to {MOST_WORK}; send several requests")
    width, height = (int(side) for side in sizes[0].split("x"))
    values["width"] = width if values["width"] is None else values["width"]
    values["height"] = height if values["height"] is None else values["height"]
    size = f"{values['width']}x{values['height']}"
    if size not in sizes:
        raise UserError(f"size {size} is not served: allowed are {', '.join(sizes)}")
    return values


def read_name(request: Any) -> str:
    """The id that the client gave, for the log; over HTTP Triton takes any bytes as one."""
    try:
        return repr(request.request_id()[:64])
    except UnicodeDecodeError:
        return "'?'"


def read_text(name: str, value: bytes) -> str:
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 ({error})") from None
    if len(text) > LONGEST_PROMPT:
        raise UserError(f"{name} has {len(text)} characters, allowed are {LONGEST_PROMPT}")
    return text


class NobodyWaits(Exception):
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
        self.instances = sum(group["count"] * max(1, len(group.get("gpus", []))) for group in config["instance_group"])
        self.step_done: torch.cuda.Event | None = None
        if parameters["warm_up"] == "true":
            self.warm_up(config["max_batch_size"])

    def warm_up(self, most: int) -> None:
        """Every size under guidance, so that few requests pay for what a runtime prepares at first: on a GPU, where each
        number of pictures has a CUDA graph of its own, every number up to `most`, else one and `most`."""
        started = time.perf_counter()
        for size in self.sizes:
            width, height = map(int, size.split("x"))
            for images in sorted({1, most}) if self.device == "cpu" else range(1, most + 1):
                self.pipeline("", width=width, height=height, num_inference_steps=1, num_images_per_prompt=images)
        seconds = time.perf_counter() - started
        pb_utils.Logger.log_info(f"warmed up {len(self.sizes)} sizes on {self.device} in {seconds:.1f} s")

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Each request is answered as soon as its own batch is drawn, whatever else came with it; the last batch by being
        returned. A client that hears of its picture before this ends, and at once asks for the next one, may find no
        instance waiting, and Triton's batcher then sleeps for half a second (its core, dynamic_batch_scheduler.cc).

        Where the shared memory may not hold the answers, all are returned: if one then does not fit, Triton fails them
        all, and crashes where it has answered some of them already (it deletes their response factories twice)."""
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
            sender, name = request.get_response_sender(), read_name(request)
            about = {"request": name, "position": position}
            try:
                values = read_request(request, self.sizes) | about | {"outputs": request.requested_output_names()}
            except Exception as error:  # whatever is wrong with a request concerns no other
                message = str(error) if isinstance(error, UserError) else f"the request cannot be read: {error!r}"
                pb_utils.Logger.log_info(f"request {name} refused: {message}")
                refused.append(((about, sender), failure(message, pb_utils.TritonError.INVALID_ARG)))
                continue
            groups.setdefault(tuple(values[name] for name in ALIKE), []).append((values, sender))
            forms = {"image", "png"}.intersection(values["outputs"])  # a PNG is hardly ever larger than its pixels
            answer_bytes += values["images"] * values["width"] * values["height"] * 3 * len(forms)
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

    def ranges(self, values: dict[str, Any]) -> list[tuple[float, float]]:
        """The fewest and the most pictures that each profile of the UNet takes at the request's size and guidance."""
        size, rows = f"{values['width']}x{values['height']}", 2 if values["guidance"] > 1 else 1
        return [
            (profile.shapes["sample"].min[0] / rows, profile.shapes["sample"].max[0] / rows)
            for engine, _ in self.pipeline.unet.component.engines
            for profile in engine.profiles
            if size in profile.resolutions
        ]

    def most_together(self, group: list[dict[str, Any]]) -> int:
        """How many of these requests, from the first, make a batch that one profile of the UNet takes as it is."""
        ranges, best, images = self.ranges(group[0]), 1, 0
        for count, values in enumerate(group, 1):
            images += values["images"]
            if any(low <= images <= high for low, high in ranges):
                best = count
        return best

    def answer(self, batch: list[tuple[dict[str, Any], Any]]) -> list[Any]:
        """A response for each request of the batch, an error where drawing fails. Ends the process where the GPU is lost."""
        names = ", ".join(values["request"] for values, _ in batch)
        try:
            return self.draw([values for values, _ in batch], [sender for _, sender in batch])
        except NobodyWaits:
            pb_utils.Logger.log_info(f"request {names} cancelled")
            return [failure("cancelled", pb_utils.TritonError.CANCELLED) for _ in batch]
        except Exception as error:  # whatever a runtime raises concerns these requests only, unless it lost the GPU
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
        """CUDA's sticky errors (an illegal address, a launch that timed out) fail every later call of the process."""
        try:
            self.now()
        except Exception:
            return False
        return True

    def draw(self, group: list[dict[str, Any]], senders: list[Any]) -> list[Any]:
        """A response for each: what was asked for of the pictures (images, height, width, 3), their PNGs, and the
        milliseconds of text encoding, denoising and decoding of the batch. In decoupled mode every step is told. Raises
        NobodyWaits once all requests are cancelled."""
        marks = [self.now()]
        first = group[0]
        total = sum(values["images"] for values in group)
        at_once = min(total, int(max(high for _, high in self.ranges(first))) or 1)

        def progress(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.wait_for_last_step()
            if all(sender.is_cancelled() for sender in senders):
                raise NobodyWaits
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
            pngs = pool.map(png, [picture for picture, values in asked if "png" in values["outputs"]])
        responses = []
        for values in group:
            mine, pictures = pictures[: values["images"]], pictures[values["images"] :]
            outputs = [tensor("timings_ms", timings, np.float32), tensor("step", [[first["steps"]]], np.int32)]
            outputs.append(tensor("batch", [[at_once]], np.int32))
            if "image" in values["outputs"]:
                outputs.append(tensor("image", [[np.asarray(picture) for picture in mine]], np.uint8))
            if "png" in values["outputs"]:
                outputs.append(tensor("png", [[next(pngs) for _ in mine]], np.object_))
            responses.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return responses

    def wait_for_last_step(self) -> None:
        """Lets the host be one step ahead of the GPU and no more: it could queue them all at once, and would then tell
        steps that are not drawn and hear of a cancelled request too late."""
        if self.device != "cpu":
            last, self.step_done = self.step_done, torch.cuda.current_stream(self.device).record_event()
            if last:
                last.synchronize()

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
        forget_words(self.pipeline.tokenizer)
        forget_words(self.pipeline.tokenizer_2)
        parts = dict(zip(names, zip(*encoded, strict=True), strict=True))
        return {name: torch.cat(part) for name, part in parts.items() if part[0] is not None}

    def now(self) -> float:
        """Seconds, once the device has done all it was given."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def finalize(self) -> None:
        """Ends the process, which is all that Triton still waits for: to take Python and torch down costs seconds of a core,
        and half a minute where it is busy. What was left for the exit is done (kernels compiled late are kept)."""
        atexit._run_exitfuncs()
        os._exit(0)


def has_room(size_bytes: int) -> bool:
    """Whether answers of this size fit into the shared memory that takes them to Triton."""
    return shutil.disk_usage("/dev/shm").free > size_bytes


def deliver(batch: list[tuple[dict[str, Any], Any]], responses: list[Any], decoupled: bool) -> None:
    """Ends each request with its response; in decoupled mode with an error where the shared memory is too full for it.
    Nothing can follow what was sent as final, even where that failed, so there the end is told apart."""
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


def forget_words(tokenizer: Any) -> None:
    """Of every word it met, transformers 4's tokenizer for CLIP remembers the tokens for ever."""
    if hasattr(tokenizer, "cache"):
        tokenizer.cache = {word: word for word in tokenizer.all_special_tokens if word in tokenizer.cache}


def failure(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def tensor(name: str, values: Any, dtype: Any) -> Any:
    return pb_utils.Tensor(name, np.ascontiguousarray(np.asarray(values, dtype=dtype)))


def png(picture: Any) -> bytes:
    """Compressed lightly: zlib's default takes up to five times as long to save a tenth of the size, and the GPU waits."""
    picture.save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return buffer.getvalue()
