from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from distill.checkpoints.folder import file_hashes, read_config
from distill.checkpoints.load import load_component
from distill.checkpoints.sources import resolve
from distill.checkpoints.tensors import component_weights
from distill.common.errors import UserError
from distill.common.files import read_json
from distill.models.conditioning import SD, SDXL, Conditioning
from distill.models.resolution import Resolution
from export.checkpoint.prepare import prepare, with_loras, with_vae
from export.checks.verify import verify_folder
from export.components import COMPONENTS
from export.folder import export_checkpoint
from export.job import ExportOptions, component_precision

HASH = "of the checkpoint"


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
    fused = with_loras(mini_vega, HASH, [(loras[0], 0.5), (loras[1], 2.0)], tmp_path)
    ours = load_component(fused, "unet", torch.float32).state_dict()
    before = load_component(mini_vega, "unet", torch.float32).state_dict()
    assert ours.keys() == before.keys()
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


def text_encoder_lora(checkpoint: Path, naming: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A LoRA on every linear layer of both text encoders, and by layer what it adds to the weight at scale 1."""
    generator = torch.Generator().manual_seed(0)
    tensors, added = {}, {}
    for prefix, component in (("lora_te1", "text_encoder"), ("lora_te2", "text_encoder_2")):
        for key, weight in load_component(checkpoint, component, torch.float32).state_dict().items():
            if "layers" not in key or "norm" in key or not key.endswith("weight"):
                continue
            layer = key.removesuffix(".weight")
            down, up = (torch.randn(size, generator=generator) for size in ((4, weight.shape[1]), (weight.shape[0], 4)))
            added[f"{component}/{key}"] = up @ down
            if naming == "kohya":  # its alpha of 2 over a rank of 4 halves what is added
                name = f"{prefix}_{layer.replace('.', '_')}"
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors[f"{name}.alpha"] = torch.tensor(2.0)
                added[f"{component}/{key}"] *= 0.5
            else:
                tensors |= {f"{component}.{layer}.lora_A.weight": down, f"{component}.{layer}.lora_B.weight": up}
    save_file(tensors, folder / f"{naming}.safetensors")
    return folder / f"{naming}.safetensors", added


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
def test_a_lora_of_text_encoders_is_fused_too(mini_vega: Path, naming: str, tmp_path: Path) -> None:
    file, added = text_encoder_lora(mini_vega, naming, tmp_path)
    fused = with_loras(mini_vega, HASH, [(file, 0.5)], tmp_path)
    for component in ("text_encoder", "text_encoder_2", "unet"):
        before, after = (load_component(folder, component, torch.float32).state_dict() for folder in (mini_vega, fused))
        assert before.keys() == after.keys()
        for key, weight in before.items():
            expected = weight + 0.5 * added.pop(f"{component}/{key}", torch.zeros(()))
            torch.testing.assert_close(after[key], expected, rtol=1e-5, atol=1e-5)
    assert not added


def test_a_dora_of_diffusers_is_fused_as_its_equation_says(mini_vega: Path, tmp_path: Path) -> None:
    """m (W + s BA) / |W + s BA|, norms by row of the output (arXiv 2402.09353, equation 5)."""
    unet = load_component(mini_vega, "unet", torch.float32)
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=4, target_modules=["proj_in"], init_lora_weights=False, use_dora=True))
    state = get_peft_model_state_dict(unet)
    state = {key: 1.5 * tensor if "magnitude" in key else tensor for key, tensor in state.items()}
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, weight_name="dora.safetensors")
    fused = with_loras(mini_vega, HASH, [(tmp_path / "dora.safetensors", 0.5)], tmp_path)
    after = load_component(fused, "unet", torch.float32).state_dict()
    magnitudes = [key for key in state if "magnitude" in key]
    assert len(magnitudes) == 10
    for key in magnitudes:
        layer = key.partition(".lora_magnitude_vector")[0]
        moved = before[f"{layer}.weight"] + 0.5 * state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
        expected = state[key].reshape(-1, 1) * moved / moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(after[f"{layer}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_that_changed_in_its_place_is_fused_anew(
    mini_vega: Path, loras: list[Path], tmp_path: Path
) -> None:
    """As a student that was trained again."""
    checkpoint = shutil.copytree(mini_vega, tmp_path / "student")
    [file] = component_weights(checkpoint / "unet")
    for value in (1.0, 2.0):
        save_file(load_file(file) | {"conv_in.bias": torch.full((32,), value)}, file, {"format": "pt"})
        fused, hashes = prepare(checkpoint, file_hashes(checkpoint), "stock", [(loras[0], 1.0)], (), tmp_path)
        assert hashes == file_hashes(fused)
        assert (load_component(fused, "unet", torch.float32).conv_in.bias == value).all()


def test_a_disk_too_small_for_a_fused_checkpoint_is_seen_before_it_is_made(
    mini_vega: Path, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"random-mini-vega with its LoRAs needs .* MB .*another --workdir"):
        with_loras(mini_vega, HASH, [(loras[0], 1.0)], tmp_path)


def test_what_was_exported_is_recorded_and_verify_sees_it_change(
    mini_vega: Path, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lora, vae, out = Path("lora.safetensors"), Path("vae"), tmp_path / "out"
    shutil.copyfile(loras[0], lora)
    shutil.copytree(mini_vega / "vae", vae)
    options = ExportOptions(components=("text_encoder",), loras=((lora, 0.5),), vae="vae")
    export_checkpoint(mini_vega, out, options=options, workdir=tmp_path)
    about = read_json(out / "slimxl.json")
    assert [(lora["file"], lora["scale"]) for lora in about["loras"]] == [(str(tmp_path / "lora.safetensors"), 0.5)]
    assert about["exported_sha256"] != about["source"]["sha256"]
    monkeypatch.chdir("/")
    verify_folder(out, mini_vega, workdir=tmp_path)
    for file in (tmp_path / vae / "diffusion_pytorch_model.safetensors", tmp_path / lora):
        save_file({key: 2 * tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
        with pytest.raises(UserError, match=rf"the (LoRA|VAE) {tmp_path}/(lora|vae).* changed since .* export again"):
            verify_folder(out, mini_vega, workdir=tmp_path)
    assert (out / "text_encoder").is_dir()


def test_vaes_of_equal_weights_and_other_configs_are_told_apart(mini_vega: Path, tmp_path: Path) -> None:
    folders = []
    for factor in (0.5, 0.25):
        vae = shutil.copytree(mini_vega / "vae", tmp_path / str(factor))
        config = read_json(vae / "config.json") | {"scaling_factor": factor}
        (vae / "config.json").write_text(json.dumps(config))
        folders.append(with_vae(mini_vega, str(vae), tmp_path / "work"))
        assert read_config(folders[-1], "vae")["scaling_factor"] == factor
    assert folders[0] != folders[1]
    (folders[0] / "vae").unlink()
    assert with_vae(mini_vega, str(tmp_path / "0.5"), tmp_path / "work") == folders[0]
    assert read_config(folders[0], "vae")["scaling_factor"] == 0.5  # made again


def test_a_vae_of_another_latent_space_is_refused(mini_vega: Path, tmp_path: Path) -> None:
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    AutoencoderTiny(latent_channels=16, **widths, **blocks).save_pretrained(tmp_path / "flux")
    with pytest.raises(UserError, match=r"flux has 16 latent channels, the UNet of .* 4"):
        with_vae(mini_vega, str(tmp_path / "flux"), tmp_path)


@pytest.mark.parametrize("layers", [r"mid_block.*to_q", r".*to_q"])  # none of them is there, and some are
def test_a_lora_of_another_architecture_is_refused(
    mini_sdxl: Path, mini_vega: Path, layers: str, tmp_path: Path
) -> None:
    unet = load_component(mini_sdxl, "unet", torch.float32)
    unet.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), weight_name="mid.safetensors"
    )
    with pytest.raises(UserError, match="does not fit"):
        with_loras(mini_vega, HASH, [(tmp_path / "mid.safetensors", 1.0)], tmp_path)


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


@pytest.mark.parametrize("vae", ["fp16-fix", "tiny"])
def test_a_named_vae_is_fetched_from_its_repository(
    mini_vega: Path, tiny_vae: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"madebyollin/sdxl-vae-fp16-fix": mini_vega / "vae", "madebyollin/taesdxl": tiny_vae}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(folders[repo_id]))
    checkpoint = with_vae(mini_vega, vae, tmp_path)
    kind = {"fp16-fix": "AutoencoderKL", "tiny": "AutoencoderTiny"}[vae]
    assert type(load_component(checkpoint, "vae", torch.float16)).__name__ == kind
    assert read_json(checkpoint / "model_index.json")["vae"] == ["diffusers", kind]
    config = read_config(checkpoint, "vae") | {"force_upcast": False}
    assert component_precision("vae_decoder", ExportOptions(vae=vae), SDXL, config) == "fp16"
    assert with_vae(mini_vega, vae, tmp_path) == checkpoint  # the second time it is there


@pytest.mark.parametrize(
    ("kind", "vae", "upcast", "precision"),
    [
        (SDXL, "stock", False, "fp32"),
        (SDXL, "own", True, "fp32"),
        (SD, "stock", True, "fp16"),
        (SD, "own", True, "fp16"),
    ],
)  # diffusers' AutoencoderKL says force_upcast wherever its config does not; the pipelines of SD 1.x and 2.x do not read it
def test_only_a_vae_that_overflows_stays_in_fp32(kind: Conditioning, vae: str, upcast: bool, precision: str) -> None:
    config = {"force_upcast": upcast}
    assert component_precision("vae_decoder", ExportOptions(vae=vae), kind, config) == precision


@pytest.mark.parametrize("vae", ["fp16-fix", "tiny"])
def test_a_named_vae_out_of_reach_is_one_line(
    mini_vega: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"cannot be had from the Hugging Face hub.*local folder") as refusal:
        with_vae(mini_vega, vae, tmp_path / "work")
    assert "\n" not in str(refusal.value) and not (tmp_path / "work").exists()


def test_what_is_no_vae_is_refused(mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allowed are stock, fp16-fix, tiny, or a folder"):
        with_vae(mini_vega, "tinny", tmp_path)
    with pytest.raises(UserError, match="'UNet2DConditionModel'"):
        with_vae(mini_vega, str(mini_vega / "unet"), tmp_path)
    with pytest.raises(UserError, match="'fp16-fix' for this model: allowed are stock, tiny, or a folder"):
        with_vae(resolve("random:mini-sd-1.5", tmp_path), "fp16-fix", tmp_path)  # SDXL's: of another latent space


def test_a_plain_checkpoint_is_taken_as_it_is(mini_vega: Path, tmp_path: Path) -> None:
    hashes = file_hashes(mini_vega)
    assert prepare(mini_vega, hashes, "stock", [], (), tmp_path) == (mini_vega, hashes)
    assert not list(tmp_path.iterdir())
