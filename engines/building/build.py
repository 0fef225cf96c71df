"""Builds engines into a bundle: incremental by content key, each in a process of its own, whole or absent.

Order of writing: the engine under a temporary name, its rename, then the manifest that names it. Killed between any
two, the bundle's manifest still names only files that are there, and the same command goes on from it.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from distill.common.errors import UserError
from distill.common.files import exclusive, require_free_disk, sha256_file
from engines.building.jobs import Job, plan_builds, tool_versions
from engines.building.layouts import Guidance
from engines.building.process import run_worker
from engines.building.progress import BuildProgress, duration
from engines.bundle import (
    MANIFEST,
    PIPELINE_PARTS,
    BuildRecord,
    Engine,
    FileRecord,
    Layout,
    Manifest,
    Options,
    Source,
    TensorInfo,
    is_intact,
    read_manifest,
    write_manifest,
)
from engines.flavors import BuildRequest
from engines.onnx_folder import OnnxFolder, read_onnx_folder

LOCK = ".lock"
PARTIAL = ".partial"
"""Folder of unfinished engines inside the bundle: on the same disk, so that the last rename is atomic."""


@contextlib.contextmanager
def bundle_lock(bundle: Path) -> Iterator[None]:
    """One build at a time in a bundle; a second waits. The system frees the lock of a killed process."""
    with exclusive(bundle, print, bundle / LOCK):
        yield


def available_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What a new process can use: free memory of the machine, and of the container where one sets a limit. The
    container's cached files (cgroup v2, memory.stat) count as free: the kernel gives them up first."""
    available = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
        available = min(available, limit - used + cached)
    return available


def require_memory(jobs: list[Job], budget_bytes: int) -> None:
    """Raises UserError before anything starts where the largest job does not fit."""
    for job in jobs:
        if job.memory_bytes > budget_bytes:
            leaner = "" if len(job.profiles) == 1 else "; --layout ranged needs less"
            raise UserError(
                f"building {job.label} with {len(job.profiles)} profile(s) needs about {job.memory_bytes / 1e9:.1f} GB "
                f"of memory for {job.component.weights_bytes / 1e9:.1f} GB of weights, {budget_bytes / 1e9:.1f} GB may "
                f"be used{leaner}; free memory, raise --memory-gb, or build on a larger machine"
            )


def build_bundle(
    onnx: Path,
    out: Path,
    *,
    gpus: list[str],
    flavor: str = "tensorrt-rtx",
    layout: Layout | None = None,
    resolutions: str = "all",
    batches: list[int] | None = None,
    guidance: Guidance = "always",
    components: list[str] | None = None,
    options: Options | None = None,
    memory_gb: float | None = None,
    replace: bool = False,
) -> Manifest:
    """Adds the asked engines to the bundle `out`; what is there and intact is kept, what is superseded is removed.

    `replace` permits engines of another checkpoint to be dropped from the bundle. Raises UserError for bad input, too
    little memory or disk, and a build that failed.
    """
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise UserError(f"--memory-gb is {memory_gb}; it must be above 0 and finite")
    out = Path(out)
    folder = read_onnx_folder(Path(onnx))
    jobs = plan_builds(
        folder,
        gpus=gpus,
        flavor=flavor,
        layout=layout,
        resolutions=resolutions,
        batches=batches,
        guidance=guidance,
        components=components,
        options=options,
    )
    _starting_manifest(out, folder, replace)  # refused at once, not after waiting for another build
    with bundle_lock(out):
        manifest = _starting_manifest(out, folder, replace)
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        kept = {engine.key: engine for engine in manifest.engines if is_intact(out, engine.files)}
        todo = [job for job in jobs if job.key not in kept]
        budget = available_memory_bytes() if memory_gb is None else int(memory_gb * 1e9)
        require_memory(todo, budget)
        require_free_disk(out, sum(job.disk_bytes for job in todo if job.flavor != "onnxruntime"), "the bundle")
        with BuildProgress([job.cost_seconds for job in todo]) as progress:
            for job in todo:
                progress.start(job.label)
                engine = _build_one(job, out, budget, progress)
                manifest = _with_engine(manifest, engine)
                write_manifest(out, manifest)
                progress.finish(_summary(engine))
        manifest = _with_pipeline_files(manifest, folder, out)
        manifest = manifest.model_copy(update={"engines": _current(manifest.engines, jobs, out)})
        if not (out / MANIFEST).is_file() or read_manifest(out) != manifest:
            write_manifest(out, manifest)
        remove_strays(out, manifest)
        if not todo:
            progress.console.print(f"{out} is up to date: {len(jobs)} engine(s) unchanged", soft_wrap=True)
    return manifest


def _summary(engine: Engine) -> str:
    ratio = engine.size_bytes / engine.weights_bytes
    peak = engine.build.peak_rss_bytes / 1e9
    time = f"{duration(engine.build.seconds)} ({engine.build.cpu_seconds or 0:.0f} s of CPU)"
    return (
        f"{time}, {engine.size_bytes / 1e6:.1f} MB ({ratio:.3f} of the weights), "
        f"peak memory {peak:.1f} GB -> {engine.files[0].path}"
    )


def _starting_manifest(out: Path, folder: OnnxFolder, replace: bool) -> Manifest:
    """What the bundle says now. Raises UserError where it cannot be read or holds engines of another checkpoint,
    unless `replace` permits to begin anew."""
    fresh = Manifest(source=Source(name=folder.source_name, sha256=folder.source_sha256))
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


def _with_engine(manifest: Manifest, engine: Engine) -> Manifest:
    """A validated copy; an engine of the same key or file is replaced."""
    paths = {file.path for file in engine.files}
    others = [old for old in manifest.engines if old.key != engine.key and not paths & {f.path for f in old.files}]
    return Manifest(source=manifest.source, engines=[*others, engine], files=manifest.files)


def _current(engines: list[Engine], jobs: list[Job], out: Path) -> list[Engine]:
    """Drops engines made from an ONNX file that one of `jobs` has superseded, and engines whose files are gone."""
    latest = {(job.component.name, job.flavor): job.component.current_sha256 for job in jobs}
    weights = {(job.component.name, job.flavor): job.component.weights_sha256 for job in jobs}
    return [
        engine
        for engine in engines
        if engine.onnx_sha256 in latest.get(slot := (engine.component, engine.flavor), {engine.onnx_sha256})
        and weights.get(slot, engine.weights_sha256) == engine.weights_sha256
        and all((out / file.path).is_file() for file in engine.files)
    ]


def _with_pipeline_files(manifest: Manifest, folder: OnnxFolder, out: Path) -> Manifest:
    """Copies tokenizers, scheduler and configs beside the engines, each whole or absent."""
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
    """Deletes files that the manifest does not name, below the folders of its components, of the engines in `also`,
    and of the tokenizers and scheduler; returns them. A dry run deletes nothing."""
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


def _build_one(job: Job, out: Path, budget_bytes: int, progress: BuildProgress) -> Engine:
    target = out / job.path
    partial = out / PARTIAL / target.name
    partial.parent.mkdir(exist_ok=True)
    request = BuildRequest(
        component=job.component.name,
        flavor=job.flavor,
        onnx_files=[path.resolve() for path in job.component.files],
        out=partial.resolve(),
        profiles=job.profiles,
        outputs=[tensor.name for tensor in job.component.needed_outputs],
        compute_capabilities=list(job.target.compute_capabilities),
        options=job.options,
        timing_cache=(out / ".timing-cache" / f"{job.target.label}_{job.flavor_version}.cache").resolve()
        if job.flavor == "tensorrt"
        else None,
    )
    try:
        result = run_worker(request, budget_bytes, progress)
    except BaseException:
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        raise
    files = sorted(partial.rglob("*")) if partial.is_dir() else [partial]
    digests = {path: (sha256_file(path), path.stat().st_size) for path in files if path.is_file()}
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)  # damaged: an intact one would have been kept
    partial.rename(target)
    records = [
        FileRecord(
            path=(target / path.relative_to(partial)).relative_to(out).as_posix(), sha256=digest, size_bytes=size
        )
        for path, (digest, size) in digests.items()
    ]
    return Engine(
        component=job.component.name,  # type: ignore[arg-type]
        flavor=job.flavor,  # type: ignore[arg-type]
        flavor_version=job.flavor_version,
        layout=job.layout,
        gpus=list(job.target.gpus),
        compute_capabilities=list(job.target.compute_capabilities),
        precision=job.precision,  # type: ignore[arg-type]
        resolutions=job.resolutions,
        batches=job.batches,
        profiles=job.profiles,
        inputs=job.component.inputs,
        outputs=[TensorInfo(**tensor) for tensor in result["outputs"]],
        files=sorted(records, key=lambda record: len(record.path)),
        key=job.key,
        onnx_sha256=job.component.onnx_sha256,
        weights_sha256=job.component.weights_sha256,
        weights_bytes=job.component.weights_bytes,
        options=job.options,
        build=BuildRecord(
            seconds=result["seconds"],
            cpu_seconds=result["cpu_seconds"],
            peak_rss_bytes=result["peak_rss_bytes"],
            tools=tool_versions(job),
        ),
    )
