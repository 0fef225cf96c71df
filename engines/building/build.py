"""Builds engines into a bundle. Engines that are there and unchanged, by their content key, are kept.

Each engine is built in a process of its own, under a temporary name; then it is renamed; then the manifest names it. So a
build that is killed at any point leaves a manifest whose files are all there, and the same command goes on from it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from distill.common.errors import require_above
from distill.common.files import require_free_disk, sha256_file, size_text
from engines.building.contents import (
    PARTIAL,
    TIMING_CACHE,
    bundle_lock,
    recorded_manifest,
    remove_strays,
    require_bundle_folder,
    starting_manifest,
    with_engine,
    with_pipeline_files,
    without_superseded,
)
from engines.building.jobs import Job, list_jobs, require_memory, require_vram, tool_versions
from engines.building.process import run_worker
from engines.building.progress import BuildProgress, duration
from engines.bundle import (
    MANIFEST,
    BuildRecord,
    Engine,
    FileRecord,
    Manifest,
    Options,
    TensorInfo,
    read_manifest,
    write_manifest,
)
from engines.choices import Guidance, Layout
from engines.flavors import BuildRequest
from engines.gpus import free_vram_bytes, gpu_at_hand
from engines.integrity import is_intact
from engines.memory import available_memory_bytes
from engines.onnx_folder import read_onnx_folder


def build_bundle(
    onnx: Path,
    out: Path,
    *,
    gpus: list[str],
    flavor: str = "tensorrt-rtx",
    layout: Layout | None = None,
    resolutions: str = "all",
    batches: list[int] | None = None,
    guidance: Guidance | None = None,
    components: list[str] | None = None,
    options: Options | None = None,
    memory_gb: float | None = None,
    replace: bool = False,
) -> Manifest:
    """Adds the engines to the bundle `out`. Intact engines are kept, superseded ones removed. `guidance` None is `never`
    for a model that takes one pass a step, else `always`.

    With `replace` engines of another checkpoint are dropped from the bundle. Raises UserError for bad input, too little
    memory or disk, and a build that failed.
    """
    if memory_gb is not None:
        require_above(0, memory_gb=memory_gb)
    out = Path(out)
    folder = read_onnx_folder(Path(onnx))
    require_bundle_folder(out, folder.root)
    jobs = list_jobs(
        folder,
        gpus=gpus,
        flavor=flavor,
        layout=layout,
        resolutions=resolutions,
        batches=batches,
        guidance=guidance or ("never" if folder.sampling and folder.sampling.one_pass else "always"),
        components=components,
        options=options,
    )
    starting_manifest(out, folder, replace)  # refused at once, not after waiting for another build
    with bundle_lock(out):
        earlier = recorded_manifest(out)
        manifest = starting_manifest(out, folder, replace)
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        kept = {engine.key: engine for engine in manifest.engines if is_intact(out, engine.files)}
        todo = [job for job in jobs if job.key not in kept]
        budget = available_memory_bytes() if memory_gb is None else int(memory_gb * 1e9)
        require_memory(todo, budget)
        if (free_bytes := free_vram_bytes()) is not None:
            require_vram(todo, free_bytes)
        require_free_disk(out, sum(job.disk_bytes for job in todo), "the bundle")
        with BuildProgress([job.cost_seconds for job in todo]) as progress:
            for job in todo:
                progress.start(job.label)
                engine = _build_one(job, out, budget, progress)
                manifest = with_engine(manifest, engine)
                write_manifest(out, manifest)
                progress.finish(_summary(engine))
        manifest = with_pipeline_files(manifest, folder, out)
        manifest = manifest.model_copy(update={"engines": without_superseded(manifest.engines, jobs, out)})
        if not (out / MANIFEST).is_file() or read_manifest(out) != manifest:
            write_manifest(out, manifest)
        remove_strays(out, manifest, earlier)
        if not todo:
            progress.console.print(f"{out} is up to date: {len(jobs)} engine(s) unchanged", soft_wrap=True)
    return manifest


def _summary(engine: Engine) -> str:
    ratio = engine.size_bytes / engine.weights_bytes
    time = f"{duration(engine.build.seconds)} ({engine.build.cpu_seconds or 0:.0f} s of CPU)"
    return (
        f"{time}, {size_text(engine.size_bytes)} ({ratio:.3f} of the weights), "
        f"peak memory {size_text(engine.build.peak_rss_bytes)} -> {engine.files[0].path}"
    )


def _timing_name(job: Job) -> str:
    """By the board, not by its capability: an A10's timings choose wrong kernels for an RTX 3090."""
    found = gpu_at_hand()
    board = found[0] if found else job.target.label
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', board)}_{job.flavor_version}.cache"


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
        timing_cache=(out / TIMING_CACHE / _timing_name(job)).resolve() if job.flavor == "tensorrt" else None,
    )
    try:
        result = run_worker(request, budget_bytes, progress)
    except BaseException:
        shutil.rmtree(out / PARTIAL, ignore_errors=True)
        raise
    records = _move_into_place(partial, target, out)
    return Engine(
        component=job.component.name,
        flavor=job.flavor,  # type: ignore[arg-type]
        flavor_version=job.flavor_version,
        layout=job.layout,
        guidance=job.guidance,
        gpus=list(job.target.gpus),
        compute_capabilities=list(job.target.compute_capabilities),
        precision=job.component.weights_precision,  # type: ignore[arg-type]
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


def _move_into_place(partial: Path, target: Path, out: Path) -> list[FileRecord]:
    """Renames a finished engine, a file or a folder, and returns the records of its files."""
    files = sorted(partial.rglob("*")) if partial.is_dir() else [partial]
    records = [
        FileRecord(
            path=(target / path.relative_to(partial)).relative_to(out).as_posix(),
            sha256=sha256_file(path),
            size_bytes=path.stat().st_size,
        )
        for path in files
        if path.is_file()
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)  # damaged: an intact one would have been kept
    partial.replace(target)
    return records
