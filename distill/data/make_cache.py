"""Makes a latent cache: every sample of a data set encoded once, shard by shard, by one process or by several."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from distill.checkpoints.folder import find_family, read_config
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.tensors import read_safetensors_header
from distill.common.ahead import ahead
from distill.common.errors import UserError, explaining_full_memory, require_least
from distill.common.files import (
    read_json,
    remove_leftovers,
    replacing,
    require_free_disk,
    seed_of,
    sha256_json,
    size_text,
    write_json,
)
from distill.common.ownership import require_our_folder
from distill.common.progress import say, track
from distill.data.cache import KEY_FILE, UNCONDITIONAL, checksum, frozen_hashes, shard_name
from distill.data.cache_index import CHECKSUM, INDEX, read_index, write_index
from distill.data.parts import Part, open_parts, without_secrets
from distill.data.samples import BadSample, Fitting, Sample, Text
from distill.models.conditioning import TEXT_INPUTS, Conditioning
from distill.models.families import Family
from distill.models.resolution import Resolution

SAMPLES_PER_SHARD = 512
MOST_BAD_SAMPLES = 0.2  # of all; more means that the data set is not what it was taken for


def make_cache(
    checkpoint: Path,
    data: str,
    out: Path,
    *,
    seed: int = 0,
    batch: int = 16,
    fitting: Fitting | None = None,
    text: Text = "cached",
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Encodes every sample of `data`, fitted as `fitting` says, with the checkpoint's VAE and text encoders into `out`;
    of a caption its tokens alone where `text` is "online".

    Raises UserError for a VAE without a posterior, where `out` holds a cache of something else, where more than a fifth
    of the samples are bad, and where the disk or the GPU's memory is or becomes too small; finished shards stay, and
    the same call goes on after them.
    """
    require_least(1, batch=batch)
    require_least(0, seed=seed)
    if read_config(checkpoint, "vae").get("_class_name") == "AutoencoderTiny":
        raise UserError(
            f"the VAE of {checkpoint} is an AutoencoderTiny, which has no posterior to draw latents from; give a checkpoint "
            "with an AutoencoderKL"
        )
    require_our_folder(out, "a latent cache", [KEY_FILE], ("seed", "shards"))
    family = find_family(checkpoint)
    family.conditioning.require_drawing_from_text(checkpoint)
    parts = open_parts(data, family, seed, fitting, SAMPLES_PER_SHARD)
    data = without_secrets(data)
    key = cache_key(checkpoint, data, parts.identity, seed, text) | {"shards": parts.count}
    key_file = out / KEY_FILE
    found = read_json(key_file) if key_file.exists() else key
    if not isinstance(found, dict) or found | {"data": data} != key:  # the same data may be spelled otherwise
        raise UserError(
            f"{out} is a cache of other data (or of the same before it was changed), another seed, other "
            "options, or another VAE or text encoder; choose another --out or remove it"
        )
    shards = [out / shard_name(number) for number in range(parts.count)]
    missing = [number for number, shard in enumerate(shards) if not _is_whole(shard)]
    todo = [number for number in missing if parts.share(number) % processes == rank]
    for path in filter(Path.exists, (shards[number] for number in todo)):
        say(f"{path} is damaged and is made again")
    unconditional = out / UNCONDITIONAL
    if not todo and (rank or unconditional.is_file()):
        _write_index(out, shards)
        if not missing and rank == 0:
            say(f"{out} is finished, nothing is to do")
        return
    for note in parts.notes if rank == 0 else ():
        say(note)
    samples = parts.samples(missing)
    if samples is not None:
        require_free_disk(out, samples * sample_bytes(family, text), f"the cache of {samples} samples")
    out.mkdir(parents=True, exist_ok=True)
    write_json(key_file, key)
    if missing:
        (out / INDEX).unlink(missing_ok=True)
    device = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    advice = f"take --batch below {batch}; finished shards stay, and the same command goes on"
    pipe = load_pipeline(checkpoint, torch.float32, without=("unet",))
    with explaining_full_memory(advice):
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if rank == 0 and not unconditional.is_file():
        write_unconditional(pipe, family.conditioning, unconditional)
    if rank == 0:
        say(_expectation(family, text, samples, parts.count))
    reader = _Reader(min(50, parts.samples(range(parts.count)) or 50))
    too_long = 0
    began = time.monotonic()
    progress = track(todo, f"caching {'samples' if samples is None else f'{samples} samples'}", unit="shard")
    with closing(ahead(reader.read, parts.opened(todo))) as decoded, reader:
        for number, (buckets, skipped) in zip(progress, decoded, strict=True):
            remove_leftovers(out, shards[number].name)
            with explaining_full_memory(advice):
                write_shard(pipe, family.conditioning, buckets, skipped, shards[number], seed, batch, text)
            too_long += count_too_long(pipe.tokenizer, buckets)
            if rank == 0 and number == todo[0] and len(todo) > 1:
                held = sum(map(len, buckets.values())) + len(skipped)
                say(_forecast(shards[number], held, time.monotonic() - began, len(missing), processes))
                if samples is None:
                    left = max(len(missing) - processes, 0)
                    needed = left * shards[number].stat().st_size
                    require_free_disk(out, needed, f"what {left} more shards will take, if as large as the first,")
    _write_index(out, shards)
    if too_long:
        say(
            f"{too_long} of the captions are longer than the {pipe.tokenizer.model_max_length} tokens that the text "
            "encoders take; what is beyond is left out"
        )
    if reader.bad:
        say(
            f"skipped {len(reader.bad)} of {reader.seen} samples; each shard names its own: {'; '.join(reader.bad[:3])}"
        )


def cache_key(checkpoint: Path, data: str, identity: object, seed: int, text: Text) -> dict[str, Any]:
    """What the cached values depend on, by `identity` and not by how `data` is spelled, which stands there to be read."""
    key = {"data": data, "identity": sha256_json(identity), "seed": seed, **frozen_hashes(checkpoint)}
    return key if text == "cached" else key | {"text": text}


class _Reader:
    """Decodes samples on all cores, keeps count of the bad ones, and gives up where they are too many. Left as a
    context manager, it decodes none that has not begun."""

    def __init__(self, least: int) -> None:
        """The first `least` samples may be bad as if all of them were seen."""
        self.least, self.seen = least, 0
        self.bad: list[str] = []
        self.pool = ThreadPoolExecutor()  # decoders let go of the interpreter

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def read(self, part: Part) -> tuple[dict[Resolution, list[Sample]], list[str]]:
        """Samples by resolution, in order, and what was skipped and why. Raises UserError for too many bad ones."""
        source, indices = part
        buckets: dict[Resolution, list[Sample]] = defaultdict(list)
        before = len(self.bad)

        def read_one(index: int) -> Sample | BadSample:
            try:
                return source.read(index)
            except BadSample as error:
                return error

        for sample in self.pool.map(read_one, indices):
            self.seen += 1
            if isinstance(sample, Sample):
                buckets[sample.resolution].append(sample)
            else:
                self.bad.append(str(sample))
            if len(self.bad) > MOST_BAD_SAMPLES * max(self.seen, self.least):
                raise UserError(f"{len(self.bad)} of the first {self.seen} samples are bad: {'; '.join(self.bad[:3])}")
        return buckets, self.bad[before:]


def sample_bytes(family: Family, text: Text = "cached") -> int:
    """What one sample takes in the cache, at the family's base resolution."""
    specs = {spec.name: spec for spec in family.unet_inputs(family.resolutions[0], 1)}
    left_out = {"timestep"} if text == "cached" else {"timestep", *TEXT_INPUTS}
    tokens = 4 * family.tokens * len(family.conditioning.encoders) if text == "online" else 0
    return tokens + sum(2 * math.prod(spec.shape) for name, spec in specs.items() if name not in left_out)


@torch.no_grad()
def encode(
    pipe: Any, conditioning: Conditioning, samples: list[Sample], seed: int, text: Text = "cached"
) -> dict[str, torch.Tensor]:
    """What the cache holds of samples of one resolution; latents are drawn from the VAE's posterior with the sample's own
    seed."""
    vae, device = pipe.vae, pipe.vae.device
    pixels = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2)
    pixels = pixels.to(device, vae.dtype).div_(127.5).sub_(1)
    posterior = vae.encode(pixels).latent_dist
    generators = [torch.Generator().manual_seed(seed_of(seed, sample.key)) for sample in samples]
    noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=generator) for generator in generators])
    latents = (posterior.mean + posterior.std * noise.to(device, vae.dtype)) * vae.config.scaling_factor
    captions = [sample.caption for sample in samples]
    of_captions = (conditioning.encode if text == "cached" else conditioning.tokenize)(pipe, captions)
    sizes = conditioning.size_inputs(
        [sample.original_size for sample in samples],
        [sample.crop_top_left for sample in samples],
        [sample.resolution for sample in samples],
    )
    return {"latents": latents, **of_captions, **sizes}


@torch.no_grad()
def write_unconditional(pipe: Any, conditioning: Conditioning, path: Path) -> None:
    """What the UNet takes for no caption: each text input by name, without a batch."""
    nothing = conditioning.unconditional(pipe)
    _save({name: value[0].half().cpu().contiguous() for name, value in nothing.items()}, path)


def write_shard(
    pipe: Any,
    conditioning: Conditioning,
    buckets: Mapping[Resolution, list[Sample]],
    skipped: list[str],
    path: Path,
    seed: int,
    batch: int,
    text: Text = "cached",
) -> None:
    """Encodes samples, `batch` at a time, into one shard; `skipped` says what was left out and why."""
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, Any] = {"skipped": skipped, "samples": {}}
    for resolution, samples in sorted(buckets.items()):
        parts = [encode(pipe, conditioning, samples[i : i + batch], seed, text) for i in range(0, len(samples), batch)]
        fields = {field: torch.cat([part[field] for part in parts]).cpu() for field in parts[0]}
        fields = {field: (one.half() if one.is_floating_point() else one).contiguous() for field, one in fields.items()}
        fields[CHECKSUM] = torch.tensor([checksum([fields[f][i] for f in sorted(fields)]) for i in range(len(samples))])
        tensors |= {f"{resolution}/{field}": whole for field, whole in fields.items()}
        about["samples"][str(resolution)] = [
            {"key": s.key, "caption": s.caption, "crop": s.crop_top_left, "flipped": s.flipped} for s in samples
        ]
    _save(tensors, path, {"slimxl": json.dumps(about)})


def count_too_long(tokenizer: Any, buckets: Mapping[Resolution, list[Sample]]) -> int:
    """How many captions have more tokens than the text encoder reads."""
    captions = [sample.caption for samples in buckets.values() for sample in samples]
    return sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(captions).input_ids) if captions else 0


def _expectation(family: Family, text: Text, samples: int | None, shards: int) -> str:
    """What is known of the bytes before anything is encoded."""
    each = sample_bytes(family, text)
    if samples is None:
        return f"{shards:,} shards, {size_text(each)} a sample; what all will take is told after the first"
    left_out = samples * (each - sample_bytes(family, "online"))
    hint = f"; --text online would leave out {size_text(left_out)} of it" if text == "cached" else ""
    return f"{samples:,} samples will take about {size_text(samples * each)}, {size_text(each)} each{hint}"


def _forecast(first: Path, samples: int, seconds: float, shards: int, processes: int) -> str:
    """What all shards that are to be made will take, if they are as the first one."""
    hours = seconds / 3600 * math.ceil(shards / processes)
    time_text = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    together = f" by {processes} processes" if processes > 1 else ""
    return (
        f"the first shard took {seconds:.0f} s ({samples / seconds:.1f} samples a second) and "
        f"{size_text(first.stat().st_size)}: all {shards} will take {time_text}{together} and "
        f"{size_text(shards * first.stat().st_size)}"
    )


def _write_index(out: Path, shards: Sequence[Path]) -> None:
    """Makes the index where all shards are whole and the one that is there is not theirs: the last process to end does."""
    index = out / INDEX
    if not all(map(_is_whole, shards)):
        return
    try:
        if index.exists() and np.array_equal(read_index(index).shard_bytes, [path.stat().st_size for path in shards]):
            return
    except UserError as error:
        say(str(error).partition(":")[0] + " and is made again")
    write_index(index, shards)


def _is_whole(path: Path) -> bool:
    """Whether a shard is there, as long as its header says."""
    try:
        read_safetensors_header(path)
    except (FileNotFoundError, UserError):
        return False
    return True


def _save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Raises UserError where the disk does not take them."""
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({error}); free some space and run the same command again: finished shards stay"
        ) from None
