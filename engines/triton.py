"""A bundle as a Triton model repository: one text-to-image model over `engines.load`, for every size of the bundle.

The model is a Python-backend model: it holds one copy of the weights per instance and serves all resolutions. For
teams that orchestrate themselves, the bundle's TensorRT plans can be offered as `tensorrt_plan` models as well.
Triton's config.pbtxt is text; it is written here from the manifest, so that shapes and types cannot disagree with it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from distill.errors import UserError
from distill.files import replacing
from engines.bundle import Engine, TensorInfo, read_manifest, verify_bundle

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
"""Name, type, optional; each of shape [1]."""
OUTPUTS = (
    ("image", "TYPE_UINT8", "[ -1, -1, -1, 3 ]"),
    ("png", "TYPE_STRING", "[ -1 ]"),
    ("timings_ms", "TYPE_FP32", "[ 3 ]"),
    ("step", "TYPE_INT32", "[ 1 ]"),
)
"""`image` (images, height, width, 3); `timings_ms` is text, denoising, decoding; `step` counts up in decoupled mode."""


def write_repository(
    bundle: Path,
    out: Path,
    *,
    flavor: str | None = None,
    gpus: list[int] | None = None,
    instances: int = 1,
    decoupled: bool = False,
    plans: bool = False,
    warm_up: bool = True,
    execution_env: Path | None = None,
) -> list[str]:
    """Writes the repository, whole or not at all, and returns the names of its models.

    `execution_env` is the virtual environment that the backend's Python starts in, where the server's own will not do.
    `gpus` are CUDA device numbers that get `instances` copies each; none means the CPU. Raises UserError for a damaged
    bundle, before anything is written, and where `plans` is asked of a bundle that has none.
    """
    manifest = read_manifest(bundle)
    faults = verify_bundle(bundle)
    if faults:
        raise UserError(faults[0])
    if flavor is not None and flavor not in manifest.flavors:
        raise UserError(f"{bundle} has no {flavor} engines, it has {', '.join(manifest.flavors)}")
    if instances < 1:
        raise UserError(f"--instances {instances} is not possible: 1 or more")
    plan_engines = [engine for engine in manifest.engines if engine.flavor == "tensorrt"] if plans else []
    if plans and not plan_engines:
        raise UserError(
            f"{bundle} has no tensorrt plans for Triton's tensorrt backend, it has {', '.join(manifest.flavors)}; "
            "build them with --flavor tensorrt on the GPU that serves, with the TensorRT of the Triton container"
        )
    names = []
    with replacing(out) as folder:
        text = model_config(bundle.resolve(), flavor, gpus or [], instances, decoupled, warm_up, execution_env)
        (folder / MODEL / "1").mkdir(parents=True)
        (folder / MODEL / "config.pbtxt").write_text(text, encoding="utf-8")
        shutil.copyfile(MODEL_SOURCE, folder / MODEL / "1" / "model.py")
        names.append(MODEL)
        for engine in plan_engines:
            name = Path(engine.files[0].path).stem.replace(".", "-")
            (folder / name / "1").mkdir(parents=True)
            (folder / name / "config.pbtxt").write_text(plan_config(name, engine, gpus or [0]), encoding="utf-8")
            shutil.copyfile(bundle / engine.files[0].path, folder / name / "1" / "model.plan")
            names.append(name)
    return names


def quote(text: str) -> str:
    """A string of protobuf's text format."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _instances(gpus: list[int], count: int) -> str:
    if not gpus:
        return f"instance_group [ {{ kind: KIND_CPU count: {count} }} ]"
    groups = ", ".join(f"{{ kind: KIND_GPU count: {count} gpus: [ {gpu} ] }}" for gpu in gpus)
    return f"instance_group [ {groups} ]"


def model_config(
    bundle: Path,
    flavor: str | None,
    gpus: list[int],
    instances: int,
    decoupled: bool,
    warm_up: bool,
    execution_env: Path | None = None,
) -> str:
    """config.pbtxt of the text-to-image model. The response cache stays off: the same prompt is rarely asked twice."""
    lines = [f"name: {quote(MODEL)}", 'backend: "python"', "max_batch_size: 0"]
    for name, kind, optional in INPUTS:
        tail = " optional: true" if optional else ""
        lines.append(f"input [ {{ name: {quote(name)} data_type: {kind} dims: [ 1 ]{tail} }} ]")
    lines += [f"output [ {{ name: {quote(name)} data_type: {kind} dims: {dims} }} ]" for name, kind, dims in OUTPUTS]
    lines.append(_instances(gpus, instances))
    parameters = {"bundle": str(bundle), "flavor": flavor or "", "warm_up": str(warm_up).lower()}
    if execution_env:
        parameters["EXECUTION_ENV_PATH"] = str(execution_env.resolve())
    lines += [
        f"parameters {{ key: {quote(key)} value {{ string_value: {quote(value)} }} }}"
        for key, value in parameters.items()
    ]
    if decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    lines.append("response_cache { enable: false }")
    return "\n".join(lines) + "\n"


def plan_config(name: str, engine: Engine, gpus: list[int]) -> str:
    """config.pbtxt of one plan: its inputs and outputs with the dimensions that vary as -1, its profiles by number."""

    def tensor(info: TensorInfo) -> str:
        dims = [str(side) if isinstance(side, int) else "-1" for side in info.shape] or ["1"]
        scalar = " reshape { shape: [ ] }" if not info.shape else ""
        return (
            f"{{ name: {quote(info.name)} data_type: {TRITON_TYPES[info.dtype]} dims: [ {', '.join(dims)} ]{scalar} }}"
        )

    profiles = ", ".join(quote(str(profile.index)) for profile in engine.profiles)
    groups = ", ".join(f"{{ kind: KIND_GPU count: 1 gpus: [ {gpu} ] profile: [ {profiles} ] }}" for gpu in gpus)
    lines = [f"name: {quote(name)}", 'platform: "tensorrt_plan"', "max_batch_size: 0"]
    lines += [f"input [ {tensor(info)} ]" for info in engine.inputs]
    lines += [f"output [ {tensor(info)} ]" for info in engine.outputs]
    lines += [f"instance_group [ {groups} ]", "optimization { cuda { graphs: true } }"]
    return "\n".join(lines) + "\n"


def parse_devices(text: str) -> list[int]:
    """CUDA device numbers. Raises UserError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise UserError(f"--gpus {text!r} is not a list of CUDA device numbers, e.g. 0,1 (empty for the CPU)")
    return [int(part) for part in parts]


def serve_command(out: Path) -> str:
    """On loopback, and with no way to load other models from outside."""
    return (
        f"tritonserver --model-repository={out} --model-control-mode=none --http-address=127.0.0.1 "
        "--grpc-address=127.0.0.1 --metrics-address=127.0.0.1"
    )
