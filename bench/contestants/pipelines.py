"""Contestants that are diffusers pipelines: eager, compiled, ONNX Runtime by optimum, and a bundle of any flavor.

The pipeline's own sampler runs unchanged; the stages are seen from outside, at places diffusers makes public: the
tokenizers, `encode_prompt`, the progress bar, the end of each step, and the image processor.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.contestants.contestant import Contestant, Mark
from bench.contestants.pictures import Pictures
from bench.workload import SCHEDULERS, Workload
from distill.checkpoints.sampling import Sampling, sampling_of
from distill.common.errors import UserError
from distill.models.architectures import find_architecture
from engines.choices import EIGHT_BITS

if TYPE_CHECKING:
    import torch

    from engines.choices import Layout, Precision

PRECISIONS = ("fp32", "bf16", "fp16")


def _dtype(precision: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


class StageHooks:
    """Puts marks around the stages of a diffusers pipeline. `mark` is set anew for every call."""

    def __init__(self, pipe: Any) -> None:
        self.mark: Mark = lambda _: None
        for name, part in pipe.components.items():
            if name.startswith("tokenizer") and part is not None:
                self._watch_tokenizer(part)
        self._after(pipe, "encode_prompt", "prepare", "text_encoders")
        self._after(pipe, "progress_bar", "prepare", None)
        self._after(pipe.image_processor, "postprocess", "vae_decode", None)

    def _watch_tokenizer(self, tokenizer: Any) -> None:
        hooks, kind = self, type(tokenizer)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            hooks.mark("text_encoders")
            result = kind.__call__(self, *args, **kwargs)
            hooks.mark("tokenise")
            return result

        # special methods are looked up on the class, so the instance gets a subclass of its own
        tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call})

    def _after(self, owner: Any, method: str, before: str, after: str | None) -> None:
        """Marks `before` when `owner.method` is entered, and `after` when it returns."""
        original = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.mark(before)
            result = original(*args, **kwargs)
            if after is not None:
                self.mark(after)
            return result

        setattr(owner, method, watched)


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
        return pipe

    def load(self) -> None:
        _ = self.pipe

    def _scheduler(self, name: str) -> Any:
        if name not in self._schedulers:
            import diffusers

            kind = getattr(diffusers, str(SCHEDULERS.get(name, name)))
            self._schedulers[name] = kind.from_config(self._schedulers["default"].config)
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


@dataclass
class OptimumContestant(PipelineContestant):
    """optimum's ONNX Runtime pipeline over an ONNX folder."""

    _: KW_ONLY
    precision: str = "as exported"
    runtime: str = "optimum ONNX Runtime"

    @property
    def sampling(self) -> Sampling | None:
        return sampling_of(Path(self.source))

    def check(self) -> None:
        if not (Path(self.source) / "unet" / "model.onnx").is_file():
            raise UserError(
                f"{self.source} is no ONNX folder (no unet/model.onnx): make one with python -m export onnx"
            )
        try:
            import optimum.onnxruntime  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"contestant {self.name!r} needs the optional package optimum-onnx ({error}); "
                "install it with: pip install optimum-onnx 'transformers<4.58'"
            ) from None

    def make_pipeline(self) -> Any:
        import optimum.onnxruntime

        from engines.onnx_folder import read_conditioning

        kind = getattr(optimum.onnxruntime, read_conditioning(Path(self.source)).onnx_pipeline)
        provider = "CUDAExecutionProvider" if self.device.startswith("cuda") else "CPUExecutionProvider"
        return kind.from_pretrained(self.source, provider=provider)


@dataclass
class BundleContestant(PipelineContestant):
    """A slimxl bundle: the sampler is diffusers' own, the networks are engines of one flavor and, where the bundle has
    several, of one layout and the UNet in one precision."""

    _: KW_ONLY
    precision: str = "as built"
    runtime: str = "slimxl bundle"
    flavor: str | None = None
    layout: Layout | None = None
    unet_precision: Precision | None = None
    cuda_graphs: bool = True

    @property
    def sampling(self) -> Sampling | None:
        from engines.bundle import read_manifest

        return read_manifest(Path(self.source)).source.sampling

    def check(self) -> None:
        from engines.bundle import read_manifest
        from engines.selection import choose_flavor, select_engines

        manifest = read_manifest(Path(self.source))
        backend = choose_flavor(manifest, self.flavor, self.device)
        select_engines(manifest, backend, self.device, self.layout, precision=self.unet_precision)

    def make_pipeline(self) -> Any:
        import engines

        pipe = engines.load(
            self.source,
            self.flavor,
            device=self.device,
            layout=self.layout,
            precision=self.unet_precision,
            cuda_graphs=self.cuda_graphs,
        )
        unet = pipe.unet.component.engines[0][0]
        self.runtime = self.runtime.replace("default flavor", unet.flavor)
        self.precision = unet.precision if unet.precision in EIGHT_BITS else self.precision
        return pipe

    @property
    def engines(self) -> list[str]:
        """sha256 of every engine that was loaded."""
        modules = [part for part in self.pipe.components.values() if hasattr(part, "component")]
        return [engine.files[0].sha256 for module in modules for engine, _ in module.component.engines]
