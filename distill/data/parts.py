"""Which samples of a data set each shard of its cache holds.

Samples that are read by index are counted off. WebDataset shards on the network are copied here when their turn comes,
one ahead, and removed again. How many samples are in one is not known before; so each gives as many shards of the cache as
its bytes say, with as many samples in each.
"""

from __future__ import annotations

import math
import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from distill.common.ahead import ahead
from distill.common.errors import UserError
from distill.common.files import require_free_disk, seed_of
from distill.common.progress import say
from distill.data.pictures import PictureSource, Source, open_source
from distill.data.places import RemoteFiles
from distill.data.rows import Found, Row
from distill.data.samples import BadSample, Fitting
from distill.data.shards import Shard, ShardRows, expand_braces, is_pattern_of_shards
from distill.models.families import Family

PART_BYTES = 64_000_000
"""Of a shard on the network, for each shard of the cache: some hundred pictures."""
STAMPS_AT_ONCE = 32
Part = tuple[Source, range]
"""The samples of one shard of the cache: those of a source, by index."""


class Parts(Protocol):
    """A data set by the shards of its cache, of which there are `count`; `identity` changes with the data."""

    count: int
    identity: Any
    notes: list[str]

    def samples(self, numbers: Iterable[int]) -> int | None:
        """How many there are in some of the shards; None where only reading tells."""

    def share(self, number: int) -> int:
        """Shards of one share are read by the same process."""

    def opened(self, numbers: Sequence[int]) -> Iterator[Part]:
        """Those of some shards, in the order of the numbers."""


def open_parts(spec: str, family: Family, seed: int, fitting: Fitting | None, size: int) -> Parts:
    """Of the data that `spec` names, `size` samples a shard where they are read by index. Raises UserError as `open_source`
    does, and for an URL that names no shards that can be had."""
    if "://" in spec:
        return StreamedParts(spec, family, seed, fitting or Fitting())
    return IndexedParts(open_source(spec, family, seed, fitting), size)


class IndexedParts:
    """Those of a source that is read by index."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size
        self.count = -(-len(source) // size)
        self.identity, self.notes = source.identity, source.notes

    def _range(self, number: int) -> range:
        return range(number * self.size, min((number + 1) * self.size, len(self.source)))

    def samples(self, numbers: Iterable[int]) -> int:
        return sum(len(self._range(number)) for number in numbers)

    def share(self, number: int) -> int:
        return number

    def opened(self, numbers: Sequence[int]) -> Iterator[Part]:
        return ((self.source, self._range(number)) for number in numbers)


class StreamedParts:
    """Those of WebDataset shards on the network. Any of a sample's random numbers depend on its shard's name and its place
    in there."""

    def __init__(self, spec: str, family: Family, seed: int, fitting: Fitting) -> None:
        self.family, self.seed, self.fitting = family, seed, fitting.for_family(family)
        self.files, names = find_remote_shards(spec)
        with ThreadPoolExecutor(STAMPS_AT_ONCE) as pool:
            self.shards = dict(zip(names, pool.map(self.files.stamp, names), strict=True))
        for name, (size, _) in self.shards.items():
            if size % 512 or not size:
                raise UserError(
                    f"{self.files.url}/{_without_query(name)} has {size} bytes and is no whole, uncompressed tar file"
                )
        stamps = [(_without_query(name), stamp) for name, stamp in self.shards.items()]
        self.identity = [["streamed", stamps, PART_BYTES], asdict(self.fitting)]
        self.notes: list[str] = []
        counts = [math.ceil(size / PART_BYTES) * self.fitting.variants for size, _ in self.shards.values()]
        self._ends = np.cumsum(counts)
        self.count = int(self._ends[-1])
        self._copies = tempfile.TemporaryDirectory(prefix="slimxl-")

    def samples(self, numbers: Iterable[int]) -> None:
        return None

    def share(self, number: int) -> int:
        return int(np.searchsorted(self._ends, number, side="right"))

    def opened(self, numbers: Sequence[int]) -> Iterator[Part]:
        wanted = [(share, [*group]) for share, group in groupby(numbers, self.share)]
        with closing(ahead(self._source, [share for share, _ in wanted])) as sources:
            for (share, group), source in zip(wanted, sources, strict=True):
                end = int(self._ends[share])
                count = end - (int(self._ends[share - 1]) if share else 0)
                for number in group:
                    first, last = (len(source) * (number + one - end + count) // count for one in (0, 1))
                    yield source, range(first, last)

    def _source(self, share: int) -> PictureSource:
        """The samples of one shard, whose copy is removed when they are not needed any more."""
        name, stamp = [*self.shards.items()][share]
        path, shown = Path(self._copies.name) / f"{share}.tar", _without_query(name)
        place = f"{self.files.url}/{shown}"
        require_free_disk(path.parent, stamp[0], f"a copy of {place}", "folder for it in TMPDIR")
        self.files.copy(name, stamp, path)
        try:
            rows: ShardRows | NoRows = ShardRows([Shard(path, shown, place)])
        except UserError as error:
            say(f"{error}; it is left out")
            rows = NoRows(shown, str(error))
        weakref.finalize(rows, path.unlink, missing_ok=True)
        return PictureSource(Found(rows, None), self.family, seed_of(self.seed, shown), self.fitting)


class NoRows:
    """A shard that cannot be read, as one sample that is bad."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int, /) -> Row:
        return Row(self.name, self._refuse, self._refuse)

    def _refuse(self) -> NoReturn:
        raise BadSample(self.reason)


def find_remote_shards(spec: str) -> tuple[RemoteFiles, list[str]]:
    """The place that an URL of shards, with braces and wildcards, stands for, and their names there; of the URL of a folder,
    its tar files. Raises UserError where nothing is found, where the URL has no host or bucket, and for compressed files."""
    queried = spec.startswith(("http://", "https://"))
    path, mark, query = spec.partition("?") if queried else (spec, "", "")
    if not is_pattern_of_shards(path):
        path = f"{path.rstrip('/')}/*.tar"
    elif not path.endswith(".tar"):
        raise UserError(f"data {spec!r}: compressed shards cannot be read by index; give uncompressed ones, .tar")
    wild = re.search(r"[{*?[]", path)
    root = path[: wild.start() if wild else None].rpartition("/")[0]
    if not re.fullmatch(r"[\w+.-]+://[^/]+(/.*)?", root):
        raise UserError(
            f"data {spec!r}: an URL of shards names its host or bucket whole, e.g. s3://bucket/photos/data-{{000..099}}.tar"
        )
    files = RemoteFiles(root)
    names: list[str] = []
    for name in expand_braces(path.removeprefix(f"{root}/")):
        names += files.glob(name) if re.search(r"[*?[]", name) else [name + mark + query]
    if not names:
        raise UserError(f"data {spec!r}: there are no such shards")
    return files, list(dict.fromkeys(names))


def without_secrets(spec: str) -> str:
    """The data as they may be shown to others: an URL without signature and password."""
    return re.sub(r"//[^/]*@", "//", spec.partition("?")[0]) if spec.startswith(("http://", "https://")) else spec


def _without_query(name: str) -> str:
    """A signature or the like is no part of a file's name."""
    return name.partition("?")[0]
