"""Finds the ranges of a UNet's layers: forward hooks look at their inputs while the checkpoint's own pipeline draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.checkpoints.load import load_pipeline
from distill.common.errors import UserError, require_least
from distill.common.files import exclusive, replacing, sha256_json
from distill.common.progress import say, track
from distill.models.resolution import Resolution
from export.quantise.layers import KEEP, is_kept
from export.quantise.ranges import (
    BINS,
    BINS_AN_OCTAVE,
    LOWEST,
    Range,
    Ranges,
    percentiles_of,
    read_ranges,
    write_ranges,
)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is drawn: prompt number i at the size number i, in turn, with the seed `seed` + i."""

    prompts: tuple[str, ...]
    resolutions: tuple[Resolution, ...]
    steps: int = 20
    guidance_scale: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_least(1, steps=self.steps)
        require_least(0, guidance_scale=self.guidance_scale, seed=self.seed)

    @property
    def about(self) -> dict[str, Any]:
        """For the record, and for the name of the file."""
        return {
            "prompts": len(self.prompts),
            "prompts_sha256": sha256_json(self.prompts),
            "resolutions": [str(resolution) for resolution in self.resolutions],
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
        }

    def draw(self, pipe: Any, index: int, prompt: str) -> None:
        """One prompt, for what is seen on the way: no picture is kept."""
        size = self.resolutions[index % len(self.resolutions)]
        pipe(
            prompt,
            width=size.width,
            height=size.height,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=torch.Generator().manual_seed(self.seed + index),
            output_type="latent",
        )


def layers_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers that may go into 8 bits, by their paths."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not is_kept(name)
    }


class Watch:
    """Hooks on the layers of a network: the largest |x| of each input channel, and of convolutions a histogram of log2 |x|.
    Everything stays on the network's device until it is asked for."""

    def __init__(self, network: nn.Module) -> None:
        self.channels: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        for name, module in layers_of(network).items():
            module.register_forward_pre_hook(self._hook(name, isinstance(module, nn.Conv2d)))

    def _hook(self, name: str, is_conv: bool) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().abs()
            largest = x.amax(dim=[axis for axis in range(x.dim()) if axis != (1 if is_conv else x.dim() - 1)]).float()
            self.channels[name] = torch.maximum(self.channels[name], largest) if name in self.channels else largest
            if is_conv:
                bins = ((x.float().clamp_min(2.0**LOWEST).log2() - LOWEST) * BINS_AN_OCTAVE).long().clamp(0, BINS - 1)
                counted = torch.bincount(bins.ravel(), minlength=BINS)
                self.counts[name] = self.counts[name] + counted if name in self.counts else counted

        return look

    def save(self, path: Path, done: int) -> None:
        arrays: dict[str, Any] = {f"channels/{name}": value.cpu().numpy() for name, value in self.channels.items()}
        arrays |= {f"counts/{name}": value.cpu().numpy() for name, value in self.counts.items()}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays, done=np.array(done))

    def restore(self, path: Path, device: torch.device) -> int:
        """What an interrupted run has seen; returns the number of its prompts, 0 where there was none."""
        if not path.is_file():
            return 0
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                kind, _, name = key.partition("/")
                if name:
                    (self.channels if kind == "channels" else self.counts)[name] = torch.from_numpy(arrays[key]).to(
                        device
                    )
            return int(arrays["done"])

    def require_finite(self) -> None:
        """Raises UserError for the first layer that saw NaN or an infinite number."""
        for name, channels in self.channels.items():
            if not channels.isfinite().all():
                raise UserError(
                    f"calibration: {name} was given numbers that are NaN or infinite; is the checkpoint whole? On a GPU the "
                    "network runs in fp16, --device cpu in fp32"
                )

    def ranges(self) -> dict[str, Range]:
        found = {}
        for name, channels in self.channels.items():
            values = channels.cpu().numpy().astype(np.float64)
            largest = float(values.max())
            counts = self.counts[name].cpu().numpy() if name in self.counts else np.zeros(0)
            found[name] = Range([float(f"{value:.6g}") for value in values], percentiles_of(counts, largest))
        return found


def calibrate(checkpoint: Path, unet_sha256: str, drawing: Drawing, workdir: Path, device: str = "cpu") -> Ranges:
    """The ranges of a checkpoint's UNet while `drawing` is drawn: in fp32 on the CPU, in fp16 on a GPU. They are kept under
    `workdir` by the content of all that decides them; what is there is not drawn again, and an interrupted run goes on
    after its last prompt.

    Raises UserError where the device fails, and where a layer is given NaN or an infinite number.
    """
    key = sha256_json([unet_sha256, drawing.about, device.partition(":")[0], list(KEEP)])[:16]
    path, partial = workdir / f"ranges-{key}.json", workdir / f"ranges-{key}.npz"
    with exclusive(path, say):
        if path.is_file():
            ranges = read_ranges(path)
            say(f"ranges: {path}, of {len(drawing.prompts)} prompts drawn before")
            return ranges
        ranges = Ranges(unet_sha256, drawing.about, _draw(checkpoint, drawing, partial, device))
        write_ranges(path, ranges)
        partial.unlink(missing_ok=True)
    say(f"ranges: {path}, of {len(drawing.prompts)} prompts")
    return ranges


@torch.no_grad()
def _draw(checkpoint: Path, drawing: Drawing, partial: Path, device: str) -> dict[str, Range]:
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    pipe = load_pipeline(checkpoint, torch.float32 if where.type == "cpu" else torch.float16, without=("vae",))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(where)
    watch = Watch(pipe.unet)
    done = watch.restore(partial, where)
    todo = list(enumerate(drawing.prompts))[done:]
    for index, prompt in track(todo, "calibrating", "prompt", done):
        drawing.draw(pipe, index, prompt)
        watch.require_finite()
        watch.save(partial, index + 1)
    return watch.ranges()
