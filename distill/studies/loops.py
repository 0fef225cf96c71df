"""The ways to take a training step that are compared, all on the same teacher, student, optimiser and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.checkpoints.folder import alphas_cumprod_of, find_architecture_of
from distill.checkpoints.load import load_component, load_pipeline
from distill.checkpoints.random_weights import random_pipeline
from distill.checkpoints.sources import resolve
from distill.checkpoints.surgery import make_student_unet
from distill.common.files import write_json
from distill.data.cache import KEY_FILE, UNCONDITIONAL, LatentCache, shard_name
from distill.data.cache_index import INDEX, write_index
from distill.data.make_cache import encode, write_shard, write_unconditional
from distill.data.pictures import Sample, ShapesSource
from distill.data.samples import Text
from distill.models.architectures import ARCHITECTURES, Architecture, find_architecture
from distill.models.conditioning import Conditioning
from distill.models.families import Family
from distill.models.module_map import ModuleMap, make_module_map
from distill.models.networks import make_network
from distill.studies.published import published_steps
from distill.studies.published_lcm import W_HIGH, W_LOW, published_lcm_steps
from distill.training.accelerator import COMPUTE_DTYPE, make_accelerator
from distill.training.objectives import Consistency, Distill, GuidanceRange, Objective
from distill.training.objectives.taps import Level
from distill.training.options import BenchOptions, TrainOptions
from distill.training.recipes import Recipe
from distill.training.step import Pair
from distill.training.text import TextEncoders

LEARNING_RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One way to take a training step. `features` None compares predictions alone; `online` encodes captions in each step,
    and has the latents cached; `lcm` is latent consistency distillation."""

    name: str
    features: Level | None = None
    cache: bool = True
    online: bool = False
    published: bool = False
    compiled: bool = False
    lcm: bool = False


LOOPS = (
    Loop(name="published", features="sub-block", cache=False, published=True),
    Loop(name="sub-block, no cache", features="sub-block", cache=False),
    Loop(name="output only"),
    Loop(name="block", features="block"),
    Loop(name="sub-block", features="sub-block"),
    Loop(name="sub-block, text online", features="sub-block", online=True),
    Loop(name="layer", features="layer"),
    Loop(name="self-attention", features="self-attention"),
    Loop(name="sub-block, compiled", features="sub-block", compiled=True),
    Loop(name="published LCM", cache=False, published=True, lcm=True),
    Loop(name="LCM", lcm=True),
)


def base_samples(family: Family, count: int) -> list[Sample]:
    """Captioned pictures, all of the family's base resolution."""
    source = ShapesSource(count * len(family.resolutions), family, seed=0)
    return [source.read(index * len(family.resolutions)) for index in range(count)]


class Encoding:
    """What the trainer asks its cache for, computed anew in every step."""

    def __init__(self, pipe: Any, conditioning: Conditioning, samples: list[Sample]) -> None:
        self.pipe, self.conditioning, self.samples = pipe, conditioning, samples

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        encoded = encode(self.pipe, self.conditioning, self.samples, step)
        return {name: value.float().cpu() for name, value in encoded.items()}


class Setup:
    """Teacher, student and optimiser as the trainer pairs them, and the same captioned pictures as pixels and as a cache."""

    def __init__(self, options: BenchOptions, loops: Sequence[Loop], folder: Path) -> None:
        teacher, student = architectures_of(options)
        settings = TrainOptions(
            mixed_precision=options.mixed_precision,
            gradient_checkpointing=options.gradient_checkpointing,
            optimizer=options.optimizer,
            compile=any(loop.compiled for loop in loops),
        )
        self.accelerator = make_accelerator(settings, folder)
        dtype = COMPUTE_DTYPE[options.mixed_precision]
        self.samples = base_samples(teacher.family, options.batch)
        self.resolution = self.samples[0].resolution
        modules = make_module_map("first", teacher.depth, student.depth)
        if options.model.startswith("random:"):
            self.pipe, nets, alphas_cumprod = _make_random(teacher, student, dtype, self.device)
        else:
            self.pipe, nets, alphas_cumprod = _load(options, student, modules, dtype, folder)
        self.pipe.vae.float()
        self.pipe.to(self.device)
        self.conditioning = teacher.family.conditioning
        self.cache = self._make_cache(folder / "cached", "cached")
        self.online = self._make_cache(folder / "online", "online")
        encoders = None
        if any(loop.online for loop in loops):
            networks = {name: getattr(self.pipe, name) for name in self.conditioning.encoders}
            encoders = TextEncoders(self.conditioning, networks)
        if all(loop.cache for loop in loops):
            self.pipe = None
        self.pair = Pair(
            self.accelerator,
            *nets,
            modules,
            alphas_cumprod,
            self.cache.unconditional,
            Recipe(name="bench", stages=(), batch_size=options.batch),
            settings,
            text_encoders=encoders,
        )
        for group in self.pair.optimizer.param_groups:  # for the published loop, which sets none
            group["lr"] = LEARNING_RATE
        self.number = 0

    def _make_cache(self, folder: Path, text: Text) -> LatentCache:
        shard = folder / shard_name(0)
        write_shard(
            self.pipe, self.conditioning, {self.resolution: self.samples}, [], shard, seed=0, batch=4, text=text
        )
        write_unconditional(self.pipe, self.conditioning, folder / UNCONDITIONAL)
        write_index(folder / INDEX, [shard])
        write_json(folder / KEY_FILE, {"shards": 1})
        return LatentCache(folder, batch_size=len(self.samples), seed=0)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def idle_bytes(self, loop: Loop) -> int:
        """What VAE and text encoders hold on the device for other loops, where this one has a cache instead."""
        used = self.conditioning.encoders if loop.online else ()
        parts = self.pipe.components if self.pipe and loop.cache else {}
        networks = [part for name, part in parts.items() if isinstance(part, torch.nn.Module) and name not in used]
        return sum(value.nbytes for network in networks for value in network.state_dict().values())

    @contextmanager
    def stepping(self, loop: Loop) -> Iterator[Callable[[], float]]:
        """A function that takes one step of `loop` and returns its loss."""
        with torch.compiler.set_stance("default" if loop.compiled else "force_eager"), self._stepping(loop) as step:
            try:
                yield step
            finally:  # a step that failed leaves gradients
                self.pair.optimizer.zero_grad()

    @contextmanager
    def _stepping(self, loop: Loop) -> Iterator[Callable[[], float]]:
        if loop.published:
            published = published_lcm_steps if loop.lcm else published_steps
            with published(self.pair, self.pipe, self.samples) as step:
                yield step
            return
        objective: Objective = Distill(level=loop.features) if loop.features else Distill(feature=0.0)
        if loop.lcm:
            objective = Consistency(guidance=GuidanceRange(low=W_LOW, high=W_HIGH, embedding=None))
        cached = self.online if loop.online else self.cache
        batches = cached if loop.cache else Encoding(self.pipe, self.conditioning, self.samples)
        with self.pair.taught_by(objective) as take_step:

            def step() -> float:
                self.number += 1
                noised = self.pair.noised(objective, batches.batch(self.number), (0, self.number))
                return take_step(noised, self.number, learning_rate=LEARNING_RATE)["total"]

            yield step


Nets = tuple[Any, tuple[Any, Any], torch.Tensor]
"""A pipeline without its UNet, the UNets of teacher and student, and the signal variance per timestep."""


def _load(options: BenchOptions, student: Architecture, modules: ModuleMap, dtype: torch.dtype, folder: Path) -> Nets:
    """A checkpoint and a student cut from it."""
    checkpoint = resolve(options.model, options.workdir)
    make_student_unet(checkpoint, student, modules, folder / "unet")
    nets = load_component(checkpoint, "unet", dtype), load_component(folder, "unet", torch.float32).train()
    return load_pipeline(checkpoint, dtype, without=("unet",)), nets, alphas_cumprod_of(checkpoint)


def _make_random(teacher: Architecture, student: Architecture, dtype: torch.dtype, device: torch.device) -> Nets:
    """Both with random weights, made on the device itself: speed and memory do not depend on them."""
    pipe = random_pipeline(teacher.name, str(device), dtype)
    unet, pipe.unet = pipe.unet, None
    with device:
        trained = make_network("unet", student.unet_config).train()
    return pipe, (unet, trained), pipe.scheduler.alphas_cumprod.float()


def architectures_of(options: BenchOptions) -> tuple[Architecture, Architecture]:
    """Teacher and student; the student is by default the teacher's family's SSD-1B."""
    kind, _, name = options.model.partition(":")
    teacher = (
        find_architecture(name) if kind == "random" else find_architecture_of(resolve(options.model, options.workdir))
    )
    default = next(a for a in ARCHITECTURES.values() if a.family is teacher.family and a.name.endswith("ssd-1b"))
    return teacher, find_architecture(options.student, teacher.family) if options.student else default
