"""The bundle's manifest: its schema, and how it is read and written.

A manifest is untrusted text: `read_manifest` checks all of it against the schema. The files that it names are checked by
`integrity.py`.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.checkpoints.sampling import Sampling
from distill.common.errors import UserError
from distill.common.files import write_json
from distill.common.validation import first_fault
from distill.models.conditioning import conditioning_named
from engines.choices import FlavorName, Guidance, Layout, Precision
from engines.gpus import GPUS, version_tuple
from export.components import COMPONENTS, TEXT_ENCODERS

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST_BYTES = 16 << 20


def _inside(path: str) -> str:
    """Returns a path that stays in the bundle on every system: relative, with forward slashes, without "..". Raises
    ValueError for any other."""
    parts = PurePosixPath(path).parts
    climbs = PurePosixPath(path).is_absolute() or ".." in parts or PureWindowsPath(path).drive
    if climbs or "\\" in path or "\0" in path or not parts or str(PurePosixPath(*parts)) != path:
        raise ValueError(f"{path!r} is not a plain relative path inside the bundle")
    return path


def _known_component(name: str) -> str:
    if name not in COMPONENTS:
        raise ValueError(f"{name!r} is no component: known are {', '.join(COMPONENTS)}")
    return name


def _known_pipeline(name: str) -> str:
    try:
        conditioning_named(name)
    except UserError as error:
        raise ValueError(str(error)) from None
    return name


InsidePath = Annotated[str, Field(max_length=512), AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Capability = Annotated[str, Field(pattern=r"^\d{1,2}\.\d$")]
ResolutionText = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")]
Options = dict[str, bool | str]
"""Builder options that are switched on."""
Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileRecord(_Record):
    """One file of the bundle, relative to its root."""

    path: InsidePath
    sha256: Sha256
    size_bytes: int = Field(ge=0)


class TensorInfo(_Record):
    """An input or output. A dimension is a number, or the name of one that varies."""

    name: str
    dtype: Dtype
    shape: list[int | str]

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class ShapeRange(_Record):
    """The smallest, the expected and the largest shape of one input under one profile."""

    min: list[int]
    opt: list[int]
    max: list[int]

    @model_validator(mode="after")
    def _ordered(self) -> ShapeRange:
        if not 0 < len(self.min) == len(self.opt) == len(self.max):
            raise ValueError("min, opt and max differ in rank, or have none")
        if any(not 0 < a <= b <= c for a, b, c in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError(f"not ordered min <= opt <= max: {self.min} {self.opt} {self.max}")
        return self

    def fits(self, shape: list[int | str]) -> bool:
        """Whether this shape fits an input whose own shape has a name for each dimension that varies."""
        return len(self.max) == len(shape) and all(
            isinstance(side, str) or low == side == high
            for low, high, side in zip(self.min, self.max, shape, strict=True)
        )

    def covers(self, other: ShapeRange) -> bool:
        """Whether every shape of the other range is in this one."""
        return len(self.min) == len(other.min) and all(
            low <= least and most <= high
            for low, least, most, high in zip(self.min, other.min, other.max, self.max, strict=True)
        )


class Profile(_Record):
    """One optimisation profile: `resolutions` are the image sizes it serves; `batch` is the most images at once."""

    index: int = Field(ge=0)
    resolutions: list[ResolutionText] = Field(min_length=1)
    batch: int = Field(ge=1)
    shapes: dict[str, ShapeRange] = Field(min_length=1)

    @property
    def least_rows(self) -> int:
        """Rows are the first dimension of the inputs; an input with one row only, as the timestep, does not count."""
        return max(shape.min[0] for shape in self.shapes.values())

    @property
    def most_rows(self) -> int:
        return max(shape.max[0] for shape in self.shapes.values())

    def covers(self, other: Profile) -> bool:
        """Whether it serves all that the other profile does."""
        return set(other.resolutions) <= set(self.resolutions) and all(
            name in self.shapes and self.shapes[name].covers(shape) for name, shape in other.shapes.items()
        )


class BuildRecord(_Record):
    """How the engine was made, for whoever wants to make it again or compare."""

    seconds: float = Field(ge=0)
    cpu_seconds: float | None = Field(default=None, ge=0)
    peak_rss_bytes: int = Field(ge=0)
    tools: dict[str, str]


class Engine(_Record):
    """One engine: `files[0]` is what the runtime opens, the rest stand beside it."""

    component: Annotated[str, AfterValidator(_known_component)]
    flavor: FlavorName
    flavor_version: str
    layout: Layout
    guidance: Guidance | None = None
    """What the profiles of a UNet were made for; None for other components."""
    gpus: list[str]
    compute_capabilities: list[Capability]
    precision: Precision
    resolutions: list[ResolutionText] = Field(min_length=1)
    batches: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    profiles: list[Profile] = Field(min_length=1)
    inputs: list[TensorInfo] = Field(min_length=1)
    outputs: list[TensorInfo] = Field(min_length=1)
    files: list[FileRecord] = Field(min_length=1)
    key: Sha256
    onnx_sha256: Sha256
    weights_sha256: Sha256 | None
    weights_bytes: int = Field(gt=0)
    options: Options = {}
    build: BuildRecord

    @model_validator(mode="after")
    def _profiles_name_inputs(self) -> Engine:
        names = {tensor.name for tensor in self.inputs}
        for position, profile in enumerate(self.profiles):
            if profile.index != position or not set(profile.shapes) <= names:
                raise ValueError(
                    f"profile {profile.index} at position {position} does not fit the inputs {sorted(names)}"
                )
        return self

    @model_validator(mode="after")
    def _says_what_profiles_say(self) -> Engine:
        if set(self.resolutions) != {text for profile in self.profiles for text in profile.resolutions}:
            raise ValueError(f"the resolutions {', '.join(self.resolutions)} are not those of the profiles")
        most = [profile.batch for profile in self.profiles]
        if not set(most) <= set(self.batches) or max(most) != max(self.batches):
            raise ValueError(f"the batches {self.batches} are not those of the profiles, {sorted(set(most))}")
        shapes = {tensor.name: tensor.shape for tensor in self.inputs}
        for profile in self.profiles:
            if profile.most_rows < profile.batch:
                raise ValueError(
                    f"profile {profile.index} is for {profile.batch} images and takes {profile.most_rows} rows"
                )
            for name, range_ in profile.shapes.items():
                if not range_.fits(shapes[name]):
                    raise ValueError(f"profile {profile.index}: input {name} is {shapes[name]}, not {range_.max}")
        _ = self.image_scale
        return self

    @property
    def image_scale(self) -> int | None:
        """Image pixels per pixel of the first input that grows with the image: 8 for latents, 1 for an image. None where no
        input grows with it. Raises ValueError where the profiles' shapes are not those of their resolutions."""
        found: set[int] = set()
        for profile in self.profiles:
            sizes = [tuple(map(int, text.split("x"))) for text in profile.resolutions]
            widths, heights = zip(*sizes, strict=True)
            for shape in [shape for shape in profile.shapes.values() if len(shape.max) == 4][:1]:
                scale = max(1, max(widths) // shape.max[3])
                found.add(scale)
                least, most = ([value * scale for value in side[2:]] for side in (shape.min, shape.max))
                if [min(heights), min(widths)] != least or [max(heights), max(widths)] != most:
                    raise ValueError(
                        f"profile {profile.index} takes pictures of {least[1]}x{least[0]} to {most[1]}x{most[0]}, not "
                        f"{', '.join(profile.resolutions)}"
                    )
        if len(found) > 1:
            raise ValueError(f"its profiles scale their resolutions differently, by {sorted(found)}")
        return next(iter(found), None)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def serves(self, compute_capability: str) -> bool:
        """Whether a GPU of this compute capability runs it. A plan built for `ampere+` runs on Ampere and all newer GPUs."""
        if not self.compute_capabilities or compute_capability in self.compute_capabilities:
            return True
        from_ampere = version_tuple(compute_capability) >= (8, 0)
        return self.options.get("hardware_compatible") == "ampere+" and from_ampere


class Source(_Record):
    """The checkpoint that every engine of the bundle comes from; `pipeline` is diffusers' class for it, `sampling` how a
    few-step model is drawn with."""

    name: str
    sha256: str
    pipeline: Annotated[str, AfterValidator(_known_pipeline)]
    sampling: Sampling | None = None


class Manifest(_Record):
    """The whole of manifest.json. `files` are the parts of the pipeline that are no engines."""

    schema_version: Literal[1] = 1
    source: Source
    engines: list[Engine] = []
    files: list[FileRecord] = []

    @model_validator(mode="after")
    def _records_agree(self) -> Manifest:
        paths = [file.path for file in self.all_files]
        if len(paths) != len(set(paths)):
            raise ValueError("two records name the same file")
        none = set(TEXT_ENCODERS) - set(conditioning_named(self.source.pipeline).encoders)
        if strange := sorted(none & {engine.component for engine in self.engines}):
            raise ValueError(f"a {self.source.pipeline} has no {', '.join(strange)}")
        scales = {engine.image_scale for engine in self.engines if engine.component in ("unet", "vae_decoder")}
        if len(scales - {None}) > 1:
            raise ValueError("the engines scale their resolutions differently")
        return self

    @property
    def all_files(self) -> list[FileRecord]:
        return [file for engine in self.engines for file in engine.files] + self.files

    @property
    def flavors(self) -> list[str]:
        return sorted({engine.flavor for engine in self.engines})


def rebuild_command(bundle: Path, engine: Engine | None = None) -> str:
    """The command that builds this engine again, with all that its key depends on; without one, any build."""
    command = f"python -m engines build --onnx ONNX --out {bundle}"
    if engine is None:
        return command
    command += f" --flavor {engine.flavor} --layout {engine.layout}"
    if engine.gpus:
        known = [name if name in GPUS or name == "rtx" else "auto" for name in engine.gpus]
        command += f" --gpus {','.join(dict.fromkeys(known))}"
    command += f" --components {engine.component} --resolutions {','.join(engine.resolutions)}"
    if engine.batches != [1]:
        command += f" --batches {','.join(map(str, engine.batches))}"
    if engine.guidance in ("never", "any"):
        command += f" --guidance {engine.guidance}"
    for name, value in engine.options.items():
        command += f" --{name.replace('_', '-')}" + ("" if value is True else f" {value}")
    return command


def read_manifest(bundle: Path) -> Manifest:
    """bundle/manifest.json, checked against the schema; the files it names are not looked at.

    Raises UserError where it is missing, too large, not JSON, of another schema version or not of this schema.
    """
    path = Path(bundle) / MANIFEST
    if not path.is_file():
        raise UserError(f"{bundle} is not a bundle (no {MANIFEST}); build it with: {rebuild_command(bundle)}")
    rebuild = f"build it anew with: {rebuild_command(bundle)} --replace"
    if path.stat().st_size > LARGEST_MANIFEST_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than any manifest; {rebuild}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {rebuild}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UserError(
            f"{path} has schema version {version!r}, this slimxl reads {SCHEMA_VERSION}; "
            f"use the slimxl that made it, or {rebuild}"
        )
    try:
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise UserError(f"{path} is damaged at {first_fault(error, 'manifest')}; {rebuild}") from None


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Writes it atomically: a reader sees the old manifest or the new one."""
    write_json(Path(bundle) / MANIFEST, manifest.model_dump(mode="json"))
