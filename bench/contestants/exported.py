"""Contestants that run an export: ONNX Runtime by optimum, and a bundle of any flavor."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.contestants.inventory import read_optional
from bench.contestants.pipelines import PipelineContestant
from distill.checkpoints.sampling import Sampling, sampling_of
from distill.common.errors import UserError
from distill.models.resolution import Resolution
from engines.choices import EIGHT_BITS

if TYPE_CHECKING:
    from engines.bundle import Engine
    from engines.choices import Layout, Precision


@dataclass
class OptimumContestant(PipelineContestant):
    """optimum's ONNX Runtime pipeline over an ONNX folder."""

    _: KW_ONLY
    precision: str = "as exported"
    runtime: str = "optimum ONNX Runtime"

    @property
    def sampling(self) -> Sampling | None:
        return sampling_of(Path(self.source))

    @property
    def _made_from(self) -> dict[str, Any]:
        """What the ONNX folder says of its checkpoint."""
        record = read_optional(Path(self.source) / "slimxl.json")
        source = record.get("source") if isinstance(record, dict) else None
        return source if isinstance(source, dict) else {}

    @property
    def random_weights(self) -> bool:
        return str(self._made_from.get("name")).startswith("random:") or super().random_weights

    def weights_hash(self) -> tuple[str | None, str]:
        if isinstance(digest := self._made_from.get("sha256"), str):
            return digest, "the checkpoint's configs and weights, as the export says"
        return super().weights_hash()

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
        _ = self._selected

    @cached_property
    def _selected(self) -> dict[str, list[Engine]]:
        """The engines that it will load, by component. Raises UserError where there are none."""
        from engines.bundle import read_manifest
        from engines.selection import choose_flavor, select_engines

        manifest = read_manifest(Path(self.source))
        backend = choose_flavor(manifest, self.flavor, self.device)
        return select_engines(manifest, backend, self.device, self.layout, precision=self.unet_precision)

    @property
    def sizes(self) -> tuple[Resolution, ...]:
        texts = [
            list(dict.fromkeys(text for engine in self._selected[name] for text in engine.resolutions))
            for name in ("unet", "vae_decoder")
        ]
        return tuple(Resolution.parse(text) for text in texts[0] if text in texts[1])

    @property
    def random_weights(self) -> bool:
        from engines.bundle import read_manifest

        return read_manifest(Path(self.source)).source.name.startswith("random:")

    def weights_hash(self) -> tuple[str | None, str]:
        from engines.bundle import read_manifest

        return read_manifest(
            Path(self.source)
        ).source.sha256, "the checkpoint's configs and weights, as the bundle says"

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
