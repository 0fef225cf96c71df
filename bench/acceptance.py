"""Does TensorRT-RTX accept this GPU? A small fp16 network is built for every capability it names, then loaded and run.

Its enumeration names no SM90, and the vendor's list no data-centre GPU, so the answer is kept with the runtime's own
words. The GPU providers of ONNX Runtime are asked the same, built in or as a plugin.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

SIDE = 64
PROVIDERS = ("NvTensorRTRTXExecutionProvider", "TensorrtExecutionProvider", "CUDAExecutionProvider")
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
ANSWER_S = 30.0  # of one target, the start of a process and its imports among it


def _weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((SIDE, SIDE)).astype(np.float16) / 8


def _inputs() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((SIDE, SIDE)).astype(np.float16)


def _expected() -> np.ndarray:
    return np.maximum(_inputs().astype(np.float32) @ _weights().astype(np.float32), 0)


def _cosine(found: np.ndarray) -> float:
    from bench.quality.quality import cosine

    return cosine(found.astype(np.float32), _expected())


def _make_logger(trt: Any, messages: list[str]) -> Any:
    """A logger that keeps warnings and errors word for word."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                messages.append(f"{severity.name}: {text.strip()}")

    return Logger()


def _build(trt: Any, logger: Any, capability: str) -> bytes | None:
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float16, (SIDE, SIDE))
    weights = network.add_constant((SIDE, SIDE), trt.Weights(np.ascontiguousarray(_weights()))).get_output(0)
    product = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, weights, trt.MatrixOperation.NONE).get_output(0)
    y = network.add_activation(product, trt.ActivationType.RELU).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    plan = builder.build_serialized_network(network, config)
    return bytes(plan) if plan is not None else None


def _run(engine: Any) -> np.ndarray:
    import torch

    context = engine.create_execution_context()
    if context is None:
        raise RuntimeError("no execution context; the runtime's own message stands above")
    x, y = torch.from_numpy(_inputs()).cuda(), torch.empty((SIDE, SIDE), dtype=torch.float16, device="cuda")
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("y", y.data_ptr())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    if not context.execute_async_v3(stream.cuda_stream):
        raise RuntimeError("the plan could not be enqueued; the runtime's own message stands above")
    stream.synchronize()
    return y.cpu().numpy()


def _row(target: str, *messages: str) -> dict[str, Any]:
    """Nothing reached yet."""
    return {
        "target": target,
        "reached": "none",
        "cosine": None,
        "validity": None,
        "invalid": [],
        "messages": [*messages],
    }


def _header(trt: Any, runtime: Any, plan: bytes, messages: list[str]) -> dict[str, Any]:
    """What the runtime says of the plan's header; what it cannot say does not keep the plan from being tried."""
    try:
        validity, reasons = runtime.get_engine_validity(plan[: runtime.engine_header_size])
        kinds = trt.EngineInvalidityDiagnostics.__members__.items()
        return {"validity": validity.name, "invalid": [name for name, kind in kinds if int(reasons) & int(kind)]}
    except Exception as error:
        messages.append(f"header not read: {type(error).__name__}: {error}")
        return {}


def try_capability(trt: Any, capability: str) -> dict[str, Any]:
    """How far one target comes: `reached` is none, built, loaded or ran; `messages` are the runtime's own words."""
    import torch

    row = _row(capability)
    messages = row["messages"]
    logger = _make_logger(trt, messages)
    try:
        plan = _build(trt, logger, capability)
        if plan is None:
            return row
        row |= {"reached": "built", "plan_bytes": len(plan)}
        if not torch.cuda.is_available():
            messages.append("not loaded: no NVIDIA GPU here")
            return row
        runtime = trt.Runtime(logger)
        row |= _header(trt, runtime, plan, messages)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            return row
        row["reached"] = "loaded"
        row["cosine"] = _cosine(_run(engine))
        row["reached"] = "ran"
    except Exception as error:
        messages.append(f"{type(error).__name__}: {error}")
    return row


def _onnx_model() -> bytes:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape = [SIDE, SIDE]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["y"])],
        "acceptance",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, shape)],
        [numpy_helper.from_array(_weights(), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _import_onnxruntime() -> Any:
    """With torch before it: it brings the CUDA libraries of its wheels, which the GPU providers then find."""
    import_module("torch")
    return import_module("onnxruntime")


def _run_session(row: dict[str, Any], name: str, **how: Any) -> None:
    """The same network in a session that is to run on the provider `name`."""
    import onnxruntime

    session = onnxruntime.InferenceSession(_onnx_model(), **how)
    row["reached"] = "loaded"
    if name not in session.get_providers():
        row["messages"].append(f"the session fell back to {', '.join(session.get_providers())}")
        return
    row["cosine"] = _cosine(session.run(["y"], {"x": _inputs()})[0])
    row["reached"] = "ran"


def try_provider(name: str) -> dict[str, Any]:
    """One of the providers that ONNX Runtime was built with."""
    onnxruntime, row = _import_onnxruntime(), _row(name)
    available = onnxruntime.get_available_providers()
    if name not in available:
        row["messages"].append(f"this ONNX Runtime ({onnxruntime.__version__}) has {', '.join(available)}")
        return row
    try:
        _run_session(row, name, providers=[name])
    except Exception as error:
        row["messages"].append(f"{type(error).__name__}: {error}")
    return row


def try_plugin(module: str) -> dict[str, Any]:
    """A provider that comes as a package of its own and is registered with ONNX Runtime, for every device it names."""
    row = _row(module)
    try:
        plugin, onnxruntime = import_module(module), _import_onnxruntime()
        name = plugin.get_ep_name()
        onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
        if not devices:
            row["messages"].append(f"{name} {plugin.__version__} was registered and names no device here")
            return row
        options = onnxruntime.SessionOptions()
        options.add_provider_for_devices(devices, {})
        _run_session(row, name, sess_options=options)
    except ImportError as error:
        row["messages"].append(f"not installed: {error}")
    except Exception as error:
        row["messages"].append(f"{type(error).__name__}: {error}")
    return row


def targets() -> list[tuple[str, str]]:
    """(kind, name) of all there is to ask."""
    providers = [("provider", name) for name in PROVIDERS]
    try:
        trt = import_module("tensorrt_rtx")
    except ImportError as error:
        return [("absent", f"not installed: {error}"), *providers, ("plugin", PLUGIN)]
    capabilities = [("capability", name) for name in trt.ComputeCapability.__members__ if name != "NONE"]
    return [*capabilities, *providers, ("plugin", PLUGIN)]


def ask(kind: str, name: str) -> dict[str, Any]:
    """One target's row."""
    if kind == "absent":
        return _row("tensorrt-rtx", name)
    if kind == "capability":
        trt = import_module("tensorrt_rtx")
        return try_capability(trt, name) | {"version": trt.__version__}
    return try_provider(name) if kind == "provider" else try_plugin(name)


def _ask_all(left: list[tuple[str, str]], send: Any) -> None:
    for kind, name in left:
        send.send(ask(kind, name))


def measure_acceptance(on_row: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """A row per target, asked in a process of their own: one that takes it down, or does not answer, costs the others a
    new process. `on_row` is given all rows so far."""
    rows: list[dict[str, Any]] = []
    left, context = targets(), multiprocessing.get_context("spawn")
    while left:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_ask_all, args=(left, send))
        process.start()
        send.close()
        answers = True
        while left and answers:
            try:
                answers = receive.poll(ANSWER_S)
                row = receive.recv() if answers else _row(left[0][1], f"did not answer in {ANSWER_S:g} s")
            except EOFError:
                process.join()
                answers, row = False, _row(left[0][1], f"took its process down (exit code {process.exitcode})")
            rows.append(row)
            left = left[1:]
            on_row(rows)
        process.kill()
        process.join()
    return rows
