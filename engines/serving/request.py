"""What a request to the text-to-image model may ask for: its values, their defaults and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distill.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from distill.checkpoints.sampling import Sampling

DEFAULTS: dict[str, Any] = {
    "negative_prompt": None,
    "width": None,
    "height": None,
    "steps": 25,
    "guidance": 5.0,
    "seed": 0,
    "images": 1,
}
LIMITS = {"steps": (1, 200), "guidance": (0.0, 50.0), "images": (1, 16), "seed": (0, 2**63 - 1)}
MAX_WORK = 800
"""Images times steps: a limit on how long one request may keep an instance busy."""
MAX_PROMPT = 2000
"""Characters. CLIP reads 77 tokens of them, and its tokenizer takes quadratically long for a long word."""
BATCHED_BY = ("width", "height", "steps", "guidance")
"""Requests that agree in these can be drawn as one batch."""


def defaults(sampling: Sampling | None) -> dict[str, Any]:
    """What a request asks for where it does not say; a few-step model has its own steps and guidance, by `sampling`."""
    own = {"steps": sampling.steps, "guidance": sampling.guidance_scale} if sampling else {}
    return DEFAULTS | {name: value for name, value in own.items() if value is not None}


def read_values(inputs: Mapping[str, np.ndarray], sizes: list[str], sampling: Sampling | None = None) -> dict[str, Any]:
    """The request's values by name, with defaults; `sizes` are those served, and the first is the default.

    Raises UserError, with what was got and what is allowed, for a request that cannot be drawn.
    """
    values = defaults(sampling)
    for name, array in inputs.items():
        if array.size != 1:
            raise UserError(f"{name} has {array.size} values, a request takes one; send a request for each prompt")
        value = array.reshape(-1)[0]
        values[name] = _read_text(name, value) if isinstance(value, bytes) else value.item()
    if "prompt" not in values:  # Triton counts the inputs only, it does not check that the required ones are there
        raise UserError("the request has no prompt")
    for name, (low, high) in LIMITS.items():
        if not low <= values[name] <= high:
            raise UserError(f"{name} is {values[name]}, allowed are {low} to {high}")
    if sampling:
        sampling.check(values["steps"])
    if (work := values["images"] * values["steps"]) > MAX_WORK:
        raise UserError(f"images times steps is {work}, allowed are up to {MAX_WORK}; send several requests")
    width, height = (int(side) for side in sizes[0].split("x"))
    values["width"] = width if values["width"] is None else values["width"]
    values["height"] = height if values["height"] is None else values["height"]
    size = f"{values['width']}x{values['height']}"
    if size not in sizes:
        raise UserError(f"size {size} is not served: allowed are {', '.join(sizes)}")
    return values


def _read_text(name: str, value: bytes) -> str:
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 ({error})") from None
    if len(text) > MAX_PROMPT:
        raise UserError(f"{name} has {len(text)} characters, allowed are {MAX_PROMPT}")
    return text
