from __future__ import annotations

import errno
import inspect
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig

from distill.checkpoints.folder import check_checkpoint, checkpoint_hash, find_architecture_of
from distill.checkpoints.load import load_component, load_parts, load_pipeline
from distill.checkpoints.sources import peek_architecture, read_safetensors_header, resolve
from distill.checkpoints.surgery import make_student, make_student_unet, student_modules
from distill.common.errors import UserError, exit_on_user_error
from distill.common.files import remove_leftovers, replacing, write_json
from distill.models.architectures import ARCHITECTURES, find_architecture
from distill.models.families import SD_1_FAMILY, SDXL_FAMILY
from distill.models.networks import DEFAULTS
from distill.models.unet_config import UNET_DEFAULTS
from distill.training.prepare import check_successor


@pytest.fixture
def copy(mini_vega: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini_vega, tmp_path / "copy"))


@pytest.mark.parametrize(("name", "architecture", "size_bytes"), [("sdxl", "mini-sdxl", 20_000_000)])
def test_a_shipped_teacher_is_whole_small_and_what_it_says(name: str, architecture: str, size_bytes: int) -> None:
    folder = resolve(f"mini:{name}", Path("unused"))
    assert find_architecture_of(folder).name == architecture
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= size_bytes


def test_a_random_checkpoint_is_a_pipeline_that_runs_and_is_the_same_every_time(
    mini_vega: Path, tmp_path: Path
) -> None:
    assert checkpoint_hash(resolve("random:mini-vega", tmp_path)) == checkpoint_hash(mini_vega)
    pipe = load_pipeline(mini_vega, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a small red ring at the top", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (128, 128, 3)


def test_threads_and_processes_that_want_the_same_checkpoint_take_turns(mini_vega: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: resolve("random:mini-vega", tmp_path), range(4)))
    assert set(folders) == {tmp_path / "random-mini-vega"}
    assert checkpoint_hash(folders[0]) == checkpoint_hash(mini_vega)
    assert not list(tmp_path.glob(".*.partial")) and not list(tmp_path.glob(".*.old"))


def test_whatever_killed_makers_leave_the_next_one_makes_it_whole(mini_vega: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distill", "fetch", "--model", "random:mini-vega", "--workdir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    seen = 0
    for wait_s in (0.0, 0.05):
        left = set(tmp_path.glob(".random-*.partial/unet"))
        makers = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
        while not (begun := set(tmp_path.glob(".random-*.partial/unet")) - left) and None in [m.poll() for m in makers]:
            time.sleep(0.001)
        time.sleep(wait_s)
        seen += bool(begun)
        for maker in makers:
            maker.send_signal(signal.SIGKILL)
            maker.wait()
        shutil.rmtree(tmp_path / "random-mini-vega", ignore_errors=True)  # had one been quick enough to finish
    assert seen == 2
    assert checkpoint_hash(resolve("random:mini-vega", tmp_path)) == checkpoint_hash(mini_vega)
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: next((folder / "unet").glob("*.safetensors")).unlink(),
        lambda folder: (folder / "model_index.json").unlink(),
        lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"short"),
        lambda folder: write_json(folder / "made.json", {"conversion": 0}),
    ],
)
def test_a_made_checkpoint_that_lost_a_part_or_is_of_another_version_is_made_again(
    damage, mini_vega: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(mini_vega, tmp_path / mini_vega.name)
    first = (folder / "model_index.json").stat().st_mtime_ns
    damage(folder)
    assert checkpoint_hash(resolve("random:mini-vega", tmp_path)) == checkpoint_hash(mini_vega)
    assert (folder / "model_index.json").stat().st_mtime_ns > first


def test_a_depth_of_ones_own_is_recognised(tmp_path: Path) -> None:
    vega = resolve("random:mini-vega", tmp_path)
    depth = "-/1,1/1,1:0:1,1,1/1,1,1/-"
    student = find_architecture(depth, ARCHITECTURES["mini-vega"].family)
    make_student_unet(vega, student, student_modules(vega, student, "first")[1], tmp_path / "unet")
    shutil.rmtree(vega / "unet")
    (tmp_path / "unet").rename(vega / "unet")
    assert find_architecture_of(vega).name == depth


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_named(copy: Path, cut: int) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:cut])
    with pytest.raises(UserError, match="truncated") as error:
        check_checkpoint(copy)
    assert str(weights) in str(error.value)


@pytest.mark.parametrize("header", [b"notjson!", b"[      ]", b'{"x":{}}', b'{"x": 1}'])
def test_a_file_of_another_format_is_named(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0" + header + bytes(50))
    with pytest.raises(UserError, match="no safetensors header"):
        read_safetensors_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
        (lambda folder: (folder / "vae" / "config.json").unlink(), "vae/config.json is missing"),
        (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "text_encoder_2/config.json is missing"),
        (lambda folder: next((folder / "vae").glob("*.safetensors")).unlink(), "holds no .safetensors weights"),
    ],
)
def test_what_is_missing_is_named(copy: Path, damage, message: str) -> None:
    damage(copy)
    with pytest.raises(UserError, match=message):
        resolve(str(copy), copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addition_embed_type": "text_image"}, "addition_embed_type 'text_image'"),
        ({"class_embed_type": "timestep"}, "takes more than text .class_embed_type"),
        ({"in_channels": 9}, "9 channels in and 4 out"),
    ],
)
def test_a_pipeline_of_another_kind_is_refused(copy: Path, change: dict, message: str) -> None:
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        resolve(str(copy), copy)


PUBLISHED_UNET = json.loads("""{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0",
"act_fn": "silu", "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64,
"addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
"center_input_sample": false, "class_embed_type": null, "class_embeddings_concat": false, "conv_in_kernel": 3,
"conv_out_kernel": 3, "cross_attention_dim": 2048, "cross_attention_norm": null, "down_block_types":
["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
"dual_cross_attention": false, "encoder_hid_dim": null, "encoder_hid_dim_type": null, "flip_sin_to_cos": true,
"freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_only_cross_attention": null,
"mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
"num_attention_heads": null, "num_class_embeds": null, "only_cross_attention": false, "out_channels": 4,
"projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": false,
"resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": null, "time_embedding_act_fn": null,
"time_embedding_dim": null, "time_embedding_type": "positional", "timestep_post_act": null,
"transformer_layers_per_block": [1, 2, 10], "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D",
"UpBlock2D"], "upcast_attention": null, "use_linear_projection": true}""")
"""SDXL base 1.0's own unet/config.json."""


def _teacher(folder: Path, unet: dict, **scheduler: object) -> Path:
    for name, config in (("unet/config", unet), ("scheduler/scheduler_config", scheduler)):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).with_suffix(".json").write_text(json.dumps(config))
    return folder


def test_a_successor_is_known_whichever_diffusers_wrote_its_config(tmp_path: Path) -> None:
    published = _teacher(tmp_path / "published", PUBLISHED_UNET)
    with torch.device("meta"):
        converted = UNet2DConditionModel(**ARCHITECTURES["sdxl"].unet_config)
    (tmp_path / "converted" / "scheduler").mkdir(parents=True)
    (tmp_path / "converted" / "scheduler" / "scheduler_config.json").write_text("{}")
    converted.save_config(tmp_path / "converted" / "unet")
    check_successor(published, tmp_path / "converted")
    check_successor(tmp_path / "converted", published)
    wider = _teacher(tmp_path / "wider", PUBLISHED_UNET | {"cross_attention_dim": 1280})
    with pytest.raises(UserError, match="cross_attention_dim is 1280, was 2048"):
        check_successor(published, wider)
    shorter = _teacher(tmp_path / "shorter", PUBLISHED_UNET | {"transformer_layers_per_block": [1, 2, 4]})
    with pytest.raises(UserError, match=r"transformer_layers_per_block is '-/2,2/4,4:4:.*, was '-/2,2/10,10:10:"):
        check_successor(published, shorter)


@pytest.mark.parametrize("scheduler", [{"_class_name": "EDMEulerScheduler"}, {"rescale_betas_zero_snr": True}])
def test_a_teacher_of_other_noise_levels_is_refused(scheduler: dict, tmp_path: Path) -> None:
    teacher = _teacher(tmp_path / "teacher", PUBLISHED_UNET, **scheduler)
    with pytest.raises(UserError, match="trained on other noise levels"):
        check_successor(teacher, teacher)


def test_weights_in_a_format_that_is_not_read_are_named(copy: Path) -> None:
    [weights] = (copy / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    save_file(tensors | {"encoder.conv_in.bias": tensors["encoder.conv_in.bias"].to(torch.float8_e4m3fn)}, weights)
    with pytest.raises(UserError, match=r"encoder.conv_in.bias is stored as F8_E4M3; read are F64, F32, F16, BF16"):
        check_checkpoint(copy)


def change_config(copy: Path, component: str, change: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    path = copy / component / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def test_the_defaults_for_absent_keys_are_the_libraries_own() -> None:
    unet = inspect.signature(UNet2DConditionModel).parameters
    assert {key: as_list(unet[key].default) for key in UNET_DEFAULTS} == UNET_DEFAULTS
    for kind in (AutoencoderKL, AutoencoderTiny):
        parameters = inspect.signature(kind).parameters
        assert {key: as_list(parameters[key].default) for key in DEFAULTS[kind.__name__]} == DEFAULTS[kind.__name__]
    clip = CLIPTextConfig()
    assert {key: getattr(clip, key) for key in DEFAULTS["CLIPTextModel"]} == DEFAULTS["CLIPTextModel"]


def as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("change", "drop"),
    [
        ({}, ("in_channels", "out_channels", "layers_per_block", "sample_size")),
        ({"layers_per_block": [2, 2, 2], "cross_attention_dim": [128] * 3}, ()),
        ({"only_cross_attention": [False] * 3, "attention_head_dim": [1, 2, 2], "sample_size": [16, 16]}, ()),
    ],
)
def test_any_way_to_state_a_unet_is_the_same_unet(change: dict, drop: tuple[str, ...], copy: Path) -> None:
    change_config(copy, "unet", change, drop)
    check_checkpoint(copy)
    assert find_architecture_of(copy).name == "mini-vega"
    expected = load_component(copy, "unet", torch.float32)
    student = ARCHITECTURES["mini-vega"]
    make_student(copy, student, "first", copy.parent / "student")
    made = load_component(copy.parent / "student", "unet", torch.float32).state_dict()
    assert all(torch.equal(made[key], value) for key, value in expected.state_dict().items())


def test_a_unet_without_its_middle_block_type_has_diffusers_own(mini_sdxl: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(mini_sdxl, tmp_path / "copy"))
    change_config(copy, "unet", {}, ("mid_block_type", "_diffusers_version"))
    assert find_architecture_of(copy).name == "mini-sdxl"
    load_component(copy, "unet", torch.float32)


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 3}, 'down_block_types is .*AttnDownBlock2D.*read are "DownB'),
        ("unet", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type is .*SimpleCrossAttn"),
        ("unet", {"mid_block_type": [1]}, r"mid_block_type is \[1\]"),
        ("unet", {"block_out_channels": []}, "block_out_channels is .*3 numbers"),
        ("unet", {"block_out_channels": None}, "block_out_channels is null"),
        ("unet", {"block_out_channels": "abc"}, "block_out_channels is .*abc"),
        ("unet", {"block_out_channels": [32, 64]}, "block_out_channels is .*3 numbers"),
        ("unet", {"layers_per_block": None}, "layers_per_block is null"),
        ("unet", {"layers_per_block": [2, 2]}, "layers_per_block is .*3 levels"),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block is 1000000000; numbers from 1 to 1000000"),
        ("unet", {"transformer_layers_per_block": [1, 2, 10**6]}, "more than 10000 transformer blocks"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers of its text_encoder is 1000000000; a number"),
        ("unet", {"layers_per_block": "2"}, 'layers_per_block is "2"'),
        ("unet", {"cross_attention_dim": [128, 64, 128]}, "cross_attention_dim is .*must be alike"),
        ("unet", {"cross_attention_dim": 0}, "cross_attention_dim is 0"),
        ("unet", {"cross_attention_dim": 64}, "cross_attention_dim is 64, the hidden_size of .* together is 128"),
        ("unet", {"sample_size": -1}, "sample_size is -1"),
        ("unet", {"attention_head_dim": [1, 2]}, "attention_head_dim is .*3 levels"),
        ("unet", {"transformer_layers_per_block": [[1, 1], [1, 1], [2, 2]], "reverse_transformer_layers_per_block": None},
         "reverse_transformer_layers_per_block is needed"),
        ("unet", {"reverse_transformer_layers_per_block": [[2, 2], [1, 1, 1], 1]}, "reverse_.* for a level of 3 layers"),
        ("unet", {"projection_class_embeddings_input_dim": 2560}, "do not belong together"),
        ("unet", {"up_block_types": ["UpBlock2D"]}, "up_block_types is .*as many as down_block_types"),
        ("unet", {"attention_head_dim": [0, 2, 2]}, r"attention_head_dim is \[0, 2, 2\]"),
        ("unet", {"norm_num_groups": 0}, "norm_num_groups is 0"),
        ("unet", {"in_channels": 9}, "9 channels in and 4 out"),
        ("vae", {"latent_channels": 16}, "in_channels is 4, the vae's latent_channels is 16"),
        ("vae", {"layers_per_block": 10**9}, "layers_per_block of its vae is 1000000000; a number from 1 to 1000"),
        ("vae", {"scaling_factor": 0}, "scaling_factor of its vae is 0; a number above 0"),
        ("vae", {"scaling_factor": "x"}, "scaling_factor of its vae is 'x'"),
        ("vae", {"block_out_channels": None}, "block_out_channels of its vae is None"),
        ("text_encoder", {"hidden_size": "64"}, "hidden_size of its text_encoder is '64'"),
    ],
)  # fmt: skip
def test_what_no_unet_can_be_is_named_by_its_key(component: str, change: dict, message: str, copy: Path) -> None:
    change_config(copy, component, change)
    with pytest.raises(UserError, match=message) as refusal:
        check_checkpoint(copy)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("change", [{"act_fn": "none"}, {"resnet_time_scale_shift": 3}, {"norm_num_groups": 7}])
def test_what_the_library_cannot_make_is_one_line(change: dict, copy: Path) -> None:
    change_config(copy, "unet", change)
    with pytest.raises(UserError, match=r"copy/unet cannot be loaded \(\w+: .*mend its config.json") as refusal:
        load_component(copy, "unet", torch.float32)
    assert "\n" not in str(refusal.value)


def test_a_refiner_is_told_what_it_is(copy: Path) -> None:
    shutil.rmtree(copy / "text_encoder")
    change_config(copy, "unet", {"cross_attention_dim": 64})
    with pytest.raises(UserError, match=r"is SDXL's refiner.*give the base model"):
        resolve(str(copy), copy)


@pytest.mark.parametrize("source", ["", " "])
def test_a_model_of_no_name_is_no_folder(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model is empty"):
        resolve(source, tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "", "3", '"x"', "{", "[" * 100_000, "\ufeff{}", '{"a": NaN}'])
@pytest.mark.parametrize(
    "name", ["unet/config.json", "text_encoder/config.json", "vae/config.json", "model_index.json"]
)
def test_a_config_that_holds_something_else_is_one_line(name: str, text: str, copy: Path) -> None:
    (copy / name).write_text(text)
    with pytest.raises(UserError, match=name) as refusal:
        check_checkpoint(copy)
    assert "\n" not in str(refusal.value)


def change_index(copy: Path, **stated: object) -> None:
    path = copy / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: change_index(c, scheduler=["diffusers", "NoSuchScheduler"]), "scheduler is .*NoSuchScheduler"),
        (lambda c: change_index(c, scheduler=None), "its scheduler is null"),
        (lambda c: change_index(c, tokenizer=["transformers", 3]), "its tokenizer is"),
        (lambda c: change_index(c, tokenizer=["transformers", "NoTokenizer"]), "its tokenizer is .*NoTokenizer"),
        (lambda c: shutil.rmtree(c / "tokenizer_2"), "it has no tokenizer_2/"),
        (lambda c: (c / "scheduler/scheduler_config.json").write_text("[]"), "holds a list"),
        (lambda c: (c / "scheduler/scheduler_config.json").unlink(), "does not exist"),
        (lambda c: change_scheduler(c, beta_schedule="none"), "scheduler cannot be loaded"),
        (lambda c: change_scheduler(c, num_train_timesteps="x"), "scheduler cannot be loaded"),
        (lambda c: (c / "tokenizer/vocab.json").write_text("["), "tokenizer cannot be loaded"),
        (lambda c: (c / "tokenizer/merges.txt").unlink(), "tokenizer cannot be loaded"),
    ],
)
def test_a_scheduler_or_tokenizer_that_cannot_load_is_one_line(damage, message: str, copy: Path) -> None:
    damage(copy)
    with pytest.raises(UserError, match=message) as refusal:
        load_parts(copy)
    assert "\n" not in str(refusal.value)


def change_scheduler(copy: Path, **stated: object) -> None:
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | stated))


def test_weights_that_are_missing_are_named_where_they_are_loaded(copy: Path) -> None:
    for component in ("unet", "text_encoder_2"):
        [file] = (copy / component).glob("*.safetensors")
        tensors = load_file(file)
        dropped = sorted(key for key in tensors if key.endswith(".bias"))[0]
        save_file({key: value for key, value in tensors.items() if key != dropped}, file, {"format": "pt"})
        with pytest.raises(UserError, match=f"{component} lacks 1 weights, the first is {re.escape(dropped)}"):
            load_component(copy, component, torch.float32)


def test_what_is_at_hand_tells_the_architecture_and_nothing_is_fetched(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    of_hub = tmp_path / "models--org--fetched"
    (of_hub / "refs").mkdir(parents=True)
    (of_hub / "refs" / "main").write_text("0" * 40)
    (of_hub / "snapshots").mkdir()
    (of_hub / "snapshots" / ("0" * 40)).symlink_to(mini_vega)
    assert peek_architecture("org/fetched", SDXL_FAMILY).name == "mini-vega"
    assert peek_architecture("mini:sdxl", SDXL_FAMILY).name == "mini-sdxl"
    assert peek_architecture("random:vega", SDXL_FAMILY).name == "vega"
    assert peek_architecture(str(mini_vega), SDXL_FAMILY).name == "mini-vega"
    assert peek_architecture("stabilityai/stable-diffusion-xl-base-1.0", SDXL_FAMILY).name == "sdxl"
    assert peek_architecture("SG161222/Realistic_Vision_V4.0", SD_1_FAMILY).name == "sd-1.5"
    with pytest.raises(UserError, match="does not exist"):
        peek_architecture("missing.safetensors", SDXL_FAMILY)


def _raising(error: Exception) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert exit_on_user_error(lambda: write_json(tmp_path / "file" / "x.json", {})) == 2

    def fill() -> None:
        with replacing(tmp_path / "big"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_by_numpy() -> None:  # as a graph's weights are written
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with replacing(tmp_path / "big") as temporary:
                np.zeros(10_000).tofile(temporary)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert exit_on_user_error(fill) == 2
    assert exit_on_user_error(fill_by_numpy) == 2
    assert exit_on_user_error(_raising(SafetensorError("I/O error: No space left on device (os error 28)"))) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: ") and str(tmp_path / "file") in said[0]
    assert said[1] == f"error: the disk of {tmp_path / 'big'} is full; free some space and run the same command again"
    assert said[2:] == ["error: the disk is full; free some space and run the same command again"] * 2
    for mistake in (KeyError("x"), OSError("no number"), SafetensorError("invalid header")):
        with pytest.raises(type(mistake)):
            exit_on_user_error(_raising(mistake))


def test_what_a_killed_writer_left_is_found_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / ".xl_[v9].0a1b2c3d.partial").mkdir()
    (tmp_path / ".xl_v.0a1b2c3d.partial").mkdir()
    remove_leftovers(tmp_path, "xl_[v9]")
    assert [path.name for path in tmp_path.iterdir()] == [".xl_v.0a1b2c3d.partial"]


def test_a_link_to_a_folder_is_replaced_and_its_folder_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with replacing(tmp_path / "out") as temporary:
        temporary.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere" / "kept").exists()
