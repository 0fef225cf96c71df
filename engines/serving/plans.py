"""A Triton repository of the plans themselves, for a pipeline of one's own: a model for each component, by Triton's TensorRT
backend, in place of the Python model that draws whole pictures (`repository.py`).

A model takes what its plan takes, with all dimensions, the first among them (`max_batch_size` 0): one timestep is for all
rows, so the backend's batcher cannot count them. Plans for several GPUs are one model: Triton takes the file of the GPU it
finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill.common.errors import UserError
from distill.common.files import clone_file, replacing, require_free_disk
from engines.bundle import Engine, TensorInfo, read_manifest, rebuild_command
from engines.integrity import find_faults
from engines.serving.repository import SIGNATURE, quote, require_our_repository

FLAVOR = "tensorrt"
TYPES = {
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}


def write_plans(bundle: Path, out: Path) -> list[str]:
    """Writes the repository, whole or not at all, and returns the names of its models.

    Raises UserError for a bundle without plans of TensorRT (its backend opens no others), for damaged ones, and for an
    `out` that slimxl did not write.
    """
    out = out.resolve()
    require_our_repository(out)
    manifest = read_manifest(bundle)
    models: dict[str, list[Engine]] = {}
    for engine in manifest.engines:
        if engine.flavor == FLAVOR:
            models.setdefault(_name(engine), []).append(engine)
    if not models:
        raise UserError(
            f"{bundle} has no plans of TensorRT, which Triton's TensorRT backend takes alone: it has "
            f"{', '.join(manifest.flavors)}; build them on the GPU with --flavor tensorrt, or use python -m engines serve"
        )
    records = [
        (record, f"rebuild it with: {rebuild_command(bundle, engine)}")
        for engines in models.values()
        for engine in engines
        for record in engine.files
    ]
    for fault in find_faults(bundle, records):
        raise UserError(fault)
    require_free_disk(out, sum(record.size_bytes for record, _ in records), "the repository", "--out")
    with replacing(out) as folder:
        for name, engines in models.items():
            (folder / name / "1").mkdir(parents=True)
            for engine in engines:
                clone_file(bundle / engine.files[0].path, folder / name / "1" / _file(engine))
            (folder / name / "config.pbtxt").write_text(plan_config(name, engines), encoding="utf-8")
    return list(models)


def _name(engine: Engine) -> str:
    """Plans of other sizes, precisions or layouts are models of their own."""
    sizes = engine.resolutions[0] if len(engine.resolutions) == 1 else engine.layout
    return "-".join(["slimxl", engine.component, sizes, *([engine.precision] if engine.component == "unet" else [])])


def _file(engine: Engine) -> str:
    return f"{'-'.join(engine.compute_capabilities)}.plan"


def plan_config(name: str, engines: Sequence[Engine]) -> str:
    """config.pbtxt of plans that are alike but for their GPUs."""
    first = engines[0]
    files = {capability: _file(engine) for engine in engines for capability in engine.compute_capabilities}
    profiles = ", ".join(quote(str(profile.index)) for profile in first.profiles)
    lines = [SIGNATURE, f"name: {quote(name)}", 'platform: "tensorrt_plan"', "max_batch_size: 0"]
    lines += [f"input [ {_tensor(tensor)} ]" for tensor in first.inputs]
    lines += [f"output [ {_tensor(tensor)} ]" for tensor in first.outputs]
    lines.append(f"instance_group [ {{ kind: KIND_GPU count: 1 profile: [ {profiles} ] }} ]")
    lines.append(f"default_model_filename: {quote(_file(first))}")
    lines += [f"cc_model_filenames [ {{ key: {quote(one)} value: {quote(file)} }} ]" for one, file in files.items()]
    return "\n".join(lines) + "\n"


def _tensor(tensor: TensorInfo) -> str:
    dims = ", ".join(str(side) if isinstance(side, int) else "-1" for side in tensor.shape)
    return f"{{ name: {quote(tensor.name)} data_type: {TYPES[tensor.dtype]} dims: [ {dims} ] }}"
