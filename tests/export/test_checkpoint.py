from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from distill.architectures import Resolution
from distill.errors import UserError
from distill.files import read_json
from distill.sources import load_component, read_config
from export.checkpoint import prepare, with_loras, with_vae
from export.components import COMPONENTS
from export.folder import ExportOptions, export_checkpoint


@pytest.fixture(scope="module")
def loras(mini_vega: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRA files in diffusers' format, of other layers each."""
    folder = tmp_path_factory.mktemp("loras")
    files = []
    for index, targets in enumerate((["to_q", "to_v"], ["to_q", "ff.net.2"])):
        torch.manual_seed(index)
        unet = load_component(mini_vega, "unet", torch.float32)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
        state = get_peft_model_state_dict(unet)
        StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=state, weight_name=f"{index}.safetensors")
        files.append(folder / f"{index}.safetensors")
    return files


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TAESDXL's class, narrow."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**widths, num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)).save_pretrained(folder)
    return folder


def test_loras_are_fused_in_order_with_their_scales(mini_vega: Path, loras: list[Path], tmp_path: Path) -> None:
    fused = with_loras(mini_vega, [(loras[0], 0.5), (loras[1], 2.0)], tmp_path)
    ours = load_component(fused, "unet", torch.float32).state_dict()
    before = load_component(mini_vega, "unet", torch.float32).state_dict()
    assert ours.keys() == before.keys()
    from safetensors.torch import load_file

    expected = {key: tensor.clone() for key, tensor in before.items()}
    for file, scale in zip(loras, (0.5, 2.0), strict=True):
        pairs = load_file(file)
        for key in [key for key in pairs if key.endswith("lora_A.weight")]:
            layer = key.removeprefix("unet.").removesuffix(".lora_A.weight")
            expected[f"{layer}.weight"] += scale * pairs[key.replace("lora_A", "lora_B")] @ pairs[key]
    changed = [key for key in expected if not torch.equal(expected[key], before[key])]
    assert len(changed) == 30 + 30 + 15  # to_q and to_v of 15 blocks' two attentions, and their feed-forward
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-5)


def test_a_fused_checkpoint_is_exported_and_recorded(mini_vega: Path, loras: list[Path], tmp_path: Path) -> None:
    options = ExportOptions(components=("text_encoder",), loras=((loras[0], 0.5),))
    export_checkpoint(mini_vega, tmp_path / "out", options=options, workdir=tmp_path)
    about = read_json(tmp_path / "out" / "slimxl.json")
    assert [(Path(lora["file"]), lora["scale"]) for lora in about["loras"]] == [(loras[0], 0.5)]
    assert about["exported_sha256"] != about["source"]["sha256"]


def test_a_file_that_is_no_lora_is_refused(mini_vega: Path, tmp_path: Path) -> None:
    weights = mini_vega / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="no LoRA weights"):
        with_loras(mini_vega, [(weights, 1.0)], tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        with_loras(mini_vega, [(tmp_path / "absent.safetensors", 1.0)], tmp_path)


def test_a_lora_of_another_architecture_is_refused(mini_sdxl: Path, mini_vega: Path, tmp_path: Path) -> None:
    unet = load_component(mini_sdxl, "unet", torch.float32)
    unet.add_adapter(LoraConfig(r=2, target_modules=r"mid_block.*to_q", init_lora_weights=False))
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), weight_name="mid.safetensors"
    )
    with pytest.raises(UserError, match="does not fit"):
        with_loras(mini_vega, [(tmp_path / "mid.safetensors", 1.0)], tmp_path)


def test_a_tiny_vae_is_exported(mini_vega: Path, tiny_vae: Path, tmp_path: Path) -> None:
    options = ExportOptions(components=("vae_decoder", "vae_encoder"), precision="fp16", vae=str(tiny_vae))
    export_checkpoint(mini_vega, tmp_path / "out", options=options, workdir=tmp_path)
    about = read_json(tmp_path / "out" / "slimxl.json")["vae"]
    assert (about["class"], about["precision"], about["pixels_per_latent"]) == ("AutoencoderTiny", "fp16", 8)
    assert read_json(tmp_path / "out" / "model_index.json")["vae"] == ["diffusers", "AutoencoderTiny"]
    vae = AutoencoderTiny.from_pretrained(tiny_vae)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "vae_decoder" / "model.onnx"))
    latents = torch.randn(1, 4, 12, 20)
    [picture] = session.run(None, {"latent_sample": latents.numpy().astype(np.float16)})
    with torch.no_grad():
        expected = vae.decode(latents).sample.numpy()
    assert np.abs(picture - expected).max() < 0.02 * np.abs(expected).max()
    [spec] = COMPONENTS["vae_encoder"].outputs(read_config(tiny_vae.parent, tiny_vae.name), Resolution(160, 96), 1)
    assert (spec.name, spec.shape) == ("latent_sample", (1, 4, 12, 20))


def test_what_is_no_vae_is_refused(mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allowed are stock, fp16-fix, tiny, or a folder"):
        with_vae(mini_vega, "tinny", tmp_path)
    with pytest.raises(UserError, match="'UNet2DConditionModel'"):
        with_vae(mini_vega, str(mini_vega / "unet"), tmp_path)


def test_a_plain_checkpoint_is_taken_as_it_is(mini_vega: Path, tmp_path: Path) -> None:
    assert prepare(mini_vega, "stock", [], tmp_path) == mini_vega
    assert not list(tmp_path.iterdir())
