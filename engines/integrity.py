"""Checks of a bundle's files against its manifest, before anything opens them.

A plan is untrusted bytes until its hash was compared. The hashes protect against damage, truncation and mix-ups. They are
no signature: they do not make a bundle from someone you do not trust safe.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distill.common.errors import UserError
from distill.common.files import sha256_file
from distill.models.conditioning import conditioning_named
from engines.bundle import Engine, FileRecord, Manifest, read_manifest, rebuild_command


def hub_blobs(root: Path) -> Path | None:
    """Where the files of a bundle in a hub's cache (models--ORG--NAME/snapshots/REVISION) lie: they are links to blobs,
    called by their hashes. None for a bundle anywhere else."""
    snapshots = (parent for parent in root.parents if parent.name == "snapshots")
    return next((one.parent / "blobs" for one in snapshots if (one.parent / "blobs").is_dir()), None)


def locate(bundle: Path, record: FileRecord, rebuild: str) -> Path:
    """The path of a file that exists, has the recorded size and lies in the bundle even after symbolic links, or among the
    blobs of the hub's cache that the bundle is in.

    Raises UserError with what was found, what is needed, and `rebuild`: the command that builds the file again.
    """
    root = Path(bundle).resolve()
    path = root / record.path
    real, blobs = Path(os.path.realpath(path)), hub_blobs(root)  # resolve() raises for links in a circle
    if not real.is_relative_to(root) and not (blobs and real.is_relative_to(blobs)):
        raise UserError(
            f"{record.path} leads out of the bundle {bundle} (a link to {real}); copy the bundle with its links "
            f"followed (cp -rL), or {rebuild}"
        )
    if not path.is_file():
        raise UserError(f"{record.path} is missing from {bundle}; {rebuild}")
    size = path.stat().st_size
    if size != record.size_bytes:
        raise UserError(f"{record.path} has {size} bytes, the manifest says {record.size_bytes}; {rebuild}")
    return path


def checked_path(bundle: Path, record: FileRecord, rebuild: str) -> Path:
    """As `locate`; the content's hash is compared too."""
    path = locate(bundle, record, rebuild)
    if (found := sha256_file(path)) != record.sha256:
        raise UserError(f"{record.path} has sha256 {found[:12]}…, the manifest says {record.sha256[:12]}…; {rebuild}")
    return path


def find_faults(bundle: Path, records: Iterable[tuple[FileRecord, str]]) -> list[str]:
    """One line for each file that is missing or damaged; each record comes with the command that builds its file again. As
    many files are hashed at once as there are cores."""

    def fault(record: FileRecord, rebuild: str) -> str | None:
        try:
            checked_path(bundle, record, rebuild)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [found for found in pool.map(lambda one: fault(*one), records) if found]


def map_file(path: Path) -> mmap.mmap | bytes:
    """The file as memory, without a copy: what was hashed just now is not read from the disk again."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def is_intact(bundle: Path, records: list[FileRecord]) -> bool:
    """Whether every file is there with its recorded content."""
    try:
        for record in records:
            checked_path(bundle, record, "")
    except UserError:
        return False
    return True


def unnamed_files(bundle: Path, manifest: Manifest) -> list[str]:
    """One line for each file that a pipeline would read and the manifest does not name: added by somebody, removed from
    the manifest, or left by an unfinished build."""
    named = {record.path for record in manifest.files}
    folders = [Path(bundle) / part for part in conditioning_named(manifest.source.pipeline).parts]
    parts = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
    configs = sorted({f"{engine.component}/config.json" for engine in manifest.engines})
    read = [path.relative_to(bundle).as_posix() for path in parts if not path.name.startswith(".")]
    needed = ["model_index.json", "scheduler/scheduler_config.json", *configs]
    rebuild = f"rebuild it with: {rebuild_command(bundle, next(iter(manifest.engines), None))}"
    advice = dict.fromkeys(read, "remove it") | dict.fromkeys(needed, rebuild)
    expected = dict.fromkeys([*needed, *read])
    return [
        f"{path} is not named by the manifest of {bundle}; {advice[path]}" for path in expected if path not in named
    ]


def verify_bundle(bundle: Path) -> list[str]:
    """One line for each recorded file that is missing or damaged. Raises UserError where the manifest cannot be read."""
    manifest = read_manifest(bundle)
    first = next(iter(manifest.engines), None)
    owners: dict[str, Engine] = {file.path: engine for engine in manifest.engines for file in engine.files}
    commands = (
        f"rebuild it with: {rebuild_command(bundle, owners.get(record.path, first))}" for record in manifest.all_files
    )
    return find_faults(bundle, zip(manifest.all_files, commands, strict=True))
