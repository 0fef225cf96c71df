"""A folder, whatever it holds: pictures with captions beside them, metadata, shards, tables."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import NoReturn

from distill.common.errors import UserError
from distill.data.rows import (
    CAPTION_SUFFIXES,
    NOT_READ,
    PICTURES,
    Found,
    Row,
    count_by_suffix,
    is_hidden,
    note_not_read,
    open_picture,
    printable,
    read_caption,
    stamp,
)
from distill.data.samples import BadSample
from distill.data.shards import open_shards
from distill.data.tables import METADATA, is_saved_to_disk, open_dataset, open_metadata, open_saved

SUFFIXES = tuple(form for suffix in CAPTION_SUFFIXES for form in (suffix, suffix.upper(), suffix.title()))
SPLITS = {"train", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}


class FolderRows:
    """Pictures and the captions beside them, in the order of their names; some 100 bytes of memory each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.suffixes: list[str] = []  # of the file of captions; "" where there is none
        self.others: dict[str, list[Path]] = {"metadata": [], ".tar": [], ".parquet": [], ".arrow": []}
        self.found: Counter[str] = Counter()
        for name, beside in _walk(folder):
            path = PurePath(name)
            suffix = path.suffix.lower()
            self.found[suffix] += 1
            if suffix in PICTURES:
                self.names.append(name)
                self.suffixes.append(next((s for s in SUFFIXES if path.stem + s in beside), ""))
            elif path.name in METADATA:
                self.others["metadata"].append(folder / name)
            elif suffix in self.others:
                self.others[suffix].append(folder / name)

    def __len__(self) -> int:
        return len(self.names)

    def _caption_file(self, index: int) -> Path | None:
        suffix = self.suffixes[index]
        return (self.folder / self.names[index]).with_suffix(suffix) if suffix else None

    def __getitem__(self, index: int) -> Row:
        key, picture, text = printable(self.names[index]), self.folder / self.names[index], self._caption_file(index)

        def caption() -> str:
            if text is None:
                raise BadSample(f"{key}: no caption; it is looked for in a file of the same name with .txt or .caption")
            return read_caption(text.read_bytes(), key)

        return Row(key, partial(open_picture, picture), caption)

    def identity(self) -> str:
        """A digest of the names, sizes and times of all pictures and captions."""
        digest = hashlib.sha256()
        for index, name in enumerate(self.names):
            text = self._caption_file(index)
            digest.update(repr((name, stamp(self.folder / name), text and (text.suffix, stamp(text)))).encode())
        return digest.hexdigest()


def open_folder(folder: Path) -> Found:
    """What a folder holds, in the order: `save_to_disk`, metadata, captioned pictures, metadata further down, shards,
    tables. Of a folder of splits, `train`. Raises UserError that says what was found where there is none of it."""
    if is_saved_to_disk(folder):
        return open_saved(folder)
    if metadata := [folder / name for name in METADATA if (folder / name).is_file()]:
        return open_metadata(metadata, folder)
    beside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    if "train" in beside and SPLITS.issuperset(beside) and not _holds_pictures(folder):
        return open_folder(folder / "train")
    rows = FolderRows(folder)
    metadata, tars, tables = (
        rows.others["metadata"],
        rows.others[".tar"],
        rows.others[".parquet"] + rows.others[".arrow"],
    )
    if any(rows.suffixes):
        notes = note_not_read(rows.found)
        if left := [path.name for path in (*tars, *tables)]:
            notes.append(
                f"left out, beside pictures with captions of their own: {', '.join(left[:3])} ({len(left)} files)"
            )
        return Found(rows, ["folder", rows.identity()], notes)
    if metadata:
        return open_metadata(metadata, folder)
    if tars:
        return open_shards(tars, str(folder))
    if tables:
        return open_dataset(str(folder))
    if rows.names:
        raise UserError(
            f"{folder} holds no captions: give NAME.txt or NAME.caption beside each picture, or metadata.jsonl"
        )
    _refuse(folder, rows.found)


def _refuse(folder: Path, found: Counter[str]) -> NoReturn:
    if not found:
        raise UserError(f"{folder} holds no pictures: it is empty, but for what may be hidden")
    advice = "convert them to jpg or png" if NOT_READ & found.keys() else "unpack them first"
    hint = f"; {advice}" if NOT_READ & found.keys() or {".zip", ".gz", ".tgz", ".7z", ".rar"} & found.keys() else ""
    raise UserError(
        f"{folder} holds no pictures, shards or tables that are read; it holds {count_by_suffix(found)}{hint}"
    )


def _holds_pictures(folder: Path) -> bool:
    return any(path.suffix.lower() in PICTURES and not is_hidden(path.name) for path in folder.iterdir())


def _walk(folder: Path) -> Iterator[tuple[str, set[str]]]:
    """Every visible file's name from `folder` on, sorted, and the names of the files beside it. Links to folders are
    followed, each folder once."""

    def refuse(error: OSError) -> NoReturn:  # by itself, os.walk leaves out what it may not read
        raise error

    walked = set()
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        if (real := Path(place).resolve()) in walked:
            folders.clear()
            continue
        walked.add(real)
        beside = {name for name in files if not is_hidden(name)}
        below = Path(place).relative_to(folder)
        for name in sorted(beside):
            yield (below / name).as_posix(), beside
