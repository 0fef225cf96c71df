"""What a command and a manifest may choose from."""

from __future__ import annotations

from typing import Literal

FlavorName = Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
Layout = Literal["per-resolution", "shared", "ranged"]
Guidance = Literal["always", "never", "any"]
"""Whether a UNet is called with guidance (2 latents for each image), without (1), or either way."""
Precision = Literal["fp16", "fp32", "bf16", "int8", "fp8"]
EIGHT_BITS = ("int8", "fp8")
"""Precisions of a UNet whose other components stay as they are."""
Task = Literal[
    "text-to-image", "image-to-image", "inpaint", "controlnet", "controlnet-image-to-image", "controlnet-inpaint"
]
TASKS: dict[Task, str] = {
    "text-to-image": "",
    "image-to-image": "Img2Img",
    "inpaint": "Inpaint",
    "controlnet": "ControlNet",
    "controlnet-image-to-image": "ControlNetImg2Img",
    "controlnet-inpaint": "ControlNetInpaint",
}
"""What diffusers puts before `Pipeline` in the name of a class that draws from text, from a picture, into a picture, and
the same under the control of another picture."""
