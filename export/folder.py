"""The ONNX folder: which components are written, when one is up to date, and what is recorded about each.

    unet/ vae_decoder/ vae_encoder/ text_encoder/ text_encoder_2/    model.onnx(.data), config.json, export.json
    tokenizer/ tokenizer_2/ scheduler/ model_index.json              copied from the checkpoint
    slimxl.json                                                      what the folder was made from, and how

Each component is written under a temporary name, checked, and renamed: a folder with its final name is whole.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from distill.checkpoints.folder import copy_index, file_hashes, find_family, read_config
from distill.checkpoints.load import load_parts
from distill.checkpoints.sources import WORKDIR
from distill.checkpoints.tensors import component_tensors
from distill.common.errors import UserError
from distill.common.files import (
    exclusive,
    read_object,
    remove_leftovers,
    replacing,
    require_free_disk,
    sha256_file,
    sha256_file_once,
    sha256_json,
    write_json,
)
from distill.common.ownership import require_our_folder
from distill.models.conditioning import conditioning_of
from distill.models.families import vae_scale_factor
from export.checkpoint.prepare import drawn_as, prepare, vae_sources
from export.components import COMPONENTS, FLOAT_DTYPES
from export.job import (
    CHECK_BELOW_BYTES,
    SCHEMA,
    ExportOptions,
    Job,
    chosen_components,
    component_precision,
    library_versions,
    make_job,
    weights_hashes,
)
from export.records import read_record


def _read_finished(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of a component made from the same inputs, if all its files are there in their sizes."""
    if not (folder / "export.json").is_file() or (record := read_record(folder)).get("key") != key:
        return None
    files = ((folder / name, size) for name, size in record["bytes"].items())
    return record if all(file.is_file() and file.stat().st_size == size for file, size in files) else None


def check_files(folder: Path, components: Sequence[str] = (), *, beside: bool | None = None) -> None:
    """Compares every file that an export wrote for some components, or for all, with the sha256 that was recorded then;
    what lies `beside` them (tokenizers, scheduler) too, which is the default for all.

    Raises UserError, which names the file, for one that is missing or has changed, and where there is no component.
    """
    names = components or [name for name in COMPONENTS if (folder / name / "export.json").is_file()]
    if not names:
        raise UserError(f"{folder} is no ONNX folder: no component in it has an export.json; make one with export onnx")
    recorded = {
        f"{name}/{file}": digest for name in names for file, digest in read_record(folder / name)["sha256"].items()
    }
    if (not components if beside is None else beside) and (folder / "slimxl.json").is_file():
        beside = read_object(folder / "slimxl.json").get("files", {})
        recorded |= beside if isinstance(beside, dict) else {}
    for file, digest in recorded.items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path} is missing; export again (python -m export onnx)")
        if sha256_file_once(path) != digest:
            raise UserError(
                f"{path} has changed since it was exported: its sha256 is another one than was recorded; remove "
                f"{path.parent} and export again (python -m export onnx)"
            )


def is_current(folder: Path, job: Job) -> bool:
    """True where `folder` holds the finished component, compared with torch where it is to be."""
    record = _read_finished(folder, job.key)
    if record is None:
        return False
    return bool(record["checked"]) or not job.options.check or sum(record["bytes"].values()) >= CHECK_BELOW_BYTES


def refuse_foreign(out: Path) -> None:
    """Raises UserError where `out` is a file, holds something and no export wrote it, or holds a network that no export
    has written."""
    failed = [f"{name}.failed" for name in COMPONENTS]
    require_our_folder(out, "an ONNX folder", ["slimxl.json", "*/export.json"], ("opset", "versions"), leftovers=failed)
    for name in COMPONENTS:
        if (out / name).exists() and not (out / name / "export.json").is_file():
            raise UserError(f"{out} is no ONNX folder: its {name} has no export.json; choose another --out")


def _refuse_strangers(
    prepared: Path, out: Path, names: Sequence[str], options: ExportOptions, hashes: Mapping[str, str]
) -> None:
    """Raises UserError where `out` holds a component that is not to be written now and was made from something else."""
    for name in COMPONENTS:
        if name in names or not (out / name).is_dir():
            continue
        if not _read_finished(out / name, make_job(prepared, name, options, hashes).key):
            raise UserError(
                f"{out} holds a {name} of another checkpoint, precision or version: one folder is one model; export "
                f"{name} too (--components), or choose another --out"
            )


def _check_free_disk(jobs: Sequence[Job], out: Path) -> None:
    needed = 50_000_000
    for job in jobs:
        component = COMPONENTS[job.name]
        tensors = component_tensors(job.checkpoint / component.source, job.precision)
        numbers = sum(
            math.prod(tensor.shape) for key, tensor in tensors.items() if not key.startswith(component.unused)
        )
        needed += numbers * np.dtype(FLOAT_DTYPES[job.precision]).itemsize
    require_free_disk(out, needed, f"an ONNX folder of {', '.join(job.name for job in jobs)}")


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    options: ExportOptions | None = None,
    source_name: str | None = None,
    workdir: Path = WORKDIR,
    progress: Callable[[str], None] = print,
) -> None:
    """Writes the ONNX folder `out` of the diffusers folder `checkpoint`. Components that are up to date are kept.

    A checkpoint with another VAE or with LoRAs is made under `workdir` first. While components are written there is no
    slimxl.json, so that a folder that was left half new is not taken for a whole one; a second export waits.

    Raises UserError for bad input, and where an exported graph disagrees with torch.
    """
    options = options or ExportOptions()
    refuse_foreign(out)
    source_hashes = file_hashes(checkpoint)
    prepared, hashes = prepare(checkpoint, source_hashes, options.vae, options.loras, options.controlnets, workdir)
    names = chosen_components(prepared, options)
    jobs = [make_job(prepared, name, options, hashes) for name in names]
    load_parts(prepared)  # what cannot be loaded is told now, not at the first picture
    source = {"name": source_name or checkpoint.name, "sha256": sha256_json(source_hashes)}
    about = _about(prepared, source, hashes, options)
    if sampling := drawn_as(checkpoint, options.loras):
        about["sampling"] = asdict(sampling)
    with exclusive(out, progress, out / ".lock"):
        remove_leftovers(out)
        _refuse_strangers(prepared, out, names, options, hashes)
        _write_components(jobs, out, options.reuse, progress)
        parts = _copy_pipeline_parts(prepared, out)
        write_json(out / "slimxl.json", about | {"files": parts})


def _write_components(jobs: Sequence[Job], out: Path, reuse: Sequence[Path], progress: Callable[[str], None]) -> None:
    """Brings `out` up to date: an equal component is copied from one of `reuse`, any other is exported."""
    stale, donors = [], {}
    for job in jobs:
        if is_current(out / job.name, job):
            progress(f"{job.name}: up to date")
            continue
        stale.append(job)
        if equal := [folder for folder in reuse if is_current(folder / job.name, job)]:
            donors[job.name] = equal[0]
    if not stale:
        return
    from export.graph.weights import load_shapes
    from export.graph.wrappers import TORCH_DTYPES
    from export.write import write_component

    for source, precision in sorted({(COMPONENTS[job.name].source, job.precision) for job in stale}):
        load_shapes(stale[0].checkpoint, source, TORCH_DTYPES[precision])  # what is missing is told before it begins
    _check_free_disk(stale, out)
    (out / "slimxl.json").unlink(missing_ok=True)
    for job in stale:
        if job.name in donors:
            check_files(donors[job.name], [job.name])
            with replacing(out / job.name) as temporary:
                shutil.copytree(donors[job.name] / job.name, temporary)
            progress(f"{job.name}: taken from {donors[job.name]}")
        else:
            write_component(job, out / job.name, progress)
        failed = out / f"{job.name}.failed"
        if failed.exists():  # as an earlier verify called the one before
            shutil.rmtree(failed)


def _about(prepared: Path, source: dict[str, str], hashes: Mapping[str, str], options: ExportOptions) -> dict[str, Any]:
    """slimxl.json. `source` is what was given, `hashes` of the checkpoint after the change of VAE and LoRAs."""
    vae_config, family = read_config(prepared, "vae"), find_family(prepared)
    resolutions = options.resolutions or family.resolutions
    loras = [(path.resolve(), scale) for path, scale in options.loras]
    vae_precision = component_precision("vae_decoder", options, family.conditioning, vae_config)
    is_named = options.vae in ("stock", *vae_sources(prepared))
    return {
        "schema": SCHEMA,
        "source": source,
        "exported_sha256": sha256_json(hashes),
        "precision": options.precision,
        "opset": options.opset,
        "shapes": [str(resolution) for resolution in options.resolutions] or "dynamic",
        "resolutions": [str(resolution) for resolution in resolutions],
        "vae": {
            "identity": options.vae if is_named else str(Path(options.vae).resolve()),
            "class": vae_config.get("_class_name"),
            "precision": vae_precision,
            "scaling_factor": vae_config.get("scaling_factor"),
            "pixels_per_latent": vae_scale_factor(vae_config),
            "sha256": list(weights_hashes(prepared, "vae", hashes, vae_precision).values()),
        },
        "loras": [{"file": str(path), "sha256": sha256_file(path), "scale": scale} for path, scale in loras],
        **({"controlnets": [_lasting(name) for name in options.controlnets]} if options.controlnets else {}),
        "versions": library_versions(),
    }


def _lasting(name: str) -> str:
    """A folder's whole path; a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _copy_pipeline_parts(checkpoint: Path, out: Path) -> dict[str, str]:
    """Returns the sha256 of each file that was copied, by its path in `out`."""
    parts = conditioning_of(read_config(checkpoint, "unet")).parts
    for part in parts:
        with replacing(out / part) as temporary:
            shutil.copytree(checkpoint / part, temporary)
    with replacing(out / "model_index.json") as temporary:
        copy_index(checkpoint, temporary)
    files = [path for part in parts for path in (out / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): sha256_file(path) for path in sorted([*files, out / "model_index.json"])}
