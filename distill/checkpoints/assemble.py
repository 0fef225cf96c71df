"""A whole pipeline folder put together from tensors alone: what random and single-file checkpoints need.

Configs come from the catalogue and tokenizers from `tokenizer.py`, so nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.checkpoints.tensors import MadeTensor, WritableTensor, write_safetensors
from distill.common.files import require_free_disk
from distill.models.architectures import Architecture
from distill.models.families import Family
from distill.models.networks import NETWORKS, make_network

if TYPE_CHECKING:
    import torch

SCHEDULER = {  # of SDXL, SD 1.x and 2.x alike, beside what they predict
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def meta_components(architecture: Architecture) -> dict[str, Any]:
    """The networks of an architecture without memory for their weights."""
    import torch

    with torch.device("meta"):
        return {component: make_network(component, config) for component, config in architecture.configs.items()}


def component_shapes(component: str, module: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor of a network and its shape, under the names that published checkpoints use (transformers 5.6 drops
    `text_model.` from one of the two text encoders)."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    if component != "text_encoder":
        return shapes
    return {f"text_model.{key.removeprefix('text_model.')}": shape for key, shape in shapes.items()}


def assemble(
    folder: Path,
    architecture: Architecture,
    tensors: Mapping[str, Mapping[str, WritableTensor]],
    **scheduler: Any,
) -> None:
    """Writes the pipeline folder; `tensors` holds those of each network by name, `scheduler` are settings that replace
    those of SCHEDULER. model_index.json comes last.

    Raises UserError where the disk is too small.
    """
    size = sum(tensor.nbytes for component in tensors.values() for tensor in component.values())
    require_free_disk(folder.parent, size, f"a checkpoint of {architecture.name}", "--workdir")
    for component, module in meta_components(architecture).items():
        is_diffusers = NETWORKS[component][0] == "diffusers"
        (module.save_config if is_diffusers else module.config.save_pretrained)(folder / component)
        stem = "diffusion_pytorch_model" if is_diffusers else "model"
        write_safetensors(folder / component / f"{stem}.safetensors", tensors[component])
    for name, part in tokenizers_and_scheduler(architecture.family, **scheduler).items():
        part.save_pretrained(folder / name)
    conditioning = architecture.family.conditioning
    index: dict[str, Any] = {"_class_name": conditioning.pipeline, "scheduler": ("diffusers", "EulerDiscreteScheduler")}
    index |= dict.fromkeys(conditioning.tokenizers, ("transformers", "CLIPTokenizer")) | conditioning.networks
    index |= conditioning.options
    (folder / "model_index.json").write_text(json.dumps(index, indent=1, sort_keys=True))


def tokenizers_and_scheduler(family: Family, **scheduler: Any) -> dict[str, Any]:
    """A pipeline's parts beside its networks, by their names in the pipeline; `scheduler` replaces settings of SCHEDULER."""
    from diffusers import EulerDiscreteScheduler

    from distill.checkpoints.tokenizer import clip_merges, merges_of, tokenizer_from_merges

    merges = clip_merges() if family.vocabulary is None else merges_of(family.vocabulary)
    kind = family.conditioning
    parts: dict[str, Any] = {
        tokenizer: tokenizer_from_merges(
            merges,
            bos_token_id=family.networks[encoder]["bos_token_id"],
            eos_token_id=family.networks[encoder]["eos_token_id"],
            max_length=family.networks[encoder]["max_position_embeddings"],
            pad_token=pad_token,
        )
        for tokenizer, encoder, pad_token in zip(kind.tokenizers, kind.encoders, kind.pad_tokens, strict=True)
    }
    settings = SCHEDULER | {"prediction_type": family.prediction_type} | scheduler
    return parts | {"scheduler": EulerDiscreteScheduler(**settings)}


def random_tensors(architecture: Architecture) -> dict[str, dict[str, MadeTensor]]:
    """Random weights in the family's dtype, each made when it is written; the same every time."""
    import torch

    dtype = getattr(torch, architecture.family.dtype)
    name = {torch.float16: "F16", torch.float32: "F32"}[dtype]
    generator = torch.Generator().manual_seed(0)

    def made(component: str, module: Any) -> Iterator[tuple[str, MadeTensor]]:
        for key, shape in component_shapes(component, module).items():
            yield key, MadeTensor(name, shape, partial(_random_tensor, key, shape, dtype, generator))

    return {component: dict(made(component, module)) for component, module in meta_components(architecture).items()}


def _random_tensor(key: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Torch's own initial scale: uniform within 1/sqrt(fan_in); norms 1; biases 0. Keeps fp16 activations in range."""
    import torch

    tensor = torch.zeros(shape, dtype=dtype)
    if len(shape) >= 2:
        bound = (tensor.numel() / shape[0]) ** -0.5
        tensor.uniform_(-bound, bound, generator=generator)
    elif "norm" in key and key.endswith("weight"):
        tensor.fill_(1)
    return tensor
