"""LoRAs at run time. diffusers' own loader reads them into a pipeline whose networks have no weights; what they add to each
weight of a network is then added to that of its engine.

So files, names, scales and weights by block mean what they mean in diffusers, and an engine without LoRAs has its own
weights again, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from distill.common.errors import UserError
from distill.models.conditioning import Conditioning
from engines.modules.base import EngineModule
from export.checkpoint.lora import check_lora, load_lora
from export.graph import wrappers


class Adapters:
    """The LoRAs of a pipeline of engines."""

    def __init__(self, pipeline: Any, kind: Conditioning) -> None:
        self._pipeline = pipeline
        self._parts = ("unet", *kind.encoders)
        networks = {part: _unwritten(getattr(pipeline, part)) for part in self._parts}
        others = {name: getattr(pipeline, name) for name in ("scheduler", *kind.tokenizers)}
        self._loader = getattr(diffusers, kind.pipeline)(vae=None, **networks, **others, **kind.load_options)

    def load(
        self, source: Any, adapter_name: str | None = None, *, weight_name: str | None = None, **named: Any
    ) -> None:
        """Adds a LoRA and switches it on. `source` is a file, a folder with the file `weight_name`, or what diffusers takes
        beside: the id of a repository, or tensors by name.

        Raises UserError for what is no LoRA, for one that does not fit, and where the engines cannot take other weights.
        """
        name = adapter_name or f"default_{len(self.names)}"
        if name in self.names:
            raise UserError(
                f"a LoRA called {name} is loaded; choose another adapter_name, or delete_adapters({name!r})"
            )
        for part in self._parts:
            getattr(self._pipeline, part).require_exchangeable()
        before = [(layer, list(layer.active_adapters)) for layer in self._layers()]
        path = None if isinstance(source, dict) else Path(source) / (weight_name or "")
        try:
            if path is not None and path.is_file():
                check_lora(path, 1.0)
                load_lora(self._loader, path, name, "this bundle")
            else:
                files = {} if weight_name is None else {"weight_name": weight_name}
                self._ask("load_lora_weights", source, adapter_name=name, **files, **named)
            self._apply()
        except BaseException:
            if name in self.names:
                self._loader.delete_adapters(name)
            for layer, active in before:
                layer.set_adapter(active)
            self._apply()
            raise

    @property
    def names(self) -> list[str]:
        """Of those that are loaded, whether they are on or not."""
        return sorted({name for part in self._parts for name in getattr(self._part(part), "peft_config", {})})

    @property
    def by_part(self) -> dict[str, list[str]]:
        """The same for each component that has some."""
        found: dict[str, list[str]] = self._loader.get_list_adapters()
        return found

    @property
    def active(self) -> list[str]:
        """Those that are on."""
        on = (layer.active_adapters for layer in self._layers() if not layer.disable_adapters)
        return sorted({name for names in on for name in names})

    def change(self, method: str, *arguments: Any, **named: Any) -> None:
        """Calls a method of diffusers' pipeline that switches LoRAs, and gives the engines the weights that follow from
        it. Raises UserError where diffusers refuses."""
        self._ask(method, *arguments, **named)
        self._apply()

    def _layers(self) -> Iterator[Any]:
        """peft's, of all parts."""
        return (layer for part in self._parts for layer in self._part(part).modules() if hasattr(layer, "lora_A"))

    def _part(self, name: str) -> torch.nn.Module:
        network: torch.nn.Module = getattr(self._loader, name)
        return network

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        try:
            return getattr(self._loader, method)(*arguments, **named)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"{method}: {reason}; loaded are {', '.join(self.names) or 'no LoRAs'}") from None

    def _apply(self) -> None:
        added = {part: _added(part, self._part(part)) for part in self._parts}
        for part in self._parts:
            getattr(self._pipeline, part).add_to_weights(added[part])


def _unwritten(module: EngineModule) -> torch.nn.Module:
    """The network that an engine was compiled from, in its type. Its memory is reserved, and never touched."""
    return torch.nn.Module.to(module.network_without_weights(), module.dtype).to_empty(device="cpu")


def _added(part: str, network: torch.nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """What the LoRAs that are on add to each weight, by the weight's name in the graph; computed when it is asked for."""
    added: dict[str, Callable[[], torch.Tensor]] = {}
    for name, layer in network.named_modules():
        if not hasattr(layer, "lora_A") or layer.disable_adapters:
            continue
        used = [one for one in layer.active_adapters if one in layer.lora_A and layer.scaling[one]]
        if strange := next((one for one in used if layer.use_dora.get(one) or layer.lora_bias.get(one)), None):
            raise UserError(f"the LoRA {strange} is a DoRA or has biases: fuse it by python -m export onnx --lora FILE")
        if used:
            added[wrappers.weight_name(part, f"{name}.weight")] = partial(_difference, layer, used)
    return added


def _difference(layer: Any, adapters: list[str]) -> torch.Tensor:
    """What LoRAs add to the weight of one layer, each with its scale, in fp32."""
    return torch.stack([layer.get_delta_weight(one).detach().float() for one in adapters]).sum(0)
