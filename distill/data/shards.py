"""WebDataset shards read by index: https://github.com/webdataset/webdataset#the-webdataset-format

The libraries read shards from front to end, or copy them whole into another format first. A cache that goes on after a
stop, on several processes, needs any sample at once; so the headers are read once, and each part when it is wanted.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from distill.common.errors import UserError
from distill.data.rows import (
    CAPTION_SUFFIXES,
    PICTURES,
    Found,
    Row,
    is_hidden,
    note_not_read,
    open_picture,
    printable,
    read_caption,
    stamp,
)
from distill.data.samples import BadSample

TEXTS = (*CAPTION_SUFFIXES, ".json")  # the first that a sample has is its caption
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


def is_pattern_of_shards(spec: str) -> bool:
    return spec.endswith((".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.xz", ".tar.bz2"))


MOST_SHARDS = 1_000_000


def expand_braces(pattern: str) -> list[str]:
    """The names that braces ({000..099}) stand for. Raises UserError for braces that do not close and for too many names."""
    from braceexpand import braceexpand

    wanted = 1
    for first, last in re.findall(r"\{(-?[0-9]+)\.\.(-?[0-9]+)", pattern):
        wanted *= abs(int(last) - int(first)) + 1 if max(len(first), len(last)) < 20 else MOST_SHARDS + 1
    if wanted > MOST_SHARDS:  # all names are listed before one is looked for
        raise UserError(f"data {pattern[:200]!r} names more than {MOST_SHARDS} shards")
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise UserError(
            f"data {pattern!r}: its braces do not close; a pattern is, e.g., 'data-{{000..099}}.tar'"
        ) from None


def find_shards(pattern: str) -> list[Path]:
    """The files that braces and wildcards name. Raises UserError where one of them is not there."""
    names = expand_braces(pattern)
    shards: list[Path] = []
    missing = []
    for name in names:
        found = [name] if Path(name).is_file() else sorted(glob.glob(name))  # noqa: PTH207  # Path has no whole patterns
        shards += map(Path, found)
        if not found:
            missing.append(name)
    if missing:
        raise UserError(
            f"no such file: {missing[0]}"
            if len(names) == 1
            else f"data {pattern!r} names {len(names)} shards, of which "
            f"{len(missing)} are not there, first {missing[0]}"
        )
    return list(dict.fromkeys(shards))


class Shard(NamedTuple):
    """A tar file, its `name` in the keys of its samples, and the `place` by which users know it."""

    path: Path
    name: str
    place: str


class ShardRows:
    """Samples by index; some 120 bytes of memory each."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Reads the headers of `shards`. Raises UserError for one that is no whole, uncompressed tar file."""
        self.shards = shards
        self.keys: list[str] = []
        self.suffixes: Counter[str] = Counter()
        self.repeated: list[str] = []
        places = [np.empty((0, 6), np.int64)]
        seen: set[str] = set()
        for number, shard in enumerate(shards):
            samples = self._samples_of(shard)
            self.repeated += [f"{shard.name}/{key}" for key in samples if key in seen]
            seen.update(samples)
            self.keys += samples
            rows = [(number, *_place_of_picture(parts), *_place_of_caption(parts)) for parts in samples.values()]
            places.append(np.array(rows, np.int64).reshape(-1, 6))
        self.places = np.concatenate(places)

    def _samples_of(self, shard: Shard) -> dict[str, dict[str, tuple[int, int]]]:
        """key -> suffix -> (start, size). A file of the same name once more begins another sample, `KEY (2)`."""
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for name, start, size in _members(shard):
            folder, slash, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            suffix = f".{suffix.lower()}"
            self.suffixes[suffix] += 1
            key, count = f"{folder}{slash}{stem}", 1
            label = key
            while suffix in samples.setdefault(label, {}):
                count += 1
                label = f"{key} ({count})"
            if count > 1 and not samples[label]:
                self.repeated.append(f"{shard.name}/{key}")
            samples[label][suffix] = (start, size)
        return samples

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Row:
        number, start, size, text_start, text_size, kind = map(int, self.places[index])
        shard, key = self.shards[number].path, f"{self.shards[number].name}/{self.keys[index]}"

        def image() -> Image.Image:
            if size < 0:
                raise BadSample(f"{key}: no picture beside its caption")
            return open_picture(BytesIO(_part_of(shard, start, size)))

        def caption() -> str:
            return "" if text_size < 0 else read_caption(_part_of(shard, text_start, text_size), key, TEXTS[kind])

        return Row(key, image, caption)


def open_shards(shards: Sequence[Path], place: str) -> Found:
    """The samples of `shards`, in order. Raises UserError where there are none, or none has a picture or a caption."""
    folder = os.path.commonpath([shard.absolute().parent for shard in shards])
    names = [printable(shard.absolute().relative_to(folder).as_posix()) for shard in shards]
    rows = ShardRows([Shard(path, name, str(path)) for path, name in zip(shards, names, strict=True)])
    if not len(rows):
        raise UserError(f"{place} holds no samples")
    if (rows.places[:, 2] < 0).all():
        raise UserError(f"{place} holds no pictures; its files are {', '.join(sorted(rows.suffixes)[:6])}")
    if (rows.places[:, 4] < 0).all():
        raise UserError(f"{place} holds no captions: each sample needs KEY.txt, .caption or .json beside its picture")
    notes = note_not_read(rows.suffixes)
    if rows.repeated:
        notes.append(
            f"warning: {len(rows.repeated)} keys stand more than once in the shards ({', '.join(rows.repeated[:3])}); "
            "each is taken as a sample of its own"
        )
    return Found(rows, ["shards", [(shard.name, stamp(shard.path)) for shard in rows.shards]], notes)


def _members(shard: Shard) -> Iterator[tuple[str, int, int]]:
    """(name, start, size) of each visible file. Raises UserError for what is no whole, uncompressed tar file."""
    try:
        with shard.path.open("rb") as file:
            compressed = file.read(6).startswith(COMPRESSED)
        if compressed:
            raise UserError(
                f"{shard.place} is compressed, and nothing in it can be reached without unpacking all before it: "
                "uncompress it first (the pictures in it are compressed anyway)"
            )
        if shard.path.stat().st_size % tarfile.BLOCKSIZE:  # Python takes a header that is cut for the archive's end
            raise tarfile.ReadError("unexpected end of data")
        with shard.path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile() and not is_hidden(name := str(PurePosixPath(member.name))):
                    yield printable(name), member.offset_data, member.size
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # nor does it tell a damaged header from the end
                raise tarfile.ReadError(f"bad header at byte {tar.offset}")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{shard.place} is no whole, uncompressed tar file that can be read here ({error})") from None


def _place_of_picture(parts: dict[str, tuple[int, int]]) -> tuple[int, int]:
    return next((place for suffix, place in parts.items() if suffix in PICTURES), (-1, -1))


def _place_of_caption(parts: dict[str, tuple[int, int]]) -> tuple[int, int, int]:
    kind = next((kind for kind, suffix in enumerate(TEXTS) if suffix in parts), -1)
    return (*parts[TEXTS[kind]], kind) if kind >= 0 else (-1, -1, -1)


def _part_of(shard: Path, start: int, size: int) -> bytes:
    with shard.open("rb") as file:
        file.seek(start)
        return file.read(size)
