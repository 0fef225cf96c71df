"""The training loop beside the published one: samples per second and peak memory, on the same model and machine.

Loading and resizing pictures is left out on both sides, since it runs beside the device.

All loops share one teacher and student and take their steps in turn, so what slows the machine slows all;
a ratio is the median of the per-round ratios. On a GPU the allocator tells the peak memory of each step; on a CPU it
is that of each loop alone in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from distill.checkpoints.random_weights import random_pipeline
from distill.checkpoints.sources import find_architecture_of, load_component, load_pipeline, resolve
from distill.checkpoints.surgery import make_student_unet
from distill.common.errors import UserError, explaining_full_memory, quiet_libraries, unknown
from distill.common.files import write_json
from distill.common.kernels import by_family, kernel_times, make_profiler
from distill.common.ownership import require_writable_file
from distill.common.progress import say, track
from distill.data.cache import UNCONDITIONAL, LatentCache
from distill.data.make_cache import encode, write_shard, write_unconditional
from distill.data.pictures import Sample, ShapesSource
from distill.models.architectures import ARCHITECTURES, Architecture, find_architecture
from distill.models.catalogue import meta_unet, unet_tflop
from distill.models.conditioning import Conditioning
from distill.models.families import Family
from distill.models.module_map import ModuleMap, make_module_map
from distill.models.networks import make_network
from distill.studies.published import published_steps
from distill.training.accelerator import COMPUTE_DTYPE, make_accelerator
from distill.training.objectives import Distill
from distill.training.objectives.taps import Level
from distill.training.options import BenchOptions, TrainOptions
from distill.training.recipes import Recipe
from distill.training.step import Pair, alphas_cumprod_of

SCHEMA = "slimxl.distill.bench/1"
WARMUP_ROUNDS = 2
LEARNING_RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One way to take a training step. `features` None compares predictions alone."""

    name: str
    features: Level | None = None
    cache: bool = True
    published: bool = False
    compiled: bool = False


LOOPS = (
    Loop(name="published", features="sub-block", cache=False, published=True),
    Loop(name="sub-block, no cache", features="sub-block", cache=False),
    Loop(name="output only"),
    Loop(name="block", features="block"),
    Loop(name="sub-block", features="sub-block"),
    Loop(name="layer", features="layer"),
    Loop(name="self-attention", features="self-attention"),
    Loop(name="sub-block, compiled", features="sub-block", compiled=True),
)
RATIOS = (  # how many times faster the second is
    ("published", "sub-block, compiled"),
    ("published", "sub-block"),
    ("published", "sub-block, no cache"),
    *((level, "output only") for level in ("block", "sub-block", "layer", "self-attention")),
)


def base_samples(family: Family, count: int) -> list[Sample]:
    """Captioned pictures, all of the family's base resolution."""
    source = ShapesSource(count * len(family.resolutions), family, seed=0)
    return [source.read(index * len(family.resolutions)) for index in range(count)]


class Encoding:
    """What the trainer asks its cache for, computed anew in every step."""

    def __init__(self, pipe: Any, conditioning: Conditioning, samples: list[Sample]) -> None:
        self.pipe, self.conditioning, self.samples = pipe, conditioning, samples

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        encoded = encode(self.pipe, self.conditioning, self.samples, step)
        return {name: value.float().cpu() for name, value in encoded.items()}


class Setup:
    """Teacher, student and optimiser as the trainer pairs them, and the same captioned pictures as pixels and as a cache."""

    def __init__(self, options: BenchOptions, loops: Sequence[Loop], folder: Path) -> None:
        teacher, student = architectures_of(options)
        settings = TrainOptions(
            mixed_precision=options.mixed_precision,
            gradient_checkpointing=options.gradient_checkpointing,
            optimizer=options.optimizer,
            compile=any(loop.compiled for loop in loops),
        )
        self.accelerator = make_accelerator(settings, folder)
        dtype = COMPUTE_DTYPE[options.mixed_precision]
        self.samples = base_samples(teacher.family, options.batch)
        self.resolution = self.samples[0].resolution
        modules = make_module_map("first", teacher.depth, student.depth)
        if options.model.startswith("random:"):
            self.pipe, nets, alphas_cumprod = _make_random(teacher, student, dtype, self.device)
        else:
            self.pipe, nets, alphas_cumprod = _load(options, student, modules, dtype, folder)
        self.pipe.vae.float()
        self.pipe.to(self.device)
        shard = folder / "shard-000000.safetensors"
        self.conditioning = teacher.family.conditioning
        write_shard(self.pipe, self.conditioning, {self.resolution: self.samples}, [], shard, seed=0, batch=4)
        write_unconditional(self.pipe, self.conditioning, folder / UNCONDITIONAL)
        write_json(folder / "cache.json", {"shards": 1})
        self.cache = LatentCache(folder, batch_size=options.batch, seed=0)
        if all(loop.cache for loop in loops):
            self.pipe = None
        self.pair = Pair(
            self.accelerator,
            *nets,
            modules,
            alphas_cumprod,
            self.cache.unconditional,
            Recipe(name="bench", stages=(), batch_size=options.batch),
            settings,
        )
        for group in self.pair.optimizer.param_groups:  # for the published loop, which sets none
            group["lr"] = LEARNING_RATE
        self.number = 0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def encoder_bytes(self) -> int:
        """What VAE and text encoders hold on the device, which a loop with a cache does without."""
        parts = self.pipe.components.values() if self.pipe else ()
        networks = [part for part in parts if isinstance(part, torch.nn.Module)]
        return sum(value.nbytes for network in networks for value in network.state_dict().values())

    @contextmanager
    def stepping(self, loop: Loop) -> Iterator[Callable[[], float]]:
        """A function that takes one step of `loop` and returns its loss."""
        with torch.compiler.set_stance("default" if loop.compiled else "force_eager"), self._stepping(loop) as step:
            try:
                yield step
            finally:  # a step that failed leaves gradients
                self.pair.optimizer.zero_grad()

    @contextmanager
    def _stepping(self, loop: Loop) -> Iterator[Callable[[], float]]:
        if loop.published:
            with published_steps(self.pair, self.pipe, self.samples) as step:
                yield step
            return
        objective = Distill(level=loop.features) if loop.features else Distill(feature=0.0)
        batches = self.cache if loop.cache else Encoding(self.pipe, self.conditioning, self.samples)
        with self.pair.taught_by(objective) as take_step:

            def step() -> float:
                self.number += 1
                noised = self.pair.noised(objective, batches.batch(self.number), (0, self.number))
                return take_step(noised, self.number, learning_rate=LEARNING_RATE)["total"]

            yield step


Nets = tuple[Any, tuple[Any, Any], torch.Tensor]
"""A pipeline without its UNet, the UNets of teacher and student, and the signal variance per timestep."""


def _load(options: BenchOptions, student: Architecture, modules: ModuleMap, dtype: torch.dtype, folder: Path) -> Nets:
    """A checkpoint and a student cut from it."""
    checkpoint = resolve(options.model, options.workdir)
    make_student_unet(checkpoint, student, modules, folder / "unet")
    nets = load_component(checkpoint, "unet", dtype), load_component(folder, "unet", torch.float32).train()
    return load_pipeline(checkpoint, dtype, without=("unet",)), nets, alphas_cumprod_of(checkpoint)


def _make_random(teacher: Architecture, student: Architecture, dtype: torch.dtype, device: torch.device) -> Nets:
    """Both with random weights, made on the device itself: speed and memory do not depend on them."""
    pipe = random_pipeline(teacher.name, str(device), dtype)
    unet, pipe.unet = pipe.unet, None
    with device:
        trained = make_network("unet", student.unet_config).train()
    return pipe, (unet, trained), pipe.scheduler.alphas_cumprod.float()


def architectures_of(options: BenchOptions) -> tuple[Architecture, Architecture]:
    """Teacher and student; the student is by default the teacher's family's SSD-1B."""
    kind, _, name = options.model.partition(":")
    teacher = (
        find_architecture(name) if kind == "random" else find_architecture_of(resolve(options.model, options.workdir))
    )
    default = next(a for a in ARCHITECTURES.values() if a.family is teacher.family and a.name.endswith("ssd-1b"))
    return teacher, find_architecture(options.student, teacher.family) if options.student else default


def step_tflop(teacher: Architecture, student: Architecture, batch: int) -> float:
    """Compute of one step: the teacher's forward pass, and three times the student's (backward is two of them).
    Recomputation and encoding are not counted: they are cost, not purpose."""
    size = teacher.family.resolutions[0]
    forward = [unet_tflop(meta_unet(one), one, size, batch) for one in (teacher, student)]
    return forward[0] + 3 * forward[1]


@dataclass
class Steps:
    """What the timed steps of one loop took. `first_s` is the very first, which compiles; `peak_memory_bytes` is None on
    a CPU."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    first_s: float = 0.0
    peak_memory_bytes: int | None = None
    kernels: dict[str, Any] | None = None


def _take_step(setup: Setup, loop: Loop, number: int, steps: Steps) -> None:
    """Step `number` of a loop, counted from 0; those of the warm-up leave their peak memory alone."""
    on_gpu = setup.device.type == "cuda"
    with setup.stepping(loop) as step:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        step()  # ends with the loss on the host, so the device is done
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    if number == 0:
        steps.first_s = seconds
    if number >= WARMUP_ROUNDS:
        steps.seconds.append(seconds)
        steps.cpu_seconds.append(cpu_seconds)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() - (setup.encoder_bytes if loop.cache else 0)
        steps.peak_memory_bytes = max(peak, steps.peak_memory_bytes or 0)


def _profile_step(setup: Setup, loop: Loop, steps: Steps) -> None:
    with setup.stepping(loop) as step, make_profiler(setup.device.type) as profiler:
        step()
    step_ms = 1e3 * float(np.median(steps.seconds))
    steps.kernels = by_family(kernel_times(profiler, setup.device.type), 1, step_ms)


def time_loops(setup: Setup, options: BenchOptions, loops: Sequence[Loop]) -> tuple[dict[str, Steps], dict[str, str]]:
    """The steps of each loop, taken in turn; each round begins with another loop. A loop that fails (out of memory, no
    compiler) leaves the others their turn: the second dict says why."""
    taken = {loop.name: Steps() for loop in loops}
    failures: dict[str, str] = {}

    def attempt(loop: Loop, work: Callable[[], None]) -> None:
        if loop.name in failures:
            return
        try:
            with explaining_full_memory(_memory_advice(options, loop)):
                work()
        except Exception as error:
            named = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failures[loop.name] = named + next(iter(str(error).splitlines()), "")
            say(f"  {loop.name} failed: {failures[loop.name]}")
            gc.collect()

    for number in track(range(WARMUP_ROUNDS + options.rounds), "steps in turn", unit="round"):
        turn = number % len(loops)
        for loop in [*loops[turn:], *loops[:turn]]:
            attempt(loop, partial(_take_step, setup, loop, number, taken[loop.name]))
    for loop in loops if options.kernels else ():
        attempt(loop, partial(_profile_step, setup, loop, taken[loop.name]))
    return {name: steps for name, steps in taken.items() if name not in failures}, failures


def _memory_advice(options: BenchOptions, loop: Loop) -> str:
    further = "" if options.gradient_checkpointing else " or --gradient-checkpointing"
    return f"the loop {loop.name!r} was at its turn; take --batch below {options.batch}{further}"


def _peak_resident_memory(options: BenchOptions, loop: Loop) -> int:
    """The most memory that was resident in two steps of `loop`, of the process as a whole (Linux)."""
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(options, [loop], Path(folder))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        with setup.stepping(loop) as step:
            step()
            step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def peak_memory(options: BenchOptions, loop: Loop) -> int | None:
    """In a fresh process, since threads do not survive a fork; None where it could not be measured."""
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=quiet_libraries) as pool:
            return pool.submit(_peak_resident_memory, options, loop).result()
    except Exception as error:  # whatever broke or killed that process, the other loops have their turn
        say(f"the memory of {loop.name!r} was not measured: {error}")
        return None


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the per-round ratios."""
    low, middle, high = np.quantile(np.asarray(slower) / np.asarray(faster), [0.25, 0.5, 0.75])
    return {"median": float(middle), "quartile_1": float(low), "quartile_3": float(high)}


def bench_loops(options: BenchOptions, out: Path) -> dict[str, Any]:
    """Measures every loop, writes the raw samples to `out` (JSON) and returns what it wrote: the times as soon as they
    are there, since on a CPU the memory of each loop takes as long again.

    Raises UserError for an unknown model, student or loop, an `out` that cannot be written, and where every loop failed.
    """
    require_writable_file(out, ("loops", "teacher"))
    teacher, student = architectures_of(options)
    if strange := set(options.loops) - {loop.name for loop in LOOPS}:
        raise unknown("loop", min(strange), [loop.name for loop in LOOPS])
    loops = [loop for loop in LOOPS if not options.loops or loop.name in options.loops]
    say(f"{teacher.name} into {student.name}, batch {options.batch}")
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(options, loops, Path(folder))
        taken, failures = time_loops(setup, options, loops)
    if not taken:
        raise UserError(next(iter(failures.values())))
    on_gpu, resolution = setup.device.type == "cuda", setup.resolution
    result: dict[str, Any] = {
        "schema_version": SCHEMA,
        "kind": "measured",
        "teacher": teacher.name,
        "student": student.name,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)",
        "resolution": str(resolution),
        "tflop_per_step": step_tflop(teacher, student, options.batch),
        "options": {name: value for name, value in asdict(options).items() if name not in ("loops", "workdir")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "loops": [
            asdict(loop)
            | {"samples_per_s": options.batch / float(np.median(taken[loop.name].seconds))}
            | asdict(taken[loop.name])
            for loop in loops
            if loop.name in taken
        ],
        "failures": failures,
        "ratios": [
            {
                "slower": slower,
                "faster": faster,
                "wall": ratio(taken[slower].seconds, taken[faster].seconds),
                "cpu": None if on_gpu else ratio(taken[slower].cpu_seconds, taken[faster].cpu_seconds),
            }
            for slower, faster in RATIOS
            if {slower, faster} <= taken.keys()
        ],
    }
    write_json(out, result)
    if on_gpu:
        return result
    del setup
    gc.collect()
    say("the memory of each loop, in a process of its own")
    left = [loop for loop in loops if loop.name in taken]
    for loop, row in zip(track(left, "memory", unit="loop"), result["loops"], strict=True):
        row["peak_memory_bytes"] = peak_memory(options, loop)
        write_json(out, result)
    return result


def describe(result: dict[str, Any]) -> list[str]:
    """The measurement as aligned lines."""
    lines = [f"{'loop':22} {'samples/s':>10} {'peak memory':>12}"]
    for row in result["loops"]:
        memory = f"{row['peak_memory_bytes'] / 1e6:,.0f} MB" if row["peak_memory_bytes"] else "-"
        lines.append(f"{row['name']:22} {row['samples_per_s']:10.3g} {memory:>12}")
    lines += [f"{name} failed: {why}" for name, why in result["failures"].items()]
    for row in result["ratios"]:
        for clock in ("wall", "cpu"):
            if one := row[clock]:
                spread = f"{one['quartile_1']:.3f} to {one['quartile_3']:.3f}"
                lines.append(
                    f"{row['slower']} / {row['faster']}, {clock} time: {one['median']:.3f} (quartiles {spread})"
                )
    return lines
