from __future__ import annotations

import json
import re
import resource
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill.checkpoints.load import load_component
from distill.common.errors import UserError
from distill.data.cache import UNCONDITIONAL, LatentCache, checksum
from distill.data.cache_index import INDEX, write_index
from distill.data.make_cache import encode, make_cache
from distill.data.pictures import open_source
from distill.data.samples import Fitting, Sample
from distill.models.architectures import ARCHITECTURES
from distill.models.families import MINI_FAMILY
from distill.models.resolution import Resolution
from tests.distill.pictures import save_picture
from tests.processes import kill, start, wait_for


def test_a_full_gpu_leaves_the_finished_shards_and_the_same_command_goes_on(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> dict[str, torch.Tensor]:
        if any(tmp_path.glob("out/shard-*")):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free. More.")
        return encode(*arguments)

    monkeypatch.setattr("distill.data.make_cache.SAMPLES_PER_SHARD", 30)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"allocate 2\.00 GiB\..*take --batch below 3"):
        patch.setattr("distill.data.make_cache.encode", full)
        make_cache(mini_vega, "shapes:60", tmp_path / "out", batch=3)
    assert [path.name for path in sorted((tmp_path / "out").glob("shard-*"))] == ["shard-000000.safetensors"]
    make_cache(mini_vega, "shapes:60", tmp_path / "out", batch=3)
    assert len(LatentCache(tmp_path / "out", batch_size=4, seed=0)) == 60


def test_bad_samples_are_skipped_and_named(mini_vega: Path, tmp_path: Path, capsys) -> None:
    for i in range(9):
        save_picture(tmp_path / "data", f"good{i}", (150, 150), "a thing")
    save_picture(tmp_path / "data", "tiny", (20, 20), "too small")
    make_cache(mini_vega, str(tmp_path / "data"), tmp_path / "cache", fitting=Fitting(small_pictures="skip"))
    with safe_open(tmp_path / "cache" / "shard-000000.safetensors", "pt") as shard:
        about = json.loads(shard.metadata()["slimxl"])
    assert about["skipped"] == ["tiny.png: 20x20 is smaller than its bucket 128x128"]
    assert f"skipped 1 of 10 samples; each shard names its own: {about['skipped'][0]}" in capsys.readouterr().out
    assert len(LatentCache(tmp_path / "cache", batch_size=3, seed=0)) == 9


def test_what_is_left_out_is_told_once(mini_vega: Path, tmp_path: Path, capsys) -> None:
    for i in range(3):
        save_picture(tmp_path / "data", f"p{i}", (150, 150), "a thing" * (1 + 40 * i))
    (tmp_path / "data" / "p.heic").write_bytes(b"")
    make_cache(mini_vega, str(tmp_path / "data"), tmp_path / "cache", fitting=Fitting(variants=2))
    told = capsys.readouterr().out
    assert "4 of the captions are longer than the 32 tokens that the text encoders take" in told
    assert "left out, in formats that are not read: 1 .heic" in told
    assert len(LatentCache(tmp_path / "cache", batch_size=3, seed=0)) == 6


def test_the_spelling_of_data_is_no_part_of_the_key(mini_vega: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    save_picture(tmp_path / "data", "a", (150, 150), "a thing")
    monkeypatch.chdir(tmp_path)
    for spelling in ("data", "./data/", str(tmp_path / "data")):
        make_cache(mini_vega, spelling, tmp_path / "cache")
    assert capsys.readouterr().out.count("is finished, nothing is to do") == 2
    with pytest.raises(UserError, match="other options"):
        make_cache(mini_vega, "data", tmp_path / "cache", fitting=Fitting(flip=False))


def test_too_many_bad_samples_stop_the_run(mini_vega: Path, tmp_path: Path) -> None:
    for i in range(4):
        save_picture(tmp_path / "data", f"p{i}", (150, 150) if i else (12, 12), "a thing")
    with pytest.raises(UserError, match=r"1 of the first 1 samples are bad: p0\.png: 12x12 has fewer pixels"):
        make_cache(mini_vega, str(tmp_path / "data"), tmp_path / "cache")


def test_a_cache_resumes_and_is_the_same_from_any_number_of_processes(
    mini_vega: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("distill.data.make_cache.SAMPLES_PER_SHARD", 4)
    make_cache(mini_vega, "shapes:10", tmp_path / "one")
    told = capsys.readouterr().out
    assert "nothing" not in told
    assert "10 samples will take about 104 kB, 10.4 kB each; --text online would leave out 80.6 kB of it" in told
    assert re.search(r"first shard took .* samples a second\) and .* kB: all 3 will take .* minutes and .* kB", told)
    make_cache(mini_vega, "shapes:10", tmp_path / "one")
    assert "one is finished, nothing is to do" in capsys.readouterr().out
    for rank in (1, 0):
        make_cache(mini_vega, "shapes:10", tmp_path / "two", rank=rank, processes=2)
    files = [UNCONDITIONAL, *sorted(path.name for path in (tmp_path / "one").glob("shard-*"))]
    assert len(files) == 4
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    (tmp_path / "two" / files[-1]).unlink()
    kept = (tmp_path / "two" / files[-2]).stat().st_mtime_ns
    make_cache(mini_vega, "shapes:10", tmp_path / "two")
    assert (tmp_path / "two" / files[-2]).stat().st_mtime_ns == kept
    assert (tmp_path / "one" / files[-1]).read_bytes() == (tmp_path / "two" / files[-1]).read_bytes()


def test_a_cache_of_something_else_is_refused(mini_vega: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="cache of other data"):
        make_cache(mini_vega, "shapes:61", cache)


def test_batches_depend_on_the_step_alone(cache: Path) -> None:
    forward, backward = (LatentCache(cache, batch_size=4, seed=0) for _ in range(2))
    steps = range(40)
    ahead = {step: forward.batch(step)["latents"] for step in steps}
    assert all(torch.equal(backward.batch(step)["latents"], ahead[step]) for step in reversed(steps))


def test_a_resolution_is_seen_as_often_as_its_samples_are_many(tmp_path: Path) -> None:
    sizes = {"128x128": 3, "160x128": 20}
    tensors = {f"{size}/latents": torch.zeros(n, 1) for size, n in sizes.items()}
    for size, n in sizes.items():
        ids = torch.tensor([[n, i] for i in range(n)], dtype=torch.int32)
        tensors |= {
            f"{size}/time_ids": ids,
            f"{size}/crc32": torch.tensor([checksum([torch.zeros(1), i]) for i in ids]),
        }
    save_file(tensors, tmp_path / "shard-000000.safetensors")
    write_index(tmp_path / INDEX, [tmp_path / "shard-000000.safetensors"])
    (tmp_path / "cache.json").write_text('{"shards": 1}')
    save_file({"encoder_hidden_states": torch.zeros(1, 1)}, tmp_path / UNCONDITIONAL)
    latents = LatentCache(tmp_path, batch_size=8, seed=0)
    drawn = [latents.batch(step)["time_ids"] for step in range(230)]  # 80 epochs of 23 samples
    assert all(len(batch) == 8 and len(batch[:, 0].unique()) == 1 for batch in drawn)
    by_size = [int(batch[0, 0]) for batch in drawn]
    assert by_size.count(3) == 30 and by_size.count(20) == 200 and by_size[:23].count(3) == 3
    times = torch.cat([batch[:, 1] for batch in drawn if batch[0, 0] == 20]).int().bincount()
    assert len(times) == 20 and times.min() > 60 and times.max() < 100


def test_a_cache_is_held_against_the_teacher(mini_vega: Path, cache: Path, tmp_path: Path) -> None:
    latents = LatentCache(cache, batch_size=4, seed=0)
    assert latents.check_teacher(mini_vega) == []
    other = Path(shutil.copytree(mini_vega, tmp_path / "other"))
    tuned = load_component(other, "text_encoder", torch.float32)
    tuned.get_input_embeddings().weight.data += 1
    tuned.save_pretrained(other / "text_encoder")
    assert latents.check_teacher(other) == ["text_encoder"]
    wide = Path(shutil.copytree(mini_vega, tmp_path / "wide"))
    (wide / "unet" / "config.json").write_text(json.dumps(ARCHITECTURES["sdxl"].unet_config))
    with pytest.raises(UserError, match=r"shapes .*\(32, 128\).*, the UNet of .* takes .*\(77, 2048\)"):
        latents.check_teacher(wide)


def test_an_empty_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no cache\.json; make one with"):
        LatentCache(tmp_path, batch_size=1, seed=0)


def test_an_index_is_of_the_shards_that_are_there(mini_vega: Path, tmp_path: Path, capsys) -> None:
    make_cache(mini_vega, "shapes:2", tmp_path)
    index, shard = tmp_path / INDEX, tmp_path / "shard-000000.safetensors"
    whole, made = index.read_bytes(), shard.read_bytes()
    for damage, told in (
        (index.unlink, f"not finished: it has no {INDEX}; run the same"),
        (lambda: index.write_bytes(whole[:-1]), rf"{INDEX} is damaged .* run the same `distill cache` command"),
    ):
        damage()
        with pytest.raises(UserError, match=told):
            LatentCache(tmp_path, batch_size=1, seed=0)
        make_cache(mini_vega, "shapes:2", tmp_path)
        assert index.read_bytes() == whole and "is finished, nothing is to do" in capsys.readouterr().out
    shard.write_bytes(made[:-1] + bytes([made[-1] ^ 1]))  # changed since the index was made, and as long
    with pytest.raises(UserError, match="another than the index was made of: remove it and run"):
        [LatentCache(tmp_path, batch_size=1, seed=0).batch(step) for step in range(4)]


def test_a_cut_shard_is_named_and_made_again(mini_vega: Path, tmp_path: Path, capsys) -> None:
    make_cache(mini_vega, "shapes:2", tmp_path)
    shard = tmp_path / "shard-000000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"shard-000000.safetensors is damaged .* run the same `distill cache` command"):
        LatentCache(tmp_path, batch_size=1, seed=0)
    make_cache(mini_vega, "shapes:2", tmp_path)
    assert shard.read_bytes() == whole
    assert "shard-000000.safetensors is damaged and is made again" in capsys.readouterr().out


def test_a_cache_that_fails_leaves_no_thread_reading(mini_vega: Path, tmp_path: Path, monkeypatch) -> None:
    read, before = [], set(threading.enumerate())

    def slow(_source: object, index: int) -> Sample:
        read.append(index)
        time.sleep(0.01)
        return Sample(
            str(index), np.zeros((128, 128, 3), np.uint8), "a", Resolution(128, 128), (128, 128), (0, 0), False
        )

    monkeypatch.setattr("distill.data.make_cache.SAMPLES_PER_SHARD", 200)
    monkeypatch.setattr("distill.data.pictures.ShapesSource.read", slow)
    monkeypatch.setattr("distill.data.make_cache.write_shard", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_cache(mini_vega, "shapes:400", tmp_path)
    assert not {thread for thread in threading.enumerate() if "ThreadPool" in thread.name} - before
    assert len(read) < 300  # of the second shard, those that had begun


def test_a_sample_that_is_damaged_or_not_finite_is_named(mini_vega: Path, tmp_path: Path) -> None:
    make_cache(mini_vega, "shapes:1", tmp_path)
    shard = tmp_path / "shard-000000.safetensors"
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    [size] = json.loads(metadata["slimxl"])["samples"]
    key = json.loads(metadata["slimxl"])["samples"][size][0]["key"]
    tensors = load_file(shard)
    tensors[f"{size}/latents"][0, 0, 0, 0] = float("nan")
    save_file(tensors, shard, metadata=metadata)
    with pytest.raises(UserError, match=rf"shard-000000.safetensors: row 0 of {size} is not what was written there"):
        LatentCache(tmp_path, batch_size=1, seed=0).batch(0)
    fields = sorted(name for name in tensors if not name.endswith("crc32"))
    tensors[f"{size}/crc32"][0] = checksum([tensors[name][0] for name in fields])
    save_file(tensors, shard, metadata=metadata)
    write_index(tmp_path / INDEX, [shard])
    told = f"shard-000000.safetensors: the latents of sample '{key}' .row 0 of {size}. are not finite"
    with pytest.raises(UserError, match=told):
        LatentCache(tmp_path, batch_size=1, seed=0).batch(0)


def test_a_vae_without_a_posterior_is_refused(mini_vega: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    with pytest.raises(UserError, match="is an AutoencoderTiny, which has no posterior"):
        make_cache(tmp_path, "shapes:2", tmp_path / "cache")


def test_a_data_set_that_has_changed_is_another(mini_vega: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i in range(2):
        save_picture(data, f"p{i}", (150, 150), "a thing")
    make_cache(mini_vega, str(data), tmp_path / "cache")
    make_cache(mini_vega, f"{data}/", tmp_path / "cache")  # the same, spelled otherwise
    seen = [open_source(str(data), MINI_FAMILY, 0).identity]
    for change in (
        lambda: save_picture(data, "a-new-first", (150, 150), "a thing"),
        lambda: (data / "p0.txt").write_text("another thing"),
        lambda: save_picture(data, "p1", (150, 151), "a thing"),
        lambda: (data / "metadata.jsonl").write_text('{"file_name": "p0.png", "text": "a thing"}'),
        lambda: (data / "metadata.jsonl").write_text('{"file_name": "p0.png", "text": "a ring!"}'),
    ):
        change()
        seen.append(open_source(str(data), MINI_FAMILY, 0).identity)
        assert seen[-1] not in seen[:-1]
    with pytest.raises(UserError, match=r"cache of other data \(or of the same before it was changed\)"):
        make_cache(mini_vega, str(data), tmp_path / "cache")


def test_a_disk_known_to_be_too_small_is_told_before_anything_is_written(
    mini_vega: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r"the cache of 9000 samples needs .* MB on the disk"):
        make_cache(mini_vega, "shapes:9000", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_becomes_full_loses_nothing(mini_vega: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("distill.data.make_cache.SAMPLES_PER_SHARD", 4)
    make_cache(mini_vega, "shapes:10", tmp_path / "whole")
    make_cache(mini_vega, "shapes:10", tmp_path / "cache", rank=0, processes=3)  # the first shard
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))  # the kernel itself refuses to write more
    try:
        with pytest.raises(UserError, match=r"shard-000001.safetensors cannot be written .* finished shards stay"):
            make_cache(mini_vega, "shapes:10", tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [path.name for path in (tmp_path / "cache").glob("*shard*")] == ["shard-000000.safetensors"]
    with pytest.raises(UserError, match="not finished: it has 1 of 3 shards"):
        LatentCache(tmp_path / "cache", batch_size=1, seed=0)
    make_cache(mini_vega, "shapes:10", tmp_path / "cache")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes()


def make_share(checkpoint: Path, out: Path, rank: int) -> None:
    """Of a cache of eight shards, made by two processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.data.make_cache.SAMPLES_PER_SHARD", 4)
        make_cache(checkpoint, "shapes:30", out, rank=rank, processes=2)


def test_two_processes_killed_at_any_moment_go_on_to_the_same_bytes(
    mini_vega: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("distill.data.make_cache.SAMPLES_PER_SHARD", 4)
    make_cache(mini_vega, "shapes:30", tmp_path / "whole")
    killed = tmp_path / "killed"
    makers = [start(make_share, mini_vega, killed, rank) for rank in range(2)]
    wait_for("shard-*", killed, makers)
    kill(makers)
    done = len(list(killed.glob("shard-*")))
    assert 0 < done < 8
    (killed / ".shard-000007.safetensors.left.partial").write_bytes(b"half a shard")
    for rank in range(2):
        make_share(mini_vega, killed, rank)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in killed.iterdir()) == files
    assert all((killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)
