"""CLIP's tokens from the bundle's tokenizer folder, with the package tokenizers alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

WORDS = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")


def tokenize(folder: Path, text: str) -> np.ndarray:
    """Byte-pair encoding -> (1, tokens): begin, words, end, padding."""
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
