"""The clients of a load test: a job as JSON on stdin, results as lines of JSON on stdout.

They run in the environment that has tritonclient, which lacks what slimxl needs: so nothing of slimxl is imported here.
"""

from __future__ import annotations

import contextlib
import json
import random
import string
import sys
import threading
import time
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

MODEL = "slimxl"
TYPES = {"width": "INT32", "height": "INT32", "steps": "INT32", "images": "INT32", "seed": "INT64", "guidance": "FP32"}
NUMPY = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
PNG = b"\x89PNG\r\n\x1a\n"
LONGEST_ANSWER_SECONDS = 600


def tell(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def make_inputs(values: dict[str, Any], library: Any = triton) -> list[Any]:
    """A request's inputs, each of shape [1, 1]; texts become UTF-8."""
    inputs = []
    for name, value in values.items():
        kind = TYPES.get(name, "BYTES")
        array = np.array([[value.encode()]], dtype=object) if kind == "BYTES" else np.array([[value]], NUMPY[kind])
        inputs.append(library.InferInput(name, [1, 1], kind))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def random_word() -> str:
    """Keeps any two prompts different, so that no cache (of a tokenizer, say) helps."""
    return "".join(random.choices(string.ascii_lowercase, k=8))


def fill_in(request: dict[str, Any], parameters: dict[str, str]) -> None:
    """What the job leaves open is what the server takes by default: its first size, and the steps and guidance of its model.
    One of an earlier slimxl does not tell the last two, and takes 25 and 5."""
    if request["width"] is None:
        request["width"], request["height"] = map(int, parameters["sizes"].split(",")[0].split("x"))
    if request["steps"] is None:
        request["steps"] = int(parameters.get("steps", 25))
    if request["guidance"] is None:
        request["guidance"] = float(parameters.get("guidance", 5))


class Pace:
    """Tells all clients together when to send: `rate` requests a second."""

    def __init__(self, rate: float | None) -> None:
        self._gap = 1 / rate if rate else 0.0
        self._lock = threading.Lock()
        self._next = time.perf_counter()

    def wait(self, ends: float) -> float:
        """Waits for the next request's due time, or for `ends`, and returns the due time. It is past where all clients were
        busy."""
        if not self._gap:
            return time.perf_counter()
        with self._lock:
            moment = self._next
            self._next += self._gap
        time.sleep(max(0.0, min(moment, ends) - time.perf_counter()))
        return moment


class Level:
    """`concurrency` clients at once, each with its own connection and one request under way, until time is up."""

    def __init__(self, job: dict[str, Any], concurrency: int) -> None:
        self.job, self.concurrency = job, concurrency
        self.latencies_ms: list[float] = []
        self.batches: list[int] = []
        self.errors: list[str] = []
        self._lock = threading.Lock()

    def run(self) -> None:
        with contextlib.ExitStack() as connections:  # gRPC can hang if it is closed while Python ends
            clients = (triton.InferenceServerClient(self.job["server"]) for _ in range(self.concurrency))
            self._load([connections.enter_context(client) for client in clients])

    def _load(self, clients: list[Any]) -> None:
        for client in clients:
            with contextlib.suppress(InferenceServerException):  # a server that is gone fails the requests
                client.is_server_ready()  # connects, outside of what is timed
        tell(started=self.concurrency)
        pace, started = Pace(self.job["rate"]), time.perf_counter()
        ends = started + self.job["seconds"]
        threads = [threading.Thread(target=self._ask_until, args=(client, pace, ends)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tell(
            finished=self.concurrency,
            seconds=time.perf_counter() - started,
            latencies_ms=self.latencies_ms,
            batches=self.batches,
            failures=len(self.errors),
            first_error=self.errors[0] if self.errors else None,
        )

    def _ask_until(self, client: Any, pace: Pace, ends: float) -> None:
        outputs = [triton.InferRequestedOutput(name) for name in ("png", "batch")]
        seed = 0
        while True:
            due = pace.wait(ends)
            if max(due, time.perf_counter()) >= ends:
                return
            seed += 1
            prompt = f"{self.job['request']['prompt']} {random_word()}"
            inputs = make_inputs(self.job["request"] | {"seed": seed, "prompt": prompt})
            try:
                answer = client.infer(MODEL, inputs, outputs=outputs, client_timeout=LONGEST_ANSWER_SECONDS)
                milliseconds = (time.perf_counter() - due) * 1000
                pictures = answer.as_numpy("png").reshape(-1)
                if len(pictures) != self.job["request"]["images"] or not all(p.startswith(PNG) for p in pictures):
                    raise ValueError("an answer without its pictures")
            except (InferenceServerException, ValueError) as error:
                with self._lock:
                    self.errors.append(str(error))
                time.sleep(0.1)  # a server that is gone is not asked thousands of times a second
                continue
            with self._lock:
                self.latencies_ms.append(milliseconds)
                self.batches.append(int(answer.as_numpy("batch")[0, 0]))


def main() -> int:
    job = json.load(sys.stdin)
    with triton.InferenceServerClient(job["server"]) as client:
        try:
            server = client.get_server_metadata(as_json=True)
            config = client.get_model_config(MODEL, as_json=True)["config"]
        except InferenceServerException as error:
            tell(error=error.message())
            return 0
    parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
    instances = [
        f"{group['kind']} {','.join(map(str, group.get('gpus', [])))}".strip()
        for group in config["instance_group"]
        for _ in range(group["count"])
    ]
    tell(server=server, parameters=parameters, instances=instances, max_batch_size=config["max_batch_size"])
    fill_in(job["request"], parameters)
    tell(request=job["request"])
    for concurrency in job["concurrency"]:
        Level(job, concurrency).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
