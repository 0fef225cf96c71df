"""Asks a running Triton, from the server's own environment: python triton_client.py HTTP_PORT GRPC_PORT < requests.json

A request is {"over": "http" | "grpc", "inputs": {...}}; a text may be given as {"hex": ...}, a type as {"dtype": ...}.
Answers are written as one JSON list: a picture's sha256, shape and timings, or the error.
"""

import concurrent.futures
import hashlib
import json
import sys

import numpy as np
import tritonclient.grpc
import tritonclient.http

TYPES = {"width": "INT32", "height": "INT32", "steps": "INT32", "images": "INT32", "seed": "INT64", "guidance": "FP32"}
NUMPY = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}


def ask(request: dict) -> dict:
    library = tritonclient.grpc if request["over"] == "grpc" else tritonclient.http
    client = library.InferenceServerClient(f"127.0.0.1:{sys.argv[2 if request['over'] == 'grpc' else 1]}")
    inputs = []
    for name, value in request["inputs"].items():
        kind = request.get("types", {}).get(name) or TYPES.get(name, "BYTES")
        if kind == "BYTES":
            text = bytes.fromhex(value["hex"]) if isinstance(value, dict) else value.encode()
            array = np.array([text], dtype=object)
        else:
            array = np.array([value], dtype=NUMPY[kind])
        item = library.InferInput(name, array.shape, kind)
        item.set_data_from_numpy(array)
        inputs.append(item)
    print("sending", file=sys.stderr, flush=True)
    try:
        answer = client.infer("slimxl", inputs)
    except Exception as error:
        return {"error": str(error)}
    image = answer.as_numpy("image")
    return {
        "shape": list(image.shape),
        "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        "timings_ms": answer.as_numpy("timings_ms").tolist(),
        "png": bytes(answer.as_numpy("png")[0])[:4].hex(),
    }


if __name__ == "__main__":
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        json.dump(list(pool.map(ask, json.load(sys.stdin))), sys.stdout)
