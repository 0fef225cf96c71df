from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from distill.common.errors import UserError
from distill.common.files import read_json
from distill.models.resolution import Resolution
from export.checks.vae_safety import overflowing_share
from export.folder import export_checkpoint
from export.job import ExportOptions


@pytest.fixture(scope="module")
def overflowing_vae(mini_vega: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As SDXL's stock VAE: right in fp32, its activations beyond fp16's 65504."""
    folder = tmp_path_factory.mktemp("overflowing")
    vae = AutoencoderKL.from_pretrained(mini_vega / "vae")
    with torch.no_grad():
        for block in (*vae.decoder.up_blocks, *vae.encoder.down_blocks):
            for resnet in block.resnets:
                resnet.conv2.weight.mul_(1e6)
    vae.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["vae_decoder", "vae_encoder"])
def test_a_vae_that_overflows_in_half_precision_is_not_left(
    name: str, mini_vega: Path, overflowing_vae: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def export(**options: str) -> None:
        chosen = ExportOptions(components=(name,), vae=str(overflowing_vae), **options)  # type: ignore[arg-type]
        export_checkpoint(mini_vega, out, options=chosen, workdir=tmp_path)

    with pytest.raises(UserError, match=r"overflows in fp16.*--vae-precision fp32"):
        export()
    assert not (out / name).exists()
    export(vae_precision="fp32")
    config = read_json(out / name / "config.json")
    assert overflowing_share(name, out / name / "model.onnx", config, Resolution(96, 64), "fp32") == 0


def test_the_stock_vae_stays_in_single_precision(onnx_fp16: Path) -> None:
    assert read_json(onnx_fp16 / "vae_decoder" / "export.json")["precision"] == "fp32"
    assert read_json(onnx_fp16 / "unet" / "export.json")["precision"] == "fp16"
