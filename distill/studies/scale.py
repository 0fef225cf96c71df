"""What the data cost a training process on the host, at the recipe's scale: opening a cache of millions of samples, and
the work for each step, however many processes share its batch.

The cache is made for the purpose: its index is a real one, its shards are sparse files of zeros, which take no disk. So all
is measured but the disk's own speed.
"""

from __future__ import annotations

import gc
import multiprocessing
import platform
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from distill.common.errors import require_least
from distill.common.files import write_json
from distill.common.ownership import require_writable_file
from distill.common.progress import say
from distill.data.cache import KEY_FILE, UNCONDITIONAL, LatentCache, shard_name
from distill.data.cache_index import CHECKSUM, INDEX, Field, save_index
from distill.data.make_cache import SAMPLES_PER_SHARD
from distill.models.conditioning import TEXT_INPUTS
from distill.models.families import SDXL_FAMILY
from distill.training.objectives import Distill
from distill.training.step import add_noise

SCHEMA = "slimxl.distill.bench-data/1"
PROCESSES = (1, 8, 64, 512)
ROWS = 4  # of each process
STEPS = 12
HEADER_BYTES = 1 << 17  # of a shard, captions included


def make_sparse_cache(folder: Path, samples: int) -> None:
    """A cache of SDXL's samples, as many of each resolution, with zeros for whatever lies in the shards."""
    family = SDXL_FAMILY
    shards = -(-samples // SAMPLES_PER_SHARD)
    counts = np.full((len(family.resolutions), shards), SAMPLES_PER_SHARD // len(family.resolutions), np.int32)
    fields: dict[str, list[Field]] = {}
    arrays: dict[str, np.ndarray] = {}
    ends = np.full(shards, HEADER_BYTES, np.int64)
    for resolution, held in zip(family.resolutions, counts, strict=True):
        held[0] += samples // len(family.resolutions) - held.sum()
        specs = [spec for spec in family.unet_inputs(resolution, 1) if spec.name != "timestep"]
        named = {"sample": "latents"}
        each = [
            Field(
                named.get(spec.name, spec.name),
                "F16" if spec.name in ("sample", *TEXT_INPUTS) else "I32",
                spec.shape[1:],
            )
            for spec in specs
        ]
        fields[str(resolution)] = each = sorted(each, key=lambda field: field.name)
        begins = np.zeros((shards, len(each)), np.int64)
        for column, field in enumerate(each):
            begins[:, column] = ends
            ends += held * np.int64(field.nbytes)
        crc = zlib.crc32(bytes(sum(field.nbytes for field in each)))
        arrays |= {
            f"{resolution}/counts": held,
            f"{resolution}/begins": begins,
            f"{resolution}/{CHECKSUM}": np.full(held.sum(), crc, np.uint32),
        }
    save_index(folder / INDEX, fields, arrays | {"shard_bytes": ends})
    for number, size in enumerate(ends):
        with (folder / shard_name(number)).open("wb") as shard:
            shard.truncate(int(size))
    save_file({name: torch.zeros(shape) for name, shape in family.text_shapes.items()}, folder / UNCONDITIONAL)
    write_json(folder / KEY_FILE, {"shards": shards})


def _opened(folder: Path) -> dict[str, float]:
    """Seconds and bytes of memory, shared pages of the mapped index included, of opening a cache and taking a batch."""
    gc.collect()
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    cache = LatentCache(folder, batch_size=ROWS, seed=0)
    opened = time.perf_counter()
    for step in range(STEPS):
        cache.batch(step)
    taken = process.memory_info().rss - before
    return {"samples": len(cache), "open_s": opened - began, "memory_bytes": taken}


def _host_work(folder: Path, processes: int) -> dict[str, float]:
    """Median CPU milliseconds of one process for one step, `ROWS` rows of a batch of `processes` times as many."""
    torch.set_num_threads(1)
    size = ROWS * processes
    cache = LatentCache(folder, batch_size=size, seed=0)
    first = ROWS * (processes // 2)
    alphas = torch.linspace(0.999, 0.005, 1000)

    def steps() -> Iterator[tuple[float, float]]:
        for step in range(STEPS):
            began = time.thread_time()
            batch = cache.batch(step, slice(first, first + ROWS))
            read = time.thread_time()
            add_noise(Distill(), batch, alphas, seed=(0, 0, step), caption_dropout=0.1, first_row=first)
            yield read - began, time.thread_time() - read

    reading, noising = np.median(list(steps())[2:], axis=0) * 1e3
    return {"processes": processes, "batch": size, "rows": ROWS, "read_ms": float(reading), "noise_ms": float(noising)}


def bench_data(samples: int, out: Path) -> dict[str, Any]:
    """Measures, writes `out` (JSON) and returns what it wrote; each opening in a fresh process.

    Raises UserError for too few samples and an `out` that cannot be written.
    """
    require_least(SAMPLES_PER_SHARD * len(SDXL_FAMILY.resolutions), samples=samples)
    require_writable_file(out, ("opened", "host_work"))
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"making a sparse cache of {samples:,} samples")
        make_sparse_cache(folder, samples)
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            opened = pool.submit(_opened, folder).result()
            work = [pool.submit(_host_work, folder, processes).result() for processes in PROCESSES]
    result = {
        "schema_version": SCHEMA,
        "kind": "measured",
        "opened": opened,
        "host_work": work,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(out, result)
    return result


def describe(result: dict[str, Any]) -> list[str]:
    """The measurement as aligned lines."""
    opened = result["opened"]
    lines = [
        f"a cache of {opened['samples']:,} samples: opened in {opened['open_s']:.2f} s, "
        f"{opened['memory_bytes'] / 1e6:.0f} MB a process",
        f"{'processes':>9} {'batch':>6} {'rows each':>9} {'read':>9} {'noise':>9}   CPU time of one process for one step",
    ]
    for row in result["host_work"]:
        times = f"{row['read_ms']:6.2f} ms {row['noise_ms']:6.2f} ms"
        lines.append(f"{row['processes']:9} {row['batch']:6} {row['rows']:9} {times}")
    return lines
