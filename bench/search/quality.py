"""What leaving modules out of a teacher costs: the change of its noise_pred, before any training.

The measure is the relative mean square change, averaged over pictures and noise levels: the output loss of LAPTOP-Diff
(arXiv 2404.11098, equation 4), divided by the output's own mean square so that no noise level outweighs the others. Modules
are passed by inside the teacher, which computes the same as the student that surgery would make, and faster the more is out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.common.files import sha256_json
from distill.models.conditioning import call_unet


@contextmanager
def passed_by(unet: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Inside, the modules at `paths` hand on what they are given: a ResNet of the way up its first channels, without the
    skip connection."""
    outer = [path for path in paths if not any(_is_inside(path, other) for other in paths)]
    changed = [(unet.get_submodule(path), _passing(path, unet.get_submodule(path))) for path in outer]
    for module, forward in changed:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in changed:
            del module.forward  # the class's own is seen again


def _is_inside(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


def _passing(path: str, module: nn.Module) -> Any:
    kind = path.split(".")[-2] if "." in path else path

    def hand_on(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        if kind == "attentions":  # Transformer2DModel, asked for a tuple
            return (hidden_states,)
        return hidden_states[:, : module.out_channels] if kind == "resnets" else hidden_states

    return hand_on


class Quality:
    """Scores students of one teacher. Every score is kept in a file as it comes, so a search that was stopped goes on where
    it was, and none is computed twice."""

    def __init__(
        self,
        unet: nn.Module,
        batches: Sequence[dict[str, torch.Tensor]],
        alphas_cumprod: torch.Tensor,
        timesteps: Sequence[int],
        kept: Path,
    ) -> None:
        """`batches` are of `LatentCache.batch`, with their text; `kept` is a file of one JSON object a line."""
        self._unet, self._timesteps, self._alphas, self._kept = unet, timesteps, alphas_cumprod, kept
        generator = torch.Generator().manual_seed(0)
        self._batches = [
            (batch, torch.randn(batch["latents"].shape, generator=generator).to(batch["latents"])) for batch in batches
        ]
        self._scores = _read_scores(kept)
        self._whole: list[torch.Tensor] | None = None
        self.computed = 0
        """Scores that were not in the file."""

    @property
    def passes(self) -> int:
        """UNet passes of one score."""
        return len(self._batches) * len(self._timesteps)

    @torch.no_grad()
    def change(self, dropped: Collection[str]) -> float:
        """The relative mean square change of noise_pred without the modules `dropped`."""
        if not dropped:
            return 0.0
        key = _key(dropped)
        if key not in self._scores:
            if self._whole is None:
                self._whole = list(self._predictions())
            with passed_by(self._unet, dropped):
                changes = [
                    ((now - before).square().mean() / before.square().mean()).item()
                    for now, before in zip(self._predictions(), self._whole, strict=True)
                ]
            self._scores[key] = sum(changes) / len(changes)
            self.computed += 1
            with self._kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"dropped": key, "change": self._scores[key]}) + "\n")
        return self._scores[key]

    def _predictions(self) -> Iterator[torch.Tensor]:
        for batch, noise in self._batches:
            for timestep in self._timesteps:
                signal = self._alphas[timestep]
                noisy = signal.sqrt() * batch["latents"] + (1 - signal).sqrt() * noise
                yield call_unet(self._unet, {**batch, "sample": noisy, "timestep": timestep}).float()


def _key(dropped: Collection[str]) -> str:
    return sha256_json(sorted(path for path in dropped if not any(_is_inside(path, other) for other in dropped)))[:16]


def _read_scores(path: Path) -> dict[str, float]:
    """A last line that a killed run left half written counts as none."""
    scores = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for line in lines:
        if line.endswith("\n"):
            one = json.loads(line)
            scores[one["dropped"]] = one["change"]
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")
    return scores
