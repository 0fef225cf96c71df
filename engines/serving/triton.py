"""A bundle as a Triton model repository: one text-to-image model over `engines.load`, for every size of the bundle.

The model is a Python-backend model: it holds one copy of the weights per instance and serves all resolutions. For
teams that orchestrate themselves, the bundle's TensorRT plans can be offered as `tensorrt_plan` models as well.
Triton's config.pbtxt is text; it is written here from the manifest, so that shapes and types cannot disagree with it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from distill.common.errors import UserError
from distill.common.files import replacing, sha256_file
from engines.bundle import MANIFEST, Engine, Manifest, TensorInfo, read_manifest, verify_bundle
from engines.flavors import Flavor, find_flavor
from engines.gpus import gpu_of_device
from engines.pipeline import choose_flavor, select_engines
from engines.serving.triton_options import Serving

MODEL = "slimxl"
MODEL_SOURCE = Path(__file__).with_name("triton_model.py")
SIGNATURE = "# written by slimxl, which replaces this folder when it writes the repository again"
"""First line of every config.pbtxt: a model without it is somebody else's."""
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
the UNet drew at once; `step` counts up in decoupled mode."""
LONGEST_WAIT_SECONDS = 300
"""A request that has waited so long is refused; one may ask for less (Triton's request parameter `timeout`)."""


def write_repository(bundle: Path, out: Path, serving: Serving) -> list[str]:
    """Writes the repository, whole or not at all, and returns the names of its models.

    Raises UserError, before anything is written, for a damaged bundle, for an `out` that holds what slimxl did not write,
    and where `plans` is asked of a bundle that has none for Triton.
    """
    out = out.resolve()
    require_ours(out)
    manifest = read_manifest(bundle)
    faults = verify_bundle(bundle)
    if faults:
        raise UserError(faults[0])
    flavor, gpus = choose_place(manifest, serving.flavor, parse_devices(serving.gpus))
    plans = choose_plans(manifest, gpus or (0,)) if serving.plans else []
    names = []
    with replacing(out) as folder:
        (folder / MODEL / "1").mkdir(parents=True)
        text = model_config(bundle.resolve(), manifest, flavor, gpus, serving)
        (folder / MODEL / "config.pbtxt").write_text(text, encoding="utf-8")
        shutil.copyfile(MODEL_SOURCE, folder / MODEL / "1" / "model.py")
        names.append(MODEL)
        for engine in plans:
            name = Path(engine.files[0].path).stem.replace(".", "-")
            (folder / name / "1").mkdir(parents=True)
            text = plan_config(name, engine, gpus or (0,))
            (folder / name / "config.pbtxt").write_text(text, encoding="utf-8")
            shutil.copyfile(bundle / engine.files[0].path, folder / name / "1" / "model.plan")
            names.append(name)
    return names


def require_ours(out: Path) -> None:
    """Raises UserError for an `out` that cannot be replaced as a whole, and for one that holds anything but models that
    slimxl wrote."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; pass a folder for --out")
    if out.is_mount() or out == Path.cwd():
        raise UserError(
            f"{out} is a mount point or the working directory, which cannot be replaced; pass a folder inside it for --out"
        )
    for path in sorted(out.iterdir()) if out.is_dir() else []:
        config = path / "config.pbtxt"
        if not config.is_file() or not config.read_text(encoding="utf-8", errors="replace").startswith(SIGNATURE):
            raise UserError(
                f"{out} holds {path.name}, which slimxl did not write and would remove; choose a folder of its own for "
                "--out (tritonserver takes several --model-repository)"
            )


def choose_plans(manifest: Manifest, gpus: tuple[int, ...]) -> list[Engine]:
    """The plans for Triton's tensorrt backend: those in layout `ranged` that fit the GPUs, where these are here.

    That backend makes a context with activation memory of its own for each profile, nine times the memory for exact
    sizes. And a single plan that cannot be opened ends the whole server, so it is asked for plans of one kind. Raises
    UserError where there are none or several kinds, or where plans have no weights.
    """
    found = [gpu_of_device(f"cuda:{gpu}") for gpu in gpus]
    plans = [
        engine
        for engine in manifest.engines
        if engine.flavor == "tensorrt"
        and engine.layout == "ranged"
        and all(engine.serves(gpu[1]) for gpu in found if gpu)
    ]
    if "unet" not in {engine.component for engine in plans}:
        here = f" for {', '.join(gpu[0] for gpu in found if gpu)}" if any(found) else ""
        raise UserError(
            f"the bundle has no tensorrt plans in layout ranged{here}, and Triton's tensorrt backend takes activation "
            "memory for each profile; build them with --flavor tensorrt --layout ranged on the GPU that serves, with the "
            "TensorRT of the Triton container"
        )
    versions = sorted({engine.flavor_version for engine in plans})
    capabilities = sorted({" and ".join(engine.compute_capabilities) for engine in plans})
    for kinds, what in ((versions, "TensorRT"), (capabilities, "compute capability")):
        if len(kinds) > 1:
            raise UserError(
                f"the bundle has plans for {what} {', '.join(kinds)}, and one that the server cannot open ends it; build a "
                "bundle with one kind, or write the repository on the GPU that serves"
            )
    if any(engine.options.get("strip") for engine in plans):
        raise UserError("Triton's tensorrt backend opens no plans without weights; build them without --strip")
    return plans


def backend_flags(manifest: Manifest, serving: Serving) -> list[str]:
    """What tritonserver must be told to open the plans: those that bring their runtime along run its code."""
    brings = any(e.flavor == "tensorrt" and e.options.get("version_compatible") for e in manifest.engines)
    return ["--backend-config=tensorrt,version-compatible=true"] if serving.plans and brings else []


def choose_place(manifest: Manifest, flavor: str | None, gpus: tuple[int, ...] | None) -> tuple[str, tuple[int, ...]]:
    """The flavor that is served, and the GPUs it is served on: () is the CPU; None asks for every GPU here that runs the
    bundle, where the flavor runs on one. Raises UserError where the two do not go together."""
    if flavor is None and gpus == ():
        flavor = "onnxruntime"
    device = f"cuda:{gpus[0]}" if gpus else None
    backend = choose_flavor(manifest, flavor, device)
    if gpus is None:
        gpus = fitting_gpus(manifest, backend) if backend.default_device().startswith("cuda") else ()
    if not gpus and backend.name != "onnxruntime":
        raise UserError(f"{backend.name} engines run on a GPU: name it with --gpus 0, or pass --flavor onnxruntime")
    return backend.name, gpus


def require_runs_here(manifest: Manifest, flavor: str, gpus: tuple[int, ...]) -> None:
    """Raises UserError where the bundle has no engines for one of these GPUs, or for the CPU: Triton would say so once it
    loads the model."""
    for device in devices_of(gpus):
        select_engines(manifest, find_flavor(flavor), device)


def devices_of(gpus: tuple[int, ...]) -> list[str]:
    """As torch names them."""
    return [f"cuda:{gpu}" for gpu in gpus] or ["cpu"]


def fitting_gpus(manifest: Manifest, backend: Flavor) -> tuple[int, ...]:
    """Those of this machine that run the bundle's engines. Raises UserError, with a reason, where there are only others."""
    import torch

    fitting, refusal = [], None
    for gpu in range(torch.cuda.device_count()):
        try:
            select_engines(manifest, backend, f"cuda:{gpu}")
            fitting.append(gpu)
        except UserError as error:
            refusal = error
    if refusal and not fitting:
        raise refusal
    return tuple(fitting)


def served(manifest: Manifest, flavor: str, gpus: tuple[int, ...]) -> tuple[list[str], int]:
    """The sizes and the most pictures at once that every instance draws: by the UNets that `engines.load` opens there, or by
    all that the bundle has of the flavor where the GPUs here run none, for the server may be elsewhere. Raises UserError
    where that has none, and where the CPU runs none."""
    try:
        loaded = [select_engines(manifest, find_flavor(flavor), device)["unet"] for device in devices_of(gpus)]
    except UserError:
        loaded = [[engine for engine in manifest.engines if engine.component == "unet" and engine.flavor == flavor]]
        if not gpus or not loaded[0]:
            raise
    sizes = [[size for engine in engines for size in engine.resolutions] for engines in loaded]
    common = [size for size in dict.fromkeys(sizes[0]) if all(size in others for others in sizes)]
    return common, min(max(batch for engine in engines for batch in engine.batches) for engines in loaded)


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
    sizes, most = served(manifest, flavor, gpus)
    lines = [SIGNATURE, f"name: {quote(MODEL)}", 'backend: "python"', f"max_batch_size: {most}"]
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
        "sizes": ",".join(sizes),
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
    lines = [SIGNATURE, f"name: {quote(name)}", 'platform: "tensorrt_plan"', "max_batch_size: 0"]
    lines += [f"input [ {tensor(info)} ]" for info in engine.inputs]
    lines += [f"output [ {tensor(info)} ]" for info in engine.outputs]
    lines.append(f"instance_group [ {groups} ]")
    return "\n".join(lines) + "\n"


def parse_devices(text: str) -> tuple[int, ...] | None:
    """CUDA device numbers, () for `none`, None for `auto`. Raises UserError for anything else."""
    if text in ("auto", "none"):
        return None if text == "auto" else ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(
            f"--gpus {text!r} is not a list of CUDA device numbers, e.g. 0,1; auto and none are allowed too"
        )
    return tuple(dict.fromkeys(map(int, parts)))
