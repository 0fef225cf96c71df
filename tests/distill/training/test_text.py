"""Text that is encoded in each step, and what is drawn of a row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.data.cache import LatentCache
from distill.data.make_cache import make_cache
from distill.training.objectives import Distill
from distill.training.options import TrainOptions
from distill.training.step import add_noise
from distill.training.trainer import train
from tests.distill.small_runs import curve, short_recipe


@pytest.fixture(scope="module")
def online(mini_vega: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    make_cache(mini_vega, "shapes:45", folder, text="online")
    return folder


def test_online_text_gives_the_losses_of_cached_text(
    mini_vega: Path, cache: Path, online: Path, tmp_path: Path
) -> None:
    """Dropped captions too; what differs is that cached text was rounded to fp16."""
    assert (online / "shard-000000.safetensors").stat().st_size < (
        cache / "shard-000000.safetensors"
    ).stat().st_size / 2
    assert not LatentCache(online, batch_size=1, seed=0).holds_text
    recipe = replace(short_recipe(mini_vega), caption_dropout=0.4)
    curves = []
    for folder in (cache, online):
        out = tmp_path / folder.name
        train(recipe, cache=folder, out=out, workdir=tmp_path, options=TrainOptions(log_every=1, accumulation=2))
        curves.append(curve(out))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_what_is_drawn_of_a_row_is_the_same_however_the_batch_is_shared(cache: Path) -> None:
    latents, alphas = LatentCache(cache, batch_size=6, seed=0), torch.linspace(0.99, 0.01, 1000)

    def drawn(rows: slice, seed: tuple[int, ...] = (0, 1, 7)) -> dict[str, torch.Tensor]:
        batch = latents.batch(7, rows)
        return add_noise(Distill(), batch, alphas, seed=seed, caption_dropout=0.5, first_row=rows.start)

    whole, parts = drawn(slice(0, 6)), [drawn(slice(i, i + 2)) for i in (0, 2, 4)]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([part[name] for part in parts])), name
    assert len(whole["timestep"].unique()) > 3 and 0 < whole["dropped"].sum() < 6
    assert not torch.equal(whole["noise"], drawn(slice(0, 6), (0, 1, 8))["noise"])
    assert whole["noise"].flatten(1).corrcoef().fill_diagonal_(0).abs().max() < 0.1
