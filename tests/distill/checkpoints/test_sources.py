from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from distill.checkpoints import sources
from distill.checkpoints.folder import check_checkpoint, checkpoint_hash, find_architecture_of
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.sources import peek_architecture, read_safetensors_header, resolve
from distill.common.errors import UserError
from distill.common.files import write_json
from distill.models.families import SD_1_FAMILY, SDXL_FAMILY
from tests.processes import kill, start


def test_two_depths_of_the_same_numbers_share_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "make_checkpoint", lambda folder, _make: folder)
    monkeypatch.setattr(sources, "check_checkpoint", lambda _folder: None)
    folders = [
        resolve(f"random:{depth}", tmp_path)
        for depth in ("-/1,1/1:0:1,1/1,1,1/-", "-/1/1,1:0:1,1,1/1,1/-", "-/1/1,1:-:1,1,1/1,1/-")
    ]
    assert len({*folders}) == 3 and {folder.parent for folder in folders} == {tmp_path}


@pytest.mark.parametrize(
    ("name", "architecture", "size_bytes"), [("sdxl", "mini-sdxl", 20_000_000), ("sd", "mini-sd-1.5", 10_000_000)]
)
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
    seen = 0
    for wait_s in (0.0, 0.05):
        left = set(tmp_path.glob(".random-*.partial/unet"))
        makers = [start(resolve, "random:mini-vega", tmp_path) for _ in range(2)]
        while not (begun := set(tmp_path.glob(".random-*.partial/unet")) - left) and any(m.is_alive() for m in makers):
            time.sleep(0.001)
        time.sleep(wait_s)
        seen += bool(begun)
        kill(makers)
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


@pytest.mark.parametrize("source", ["", " "])
def test_a_model_of_no_name_is_no_folder(source: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model is empty"):
        resolve(source, tmp_path)


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
