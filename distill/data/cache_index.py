"""The index of a cache: where every sample lies, and its checksum, in one file that is mapped and not read.

index.safetensors holds for each resolution `{W}x{H}/counts` (shards,), the samples in each shard; `{W}x{H}/begins`
(shards, fields), the byte at which each of their fields begins there; and `{W}x{H}/crc32` (samples,), in the order of the
shards. `shard_bytes` (shards,) is how long each shard is. It is made from the finished shards and says nothing that they
do not; but 40,000 of them, of 20 million samples, are not opened one by one.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from distill.checkpoints.tensors import read_safetensors_header
from distill.common.errors import UserError
from distill.common.files import replacing
from distill.models.resolution import Resolution

INDEX = "index.safetensors"
CHECKSUM = "crc32"
DTYPES = {"F16": torch.float16, "F32": torch.float32, "I32": torch.int32}
"""What a field may be stored in."""


@dataclass(frozen=True)
class Field:
    """What is stored of every sample under one name; `dtype` is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Bucket:
    """The samples of one resolution in all shards. `ends` (shards,) counts those up to the end of each shard, `begins`
    (shards, fields) are bytes, `checksums` gives the CRC-32 of a sample by its number."""

    resolution: Resolution
    fields: tuple[Field, ...]
    ends: np.ndarray
    begins: np.ndarray
    checksums: Any

    def __len__(self) -> int:
        return int(self.ends[-1])

    def place(self, number: int) -> tuple[int, int]:
        """Shard and row of a sample."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - (int(self.ends[shard - 1]) if shard else 0)


@dataclass(frozen=True)
class CacheIndex:
    """All buckets that hold a sample, in the order of their resolutions, and how many bytes each shard has."""

    buckets: tuple[Bucket, ...]
    shard_bytes: np.ndarray


def write_index(path: Path, shards: Sequence[Path]) -> None:
    """Makes the index of whole `shards`, in their order, from their headers and checksums. Raises UserError for one that
    is damaged or is none."""
    fields: dict[str, list[Field]] = {}
    counts: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(shards), np.int32))
    begins: dict[str, list[tuple[int, list[int]]]] = defaultdict(list)
    checksums: dict[str, list[np.ndarray]] = defaultdict(list)
    for number, shard in enumerate(shards):
        records = read_safetensors_header(shard)
        with safe_open(shard, "np") as values:
            for size in sorted({name.partition("/")[0] for name in records}):
                held = {name.partition("/")[2]: one for name, one in records.items() if name.startswith(f"{size}/")}
                crc = values.get_tensor(f"{size}/{CHECKSUM}").astype(np.uint32)
                held.pop(CHECKSUM)
                stated = [Field(name, one.dtype, one.shape[1:]) for name, one in sorted(held.items())]
                if fields.setdefault(size, stated) != stated:
                    raise UserError(f"{shard} holds other fields of {size} than {shards[0]}; remove one of them")
                counts[size][number] = len(crc)
                begins[size].append((number, [one.start for _, one in sorted(held.items())]))
                checksums[size].append(crc)
    arrays = {"shard_bytes": np.array([shard.stat().st_size for shard in shards], np.int64)}
    for size, stated in fields.items():
        arrays[f"{size}/counts"] = counts[size]
        arrays[f"{size}/begins"] = table = np.zeros((len(shards), len(stated)), np.int64)
        for number, row in begins[size]:
            table[number] = row
        arrays[f"{size}/{CHECKSUM}"] = np.concatenate(checksums[size])
    save_index(path, fields, arrays)


def save_index(path: Path, fields: dict[str, list[Field]], arrays: dict[str, np.ndarray]) -> None:
    """Writes the file itself: for each resolution its fields, in the order of their names, and the arrays."""
    stated = {size: [(one.name, one.dtype, one.shape) for one in each] for size, each in fields.items()}
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata={"fields": json.dumps(stated)})


def read_index(path: Path) -> CacheIndex:
    """Raises UserError where the file is damaged or no index."""
    try:
        values = safe_open(path, "np").__enter__()  # stays open: checksums are read from the mapped file
        stated = json.loads(values.metadata()["fields"])
        buckets = [
            Bucket(
                resolution=Resolution.parse(size),
                fields=tuple(Field(name, dtype, tuple(shape)) for name, dtype, shape in fields),
                ends=np.cumsum(values.get_tensor(f"{size}/counts"), dtype=np.int64),
                begins=values.get_tensor(f"{size}/begins"),
                checksums=values.get_slice(f"{size}/{CHECKSUM}"),
            )
            for size, fields in stated.items()
        ]
        shard_bytes = values.get_tensor("shard_bytes")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it and run the same `distill cache` command again, which makes it anew"
        ) from None
    held = sorted((bucket for bucket in buckets if len(bucket)), key=lambda bucket: bucket.resolution)
    return CacheIndex(tuple(held), shard_bytes)
