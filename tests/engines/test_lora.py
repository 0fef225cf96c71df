"""LoRAs on a bundle: the pictures that diffusers draws with them, and the engines' own bytes without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import engines
from distill.common.errors import UserError
from tests.engines.drawing import draw, psnr_db, quiet

TARGETS = {
    "unet": ["to_q", "to_out.0", "proj_in", "conv1"],
    "text_encoder": ["q_proj", "fc1"],
    "text_encoder_2": ["v_proj"],
}


@pytest.fixture(scope="module")
def loras(mini_vega: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of all three networks, as diffusers saves them."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        pipe = StableDiffusionXLPipeline.from_pretrained(mini_vega)
        layers = {}
        for part, targets in TARGETS.items():
            network = getattr(pipe, part)
            network.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets), name)
            layers[f"{part}_lora_layers"] = get_peft_model_state_dict(network, adapter_name=name)
        pipe.save_lora_weights(folder, weight_name=f"{name}.safetensors", **layers)
    return {name: folder / f"{name}.safetensors" for name in "ab"}


@pytest.fixture
def ours(mini_bundle: Path) -> Any:
    return quiet(engines.load(mini_bundle))


def test_switching_loras_draws_what_diffusers_draws(ours: Any, mini_vega: Path, loras: dict[str, Path]) -> None:
    theirs = quiet(StableDiffusionXLPipeline.from_pretrained(mini_vega))
    first, shared = draw(ours), quiet(StableDiffusionXLPipeline(**ours.components))
    for name, file in loras.items():
        for pipe in (ours, theirs):
            pipe.load_lora_weights(file if pipe is ours else str(file), adapter_name=name)
        assert ours.get_active_adapters() == theirs.get_active_adapters()
    assert ours.get_list_adapters() == theirs.get_list_adapters()
    assert psnr_db(draw(ours), first) < 40 <= psnr_db(draw(ours), draw(theirs))
    assert (draw(shared) == draw(ours)).all(), "the networks are the same"
    for names, weights in ((["a", "b"], [0.7, {"unet": -0.4, "text_encoder": 0.5}]), ("a", None)):
        for pipe in (ours, theirs):
            pipe.set_adapters(names, weights)
        assert psnr_db(draw(ours), draw(theirs)) >= 40
    ours.delete_adapters("b")
    assert ours.loras == ["a"]
    with pytest.raises(UserError, match="no place for the LoRAs a: unload_lora_weights"):
        ours.save_pretrained("copy")
    ours.disable_lora()
    assert (draw(ours) == first).all() and ours.get_active_adapters() == []
    ours.enable_lora()
    assert psnr_db(draw(ours), first) < 40
    ours.unload_lora_weights()
    assert (draw(ours) == first).all() and not ours.loras


def test_what_is_no_lora_for_it_changes_nothing(ours: Any, loras: dict[str, Path], tmp_path: Path) -> None:
    first = draw(ours)
    strange = "unet.down_blocks.9.attentions.0.proj_in"
    halves = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}
    save_file({f"{strange}.{half}": value for half, value in halves.items()}, tmp_path / "other.safetensors")
    save_file({"hada_w1_a": torch.ones(2), "x.hada_w1_a": torch.ones(2)}, tmp_path / "loha.safetensors")
    for line, call in {
        "does not fit this bundle": lambda: ours.load_lora_weights(tmp_path / "other.safetensors"),
        "is a LoHa": lambda: ours.load_lora_weights(tmp_path, weight_name="loha.safetensors"),
        "load_lora_weights: .*loaded are no LoRAs": lambda: ours.load_lora_weights({"unet.x": torch.ones(1)}),
        "set_adapters: .*loaded are no LoRAs": lambda: ours.set_adapters("c"),
        "always fused: set_adapters": ours.fuse_lora,
        "loaded by the pipeline that engines.load gave": lambda: StableDiffusionXLPipeline(
            **ours.components
        ).load_lora_weights(str(loras["a"])),
    }.items():
        with pytest.raises(UserError, match=line):
            call()
        assert ours.loras == []
    assert (draw(ours) == first).all()
