"""Where files lie: a folder, or a place on the network (s3://, gs://, hf://, https://). Of a cache the bytes of the wanted
samples alone are fetched, those of a batch at once: a batch's samples lie in as many shards."""

from __future__ import annotations

import os
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from distill.common.errors import UserError, describe_error
from distill.common.progress import say

Ranges = Sequence[tuple[str, int, int]]
"""Parts of files: name, first byte, count."""
Answer = TypeVar("Answer")
WAITS_S = (1, 2, 4, 8, 16)
"""Before each further try."""
TRIED_AGAIN = (408, 429)
"""Statuses that pass, beside those of a server's own faults (500 and above)."""
Stamp = tuple[int, str]
"""A file's bytes, and what its server calls this version of it."""
VERSIONS = ("ETag", "blob_id", "md5Hash", "crc32c", "etag", "Last-Modified")
"""Names for that in what fsspec tells of files, the first that there is: http and s3, hf, gs."""
PIECE_BYTES = 1 << 24
PIECES = 4
"""Of a file that is copied, fetched at once."""


class Files(Protocol):
    """The files of one cache, by their names."""

    def sizes(self) -> dict[str, int] | None:
        """Bytes of all files; None where asking for them would take long."""

    def local(self, name: str) -> Path:
        """The file as one of this machine. Raises UserError where it is not there or cannot be had."""

    def read(self, ranges: Ranges) -> list[bytearray]:
        """Raises UserError where a file is not there, ends before, or cannot be had."""


class LocalFiles:
    """Those of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def sizes(self) -> dict[str, int]:
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.folder)} if self.folder.is_dir() else {}

    def local(self, name: str) -> Path:
        return self.folder / name

    def read(self, ranges: Ranges) -> list[bytearray]:
        parts = []
        for name, begin, count in ranges:
            part = bytearray(count)
            with (self.folder / name).open("rb", buffering=0) as file:
                os.preadv(file.fileno(), [part], begin)
            parts.append(part)
        return parts


class RemoteFiles:
    """Those below an URL, by fsspec. A connection that breaks is tried again, each time after a longer wait."""

    def __init__(self, url: str) -> None:
        """Raises UserError for a protocol that is not known or whose package is not installed."""
        import fsspec

        self.url = re.sub(r"//[^/]*@", "//", url.rstrip("/"))  # a password is not told
        try:
            self.files, self.root = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError) as error:
            advice = "; pip install 'slimxl[cloud]' brings it" if isinstance(error, ImportError) else ""
            raise UserError(f"{url} cannot be read here: {error}{advice}") from None
        self._kept = tempfile.TemporaryDirectory(prefix="slimxl-")

    def sizes(self) -> None:
        return None

    def local(self, name: str) -> Path:
        path = Path(self._kept.name) / name
        if not path.exists():
            partial = path.with_suffix(".partial")
            self._trying(name, lambda: self.files.get_file(f"{self.root}/{name}", str(partial)))
            partial.replace(path)
        return path

    def read(self, ranges: Ranges) -> list[bytearray]:
        others = len({name for name, *_ in ranges}) - 1
        shown = f"{ranges[0][0]} (or one of {others} asked for with it)" if others else ranges[0][0]
        parts = self._trying(shown, lambda: self._read_once(ranges))
        for (name, _, count), part in zip(ranges, parts, strict=True):
            if len(part) != count:
                raise UserError(
                    f"{self.url}/{name}: {count} bytes were asked for and {len(part)} came: the file is cut, or its server "
                    "does not answer ranges"
                )
        return [bytearray(part) for part in parts]

    def _read_once(self, ranges: Ranges) -> list[bytes]:
        paths, begins, ends = zip(*((f"{self.root}/{name}", at, at + count) for name, at, count in ranges), strict=True)
        if self.files.async_impl:
            return self.files.cat_ranges([*paths], [*begins], [*ends], on_error="raise")
        with ThreadPoolExecutor(len(paths)) as pool:  # the hub's reads one after the other, and megabytes ahead
            return [*pool.map(lambda *part: self.files.cat_file(*part, cache_type="none"), paths, begins, ends)]

    def glob(self, pattern: str) -> list[str]:
        """The names that wildcards stand for, sorted."""
        found = self._trying(pattern, lambda: self.files.glob(f"{self.root}/{pattern}"))
        return sorted(path.removeprefix(f"{self.root}/") for path in found)

    def stamp(self, name: str) -> Stamp:
        """Raises UserError where the file is not there, or its server does not say how long it is."""
        info = self._trying(name, lambda: self.files.info(f"{self.root}/{name}"))
        if info.get("size") is None:
            raise UserError(f"{self.url}/{name}: its server does not say how long it is")
        return info["size"], next((str(info[key]) for key in VERSIONS if info.get(key)), "")

    def copy(self, name: str, stamp: Stamp, target: Path) -> None:
        """Raises UserError where the file has not that stamp any more."""
        size, _ = stamp
        self._require_same(name, stamp)
        with target.open("wb") as file:
            for begin in range(0, size, PIECES * PIECE_BYTES):
                end = min(begin + PIECES * PIECE_BYTES, size)
                starts = range(begin, end, PIECE_BYTES)
                file.writelines(self.read([(name, at, min(PIECE_BYTES, end - at)) for at in starts]))
        self._require_same(name, stamp)

    def _require_same(self, name: str, stamp: Stamp) -> None:
        self.files.invalidate_cache(f"{self.root}/{name}")
        if self.stamp(name) != stamp:
            raise UserError(f"{self.url}/{name} has changed since this command began: run it again, with another --out")

    def _trying(self, name: str, fetch: Callable[[], Answer]) -> Answer:
        if self.url.startswith("http"):
            name = name.partition("?")[0]  # nor is a signature
        for wait_s in (*WAITS_S, None):
            try:
                return fetch()
            except Exception as raised:  # its file systems raise anything
                error = raised.__cause__ if isinstance(raised, FileNotFoundError) and raised.__cause__ else raised
                status = _status(error)
                if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError)):
                    why = f" ({error})" if " bucket " in str(error) else ""
                    raise UserError(f"{self.url}/{name} is not there{why}") from None
                reason = textwrap.shorten(describe_error(error), 300, placeholder=" …")
                if wait_s is None or _is_final(error, status):
                    tries = "" if wait_s is not None else f" after {len(WAITS_S) + 1} tries"
                    raise UserError(
                        f"{self.url}/{name} cannot be had{tries} ({reason}); see that this machine may read it (rights, "
                        "region), and run the same command again"
                    ) from None
                say(f"{self.url}/{name}: {reason}; trying again in {wait_s} s")
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


def _status(error: BaseException | None) -> int | None:
    """Of HTTP, wherever the file systems and what lies under them keep it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):  # botocore's
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for holder, name in (
            (error, "status"),
            (response, "status_code"),
            (error, "code"),
        ):  # aiohttp's, the hub's, gs's
            if str(status := getattr(holder, name, None)).isdecimal():
                return int(str(status))
        error = error.__cause__
    return None


def _is_final(error: BaseException, status: int | None) -> bool:
    """Whether another try would end as this one."""
    if status is not None:
        return status < 500 and status not in TRIED_AGAIN
    named = type(error).__name__.endswith("CredentialsError") or str(error).startswith("Forbidden:")  # s3's, gs's
    return named or isinstance(error, PermissionError | ValueError)


def open_place(place: str | Path) -> Files:
    """The files at a folder or URL."""
    return RemoteFiles(str(place)) if "://" in str(place) else LocalFiles(Path(place))
