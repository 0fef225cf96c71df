"""The floor: how long the arithmetic and the memory traffic must take on a given machine, whatever the software.

FLOPs are counted on meta tensors (nothing is computed, nothing allocated). Bytes are the least that must move: every
weight once per call, inputs in, outputs out. A component's floor is max(FLOPs / peak, bytes / bandwidth) [Williams
2009, the roofline model]; a measurement below it is a failed measurement.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

from bench.floor.peaks import Peak
from bench.workload import Workload
from distill.checkpoints.folder import network_folders, read_config
from distill.common.files import read_object
from distill.models.architectures import ARCHITECTURES
from distill.models.conditioning import conditioning_of
from distill.models.families import Family, family_of, vae_scale_factor
from distill.models.resolution import Resolution
from engines.choices import EIGHT_BITS
from export.components import COMPONENTS as EXPORTED
from export.components import TEXT_ENCODERS

INDEX = "model_index"
MATRIX_SIDE = 1024


@dataclass(frozen=True)
class Cost:
    """One call of one component. `flops` counts a multiply-add as two; `bytes` assume two bytes a value (fp16)."""

    parameters: int
    flops: float
    bytes: float

    def floor_ms(self, tflops: float, terabytes_per_s: float) -> float:
        return 1e3 * max(self.flops / (tflops * 1e12), self.bytes / (terabytes_per_s * 1e12))


Costs = dict[str, tuple[int, Cost]]
"""Component -> (its calls in one picture or batch, the cost of one)."""


@dataclass(frozen=True)
class ModelConfigs:
    """The configs of a model's networks, by the folder of each, and under `model_index` what its pipeline is told, as
    JSON: hashable, so that counts are made once."""

    texts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, configs: Mapping[str, Mapping[str, Any]]) -> ModelConfigs:
        return cls(tuple((part, json.dumps(config, sort_keys=True)) for part, config in configs.items()))

    @classmethod
    def of_folder(cls, folder: Path) -> ModelConfigs:
        """From a diffusers folder. Raises UserError where a config is missing."""
        networks = {part: read_config(folder, part) for part in network_folders(folder)}
        index = read_object(folder / "model_index.json")
        return cls.of(networks | {INDEX: {name: value for name, value in index.items() if isinstance(value, bool)}})

    @property
    def family(self) -> Family:
        """Raises UserError for a UNet that is conditioned otherwise than any family's."""
        return family_of({part: self.parsed(part) for part, _ in self.texts if part != INDEX})

    @property
    def encodes_no_prompt(self) -> bool:
        """Whether an empty prompt is encoded, and not taken for zeros: as the checkpoint says, else as its kind does."""
        stated = self.parsed(INDEX) if INDEX in dict(self.texts) else {}
        options = conditioning_of(self.parsed("unet")).options | stated
        return not options.get("force_zeros_for_empty_prompt")

    @property
    def is_narrow(self) -> bool:
        """Whether the model is one of the mini families'."""
        return self.family.vocabulary is not None

    def parsed(self, part: str) -> dict[str, Any]:
        """The config of one network, or what `model_index` says."""
        return {key: value for key, value in json.loads(self.text(part)).items() if not key.startswith("_")}

    def text(self, part: str) -> str:
        """The same as JSON."""
        return dict(self.texts)[part]


@lru_cache(maxsize=32)
def _network(component: str, config_json: str) -> Any:
    """The component on the meta device, called with its tensors in the order of `export.components`."""
    import torch

    from distill.models.networks import make_network
    from export.graph.wrappers import wrap

    with torch.device("meta"):
        return wrap(component, make_network(EXPORTED[component].source, json.loads(config_json)))


@cache
def count_cost(component: str, config_json: str, tokens: int, height: int, width: int, batch: int) -> Cost:
    """FLOPs and least bytes of one call; `height` and `width` in latent pixels (ignored by the text encoders)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network, config, about = _network(component, config_json), json.loads(config_json), EXPORTED[component]
    pixels = vae_scale_factor(config) if component == "vae_decoder" else 1  # of the size given below, a latent pixel
    sizes = {"text_length": tokens, "vae_scale_factor": 1}
    specs = about.inputs(config | sizes, Resolution(width * pixels, height * pixels), batch, "fp32")
    inputs = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in specs]
    with FlopCounterMode(display=False) as counter:
        output = network(*inputs)[-1]  # of a text encoder the output of the layer before the last
    parameters = sum(
        value.numel()
        for name, value in network.named_parameters()
        if not name.partition(".")[2].startswith(about.unused)
    )
    read = parameters
    if component in TEXT_ENCODERS:  # of the embedding table only the rows of the tokens are read
        read -= config["hidden_size"] * max(0, config["vocab_size"] - tokens)
    moved = 2.0 * (read + sum(one.numel() for one in (*inputs, output)))
    return Cost(parameters, float(counter.get_total_flops()), moved)


@cache
def _flops_polynomial(component: str, config_json: str, tokens: int, unit: int) -> tuple[float, float, float]:
    """FLOPs of one sample as a + b n + c n² in latent pixels n: convolutions and linear layers are linear in n,
    self-attention quadratic, embeddings constant. So three counts give every size exactly."""
    import numpy as np

    sides = (unit * 2, unit * 3, unit * 4)
    flops = [count_cost(component, config_json, tokens, side, side, 1).flops for side in sides]
    pixels = np.array([float(side * side) for side in sides])
    c, b, a = np.linalg.solve(np.vander(pixels, 3), np.array(flops))
    return float(a), float(b), float(c)


def component_costs(configs: ModelConfigs, workload: Workload) -> Costs:
    """For each component in the order of a picture (calls per image call, cost of one). Under guidance the text
    encoders run for the negative prompt too, and for the empty one where the model encodes it."""
    unet = configs.parsed("unet")
    conditioning, unit, latent = conditioning_of(unet), EXPORTED["unet"].size_multiple(unet), unet["in_channels"]
    scale = vae_scale_factor(configs.parsed("vae"))
    tokens = configs.parsed(conditioning.encoders[0])["max_position_embeddings"]
    rows = workload.batch if unet.get("time_cond_proj_dim") else workload.unet_batch  # told w, a UNet takes one pass
    encodes_two = configs.encodes_no_prompt or workload.negative_prompt is not None
    prompts = rows // workload.batch if encodes_two else 1
    pixels = (workload.resolution.height // scale) * (workload.resolution.width // scale)
    costs = {}
    for component in (*conditioning.encoders, "unet", "vae_decoder"):
        config_json = configs.text(EXPORTED[component].source)
        if component in conditioning.encoders:
            costs[component] = (prompts, count_cost(component, config_json, tokens, 0, 0, workload.batch))
            continue
        batch = rows if component == "unet" else workload.batch
        parameters = count_cost(component, config_json, tokens, unit * 2, unit * 2, 1).parameters
        a, b, c = _flops_polynomial(component, config_json, tokens, unit)
        outputs = latent if component == "unet" else 3 * scale * scale  # per latent pixel
        moved = 2.0 * (parameters + batch * pixels * (latent + outputs))
        cost = Cost(parameters, batch * (a + b * pixels + c * pixels**2), moved)
        costs[component] = (workload.steps if component == "unet" else 1, cost)
    return costs


def total_flops(costs: Costs) -> float:
    return sum(calls * cost.flops for calls, cost in costs.values())


def total_floor_ms(costs: Costs, peak: Peak, precision: str = "fp16") -> float | None:
    """Of a picture whose UNet computes in `precision`, the rest in fp16. In 8 bits every operation of the UNet counts at
    the faster rate and every weight as one byte, those that stay in half precision too: so it is a floor still. None where
    the board has no such arithmetic."""
    unet_tflops = peak.tflops_in(precision)
    if unet_tflops is None:
        return None
    total = 0.0
    for name, (calls, cost) in costs.items():
        tflops = peak.tflops
        if name == "unet" and precision in EIGHT_BITS:
            tflops, cost = unet_tflops, replace(cost, bytes=cost.bytes - cost.parameters)
        total += calls * cost.floor_ms(tflops, peak.terabytes_per_s)
    return total


def measure_cpu_peak(precisions: Iterable[str] = (), seconds: float = 0.6) -> Peak:
    """This CPU's rate in a large matrix product, in fp32 or whichever of `precisions` is faster (bf16, fp16), and its copy
    bandwidth, each the best of several short tries.

    No data sheet is consulted, so this is what torch reaches here: a yardstick, close to the peak but not above it.
    """
    import torch

    threads = torch.get_num_threads()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(usable)
    try:
        halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtypes = {"fp32": torch.float32} | {name: halves[name] for name in precisions if name in halves}
        flops = {}
        for name, dtype in dtypes.items():
            a, b = torch.rand(2, MATRIX_SIDE, MATRIX_SIDE).to(dtype)
            flops[name] = 2 * MATRIX_SIDE**3 / _least_seconds(partial(torch.mm, a, b), seconds / 2)
        source, target = torch.rand(16 << 20), torch.empty(16 << 20)
        bandwidth = 2 * source.numel() * 4 / _least_seconds(partial(target.copy_, source), seconds / 2)
    finally:
        torch.set_num_threads(threads)
    fastest = max(flops, key=lambda name: flops[name])
    return Peak(f"this CPU (measured, {fastest})", flops[fastest] / 1e12, bandwidth / 1e12, "")


def _least_seconds(work: Callable[[], Any], seconds: float) -> float:
    """Of several calls after the first, for `seconds` and three of them at least."""
    work()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 3:
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def architecture_configs(name: str) -> ModelConfigs:
    return ModelConfigs.of(ARCHITECTURES[name].configs)
