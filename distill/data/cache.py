"""The latent cache: what the frozen networks would say of every sample, computed once.

A cache is a folder of safetensors shards, each holding some consecutive samples of the source, by resolution:
`{W}x{H}/latents` (n, 4, H/8, W/8) scaled, and under their own names what else the UNet takes of a sample, as
`{W}x{H}/encoder_hidden_states` (n, tokens, dim); `{W}x{H}/crc32` (n,) is a checksum of each sample.
unconditional.safetensors holds what the UNet takes for no caption. cache.json holds the key: the hashes of the VAE, of
the text encoders and tokenizers, and of the data. Shards are written whole or not at all, so a killed run goes on where
it was, and several processes (torchrun) share the work by shard. The last of them to end writes index.safetensors
(cache_index.py), by which samples are found and their checksums compared.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from distill.checkpoints.folder import find_family, network_folders, read_config
from distill.checkpoints.tensors import component_weights, read_metadata
from distill.common.errors import UserError
from distill.common.files import read_object, sha256_file_once, sha256_json
from distill.data.cache_index import DTYPES, INDEX, Bucket, read_index
from distill.data.order import BatchOrder
from distill.data.places import open_place
from distill.models.conditioning import TEXT_INPUTS, TOKENS, conditioning_of
from distill.models.families import Family

Held = TypeVar("Held")
KEY_FILE = "cache.json"
UNCONDITIONAL = "unconditional.safetensors"
TOKENIZER_WORDS = ("vocab.json", "merges.txt", "tokenizer.json")


def frozen_hashes(checkpoint: Path) -> dict[str, str]:
    """A hash of each part of a checkpoint that the cache stands for: weights, the VAE's scaling, the tokenizers' words."""
    hashes: dict[str, Any] = {
        component: [sha256_file_once(file) for file in component_weights(checkpoint / component)]
        for component in network_folders(checkpoint)
        if component != "unet"
    }
    vae = read_config(checkpoint, "vae")
    hashes["vae"] += [vae.get(number) for number in ("scaling_factor", "shift_factor")]
    for tokenizer in conditioning_of(read_config(checkpoint, "unet")).tokenizers:
        settings = read_object(checkpoint / tokenizer / "tokenizer_config.json")
        words = [file for name in TOKENIZER_WORDS if (file := checkpoint / tokenizer / name).is_file()]
        told = [str(settings.get(key)) for key in ("pad_token", "model_max_length")]
        hashes[tokenizer] = [*map(sha256_file_once, words), *told]
    return {part: sha256_json(value) for part, value in hashes.items()}


def checksum(tensors: Iterable[torch.Tensor]) -> int:
    """CRC-32 over the bytes of tensors in order."""
    crc = 0
    for tensor in tensors:
        crc = zlib.crc32(tensor.contiguous().numpy().data, crc)
    return crc


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.safetensors"


class LatentCache:
    """Batches of one resolution each, a pure function of the step: resuming needs no state, and the order does not
    depend on the number of processes. What it holds in memory is some 400 bytes a shard, whatever its samples."""

    def __init__(self, place: str | Path, *, batch_size: int, seed: int) -> None:
        """`place` is the cache's folder, or an URL of it that fsspec reads.

        Raises UserError for a place that is no cache, is not finished or damaged, or holds no sample.
        """
        self.place, self._files = place, open_place(place)
        sizes = self._files.sizes()
        if sizes is not None and KEY_FILE not in sizes:
            raise UserError(f"{place} is no latent cache: it has no {KEY_FILE}; make one with: python -m distill cache")
        self.key = self._read(KEY_FILE, read_object)
        count = self.key.get("shards")
        if not isinstance(count, int):
            raise UserError(f"{place}/{KEY_FILE} is no latent cache's: it does not count its shards")
        wanted = [shard_name(number) for number in range(count)]
        if sizes is not None:
            found = sum(name in sizes for name in wanted)
            lacking = [f"{found} of {len(wanted)} shards"] if found < len(wanted) else []
            lacking += [f"no {name}" for name in (UNCONDITIONAL, INDEX) if name not in sizes]
            if lacking:
                raise UserError(
                    f"{place} is not finished: it has {lacking[0]}; run the same `distill cache` command again"
                )
        index = self._read(INDEX, read_index)
        if len(index.shard_bytes) != len(wanted):
            raise UserError(
                f"{INDEX} of {place} is of {len(index.shard_bytes)} shards, the cache has {len(wanted)}: run the same "
                "`distill cache` command again, which makes it anew"
            )
        for name, size in zip(wanted, index.shard_bytes, strict=True):
            if sizes is not None and sizes[name] != size:
                raise UserError(
                    f"{place}/{name} is damaged (it has {sizes[name]} bytes, {INDEX} says {size}): run the same `distill "
                    "cache` command again, which makes it anew"
                )
        self.unconditional = {name: value.float() for name, value in self._read(UNCONDITIONAL, load_file).items()}
        self._buckets = index.buckets
        if not self._buckets:
            raise UserError(f"{place} holds no cached sample; make it with: python -m distill cache")
        self._order = BatchOrder([*map(len, self._buckets)], batch_size, seed)

    def _read(self, name: str, read: Callable[[Path], Held]) -> Held:
        """What a whole file holds; what is wrong with it is told of its place, not of where it was fetched to."""
        path = self._files.local(name)
        try:
            return read(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), f"{self.place}/{name}")) from None
        except SafetensorError as error:
            raise UserError(
                f"{self.place}/{name} is damaged ({error}): remove it and run the same `distill cache` command again"
            ) from None

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    @property
    def digest(self) -> str:
        """Of its key, and of its index, which has a checksum of every sample."""
        return sha256_json([self.key, sha256_file_once(self._files.local(INDEX))])

    @property
    def holds_text(self) -> bool:
        """Whether it holds what the UNet reads of captions, or their tokens alone (`distill cache --text online`)."""
        return not {field.name for field in self._buckets[0].fields}.isdisjoint(TEXT_INPUTS)

    def check_family(self, family: Family, teacher: object) -> None:
        """Raises UserError where the UNets of a family take embeddings of other widths; `teacher` is one as a user calls
        it."""
        found = {name: tuple(value.shape) for name, value in self.unconditional.items()}
        wanted = family.text_shapes
        if found != wanted:
            raise UserError(
                f"the cache holds text of the shapes {found}, the UNet of {teacher} takes {wanted}; make one with this "
                f"teacher: python -m distill cache --model {teacher}"
            )

    def check_teacher(self, teacher: Path) -> list[str]:
        """Those of the teacher's VAE and text encoders that are other files than the ones the cache was made with.

        Raises UserError as `check_family` does.
        """
        self.check_family(find_family(teacher), teacher)
        hashes = frozen_hashes(teacher)
        return [component for component, digest in hashes.items() if self.key.get(component) != digest]

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`latents` and what else the UNet takes of a step's global batch, or of some rows of it, in float32; `TOKENS`, as
        whole numbers, where it holds no text.

        Raises UserError for a sample that holds NaN or infinity.
        """
        kind, numbers = self._order.samples(step, rows)
        bucket = self._buckets[kind]
        places = [bucket.place(int(number)) for number in numbers]
        ranges = [
            (shard_name(shard), int(begin) + row * field.nbytes, field.nbytes)
            for shard, row in places
            for field, begin in zip(bucket.fields, bucket.begins[shard], strict=True)
        ]
        parts = self._files.read(ranges)
        count = len(bucket.fields)
        samples = [
            self._sample(bucket, int(number), parts[count * i : count * (i + 1)]) for i, number in enumerate(numbers)
        ]
        batch = {field: torch.stack([sample[field] for sample in samples]) for field in samples[0]}
        return {field: value if field in TOKENS.values() else value.float() for field, value in batch.items()}

    def _sample(self, bucket: Bucket, number: int, stored: Sequence[bytearray]) -> dict[str, torch.Tensor]:
        """One sample's fields from their bytes. Raises UserError, which names it, where they are not what was written or
        not finite."""
        shard, row = bucket.place(number)
        where = f"{self.place}/{shard_name(shard)}"
        crc = 0
        for part in stored:
            crc = zlib.crc32(part, crc)
        if crc != bucket.checksums[number]:
            raise UserError(
                f"{where}: row {row} of {bucket.resolution} is not what was written there; the shard is damaged, or another "
                "than the index was made of: remove it and run the same `distill cache` command again"
            )
        sample = {
            field.name: torch.frombuffer(part, dtype=DTYPES[field.dtype]).view(field.shape)
            for field, part in zip(bucket.fields, stored, strict=True)
        }
        for name, value in sample.items():
            if not value.sum(dtype=torch.float32).isfinite():
                about = json.loads(read_metadata(self._files.local(shard_name(shard)))["slimxl"])["samples"]
                raise UserError(
                    f"{where}: the {name} of sample {about[str(bucket.resolution)][row]['key']!r} (row {row} of "
                    f"{bucket.resolution}) are not finite; remove that shard, mend or remove the sample, and run the same "
                    "`distill cache` command again"
                )
        return sample
