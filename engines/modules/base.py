"""What every engine module shares: a config, a device, a dtype; and one clear line for all that only a torch module can."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NoReturn

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from distill.common.errors import UserError
from distill.models.networks import make_network
from engines.bundle import Engine
from engines.component import EngineComponent
from engines.flavors import LoadedEngine
from engines.flavors.weights import Added
from export.components import COMPONENTS, PIPELINE_SIZES

IN_TORCH = "run the checkpoint in torch for it"
FUSED = "leave it out: an engine's attention is compiled and fused"
INSTEAD = {
    "fuse_qkv_projections": FUSED,
    "set_attn_processor": FUSED,
    "set_attention_backend": FUSED,
    "attn_processors": f"its attention is compiled, without places for PAG or other processors; {IN_TORCH}",
    "enable_freeu": f"FreeU changes the network; {IN_TORCH}",
    "enable_tiling": f"it takes whole pictures of the bundle's sizes; {IN_TORCH}",
    "enable_group_offload": "an engine keeps its weights where they were loaded; leave it out",
    "enable_layerwise_casting": "its precision was chosen by the export (--precision); leave it out",
    "enable_gradient_checkpointing": "an engine cannot be trained; train the checkpoint",
    "parameters": "its weights are in the engine; its `dtype`, `device` and `num_parameters()` are there",
    "state_dict": "its weights are in the engine; take them from the checkpoint",
    "load_state_dict": "other weights come from an ONNX folder: engines.refit, for plans built with --refit",
    "save_pretrained": "the pipeline that engines.load gave saves the bundle as a whole; so does copying its folder",
    "_load_ip_adapter_weights": "IP-Adapters run with the checkpoint in torch only",
    "pickle": "open the bundle in each process: engines.load(bundle)",
}
"""What to do in place of something that a torch module has and an engine has not."""


class LacksError(UserError, AttributeError):
    """An engine has not what a torch module has. An AttributeError too, so that `hasattr` answers no."""


class EngineModule(torch.nn.Module):
    """What diffusers asks of every network. An engine stays where it was loaded, and keeps its precision."""

    def __init__(self, component: EngineComponent, config: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.component = component
        self.config = FrozenDict(config)
        self._dtype = dtype
        self.training = False

    @property
    def device(self) -> torch.device:
        return self.component.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def engines(self) -> list[tuple[Engine, LoadedEngine]]:
        """All loaded engines behind it."""
        return self.component.engines

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Raises UserError for another device than its own."""
        device = kwargs.get("device", next((a for a in args if isinstance(a, (str, torch.device, int))), None))
        if device is not None and not _is_same(torch.device(device), self.device):
            raise UserError(
                f"the {self.component.name} engine is on {self.device} and cannot move to {device}; "
                f"load it there: engines.load(bundle, device={str(device)!r})"
            )
        return self

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Of the network that it was compiled from; none can be trained."""
        return 0 if only_trainable else self._counts[exclude_embeddings]

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the engines' files, which hold the weights."""
        return sum(engine.size_bytes for engine, _ in self.engines)

    def network_without_weights(self) -> torch.nn.Module:
        """What it was compiled from, on the device meta."""
        from accelerate import init_empty_weights

        config = {name: value for name, value in self.config.items() if name not in PIPELINE_SIZES}
        with init_empty_weights():
            network: torch.nn.Module = make_network(COMPONENTS[self.component.name].source, config)
        return network

    @cached_property
    def _counts(self) -> tuple[int, int]:
        """Parameters, and those without the tables of embeddings."""
        modules = list(self.network_without_weights().modules())
        tables = {module for module in modules if isinstance(module, torch.nn.Embedding)}
        sizes = [(module in tables, p.numel()) for module in modules for p in module.parameters(recurse=False)]
        return sum(size for _, size in sizes), sum(size for is_table, size in sizes if not is_table)

    def require_exchangeable(self) -> None:
        """Raises UserError where something cannot be added to the weights of its engines."""
        for _, loaded in self.engines:
            loaded.require_exchangeable()

    def add_to_weights(self, added: Added) -> None:
        """Gives its engines their own weights with this added. Raises UserError where it does not fit."""
        for _, loaded in self.engines:
            loaded.add_to_weights(added)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Nothing in an engine can require a gradient."""
        return self

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        self._lacks("parameters")

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._lacks("state_dict")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._lacks("load_state_dict")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._lacks("save_pretrained")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._lacks("pickle")

    def unfuse_qkv_projections(self) -> None:
        """Nothing to undo, here and below: an engine refuses what these switch off, or does not need what they switch on."""

    disable_gradient_checkpointing = reset_attention_backend = unfuse_qkv_projections

    def set_default_attn_processor(self) -> None: ...

    def set_attention_slice(self, slice_size: Any = "auto") -> None: ...

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None: ...

    def disable_xformers_memory_efficient_attention(self) -> None: ...

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        """Raises LacksError for what only a torch module has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") and name not in INSTEAD:
                raise
        self._lacks(name)

    def _lacks(self, name: str) -> NoReturn:
        advice = INSTEAD.get(name, f"it is a compiled graph; {IN_TORCH}")
        raise LacksError(f"the {self.component.name} engine has no {name.lstrip('_')}: {advice}")


LOADABLE_CLASSES[__name__] = {EngineModule.__name__: ["save_pretrained", "from_pretrained"]}
"""Where diffusers looks for what can be saved: what it does not find there it leaves out, and no such folder loads."""


def _is_same(asked: torch.device, device: torch.device) -> bool:
    """A device without an index, as "cuda", is the same as any of its type."""
    return (asked.type == device.type and None in (asked.index, device.index)) or asked == device


class NoGradient(torch.autograd.Function):
    """Passes an output on, and says why no gradient comes back through an engine."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        raise UserError("no gradient passes through an engine: guidance by gradients needs the checkpoint in torch")


def run(
    component: EngineComponent, inputs: dict[str, torch.Tensor], resolution: str | None = None
) -> dict[str, torch.Tensor]:
    """As `EngineComponent.run`. Where an input requires a gradient, so do the outputs, and going back raises UserError."""
    tracked = [value for value in inputs.values() if value.requires_grad] if torch.is_grad_enabled() else []
    outputs = component.run(
        {name: value.detach() if value.requires_grad else value for name, value in inputs.items()}, resolution
    )
    if not tracked:
        return outputs
    return {name: NoGradient.apply(value, *tracked) for name, value in outputs.items()}
