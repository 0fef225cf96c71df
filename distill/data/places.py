"""Where a cache's files lie: a folder, or a place on the network (s3://, gs://, hf://, https://), of which the bytes of the
wanted samples alone are fetched, those of a batch at once: a batch's samples lie in as many shards."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from distill.common.errors import UserError, describe_error
from distill.common.progress import say

Ranges = Sequence[tuple[str, int, int]]
"""Parts of files: name, first byte, count."""
Answer = TypeVar("Answer")
WAITS_S = (1, 2, 4, 8, 16)
"""Before each further try."""


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

        self.url = url.rstrip("/")
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url} cannot be read here: {error}") from None
        self._kept = tempfile.TemporaryDirectory(prefix="slimxl-")

    def sizes(self) -> None:
        return None

    def local(self, name: str) -> Path:
        path = Path(self._kept.name) / name
        if not path.exists():
            partial = path.with_suffix(".partial")
            self._trying(name, lambda: self.files.get_file(f"{self.root}/{name}", str(partial)))
            partial.rename(path)
        return path

    def read(self, ranges: Ranges) -> list[bytearray]:
        paths, begins, ends = zip(*((f"{self.root}/{name}", at, at + count) for name, at, count in ranges), strict=True)
        others = len({name for name, *_ in ranges}) - 1
        shown = f"{ranges[0][0]} (or one of {others} asked for with it)" if others else ranges[0][0]
        parts = self._trying(shown, lambda: self.files.cat_ranges([*paths], [*begins], [*ends], on_error="raise"))
        for (name, _, count), part in zip(ranges, parts, strict=True):
            if len(part) != count:
                raise UserError(
                    f"{self.url}/{name}: {count} bytes were asked for and {len(part)} came: the file is cut, or its server "
                    "does not answer ranges"
                )
        return [bytearray(part) for part in parts]

    def _trying(self, name: str, fetch: Callable[[], Answer]) -> Answer:
        for wait_s in (*WAITS_S, None):
            try:
                return fetch()
            except FileNotFoundError:
                raise UserError(f"{self.url}/{name} is not there") from None
            except Exception as error:  # its file systems raise anything
                if wait_s is None or isinstance(error, PermissionError) or _refused(error):
                    tries = "" if wait_s is not None else f" after {len(WAITS_S) + 1} tries"
                    raise UserError(
                        f"{self.url}/{name} cannot be had{tries} ({describe_error(error)}); see that this machine may read "
                        "it, and run the same command again"
                    ) from None
                say(f"{self.url}/{name}: {describe_error(error)}; trying again in {wait_s} s")
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


def _refused(error: Any) -> bool:
    return getattr(error, "status", None) in (401, 403)


def open_place(place: str | Path) -> Files:
    """The files at a folder or URL."""
    return RemoteFiles(str(place)) if "://" in str(place) else LocalFiles(Path(place))
