"""Which profile serves a call, and how batches that fit none are cut or padded."""

from __future__ import annotations

import pytest
import torch

from distill.common.errors import UserError
from engines import component as component_file
from engines.bundle import Engine, Manifest, Profile, ShapeRange
from engines.component import EngineComponent
from engines.modules.vae import EngineVAE


class Doubler:
    """Stands for a loaded engine: checks that what it is given fits the profile, and doubles it."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def run(self, inputs: dict[str, torch.Tensor], profile: Profile) -> dict[str, torch.Tensor]:
        for name, shape in profile.shapes.items():
            sides = list(inputs[name].shape)
            assert shape.covers(ShapeRange(min=sides, opt=sides, max=sides)), (name, sides, shape)
        self.calls.append((profile.index, inputs["latent_sample"].shape[0]))
        return {"sample": inputs["latent_sample"] * 2}


def component(manifest: Manifest, *rows: tuple[int, int]) -> tuple[EngineComponent, Doubler]:
    """A VAE with one profile for each (least, most) number of rows."""
    engine: Engine = next(e for e in manifest.engines if e.component == "vae_decoder")
    profiles = [
        Profile(
            index=index,
            resolutions=["128x128"],
            batch=most,
            shapes={"latent_sample": ShapeRange(min=[least, 4, 2, 2], opt=[most, 4, 2, 2], max=[most, 4, 2, 2])},
        )
        for index, (least, most) in enumerate(rows)
    ]
    doubler = Doubler()
    return EngineComponent([(engine.model_copy(update={"profiles": profiles}), doubler)], "cpu"), doubler


@pytest.mark.parametrize(
    "profiles, rows, calls",
    [
        ([(1, 2)], 1, [(0, 1)]),
        ([(1, 2)], 5, [(0, 2), (0, 2), (0, 1)]),
        ([(2, 2)], 1, [(0, 2)]),
        ([(2, 2)], 3, [(0, 2), (0, 2)]),
        ([(2, 2), (8, 8)], 2, [(0, 2)]),
        ([(2, 2), (8, 8)], 8, [(1, 8)]),
        ([(2, 2), (8, 8)], 10, [(1, 8), (0, 2)]),
        ([(8, 8), (1, 8)], 3, [(1, 3)]),
    ],
)
@pytest.mark.filterwarnings("ignore:the vae_decoder plan")
def test_any_batch_on_any_profile(
    toy_manifest: Manifest, profiles: list[tuple[int, int]], rows: int, calls: list[tuple[int, int]]
) -> None:
    vae, doubler = component(toy_manifest, *profiles)
    latents = torch.arange(rows * 16.0).reshape(rows, 4, 2, 2)
    for _ in range(2):  # the second time from the remembered choice
        assert torch.equal(vae.run({"latent_sample": latents}, "128x128")["sample"], latents * 2)
    assert doubler.calls == calls * 2


def test_a_range_serves_the_sizes_between_those_it_names(toy_manifest: Manifest) -> None:
    vae, doubler = component(toy_manifest, (1, 2))
    [(engine, _)] = vae.engines
    range_ = ShapeRange(min=[1, 4, 2, 2], opt=[1, 4, 4, 4], max=[2, 4, 8, 8])
    profile = engine.profiles[0].model_copy(update={"shapes": {"latent_sample": range_}})
    sizes = {"profiles": [profile], "resolutions": ["128x128"]}
    ranged, shared = (
        EngineComponent([(engine.model_copy(update=sizes | {"layout": layout}), doubler)], "cpu")
        for layout in ("ranged", "shared")
    )
    between, outside = torch.ones(1, 4, 3, 5), torch.ones(1, 4, 9, 4)
    assert torch.equal(ranged.run({"latent_sample": between}, "40x24")["sample"], between * 2)
    with pytest.raises(UserError, match="it has 128x128 and what lies between"):
        ranged.run({"latent_sample": outside}, "32x72")
    with pytest.raises(UserError, match="it has 128x128; ask"):
        shared.run({"latent_sample": between}, "40x24")


def test_an_engine_moves_to_no_other_gpu(toy_manifest: Manifest) -> None:
    vae, _ = component(toy_manifest, (1, 2))
    vae.device = torch.device("cuda:0")
    module = EngineVAE(vae, {"block_out_channels": [1]})
    for same in ("cuda", "cuda:0", torch.float16, None):
        assert module.to(same) is module
    for other in ("cuda:1", "cpu"):
        with pytest.raises(
            UserError, match=f"vae_decoder engine is on cuda:0 and cannot move to {other}; load it there"
        ):
            module.to(other)


def test_padding_is_said_once(toy_manifest: Manifest) -> None:
    component_file._warn_of_padding.cache_clear()
    vae, _ = component(toy_manifest, (2, 2))
    with pytest.warns(UserWarning, match="this call is padded.*--guidance never"):
        vae.run({"latent_sample": torch.zeros(1, 4, 2, 2)}, "128x128")
