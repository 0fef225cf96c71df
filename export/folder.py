"""The ONNX folder: which components are written, when one is up to date, and what is recorded about each.

    unet/ vae_decoder/ vae_encoder/ text_encoder/ text_encoder_2/    model.onnx(.data), config.json, export.json
    tokenizer/ tokenizer_2/ scheduler/ model_index.json              copied from the checkpoint
    slimxl.json                                                      what the folder was made from, and how

Each component is written under a temporary name, checked, and renamed: a folder with its final name is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.architectures import Resolution
from distill.errors import UserError, unknown
from distill.files import read_json, replacing, require_free_disk, sha256_file, sha256_json, write_json
from distill.sources import checkpoint_hash, component_weights, file_hashes, find_architecture_of, read_config
from export.checkpoint import prepare
from export.components import COMPONENTS, FLOAT_DTYPES, Config, unet_config, vae_scale_factor

SCHEMA = 1
OPSETS = (23, 18, 19, 20, 21, 22)
"""23 keeps Attention and GroupNormalization whole; below, they are spelled out."""
PIPELINE_PARTS = ("tokenizer", "tokenizer_2", "scheduler")
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "slimxl")
GRAPH_MODULES = ("components", "wrappers", "trace", "opening", "weights", "graph", "write")
"""What decides the bytes of a graph: where one of these has changed, nothing is up to date."""
CHECK_BELOW_BYTES = 500_000_000
"""Components up to this size are compared with torch before they get their name; larger ones by `verify`."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a checkpoint is exported. `resolutions` empty means one graph with open dimensions."""

    precision: str = "fp16"
    opset: int = OPSETS[0]
    components: tuple[str, ...] = tuple(COMPONENTS)
    resolutions: tuple[Resolution, ...] = ()
    batch: int = 2
    vae: str = "stock"
    vae_precision: str = "auto"
    loras: tuple[tuple[Path, float], ...] = ()
    reuse: tuple[Path, ...] = ()
    check: bool = True

    def __post_init__(self) -> None:
        for name in self.components:
            if name not in COMPONENTS:
                raise unknown("component", name, COMPONENTS)
        if self.precision not in FLOAT_DTYPES:
            raise unknown("precision", self.precision, FLOAT_DTYPES)
        if self.vae_precision not in ("auto", *FLOAT_DTYPES):
            raise unknown("VAE precision", self.vae_precision, ("auto", *FLOAT_DTYPES))
        if self.opset not in OPSETS:
            raise UserError(
                f"opset {self.opset} is not supported: allowed are {', '.join(map(str, sorted(OPSETS)))} (23 keeps "
                "Attention whole; 18 is the fallback for older runtimes)"
            )


@dataclass(frozen=True)
class Job:
    """One component to be written: its config.json and everything that decides its bytes."""

    name: str
    checkpoint: Path
    config: dict[str, Any]
    precision: str
    options: ExportOptions
    base: Resolution
    source_sha256: dict[str, str]
    key: str


def library_versions() -> dict[str, str]:
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except Exception:  # not installed as a distribution: run from a source tree
            versions[library] = "source tree"
    return versions


def component_precision(name: str, options: ExportOptions, vae_config: Config) -> str:
    """SDXL's stock VAE overflows in fp16, so it stays in fp32 whatever the rest is, unless told otherwise. Any other
    VAE follows the rest where its config does not say `force_upcast`."""
    if not name.startswith("vae"):
        return options.precision
    if options.vae_precision != "auto":
        return options.vae_precision
    return "fp32" if options.vae == "stock" or vae_config.get("force_upcast") else options.precision


def make_config(checkpoint: Path, name: str) -> dict[str, Any]:
    """config.json of an exported component."""
    config = read_config(checkpoint, COMPONENTS[name].source)
    if name != "unet":
        return config
    vae, text = read_config(checkpoint, "vae"), read_config(checkpoint, "text_encoder")
    return unet_config(config, vae_config=vae, text_config=text)


def _weights_hashes(checkpoint: Path, component: str, hashes: dict[str, str]) -> dict[str, str]:
    """Of `hashes`, those of a component's weights, by file name."""
    return {path.name: hashes[f"{component}/{path.name}"] for path in component_weights(checkpoint / component)}


def make_job(checkpoint: Path, name: str, options: ExportOptions, hashes: dict[str, str]) -> Job:
    """`hashes` as `distill.sources.file_hashes` tells them: a checkpoint's gigabytes are read for them once."""
    config = make_config(checkpoint, name)
    precision = component_precision(name, options, read_config(checkpoint, "vae"))
    for resolution in options.resolutions:  # every size is checked before anything is written
        COMPONENTS[name].inputs(config, resolution, options.batch, precision)
    base = find_architecture_of(checkpoint).family.resolutions[0]
    weights = _weights_hashes(checkpoint, COMPONENTS[name].source, hashes)
    inputs = {
        "schema": SCHEMA,
        "code": [sha256_file(Path(__file__).parent / f"{module}.py") for module in GRAPH_MODULES],
        "component": name,
        "config": config,
        "weights": list(weights.values()),
        "precision": precision,
        "opset": options.opset,
        "resolutions": [str(resolution) for resolution in options.resolutions],
        "batch": options.batch if options.resolutions else None,
        "versions": library_versions(),
    }
    return Job(name, checkpoint, config, precision, options, base, weights, sha256_json(inputs))


def is_current(folder: Path, key: str) -> bool:
    """True where `folder` holds a finished component made from the same inputs."""
    about = folder / "export.json"
    return about.is_file() and read_json(about).get("key") == key and (folder / "model.onnx").is_file()


def _refuse_strangers(prepared: Path, out: Path, options: ExportOptions, hashes: dict[str, str]) -> None:
    """Raises UserError where `out` holds a component that is not to be written now and was made from something else."""
    for name in COMPONENTS:
        if name in options.components or not (out / name).is_dir():
            continue
        if not is_current(out / name, make_job(prepared, name, options, hashes).key):
            raise UserError(
                f"{out} holds a {name} of another checkpoint, precision or version: one folder is one model; export "
                f"{name} too (--components), or choose another --out"
            )


def _check_free_disk(jobs: Sequence[Job], out: Path) -> None:
    needed = 0
    for job in jobs:
        stored = sum(path.stat().st_size for path in component_weights(job.checkpoint / COMPONENTS[job.name].source))
        needed += stored * 2 if job.precision == "fp32" else stored  # a checkpoint may be stored in half of fp32
    require_free_disk(out, needed + 50_000_000, f"an ONNX folder of {', '.join(job.name for job in jobs)}")


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    options: ExportOptions | None = None,
    source_name: str | None = None,
    workdir: Path = Path("out/models"),
    progress: Callable[[str], None] = print,
) -> None:
    """Writes the ONNX folder `out` of the diffusers folder `checkpoint`. Components that are up to date are kept.

    A checkpoint with another VAE or with LoRAs is made under `workdir` first. While components are written there is no
    slimxl.json, so that a folder that was left half new is not taken for a whole one.

    Raises UserError for bad input, and where an exported graph disagrees with torch.
    """
    options = options or ExportOptions()
    prepared = prepare(checkpoint, options.vae, options.loras, workdir)
    hashes = file_hashes(prepared)
    jobs = [make_job(prepared, name, options, hashes) for name in options.components]
    for part in PIPELINE_PARTS:
        if not (prepared / part).is_dir():
            raise UserError(f"{checkpoint} is no whole SDXL checkpoint: it has no {part}/")
    _refuse_strangers(prepared, out, options, hashes)
    stale = []
    for job in jobs:
        donors = [folder for folder in (out, *options.reuse) if is_current(folder / job.name, job.key)]
        if not donors:
            stale.append(job)
        elif donors[0] == out:
            progress(f"{job.name}: up to date")
        else:
            with replacing(out / job.name) as temporary:
                shutil.copytree(donors[0] / job.name, temporary)
            progress(f"{job.name}: taken from {donors[0]}")
    if stale:
        from export.weights import load_shapes
        from export.write import TORCH_DTYPES, write_component

        for source in sorted({COMPONENTS[job.name].source for job in stale}):
            load_shapes(prepared, source, TORCH_DTYPES[options.precision])  # what is missing is told before it begins
        _check_free_disk(stale, out)
        (out / "slimxl.json").unlink(missing_ok=True)
        for job in stale:
            write_component(job, out / job.name, progress)
    _copy_pipeline_parts(prepared, out)
    original_hash = sha256_json(hashes) if prepared == checkpoint else checkpoint_hash(checkpoint)
    origin = {"name": source_name or checkpoint.name, "sha256": original_hash}
    write_json(out / "slimxl.json", _about(prepared, origin, hashes, options))


def _about(prepared: Path, source: dict[str, str], hashes: dict[str, str], options: ExportOptions) -> dict[str, Any]:
    """slimxl.json. `source` is what was given, `hashes` of the checkpoint after the change of VAE and LoRAs."""
    vae_config = read_config(prepared, "vae")
    resolutions = options.resolutions or find_architecture_of(prepared).family.resolutions
    return {
        "schema": SCHEMA,
        "source": source,
        "exported_sha256": sha256_json(hashes),
        "precision": options.precision,
        "opset": options.opset,
        "shapes": [str(resolution) for resolution in options.resolutions] or "dynamic",
        "resolutions": [str(resolution) for resolution in resolutions],
        "vae": {
            "identity": options.vae,
            "class": vae_config.get("_class_name"),
            "precision": component_precision("vae_decoder", options, vae_config),
            "scaling_factor": vae_config.get("scaling_factor"),
            "pixels_per_latent": vae_scale_factor(vae_config),
            "sha256": list(_weights_hashes(prepared, "vae", hashes).values()),
        },
        "loras": [{"file": str(path), "sha256": sha256_file(path), "scale": scale} for path, scale in options.loras],
        "versions": library_versions(),
    }


def _copy_pipeline_parts(checkpoint: Path, out: Path) -> None:
    for part in PIPELINE_PARTS:
        with replacing(out / part) as temporary:
            shutil.copytree(checkpoint / part, temporary)
    with replacing(out / "model_index.json") as temporary:
        shutil.copyfile(checkpoint / "model_index.json", temporary)
