"""Writing that is whole or absent, and content hashes: what every room uses to leave nothing half-written."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distill.common.errors import UserError

FICLONE = 0x40049409
"""Linux's request (linux/fs.h) for a copy that shares its blocks."""


def sha256_file(path: Path) -> str:
    """Hex digest of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_file_once(path: Path) -> str:
    """The same, read once by a process as long as the file's size and time stay."""
    stat = path.stat()
    return _sha256_of(path.resolve(), stat.st_size, stat.st_mtime_ns)


@cache
def _sha256_of(path: Path, _size: int, _mtime_ns: int) -> str:
    return sha256_file(path)


def sha256_json(value: Any) -> str:
    """Hex digest of `value` as canonical JSON: the key under which a stage's inputs are remembered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def seed_of(seed: int, *parts: object) -> int:
    """A 60-bit seed that depends on all parts and on nothing else, e.g. not on the number of processes."""
    return int(sha256_json([seed, *map(str, parts)])[:15], 16)


def read_json(path: Path) -> Any:
    """Raises UserError where the file is absent, a folder or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, a JSON file is needed") from None
    except (ValueError, RecursionError) as error:  # no JSON, no text, too deep a nesting, a number of too many digits
        raise UserError(f"{path} is not valid JSON ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """A config: a JSON object whose numbers are finite. Raises UserError where the file holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        kind = "nothing (null)" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{path} holds {kind}, a JSON object of names and values is needed; fetch it again")
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise UserError(f"{path} holds NaN or Infinity, which is no number that can be used") from None
    return value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write (a file or a folder); it takes the name `path` only if the
    block ends well, and is removed otherwise. A killed process leaves `path` as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)  # not the process id: processes of several machines may share the folder
    temporary = path.with_name(f".{path.name}.{token}.partial")
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():  # a folder cannot be renamed over a full one
            old = path.with_name(f".{path.name}.{token}.old")
            path.replace(old)
            temporary.replace(path)
            _remove(old)
        else:
            temporary.replace(path)
    except OSError as error:
        if error.errno is not None:  # one without a number would be told by the name alone
            error.filename = error.filename or str(path)  # what a write raises names no file
        raise
    finally:
        _remove(temporary)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files and folders that killed processes left in `folder` while they were `replacing` the one
    called `name`, or any. Only for the holder of the lock: others may be at work on theirs."""
    for kind in ("partial", "old"):
        for path in folder.glob(f".{glob.escape(name) if name else '*'}.*.{kind}"):
            _remove(path)


@contextmanager
def exclusive(
    path: Path, announce: Callable[[str], None] = lambda line: None, lock_file: Path | None = None
) -> Iterator[None]:
    """One process at a time writes `path`; a second waits, and says so. The system frees the lock of a killed one. The
    lock lies beside `path` if not told otherwise."""
    lock_file = lock_file or path.with_name(f".{path.name}.lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    place = lock_file if lock_file.exists() else lock_file.parent
    if not os.access(place, os.W_OK):  # FileLock takes some of what forbids it for another process, and waits
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce(f"another process is writing {path}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, value: Any) -> None:
    """Writes `value` atomically, with sorted keys, so that equal content is equal bytes."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_text(count: int) -> str:
    """Bytes as people read them: `1.51 GB`, `14.2 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:  # what rounds to 1,000 of the next smaller unit
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count} B"


def clone_file(source: Path, target: Path) -> None:
    """Copies a file; where the disk can (btrfs, XFS), the copy shares the blocks of `source` until one of them changes."""
    with source.open("rb") as read, target.open("wb") as written:
        try:
            import fcntl

            fcntl.ioctl(written.fileno(), FICLONE, read.fileno())
            return
        except (ImportError, OSError):  # not Linux, another disk, or one that has no such copies
            pass
    shutil.copyfile(source, target)


def require_free_disk(folder: Path, needed_bytes: int, what: str, option: str = "--out") -> None:
    """Raises UserError before anything is written where the disk is too small for `what`, which `option` places there."""
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise UserError(
            f"{what} needs {size_text(needed_bytes)} on the disk of {existing}, which has {size_text(free)} free; "
            f"free some space or choose another {option}"
        )
