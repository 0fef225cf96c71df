"""What must stand in those parts of a file that are plain dicts here, since a report reads it: all else may differ."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Cpu(BaseModel):
    model: str
    cores_usable: int | None
    governor: str | None
    memory_bytes: float | None
    missing: dict[str, str]


class Environment(BaseModel):
    cpu: Cpu
    system: str
    python: str
    packages: dict[str, str | None]
    commit: str | None
    device: Literal["cpu", "cuda"]
    torch_threads: int
    thread_variables: dict[str, str]
    peak_rss_bytes: float | None


class Identity(BaseModel):
    name: str | None


class Gpu(BaseModel):
    identity: Identity
    missing: dict[str, str]
    reason: str | None


class Peak(BaseModel):
    name: str
    tflops: Positive


class Load(BaseModel):
    resolution: Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*$")]
    steps: Count
    batch: Count
    guidance_scale: float
    scheduler: str
    seed: int


class OneSample(BaseModel):
    round: int
    total_ms: Positive
    steps_ms: Annotated[list[float], Field(min_length=1)]


class Percentiles(BaseModel):
    p90: float | None
    p99: float | None


class OneRow(BaseModel):
    samples: Annotated[list[OneSample], Field(min_length=1)]
    percentiles_ms: Percentiles


class OneCell(BaseModel):
    workload: Load
    rows: list[OneRow]
    device: dict[str, tuple[float, float, float] | None] = {}


class Cold(BaseModel):
    load_ms: float
    first_image_ms: float


class Memory(BaseModel):
    rss_added_bytes: float | None
    device_added_bytes: float | None
    allocator_peak_bytes: float | None


class Energy(BaseModel):
    j_per_image: float
    mean_power_w: float
    seconds: Positive
    images: Count


class NoEnergy(BaseModel):
    j_per_image: None


class Quality(BaseModel):
    passed: bool | None
    words: list[str] = []
    psnr_db: float | None = None
    latent_cosine: float | None = None


class Follows(BaseModel):
    all: float
    count: int


class Kernels(BaseModel):
    families_ms: dict[str, float] | None
    step_ms: float | None = None


class Flops(BaseModel):
    flops: float


class Costs(BaseModel):
    unet: Flops


class Configs(BaseModel):
    unet: str
    vae: str
    text_encoder: str
    text_encoder_2: str


class Losses(BaseModel):
    stage: str
    steps: int
    seconds: float | None
    points: Annotated[list[tuple[int, float, dict[str, float]]], Field(min_length=1)]


class Checkpoint(BaseModel):
    kind: Literal["checkpoint"]
    weights_bytes: int
    unet_bytes: int
    losses: list[Losses]


class Onnx(BaseModel):
    kind: Literal["onnx"]
    bytes: int
    components: dict[str, dict[str, Any]]


class Source(BaseModel):
    sha256: str


class Engine(BaseModel):
    component: str
    flavor: str
    flavor_version: str
    layout: str
    gpus: list[str]
    compute_capabilities: list[str]
    precision: str
    resolutions: list[str]
    profiles: int
    file: str
    sha256: str
    onnx_sha256: str
    bytes: int
    build_seconds: float
    build_peak_rss_bytes: int


class Bundle(BaseModel):
    kind: Literal["bundle"]
    bytes: int
    source: Source
    engines: list[Engine]


class OneContestant(BaseModel):
    cold: Cold
    memory: Memory
    energy: Energy | NoEnergy
    quality: Quality
    follows: Follows | None
    kernels: Kernels | None = None
    costs: Costs | None
    configs: Configs | None = None
    artifacts: list[Annotated[Checkpoint | Onnx | Bundle, Field(discriminator="kind")]]


class ResultsParts(BaseModel):
    """Of `slimxl.bench.results/1` what `results.Results` leaves open."""

    environment: Environment
    gpu: Gpu
    peak: Peak | None
    cells: list[OneCell]
    contestants: list[OneContestant]


class Step(BaseModel):
    teacher: str
    student: str
    title: str
    batch: Count


class MeasuredStep(Step):
    failed: None
    samples_per_s: Positive
    peak_memory_bytes: float | None
    mfu: float | None
    kernels: Kernels | None = None


class FailedStep(Step):
    failed: str


class TrainingFile(BaseModel):
    rows: list[MeasuredStep | FailedStep]


class Target(BaseModel):
    target: str
    reached: Literal["none", "built", "loaded", "ran"]
    cosine: float | None
    validity: str | None
    invalid: list[str]
    messages: list[str]


class AcceptanceFile(BaseModel):
    rows: list[Target]


class Part(BaseModel):
    part: str
    state: str
    why: str | None
    seconds: float | None


class SessionFile(BaseModel):
    parts: list[Part]


class LoopOptions(BaseModel):
    batch: Count
    rounds: Count
    mixed_precision: str


class Loop(BaseModel):
    name: str
    samples_per_s: Positive
    peak_memory_bytes: float | None


class Quartiles(BaseModel):
    median: float
    quartile_1: float
    quartile_3: float


class Ratio(BaseModel):
    slower: str
    faster: str
    wall: Quartiles


class LoopsFile(BaseModel):
    teacher: str
    student: str
    resolution: str
    options: LoopOptions
    loops: list[Loop]
    ratios: list[Ratio]
