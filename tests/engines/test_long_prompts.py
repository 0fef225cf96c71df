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
from engines.onnx_folder import read_onnx_folder
from export import ExportOptions, export_checkpoint
from tests.engines.drawing import draw, psnr_db

LONG = "a (red)1.4 circle, " + "a large yellow star, " * 12


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


def test_they_draw_as_in_diffusers(reference: Any, pipeline: Any) -> None:
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = [dict(zip(names, embed(pipe, LONG, "a blue ring"), strict=True)) for pipe in (pipeline, reference)]
    assert given[0]["prompt_embeds"].shape == (1, 96, 128)
    assert psnr_db(draw(pipeline, prompt=None, **given[0]), draw(reference, prompt=None, **given[1])) >= 40


def test_other_lengths_are_a_line(pipeline: Any, toy_bundle: Path) -> None:
    for pipe, tokens, taken in (
        (pipeline, 128, r"\[32, 128\] to \[96, 128\]"),
        (engines.load(toy_bundle, "onnxruntime"), 96, r"\[32, 128\]"),
    ):
        with pytest.raises(UserError, match=rf"the unet engine takes {taken} a row; .*export with --tokens"):
            pipe.unet(torch.ones(2, 4, 16, 16), 1, torch.ones(2, tokens, 128), added_cond_kwargs=ADDED)


ADDED = {"text_embeds": torch.ones(2, 64), "time_ids": torch.ones(2, 6)}


def test_every_profile_takes_every_length(mini_onnx: Path) -> None:
    folder = read_onnx_folder(mini_onnx)
    for layout, exact in (("shared", True), ("ranged", False)):
        [profiles] = make_profiles(folder.components["unet"], layout, folder.resolutions[:2], [1])  # type: ignore[arg-type]
        for profile in profiles:
            text, sample = profile.shapes["encoder_hidden_states"], profile.shapes["sample"]
            assert (text.min[1], text.opt[1], text.max[1]) == (32, 32, 96) and (sample.min == sample.max) is exact


def test_lengths_are_multiples_and_of_open_graphs(mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tokens 48: .*parts of 32 tokens; give multiples of 32"):
        export_checkpoint(mini_vega, tmp_path / "out", options=ExportOptions(tokens=(48,)))
    assert not (tmp_path / "out").exists()
