"""What is no LoRA, or not a whole one, is told before anything is loaded; what others name otherwise is understood."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.checkpoints.load import load_component
from distill.common.errors import UserError
from export.checkpoint.lora import check_lora
from export.checkpoint.prepare import with_loras

LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN, UP = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
MODULE = LAYER.removeprefix("unet.")
KOHYA = f"lora_unet_{MODULE.replace('.', '_')}"
Tensors = dict[str, torch.Tensor]


def pair(down: str = DOWN, up: str = UP) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {down: torch.randn(4, 64, generator=generator), up: torch.randn(64, 4, generator=generator)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "is empty"),
        ({DOWN: torch.ones(4, 64)}, f"{DOWN} is there and its other half {UP} is not"),
        ({UP: torch.ones(64, 4)}, f"{UP} is there and its other half {DOWN} is not"),
        (pair() | {DOWN.replace("to_q", "to_k"): torch.ones(4, 64)}, "attn1.to_k.lora_A.weight is there"),
        ({f"{KOHYA}.lora_down.weight": torch.ones(4, 64)}, f"{KOHYA}.lora_up.weight is not"),
        (pair() | {UP: torch.full((64, 4), math.nan)}, f"holds NaN in {UP}"),
        (pair() | {DOWN: torch.full((4, 64), math.inf)}, f"holds infinity in {DOWN}"),
        (pair(f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight") | {f"{KOHYA}.alpha": torch.tensor(math.nan)},
         f"holds NaN in {KOHYA}.alpha"),
        (pair() | {UP: torch.ones(64, 8)}, r"lora_A.weight of shape \[4, 64\] .*lora_B.weight.* do not share a rank"),
        ({DOWN: torch.ones(0, 64), UP: torch.ones(64, 0)}, "do not share a rank"),
        ({DOWN: torch.ones(4), UP: torch.ones(4)}, "do not share a rank"),
        (pair() | pair(f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight"), f"twice, as {DOWN} and as {LAYER}"),
        (
            pair() | pair(f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
            f"twice, as {KOHYA}.lora_down.weight and as {DOWN}",
        ),
        ({f"{KOHYA}.hada_w1_a": torch.ones(4, 4)}, f"is a LoHa .*{KOHYA}.hada_w1_a"),
        ({f"{KOHYA}.lokr_w1": torch.ones(4, 4)}, "is a LoKr"),
        ({f"{KOHYA}.diff": torch.ones(4, 4)}, "is a LyCORIS 'full' difference"),
        ({f"{KOHYA}.lora_down.weight": torch.ones(4, 64), f"{KOHYA}.lora_up.weight": torch.ones(64, 4),
          f"{KOHYA}.dora_scale": torch.ones(64, 1)}, "is a DoRA in kohya's format"),
        ({"clip_l": torch.ones(1, 64), "clip_g": torch.ones(1, 64)}, "is a textual inversion"),
        ({"emb_params": torch.ones(1, 64)}, "is a textual inversion"),
        ({"model.diffusion_model.out.2.bias": torch.ones(4)}, "is a whole checkpoint"),
        ({"conv_in.weight": torch.ones(4)}, "is a whole checkpoint"),
        (pair(f"base_model.model.{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.lora_B.weight"),
         "saved by peft; its scale stands in .*adapter_config.json"),
        ({**pair(), "lora_controlnet": torch.ones(4)}, "holds lora_controlnet, which would be dropped"),
        ({**pair(), f"{LAYER}.lora_mid.weight": torch.ones(4, 4)}, f"holds {LAYER}.lora_mid.weight, which would be"),
        ({"something.else": torch.ones(4)}, "holds no LoRA weights: .*e.g. something.else"),
    ],
)  # fmt: skip
def test_what_cannot_be_fused_whole_is_named(tensors: Tensors, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    with pytest.raises(UserError, match=message) as refusal:
        check_lora(path, 1.0)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (
            lambda path: path.mkdir() or save_file(pair(), path / "a.safetensors"),
            "is a folder; .*e.g. .*/a.safetensors",
        ),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b""), "no whole safetensors file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "pointer of git-lfs"),
        (lambda path: torch.save(pair(), path), "is a pickle"),
    ],
)
def test_a_file_that_is_no_safetensors_is_told_what_it_is(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        check_lora(tmp_path / "x.safetensors", 1.0)


@pytest.mark.parametrize(("rank", "alpha"), [("0", "1"), ("4", "true"), ("4", f"1{'0' * 400}")])
def test_a_scale_of_peft_that_is_no_number_is_refused(rank: str, alpha: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(pair(*(f"base_model.model.{MODULE}.lora_{half}.weight" for half in "AB")), path)
    (tmp_path / "adapter_config.json").write_text(f'{{"r": {rank}, "lora_alpha": {alpha}}}')
    with pytest.raises(UserError, match=r"lora_alpha .*; two numbers are needed"):
        check_lora(path, 1.0)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (pair(), {"lora_adapter_metadata": "[1]"}, "does not fit"),
        (pair(), {"lora_adapter_metadata": '{"unet.r": 4}'}, "does not fit"),
        ({DOWN: torch.ones(4, 63), UP: torch.ones(64, 4)}, None, f"size mismatch for {MODULE}.lora_A"),
        ({**pair(), "unet.nowhere.alpha": torch.tensor(1.0)}, None, "unet.nowhere.alpha belongs to no layer"),
    ],
)
def test_what_diffusers_refuses_is_one_line_that_names_the_key(
    mini_vega: Path, tensors: Tensors, metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match=message) as refusal:
        with_loras(mini_vega, "of the checkpoint", [(tmp_path / "x.safetensors", 1.0)], tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_is_refused(scale: float, tmp_path: Path) -> None:
    save_file(pair(), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"scale of the LoRA .* finite"):
        check_lora(tmp_path / "x.safetensors", scale)


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (DOWN, UP),
        (f"{LAYER}.lora_A.default.weight", f"{LAYER}.lora_B.default.weight"),
        (f"base_model.model.{MODULE}.lora_A.weight", f"base_model.model.{MODULE}.lora_B.weight"),
        (f"unet.base_model.model.{MODULE}.lora_A.weight", f"unet.base_model.model.{MODULE}.lora_B.weight"),
        (f"unet.{DOWN}", f"unet.{UP}"),
        (f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"),
        (f"{LAYER}.lora.down.weight", f"{LAYER}.lora.up.weight"),
        (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
        (f"lora_unet_{KOHYA}.lora_down.weight", f"lora_unet_{KOHYA}.lora_up.weight"),
    ],
)
def test_a_layer_is_found_under_any_of_its_names(mini_vega: Path, down: str, up: str, tmp_path: Path) -> None:
    tensors = pair(down, up)
    if "base_model" in down:  # peft keeps the scale apart
        tensors[up] /= 2
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    save_file(tensors, tmp_path / "x.safetensors")
    fused = with_loras(mini_vega, "of the checkpoint", [(tmp_path / "x.safetensors", 0.5)], tmp_path)
    before, after = (load_component(folder, "unet", torch.float32).state_dict() for folder in (mini_vega, fused))
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed == {f"{MODULE}.weight"}
    tensors = pair()
    torch.testing.assert_close(
        after[f"{MODULE}.weight"], before[f"{MODULE}.weight"] + 0.5 * tensors[UP] @ tensors[DOWN]
    )


def test_a_layer_that_is_not_there_is_named_whole(mini_vega: Path, tmp_path: Path) -> None:
    absent = "unet.down_blocks.1.attentions.0.transformer_blocks.7.attn1.to_q.lora_{}.weight"
    save_file(pair() | pair(absent.format("A"), absent.format("B")), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"1 of its 2 layers are not there, e.g. {absent.format('A')}"):
        with_loras(mini_vega, "of the checkpoint", [(tmp_path / "x.safetensors", 1.0)], tmp_path)
