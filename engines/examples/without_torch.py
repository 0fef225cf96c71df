"""Text to latent from a bundle with numpy, tokenizers and ONNX Runtime alone: a plan and the manifest are enough.

    python engines/examples/without_torch.py BUNDLE "a red circle" 128x128 latent.npy

The same reading holds for the TensorRT flavors: check the hash, take the profile that serves the size, bind its inputs.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


def open_engine(bundle: Path, manifest: dict, component: str) -> tuple[onnxruntime.InferenceSession, dict]:
    """Every file's hash is compared before the first is opened."""
    engine = next(e for e in manifest["engines"] if (e["component"], e["flavor"]) == (component, "onnxruntime"))
    for file in engine["files"]:
        if hashlib.sha256((bundle / file["path"]).read_bytes()).hexdigest() != file["sha256"]:
            raise SystemExit(f"{file['path']} is not what the manifest says")
    return onnxruntime.InferenceSession(bundle / engine["files"][0]["path"], providers=["CPUExecutionProvider"]), engine


def tokenize(folder: Path, text: str) -> np.ndarray:
    """CLIP's byte-pair encoding -> (1, tokens): begin, words, end, padding."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    vocabulary = json.loads((folder / "vocab.json").read_text())
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Split(WORDS, "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    begin, end, pad = (vocabulary[config[name]] for name in ("bos_token", "eos_token", "pad_token"))
    length = config["model_max_length"]
    ids = [begin, *tokenizer.encode(text, add_special_tokens=False).ids[: length - 2], end]
    return np.array([ids + [pad] * (length - len(ids))], np.int64)


def encode(bundle: Path, manifest: dict, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states of both encoders side by side (1, tokens, width) and the pooled embedding (1, width)."""
    hidden, pooled = [], np.empty(0)
    for suffix in ("", "_2"):
        session, engine = open_engine(bundle, manifest, f"text_encoder{suffix}")
        ids = tokenize(bundle / f"tokenizer{suffix}", text)
        names = [output["name"] for output in engine["outputs"]]
        outputs = dict(zip(names, session.run(names, {"input_ids": ids}), strict=True))
        hidden.append(next(value for name, value in outputs.items() if name.startswith("hidden_states")))
        pooled = outputs.get("text_embeds", pooled)
    return np.concatenate(hidden, axis=-1), pooled


def text_to_latent(bundle: Path, text: str, size: str, steps: int, guidance: float, noise: np.ndarray) -> np.ndarray:
    """Euler's method (Karras et al. 2022, algorithm 1 without churn) on the noise prediction, guided by the empty
    embedding. `noise` (1, 4, height / 8, width / 8) has unit variance."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    session, engine = open_engine(bundle, manifest, "unet")
    if size not in engine["resolutions"]:
        raise SystemExit(f"the bundle has no {size}: {', '.join(engine['resolutions'])}")
    width, height = map(int, size.split("x"))
    text_states, pooled = encode(bundle, manifest, text)
    config = json.loads((bundle / "scheduler/scheduler_config.json").read_text())
    count = config["num_train_timesteps"]
    betas = np.linspace(config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, count) ** 2
    kept = np.cumprod(1 - betas)
    timesteps = np.arange(steps)[::-1] * (count // steps) + config["steps_offset"]
    sigmas = np.append(np.sqrt((1 - kept) / kept)[timesteps], 0)
    latent = noise * np.sqrt(sigmas[0] ** 2 + 1)
    kinds = {tensor["name"]: tensor["dtype"] for tensor in engine["inputs"]}
    fixed = {
        "encoder_hidden_states": np.concatenate([np.zeros_like(text_states), text_states]),
        "text_embeds": np.concatenate([np.zeros_like(pooled), pooled]),
        "time_ids": np.array([[height, width, 0, 0, height, width]] * 2),
    }
    for sigma, following, timestep in zip(sigmas[:-1], sigmas[1:], timesteps, strict=True):
        scaled = np.repeat(latent / np.sqrt(sigma**2 + 1), 2, axis=0)
        inputs = fixed | {"sample": scaled, "timestep": np.array(timestep)}
        feed = {name: value.astype(kinds[name]) for name, value in inputs.items()}
        without, with_text = session.run(["out_sample"], feed)[0].astype(np.float64)
        latent = latent + (following - sigma) * (without + guidance * (with_text - without))
    return latent


if __name__ == "__main__":
    folder, prompt, wanted, out = sys.argv[1:5]
    columns, rows = (int(side) // 8 for side in wanted.split("x"))
    start = np.random.default_rng(0).standard_normal((1, 4, rows, columns))
    np.save(out, text_to_latent(Path(folder), prompt, wanted, steps=8, guidance=5.0, noise=start))
