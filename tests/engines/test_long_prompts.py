"""Prompts of more tokens than the text encoders read at once: in parts, one after the other, as diffusers' users do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compel import Compel, DownweightMode, ReturnedEmbeddingsType

import engines
from distill.common.errors import UserError
from engines.building.layouts import make_profiles
from engines.bundle import Manifest
from engines.onnx_folder import read_onnx_folder
from export import ExportOptions, export_checkpoint
from tests.engines.drawing import draw, psnr_db, quiet

LONG = "a (red)1.4 circle, " + "a large yellow star, " * 12


@pytest.fixture(scope="module")
def long_onnx(mini_vega: Path, mini_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("long") / "onnx"
    components = ("unet", "vae_decoder", "text_encoder", "text_encoder_2")
    options = ExportOptions(precision="fp32", tokens=(96,), components=components, reuse=(mini_onnx,), check=False)
    export_checkpoint(mini_vega, out, options=options)
    return out


def embed(pipe: Any, *prompts: str) -> list[torch.Tensor]:
    compel = Compel(
        tokenizer=[pipe.tokenizer, pipe.tokenizer_2],
        text_encoder=[pipe.text_encoder, pipe.text_encoder_2],
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=[False, True],
        truncate_long_prompts=False,
        downweight_mode=DownweightMode.REMOVE,
    )
    with torch.no_grad():
        texts, pooled = zip(*(compel(prompt) for prompt in prompts), strict=True)
        return [*compel.pad_conditioning_tensors_to_same_length(list(texts)), *pooled]


def test_they_draw_as_in_diffusers(reference: Any, pipeline: Any, long_onnx: Path, tmp_path: Path) -> None:
    engines.build_bundle(long_onnx, tmp_path / "bundle", gpus=[], flavor="onnxruntime")
    ours = quiet(engines.load(tmp_path / "bundle"))
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = [dict(zip(names, embed(pipe, LONG, "a blue ring"), strict=True)) for pipe in (ours, reference)]
    assert given[0]["prompt_embeds"].shape == (1, 96, 128)
    assert psnr_db(draw(ours, prompt=None, **given[0]), draw(reference, prompt=None, **given[1])) >= 40
    assert psnr_db(draw(ours), draw(reference)) >= 40
    with pytest.raises(UserError, match=r"is \[128, 128\], the unet engine takes \[32, 128\] to \[96, 128\] a row"):
        ours.unet(torch.ones(2, 4, 16, 16), 1, torch.ones(2, 128, 128), added_cond_kwargs=ADDED)
    with pytest.raises(
        UserError, match=r"is \[96, 128\], the unet engine takes \[32, 128\] a row; .*export with --tokens"
    ):
        draw(pipeline, prompt=None, **given[0])


ADDED = {"text_embeds": torch.ones(2, 64), "time_ids": torch.ones(2, 6)}


def test_every_profile_takes_every_length(long_onnx: Path, toy_manifest: Manifest) -> None:
    folder = read_onnx_folder(long_onnx)
    for layout, exact in (("shared", True), ("ranged", False)):
        [profiles] = make_profiles(folder.components["unet"], layout, folder.resolutions[:2], [1])  # type: ignore[arg-type]
        for profile in profiles:
            text, sample = profile.shapes["encoder_hidden_states"], profile.shapes["sample"]
            assert (text.min[1], text.opt[1], text.max[1]) == (32, 32, 96) and (sample.min == sample.max) is exact


def test_lengths_are_multiples_and_of_open_graphs(mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tokens 48: .*parts of 32 tokens; give multiples of 32"):
        export_checkpoint(mini_vega, tmp_path / "out", options=ExportOptions(tokens=(48,)))
    assert not (tmp_path / "out").exists()
