"""Where a bundle is served: by which flavor, on which GPUs or the CPU, and what it can draw there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from distill.common.errors import UserError
from engines.bundle import Manifest
from engines.flavors import Flavor, find_flavor
from engines.selection import choose_flavor, select_engines


@dataclass(frozen=True)
class Placement:
    """`gpus` are CUDA device numbers; () is the CPU."""

    flavor: str
    gpus: tuple[int, ...]

    @property
    def devices(self) -> list[str]:
        """As torch names them."""
        return [f"cuda:{gpu}" for gpu in self.gpus] or ["cpu"]

    def __str__(self) -> str:
        on = f"GPU {', '.join(map(str, self.gpus))}" if self.gpus else "the CPU"
        return f"({self.flavor}) on {on}"


def parse_devices(text: str) -> tuple[int, ...] | None:
    """CUDA device numbers, () for `none`, None for `auto`. Raises UserError for anything else."""
    if text in ("auto", "none"):
        return None if text == "auto" else ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch("[0-9]{1,4}", part) for part in parts):
        raise UserError(
            f"--gpus {text!r} is not a list of CUDA device numbers, e.g. 0,1; auto and none are allowed too"
        )
    return tuple(dict.fromkeys(map(int, parts)))


def choose_placement(manifest: Manifest, flavor: str | None, gpus: tuple[int, ...] | None) -> Placement:
    """None asks for the first flavor that runs here, and for every GPU here that runs the bundle.

    Raises UserError where flavor and GPUs do not go together.
    """
    if flavor is None and gpus == ():
        flavor = "onnxruntime"
    device = f"cuda:{gpus[0]}" if gpus else None
    backend = choose_flavor(manifest, flavor, device)
    if gpus is None:
        gpus = _fitting_gpus(manifest, backend) if backend.default_device().startswith("cuda") else ()
    if not gpus and backend.name != "onnxruntime":
        raise UserError(f"{backend.name} engines run on a GPU: name it with --gpus 0, or pass --flavor onnxruntime")
    return Placement(backend.name, gpus)


def _fitting_gpus(manifest: Manifest, backend: Flavor) -> tuple[int, ...]:
    """The GPUs of this machine that run the bundle's engines. Raises UserError with a reason where none of them does."""
    import torch

    fitting, refusal = [], None
    for gpu in range(torch.cuda.device_count()):
        try:
            select_engines(manifest, backend, f"cuda:{gpu}")
            fitting.append(gpu)
        except UserError as error:
            refusal = error
    if refusal and not fitting:
        raise refusal
    return tuple(fitting)


def require_runs_here(manifest: Manifest, place: Placement) -> None:
    """Raises UserError where the bundle has no engines for one of these devices. Triton would find out only while it loads
    the model."""
    for device in place.devices:
        select_engines(manifest, find_flavor(place.flavor), device)


def served_sizes(manifest: Manifest, place: Placement) -> tuple[list[str], int]:
    """The image sizes, and the most pictures at once, that every instance of the model can draw.

    They are those of the UNets that `engines.load` selects on each device. Where no GPU here runs them, the server may be
    on another machine: then all UNets of the flavor are taken. Raises UserError where there is none, or the CPU runs none.
    """
    try:
        loaded = [select_engines(manifest, find_flavor(place.flavor), device)["unet"] for device in place.devices]
    except UserError:
        unets = [e for e in manifest.engines if e.component == "unet" and e.flavor == place.flavor]
        if not place.gpus or not unets:
            raise
        loaded = [unets]
    sizes = [[size for engine in engines for size in engine.resolutions] for engines in loaded]
    common = [size for size in dict.fromkeys(sizes[0]) if all(size in others for others in sizes)]
    return common, min(max(batch for engine in engines for batch in engine.batches) for engines in loaded)
