"""What a bundle does of what its checkpoint does in diffusers:

    python -m tests.engines.features BUNDLE CHECKPOINT [PICTURES]

A line for each feature: the distance of the two pictures (PSNR, same seed), or the line that refuses it. PICTURES is a
folder for the pairs, diffusers' on the left. With bundle and checkpoint in fp32, 40 dB and more is the same picture.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

import engines
from distill.common.errors import UserError
from tests.engines import drawing
from tests.engines.drawing import MASK, PICTURE, psnr_db, quiet


def draw(pipe: Any, kind: str = "", **arguments: Any) -> np.ndarray:
    """Pictures by the class of diffusers for this task, over the same networks."""
    name = type(pipe).__name__.replace("Pipeline", f"{kind}Pipeline")
    return drawing.draw(quiet(getattr(diffusers, name).from_pipe(pipe)) if kind else pipe, **arguments)


def after(change: Callable[[Any], Any], **arguments: Any) -> Callable[[Any], np.ndarray]:
    return lambda pipe: (change(pipe), draw(pipe, **arguments))[1]


def compiled(pipe: Any) -> np.ndarray:
    if is_ours(pipe):  # diffusers' own would take a minute, and draw the same
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    return draw(pipe)


def saved_and_loaded(pipe: Any) -> np.ndarray:
    if not is_ours(pipe):
        return draw(pipe)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(f"{folder}/copy")
        return draw(quiet(engines.load(f"{folder}/copy")))


def switched_off(pipe: Any) -> None:
    for switch in (pipe.disable_attention_slicing, pipe.disable_freeu, pipe.disable_lora):
        switch()
    pipe.vae.disable_slicing()
    pipe.vae.disable_tiling()


def is_ours(pipe: Any) -> bool:
    return hasattr(pipe, "bundle")


FROM_PICTURE: dict[str, Any] = {"image": PICTURE, "strength": 0.7}
FEATURES: dict[str, Callable[[Any], Any]] = {
    "text to image": draw,
    "negative prompt, 2 pictures": lambda pipe: draw(pipe, negative_prompt="a star", num_images_per_prompt=2),
    "without guidance": lambda pipe: draw(pipe, guidance_scale=1.0),
    "guidance_rescale": lambda pipe: draw(pipe, guidance_rescale=0.7),
    "image to image": lambda pipe: draw(pipe, "Img2Img", **FROM_PICTURE, width=None, height=None),
    "inpaint": lambda pipe: draw(pipe, "Inpaint", **FROM_PICTURE, mask_image=MASK),
    "a size between those of the bundle": lambda pipe: draw(pipe, width=128, height=96),
    "attention slicing": after(lambda pipe: pipe.enable_attention_slicing()),
    "VAE slicing": after(lambda pipe: pipe.vae.enable_slicing()),
    "all that is switched off": after(switched_off),
    "torch.compile": compiled,
    "save_pretrained, load again": saved_and_loaded,
    "VAE tiling": after(lambda pipe: pipe.vae.enable_tiling()),
    "fuse_qkv_projections": after(lambda pipe: pipe.fuse_qkv_projections()),
    "FreeU": after(lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.3, 1.4)),
    "PAG": lambda pipe: draw(pipe, "PAG", pag_scale=3.0),
    "clip_skip": lambda pipe: draw(pipe, clip_skip=1),
    "cross_attention_kwargs": lambda pipe: draw(pipe, cross_attention_kwargs={"scale": 0.5}),
    "textual inversion": lambda pipe: pipe.load_textual_inversion({"<a>": torch.zeros(1, 64)}, token="<a>"),
    "ControlNet": lambda pipe: pipe.unet(*[torch.zeros(1, 4, 16, 16)] * 3, down_block_additional_residuals=()),
    "model offload": lambda pipe: (pipe.enable_model_cpu_offload(), draw(pipe))[1],
    "sequential offload": lambda pipe: (pipe.enable_sequential_cpu_offload(), draw(pipe))[1],
    "group offload": lambda pipe: (pipe.enable_group_offload(torch.device("cpu")), draw(pipe))[1],
    "attention processors": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor2_0()),
    "IP-Adapter": lambda pipe: pipe.load_ip_adapter(
        {"image_proj": {}, "ip_adapter": {}}, subfolder="", weight_name="", image_encoder_folder=None
    ),
    "pickle": pickle.dumps,
}


def compare(name: str, ours: Any, theirs: Any, pictures: Path | None = None) -> str:
    """Of two pipelines with the same weights."""
    ours, theirs = (quiet(type(pipe)(**pipe.components)) for pipe in (ours, theirs))
    try:
        drawn = FEATURES[name](ours)
    except UserError as error:
        return f"refused: {error}"
    wanted = FEATURES[name](theirs)
    if pictures:
        pair = np.concatenate([wanted[0], drawn[0]], axis=1)
        Image.fromarray((pair * 255).round().astype(np.uint8)).save(pictures / f"{name.replace(' ', '-')}.png")
    return f"{psnr_db(drawn, wanted):.0f} dB"


if __name__ == "__main__":
    bundle, checkpoint, *folders = sys.argv[1:]
    pipes = engines.load(bundle), diffusers.DiffusionPipeline.from_pretrained(checkpoint)
    for feature in FEATURES:
        print(f"{feature:36} {compare(feature, *pipes, *map(Path, folders))}", flush=True)
