"""The training loop beside the published one: samples per second and peak memory, on the same model and machine.

The published trainers run the VAE and both text encoders in every step and keep raw
sub-block features from hooks on student and teacher; that loop is made again here on today's libraries, by its
description. Loading and resizing pictures is left out on both sides, since it runs beside the device.

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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler
from torch.nn import functional

from distill.architectures import ARCHITECTURES, Architecture, Family, find_architecture
from distill.cache import LatentCache, encode, write_shard
from distill.checkpoints import alphas_cumprod_of
from distill.data import Sample, ShapesSource
from distill.errors import UserError, explaining_full_memory, quiet_libraries, require_least, unknown
from distill.files import require_writable_file, write_json
from distill.layer_map import make_layer_map
from distill.options import HALF, TrainOptions, make_accelerator
from distill.pair import Pair, load_nets
from distill.progress import say, track
from distill.recipes import Level, LossWeights, Recipe
from distill.sources import find_architecture_of, load_pipeline, resolve
from distill.surgery import make_student_unet
from distill.taps import Tap, make_taps

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


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """`batch` samples a step, all of the model's base resolution; `loops` by name."""

    model: str = "mini:sdxl"
    student: str | None = None
    batch: int = 8
    rounds: int = 12
    loops: tuple[str, ...] = tuple(loop.name for loop in LOOPS)
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    workdir: Path = Path("out/models")

    def __post_init__(self) -> None:
        """Raises UserError for a number out of range."""
        require_least(1, batch=self.batch, rounds=self.rounds)


def base_samples(family: Family, count: int) -> list[Sample]:
    """Captioned pictures, all of the family's base resolution."""
    source = ShapesSource(count * len(family.resolutions), family, seed=0)
    return [source.read(index * len(family.resolutions)) for index in range(count)]


class Encoding:
    """What the trainer asks its cache for, computed anew in every step."""

    def __init__(self, pipe: Any, samples: list[Sample]) -> None:
        self.pipe, self.samples = pipe, samples

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        return {name: value.float().cpu() for name, value in encode(self.pipe, self.samples, step).items()}


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
        device, self.half = self.accelerator.device, HALF[options.mixed_precision]
        self.samples = base_samples(teacher.family, options.batch)
        self.resolution = self.samples[0].resolution
        self.pipe = load_pipeline(checkpoint, self.half, without=("unet",))
        self.pipe.vae.float()
        self.pipe.to(device)
        shard = folder / "shard-000000.safetensors"
        write_shard(self.pipe, {self.resolution: self.samples}, [], shard, seed=0, batch=4)
        write_json(folder / "cache.json", {"shards": 1})
        self.cache = LatentCache(folder, batch_size=options.batch, seed=0)
        if all(loop.cache for loop in loops):
            self.pipe = None
        make_student_unet(checkpoint, student, "first", folder / "unet")
        self.pair = Pair(
            self.accelerator,
            *load_nets(checkpoint, folder / "unet", self.half),
            make_layer_map("first", teacher.depth, student.depth),
            alphas_cumprod_of(checkpoint),
            Recipe(name="bench", stages=(), batch_size=options.batch),
            settings,
        )
        self.sub_blocks = make_taps("sub-block", teacher.depth, student.depth, self.pair.layer_map)
        self.scheduler = DDPMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
        self.optimizer = self.pair.optimizer.optimizer  # the published loop steps it without accelerate's wrapper
        for group in self.optimizer.param_groups:
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
            with raw_hooks(self.pair.student, self.pair.teacher, self.sub_blocks) as features:
                yield lambda: self._published_step(*features)
            return
        losses = LossWeights(level=loop.features) if loop.features else LossWeights(feature=0.0)
        batches = self.cache if loop.cache else Encoding(self.pipe, self.samples)
        with self.pair.taught_by(losses) as take_step:

            def step() -> float:
                self.number += 1
                noised = self.pair.noised(batches.batch(self.number), (0, self.number))
                return take_step(noised, learning_rate=LEARNING_RATE)["total"]

            yield step

    def _published_step(self, of_student: dict[str, torch.Tensor], of_teacher: dict[str, torch.Tensor]) -> float:
        device, half, teacher = self.accelerator.device, self.half, self.pair.teacher
        pixels = torch.from_numpy(np.stack([sample.image for sample in self.samples])).permute(0, 3, 1, 2)
        with torch.no_grad():
            posterior = self.pipe.vae.encode(pixels.to(device).float() / 127.5 - 1).latent_dist
            latents = (posterior.sample() * self.pipe.vae.config.scaling_factor).to(half)
            states, pooled = [], None
            for tokenizer, encoder in (
                (self.pipe.tokenizer, self.pipe.text_encoder),
                (self.pipe.tokenizer_2, self.pipe.text_encoder_2),
            ):
                captions = [sample.caption for sample in self.samples]
                length = tokenizer.model_max_length
                tokens = tokenizer(
                    captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
                )
                encoded = encoder(tokens.input_ids.to(device), output_hidden_states=True)
                states.append(encoded.hidden_states[-2])
                pooled = encoded[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),), device=device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        time_ids = torch.tensor([sample.time_ids for sample in self.samples], device=device)
        inputs = {
            "encoder_hidden_states": torch.cat(states, dim=-1),
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids},
        }
        with self.accelerator.autocast():
            noise_pred = self.pair.model(noisy, timesteps, **inputs).sample
        with torch.no_grad():
            teacher_pred = teacher(noisy, timesteps, **inputs).sample
        loss = functional.mse_loss(noise_pred.float(), noise.float())
        loss = loss + 0.5 * functional.mse_loss(noise_pred.float(), teacher_pred.float())
        pairs = ((of_student[tap.student], of_teacher[tap.teacher]) for tap in self.sub_blocks)
        loss = loss + 0.5 * sum(functional.mse_loss(ours, theirs) for ours, theirs in pairs)
        self.accelerator.backward(loss)
        if scaler := self.accelerator.scaler:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return self.accelerator.gather(loss.detach().repeat(len(latents))).mean().item()


@contextmanager
def raw_hooks(student: Any, teacher: Any, taps: Sequence[Tap]) -> Iterator[tuple[dict, dict]]:
    """Hooks that keep every output until the next step overwrites it, as the published script's do."""
    features: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})

    def keep(kept: dict[str, torch.Tensor], path: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            kept[path] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    paths = {student: [tap.student for tap in taps], teacher: [tap.teacher for tap in taps]}
    handles = [
        net.get_submodule(path).register_forward_hook(keep(kept, path))
        for (net, of_net), kept in zip(paths.items(), features, strict=True)
        for path in of_net
    ]
    yield features
    for handle in handles:
        handle.remove()


def architectures_of(options: BenchOptions) -> tuple[Architecture, Architecture]:
    """Teacher and student; the student is by default the teacher's family's SSD-1B."""
    teacher = find_architecture_of(resolve(options.model, options.workdir))
    default = next(a for a in ARCHITECTURES.values() if a.family is teacher.family and a.name.endswith("ssd-1b"))
    return teacher, find_architecture(options.student, teacher.family) if options.student else default


def _peak_memory(options: BenchOptions, loop: Loop, send: Any) -> None:
    """Runs in a process of its own: the most memory (GPU: allocated; CPU, Linux: resident) in two steps of `loop`."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        try:
            with explaining_full_memory(_memory_advice(options, loop)):
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
                send.send(torch.cuda.max_memory_allocated() if on_gpu else _peak_resident_bytes())
        except UserError as error:
            send.send(error)


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
    """None where the process ended without an answer. It is a fresh one: neither CUDA nor threads survive a fork.

    Raises UserError where the GPU's memory is too small for the loop.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_peak_memory, args=(options, loop, send))
    process.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        return None
    finally:
        process.join()
    if isinstance(answer, UserError):
        raise answer
    return answer


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
    loops = [loop for loop in LOOPS if loop.name in options.loops]
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
