"""Tensors on disk: safetensors files read by their headers and written as a stream.

Nothing here holds more than one piece of a tensor, so copying, renaming and making checkpoints takes the same memory
at any size. Format: 8-byte header length, JSON header, data; https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distill.common.errors import UserError

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 1 << 24
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


class WritableTensor(Protocol):
    """`dtype` is safetensors' name for it; `chunks` yields the bytes in order."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def chunks(self) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor's bytes lie: `start`..`end` are offsets in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def chunks(self) -> Iterator[bytes]:
        """Raises UserError where the file has become shorter."""
        with self.file.open("rb") as source:
            source.seek(self.start)
            left = self.nbytes
            while left:
                chunk = source.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise UserError(f"{self.file} became shorter while it was read")
                left -= len(chunk)
                yield chunk

    def part(self, index: int, count: int) -> TensorRecord:
        """The `index`-th of `count` equal parts along the first axis."""
        size = self.nbytes // count
        start = self.start + index * size
        return replace(self, shape=(self.shape[0] // count, *self.shape[1:]), start=start, end=start + size)


@dataclass(frozen=True)
class MadeTensor:
    """A tensor that `make` gives only when it is written."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def chunks(self) -> Iterator[bytes]:
        import torch

        yield self.make().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def transposed(record: TensorRecord) -> MadeTensor:
    """The transpose of a matrix."""

    def make() -> torch.Tensor:
        import torch

        item = {2: torch.int16, 4: torch.int32}[ITEM_BYTES[record.dtype]]
        return torch.frombuffer(bytearray(b"".join(record.chunks())), dtype=item).reshape(record.shape).T

    return MadeTensor(record.dtype, record.shape[::-1], make)


def read_safetensors_header(path: Path) -> dict[str, TensorRecord]:
    """The tensors of one file, from its header alone. Raises UserError for a truncated or foreign file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is no whole safetensors file ({size} bytes): truncated? fetch it again")
        begin = 8 + length
        try:
            records = {
                key: TensorRecord(
                    path, entry["dtype"], tuple(entry["shape"]), *(begin + offset for offset in entry["data_offsets"])
                )
                for key, entry in json.loads(file.read(length)).items()
                if key != "__metadata__"
            }
        except (ValueError, AttributeError, KeyError, TypeError):  # no JSON, or no table of tensors
            raise UserError(f"{path} has no safetensors header: damaged or of another format") from None
    needed = max((record.end for record in records.values()), default=begin)
    if needed != size:
        raise UserError(f"{path} holds {size} bytes where its header says {needed}: truncated? fetch it again")
    return records


def check_stored(key: str, record: TensorRecord) -> TensorRecord:
    """The record itself. Raises UserError for a weight in a format that is not read, such as fp8."""
    if record.dtype not in ITEM_BYTES:
        raise UserError(
            f"{record.file}: {key} is stored as {record.dtype}; read are {', '.join(ITEM_BYTES)}: fetch the fp16 file"
        )
    return record


def weights_variant(file: Path) -> str:
    """`fp16` of `model.fp16.safetensors`, nothing of the plain one; parts (`-00001-of-00002`) are of one variant."""
    return re.sub(r"-\d+-of-\d+", "", file.stem).partition(".")[2]


def component_weights(folder: Path) -> list[Path]:
    """The safetensors files of a component folder, of one variant: fp16, or else plain, or else whatever there is.

    Raises UserError where there is none at all, and where parts are missing.
    """
    variants: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        variants.setdefault(weights_variant(file), []).append(file)
    if not variants:
        raise UserError(f"{folder} holds no .safetensors weights (pickled .bin weights are not read)")
    files = variants[min(variants, key=lambda variant: ("fp16", "", variant).index(variant))]
    parts = re.search(r"-of-(\d+)", files[0].name)
    if parts and len(files) != int(parts[1]):
        raise UserError(f"{folder} holds {len(files)} of the {int(parts[1])} parts of its weights; fetch it again")
    return files


def component_tensors(folder: Path) -> dict[str, TensorRecord]:
    """All tensors of a component folder, over its shards. Raises UserError for a weight in a format that is not read."""
    records = {
        key: record for file in component_weights(folder) for key, record in read_safetensors_header(file).items()
    }
    for key, record in records.items():
        if key.endswith((".weight", ".bias")):  # not a buffer, as the positions that older text encoders count in I64
            check_stored(key, record)
    return records


def write_safetensors(out: Path, tensors: Mapping[str, WritableTensor]) -> None:
    """Writes one file, the widest dtype first so that each tensor stays aligned, else in the given order."""
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].nbytes // max(1, math.prod(item[1].shape))))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in ordered.items():
        end = offset + tensor.nbytes
        header[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with out.open("wb") as target:
        target.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in ordered.values():
            for chunk in tensor.chunks():
                target.write(chunk)
