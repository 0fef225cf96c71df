"""Contestants by name: `KIND[@OPTION]:SOURCE` on the command line becomes something that draws.

eager@fp16:random:vega          diffusers as it comes, in fp32, bf16 or fp16
compiled@bf16:path/to/folder    the same with torch.compile, fused QKV, channels_last
optimum:path/to/onnx            optimum's ONNX Runtime pipeline
bundle@onnxruntime:path         a slimxl bundle, by one of its flavors; +shared (or another layout), +int8 (or another
                                precision of its UNet) and +no-graphs follow it
fake:denoise=10,vae_decode=25   known delays

+taught behind an option (eager@fp32+taught, bundle@onnxruntime+taught) lets a few-step model draw in its own steps, at its
own guidance scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from bench.contestants.contestant import Contestant
from distill.common.errors import UserError, unknown

KINDS = ("eager", "compiled", "optimum", "bundle", "fake")


@dataclass(frozen=True)
class Spec:
    """A contestant as named on the command line, before anything is loaded."""

    name: str
    kind: str
    option: str | None
    source: str

    def __str__(self) -> str:
        option = f"@{self.option}" if self.option else ""
        return f"{self.kind}{option}:{self.source}"

    @classmethod
    def parse(cls, text: str) -> Spec:
        """`NAME=KIND[@OPTION]:SOURCE`. Raises UserError."""
        name, equals, rest = text.partition("=")
        kind_option, colon, source = rest.partition(":")
        if not (equals and colon and name):
            raise UserError(
                f"contestant {text!r} is not of the form NAME=KIND[@OPTION]:SOURCE, e.g. vega=eager@fp16:random:vega"
            )
        kind, _, option = kind_option.partition("@")
        if kind not in KINDS:
            raise unknown("kind of contestant", kind, KINDS)
        if not source and kind != "fake":
            raise UserError(f"contestant {text!r} names no model or folder after the colon")
        return cls(name, kind, option or None, source)


def parse_specs(texts: list[str]) -> list[Spec]:
    """Raises UserError for none at all, or for a name given twice."""
    specs = [Spec.parse(text) for text in texts]
    if not specs:
        raise UserError("no contestants: give at least one as NAME=KIND[@OPTION]:SOURCE")
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"contestant name {name!r} is given twice; every contestant needs a name of its own")
    return specs


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises UserError for an unknown device, and for cuda where torch sees no GPU, with the driver that may be why."""
    import torch

    from engines.gpus import driver_at_hand

    if device not in ("cpu", "cuda"):
        raise unknown("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        found, made_for = driver_at_hand(), f"torch {torch.__version__} is made for CUDA {torch.version.cuda or 'none'}"
        driver = f" (driver {found[0]} runs CUDA {found[1]} at most, {made_for})" if found else ""
        raise UserError(f"device cuda: torch sees no NVIDIA GPU here{driver}; --device cpu runs on the CPU")


def make_contestant(spec: Spec, device: str, **about: Any) -> Contestant:
    """Nothing is loaded yet; `about` is what else a Contestant is told. Raises UserError for an option that the kind does
    not have."""
    from bench.contestants import exported, pipelines
    from bench.contestants.fake import FakeContestant

    about |= {"spec": str(spec)}
    if spec.kind == "fake":
        return FakeContestant.parse(spec.name, spec.source, **about)
    words = (spec.option or "").split("+")
    option = "+".join(word for word in words if word != "taught")
    about |= {"device": device, "as_taught": "taught" in words}
    if spec.kind in ("eager", "compiled"):
        precision = option or ("fp16" if device.startswith("cuda") else "fp32")
        if precision not in pipelines.PRECISIONS:
            raise unknown("precision", precision, pipelines.PRECISIONS)
        kind = pipelines.EagerContestant if spec.kind == "eager" else pipelines.CompiledContestant
        return kind(spec.name, spec.source, precision=precision, **about)
    if spec.kind == "optimum":
        return exported.OptimumContestant(spec.name, spec.source, **about)
    return exported.BundleContestant(spec.name, spec.source, **_bundle_options(option), **about)


def _bundle_options(option: str) -> dict[str, Any]:
    """`FLAVOR[+LAYOUT][+PRECISION][+no-graphs]`, in any order behind the flavor."""
    from engines.choices import Layout, Precision

    flavor, *choices = option.split("+")
    layouts, precisions = get_args(Layout), get_args(Precision)
    for choice in choices:
        if choice not in (known := (*layouts, *precisions, "no-graphs")):
            raise unknown("way to run a bundle", choice, known)
    ways = [choice for choice in choices if choice not in precisions]
    return {
        "runtime": f"slimxl bundle, {', '.join([flavor or 'default flavor', *ways])}",
        "flavor": flavor or None,
        "layout": next((layout for layout in layouts if layout in choices), None),
        "unet_precision": next((precision for precision in precisions if precision in choices), None),
        "cuda_graphs": "no-graphs" not in choices,
    }
