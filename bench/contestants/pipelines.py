"""Contestants that are diffusers pipelines, and those that torch runs: eager and compiled."""

from __future__ import annotations

import gc
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.contestants.contestant import Contestant, Mark
from bench.contestants.hooks import StageHooks, unet_hash
from bench.contestants.pictures import Pictures
from bench.workload import SCHEDULERS, Workload
from distill.checkpoints.sampling import Sampling, sampling_of
from distill.models.architectures import find_architecture

if TYPE_CHECKING:
    import torch


PRECISIONS = ("fp32", "bf16", "fp16")


def _dtype(precision: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@dataclass
class PipelineContestant(Contestant):
    """Common part: everything but how the pipeline is made. `source` is a path or any source the project knows."""

    source: str = ""

    def make_pipeline(self) -> Any:
        raise NotImplementedError

    @cached_property
    def pipe(self) -> Any:
        pipe = self.make_pipeline()
        pipe.set_progress_bar_config(disable=True)
        self._hooks = StageHooks(pipe)
        self._schedulers = {"default": pipe.scheduler}
        self._hooks.watch_noise(pipe.scheduler)
        return pipe

    def load(self) -> None:
        _ = self.pipe

    def unload(self) -> None:
        import torch

        for name in ("pipe", "_hooks", "_schedulers"):
            self.__dict__.pop(name, None)
        torch._dynamo.reset()  # what was compiled holds its weights and its CUDA graphs
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def draw_watched(self, workload: Workload) -> Pictures:
        import torch

        _ = self.pipe
        self._hooks.noise_preds = []
        try:
            pictures = self.draw(workload, lambda _: None)
            if self._hooks.noise_preds:
                pictures.noise_preds = torch.stack(self._hooks.noise_preds).numpy()
        finally:
            self._hooks.noise_preds = None
        return pictures

    @property
    def vae_dtype(self) -> str | None:
        vae = self.pipe.vae
        dtype = str(getattr(vae, "dtype", "")).removeprefix("torch.")
        if dtype == "float16" and getattr(vae.config, "force_upcast", False):
            return "float32"  # diffusers decodes so what its config calls unsafe
        return dtype or None

    def weights_hash(self) -> tuple[str | None, str]:
        from distill.checkpoints.folder import checkpoint_hash

        if self.checkpoint is None:
            return None, "no checkpoint is known"
        if not self.random_weights:
            return checkpoint_hash(self.checkpoint_folder()), "the checkpoint's configs and weights"
        return unet_hash(self.pipe.unet), f"the UNet in {self.precision}, made here"

    def _scheduler(self, name: str) -> Any:
        if name not in self._schedulers:
            import diffusers

            kind = getattr(diffusers, str(SCHEDULERS.get(name, name)))
            self._schedulers[name] = kind.from_config(self._schedulers["default"].config)
            self._hooks.watch_noise(self._schedulers[name])
        return self._schedulers[name]

    def draw(self, workload: Workload, mark: Mark) -> Pictures:
        import numpy as np
        import torch

        pipe, last = self.pipe, {}
        self._hooks.mark = mark
        pipe.scheduler = self._scheduler(workload.scheduler)

        def step_end(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            mark("denoise")
            last["latents"] = tensors["latents"]
            return tensors

        images = pipe(
            workload.batch_prompts(),
            negative_prompt=None if workload.negative_prompt is None else [workload.negative_prompt] * workload.batch,
            width=workload.resolution.width,
            height=workload.resolution.height,
            num_inference_steps=workload.steps,
            guidance_scale=workload.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(workload.seed),
            callback_on_step_end=step_end,
            output_type="np",
        ).images
        pixels = (images * 255).round().astype(np.uint8)
        mark("post_process")
        return Pictures(pixels, last["latents"])


@dataclass
class EagerContestant(PipelineContestant):
    """diffusers as it comes. The VAE goes through fp32 where its config says that fp16 overflows (diffusers' own rule).

    `random:NAME` is made on the device itself, never written to disk.
    """

    _: KW_ONLY
    precision: str = "fp32"
    runtime: str = "diffusers eager"
    accumulates_fp32: bool = True

    @cached_property
    def folder(self) -> Path:
        """The diffusers folder of `source`. Raises UserError."""
        from distill.checkpoints.sources import resolve

        return resolve(self.source, self.workdir)

    @property
    def checkpoint(self) -> str:
        """One among its artifacts, else its source."""
        return super().checkpoint or self.source

    @property
    def sampling(self) -> Sampling | None:
        return None if self.source.startswith("random:") else sampling_of(self.folder)

    def checkpoint_folder(self) -> Path:
        return self.folder if self.checkpoint == self.source else super().checkpoint_folder()

    def check(self) -> None:
        kind, _, name = self.source.partition(":")
        _ = find_architecture(name) if kind == "random" else self.folder

    def make_pipeline(self) -> Any:
        from distill.checkpoints.load import load_pipeline
        from distill.checkpoints.random_weights import random_pipeline

        kind, _, name = self.source.partition(":")
        if kind == "random":
            return random_pipeline(name, self.device, _dtype(self.precision))
        return load_pipeline(self.folder, _dtype(self.precision)).to(self.device)


@dataclass
class CompiledContestant(EagerContestant):
    """diffusers with channels_last, fused QKV projections and torch.compile on the UNet and the VAE decoder; on a GPU
    the UNet is replayed as CUDA graphs. The VAE is not: one that goes through fp32 has no fixed addresses.

    Every shape is compiled for itself. torch would draw the ninth uncompiled, without a word: here one too many is an
    error.
    """

    _: KW_ONLY
    runtime: str = "diffusers + torch.compile"
    backend: str = "inductor"

    def make_pipeline(self) -> Any:
        import torch
        from diffusers import AutoencoderKL

        dynamo = torch._dynamo.config
        dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = dynamo.accumulated_recompile_limit, True
        pipe = super().make_pipeline()
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        pipe.fuse_qkv_projections(vae=isinstance(pipe.vae, AutoencoderKL))
        graphs = "reduce-overhead" if self.device.startswith("cuda") else None
        pipe.unet = torch.compile(pipe.unet, backend=self.backend, mode=graphs, dynamic=False)
        pipe.vae.decode = torch.compile(pipe.vae.decode, backend=self.backend, dynamic=False)
        return pipe
