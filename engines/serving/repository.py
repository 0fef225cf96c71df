"""Writes a Triton model repository for a bundle: one Python-backend model over `engines.load`, for every size.

Each instance of the model holds one copy of the weights and serves all resolutions. Its config.pbtxt (inputs, outputs,
instances, queue, parameters) is protobuf's text format.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from distill.common.errors import UserError
from distill.common.files import replacing, sha256_file
from distill.models.conditioning import conditioning_named
from engines.bundle import MANIFEST, Manifest, read_manifest
from engines.integrity import verify_bundle
from engines.serving.options import Serving
from engines.serving.placement import Placement, choose_placement, parse_devices, served_sizes
from engines.serving.request import defaults

MODEL_SOURCE = Path(__file__).with_name("model.py")
MODEL = "slimxl"
SIGNATURE = "# written by slimxl, which replaces this folder when it writes the repository again"
"""First line of config.pbtxt. A model without it is somebody else's."""
WRITTEN = ("config.pbtxt", "1/model.py")
"""The files of a model, beside plans."""
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
"""Name, type, optional; each of shape [1, 1], where the first dimension is Triton's batch."""
OUTPUTS = (
    ("image", "TYPE_UINT8", "[ -1, -1, -1, 3 ]"),
    ("png", "TYPE_STRING", "[ -1 ]"),
    ("png_base64", "TYPE_STRING", "[ -1 ]"),
    ("timings_ms", "TYPE_FP32", "[ 3 ]"),
    ("batch", "TYPE_INT32", "[ 1 ]"),
    ("step", "TYPE_INT32", "[ 1 ]"),
)
"""`image` (1, images, height, width, 3); `timings_ms` are text, denoising, decoding; `batch` counts the pictures that the
UNet drew at once; `step` counts up in decoupled mode."""
LONGEST_WAIT_SECONDS = 300
"""Triton refuses a request that has waited so long. A request may ask for less (Triton's request parameter `timeout`)."""


def write_repository(bundle: Path, out: Path, serving: Serving) -> None:
    """Writes the repository, whole or not at all.

    Raises UserError, before anything is written, for a damaged bundle and for an `out` that slimxl did not write.
    """
    out = out.resolve()
    require_our_repository(out)
    manifest = read_manifest(bundle)
    if faults := verify_bundle(bundle):
        raise UserError(faults[0])
    conditioning_named(manifest.source.pipeline).require_drawing_from_text(bundle)
    place = choose_placement(manifest, serving.flavor, parse_devices(serving.gpus))
    text = model_config(bundle.resolve(), manifest, place, serving)
    with replacing(out) as folder:
        (folder / MODEL / "1").mkdir(parents=True)
        (folder / MODEL / "config.pbtxt").write_text(text, encoding="utf-8")
        shutil.copyfile(MODEL_SOURCE, folder / MODEL / "1" / "model.py")


def require_our_repository(out: Path) -> None:
    """Raises UserError for an `out` that cannot be replaced as a whole, or that holds anything slimxl did not write."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; pass a folder for --out")
    if out.is_mount() or out == Path.cwd():
        raise UserError(
            f"{out} is a mount point or the working directory, which cannot be replaced; pass a folder inside it for --out"
        )
    for path in sorted(out.rglob("*")) if out.is_dir() else []:
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        model, *inside = path.relative_to(out).parts
        is_written = "/".join(inside) in WRITTEN or (inside[:1] == ["1"] and path.suffix == ".plan")
        if not is_written or not is_ours(out / model / "config.pbtxt"):
            raise UserError(
                f"{out} holds {path.relative_to(out)}, which slimxl did not write and would remove; choose a folder of its "
                "own for --out (tritonserver takes several --model-repository)"
            )


def is_ours(config: Path) -> bool:
    """Whether slimxl wrote a model's config.pbtxt."""
    return config.is_file() and config.read_text(encoding="utf-8", errors="replace").startswith(SIGNATURE)


def model_config(bundle: Path, manifest: Manifest, place: Placement, serving: Serving) -> str:
    """The whole file. The response cache stays off: the same prompt is rarely asked twice.

    Triton's batcher hands over the requests that wait, without waiting for more; the model draws together what is alike.
    """
    sizes, max_images = served_sizes(manifest, place)
    own = defaults(manifest.source.sampling)
    lines = [SIGNATURE, f"name: {quote(MODEL)}", 'backend: "python"', f"max_batch_size: {max_images}"]
    for name, kind, optional in INPUTS:
        tail = " optional: true" if optional else ""
        lines.append(f"input [ {{ name: {quote(name)} data_type: {kind} dims: [ 1 ]{tail} }} ]")
    lines += [f"output [ {{ name: {quote(name)} data_type: {kind} dims: {dims} }} ]" for name, kind, dims in OUTPUTS]
    lines.append(_instances(place.gpus, serving.instances))
    parameters = {
        "bundle": str(bundle),
        "manifest_sha256": sha256_file(bundle / MANIFEST),
        "source": manifest.source.name,
        "flavor": place.flavor,
        "sizes": ",".join(sizes),
        "steps": str(own["steps"]),
        "guidance": str(own["guidance"]),
        "warm_up": str(serving.warm_up).lower(),
    }
    if serving.execution_env:
        parameters["EXECUTION_ENV_PATH"] = str(serving.execution_env.resolve())
    if serving.runtime_cache:
        parameters["runtime_cache"] = str(serving.runtime_cache.resolve())
    lines += [
        f"parameters {{ key: {quote(key)} value {{ string_value: {quote(value)} }} }}"
        for key, value in parameters.items()
    ]
    wait = f"default_timeout_microseconds: {LONGEST_WAIT_SECONDS * 1_000_000} allow_timeout_override: true"
    policy = f"default_queue_policy {{ max_queue_size: {serving.queue} {wait} }}" if serving.queue else ""
    lines.append(f"dynamic_batching {{ {policy} }}")
    if serving.decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    lines.append("response_cache { enable: false }")
    return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    """A string of protobuf's text format."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _instances(gpus: tuple[int, ...], count: int) -> str:
    if not gpus:
        return f"instance_group [ {{ kind: KIND_CPU count: {count} }} ]"
    groups = ", ".join(f"{{ kind: KIND_GPU count: {count} gpus: [ {gpu} ] }}" for gpu in gpus)
    return f"instance_group [ {groups} ]"
