"""Which transformer blocks matter: the change of noise_pred when one block alone is left out.

Leaving a block out means passing its input on (it is residual, so this is the block's own contribution removed). The
score is the relative mean square change of noise_pred, averaged over samples and over timesteps from all noise levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.architectures import Depth, find_architecture
from distill.cache import LatentCache
from distill.checkpoints import alphas_cumprod_of
from distill.files import replacing, write_json
from distill.progress import say, track
from distill.sources import find_architecture_of, load_component
from distill.surgery import LayerMap, make_layer_map, transformer_depths


@dataclass(frozen=True)
class BlockScore:
    """`change[i]` is the relative mean square change of noise_pred at the i-th timestep; `score` their mean."""

    path: str
    index: int
    change: tuple[float, ...]

    @property
    def score(self) -> float:
        return sum(self.change) / len(self.change)


@contextmanager
def left_out(block: nn.Module) -> Iterator[None]:
    """Inside, `block` returns its first input."""
    handle = block.register_forward_hook(lambda _module, inputs, kwargs, _out: _first(inputs, kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _first(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return inputs[0] if inputs else kwargs["hidden_states"]


@torch.no_grad()
def measure_importance(
    unet: nn.Module,
    depth: Depth,
    batch: dict[str, torch.Tensor],
    alphas_cumprod: torch.Tensor,
    timesteps: Sequence[int],
) -> list[BlockScore]:
    """Scores of every transformer block in the order of the forward pass.

    `batch` is one of `LatentCache.batch`'s (latents (n, 4, h, w) and its text and time_ids); the noise is fixed.
    """
    latents = batch["latents"]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    added = {"text_embeds": batch["pooled_prompt_embeds"], "time_ids": batch["time_ids"]}

    def predict(timestep: int) -> torch.Tensor:
        signal = alphas_cumprod[timestep]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        return unet(noisy, timestep, batch["prompt_embeds"], added_cond_kwargs=added).sample.float()

    whole = [predict(timestep) for timestep in timesteps]
    blocks = [(path, index) for path, count in transformer_depths(depth).items() for index in range(count)]
    scores = []
    for path, index in track(blocks, "importance", unit="block"):
        with left_out(unet.get_submodule(f"{path}.transformer_blocks.{index}")):
            change = [
                ((predict(timestep) - before).square().mean() / before.square().mean()).item()
                for timestep, before in zip(timesteps, whole, strict=True)
            ]
        scores.append(BlockScore(path, index, tuple(change)))
    return scores


def propose_layer_map(scores: Sequence[BlockScore], teacher: Depth, student: Depth) -> LayerMap:
    """For each transformer of the student, the teacher's highest-scoring blocks, in their order."""
    explicit = {}
    for path, count in transformer_depths(student).items():
        ranked = sorted((s for s in scores if s.path == path), key=lambda s: s.score, reverse=True)
        explicit[path] = tuple(sorted(score.index for score in ranked[:count]))
    return make_layer_map(explicit, teacher, student)


def report_importance(checkpoint: Path, cache: Path, student: str, out: Path, *, samples: int, timesteps: int) -> None:
    """Measures a checkpoint's UNet and writes `importance.json` (scores, proposed layer map) and `importance.svg`.

    Raises UserError for an unknown student, one deeper than the checkpoint, or an empty cache.
    """
    architecture = find_architecture_of(checkpoint)
    depth, target = architecture.depth, find_architecture(student, architecture.family)
    make_layer_map("first", depth, target.depth)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = LatentCache(cache, batch_size=samples, seed=0).batch(0)
    unet = load_component(checkpoint, "unet", torch.float32).to(device)
    levels = [round((i + 0.5) * 1000 / timesteps) for i in range(timesteps)]
    on_device = {name: value.to(device) for name, value in batch.items()}
    scores = measure_importance(unet, depth, on_device, alphas_cumprod_of(checkpoint).to(device), levels)
    proposed = propose_layer_map(scores, depth, target.depth)
    for score in sorted(scores, key=lambda s: s.score, reverse=True):
        say(f"{score.score:10.5f}  {score.path}.transformer_blocks.{score.index}")
    write_json(
        out / "importance.json",
        {
            "timesteps": levels,
            "blocks": [{"path": s.path, "index": s.index, "score": s.score, "change": s.change} for s in scores],
            "student": student,
            "layer_map": {path: list(blocks) for path, blocks in proposed.items()},
        },
    )
    _plot(scores, proposed, out / "importance.svg")
    say(f"the layer map for {student} is in {out / 'importance.json'}")


def _plot(scores: Sequence[BlockScore], proposed: LayerMap, path: Path) -> None:
    """One bar per block in the order of the forward pass; the kept ones dark."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(max(6, 0.16 * len(scores)), 3.5), layout="constrained")
    kept = [score.index in proposed.get(score.path, ()) for score in scores]
    axes.bar(range(len(scores)), [s.score for s in scores], color=["#1f4e8c" if keep else "#b8c4d4" for keep in kept])
    starts = [i for i, score in enumerate(scores) if score.index == 0]
    axes.set_xticks(starts, [scores[i].path for i in starts], rotation=60, ha="right", fontsize=7)
    axes.set(
        yscale="log", ylabel="relative change of noise_pred", title="Each block left out alone; dark ones are kept"
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg")
    plt.close(figure)
