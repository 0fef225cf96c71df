"""Which transformer blocks matter: the change of noise_pred when one block alone is left out.

Leaving a block out means passing its input on (it is residual, so this is the block's own contribution removed). The
score is the relative mean square change of noise_pred, averaged over samples and over timesteps from all noise levels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.checkpoints.folder import alphas_cumprod_of, find_architecture_of
from distill.checkpoints.load import load_component
from distill.common.errors import require_least
from distill.common.files import replacing, write_json
from distill.common.ownership import require_our_folder
from distill.common.progress import say, track
from distill.data.cache import LatentCache
from distill.models.architectures import find_architecture
from distill.models.conditioning import call_unet
from distill.models.depth import Depth
from distill.models.module_map import ModuleMap, make_module_map
from distill.training.text import TextEncoders


@dataclass(frozen=True)
class BlockScore:
    """`change[i]` is the relative mean square change of noise_pred at the i-th timestep; `score` their mean."""

    path: str
    index: int
    change: tuple[float, ...]

    @property
    def block(self) -> str:
        """Its module path."""
        return f"{self.path}.transformer_blocks.{self.index}"

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

    `batch` is one of `LatentCache.batch`'s (latents (n, 4, h, w) and what else the UNet takes); the noise is fixed.
    """
    latents = batch["latents"]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)

    def predict(timestep: int) -> torch.Tensor:
        signal = alphas_cumprod[timestep]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        return call_unet(unet, {**batch, "sample": noisy, "timestep": timestep}).float()

    whole = [predict(timestep) for timestep in timesteps]
    blocks = [(path, index) for path, count in depth.transformers.items() for index in range(count)]
    scores = []
    for path, index in track(blocks, "importance", unit="block"):
        with left_out(unet.get_submodule(f"{path}.transformer_blocks.{index}")):
            change = [
                ((predict(timestep) - before).square().mean() / before.square().mean()).item()
                for timestep, before in zip(timesteps, whole, strict=True)
            ]
        scores.append(BlockScore(path, index, tuple(change)))
    return scores


def propose_layer_map(scores: Sequence[BlockScore], modules: ModuleMap) -> dict[str, tuple[int, ...]]:
    """For each transformer of the student, the highest-scoring blocks of its teacher's, in their order."""
    proposed = {}
    for path, count in modules.student.transformers.items():
        source = modules.paths[path]
        ranked = sorted((s for s in scores if s.path == source), key=lambda s: s.score, reverse=True)
        proposed[path] = tuple(sorted(score.index for score in ranked[:count]))
    return proposed


def report_importance(
    checkpoint: Path, cache: str | Path, student: str, out: Path, *, samples: int, timesteps: int
) -> None:
    """Measures a checkpoint's UNet and writes `importance.json` (scores, proposed layer map) and `importance.svg`.

    Raises UserError for an unknown student, one deeper than the checkpoint, a number out of range, an empty cache, or an
    `out` that holds something else.
    """
    require_least(1, samples=samples, timesteps=timesteps)
    require_our_folder(out, "an importance study", ["importance.json"], ("blocks", "layer_map"))
    architecture = find_architecture_of(checkpoint)
    depth, target = architecture.depth, find_architecture(student, architecture.family)
    modules = make_module_map("first", depth, target.depth)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    latents = LatentCache(cache, batch_size=samples, seed=0)
    if others := latents.check_teacher(checkpoint):
        say(f"warning: the cache was made with other files of {', '.join(others)} than {checkpoint} has")
    batch = latents.batch(0)
    if not latents.holds_text:
        batch = TextEncoders.load(checkpoint, torch.float32, torch.device("cpu")).encoded(batch)
    unet = load_component(checkpoint, "unet", torch.float32).to(device)
    levels = [round((i + 0.5) * 1000 / timesteps) for i in range(timesteps)]
    on_device = {name: value.to(device) for name, value in batch.items()}
    scores = measure_importance(unet, depth, on_device, alphas_cumprod_of(checkpoint).to(device), levels)
    proposed = propose_layer_map(scores, modules)
    kept = set(make_module_map(proposed, depth, target.depth).paths.values())
    for line in describe(scores, kept, levels):
        say(line)
    write_json(
        out / "importance.json",
        {
            "timesteps": levels,
            "blocks": [{"path": s.path, "index": s.index, "score": s.score, "change": s.change} for s in scores],
            "student": student,
            "layer_map": {path: list(blocks) for path, blocks in proposed.items()},
        },
    )
    _plot(scores, kept, out / "importance.svg")
    say(f"the layer map for {student} is in {out / 'importance.json'}")


def describe(scores: Sequence[BlockScore], kept: Collection[str], timesteps: Sequence[int]) -> list[str]:
    """The ranked table: the mean change, the change at each timestep, and which blocks the proposed map keeps."""
    heads = "".join(f"{f't={timestep}':>10}" for timestep in timesteps)
    lines = [
        "relative mean square change of noise_pred with one block left out; * is kept",
        f"{'rank':>4}{'mean':>10}{heads}",
    ]
    for rank, score in enumerate(sorted(scores, key=lambda s: s.score, reverse=True), 1):
        mark = "*" if score.block in kept else " "
        changes = "".join(f"{change:10.2g}" for change in (score.score, *score.change))
        lines.append(f"{rank:4}{changes}  {mark} {score.block}")
    return lines


def _plot(scores: Sequence[BlockScore], kept: Collection[str], path: Path) -> None:
    """One bar per block in the order of the forward pass, grouped by transformer; the kept ones dark."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(max(7, 0.17 * len(scores)), 4), layout="constrained")
    for keep, color, label in ((True, "#1f4e8c", "kept"), (False, "#b8c4d4", "left out")):
        bars = [i for i, s in enumerate(scores) if (s.block in kept) == keep]
        axes.bar(bars, [scores[i].score for i in bars], color=color, label=label)
    starts = [i for i, score in enumerate(scores) if score.index == 0]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], len(scores)], strict=True)]
    names = [scores[i].path.replace("_blocks", "").replace("_block", "").replace("attentions.", "") for i in starts]
    axes.set_xticks(middles, names, rotation=45, ha="right", fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-1, len(scores))
    axes.set(
        yscale="log",
        ylabel="relative change of noise_pred",
        title="Each transformer block left out alone, by transformer",
    )
    axes.legend(frameon=False, ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg")
    plt.close(figure)
