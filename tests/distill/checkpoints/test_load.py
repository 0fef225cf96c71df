from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.checkpoints.load import load_component, load_parts
from distill.common.errors import UserError


@pytest.mark.parametrize("change", [{"act_fn": "none"}, {"resnet_time_scale_shift": 3}, {"norm_num_groups": 7}])
def test_what_the_library_cannot_make_is_one_line(change: dict, copy: Path) -> None:
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"copy/unet cannot be loaded \(\w+: .*mend its config.json") as refusal:
        load_component(copy, "unet", torch.float32)
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
