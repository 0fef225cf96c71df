"""Single files are made here by an inverse of their own, and diffusers' converter is the judge of the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from distill.checkpoints.assemble import component_shapes, meta_components
from distill.checkpoints.folder import find_architecture_of, network_folders, prediction_type_of, read_config
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.single_file import _unet_name
from distill.checkpoints.sources import resolve
from distill.checkpoints.tensors import component_tensors, component_weights
from distill.common.errors import UserError
from distill.data.make_cache import make_cache
from distill.models.architectures import ARCHITECTURES
from distill.models.depth import Depth
from distill.training.recipes import Recipe, Stage
from distill.training.student import Pruned
from distill.training.trainer import train

RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
]


def renamed(tensors: dict[str, torch.Tensor], pairs: list[tuple[str, str]], prefix: str) -> dict[str, torch.Tensor]:
    """`pairs` are (single-file start of a name, diffusers' start of a name)."""
    result = {}
    for key, value in tensors.items():
        theirs, ours = max((pair for pair in pairs if key.startswith(pair[1])), key=lambda pair: len(pair[1]))
        result[prefix + theirs + key[len(ours) :]] = value
    return result


def unet_to_ldm(tensors: dict[str, torch.Tensor], depth: Depth) -> dict[str, torch.Tensor]:
    layers, levels = len(depth.up[0]), len(depth.up)
    pairs = [("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2")]
    pairs += [("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")]
    pairs += [("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out")]
    places = [
        (f"input_blocks.{1 + layers * i + j}", f"down_blocks.{i}", j) for i in range(levels) for j in range(layers - 1)
    ]
    places += [(f"output_blocks.{layers * i + j}", f"up_blocks.{i}", j) for i in range(levels) for j in range(layers)]
    for place, block, j in places:
        pairs += [(f"{place}.1", f"{block}.attentions.{j}")]
        pairs += [(f"{place}.0.{theirs}", f"{block}.resnets.{j}.{ours}") for theirs, ours in RESNET]
    for j, place in ((0, "middle_block.0"), (1, "middle_block.2")):
        pairs += [(f"{place}.{theirs}", f"mid_block.resnets.{j}.{ours}") for theirs, ours in RESNET]
    pairs += [("middle_block.1", "mid_block.attentions.0")]
    for i in range(levels - 1):
        after = 2 if any(depth.up[i]) else 1  # the ResNet, and the transformer where there is one
        pairs += [(f"input_blocks.{layers * (i + 1)}.0.op", f"down_blocks.{i}.downsamplers.0.conv")]
        pairs += [(f"output_blocks.{layers * (i + 1) - 1}.{after}.conv", f"up_blocks.{i}.upsamplers.0.conv")]
    return renamed(tensors, pairs, "model.diffusion_model.")


def vae_to_ldm(tensors: dict[str, torch.Tensor], levels: int, layers: int) -> dict[str, torch.Tensor]:
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        pairs += [(f"{side}.{end}", f"{side}.{end}") for end in ("conv_in", "conv_out")]
        pairs += [(f"{side}.norm_out", f"{side}.conv_norm_out")]
        blocks = [(f"{side}.mid.block_{j + 1}", f"{side}.mid_block.resnets.{j}") for j in range(2)]
        for i in range(levels):
            place = f"encoder.down.{i}" if side == "encoder" else f"decoder.up.{levels - 1 - i}"
            block = f"encoder.down_blocks.{i}" if side == "encoder" else f"decoder.up_blocks.{i}"
            blocks += [(f"{place}.block.{j}", f"{block}.resnets.{j}") for j in range(layers + 1)]
            way = "down" if side == "encoder" else "up"
            pairs += [(f"{place}.{way}sample", f"{block}.{way}samplers.0")]
        pairs += blocks + [(f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut") for theirs, ours in blocks]
        for theirs, ours in (
            ("norm", "group_norm"),
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("proj_out", "to_out.0"),
        ):
            pairs += [(f"{side}.mid.attn_1.{theirs}", f"{side}.mid_block.attentions.0.{ours}")]
    named = renamed(tensors, pairs, "first_stage_model.")
    is_square = [key for key, value in named.items() if ".attn_1." in key and value.ndim == 2]
    return named | {key: named[key][:, :, None, None].contiguous() for key in is_square}


def open_clip(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    projection = tensors.get("text_projection.weight", torch.eye(4))
    result = {"logit_scale": torch.tensor(4.6), "text_projection": projection.T.contiguous()}
    result["positional_embedding"] = tensors["text_model.embeddings.position_embedding.weight"]
    result["token_embedding.weight"] = tensors["text_model.embeddings.token_embedding.weight"]
    for leaf in ("weight", "bias"):
        result[f"ln_final.{leaf}"] = tensors[f"text_model.final_layer_norm.{leaf}"]
        for i in range(1 + max(int(key.split(".")[3]) for key in tensors if ".layers." in key)):
            ours, theirs = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
            parts = [tensors[f"{ours}.self_attn.{name}_proj.{leaf}"] for name in "qkv"]
            result[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(parts)
            result[f"{theirs}.attn.out_proj.{leaf}"] = tensors[f"{ours}.self_attn.out_proj.{leaf}"]
            for place, module in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
                result[f"{theirs}.{place}.{leaf}"] = tensors[f"{ours}.{module}.{leaf}"]
            for place, module in (("c_fc", "fc1"), ("c_proj", "fc2")):
                result[f"{theirs}.mlp.{place}.{leaf}"] = tensors[f"{ours}.mlp.{module}.{leaf}"]
    return {f"{prefix}{key}": value for key, value in result.items()}


def ldm_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint folder in the single-file layout, with the extras that such files carry."""
    loaded = {name: load_file(component_weights(folder / name)[0]) for name in network_folders(folder)}
    vae = read_config(folder, "vae")
    unet = unet_to_ldm(loaded["unet"], find_architecture_of(folder).depth)
    averaged = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": 2 * value for key, value in unet.items()}
    first = "conditioner.embedders.0.transformer." if "text_encoder_2" in loaded else "cond_stage_model.transformer."
    clip = {f"{first}{key}": value for key, value in loaded["text_encoder"].items()}
    if "text_encoder_2" in loaded:
        clip |= open_clip(loaded["text_encoder_2"], "conditioner.embedders.1.model.")
    extras = {
        f"{first}text_model.embeddings.position_ids": torch.arange(32)[None],
        "alphas_cumprod": torch.linspace(1, 0, 1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(4),
    }
    coded = vae_to_ldm(loaded["vae"], len(vae["block_out_channels"]), vae["layers_per_block"])
    return unet | averaged | coded | clip | extras


@pytest.fixture(scope="module")
def single_file(mini_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "fullDepth.safetensors"
    save_file(ldm_tensors(mini_sdxl), path)
    return path


def test_a_single_file_becomes_what_diffusers_makes_of_it(single_file: Path, mini_sdxl: Path, tmp_path: Path) -> None:
    folder = resolve(str(single_file), tmp_path)
    judge = StableDiffusionXLPipeline.from_single_file(str(single_file), config=str(mini_sdxl), local_files_only=True)
    second = {key: value for key, value in load_file(single_file).items() if ".embedders.1." in key}
    judge.text_encoder_2 = create_diffusers_clip_model_from_ldm(  # which it takes for the first where widths are equal
        CLIPTextModelWithProjection, second, subfolder="text_encoder_2", config=str(mini_sdxl), local_files_only=True
    )
    ours = load_pipeline(folder, torch.float32)
    for component in network_folders(folder):
        expected = getattr(judge, component).state_dict()
        got = getattr(ours, component).state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in got), component
        original = load_file(component_weights(mini_sdxl / component)[0])
        written = load_file(component_weights(folder / component)[0])
        assert got and all(torch.equal(written[key], original[key]) for key in original), component
    assert find_architecture_of(folder).name == "mini-sdxl"
    prompt = "a small red ring at the top"
    assert ours.tokenizer(prompt).input_ids == judge.tokenizer(prompt).input_ids


def test_an_sd_file_with_averaged_weights_beside_its_own_becomes_what_diffusers_makes_of_it(
    workdir: Path, tmp_path: Path
) -> None:
    teacher = resolve("random:mini-sd-1.5", workdir)
    save_file(ldm_tensors(teacher), tmp_path / "full.safetensors")
    folder = resolve(str(tmp_path / "full.safetensors"), tmp_path)
    judge = UNet2DConditionModel.from_single_file(
        str(tmp_path / "full.safetensors"), config=str(teacher), subfolder="unet", local_files_only=True
    ).state_dict()
    assert judge.keys() == component_tensors(folder / "unet").keys()
    for name in network_folders(teacher):
        original, written = (load_file(component_weights(place / name)[0]) for place in (teacher, folder))
        assert original.keys() == written.keys() and all(torch.equal(written[key], original[key]) for key in original)
        assert name != "unet" or all(torch.equal(written[key], judge[key]) for key in judge)
    assert find_architecture_of(folder).name == "mini-sd-1.5"


@pytest.mark.parametrize(("spread", "predicted"), [(0.05, "epsilon"), (0.15, "v_prediction")])
def test_of_an_sd_2_file_unread_layers_are_left_out_and_what_it_predicts_is_said(
    spread: float, predicted: str, workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of SD 2.x with the mini text encoder's three layers as OpenCLIP's 0, 1 and 2; it has a last one, 23."""
    teacher = resolve("random:mini-sd-1.5", workdir)
    tensors = {key: value for key, value in ldm_tensors(teacher).items() if not key.startswith("cond_stage_model.")}
    clip = open_clip(load_file(component_weights(teacher / "text_encoder")[0]), "cond_stage_model.model.")
    last = {key.replace("blocks.2.", "blocks.23."): value.clone() for key, value in clip.items() if "blocks.2." in key}
    biases = {f"{UNET}.output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-spread, spread] * 16)}
    save_file(tensors | clip | last | biases, tmp_path / "sd2.safetensors")
    folder = resolve(str(tmp_path / "sd2.safetensors"), tmp_path)
    assert prediction_type_of(folder) == predicted
    assert "does not say what it predicts" in capsys.readouterr().out
    original, written = (load_file(component_weights(p / "text_encoder")[0]) for p in (teacher, folder))
    assert original.keys() == written.keys() and all(torch.equal(written[key], original[key]) for key in original)


@pytest.mark.parametrize(
    "architecture", ["mini-vega", "mini-ssd-1b", "mini-koala-700m", "mini-small-sd", "mini-tiny-sd"]
)
def test_a_students_single_file_is_recognised_by_its_depth(architecture: str, workdir: Path, tmp_path: Path) -> None:
    save_file(ldm_tensors(resolve(f"random:{architecture}", workdir)), tmp_path / "student.safetensors")
    assert find_architecture_of(resolve(str(tmp_path / "student.safetensors"), tmp_path)).name == architecture


def test_half_precision_stays_as_it_is(mini_vega: Path, tmp_path: Path) -> None:
    halves = {
        key: value.bfloat16() if value.is_floating_point() else value for key, value in ldm_tensors(mini_vega).items()
    }
    save_file(halves, tmp_path / "half.safetensors")
    folder = resolve(str(tmp_path / "half.safetensors"), tmp_path)
    records = component_tensors(folder / "text_encoder_2")
    assert {record.dtype for record in records.values()} == {"BF16"}
    original = load_file(component_weights(mini_vega / "text_encoder_2")[0])
    converted = load_file(component_weights(folder / "text_encoder_2")[0])
    assert all(torch.equal(converted[key], original[key].bfloat16()) for key in original)


UNET = "model.diffusion_model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("conditioner.embedders.1.")], "it has no text_encoder_2"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("first_stage_model.")], "no VAE in it.*give the folder"),
        (lambda t: t.pop(f"{UNET}.out.2.bias"), "lacks the tensor model.diffusion_model.out.2.bias"),
        (lambda t: t.update({f"{UNET}.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}), r"32, 9, 3, 3"),
        (lambda t: t.update({f"{UNET}.input_blocks.7.0.out_layers.3.weight": torch.zeros(9)}), r"widths are .*64, 9\]"),
        (lambda t: t.update({f"{UNET}.out.2.bias": torch.zeros(8)}), r"shape \[8\], SDXL's is \[4\]"),
        (lambda t: t.update({f"{UNET}.out.2.bias": torch.zeros(4).to(torch.float8_e4m3fn)}), "out.2.bias is .* F8_E4M3"),
        (lambda t: t.update({f"{UNET}.adapter.weight": torch.zeros(1)}), "1 tensors too many, e.g. .*adapter"),
        (lambda t: t.update({"edm_vpred.sigma_max": torch.tensor(80.0)}), "EDM's noise levels .*edm_vpred.sigma_max"),
    ],
)  # fmt: skip
def test_what_is_no_sdxl_file_is_refused_and_leaves_nothing(
    change, message: str, mini_vega: Path, tmp_path: Path
) -> None:
    tensors = ldm_tensors(mini_vega)
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=message):
        resolve(str(tmp_path / "other.safetensors"), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_file_that_says_v_prediction_at_no_signal_is_believed_and_refused_as_a_teacher(
    mini_vega: Path, tmp_path: Path
) -> None:
    said = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(ldm_tensors(mini_vega) | said, tmp_path / "v.safetensors")
    folder = resolve(str(tmp_path / "v.safetensors"), tmp_path)
    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(4)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.timesteps[0] == 999 and scheduler.sigmas[0] > 4000  # where nothing of the picture is left
    make_cache(mini_vega, "shapes:9", tmp_path / "cache")
    stage = Stage(name="whole", teacher=str(folder), student=Pruned(architecture="mini-vega"), steps=1)
    recipe = Recipe(name="v", stages=(stage,), batch_size=1)
    with pytest.raises(UserError, match="trained on other noise levels"):
        train(recipe, cache=tmp_path / "cache", out=tmp_path / "out", workdir=tmp_path)


@pytest.mark.parametrize(
    ("stated", "meant"), [("v", "v_prediction"), ("epsilon", "epsilon"), ("V_prediction", "v_prediction")]
)
def test_a_prediction_type_in_the_files_metadata_is_believed(
    stated: str, meant: str, mini_vega: Path, tmp_path: Path
) -> None:
    save_file(ldm_tensors(mini_vega), tmp_path / "v.safetensors", {"modelspec.prediction_type": stated})
    folder = resolve(str(tmp_path / "v.safetensors"), tmp_path)
    assert EulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.prediction_type == meant


@pytest.mark.parametrize("architecture", ["sdxl", "ssd-1b", "vega", "koala-700m", "sd-1.5", "small-sd", "tiny-sd"])
def test_at_full_size_every_name_is_the_inverses(architecture: str) -> None:
    """The names alone, without weights: what diffusers' script calls each tensor, and its rule for other depths."""
    shapes = component_shapes("unet", meta_components(ARCHITECTURES[architecture])["unet"])
    depth = ARCHITECTURES[architecture].depth
    expected = unet_to_ldm(dict.fromkeys(shapes, torch.zeros(0)), depth)
    assert {f"model.diffusion_model.{_unet_name(key, depth)}" for key in shapes} == expected.keys()
    assert len(expected) == len(shapes)
    assert Depth.from_config(ARCHITECTURES[architecture].unet_config) == depth
