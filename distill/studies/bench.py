"""The training loop beside the published one: samples per second and peak memory, on the same model and machine.

Loading and resizing pictures is left out on both sides, since it runs beside the device.

All loops share one teacher and student and take their steps in turn, so what slows the machine slows all;
a ratio is the median of the per-round ratios. Peak memory is of each loop alone in a process of its own.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from distill.common.errors import UserError, explaining_full_memory, quiet_libraries, unknown
from distill.common.files import require_writable_file, write_json
from distill.common.progress import say, track
from distill.data.cache import UNCONDITIONAL, LatentCache, encode, write_shard, write_unconditional
from distill.data.pictures import Sample, ShapesSource
from distill.models.architectures import ARCHITECTURES, Architecture, find_architecture
from distill.models.conditioning import Conditioning
from distill.models.families import Family
from distill.models.module_map import make_module_map
from distill.models.sources import find_architecture_of, load_pipeline, resolve
from distill.models.surgery import make_student_unet
from distill.studies.published import published_steps
from distill.training.accelerator import COMPUTE_DTYPE, make_accelerator
from distill.training.checkpoints import alphas_cumprod_of
from distill.training.options import BenchOptions, TrainOptions
from distill.training.pair import Pair, load_nets
from distill.training.recipes import Level, LossWeights, Recipe

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


class Workshop:
    """The trainer's pair of nets, and the same captioned pictures as pixels and as a cache."""

    def __init__(self, options: BenchOptions, loops: Sequence[Loop], folder: Path) -> None:
        teacher, student = architectures_of(options)
        checkpoint = resolve(options.model, options.workdir)
        settings = TrainOptions(
            mixed_precision=options.mixed_precision,
            gradient_checkpointing=options.gradient_checkpointing,
            optimizer=options.optimizer,
            compile=any(loop.compiled for loop in loops),
        )
        self.accelerator = make_accelerator(settings, folder)
        half = COMPUTE_DTYPE[options.mixed_precision]
        self.samples = base_samples(teacher.family, options.batch)
        self.resolution = self.samples[0].resolution
        self.pipe = load_pipeline(checkpoint, half, without=("unet",))
        self.pipe.vae.float()
        self.pipe.to(self.accelerator.device)
        shard = folder / "shard-000000.safetensors"
        self.conditioning = teacher.family.conditioning
        write_shard(self.pipe, self.conditioning, {self.resolution: self.samples}, [], shard, seed=0, batch=4)
        write_unconditional(self.pipe, self.conditioning, folder / UNCONDITIONAL)
        write_json(folder / "cache.json", {"shards": 1})
        self.cache = LatentCache(folder, batch_size=options.batch, seed=0)
        if all(loop.cache for loop in loops):
            self.pipe = None
        modules = make_module_map("first", teacher.depth, student.depth)
        make_student_unet(checkpoint, student, modules, folder / "unet")
        self.pair = Pair(
            self.accelerator,
            *load_nets(checkpoint, folder / "unet", half),
            modules,
            alphas_cumprod_of(checkpoint),
            self.cache.unconditional,
            Recipe(name="bench", stages=(), batch_size=options.batch),
            settings,
        )
        for group in self.pair.optimizer.param_groups:  # for the published loop, which sets none
            group["lr"] = LEARNING_RATE
        self.number = 0

    @contextmanager
    def stepping(self, loop: Loop) -> Iterator[Callable[[], float]]:
        """A function that takes one step of `loop` and returns its loss."""
        with torch.compiler.set_stance("default" if loop.compiled else "force_eager"), self._stepping(loop) as step:
            yield step

    @contextmanager
    def _stepping(self, loop: Loop) -> Iterator[Callable[[], float]]:
        if loop.published:
            with published_steps(self.pair, self.pipe, self.samples) as step:
                yield step
            return
        losses = LossWeights(level=loop.features) if loop.features else LossWeights(feature=0.0)
        batches = self.cache if loop.cache else Encoding(self.pipe, self.conditioning, self.samples)
        with self.pair.taught_by(losses) as take_step:

            def step() -> float:
                self.number += 1
                noised = self.pair.noised(batches.batch(self.number), (0, self.number))
                return take_step(noised, learning_rate=LEARNING_RATE)["total"]

            yield step


def architectures_of(options: BenchOptions) -> tuple[Architecture, Architecture]:
    """Teacher and student; the student is by default the teacher's family's SSD-1B."""
    teacher = find_architecture_of(resolve(options.model, options.workdir))
    default = next(a for a in ARCHITECTURES.values() if a.family is teacher.family and a.name.endswith("ssd-1b"))
    return teacher, find_architecture(options.student, teacher.family) if options.student else default


def _peak_memory(options: BenchOptions, loop: Loop) -> int:
    """The most memory (GPU: allocated; CPU, Linux: resident) in two steps of `loop`, of the process as a whole."""
    with tempfile.TemporaryDirectory() as folder, explaining_full_memory(_memory_advice(options, loop)):
        workshop = Workshop(options, [loop], Path(folder))
        on_gpu = workshop.accelerator.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            _begin_peak_of_resident_set()
        with workshop.stepping(loop) as step:
            step()
            step()
        return torch.cuda.max_memory_allocated() if on_gpu else _peak_resident_bytes()


def _memory_advice(options: BenchOptions, loop: Loop) -> str:
    further = "" if options.gradient_checkpointing else " or --gradient-checkpointing"
    return f"the loop {loop.name!r} was at its turn; take --batch below {options.batch}{further}"


def _begin_peak_of_resident_set() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _peak_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def peak_memory(options: BenchOptions, loop: Loop) -> int | None:
    """None where it could not be measured, in a fresh process: neither CUDA nor threads survive a fork.

    Raises UserError where the GPU's memory is too small for the loop.
    """
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=quiet_libraries) as pool:
            return pool.submit(_peak_memory, options, loop).result()
    except UserError:
        raise
    except Exception as error:  # whatever broke or killed that process, the other loops have their turn
        say(f"the memory of {loop.name!r} was not measured: {error}")
        return None


def time_loops(options: BenchOptions, loops: Sequence[Loop]) -> tuple[Workshop, dict[str, list[tuple[float, float]]]]:
    """(wall, CPU) seconds of each round's step, by loop; each round begins with another loop."""
    taken: dict[str, list[tuple[float, float]]] = {loop.name: [] for loop in loops}
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(options, loops, Path(folder))
        for number in track(range(WARMUP_ROUNDS + options.rounds), "steps in turn", unit="round"):
            turn = number % len(loops)
            for loop in [*loops[turn:], *loops[:turn]]:
                with explaining_full_memory(_memory_advice(options, loop)), workshop.stepping(loop) as step:
                    begin, begin_cpu = time.perf_counter(), time.process_time()
                    step()  # ends with the loss on the host, so the device is done
                    seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
                if number >= WARMUP_ROUNDS:
                    taken[loop.name].append(seconds)
    return workshop, taken


def ratio(slower: Sequence[float], faster: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the per-round ratios."""
    low, middle, high = np.quantile(np.asarray(slower) / np.asarray(faster), [0.25, 0.5, 0.75])
    return {"median": float(middle), "quartile_1": float(low), "quartile_3": float(high)}


def bench_loops(options: BenchOptions, out: Path) -> dict[str, Any]:
    """Measures every loop, writes the raw samples to `out` (JSON) and returns what it wrote: the times as soon as they
    are there, since the memory of each loop takes as long again.

    Raises UserError for an unknown model, student or loop, an `out` that cannot be written, and for a GPU whose memory
    is too small.
    """
    require_writable_file(out)
    teacher, student = architectures_of(options)
    if strange := set(options.loops) - {loop.name for loop in LOOPS}:
        raise unknown("loop", min(strange), [loop.name for loop in LOOPS])
    loops = [loop for loop in LOOPS if not options.loops or loop.name in options.loops]
    say(f"{teacher.name} into {student.name}, batch {options.batch}")
    workshop, taken = time_loops(options, loops)
    device, resolution = workshop.accelerator.device, workshop.resolution
    del workshop
    gc.collect()
    torch.cuda.empty_cache()
    on_gpu = device.type == "cuda"
    wall, cpu = ({name: [pair[i] for pair in pairs] for name, pairs in taken.items()} for i in (0, 1))
    result: dict[str, Any] = {
        "schema_version": SCHEMA,
        "kind": "measured",
        "teacher": teacher.name,
        "student": student.name,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)",
        "resolution": str(resolution),
        "options": {name: value for name, value in asdict(options).items() if name not in ("loops", "workdir")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "loops": [
            {
                **asdict(loop),
                "samples_per_s": options.batch / float(np.median(wall[loop.name])),
                "peak_memory_bytes": None,
                "seconds": wall[loop.name],
                "cpu_seconds": cpu[loop.name],
            }
            for loop in loops
        ],
        "ratios": [
            {
                "slower": slower,
                "faster": faster,
                "wall": ratio(wall[slower], wall[faster]),
                "cpu": None if on_gpu else ratio(cpu[slower], cpu[faster]),
            }
            for slower, faster in RATIOS
            if {slower, faster} <= wall.keys()
        ],
    }
    write_json(out, result)
    say("the memory of each loop, in a process of its own")
    for loop, row in zip(track(loops, "memory", unit="loop"), result["loops"], strict=True):
        row["peak_memory_bytes"] = peak_memory(options, loop)
        write_json(out, result)
    return result


def describe(result: dict[str, Any]) -> list[str]:
    """The measurement as aligned lines."""
    lines = [f"{'loop':22} {'samples/s':>10} {'peak memory':>12}"]
    for row in result["loops"]:
        memory = f"{row['peak_memory_bytes'] / 1e6:,.0f} MB" if row["peak_memory_bytes"] else "-"
        lines.append(f"{row['name']:22} {row['samples_per_s']:10.3g} {memory:>12}")
    for row in result["ratios"]:
        for clock in ("wall", "cpu"):
            if one := row[clock]:
                spread = f"{one['quartile_1']:.3f} to {one['quartile_3']:.3f}"
                lines.append(
                    f"{row['slower']} / {row['faster']}, {clock} time: {one['median']:.3f} (quartiles {spread})"
                )
    return lines
