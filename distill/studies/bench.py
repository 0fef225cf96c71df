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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from distill.common.errors import UserError, explaining_full_memory, quiet_libraries, unknown
from distill.common.files import size_text, write_json
from distill.common.kernels import by_kind, kernel_times, make_profiler
from distill.common.ownership import require_writable_file
from distill.common.progress import say, track
from distill.models.architectures import Architecture
from distill.models.catalogue import meta_unet, unet_tflop
from distill.studies.loops import LOOPS, Loop, Setup, architectures_of
from distill.training.options import BenchOptions

SCHEMA = "slimxl.distill.bench/2"
WARMUP_ROUNDS = 2
RATIOS = (  # how many times faster the second is
    ("published", "sub-block, compiled"),
    ("published", "sub-block"),
    ("published", "sub-block, no cache"),
    ("sub-block, text online", "sub-block"),
    ("published LCM", "LCM"),
    *((level, "output only") for level in ("block", "sub-block", "layer", "self-attention")),
)


def step_tflop(teacher: Architecture, student: Architecture, batch: int, *, lcm: bool = False) -> float:
    """Compute of one step: the teacher's forward pass, and three times the student's (backward is two of them); under LCM
    two of the teacher's, with and without the prompt, and one more of the student's, the target. Recomputation and encoding
    are not counted: they are cost, not purpose."""
    size = teacher.family.resolutions[0]
    forward = [unet_tflop(meta_unet(one), one, size, batch) for one in (teacher, student)]
    return (1 + lcm) * forward[0] + (3 + lcm) * forward[1]


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
        peak = torch.cuda.max_memory_allocated() - setup.idle_bytes(loop)
        steps.peak_memory_bytes = max(peak, steps.peak_memory_bytes or 0)


def _profile_step(setup: Setup, loop: Loop, steps: Steps) -> None:
    with setup.stepping(loop) as step, make_profiler(setup.device.type) as profiler:
        step()
    step_ms = 1e3 * float(np.median(steps.seconds))
    steps.kernels = by_kind(kernel_times(profiler, setup.device.type), 1, step_ms)


def time_parts(setup: Setup, loop: Loop, number: int = 3) -> dict[str, float]:
    """Seconds of a step, the mean of `number`, in the forward passes of `teacher`, `student` and `target`, and in the
    `rest`: backward, optimiser and what lies between."""
    pair, spent, begun = setup.pair, dict[str, float](), dict[str, float]()

    def now() -> float:
        if setup.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with setup.stepping(loop) as step, ExitStack() as hooks:
        for name, net in (("teacher", pair.teacher), ("student", pair.student), ("target", pair.target)):

            def begin(_net: Any, _inputs: Any, name: str = name) -> None:
                begun[name] = now()

            def end(_net: Any, _inputs: Any, _output: Any, name: str = name) -> None:
                spent[name] = spent.get(name, 0.0) + (now() - begun[name]) / number

            hooks.callback(net.register_forward_pre_hook(begin).remove)
            hooks.callback(net.register_forward_hook(end).remove)
        start = now()
        for _ in range(number):
            step()
        total = (now() - start) / number
    return spent | {"rest": total - sum(spent.values())}


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
        parts = {loop.name: time_parts(setup, loop) for loop in loops if loop.name in taken and loop.name == "LCM"}
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
            | {"tflop": step_tflop(teacher, student, options.batch, lcm=loop.lcm), "parts_s": parts.get(loop.name)}
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
        memory = size_text(row["peak_memory_bytes"]) if row["peak_memory_bytes"] else "-"
        lines.append(f"{row['name']:22} {row['samples_per_s']:10.3g} {memory:>12}")
    lines += [f"{name} failed: {why}" for name, why in result["failures"].items()]
    for row in result["loops"]:
        if parts := row["parts_s"]:
            told = ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
            lines.append(f"a step of {row['name']}: {told}")
    for row in result["ratios"]:
        for clock in ("wall", "cpu"):
            if one := row[clock]:
                spread = f"{one['quartile_1']:.3f} to {one['quartile_3']:.3f}"
                lines.append(
                    f"{row['slower']} / {row['faster']}, {clock} time: {one['median']:.3f} (quartiles {spread})"
                )
    return lines
