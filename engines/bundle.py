"""The bundle's manifest: what it says, how it is read, and how every file is checked before anything opens it.

A manifest is untrusted text until it has been through `read_manifest`, and a plan is untrusted bytes until its hash
has been compared. The hashes protect against damage, truncation and mix-ups; they are not a signature, so a bundle
from someone you do not trust stays one from someone you do not trust.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from distill.common.errors import UserError
from distill.common.files import sha256_file, write_json
from engines.gpus import GPUS, version_tuple

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST_BYTES = 16 << 20
LAYOUTS = ("per-resolution", "shared", "ranged")
Layout = Literal["per-resolution", "shared", "ranged"]
PIPELINE_PARTS = ("tokenizer", "tokenizer_2", "scheduler")
"""Folders that diffusers and transformers read as a whole."""


def _inside(path: str) -> str:
    """A path that stays in the bundle on every system: relative, forward slashes, nothing that climbs."""
    parts = PurePosixPath(path).parts
    climbs = PurePosixPath(path).is_absolute() or ".." in parts or PureWindowsPath(path).drive
    if climbs or "\\" in path or "\0" in path or not parts or str(PurePosixPath(*parts)) != path:
        raise ValueError(f"{path!r} is not a plain relative path inside the bundle")
    return path


InsidePath = Annotated[str, Field(max_length=512), AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Capability = Annotated[str, Field(pattern=r"^\d{1,2}\.\d$")]
ResolutionText = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")]
Options = dict[str, bool | str]
"""Builder options that are switched on."""
Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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


class ShapeRange(_Record):
    """The smallest, the expected and the largest shape of one input under one profile."""

    min: list[int]
    opt: list[int]
    max: list[int]

    @model_validator(mode="after")
    def _ordered(self) -> ShapeRange:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ValueError("min, opt and max differ in rank")
        if any(not 0 < a <= b <= c for a, b, c in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError(f"not ordered min <= opt <= max: {self.min} {self.opt} {self.max}")
        return self

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
    shapes: dict[str, ShapeRange]

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

    component: Literal["unet", "vae_decoder", "vae_encoder", "text_encoder", "text_encoder_2"]
    flavor: Literal["tensorrt", "tensorrt-rtx", "onnxruntime"]
    flavor_version: str
    layout: Layout
    gpus: list[str]
    compute_capabilities: list[Capability]
    precision: Literal["fp16", "fp32", "bf16"]
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

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def serves(self, compute_capability: str) -> bool:
        """Whether a GPU of this compute capability runs it. `ampere+` plans run on every Ampere and newer one."""
        if not self.compute_capabilities or compute_capability in self.compute_capabilities:
            return True
        from_ampere = version_tuple(compute_capability) >= (8, 0)
        return self.options.get("hardware_compatible") == "ampere+" and from_ampere


class Source(_Record):
    """The checkpoint that every engine of the bundle comes from."""

    name: str
    sha256: str


class Manifest(_Record):
    """The whole of manifest.json. `files` are the parts of the pipeline that are no engines."""

    schema_version: Literal[1] = 1
    source: Source
    engines: list[Engine] = []
    files: list[FileRecord] = []

    @model_validator(mode="after")
    def _paths_are_unique(self) -> Manifest:
        paths = [file.path for file in self.all_files]
        if len(paths) != len(set(paths)):
            raise ValueError("two records name the same file")
        return self

    @property
    def all_files(self) -> list[FileRecord]:
        return [file for engine in self.engines for file in engine.files] + self.files

    @property
    def flavors(self) -> list[str]:
        return sorted({engine.flavor for engine in self.engines})


def rebuild_command(bundle: Path, engine: Engine | None = None) -> str:
    """The command that mends a bundle: it builds this very engine again, where that is damaged or missing."""
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
    if engine.component == "unet":
        sample = engine.profiles[0].shapes.get("sample")
        if sample and sample.max[0] == engine.profiles[0].batch:
            command += " --guidance never"
        elif sample and engine.layout != "ranged" and sample.min[0] < sample.max[0]:
            command += " --guidance any"
    for name, value in engine.options.items():
        command += f" --{name.replace('_', '-')}" + ("" if value is True else f" {value}")
    return command


def read_manifest(bundle: Path) -> Manifest:
    """The verified structure of bundle/manifest.json; file contents are not touched.

    Raises UserError where it is missing, too large, not JSON, of another schema version or not of this schema.
    """
    path = Path(bundle) / MANIFEST
    if not path.is_file():
        raise UserError(f"{bundle} is not a bundle (no {MANIFEST}); build it with: {rebuild_command(bundle)}")
    mend = f"build it anew with: {rebuild_command(bundle)} --replace"
    if path.stat().st_size > LARGEST_MANIFEST_BYTES:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than any manifest; {mend}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); {mend}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UserError(
            f"{path} has schema version {version!r}, this slimxl reads {SCHEMA_VERSION}; "
            f"use the slimxl that made it, or {mend}"
        )
    try:
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise UserError(f"{path} is damaged at {where}: {first['msg']}; {mend}") from None


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Atomic; a reader sees the old manifest or the new one."""
    write_json(Path(bundle) / MANIFEST, manifest.model_dump(mode="json"))


def locate(bundle: Path, record: FileRecord, mend: str) -> Path:
    """The record's path, checked to exist, to be a file of the right size and to lie in the bundle even after
    symbolic links. Raises UserError naming what was found, what is needed and the command that mends it."""
    root = Path(bundle).resolve()
    path = root / record.path
    if not path.resolve().is_relative_to(root):
        raise UserError(
            f"{record.path} leads out of the bundle {bundle} (a link to {path.resolve()}); copy the bundle with its links "
            f"followed (cp -rL), or {mend}"
        )
    if not path.is_file():
        raise UserError(f"{record.path} is missing from {bundle}; {mend}")
    size = path.stat().st_size
    if size != record.size_bytes:
        raise UserError(f"{record.path} has {size} bytes, the manifest says {record.size_bytes}; {mend}")
    return path


def _compare(record: FileRecord, found: str, mend: str) -> None:
    if found != record.sha256:
        raise UserError(f"{record.path} has sha256 {found[:12]}…, the manifest says {record.sha256[:12]}…; {mend}")


def checked_path(bundle: Path, record: FileRecord, mend: str) -> Path:
    """`locate`, and the content's hash compared."""
    path = locate(bundle, record, mend)
    _compare(record, sha256_file(path), mend)
    return path


def checked_bytes(bundle: Path, record: FileRecord, mend: str) -> bytes:
    """The very bytes that were hashed, so that nothing can change between the check and the use."""
    data = locate(bundle, record, mend).read_bytes()
    _compare(record, hashlib.sha256(data).hexdigest(), mend)
    return data


def is_intact(bundle: Path, records: list[FileRecord]) -> bool:
    """Whether every file is there with its recorded content."""
    try:
        for record in records:
            checked_path(bundle, record, "")
    except UserError:
        return False
    return True


def unnamed_files(bundle: Path, manifest: Manifest) -> list[str]:
    """One line for each file that a pipeline would read although no hash stands for it: slipped in, struck from the
    manifest, or of a build that was not finished."""
    named = {record.path for record in manifest.files}
    parts = (path for part in PIPELINE_PARTS for path in sorted((Path(bundle) / part).rglob("*")) if path.is_file())
    configs = sorted({f"{engine.component}/config.json" for engine in manifest.engines})
    read = [path.relative_to(bundle).as_posix() for path in parts if not path.name.startswith(".")]
    expected = dict.fromkeys(["model_index.json", "scheduler/scheduler_config.json", *configs, *read])
    mend = f"mend it with: {rebuild_command(bundle, next(iter(manifest.engines), None))}"
    return [f"{path} is not named by the manifest of {bundle}; {mend}" for path in expected if path not in named]


def verify_bundle(bundle: Path) -> list[str]:
    """One line per fault of a recorded file, empty for a sound bundle. Raises UserError where not even the manifest
    can be read."""
    manifest = read_manifest(bundle)
    owners: dict[str, Any] = {file.path: engine for engine in manifest.engines for file in engine.files}
    faults = []
    for record in manifest.all_files:
        mend = f"mend it with: {rebuild_command(bundle, owners.get(record.path, next(iter(manifest.engines), None)))}"
        try:
            checked_path(bundle, record, mend)
        except UserError as error:
            faults.append(str(error))
    return faults
