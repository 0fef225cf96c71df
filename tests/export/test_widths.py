"""A pipeline of widths that no family has goes the whole road: its family is made from its own configs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.checkpoints.assemble import assemble, random_tensors
from distill.checkpoints.folder import check_checkpoint, find_architecture_of
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.surgery import make_student, student_modules
from distill.common.files import read_json
from distill.models.architectures import VEGA_DEPTH, Architecture, find_architecture
from distill.models.families import MINI_FAMILY
from distill.models.resolution import Resolution
from export.checks.verify import verify_folder
from export.folder import export_checkpoint
from export.job import ExportOptions

WIDTHS = {
    "unet": {
        "block_out_channels": (24, 48, 48),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 80,
        "projection_class_embeddings_input_dim": 6 * 32 + 48,
    },
    "vae": {"block_out_channels": (8, 16, 16, 32)},
    "text_encoder": {"hidden_size": 32, "projection_dim": 32, "intermediate_size": 64},
    "text_encoder_2": {"hidden_size": 48, "projection_dim": 48, "intermediate_size": 64},
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    networks = {name: config | WIDTHS[name] for name, config in MINI_FAMILY.networks.items()}
    folder = tmp_path_factory.mktemp("odd") / "odd"
    architecture = Architecture(name="odd", family=replace(MINI_FAMILY, networks=networks), depth=VEGA_DEPTH)
    assemble(folder, architecture, random_tensors(architecture))
    return folder


def test_its_family_is_made_from_its_configs(odd: Path) -> None:
    check_checkpoint(odd)
    family = find_architecture_of(odd).family
    assert (family.name, family.resolutions[0]) == ("StableDiffusionXL-24-48-48", Resolution(128, 128))
    assert all(side % family.size_multiple == 0 for r in family.resolutions for side in (r.width, r.height))


def test_a_student_of_it_and_one_of_that_are_made(odd: Path, tmp_path: Path) -> None:
    family = find_architecture_of(odd).family
    first = find_architecture("-/1,1/2,1:0:2,2,2/1,1,1/-", family)
    make_student(odd, first, "first", tmp_path / "first")
    second = find_architecture("-/1,1/1,1:0:1,1,1/1,1,1/-", family)
    _, relative = student_modules(tmp_path / "first", second, "first")
    assert relative.teacher == first.depth
    make_student(tmp_path / "first", second, "first", tmp_path / "second")
    pipe = load_pipeline(tmp_path / "second", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a ring", width=160, height=96, num_inference_steps=1).images[0].size == (160, 96)


def test_it_is_exported_and_verified(odd: Path, tmp_path: Path) -> None:
    names = ("unet", "vae_decoder", "text_encoder_2")
    export_checkpoint(odd, tmp_path / "out", options=ExportOptions(precision="fp32", components=names))
    assert "160x96" in read_json(tmp_path / "out" / "slimxl.json")["resolutions"]
    results = verify_folder(tmp_path / "out", odd, sizes=[Resolution(160, 96)])
    assert set(results) == set(names) and all(row.passed for rows in results.values() for row in rows)
