"""A captioned picture not yet read, and what all readers of files agree on: which files are pictures, which captions,
and which are passed over without a word."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Protocol

from PIL import Image

from distill.data.samples import BadSample

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA")
PICTURES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)
NOT_READ = frozenset((".heic", ".heif", ".jxl", ".psd", ".svg", ".eps", ".ico", ".exr", ".hdr"))
NOT_READ |= frozenset((".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"))  # of cameras
CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Row:
    """One captioned picture not yet read: `open` gives it as PIL's or raises whatever a decoder raises."""

    key: str
    open: Callable[[], Image.Image]
    caption: Callable[[], str]


class Rows(Protocol):
    """Captioned pictures by index; reading one reads no other."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


@dataclass(frozen=True)
class Found:
    """What lies at a place: its rows, an identity that an edited picture or caption changes and the spelling of the
    place does not, and lines to tell of what was left out."""

    rows: Rows
    identity: object
    notes: list[str] = field(default_factory=list)


def is_hidden(name: str) -> bool:
    """Dot-files, what a Mac adds to folders and archives (`._a.jpg`, `__MACOSX`), and all below such folders."""
    return any(part == "__MACOSX" or (part.startswith(".") and part != ".") for part in name.split("/"))


def open_picture(file: Path | BytesIO) -> Image.Image:
    """As PIL opens it, but only in formats that hold photographs: others run programs or hold documents. Raises BadSample
    for a pipe or a device, which may never end."""
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise BadSample(f"{printable(file.name)}: no plain file")
    return Image.open(file, formats=[kind for kind in FORMATS if kind in Image.OPEN])


def read_caption(data: bytes, name: str, suffix: str = ".txt") -> str:
    """A caption file's text; of a .json its first column of captions. Raises BadSample where it is none."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample(f"{name}: its caption is not in UTF-8; save it as UTF-8") from None
    if suffix == ".json":
        entry = json.loads(text)
        if not isinstance(entry, dict):
            raise BadSample(f"{name}: its .json is no object with a caption")
        caption = next((entry[column] for column in CAPTION_COLUMNS if entry.get(column)), "")
        if not isinstance(caption, str):
            raise BadSample(f"{name}: its caption is {json.dumps(caption)[:40]}, a text is needed")
        return caption
    return text.strip()


def printable(name: str) -> str:
    """A file's name as text; bytes of another encoding than UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def stamp(path: Path) -> tuple[int, int] | None:
    """Size and time of change, by which an edited file is known; None where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def count_by_suffix(suffixes: Counter[str]) -> str:
    """`3 .heic, 1 .psd`, the most first."""
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in suffixes.most_common(6))


def note_not_read(suffixes: Counter[str]) -> list[str]:
    """The line on pictures in formats that are not read, or none."""
    unread = Counter({suffix: count for suffix, count in suffixes.items() if suffix in NOT_READ})
    if not unread:
        return []
    return [
        f"left out, in formats that are not read: {count_by_suffix(unread)}; convert them to jpg or png to use them"
    ]
