"""What belongs to one family is told in a line where another one's is needed; SD's own data goes the whole road."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from distill.__main__ import main
from distill.checkpoints.load import load_component, load_pipeline
from distill.checkpoints.sources import resolve
from distill.checkpoints.surgery import make_student
from distill.common.errors import UserError
from distill.data.cache import LatentCache
from distill.data.make_cache import make_cache
from distill.models.architectures import find_architecture
from distill.training.output.samples import draw_samples
from distill.training.prepare import check_successor
from distill.training.recipes import find_recipe


@pytest.fixture(scope="module")
def sd(workdir: Path) -> Path:
    return resolve("random:mini-sd-1.5", workdir)


@pytest.fixture(scope="module")
def sd_cache(sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sd") / "cache"
    make_cache(sd, "shapes:6", out)
    return out


def test_sds_cache_holds_one_encoders_text_and_the_encoding_of_no_words(sd: Path, sd_cache: Path) -> None:
    held = load_file(sd_cache / "unconditional.safetensors")
    assert held.keys() == {"encoder_hidden_states"}
    pipe = load_pipeline(sd, torch.float32)
    tokens = pipe.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    wanted = pipe.text_encoder(tokens).last_hidden_state[0]  # after the final norm
    torch.testing.assert_close(held["encoder_hidden_states"].float(), wanted, atol=2e-3, rtol=0)
    assert LatentCache(sd_cache, batch_size=2, seed=0).batch(0).keys() == {"latents", "encoder_hidden_states"}


def recipe_of(name: str, student: str, teacher: Path | str, file: Path) -> str:
    recipe = json.loads(json.dumps(find_recipe(name).as_dict()))
    for stage in recipe["stages"]:
        stage["teacher"], stage["student"]["architecture"] = str(teacher), student
    file.write_text(json.dumps(recipe))
    return str(file)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("surgery --model mini:sdxl --student mini-tiny-sd --out {out}", "mini-tiny-sd is of the family mini-sd"),
        ("surgery --model {sd} --student mini-vega --out {out}", "mini-vega is of the family mini,"),
        ("train --recipe {sd_student_of_sdxl} --cache {cache} --out {out}", "mini-tiny-sd is of the family mini-sd"),
        ("train --recipe {sdxl_student_of_sd} --cache {sd_cache} --out {out}", "its teacher of mini-sd"),
        ("train --recipe mini-vega --cache {sd_cache} --out {out}", "the cache holds text of the shapes"),
        ("train --recipe {sd_student_of_sd} --cache {cache} --out {out}", "the cache holds text of the shapes"),
        ("train --recipe small-sd --cache {cache} --out {out}", "the UNet of SG161222/Realistic_Vision_V4.0 takes"),
    ],
)
def test_two_families_in_one_command_are_told_before_anything_is_loaded(
    command: str, told: str, sd: Path, sd_cache: Path, cache: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    places = {
        "out": tmp_path / "out",
        "sd": sd,
        "sd_cache": sd_cache,
        "cache": cache,
        "sd_student_of_sdxl": recipe_of("tiny-sd", "mini-tiny-sd", "mini:sdxl", tmp_path / "1.json"),
        "sdxl_student_of_sd": recipe_of("mini-vega", "mini-vega", sd, tmp_path / "2.json"),
        "sd_student_of_sd": recipe_of("tiny-sd", "mini-tiny-sd", sd, tmp_path / "3.json"),
    }
    monkeypatch.setattr("sys.argv", ["distill", *command.format(**places).split()])
    monkeypatch.setattr("distill.checkpoints.load.load_component", None)
    assert main() == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and told in said[0], said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"time_cond_proj_dim": 256}, "reads a guidance scale"),
        ({"in_channels": 9}, "9 are for inpainting"),
    ],
)
def test_a_unet_of_another_task_teaches_nothing(change: dict[str, int], told: str, sd: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for part in sd.iterdir():
        (other / part.name).symlink_to(part) if part.name != "unet" else (other / "unet").mkdir()
    for file in (sd / "unet").iterdir():
        if file.name != "config.json":
            (other / "unet" / file.name).symlink_to(file)
    config = json.loads((sd / "unet" / "config.json").read_text()) | change
    (other / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told):
        check_successor(resolve(str(other), tmp_path), other)


def test_a_student_of_sd_draws_at_its_familys_size(sd: Path, tmp_path: Path) -> None:
    draw_samples(load_component(sd, "unet", torch.float32), sd, ("a small red ring",), tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size == (128, 128)


def test_a_safety_checker_is_left_out_and_that_is_said(sd: Path, tmp_path: Path, capsys) -> None:
    whole = Path(shutil.copytree(sd, tmp_path / "whole"))
    index = json.loads((whole / "model_index.json").read_text()) | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (whole / "model_index.json").write_text(json.dumps(index))
    for part in ("safety_checker", "feature_extractor"):
        (whole / part).mkdir()
        (whole / part / "config.json").write_text("{}")
    make_student(resolve(str(whole), tmp_path), find_architecture("mini-tiny-sd"), "first", tmp_path / "student")
    assert "its feature_extractor and safety_checker are left out" in capsys.readouterr().out
    assert not (tmp_path / "student" / "safety_checker").exists()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "student")  # as anyone would, with no word of the checker
    assert pipe.safety_checker is None and pipe.unet.mid_block is None
