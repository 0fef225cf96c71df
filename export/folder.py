"""The ONNX folder: which components are written, when one is up to date, and what is recorded about each.

    unet/ vae_decoder/ vae_encoder/ text_encoder/ text_encoder_2/    model.onnx(.data), config.json, export.json
    tokenizer/ tokenizer_2/ scheduler/ model_index.json              copied from the checkpoint
    slimxl.json                                                      what the folder was made from, and how

Each component is written under a temporary name, checked, and renamed: a folder with its final name is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.architectures import Resolution
from distill.errors import UserError, unknown
from distill.files import read_json, replacing, require_free_disk, sha256_file, sha256_json, write_json
from distill.sources import checkpoint_hash, component_weights, find_architecture_of, read_config
from export.components import COMPONENTS, FLOAT_DTYPES, unet_config, vae_scale_factor

SCHEMA = 1
OPSETS = (23, 18, 19, 20, 21, 22)
"""23 keeps Attention and GroupNormalization whole; below, they are spelled out."""
PIPELINE_PARTS = ("tokenizer", "tokenizer_2", "scheduler")
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "slimxl")
GRAPH_MODULES = ("components", "wrappers", "trace", "opening", "graph", "write")
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
    loras: tuple[tuple[Path, float], ...] = ()
    reuse: tuple[Path, ...] = ()
    check: bool = True

    def __post_init__(self) -> None:
        for name in self.components:
            if name not in COMPONENTS:
                raise unknown("component", name, COMPONENTS)
        if self.precision not in FLOAT_DTYPES:
            raise unknown("precision", self.precision, FLOAT_DTYPES)
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
    key: str = field(default="")


def library_versions() -> dict[str, str]:
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except Exception:  # not installed as a distribution: run from a source tree
            versions[library] = "source tree"
    return versions


def component_precision(name: str, precision: str, vae: str) -> str:
    """SDXL's stock VAE overflows in fp16, so it stays in fp32 whatever the rest is."""
    return "fp32" if name.startswith("vae") and vae == "stock" else precision


def make_job(checkpoint: Path, name: str, options: ExportOptions) -> Job:
    component = COMPONENTS[name]
    config = read_config(checkpoint, component.source)
    vae_config = read_config(checkpoint, "vae")
    if name == "unet":
        text_config = read_config(checkpoint, "text_encoder")
        config = unet_config(config, vae_config=vae_config, text_config=text_config)
    precision = component_precision(name, options.precision, options.vae)
    base = find_architecture_of(checkpoint).family.resolutions[0]
    folder = checkpoint / component.source
    inputs = {
        "schema": SCHEMA,
        "code": [sha256_file(Path(__file__).parent / f"{module}.py") for module in GRAPH_MODULES],
        "component": name,
        "config": config,
        "weights": [sha256_file(path) for path in component_weights(folder)],
        "precision": precision,
        "opset": options.opset,
        "resolutions": [str(resolution) for resolution in options.resolutions],
        "batch": options.batch if options.resolutions else None,
        "versions": library_versions(),
    }
    return Job(name, checkpoint, config, precision, options, base, sha256_json(inputs))


def is_current(folder: Path, key: str) -> bool:
    """True where `folder` holds a finished component made from the same inputs."""
    about = folder / "export.json"
    return about.is_file() and read_json(about).get("key") == key and (folder / "model.onnx").is_file()


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
    progress: Callable[[str], None] = print,
) -> None:
    """Writes the ONNX folder `out` of the diffusers folder `checkpoint`. Components that are up to date are kept.

    Raises UserError for bad input, and RuntimeError where an exported graph disagrees with torch.
    """
    options = options or ExportOptions()
    family = find_architecture_of(checkpoint).family
    for resolution in options.resolutions:
        for name in options.components:  # every size is checked before anything is written
            job_config = make_config(checkpoint, name)
            COMPONENTS[name].inputs(job_config, resolution, options.batch, "fp32")
    jobs = [make_job(checkpoint, name, options) for name in options.components]
    stale = [job for job in jobs if not is_current(out / job.name, job.key)]
    for job in [job for job in stale if any(is_current(folder / job.name, job.key) for folder in options.reuse)]:
        folder = next(folder for folder in options.reuse if is_current(folder / job.name, job.key))
        with replacing(out / job.name) as temporary:
            shutil.copytree(folder / job.name, temporary)
        progress(f"{job.name}: taken from {folder}")
        stale.remove(job)
    if stale:
        from export.write import write_component

        _check_free_disk(stale, out)
        for job in stale:
            write_component(job, out / job.name, progress)
    for job in jobs:
        if job not in stale:
            progress(f"{job.name}: up to date")
    _copy_pipeline_parts(checkpoint, out)
    vae_config = read_config(checkpoint, "vae")
    write_json(
        out / "slimxl.json",
        {
            "schema": SCHEMA,
            "source": {"name": source_name or checkpoint.name, "sha256": checkpoint_hash(checkpoint)},
            "precision": options.precision,
            "opset": options.opset,
            "shapes": [str(resolution) for resolution in options.resolutions] or "dynamic",
            "resolutions": [str(resolution) for resolution in options.resolutions or family.resolutions],
            "vae": {
                "identity": options.vae,
                "precision": component_precision("vae_decoder", options.precision, options.vae),
                "scaling_factor": vae_config.get("scaling_factor"),
                "scale_factor": vae_scale_factor(vae_config),
            },
            "loras": [
                {"sha256": sha256_file(path), "file": path.name, "scale": scale} for path, scale in options.loras
            ],
            "versions": library_versions(),
        },
    )


def make_config(checkpoint: Path, name: str) -> dict[str, Any]:
    """config.json of an exported component."""
    config = read_config(checkpoint, COMPONENTS[name].source)
    if name != "unet":
        return config
    vae, text = read_config(checkpoint, "vae"), read_config(checkpoint, "text_encoder")
    return unet_config(config, vae_config=vae, text_config=text)


def _copy_pipeline_parts(checkpoint: Path, out: Path) -> None:
    for part in PIPELINE_PARTS:
        if not (checkpoint / part).is_dir():
            raise UserError(f"{checkpoint} is no whole SDXL checkpoint: it has no {part}/")
        with replacing(out / part) as temporary:
            shutil.copytree(checkpoint / part, temporary)
    with replacing(out / "model_index.json") as temporary:
        shutil.copyfile(checkpoint / "model_index.json", temporary)
