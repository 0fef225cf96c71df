"""What is to be exported, and how: the options of a whole folder, and one component's job, with all that decides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.checkpoints.folder import find_family, network_folders, read_config
from distill.checkpoints.tensors import component_weights
from distill.common.errors import UserError, require_least, unknown
from distill.common.files import sha256_file, sha256_json
from distill.models.conditioning import Conditioning, Config
from distill.models.networks import CONTROLNETS
from distill.models.resolution import Resolution
from export.components import COMPONENTS, FLOAT_DTYPES, GUIDED, unet_config

SCHEMA = 1
OPSETS = (23, 18, 19, 20, 21, 22)
"""23 keeps Attention and GroupNormalization whole; below, they are spelled out."""
GUIDANCE = ("always", "never")
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "slimxl")
GRAPH_MODULES = (
    "components",
    *(f"graph/{name}" for name in ("wrappers", "weights", "trace", "opening", "passes")),
    "write",
)
"""What decides the bytes of a graph: where one of these has changed, nothing is up to date."""
CHECK_BELOW_BYTES = 500_000_000
"""Components up to this size are compared with torch before they get their name; larger ones by `verify`."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a checkpoint is exported. `components` None means all that it has. `resolutions` empty means one graph with
    open dimensions, for any batch; `batch`, in images, and `guidance` are of static graphs. `tokens` are the lengths of
    prompts that the UNet takes, beside its own. With `controlnets` the UNet takes residuals, and each is a component."""

    precision: str = "fp16"
    opset: int = OPSETS[0]
    components: tuple[str, ...] | None = None
    resolutions: tuple[Resolution, ...] = ()
    batch: int = 1
    guidance: str = "always"
    tokens: tuple[int, ...] = ()
    vae: str = "stock"
    vae_precision: str = "auto"
    loras: tuple[tuple[Path, float], ...] = ()
    controlnets: tuple[str, ...] = ()
    reuse: tuple[Path, ...] = ()
    check: bool = True

    def __post_init__(self) -> None:
        if self.components == ():
            raise UserError(f"no component is named: known are {', '.join(COMPONENTS)}")
        for name in self.components or ():
            if name not in COMPONENTS:
                raise unknown("component", name, COMPONENTS)
        if self.precision not in FLOAT_DTYPES:
            raise unknown("precision", self.precision, FLOAT_DTYPES)
        if self.vae_precision not in ("auto", *FLOAT_DTYPES):
            raise unknown("VAE precision", self.vae_precision, ("auto", *FLOAT_DTYPES))
        if self.guidance not in GUIDANCE:
            raise unknown("guidance", self.guidance, GUIDANCE)
        require_least(1, batch=self.batch)
        if not self.resolutions and (self.batch, self.guidance) != (1, "always"):
            raise UserError(
                "--batch and --guidance are of static graphs, an open one takes any: give --resolutions too"
            )
        if self.resolutions and self.tokens:
            raise UserError("--tokens opens a dimension, static graphs have none: leave --resolutions out")
        for folder in self.reuse:
            if not folder.is_dir():
                raise UserError(f"--reuse {folder} is no folder")
        if self.opset not in OPSETS:
            raise UserError(
                f"opset {self.opset} is not supported: allowed are {', '.join(map(str, sorted(OPSETS)))} (23 keeps "
                "Attention whole; 18 is the fallback for older runtimes)"
            )

    def rows(self, component: str) -> int:
        """What `batch` images are to a component: under guidance the UNet sees each twice."""
        return 2 * self.batch if component in GUIDED and self.guidance == "always" else self.batch


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


def component_precision(name: str, options: ExportOptions, kind: Conditioning, vae_config: Config) -> str:
    """A VAE that overflows in fp16, as SDXL's own, stays in fp32 whatever the rest is, unless told otherwise. Another one
    on such a model follows the rest where its config does not say `force_upcast`."""
    if COMPONENTS[name].source != "vae":
        return options.precision
    if options.vae_precision != "auto":
        return options.vae_precision
    overflows = kind.vae_overflows and (options.vae == "stock" or vae_config.get("force_upcast"))
    return "fp32" if overflows else options.precision


def chosen_components(checkpoint: Path, options: ExportOptions) -> tuple[str, ...]:
    """What is to be exported. Raises UserError for a component that the checkpoint's kind of pipeline has not."""
    folders = (*network_folders(checkpoint), *CONTROLNETS[: len(options.controlnets)])
    present = tuple(name for name, component in COMPONENTS.items() if component.source in folders)
    for name in options.components or ():
        if name not in present:
            raise UserError(f"{checkpoint.name} has no {name}; it has {', '.join(present)}")
    return options.components or present


def make_config(checkpoint: Path, name: str, tokens: Sequence[int] = (), *, controlled: bool = False) -> dict[str, Any]:
    """config.json of an exported component; `tokens` and `controlled` as `unet_config` takes them."""
    config = read_config(checkpoint, COMPONENTS[name].source)
    if name not in GUIDED:
        return config
    vae, text = (read_config(checkpoint, part) for part in ("vae", find_family(checkpoint).conditioning.encoders[0]))
    controlled = controlled and name == "unet"
    return unet_config(config, vae_config=vae, text_config=text, tokens=tokens, controlled=controlled)


def weights_hashes(checkpoint: Path, component: str, hashes: Mapping[str, str], precision: str) -> dict[str, str]:
    """Of `hashes`, those of the weights that are read for a component in `precision`, by file name."""
    files = component_weights(checkpoint / component, precision)
    return {path.name: hashes[f"{component}/{path.name}"] for path in files}


def make_job(checkpoint: Path, name: str, options: ExportOptions, hashes: Mapping[str, str]) -> Job:
    """`hashes` as `distill.checkpoints.folder.file_hashes` tells them: a checkpoint's gigabytes are read for them once."""
    config = make_config(checkpoint, name, options.tokens, controlled=bool(options.controlnets))
    family = find_family(checkpoint)
    precision = component_precision(name, options, family.conditioning, read_config(checkpoint, "vae"))
    rows = options.rows(name)
    for resolution in options.resolutions:  # every size is checked before anything is written
        COMPONENTS[name].inputs(config, resolution, rows, precision)
    weights = weights_hashes(checkpoint, COMPONENTS[name].source, hashes, precision)
    inputs = {
        "schema": SCHEMA,
        "code": [sha256_file(Path(__file__).parent / f"{module}.py") for module in GRAPH_MODULES],
        "component": name,
        "config": config,
        "weights": list(weights.values()),
        "precision": precision,
        "opset": options.opset,
        "resolutions": [str(resolution) for resolution in options.resolutions],
        "batch": rows if options.resolutions else None,
        "versions": library_versions(),
    }
    return Job(name, checkpoint, config, precision, options, family.resolutions[0], weights, sha256_json(inputs))
