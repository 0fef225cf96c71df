"""Text to latent from a bundle with numpy, tokenizers and a runtime alone: a plan and the manifest are enough.

usage: python engines/examples/without_torch.py BUNDLE "a red circle" 128x128 latent.npy [onnxruntime|tensorrt-rtx|tensorrt]

The flavors of TensorRT take their own package and cuda-bindings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from checked_engine import open_engine
from clip_tokens import tokenize


def text_to_latent(bundle: Path, text: str, size: str, steps: int, guidance: float, noise: Any, flavor: str) -> Any:
    """Euler's method (Karras et al. 2022, algorithm 1 without churn), guided by the empty embedding. `noise` (1, 4,
    height / 8, width / 8) has unit variance."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    unet, engine = open_engine(bundle, manifest, "unet", flavor, size)
    hidden = []
    for suffix in ("", "_2"):
        encode, _ = open_engine(bundle, manifest, f"text_encoder{suffix}", flavor, size)
        encoded = encode({"input_ids": tokenize(bundle / f"tokenizer{suffix}", text)}, size)
        hidden.append(next(value for name, value in encoded.items() if name.startswith("hidden_states")))
    states, pooled = np.concatenate(hidden, axis=-1), encoded["text_embeds"]
    config = json.loads((bundle / "scheduler/scheduler_config.json").read_text())
    count = config["num_train_timesteps"]
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, count) ** 2
    timesteps = np.arange(steps)[::-1] * (count // steps) + config["steps_offset"]
    sigmas = np.append(np.sqrt(1 / np.cumprod(1 - betas) - 1)[timesteps], 0)
    latent = noise * np.sqrt(sigmas[0] ** 2 + 1)
    inputs: dict[str, Any] = {"encoder_hidden_states": np.concatenate([states * 0, states])}
    width, height = map(int, size.split("x"))
    inputs |= {
        "text_embeds": np.concatenate([pooled * 0, pooled]),
        "time_ids": [[height, width, 0, 0, height, width]] * 2,
    }
    for sigma, following, timestep in zip(sigmas[:-1], sigmas[1:], timesteps, strict=True):
        inputs |= {"sample": np.repeat(latent / np.sqrt(sigma**2 + 1), 2, axis=0), "timestep": [timestep]}
        feed = {tensor["name"]: np.asarray(inputs[tensor["name"]], tensor["dtype"]) for tensor in engine["inputs"]}
        without, with_text = unet(feed, size)["out_sample"].astype(np.float64)
        latent = latent + (following - sigma) * (without + guidance * (with_text - without))
    return latent


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        raise SystemExit(__doc__)
    folder, prompt, wanted, out, chosen = [*sys.argv[1:5], *sys.argv[5:6], "onnxruntime"][:5]
    columns, rows = (int(side) // 8 for side in wanted.split("x"))
    start = np.random.default_rng(0).standard_normal((1, 4, rows, columns))
    try:
        np.save(out, text_to_latent(Path(folder), prompt, wanted, 8, 5.0, start, chosen))
    except ImportError as error:
        raise SystemExit(f"flavor {chosen}: {error}") from None
