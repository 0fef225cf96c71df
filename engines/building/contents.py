"""What a build changes in a bundle besides its new engines: manifest, superseded engines, pipeline files, stray files."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.common.errors import UserError
from distill.common.files import exclusive, sha256_file
from engines.building.jobs import Job
from engines.bundle import MANIFEST, Engine, FileRecord, Manifest, Source, read_manifest
from engines.onnx_folder import OnnxFolder
from export.components import PIPELINE_PARTS

LOCK = ".lock"
PARTIAL = ".partial"
"""Folder of unfinished engines, inside the bundle: on the same disk, so that the final rename is atomic."""


@contextlib.contextmanager
def bundle_lock(bundle: Path) -> Iterator[None]:
    """One build at a time in a bundle; a second one waits. The system frees the lock of a killed process."""
    with exclusive(bundle, print, bundle / LOCK):
        yield


def starting_manifest(out: Path, folder: OnnxFolder, replace: bool) -> Manifest:
    """The bundle's manifest, or an empty one for a new bundle. Where the manifest cannot be read or names engines of another
    checkpoint: an empty one with `replace`, else UserError."""
    fresh = Manifest(
        source=Source(name=folder.source_name, sha256=folder.source_sha256, pipeline=folder.conditioning.pipeline)
    )
    if not (out / MANIFEST).is_file():
        return fresh
    try:
        manifest = read_manifest(out)
    except UserError:
        if replace:
            return fresh
        raise
    if manifest.source.sha256 == fresh.source.sha256:
        return manifest.model_copy(update={"source": fresh.source})
    if manifest.engines and not replace:
        raise UserError(
            f"{out} holds engines of {manifest.source.name} ({manifest.source.sha256[:12]}), not of "
            f"{folder.source_name} ({folder.source_sha256[:12]}); choose another --out, or add --replace to drop them"
        )
    return fresh


def with_engine(manifest: Manifest, engine: Engine) -> Manifest:
    """A validated copy with this engine, in place of any with the same key or file."""
    paths = {file.path for file in engine.files}
    others = [old for old in manifest.engines if old.key != engine.key and not paths & {f.path for f in old.files}]
    return Manifest(source=manifest.source, engines=[*others, engine], files=manifest.files)


def without_superseded(engines: list[Engine], jobs: list[Job], out: Path) -> list[Engine]:
    """The engines without those built from an older export of a component in `jobs`, and those whose files are gone."""
    latest = {(job.component.name, job.flavor): job.component.current_sha256 for job in jobs}
    weights = {(job.component.name, job.flavor): job.component.weights_sha256 for job in jobs}
    return [
        engine
        for engine in engines
        if engine.onnx_sha256 in latest.get(slot := (engine.component, engine.flavor), {engine.onnx_sha256})
        and weights.get(slot, engine.weights_sha256) == engine.weights_sha256
        and all((out / file.path).is_file() for file in engine.files)
    ]


def with_pipeline_files(manifest: Manifest, folder: OnnxFolder, out: Path) -> Manifest:
    """Copies tokenizers, scheduler and configs beside the engines, each whole or not at all."""
    records = {record.path: record for record in manifest.files}
    for relative in folder.pipeline_files:
        source, target = folder.root / relative, out / relative
        digest = sha256_file(source)
        if not target.is_file() or sha256_file(target) != digest:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.copy")
            shutil.copyfile(source, temporary)
            temporary.replace(target)
        path = relative.as_posix()
        records[path] = FileRecord(path=path, sha256=digest, size_bytes=source.stat().st_size)
    return Manifest(source=manifest.source, engines=manifest.engines, files=list(records.values()))


def remove_strays(out: Path, manifest: Manifest, also: Sequence[Engine] = (), dry_run: bool = False) -> list[Path]:
    """Deletes and returns the files that the manifest does not name, in the folders of its components, of the engines in
    `also`, and of tokenizers and scheduler. A dry run only returns them."""
    named = {out / record.path for record in manifest.all_files}
    removed = []
    for folder in sorted({engine.component for engine in [*manifest.engines, *also]} | set(PIPELINE_PARTS)):
        for path in sorted((out / folder).rglob("*"), reverse=True):
            if path.is_file() and path not in named:
                removed.append(path)
                if not dry_run:
                    path.unlink()
            elif path.is_dir() and not dry_run and not any(path.iterdir()):
                path.rmdir()
    if dry_run:
        return removed
    for path in out.glob(f".{MANIFEST}.*.partial"):  # of a writer that was killed
        path.unlink()
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    return removed
