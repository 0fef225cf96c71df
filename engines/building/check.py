"""Which flavors this machine builds and runs: each builds a tiny fp16 engine for the GPU at hand and runs it.

A runtime's list of GPUs does not settle it. Each flavor is tried in a process of its own, since a runtime may crash or hang.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from distill.common.errors import UserError
from distill.common.files import sha256_file
from engines.bundle import BuildRecord, Engine, FileRecord, Profile, ShapeRange, TensorInfo
from engines.flavors import FLAVORS, BuildRequest, LoadOptions, find_flavor, why_not_here
from engines.gpus import gpu_at_hand

SIDE = 64
LONGEST_SECONDS = 120.0


def print_checks() -> int:
    """One line for each flavor. Returns 0: a flavor that does not run here is an answer, no error."""
    gpu = gpu_at_hand()
    print(f"GPU: {gpu[0]}, compute capability {gpu[1]}" if gpu else "GPU: none (no NVIDIA driver answers)")
    for name in FLAVORS:
        print(f"{name}: {check_apart(name)}", flush=True)
    return 0


def check_apart(flavor: str, seconds: float = LONGEST_SECONDS) -> str:
    """What `check_flavor` finds, in a process of its own."""
    command = [sys.executable, "-m", "engines.building.check", flavor]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"no: it did not answer in {seconds:g} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-1:]
        return ": ".join([f"no: its process ended with status {done.returncode}", *lines])
    return done.stdout.strip().splitlines()[-1]


def check_flavor(name: str) -> str:
    """Builds, loads and runs y = relu(x @ w). Returns `yes, …` or `no: …`, with the runtime's own reason."""
    try:
        flavor, gpu = find_flavor(name), gpu_at_hand()
        if why := why_not_here(flavor):
            return f"no: {why}"
        version, device = flavor.version(), flavor.default_device()
        with tempfile.TemporaryDirectory() as folder:
            error = _largest_error(Path(folder), name, version, device, gpu[1] if gpu else "")
    except UserError as reason:
        return f"no: {reason}"
    except Exception as reason:  # the runtimes' exceptions have no common base
        return f"no: {type(reason).__name__}: {reason}"
    if not error < 0.01:
        return f"no: {version} runs on {device} and is wrong by up to {error:.3g}"
    return f"yes, {version} on {device}"


def _largest_error(folder: Path, flavor: str, version: str, device: str, capability: str) -> float:
    """Of the flavor's y against NumPy's, relative to the largest."""
    import torch

    rng = np.random.default_rng(0)
    weights, x = (rng.standard_normal((SIDE, SIDE)).astype(np.float16) for _ in range(2))
    graph = _write_onnx(folder / "model.onnx", weights)
    backend, out = find_flavor(flavor), folder / "engine"
    shape = ShapeRange(min=[SIDE, SIDE], opt=[SIDE, SIDE], max=[SIDE, SIDE])
    profile = Profile(index=0, resolutions=["512x512"], batch=1, shapes={"x": shape})
    capabilities = [capability] if backend.targets is not None else []
    request = BuildRequest(
        component="unet", flavor=flavor, onnx_files=[graph], out=out,
        profiles=[profile], outputs=["y"], compute_capabilities=capabilities,
    )  # fmt: skip
    outputs = backend.build(request, lambda phase, fraction: None)
    path = out / graph.name if out.is_dir() else out
    digest = sha256_file(path)
    record = FileRecord(path=path.relative_to(folder).as_posix(), sha256=digest, size_bytes=path.stat().st_size)
    engine = Engine(
        component="unet", flavor=flavor, flavor_version=version, layout="shared", gpus=[], precision="fp16",  # type: ignore[arg-type]
        compute_capabilities=capabilities, resolutions=["512x512"], batches=[1], profiles=[profile],
        inputs=[TensorInfo(name="x", dtype="float16", shape=[SIDE, SIDE])], outputs=outputs, files=[record],
        key=digest, onnx_sha256=digest, weights_sha256=None, weights_bytes=weights.nbytes,
        build=BuildRecord(seconds=0, peak_rss_bytes=0, tools={}),
    )  # fmt: skip
    backend.check_load(engine, device)
    loaded = backend.load(folder, engine, backend.open_bundle(LoadOptions(device=device)))
    y = loaded.run({"x": torch.from_numpy(x).to(device)}, profile)["y"].float().cpu().numpy()
    expected = np.maximum(x.astype(np.float32) @ weights.astype(np.float32), 0)
    return float(np.abs(y - expected).max() / expected.max())


def _write_onnx(path: Path, weights: np.ndarray) -> Path:
    from onnx import TensorProto, helper, numpy_helper, save

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, weights.shape) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["y"])]
    graph = helper.make_graph(nodes, "check", [x], [y], [numpy_helper.from_array(weights, "w")])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


if __name__ == "__main__":
    print(check_flavor(sys.argv[1]))
