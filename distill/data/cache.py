"""The latent cache: what the frozen networks would say of every sample, computed once.

A cache is a folder of safetensors shards, each holding some consecutive samples of the source, by resolution:
`{W}x{H}/latents` (n, 4, H/8, W/8) scaled, and under their own names what else the UNet takes of a sample, as
`{W}x{H}/encoder_hidden_states` (n, tokens, dim); `{W}x{H}/crc32` (n,) is a checksum of each sample, compared when it is
read. unconditional.safetensors holds what the UNet takes for no caption. cache.json holds the key: the hashes of the
VAE, of the text encoders and tokenizers, and of the data. Shards are written whole or not at all, so a killed run goes on
where it was, and several processes (torchrun) share the work by shard.
"""

from __future__ import annotations

import json
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from distill.checkpoints.sources import component_weights, find_family, network_folders, read_config
from distill.common.errors import UserError
from distill.common.files import read_object, sha256_file_once, sha256_json
from distill.common.files import seed_of as seed_of  # noqa: PLC0414  # step.py and stage.py take it from here
from distill.models.conditioning import conditioning_of
from distill.models.resolution import Resolution

KEY_FILE = "cache.json"
UNCONDITIONAL = "unconditional.safetensors"
CHECKSUM = "crc32"
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


def shapes_of(path: Path) -> dict[str, list[int]]:
    """Of a shard's tensors, by name. Raises UserError for a shard that is cut or not one."""
    try:
        with safe_open(path, "pt") as shard:
            return {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged ({error}): run the same `distill cache` command again, which makes it anew"
        ) from None


class LatentCache:
    """Batches of one resolution each, a pure function of the step: resuming needs no state, and the order does not
    depend on the number of processes."""

    def __init__(self, folder: Path, *, batch_size: int, seed: int) -> None:
        """Raises UserError for a folder that is no cache, is not finished or damaged, or holds no sample."""
        if not (folder / KEY_FILE).is_file():
            raise UserError(
                f"{folder} is no latent cache: it has no cache.json; make one with: python -m distill cache"
            )
        self.key = read_object(folder / KEY_FILE)
        self.batch_size, self.seed = batch_size, seed
        self._rows: dict[Resolution, list[tuple[Path, int]]] = defaultdict(list)
        self._fields: dict[Resolution, set[str]] = defaultdict(lambda: {"latents"})
        self._open: dict[Path, Any] = {}
        shards = sorted(folder.glob("shard-*.safetensors"))
        wanted, has_text = self.key.get("shards", 0), (folder / UNCONDITIONAL).is_file()
        if len(shards) < wanted or not has_text:
            found = f"{len(shards)} of {wanted} shards" if has_text else f"no {UNCONDITIONAL}"
            raise UserError(f"{folder} is not finished: it has {found}; run the same `distill cache` command again")
        for path in shards:
            for name, shape in shapes_of(path).items():
                size, _, field = name.partition("/")
                resolution = Resolution.parse(size)
                if field == "latents":
                    self._rows[resolution] += [(path, i) for i in range(shape[0])]
                elif field != CHECKSUM:
                    self._fields[resolution].add(field)
        self.unconditional = {name: value.float() for name, value in load_file(folder / UNCONDITIONAL).items()}
        if not self._rows:
            raise UserError(f"{folder} holds no cached sample; make it with: python -m distill cache")
        self._rows = dict(sorted(self._rows.items()))
        self._sizes = np.array([len(rows) for rows in self._rows.values()])
        self._offsets = np.random.default_rng(seed).integers(batch_size, size=len(self._sizes))
        self._epoch, self._order = -1, []  # type: tuple[int, list[tuple[Resolution, np.ndarray]]]

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def check_teacher(self, teacher: Path) -> list[str]:
        """Those of the teacher's VAE and text encoders that are other files than the ones the cache was made with.

        Raises UserError where its UNet takes embeddings of other widths.
        """
        family = find_family(teacher)
        found = {name: tuple(value.shape) for name, value in self.unconditional.items()}
        wanted = family.text_shapes
        if found != wanted:
            raise UserError(
                f"the cache holds text of the shapes {found}, the UNet of {teacher} takes {wanted}; make one with this "
                f"teacher: python -m distill cache --model {teacher}"
            )
        hashes = frozen_hashes(teacher)
        return [component for component, digest in hashes.items() if self.key.get(component) != digest]

    def _batches_before(self, epoch: int) -> np.ndarray:
        """Of each resolution, how many batches come before an epoch: over the epochs as many as its samples fill."""
        return (epoch * self._sizes + self._offsets) // self.batch_size

    def _order_of(self, epoch: int) -> list[tuple[Resolution, np.ndarray]]:
        """The epoch's batches in order. A last batch that is not full is filled up from the start, and is in so few of
        the epochs that no sample is seen more often than those of other resolutions."""
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            counts = self._batches_before(epoch + 1) - self._batches_before(epoch)
            batches = []
            for (resolution, rows), count in zip(self._rows.items(), counts, strict=True):
                order = np.resize(rng.permutation(len(rows)), count * self.batch_size)
                batches += [(resolution, part) for part in order.reshape(-1, self.batch_size)]
            self._epoch, self._order = epoch, [batches[i] for i in rng.permutation(len(batches))]
        return self._order

    def batch(self, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
        """`latents` and what else the UNet takes of a step's global batch, or of some rows of it, in float32.

        Raises UserError for a sample that holds NaN or infinity.
        """
        epochs = range((step + len(self._sizes) + 1) * self.batch_size)  # enough: each has one sample at least
        epoch = bisect_right(epochs, step, key=lambda epoch: self._batches_before(epoch).sum()) - 1
        resolution, indices = self._order_of(epoch)[step - self._batches_before(epoch).sum()]
        places = [self._rows[resolution][i] for i in indices[rows]]
        samples = [self._sample(resolution, path, row) for path, row in places]
        return {field: torch.stack([sample[field] for sample in samples]).float() for field in samples[0]}

    def _sample(self, resolution: Resolution, path: Path, row: int) -> dict[str, torch.Tensor]:
        """One sample's fields. Raises UserError, which names it, where they are not what was written or not finite."""
        shard = self._shard(path)
        sample = {field: shard.get_slice(f"{resolution}/{field}")[row] for field in self._fields[resolution]}
        if checksum([sample[field] for field in sorted(sample)]) != shard.get_slice(f"{resolution}/{CHECKSUM}")[row]:
            raise UserError(
                f"{path}: row {row} of {resolution} is not what was written there; the shard is damaged: remove it and run "
                "the same `distill cache` command again"
            )
        for field, value in sample.items():
            if not value.sum(dtype=torch.float32).isfinite():
                about = json.loads(shard.metadata()["slimxl"])["samples"][str(resolution)][row]
                raise UserError(
                    f"{path}: the {field} of sample {about['key']!r} (row {row} of {resolution}) are not finite; remove "
                    "that shard, mend or remove the sample, and run the same `distill cache` command again"
                )
        return sample

    def _shard(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, "pt").__enter__()
        return self._open[path]
