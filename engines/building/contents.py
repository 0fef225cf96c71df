"""What a build does to a bundle beside building: manifest, superseded engines, pipeline files, stray files, the lock."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from distill.common.errors import UserError
from distill.common.files import exclusive, remove_leftovers, replacing, sha256_file
from distill.common.ownership import require_apart, require_our_folder
from engines.building.jobs import ENGINE_NAME, Job
from engines.bundle import MANIFEST, Engine, FileRecord, Manifest, Source, read_manifest
from engines.choices import EIGHT_BITS
from engines.onnx_folder import BUILD_ORDER, OnnxComponent, OnnxFolder

LOCK = ".lock"
TIMING_CACHE = ".timing-cache"
PARTIAL = ".partial"
"""Folder of unfinished engines, inside the bundle: on the same disk, so that the final rename is atomic."""


@contextlib.contextmanager
def bundle_lock(bundle: Path) -> Iterator[None]:
    """One build at a time in a bundle; a second one waits. The system frees the lock of a killed process."""
    with exclusive(bundle, print, bundle / LOCK):
        yield


def require_bundle_folder(out: Path, onnx: Path) -> None:
    """Raises UserError, before anything is touched, where `out` holds something and is no bundle, or is the ONNX folder.
    A bundle whose manifest is damaged is known by the names of its engines."""
    require_apart(out, onnx, ("--out", "--onnx"))
    if not any(_engine_files(out)):
        require_our_folder(out, "a bundle", [MANIFEST], ("engines", "schema_version"), leftovers=(TIMING_CACHE,))


def starting_manifest(out: Path, folder: OnnxFolder, replace: bool) -> Manifest:
    """The bundle's manifest, or an empty one for a new bundle. Where the manifest cannot be read or names engines of another
    checkpoint: an empty one with `replace`, else UserError."""
    fresh = Manifest(
        source=Source(
            name=folder.source_name,
            sha256=folder.source_sha256,
            pipeline=folder.conditioning.pipeline,
            sampling=folder.sampling,
        )
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
    """The engines without those built from an older export of a component in `jobs`, and those whose files are gone. A
    UNet in 8 bits stands beside one in 16 and supersedes none but those of its own precision."""
    latest = {_slot(job.component.name, job.flavor, job.component.weights_precision): job.component for job in jobs}
    return [
        engine
        for engine in engines
        if _is_latest(engine, latest.get(_slot(engine.component, engine.flavor, engine.precision)))
        and all((out / file.path).is_file() for file in engine.files)
    ]


def _slot(component: str, flavor: str, precision: str) -> tuple[str, str, str]:
    return component, flavor, precision if precision in EIGHT_BITS else ""


def _is_latest(engine: Engine, component: OnnxComponent | None) -> bool:
    return component is None or (
        engine.onnx_sha256 in component.current_sha256 and engine.weights_sha256 == component.weights_sha256
    )


def with_pipeline_files(manifest: Manifest, folder: OnnxFolder, out: Path) -> Manifest:
    """Copies tokenizers, scheduler and configs beside the engines, each whole or not at all."""
    records = {record.path: record for record in manifest.files}
    for relative in folder.pipeline_files:
        source, target = folder.root / relative, out / relative
        digest = sha256_file(source)
        if not target.is_file() or sha256_file(target) != digest:
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
        path = relative.as_posix()
        records[path] = FileRecord(path=path, sha256=digest, size_bytes=source.stat().st_size)
    return Manifest(source=manifest.source, engines=manifest.engines, files=list(records.values()))


def _engine_files(out: Path) -> Iterator[Path]:
    """Files in the folders of components that are engines by their names, whatever the manifest says."""
    for component in BUILD_ORDER:
        for path in sorted((out / component).glob(f"{component}_*")):
            if not ENGINE_NAME.fullmatch(path.name):
                continue
            if path.is_dir():
                yield from (file for file in sorted(path.glob("model*")) if file.is_file())
            elif path.suffix == ".plan":
                yield path


def recorded_manifest(out: Path) -> Manifest | None:
    """The manifest as it stands; None where there is none that can be read."""
    try:
        return read_manifest(out)
    except UserError:
        return None


def remove_strays(out: Path, manifest: Manifest, earlier: Manifest | None, dry_run: bool = False) -> list[Path]:
    """Deletes and returns the files of ours that the manifest does not name: those that an `earlier` one named, and engines
    by their names. Whatever else lies in the bundle stays. A dry run only returns them."""
    named = {out / record.path for record in manifest.all_files}
    before = {out / record.path for record in earlier.all_files} if earlier else set()
    root = out.resolve()
    strays = [
        path
        for path in sorted((before | set(_engine_files(out))) - named)
        if path.is_file() and path.parent.resolve().is_relative_to(root)
    ]
    if dry_run:
        return strays
    for path in strays:
        path.unlink()
    for component in BUILD_ORDER:
        engines = (path for path in (out / component).glob(f"{component}_*") if ENGINE_NAME.fullmatch(path.name))
        for folder in [*engines, out / component]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    for path in [out / MANIFEST, *(out / record.path for record in manifest.files)]:
        remove_leftovers(path.parent, path.name)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)
    return strays
