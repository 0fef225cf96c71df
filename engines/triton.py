"""A bundle as a Triton model repository: one text-to-image model over `engines.load`, for every size of the bundle.

The model is a Python-backend model: it holds one copy of the weights per instance and serves all resolutions. For
teams that orchestrate themselves, the bundle's TensorRT plans can be offered as `tensorrt_plan` models as well.
Triton's config.pbtxt is text; it is written here from the manifest, so that shapes and types cannot disagree with it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError
from distill.files import replacing, sha256_file
from engines.bundle import MANIFEST, Engine, Manifest, TensorInfo, read_manifest, verify_bundle
from engines.pipeline import choose_flavor

MODEL = "slimxl"
MODEL_SOURCE = Path(__file__).with_name("triton_model.py")
TRITON_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
INPUTS = (
    ("prompt", "TYPE_STRING", False),
    ("negative_prompt", "TYPE_STRING", True),
    ("width", "TYPE_INT32", True),
    ("height", "TYPE_INT32", True),
    ("steps", "TYPE_INT32", True),
    ("guidance", "TYPE_FP32", True),
    ("seed", "TYPE_INT64", True),
    ("images", "TYPE_INT32", True),
)
"""Name, type, optional; each of shape [1, 1], the first being Triton's batch."""
OUTPUTS = (
    ("image", "TYPE_UINT8", "[ -1, -1, -1, 3 ]"),
    ("png", "TYPE_STRING", "[ -1 ]"),
    ("timings_ms", "TYPE_FP32", "[ 3 ]"),
    ("batch", "TYPE_INT32", "[ 1 ]"),
    ("step", "TYPE_INT32", "[ 1 ]"),
)
"""`image` (1, images, height, width, 3); `timings_ms` is text, denoising, decoding; `batch` counts the pictures that
were drawn together; `step` counts up in decoupled mode."""
LONGEST_QUEUE = 64
"""Requests that wait for each model; one more is refused at once instead of waiting longer than its client does."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a bundle is served. `gpus` are CUDA device numbers that get `instances` copies each: () is the CPU, None
    every GPU here where the flavor runs on one. `execution_env` is the virtual environment in which the backend's
    Python starts, where the server's own will not do."""

    flavor: str | None = None
    gpus: tuple[int, ...] | None = None
    instances: int = 1
    decoupled: bool = False
    plans: bool = False
    warm_up: bool = True
    queue: int = LONGEST_QUEUE
    execution_env: Path | None = None


def write_repository(bundle: Path, out: Path, serving: Serving) -> list[str]:
    """Writes the repository, whole or not at all, and returns the names of its models.

    Raises UserError for a damaged bundle, before anything is written, and where `plans` is asked of a bundle that has
    none.
    """
    manifest = read_manifest(bundle)
    faults = verify_bundle(bundle)
    if faults:
        raise UserError(faults[0])
    flavor, gpus = choose_place(manifest, serving.flavor, serving.gpus)
    for name, number in (("instances", serving.instances), ("queue", serving.queue)):
        if number < 1:
            raise UserError(f"--{name} {number} is not possible: 1 or more")
    plan_engines = [engine for engine in manifest.engines if engine.flavor == "tensorrt"] if serving.plans else []
    if serving.plans and not plan_engines:
        raise UserError(
            f"{bundle} has no tensorrt plans for Triton's tensorrt backend, it has {', '.join(manifest.flavors)}; "
            "build them with --flavor tensorrt on the GPU that serves, with the TensorRT of the Triton container"
        )
    names = []
    with replacing(out) as folder:
        (folder / MODEL / "1").mkdir(parents=True)
        text = model_config(bundle.resolve(), manifest, flavor, gpus, serving)
        (folder / MODEL / "config.pbtxt").write_text(text, encoding="utf-8")
        shutil.copyfile(MODEL_SOURCE, folder / MODEL / "1" / "model.py")
        names.append(MODEL)
        for engine in plan_engines:
            name = Path(engine.files[0].path).stem.replace(".", "-")
            (folder / name / "1").mkdir(parents=True)
            text = plan_config(name, engine, gpus or (0,))
            (folder / name / "config.pbtxt").write_text(text, encoding="utf-8")
            shutil.copyfile(bundle / engine.files[0].path, folder / name / "1" / "model.plan")
            names.append(name)
    return names


def choose_place(manifest: Manifest, flavor: str | None, gpus: tuple[int, ...] | None) -> tuple[str, tuple[int, ...]]:
    """The flavor that is served, and the GPUs it is served on. Raises UserError where the two do not go together."""
    import torch

    if flavor is None and gpus == ():
        flavor = "onnxruntime"
    device = f"cuda:{gpus[0]}" if gpus else None
    backend = choose_flavor(manifest, flavor, device)
    if gpus is None:
        gpus = tuple(range(torch.cuda.device_count())) if backend.default_device().startswith("cuda") else ()
    if not gpus and backend.name != "onnxruntime":
        raise UserError(f"{backend.name} engines run on a GPU: name it with --gpus 0, or pass --flavor onnxruntime")
    return backend.name, gpus


def quote(text: str) -> str:
    """A string of protobuf's text format."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _instances(gpus: tuple[int, ...], count: int) -> str:
    if not gpus:
        return f"instance_group [ {{ kind: KIND_CPU count: {count} }} ]"
    groups = ", ".join(f"{{ kind: KIND_GPU count: {count} gpus: [ {gpu} ] }}" for gpu in gpus)
    return f"instance_group [ {groups} ]"


def model_config(bundle: Path, manifest: Manifest, flavor: str, gpus: tuple[int, ...], serving: Serving) -> str:
    """config.pbtxt of the text-to-image model. The response cache stays off: the same prompt is rarely asked twice.

    Triton's batcher hands over what waits, without waiting for more; the model draws together what is alike.
    """
    unets = [e for e in manifest.engines if e.component == "unet" and e.flavor == flavor]
    lines = [f"name: {quote(MODEL)}", 'backend: "python"']
    lines.append(f"max_batch_size: {max(batch for engine in unets for batch in engine.batches)}")
    for name, kind, optional in INPUTS:
        tail = " optional: true" if optional else ""
        lines.append(f"input [ {{ name: {quote(name)} data_type: {kind} dims: [ 1 ]{tail} }} ]")
    lines += [f"output [ {{ name: {quote(name)} data_type: {kind} dims: {dims} }} ]" for name, kind, dims in OUTPUTS]
    lines.append(_instances(gpus, serving.instances))
    parameters = {
        "bundle": str(bundle),
        "manifest_sha256": sha256_file(bundle / MANIFEST),
        "source": manifest.source.name,
        "flavor": flavor,
        "sizes": ",".join(dict.fromkeys(size for engine in unets for size in engine.resolutions)),
        "warm_up": str(serving.warm_up).lower(),
    }
    if serving.execution_env:
        parameters["EXECUTION_ENV_PATH"] = str(serving.execution_env.resolve())
    lines += [
        f"parameters {{ key: {quote(key)} value {{ string_value: {quote(value)} }} }}"
        for key, value in parameters.items()
    ]
    lines.append(f"dynamic_batching {{ default_queue_policy {{ max_queue_size: {serving.queue} }} }}")
    if serving.decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    lines.append("response_cache { enable: false }")
    return "\n".join(lines) + "\n"


def plan_config(name: str, engine: Engine, gpus: tuple[int, ...]) -> str:
    """config.pbtxt of one plan: its inputs and outputs with the dimensions that vary as -1, its profiles by number.

    Raises UserError for a plan with a scalar input, which Triton does not take where the batch is a dimension like any
    other ("scalar tensors are not supported", its core says).
    """

    def tensor(info: TensorInfo) -> str:
        if not info.shape:
            raise UserError(
                f"the {engine.component} plan has the scalar input {info.name}, Triton's tensorrt backend takes none; "
                f"export {info.name} with shape [1], or serve the bundle without --plans"
            )
        dims = ", ".join(str(side) if isinstance(side, int) else "-1" for side in info.shape)
        return f"{{ name: {quote(info.name)} data_type: {TRITON_TYPES[info.dtype]} dims: [ {dims} ] }}"

    profiles = ", ".join(quote(str(profile.index)) for profile in engine.profiles)
    groups = ", ".join(f"{{ kind: KIND_GPU count: 1 gpus: [ {gpu} ] profile: [ {profiles} ] }}" for gpu in gpus)
    lines = [f"name: {quote(name)}", 'platform: "tensorrt_plan"', "max_batch_size: 0"]
    lines += [f"input [ {tensor(info)} ]" for info in engine.inputs]
    lines += [f"output [ {tensor(info)} ]" for info in engine.outputs]
    lines.append(f"instance_group [ {groups} ]")
    return "\n".join(lines) + "\n"


def parse_devices(text: str) -> tuple[int, ...] | None:
    """CUDA device numbers, () for `none`, None for `auto`. Raises UserError for anything else."""
    if text in ("auto", "none"):
        return None if text == "auto" else ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise UserError(
            f"--gpus {text!r} is not a list of CUDA device numbers, e.g. 0,1; auto and none are allowed too"
        )
    return tuple(int(part) for part in parts)
