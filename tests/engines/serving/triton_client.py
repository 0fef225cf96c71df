"""Asks a running Triton, from the server's own environment: python triton_client.py HTTP_PORT GRPC_PORT < asks.json

Each ask is {"do": NAME, ...} with the NAME of a function below; all are asked at once, and their answers or errors are
written as one JSON list. Every client is closed when its ask is done: one that an error keeps alive is closed by the
interpreter's end, where gRPC's threads can stop it for good.
"""

import concurrent.futures
import hashlib
import json
import sys
import urllib.error
import urllib.request
from queue import Queue

import numpy as np
import tritonclient.grpc
import tritonclient.http
from google.protobuf import json_format, text_format
from load_client import make_inputs  # slimxl's own, from engines/serving/
from tritonclient.grpc import model_config_pb2

HTTP, GRPC = (f"127.0.0.1:{port}" for port in sys.argv[1:3])


def inputs_of(ask: dict, library) -> list:
    """What the load client sends, with some inputs replaced by raw ones: name -> [numpy dtype, Triton type, values]."""
    inputs = make_inputs(ask["inputs"], library)
    for name, (dtype, kind, values) in ask.get("raw", {}).items():
        array = np.array(values, dtype) if dtype != "hex" else np.array([[bytes.fromhex(values)]], object)
        inputs = [one for one in inputs if one.name() != name]
        inputs.append(library.InferInput(name, array.shape, kind))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def picture(answer) -> dict:
    image = answer.as_numpy("image")
    return {
        "shape": list(image.shape),
        "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        "mean": float(image.mean()),
        "timings_ms": answer.as_numpy("timings_ms")[0].tolist(),
        "batch": int(answer.as_numpy("batch")[0, 0]),
        "png": bytes(answer.as_numpy("png")[0, 0])[:4].hex(),
    }


def draw(ask: dict) -> dict:
    library, url = (tritonclient.grpc, GRPC) if ask["over"] == "grpc" else (tritonclient.http, HTTP)
    limits = {} if ask["over"] == "grpc" else {"network_timeout": 300.0}  # its minute is short for a busy machine
    with library.InferenceServerClient(url, **limits) as client:
        inputs = inputs_of(ask, library)
        sys.stderr.write("sending\n")  # one write: print would write the line's end apart, among other threads
        return picture(client.infer("slimxl", inputs))


def stream(ask: dict) -> dict:
    """Decoupled: the steps that were told before the picture, and the picture."""
    answers: Queue = Queue()
    steps = []
    with tritonclient.grpc.InferenceServerClient(GRPC) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        inputs = inputs_of(ask, tritonclient.grpc)
        client.async_stream_infer("slimxl", inputs, request_id="one", enable_empty_final_response=True)
        while True:
            result, error = answers.get(timeout=120)
            if error is not None:
                raise error
            if result.as_numpy("image") is not None:
                end, error = answers.get(timeout=120)
                assert end.get_response().parameters["triton_final_response"].bool_param, (end, error)
                return picture(result) | {"steps": steps, "step": int(result.as_numpy("step")[0, 0])}
            steps.append(int(result.as_numpy("step")[0, 0]))


def statistics(ask: dict) -> dict:
    with tritonclient.grpc.InferenceServerClient(GRPC) as client:
        return client.get_inference_statistics("slimxl", as_json=True)


def fetch(ask: dict) -> dict:
    """Any path of the HTTP endpoint; with a body it is a POST, and "\\udcff" stands for the byte ff."""
    body = ask["body"].encode(errors="surrogateescape") if "body" in ask else None
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://{HTTP}/{ask['path']}", body), timeout=30) as answer:
            return {"status": answer.status, "text": answer.read().decode(errors="replace")}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "text": error.read().decode()}


def grpc_call(ask: dict) -> dict:
    """Any method of the gRPC client."""
    with tritonclient.grpc.InferenceServerClient(GRPC) as client:
        return {"text": str(getattr(client, ask["method"])(*ask["arguments"]))}


def parse_config(ask: dict) -> dict:
    """config.pbtxt through Triton's own protobuf; an unknown field or a wrong type is an error."""
    message = text_format.Parse(ask["text"], model_config_pb2.ModelConfig())
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def answer(ask: dict) -> dict:
    try:
        return globals()[ask["do"]](ask)
    except Exception as error:
        return {"error": str(error)}


if __name__ == "__main__":
    asks = json.load(sys.stdin)
    with concurrent.futures.ThreadPoolExecutor(len(asks)) as pool:
        json.dump(list(pool.map(answer, asks)), sys.stdout)
