"""A bundle with ControlNets draws under the control of pictures as diffusers does with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ControlNetModel

import engines
from distill.checkpoints.load import load_component, load_pipeline
from distill.checkpoints.sources import resolve
from distill.common.errors import UserError
from distill.models.controls import DOWN, MIDDLE
from engines.building.build import build_bundle
from engines.building.layouts import make_profiles
from engines.onnx_folder import read_onnx_folder
from export import ExportOptions, export_checkpoint
from tests.engines.drawing import MASK, PICTURE, draw, psnr_db, quiet

CONTROL = PICTURE.rotate(90)


def make_controlnet(checkpoint: Path, out: Path, seed: int) -> Path:
    """As one is begun from a UNet, with random numbers in place of the zeros that it starts with."""
    net = ControlNetModel.from_unet(load_component(checkpoint, "unet", torch.float32))
    generator = torch.Generator().manual_seed(seed)
    for part in (net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        for weight in part.parameters():
            torch.nn.init.normal_(weight, std=0.2, generator=generator)
    net.save_pretrained(out)
    return out


@pytest.fixture(scope="module", params=["mini_vega", "mini-sd-1.5"])
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, workdir: Path
) -> tuple[Path, list[Path], Path]:
    """Checkpoint, its ControlNets, and the ONNX folder."""
    is_sdxl = request.param == "mini_vega"
    checkpoint = request.getfixturevalue("mini_vega") if is_sdxl else resolve(f"random:{request.param}", workdir)
    out = tmp_path_factory.mktemp("controlnet")
    nets = [make_controlnet(checkpoint, out / f"net{seed}", seed) for seed in range(2 if is_sdxl else 1)]
    options = ExportOptions(precision="fp32", controlnets=tuple(map(str, nets)), check=False)
    export_checkpoint(checkpoint, out / "onnx", options=options, workdir=out)
    components = list(read_onnx_folder(out / "onnx").components)
    build_bundle(out / "onnx", out / "bundle", gpus=[], flavor="onnxruntime", components=components)
    return checkpoint, nets, out


def test_the_picture_of_diffusers(made: tuple[Path, list[Path], Path]) -> None:
    checkpoint, nets, out = made
    theirs = load_pipeline(checkpoint, torch.float32)
    loaded = [ControlNetModel.from_pretrained(net) for net in nets]
    several = len(nets) > 1
    stem = type(theirs).__name__.removesuffix("Pipeline")
    asked: dict[str, Any] = {"controlnet_conditioning_scale": [0.7, 0.4] if several else 0.7}
    control = [CONTROL, PICTURE] if several else CONTROL
    for task, kind, more in (
        ("controlnet", "ControlNet", {"image": control}),
        ("controlnet", "ControlNet", {"image": control, "guess_mode": True, "control_guidance_end": 0.6}),
        ("controlnet-image-to-image", "ControlNetImg2Img", {"image": PICTURE, "control_image": control}),
        ("controlnet-inpaint", "ControlNetInpaint", {"image": PICTURE, "mask_image": MASK, "control_image": control}),
    ):
        reference = getattr(diffusers, f"{stem}{kind}Pipeline")
        wanted = draw(
            quiet(reference(**theirs.components, controlnet=loaded if several else loaded[0])), **asked, **more
        )
        ours = quiet(engines.load(out / "bundle", task=task))  # type: ignore[arg-type]
        assert isinstance(ours, reference)
        assert psnr_db(draw(ours, **asked, **more), wanted) >= 40, (task, more)


def test_without_a_control_picture_it_draws_as_ever(made: tuple[Path, list[Path], Path]) -> None:
    checkpoint, _, out = made
    assert (
        psnr_db(draw(quiet(engines.load(out / "bundle"))), draw(quiet(load_pipeline(checkpoint, torch.float32)))) > 60
    )


def test_a_profile_has_a_size_for_every_residual(made: tuple[Path, list[Path], Path]) -> None:
    folder = read_onnx_folder(made[2] / "onnx")
    unet, net = (folder.components[name] for name in ("unet", "controlnet"))
    assert [t.name for t in net.outputs] == [t.name for t in unet.inputs if t.name.startswith((DOWN, MIDDLE))]
    for component in (unet, net):
        [[profile]] = make_profiles(component, "ranged", folder.resolutions, [1])
        sample, deepest = profile.shapes["sample"], component.inputs[-1].name
        scale = 8 if component is net else 1 / 2 ** (len(unet.config["block_out_channels"]) - 1)
        assert [side * scale for side in sample.max[2:]] == profile.shapes[deepest].max[2:]
        assert sample.max[0] == profile.shapes[deepest].max[0] == 2


def test_what_cannot_control_is_one_line(mini_vega: Path, tmp_path: Path, toy_bundle: Path) -> None:
    net = make_controlnet(mini_vega, tmp_path / "net", 0)
    config = json.loads((net / "config.json").read_text())

    def export(*nets: Any) -> None:
        options = ExportOptions(controlnets=tuple(map(str, nets)))
        export_checkpoint(mini_vega, tmp_path / "onnx", options=options, workdir=tmp_path)

    for change, told in (
        ({"cross_attention_dim": 96}, "was made for another UNet than that of"),
        ({"global_pool_conditions": True}, "pools its residuals"),
        ({"_class_name": "UNet2DConditionModel"}, "its config.json says 'UNet2DConditionModel'"),
    ):
        (net / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=told):
            export(net)
    (net / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="4 ControlNets are given, 3 can be exported together"):
        export(net, net, net, net)
    with pytest.raises(UserError, match="there is no ControlNet 'nowhere'"):
        export("nowhere")
    assert not (tmp_path / "onnx").exists()
    with pytest.raises(UserError, match=r"no onnxruntime engine for a ControlNet: .*--controlnet FOLDER"):
        engines.load(toy_bundle, "onnxruntime", task="controlnet")
