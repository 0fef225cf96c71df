"""Adapters on a finished student: W x + (α / r) B A x, where only A and B, of rank r, are trained (arXiv 2106.09685).

The base is frozen and held in the compute dtype; A and B are in fp32. With its adapters off the net is the base itself,
so a stage whose teacher is that base needs no second UNet (LCM-LoRA, arXiv 2311.05556). What is saved is the adapters alone,
under diffusers' names and under kohya's. Text encoders have none: a latent cache holds what they gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.training_utils import cast_training_params
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file

from distill.checkpoints.load import load_component
from distill.common.errors import unknown
from distill.common.validation import STRICT
from distill.models.architectures import Architecture
from distill.models.families import Family
from distill.models.module_map import ModuleMap, make_module_map

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for."""
KOHYA_FILE = "kohya.safetensors"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
RESNETS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
LCM_TARGETS = (*ATTENTION, *RESNETS)
"""What diffusers' LCM-LoRA script puts adapters on (examples/consistency_distillation/train_lcm_distill_lora_sdxl.py)."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """`rank` r and `alpha` α (none: r); `targets` are the ends of the names of the linear layers and convolutions that get
    an adapter."""

    __pydantic_config__ = STRICT
    kind: Literal["lora"] = "lora"
    adapter: ClassVar[bool] = True
    rank: PositiveInt = 64
    alpha: PositiveFloat | None = None
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = LCM_TARGETS

    @property
    def title(self) -> str:
        return f"LoRA of rank {self.rank}"

    def check(self) -> None:
        """Does nothing: an adapter fits every teacher, but for its `targets`, which `modules` checks."""

    @property
    def family(self) -> Family | None:
        """None: it is put on a base of any."""
        return None

    def architecture_of(self, teacher: Architecture) -> Architecture:
        return teacher

    def modules(self, teacher: Architecture, held: ModuleMap | None) -> ModuleMap:
        """Those of the base: of the student it starts from, whose map is `held`, else the teacher's own.

        Raises UserError for a target that no layer of the base is called by.
        """
        modules = held or make_module_map("first", teacher.depth, teacher.depth)
        if self.targets != LCM_TARGETS:
            with torch.device("meta"):
                base = UNet2DConditionModel(**teacher.unet_config)
            layers = [
                name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
            ]
            for target in self.targets:
                if not any(f".{name}".endswith(f".{target}") for name in layers):
                    raise unknown(
                        "LoRA target", target, {*LCM_TARGETS, *(name for name in layers if "blocks" not in name)}
                    )
        return modules

    def begin(
        self,
        source: Path,
        modules: ModuleMap,
        held: ModuleMap | None,
        folder: Path,
        *,
        config: Mapping[str, Any],
        seed: int,
    ) -> Path:
        """Writes nothing: the adapters begin on the UNet of the pipeline folder `source`, which is returned."""
        return source

    def dtype(self, half: torch.dtype) -> torch.dtype:
        """The dtype of the frozen base: what the step computes in (`half`)."""
        return half

    def prepare(self, unet: UNet2DConditionModel, *, seed: int = 0) -> None:
        """Freezes the base and puts adapters on it, in fp32: A random by `seed`, B zero, so that it predicts as before."""
        from peft import LoraConfig

        unet.requires_grad_(False)
        torch.manual_seed(seed)
        alpha: Any = self.alpha or self.rank  # peft calls it an int, and divides it
        unet.add_adapter(LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=list(self.targets)))
        cast_training_params(unet)

    def save(self, unet: UNet2DConditionModel, pipeline: Path, folder: Path, dtype: torch.dtype) -> None:
        """Writes the adapters alone to `folder`, in `dtype`. B is stored times α / r: then the scale is 1, with which every
        reader takes a file that states no α."""
        from peft.utils import get_peft_model_state_dict

        scale = (self.alpha or self.rank) / self.rank
        layers = {
            name: (scale * value if ".lora_B." in name else value).to(dtype).contiguous()
            for name, value in get_peft_model_state_dict(unet).items()
        }
        StableDiffusionLoraLoaderMixin.save_lora_weights(folder, unet_lora_layers=layers)
        named = {f"unet.{name}": value for name, value in layers.items()}
        save_file(convert_state_dict_to_kohya(named), folder / KOHYA_FILE, metadata={"format": "pt"})

    def load(self, folder: Path, base: Path, dtype: torch.dtype) -> UNet2DConditionModel:
        """The UNet of the pipeline folder `base` with the adapters that `save` left in `folder`."""
        unet = load_component(base, "unet", dtype)
        unet.load_lora_adapter(load_file(folder / LORA_FILE), prefix="unet")
        return unet


@contextmanager
def adapters_off(unet: Any) -> Iterator[None]:
    """Inside, the net is its base."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()
