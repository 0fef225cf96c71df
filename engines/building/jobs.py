"""The jobs of a build command: one for each engine, with its content key, file name, and expected memory and time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.metadata import version

from distill.common.errors import UserError, require_least
from distill.common.files import sha256_json, size_text
from distill.models.resolution import Resolution, parse_resolutions
from engines.building.layouts import DEFAULT_LAYOUTS, make_profiles
from engines.bundle import Options, Profile
from engines.choices import Guidance, Layout
from engines.flavors import Flavor, find_flavor
from engines.gpus import Target, require_arithmetic, resolve_targets
from engines.onnx_folder import OPTIONAL, OnnxComponent, OnnxFolder
from export.components import GUIDED, TEXT_ENCODERS
from export.folder import check_files

ENGINE_NAME = re.compile(
    r"[a-z_0-9]+_(\d+x\d+|\d+sizes-[a-z-]+)_b\d+(-\d+)*_.+_(onnxruntime_[0-9a-f]{8}|tensorrt(-rtx)?-.+_[0-9a-f]{8}\.plan)"
)
"""Of the names that `Job.path` gives, and of no other: a file or folder called so in a bundle was built by slimxl."""
BUILDER_BYTES = 2_200_000_000
"""Of TensorRT in the host: with its library of kernels the process held 2061 MiB before any weights (log in TensorRT-LLM
#538). NVIDIA states two copies of the weights, the network's and the engine's, and temporary ones for what is fused: the
estimate counts three, whatever the number of profiles."""
KERNELS_BYTES = 600_000_000
"""And on the GPU 574 MiB, by the same log; the weights come once more."""
RECIPE_VERSION = 2
"""Part of every key. Raise it when the same inputs should give another plan."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine to build. `batches` are those asked for, `path` is relative to the bundle."""

    component: OnnxComponent
    flavor: str
    flavor_version: str
    layout: Layout
    guidance: Guidance | None
    target: Target
    profiles: list[Profile]
    batches: list[int]
    options: Options = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Hash of everything the engine depends on; equal keys are equal engines."""
        return sha256_json(
            {
                "recipe": RECIPE_VERSION,
                "component": self.component.name,
                "onnx": self.component.onnx_sha256,
                "weights": self.component.weights_sha256,
                "outputs": [tensor.name for tensor in self.component.needed_outputs],
                "flavor": self.flavor,
                "version": self.flavor_version if self.flavor != "onnxruntime" else "any",
                "layout": self.layout,
                "compute_capabilities": self.target.compute_capabilities,
                "profiles": [profile.model_dump() for profile in self.profiles],
                "options": self.options,
            }
        )

    @property
    def resolutions(self) -> list[str]:
        return list(dict.fromkeys(text for profile in self.profiles for text in profile.resolutions))

    @property
    def path(self) -> str:
        """A name that says what the file is. With the first digits of the key two contents never share a name."""
        sizes = self.resolutions[0] if len(self.resolutions) == 1 else f"{len(self.resolutions)}sizes-{self.layout}"
        batches = "b" + "-".join(map(str, self.batches))
        version = f"{self.flavor}-{self.flavor_version}" if self.flavor != "onnxruntime" else self.flavor
        name = f"{self.component.name}_{sizes}_{batches}_{self.target.label}_{version}_{self.key[:8]}"
        return f"{self.component.name}/{name}" + ("" if self.flavor == "onnxruntime" else ".plan")

    @property
    def label(self) -> str:
        return f"{self.component.name} {self.resolutions[0] if len(self.resolutions) == 1 else self.layout}"

    @property
    def memory_bytes(self) -> int:
        """An upper estimate of the builder's peak memory in the host.

        TensorRT-RTX 1.7 held 2.8 to 2.9 times the weights for one profile and 0.055 to 0.09 times more for each further
        one, on UNets of 1.5, 2.7 and 5.1 GB; 0.7 GB are the library and the graph.
        """
        if self.flavor == "onnxruntime":
            return int(300e6 + 1.5 * self.component.weights_bytes)
        if self.flavor == "tensorrt":  # not measured here: see BUILDER_BYTES
            return int(BUILDER_BYTES + 3 * self.component.weights_bytes)
        return int(700e6 + self.component.weights_bytes * (2.95 + 0.095 * (len(self.profiles) - 1)))

    @property
    def vram_bytes(self) -> int:
        """The least that TensorRT's builder takes of the GPU; it passes over kernels that would need more. 0 for runtimes
        that build without one."""
        return int(KERNELS_BYTES + self.component.weights_bytes) if self.flavor == "tensorrt" else 0

    @property
    def disk_bytes(self) -> int:
        """An upper estimate of the plan's size. An ONNX Runtime engine is a graph and a copy of the weights."""
        if self.flavor == "onnxruntime":
            return int(10e6 + self.component.weights_bytes)
        return int(50e6 + self.component.weights_bytes * (1.02 + 0.02 * len(self.profiles)))

    @property
    def cost_seconds(self) -> float:
        """About how long it takes on two idle cores: it grows with profiles times nodes, and with profiles times weights.

        TensorRT-RTX 1.7 took 60, 157 and 299 s for nine profiles of the three full-size UNets, and 33, 67 and 154 s for
        the mini ones, which have as many nodes and hardly any weights.
        """
        weights_gb = self.component.weights_bytes / 1e9
        if self.flavor == "onnxruntime":
            return 1 + weights_gb
        return 1 + (0.0035 * self.component.node_count + 3 * weights_gb) * (len(self.profiles) + 0.3)


def list_jobs(
    folder: OnnxFolder,
    *,
    gpus: list[str],
    flavor: str,
    layout: Layout | None = None,
    resolutions: str = "all",
    batches: list[int] | None = None,
    guidance: Guidance = "always",
    components: list[str] | None = None,
    options: Options | None = None,
) -> list[Job]:
    """A job for every engine the command asks for, in the order they are built. Raises UserError for what is impossible."""
    backend: Flavor = find_flavor(flavor)
    targets = resolve_targets(gpus, flavor, backend.targets)
    chosen = list(parse_resolutions(resolutions, folder.resolutions))
    if strange := [one for one in chosen if one not in folder.resolutions]:
        known = ", ".join(map(str, folder.resolutions))
        raise UserError(f"resolution {strange[0]} is not one of this model's: {known}, or all")
    wanted_batches = sorted(set(batches or [1]))
    require_least(1, batches=wanted_batches[0])
    if flavor == "onnxruntime" and layout not in (None, "ranged"):
        raise UserError(f"flavor onnxruntime has one engine for all resolutions: layout {layout} is for TensorRT")
    if folder.is_static:
        if layout not in (None, "per-resolution") or flavor == "onnxruntime":
            asked = f"flavor {flavor}" if flavor == "onnxruntime" else f"layout {layout}"
            raise UserError(
                f"{folder.root} holds a static graph for each resolution, {asked} needs one graph for all: export with "
                "--resolutions dynamic, or build with --layout per-resolution for TensorRT"
            )
        layout = "per-resolution"
    layout = layout or DEFAULT_LAYOUTS[flavor]
    installed = backend.version()
    for target in targets:
        backend.check_build(target.compute_capabilities, options or {})
    jobs = []
    names = _components(folder, components)
    for name in names:
        require_arithmetic(folder.components[name].weights_precision, targets)
    check_files(folder.root, names, beside=True)
    for name in names:
        component = folder.components[name]
        sizes, spread = chosen, layout
        if name in TEXT_ENCODERS:  # the same engine for every command, so that it is built once
            sizes, spread = folder.resolutions, "per-resolution" if folder.is_static else "ranged"
        for profiles in make_profiles(component, spread, sizes, wanted_batches, guidance):
            graph = component.at(Resolution.parse(profiles[0].resolutions[0]))
            for target in targets:
                jobs.append(
                    Job(
                        component=graph,
                        flavor=flavor,
                        flavor_version=installed,
                        layout=spread,
                        guidance=guidance if name in GUIDED else None,
                        target=target,
                        profiles=profiles,
                        batches=wanted_batches,
                        options=options or {},
                    )
                )
    return jobs


def _components(folder: OnnxFolder, chosen: list[str] | None) -> list[str]:
    missing = [name for name in chosen or [] if name not in folder.components]
    if missing:
        raise UserError(f"{folder.root} has no component {missing[0]!r}: it has {', '.join(folder.components)}")
    return [name for name in folder.components if (name in chosen if chosen else name not in OPTIONAL)]


def tool_versions(job: Job) -> dict[str, str]:
    """The versions that build the engine, for the manifest."""
    return {job.flavor: job.flavor_version} | {name: version(name) for name in ("onnx", "polygraphy")}


def require_memory(jobs: list[Job], budget_bytes: int) -> None:
    """Raises UserError for the first job that needs more memory."""
    for job in jobs:
        if job.memory_bytes > budget_bytes:
            leaner = "" if len(job.profiles) == 1 else "; --layout ranged needs less"
            raise UserError(
                f"building {job.label} with {len(job.profiles)} profile(s) needs about "
                f"{size_text(job.memory_bytes)} of memory for {size_text(job.component.weights_bytes)} of weights, "
                f"{size_text(budget_bytes)} may be used{leaner}; free memory, raise --memory-gb, or build on a larger "
                "machine"
            )


def require_vram(jobs: list[Job], free_bytes: int) -> None:
    """Raises UserError for the first job that needs more of the GPU's memory."""
    for job in jobs:
        if job.vram_bytes > free_bytes:
            raise UserError(
                f"building {job.label} takes {size_text(job.vram_bytes)} of the GPU's memory at the least, "
                f"{size_text(free_bytes)} are free: end what else runs there, or build with --flavor tensorrt-rtx, which "
                "needs no GPU"
            )
