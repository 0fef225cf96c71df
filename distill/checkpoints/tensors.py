"""Tensors on disk: safetensors files read by their headers and written as a stream.

Nothing here holds more than one piece of a tensor, so copying, renaming and making checkpoints takes the same memory
at any size. Format: 8-byte header length, JSON header, data; https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError, safe_open

from distill.common.errors import UserError
from distill.common.files import read_json, write_json

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 1 << 24
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
STEMS = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call the weights in a network's folder."""


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

        item = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ITEM_BYTES[record.dtype]]
        return torch.frombuffer(bytearray(b"".join(record.chunks())), dtype=item).reshape(record.shape).T

    return MadeTensor(record.dtype, record.shape[::-1], make)


def zeros(dtype: str, shape: tuple[int, ...]) -> MadeTensor:
    """A tensor of zeros."""

    def make() -> torch.Tensor:
        import torch

        return torch.zeros(math.prod(shape) * ITEM_BYTES[dtype], dtype=torch.uint8)

    return MadeTensor(dtype, shape, make)


def read_safetensors_header(path: Path) -> dict[str, TensorRecord]:
    """The tensors of one file, from its header alone. Raises UserError for a truncated or foreign file."""
    return {
        key: TensorRecord(path, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for key, entry in _header(path).items()
        if key != "__metadata__"
    }


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says about itself. Raises UserError as `read_safetensors_header` does."""
    return _header(path).get("__metadata__") or {}


def _header(path: Path) -> dict[str, Any]:
    """The JSON header, with offsets counted from the start of the file. The safetensors library judges the file too, so
    that whatever it would refuse later is told here, in one line."""
    size = path.stat().st_size
    with path.open("rb") as file:
        begin = file.read(200)
        if begin.startswith(b"version https://git-lfs"):
            raise UserError(f"{path} is a pointer of git-lfs, not the weights themselves: run git lfs pull")
        length = int.from_bytes(begin[:8], "little")
        if size < 8 or length > size - 8:
            if begin.startswith((b"PK\x03\x04", b"\x80\x02")):  # a header of 640 bytes begins with the latter too
                raise UserError(f"{path} is a pickle under another name; only safetensors weights are read")
            raise UserError(f"{path} is no whole safetensors file ({size} bytes): truncated? fetch it again")
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text)
        for key, entry in header.items():
            if key != "__metadata__":
                start, end = entry["data_offsets"]
                entry["dtype"], entry["shape"] = str(entry["dtype"]), [int(size) for size in entry["shape"]]
                entry["data_offsets"] = [8 + length + start, 8 + length + end]
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):  # no JSON, or no table of tensors
        raise UserError(f"{path} has no safetensors header: damaged or of another format") from None
    about = header.get("__metadata__") or {}
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise UserError(
            f"{path} has __metadata__ that is not text, which the safetensors library refuses; save it again with "
            "safetensors.torch.save_file, whose metadata is text"
        )
    needed = max(
        (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=8 + length
    )
    if needed != size:
        raise UserError(f"{path} holds {size} bytes where its header says {needed}: truncated? fetch it again")
    try:
        with safe_open(path, "np"):
            return header
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); fetch it again") from None


def check_stored(key: str, record: TensorRecord) -> TensorRecord:
    """The record itself. Raises UserError for a weight in a format that is not read, such as fp8."""
    if record.dtype not in ITEM_BYTES:
        raise UserError(
            f"{record.file}: {key} is stored as {record.dtype}; read are {', '.join(ITEM_BYTES)}: fetch the fp16 file"
        )
    return record


def component_weights(folder: Path, precision: str = "fp32") -> list[Path]:
    """The safetensors files of a component folder that are read for `precision`, all of one variant: the files named fp16
    first for fp16, the plain ones first for anything else, then whichever there are.

    Where there is an index, it decides which files belong; else it is one file, or the parts of one sharding. Whatever
    else lies in the folder is no part of the network. Raises UserError where there are no weights, where parts are
    missing, and for an index that cannot be read.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors*"))
    refusals = []
    for stem, variant in _variants(names, precision):
        try:
            return _files_of(folder, stem, variant, names)
        except UserError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(kind))
    found = f"holds {pickled[0]}, a pickle, but no" if pickled else "holds no"
    raise UserError(
        f"{folder} {found} .safetensors weights called {' or '.join(STEMS)} (pickled .bin weights are not read)"
    )


def _variants(names: Sequence[str], precision: str) -> list[tuple[str, str]]:
    """Stem and variant of the weights among file names, those to be read for `precision` first."""
    found = {
        (stem, match[1] or match[2] or match[3] or "")
        for stem in STEMS
        for name in names
        if (match := _named(stem).fullmatch(name))
    }
    wanted = {"fp16": ("fp16", "")}.get(precision, ("",))

    def rank(place: tuple[str, str]) -> tuple[Any, ...]:
        stem, variant = place
        return STEMS.index(stem), *(variant != name for name in wanted), variant == "fp16", variant

    return sorted(found, key=rank)


def other_variants(folder: Path, files: Sequence[Path]) -> list[str]:
    """Names of weights in a component folder that `component_weights` did not choose, `files` being what it gave."""
    chosen = {file.name for file in files}
    names = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in chosen)
    return [name for name in names if any(_named(stem).fullmatch(name) for stem in STEMS)]


def _named(stem: str) -> re.Pattern[str]:
    """Weights of a stem and the indices of their shards, with the variant in any of the places that diffusers and
    transformers have put it."""
    name = r"(?:\.(?!safetensors)(\w+))?"
    return re.compile(rf"{stem}{name}(?:-\d+-of-\d+)?{name}\.safetensors(?:\.index(?:\.(\w+))?\.json)?")


def _files_of(folder: Path, stem: str, variant: str, names: Sequence[str]) -> list[Path]:
    dotted = f".{variant}" if variant else ""
    indices = [f"{stem}.safetensors.index{dotted}.json", f"{stem}{dotted}.safetensors.index.json"]
    refusals = []
    for name in dict.fromkeys(name for name in indices if name in names):
        try:
            return _files_of_index(folder / name)
        except UserError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    if f"{stem}{dotted}.safetensors" in names:
        return [folder / f"{stem}{dotted}.safetensors"]
    place = re.compile(rf"{stem}(?:{re.escape(dotted)})?-(\d+)-of-(\d+)(?:{re.escape(dotted)})?\.safetensors")
    parts = [(name, match[2]) for name in names if (match := place.fullmatch(name)) and dotted in name]
    counts = {count: [folder / name for name, of in parts if of == count] for _, count in parts}
    whole = [files for count, files in counts.items() if len(files) == int(count)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise UserError(f"{folder} holds several shardings of its weights and no index that says which; fetch it again")
    count, files = max(counts.items(), key=lambda item: len(item[1]))
    raise UserError(f"{folder} holds {len(files)} of the {int(count)} parts of its weights; fetch it again")


def _files_of_index(index: Path) -> list[Path]:
    """Raises UserError for an index that is no index, and one that names files or tensors that are not there."""
    stated = read_json(index)
    places = stated.get("weight_map") if isinstance(stated, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} is no index: it has no weight_map that names the file of each tensor; fetch it again")
    files = {name: index.parent / name for name in sorted(set(places.values()))}
    for name, file in files.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {name!r}, which is no .safetensors file beside it; fetch it again")
        if not file.is_file():
            raise UserError(f"{index} names {name}, which is not there; fetch it again")
    headers = {name: read_safetensors_header(file) for name, file in files.items()}
    for key, name in places.items():
        if key not in headers[name]:
            raise UserError(f"{index} says that {key} is in {name}, which has no such tensor; fetch it again")
    return list(files.values())


def plain_names(files: Sequence[Path]) -> dict[str, Path]:
    """What `component_weights` gave, by the names under which every library finds it without being told a variant."""
    stem = next(stem for stem in STEMS if files[0].name.startswith(stem))
    if len(files) == 1:
        return {f"{stem}.safetensors": files[0]}
    return {f"{stem}-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, 1)}


def write_index(folder: Path, names: Mapping[str, Path]) -> None:
    """The index of `plain_names`, beside which those files lie or will lie; nothing where there is one file alone."""
    if len(names) == 1:
        return
    records = {name: read_safetensors_header(file) for name, file in names.items()}
    total = sum(record.nbytes for file in records.values() for record in file.values())
    places = {key: name for name, file in records.items() for key in file}
    stem = next(iter(names)).partition("-")[0]
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def component_tensors(folder: Path, precision: str = "fp32") -> dict[str, TensorRecord]:
    """All tensors of the files of `component_weights`. Raises UserError for a weight in a format that is not read."""
    files = component_weights(folder, precision)
    records = {key: record for file in files for key, record in read_safetensors_header(file).items()}
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
