"""CLIP's byte-pair tokenizer, from its own merges (`clip/merges.txt.gz`) or from a word list: nothing is downloaded.

From a word list, every given word becomes one token; any other text falls back to bytes, as in CLIP's own vocabulary.
"""

from __future__ import annotations

import gzip
import itertools
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import CLIPTokenizer

END_OF_WORD = "</w>"
CLIP_MERGES = Path(__file__).parent / "clip" / "merges.txt.gz"


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes used by GPT-2 and CLIP, in their order ('!' first)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + offset) for offset in range(len(rest))]


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged, index = [], 0
    while index < len(pieces):
        if tuple(pieces[index : index + 2]) == pair:
            merged.append("".join(pair))
            index += 2
        else:
            merged.append(pieces[index])
            index += 1
    return merged


def merges_of(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges, in rank order, under which each ASCII word is one token. A later merge ranks below all earlier ones,
    so it cannot break a word that is already whole."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + END_OF_WORD]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            pair = min(pairs, key=lambda p: ranks.get(p, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            pieces = _merge(pieces, pair)
    return list(ranks)


def clip_merges() -> list[tuple[str, str]]:
    """CLIP's merges in rank order: the 48,894 lines of OpenAI's bpe_simple_vocab_16e6.txt that CLIP uses."""
    first_second = (line.split() for line in gzip.decompress(CLIP_MERGES.read_bytes()).decode().splitlines())
    return [(first, second) for first, second in first_second]


def tokenizer_from_merges(
    merges: Sequence[tuple[str, str]], *, bos_token_id: int, eos_token_id: int, max_length: int, pad_token: str
) -> CLIPTokenizer:
    """A CLIPTokenizer whose ids stay below the two special ids.

    Raises ValueError where the tokens do not fit below `bos_token_id`.
    """
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(letter + END_OF_WORD for letter in alphabet), *("".join(pair) for pair in merges)]
    if len(tokens) > bos_token_id:
        raise ValueError(f"{len(tokens)} tokens do not fit below id {bos_token_id}")
    vocab = {token: index for index, token in enumerate(tokens)}
    vocab |= {"<|startoftext|>": bos_token_id, "<|endoftext|>": eos_token_id}
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocab), encoding="utf-8")
        merges_file.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
        return CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=max_length, pad_token=pad_token)
