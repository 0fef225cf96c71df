"""Which files of a component folder are its weights, whatever else lies there; and what is told of damaged ones."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.checkpoints.folder import check_checkpoint, file_hashes
from distill.checkpoints.load import load_component
from distill.checkpoints.tensors import component_tensors, component_weights, read_safetensors_header
from distill.common.errors import UserError

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def save(folder: Path, name: str, tensors: Tensors) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt"})


def shard(folder: Path, tensors: Tensors, *, variant: str = "", old: bool = False, parts: int = 2) -> None:
    """In diffusers' two ways of naming a variant's parts and index."""
    dotted = f".{variant}" if variant else ""
    names = sorted(tensors)
    place = {name: f"{i * parts // len(names) + 1:05d}-of-{parts:05d}" for i, name in enumerate(names)}
    file = {
        name: f"{STEM}{dotted}-{p}.safetensors" if old else f"{STEM}-{p}{dotted}.safetensors"
        for name, p in place.items()
    }
    for one in set(file.values()):
        save(folder, one, {name: tensors[name] for name in names if file[name] == one})
    index = f"{STEM}.safetensors.index{dotted}.json" if old else f"{STEM}{dotted}.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": file}))


@pytest.fixture
def copy(mini_vega: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini_vega, tmp_path / "copy"))


def plain_and(*others: str) -> Callable[[Path, Tensors, Tensors], None]:
    def make(folder: Path, right: Tensors, wrong: Tensors) -> None:
        save(folder, f"{STEM}.safetensors", right)
        for other in others:
            save(folder, other, wrong)

    return make


def sharded(*, beside: str = "", parts: int = 2, **naming: Any) -> Callable[[Path, Tensors, Tensors], None]:
    def make(folder: Path, right: Tensors, wrong: Tensors) -> None:
        if beside:
            save(folder, beside, wrong)
        shard(folder, right, parts=parts, **naming)

    return make


def both_namings(folder: Path, right: Tensors, wrong: Tensors) -> None:
    shard(folder, right, variant="fp16", old=True)
    shard(folder, right, variant="fp16")


def without_index(folder: Path, right: Tensors, wrong: Tensors) -> None:
    shard(folder, right)
    (folder / INDEX).unlink()
    save(folder, f"{STEM}-00001-of-00003.safetensors", wrong)


def half_a_download(folder: Path, right: Tensors, wrong: Tensors) -> None:
    save(folder, f"{STEM}.fp16.safetensors", right)
    save(folder, f"{STEM}-00001-of-00002.safetensors", wrong)


def half_and_whole(folder: Path, right: Tensors, wrong: Tensors) -> None:
    save(folder, f"{STEM}.fp16.safetensors", right)
    save(folder, f"{STEM}.safetensors", wrong)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (both_namings, torch.float32),
        (both_namings, torch.float16),
        (plain_and("backup.safetensors", "z.safetensors"), torch.float32),
        (plain_and(f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"), torch.float32),
        (plain_and(f"{STEM}.ema.safetensors"), torch.float16),
        (half_and_whole, torch.float16),
        (sharded(beside=f"{STEM}.safetensors", parts=3), torch.float32),
        (sharded(beside=f"{STEM}-00001-of-00004.safetensors"), torch.float32),
        (without_index, torch.float32),
        (half_a_download, torch.float32),
        (lambda folder, right, wrong: save(folder, f"{STEM}.bf16.safetensors", right), torch.float32),
    ],
)  # fmt: skip
def test_the_weights_that_belong_are_read_and_no_others(make, dtype: torch.dtype, copy: Path) -> None:
    [original] = (copy / "unet").glob("*.safetensors")
    right = load_file(original)
    original.unlink()
    make(copy / "unet", right, {key: value + 1 for key, value in right.items()})
    check_checkpoint(copy)
    loaded = load_component(copy, "unet", dtype).state_dict()
    assert all(torch.equal(loaded[key], value.to(dtype)) for key, value in right.items())
    records = component_tensors(copy / "unet", "fp16" if dtype == torch.float16 else "fp32")
    stored = {file: load_file(file) for file in {record.file for record in records.values()}}
    assert all(torch.equal(stored[record.file][key], right[key]) for key, record in records.items())
    assert {f"unet/{record.file.name}" for record in records.values()} <= file_hashes(copy).keys()


def test_what_is_read_is_told_where_there_is_a_choice(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [original] = (copy / "unet").glob("*.safetensors")
    shutil.copyfile(original, original.with_suffix(".fp16.safetensors"))
    load_component(copy, "unet", torch.float32)
    assert f"read from {STEM}.safetensors, not from {STEM}.fp16.safetensors" in capsys.readouterr().out
    assert [file.name for file in component_weights(copy / "unet", "fp16")] == [f"{STEM}.fp16.safetensors"]


def test_weights_in_float64_are_read(copy: Path) -> None:
    [file] = (copy / "unet").glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"].double()}, file, {"format": "pt"})
    check_checkpoint(copy)
    assert torch.equal(load_component(copy, "unet", torch.float32).conv_in.bias, tensors["conv_in.bias"])


def change_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / INDEX).write_text("{"), "is not valid JSON"),
        (lambda f: (f / INDEX).write_text("[" * 100_000), "is not valid JSON"),
        (lambda f: (f / INDEX).write_text("[]"), "no weight_map"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "no weight_map"),
        (lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'), "no weight_map"),
        (lambda f: (f / f"{STEM}-00002-of-00002.safetensors").unlink(), "names .*00002-of-00002.*not there"),
        (change_index(lambda places: places.update(more=f"{STEM}-00001-of-00002.safetensors")), "no such tensor"),
        (change_index(lambda places: places.update(more="../vae/x.safetensors")), "no .safetensors file beside it"),
        (lambda f: [path.unlink() for path in f.glob("*index*")] + [next(f.glob("*1-of*")).unlink()], "1 of the 2 parts"),
        (lambda f: [path.unlink() for path in f.glob("*safetensors*")], "holds no .safetensors weights"),
        (lambda f: [p.unlink() for p in f.glob("*safetensors*")] + [(f / "x.bin").touch()], "holds x.bin, a pickle"),
    ],
)  # fmt: skip
def test_a_broken_index_is_one_line(damage, message: str, copy: Path) -> None:
    [original] = (copy / "unet").glob("*.safetensors")
    shard(copy / "unet", load_file(original))
    original.unlink()
    damage(copy / "unet")
    with pytest.raises(UserError, match=message) as refusal:
        check_checkpoint(copy)
    assert "\n" not in str(refusal.value)


def header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    stated = json.loads(raw[8 : 8 + size])
    change(stated)
    text = json.dumps(stated).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: header(p, lambda h: h.update(__metadata__={"step": 1000})), "__metadata__ that is not text"),
        (lambda p: header(p, lambda h: h.update(__metadata__=[1])), "__metadata__ that is not text"),
        (lambda p: header(p, lambda h: h["a"].update(shape=[3])), "is damaged"),
        (lambda p: header(p, lambda h: h["a"].update(dtype="F99")), "is damaged"),
        (lambda p: header(p, lambda h: h["b"].update(h["a"])), "bytes where its header says|is damaged"),
        (lambda p: header(p, lambda h: h["a"].update(shape="ab")), "no safetensors header"),
        (lambda p: header(p, lambda h: h["a"].update(data_offsets=[0])), "no safetensors header"),
        (lambda p: p.write_bytes(struct.pack("<Q", 50_000) + b"[" * 50_000), "no safetensors header"),
        (lambda p: p.write_bytes(b""), "truncated"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "git lfs pull"),
        (lambda p: torch.save({"a": torch.zeros(2)}, p), "is a pickle"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line(damage, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, path)
    damage(path)
    with pytest.raises(UserError, match=message) as refusal:
        read_safetensors_header(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_header_may_be_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    """640 bytes are written as 80 02, which is how a pickle of protocol 2 begins."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    header(path, lambda h: h.update(__metadata__={"text": " " * (640 - len(json.dumps(h)) - 30)}))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_safetensors_header(path)["a"].shape == (2,)
