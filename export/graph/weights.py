"""Weights that stay in their files while the graph is made around them.

A graph needs the shapes and types of its weights; the bytes pass from the checkpoint into the graph's data one tensor at
a time. So an export holds one tensor, whatever the size of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

from distill.checkpoints.folder import read_config
from distill.checkpoints.load import explaining_library
from distill.checkpoints.tensors import TensorRecord, component_tensors
from distill.common.errors import UserError
from distill.models.networks import make_network

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _modern(key: str) -> str:
    """Key names that diffusers and transformers translate when they load."""
    for old, new in ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")):
        key = key.replace(old, new)
    return key.removeprefix("text_model.")


def on_meta(folder: Path, component: str) -> nn.Module:
    """The network of a checkpoint folder without weights; its buffers, which no file holds, are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), explaining_library(folder / component):
        return make_network(component, read_config(folder, component)).eval()


def load_shapes(folder: Path, component: str, dtype: torch.dtype) -> nn.Module:
    """The network in the folder `component` of a checkpoint in eval mode, to be traced and not to be run: its weights are
    FakeTensors, each with its record in the files as `stored`.

    Raises UserError where a weight is missing or of another shape.
    """
    network = on_meta(folder, component)
    precision = "fp16" if dtype == torch.float16 else "fp32"
    found = {_modern(key): record for key, record in component_tensors(folder / component, precision).items()}
    names = [name for name, _ in network.named_parameters()]
    missing = sorted(_modern(name) for name in names if _modern(name) not in found)
    if missing:
        raise UserError(
            f"{folder / component} lacks {len(missing)} of {len(names)} weights, the first is {missing[0]}; fetch the "
            "checkpoint again"
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module = network.get_submodule(owner)
        shape, record = tuple(getattr(module, attribute).shape), found[_modern(name)]
        if shape != record.shape:
            raise UserError(
                f"{folder / component}: {_modern(name)} has shape {record.shape}, its config.json means {shape}"
            )
        with mode:
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        parameter.stored = record  # type: ignore[attr-defined]
        setattr(module, attribute, parameter)
    return network


def _reader(record: TensorRecord, tensor: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    def read() -> ir.TensorProtocol:
        stored = torch.from_numpy(np.fromfile(record.file, np.uint8, record.nbytes, offset=record.start))
        dtype = getattr(torch, tensor.dtype.numpy().name)
        return ir.tensor(
            stored.view(STORED_DTYPES[record.dtype]).to(dtype).view(record.shape).numpy(), name=tensor.name
        )

    return read


def read_when_written(model: ir.Model, module: nn.Module) -> None:
    """Gives the initializers that were traced from `load_shapes` their values, read whenever they are asked for."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and isinstance(tensor.raw, FakeTensor):
            read = _reader(module.get_parameter(name).stored, tensor)  # type: ignore[attr-defined]
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=name, cache=False)
