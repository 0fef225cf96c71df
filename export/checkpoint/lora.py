"""A LoRA file: what is in it, and whether all of it can be fused.

diffusers drops what it does not understand with a warning at most: a matrix whose other half is missing, a layer under
an unknown name, a file of another method. So a file is judged here before it is loaded, and its keys are given the
names that diffusers knows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.checkpoints.tensors import read_safetensors_header
from distill.common.errors import UserError
from distill.common.files import read_object
from distill.common.options import LARGEST
from export.components import TEXT_ENCODERS

Lora = tuple[Path, float]
"""A file and the scale it is fused with."""
HALVES = {
    "lora_A.weight": "lora_B.weight",
    "lora_down.weight": "lora_up.weight",
    "lora.down.weight": "lora.up.weight",
    "lora_linear_layer.down.weight": "lora_linear_layer.up.weight",
}
"""How the names of a LoRA's two matrices end: the one that reduces to the rank, and the one that expands from it; peft's,
kohya's, and those of older diffusers."""
BESIDE = ("alpha", "dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_B.bias")
"""What else belongs to a layer and is read."""
OTHER_KINDS = {
    "LoHa": r"\.hada_w",
    "LoKr": r"\.lokr_w",
    "OFT": r"\.oft_",
    "IA3": r"\.on_input$",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LyCORIS 'full' difference": r"\.diff(_b)?$",
    "DoRA in kohya's format, whose scales diffusers would drop": r"dora_scale",
    "textual inversion": r"^(emb_params|clip_[lg]|string_to_\w+|<.*>)$",
    "whole checkpoint": r"^(model\.diffusion_model\.|first_stage_model\.)|^(conv_in|encoder\.conv_in)\.weight$",
    "whole text encoder": r"^text_model\.embeddings\.token_embedding\.weight$",
}
"""Files that are taken for LoRAs, by the names of their tensors."""
KOHYA_ENCODERS = {"te_": TEXT_ENCODERS[0]} | {f"te{number}_": name for number, name in enumerate(TEXT_ENCODERS, 1)}
_PARTS = "|".join(("unet", *TEXT_ENCODERS))
WRAPPERS = re.compile(rf"^(({_PARTS})\.)?(?:base_model\.model\.|_orig_mod\.|module\.)+")
DOUBLED = re.compile(rf"^((?:{_PARTS})\.|lora_unet_|lora_te[12]?_)\1+")
BARE_UNET = re.compile(r"^(?=(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b)")


def check_lora(path: Path, scale: float) -> None:
    """Raises UserError, which names the file and the keys whole, for a file that is no LoRA or a damaged one, and for a
    scale that is no number."""
    if not math.isfinite(scale):
        raise UserError(f"the scale of the LoRA {path} is {scale}; a finite number is needed")
    if path.is_dir():
        inside = next(iter(sorted(path.glob("*.safetensors"))), path / "FILE.safetensors")
        raise UserError(f"the LoRA {path} is a folder; give the file in it, e.g. {inside}")
    if not path.is_file():
        raise UserError(f"the LoRA {path} does not exist: a .safetensors file is wanted there")
    records = read_safetensors_header(path)
    if not records:
        raise UserError(f"the LoRA {path} is empty: it holds no tensor; fetch it again")
    for kind, pattern in OTHER_KINDS.items():
        if found := next((key for key in records if re.search(pattern, key)), None):
            raise UserError(
                f"{path} is a {kind} (it holds {found}), and no LoRA that can be fused; merge it with the tool that made it"
            )
    names = lora_names(path, records)
    layers = _layers(names)
    if not layers:
        raise UserError(f"{path} holds no LoRA weights: none of its keys names one, e.g. {next(iter(records))}")
    known = (*HALVES, *HALVES.values(), *BESIDE)
    if strange := next((key for key, name in names.items() if "lora" in name and not name.endswith(known)), None):
        raise UserError(f"the LoRA {path} holds {strange}, which would be dropped; merge it with the tool that made it")
    shapes = {name: records[key].shape for key, name in names.items()}
    for down, up in layers.items():
        missing = next((name for name in (down, up) if name not in shapes), None)
        if missing:
            there = _key_of(names, up if missing == down else down)
            raise UserError(f"the LoRA {path} is not whole: {there} is there and its other half {missing} is not")
        rank = shapes[down][0] if shapes[down] else 0
        if len(shapes[down]) < 2 or len(shapes[up]) < 2 or not rank or shapes[up][1] != rank:
            raise UserError(
                f"the LoRA {path}: {_key_of(names, down)} of shape {list(shapes[down])} and {_key_of(names, up)} of shape "
                f"{list(shapes[up])} do not share a rank"
            )
    _peft_scale(path, records)
    _check_finite(path)


def _peft_scale(path: Path, keys: Mapping[str, Any]) -> float:
    """What a file saved by peft itself is to be multiplied with: its alpha over its rank, which stand beside the file in
    adapter_config.json; 1 for every other file. Raises UserError where they are not there, or differ by layer."""
    if not any("base_model.model." in key for key in keys):
        return 1.0
    about = path.with_name("adapter_config.json")
    if not about.is_file():
        raise UserError(
            f"the LoRA {path} was saved by peft; its scale stands in {about}, which is not there: fetch it too"
        )
    config = read_object(about)
    numbers: list[Any] = [config.get("r"), config.get("lora_alpha")]
    rank, alpha = numbers
    if any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_dora")):
        raise UserError(
            f"{about} has ranks or alphas by layer, or a DoRA: merge that adapter with peft's merge_and_unload"
        )
    stated = all(type(number) in (int, float) and abs(number) <= LARGEST for number in numbers)
    if not stated or type(rank) is not int or rank < 1:
        raise UserError(f"{about} says r {str(rank)[:20]} and lora_alpha {str(alpha)[:20]}; two numbers are needed")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def lora_names(path: Path, keys: Mapping[str, Any]) -> dict[str, str]:
    """Key in the file -> the name under which diffusers knows it: without the wrappers of other libraries, without a
    doubled prefix, and with `unet.` where a key begins inside of the UNet. Raises UserError where two keys are one."""
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    for key in keys:
        name = DOUBLED.sub(r"\1", WRAPPERS.sub(r"\1", key))
        name = re.sub(r"(lora_[AB])\.\w+\.weight$", r"\1.weight", BARE_UNET.sub("unet.", name))
        same = _same(name)
        if same in owners:
            raise UserError(f"the LoRA {path} has one weight twice, as {owners[same]} and as {key}; keep one of them")
        owners[same], names[key] = key, name
    return names


def _same(name: str) -> str:
    """One string for all ways of naming a weight: kohya's underscores for dots, either pair of words for the halves."""
    for down, up in HALVES.items():
        name = re.sub(rf"[._]{re.escape(down)}$", ".down", name)
        name = re.sub(rf"[._]{re.escape(up)}$", ".up", name)
    name = name.replace(".processor.", ".").removeprefix("lora_")
    for kohya, ours in KOHYA_ENCODERS.items():
        name = f"{ours}.{name.removeprefix(kohya)}" if name.startswith(kohya) else name
    return re.sub(r"[._]", "", name)


def _layers(names: Mapping[str, str]) -> dict[str, str]:
    """The two matrices of each layer, down -> up, whether both are there or one."""
    layers = {}
    for name in names.values():
        for down, up in HALVES.items():
            if name.endswith((down, up)):
                stem = name.removesuffix(down).removesuffix(up)
                layers[stem + down] = stem + up
                break
    return layers


def _key_of(names: Mapping[str, str], name: str) -> str:
    return next(key for key, known in names.items() if known == name)


def _check_finite(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for key in read_safetensors_header(path):
            values = file.get_tensor(key).float()
            if not values.isfinite().all():
                what = "NaN" if values.isnan().any() else "infinity"
                raise UserError(f"the LoRA {path} holds {what} in {key}: it was saved from a training that failed")


def load_lora(pipe: Any, path: Path, adapter: str, checkpoint: str) -> list[str]:
    """Puts the LoRA of a checked file on a diffusers pipeline as `adapter`, and returns the parts that have it now.

    Raises UserError, which names the layers, where the pipeline has not all of those in the file; diffusers only warns.
    """
    from safetensors.torch import load_file

    names = lora_names(path, read_safetensors_header(path))
    try:
        if any(key != name for key, name in names.items()):
            scale = _peft_scale(path, names)
            scales = {key: scale if "lora_B" in key else 1.0 for key in names}
            tensors = {names[key]: scales[key] * value for key, value in load_file(path).items()}
            pipe.load_lora_weights(tensors, adapter_name=adapter)
        else:
            pipe.load_lora_weights(str(path.resolve().parent), weight_name=path.name, adapter_name=adapter)
    except Exception as error:  # diffusers and peft raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:300] or type(error).__name__  # torch names the key in its second line
        if strange := next((key for key, name in names.items() if "lora" not in name), None):
            reason = f"{strange} belongs to no layer of it ({reason})"
        raise UserError(f"the LoRA {path} does not fit {checkpoint}: {reason}") from None
    parts = [name for name, part in pipe.components.items() if adapter in getattr(part, "peft_config", {})]
    loaded = {
        _same(f"{part}.{name}")
        for part in parts
        for name, module in getattr(pipe, part).named_modules()
        if adapter in getattr(module, "lora_A", ())
    }
    layers = _layers(names)
    if len(loaded) != len(layers):
        absent = [down for down in layers if _same(down).removesuffix("down") not in loaded]
        example = f", e.g. {_key_of(names, absent[0])}" if len(absent) == len(layers) - len(loaded) else ""
        raise UserError(
            f"the LoRA {path} does not fit {checkpoint}: {len(layers) - len(loaded)} of its {len(layers)} layers are not "
            f"there{example}"
        )
    return parts
