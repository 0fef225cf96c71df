from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from distill.errors import UserError
from distill.sources import (
    MINI_TEACHER,
    check_checkpoint,
    checkpoint_hash,
    find_architecture_of,
    load_pipeline,
    read_safetensors_header,
    resolve,
)


@pytest.fixture
def copy(mini_vega: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini_vega, tmp_path / "copy"))


def test_the_shipped_teacher_is_whole_small_and_what_it_says() -> None:
    check_checkpoint(MINI_TEACHER)
    assert find_architecture_of(MINI_TEACHER).name == "mini-sdxl"
    assert sum(file.stat().st_size for file in MINI_TEACHER.rglob("*")) <= 20_000_000
    assert resolve("mini:sdxl", Path("unused")) == MINI_TEACHER


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
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    seen = 0
    for wait_s in (0.0, 0.05):
        makers = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
        while not (begun := list(tmp_path.glob(".random-*.partial/unet"))) and None in [m.poll() for m in makers]:
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
    ],
)
def test_a_made_checkpoint_that_lost_a_part_is_made_again(damage, mini_vega: Path, tmp_path: Path) -> None:
    folder = resolve("random:mini-vega", tmp_path)
    damage(folder)
    assert checkpoint_hash(resolve("random:mini-vega", tmp_path)) == checkpoint_hash(mini_vega)


def test_a_depth_of_ones_own_is_recognised(tmp_path: Path) -> None:
    from distill.architectures import ARCHITECTURES
    from distill.surgery import make_student_unet

    vega = resolve("random:mini-vega", tmp_path)
    depth = "-/1,1/1,1:0:1,1,1/1,1,1/-"
    from distill.architectures import find_architecture

    student = find_architecture(depth, ARCHITECTURES["mini-vega"].family)
    make_student_unet(vega, student, "first", tmp_path / "unet")
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


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!" + bytes(50))
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


def test_a_pipeline_of_another_kind_is_refused(copy: Path) -> None:
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"addition_embed_type": None}))
    with pytest.raises(UserError, match="addition_embed_type None"):
        resolve(str(copy), copy)


@pytest.mark.parametrize(
    "arguments",
    [
        ["fetch", "--model", "nonsense"],
        ["fetch", "--model", "random:vgea"],
        ["fetch", "--model", "mini:vega"],
        ["fetch", "--model", "missing.safetensors"],
        ["catalogue", "1:2"],
        ["train", "--recipe", "ssd-2b", "--cache", "c", "--out", "o"],
        ["cache", "--data", "nowhere", "--out", "o"],
        ["unknown-command"],
    ],
)
def test_a_mistake_on_the_command_line_is_exit_code_2_without_traceback(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distill", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.strip()
    assert not list(tmp_path.iterdir())
