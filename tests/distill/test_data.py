from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from distill.architectures import MINI_FAMILY, SDXL_FAMILY, Resolution
from distill.cache import LatentCache, make_cache
from distill.data import BadSample, fit_to_bucket, nearest_bucket, open_source
from distill.errors import UserError


@pytest.fixture(scope="module")
def cache(mini_vega: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    make_cache(mini_vega, "shapes:60", folder)
    return folder


def _picture(folder: Path, name: str, size: tuple[int, int], caption: str | None) -> None:
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption)


@pytest.mark.parametrize(
    ("size", "bucket"), [((4000, 4000), "1024x1024"), ((3000, 1200), "1536x640"), ((700, 900), "896x1152")]
)
def test_a_picture_goes_to_the_bucket_of_its_shape(size: tuple[int, int], bucket: str) -> None:
    assert nearest_bucket(*size, SDXL_FAMILY) == Resolution.parse(bucket)


def test_micro_conditioning_is_of_the_sample() -> None:
    pixels = np.zeros((300, 200, 3), np.uint8)
    sample = fit_to_bucket("x", Image.fromarray(pixels), "a", MINI_FAMILY, np.random.default_rng(0))
    bucket = sample.resolution
    assert sample.image.shape == (bucket.height, bucket.width, 3)
    top, left = sample.crop_top_left
    assert sample.time_ids == (300, 200, top, left, bucket.height, bucket.width)


def test_small_and_captionless_pictures_are_bad_samples() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(BadSample, match="smaller than its bucket 128x128"):
        fit_to_bucket("x", Image.new("RGB", (100, 100)), "a", MINI_FAMILY, rng)
    with pytest.raises(BadSample, match="empty caption"):
        fit_to_bucket("x", Image.new("RGB", (200, 200)), " ", MINI_FAMILY, rng)


def test_bad_samples_are_skipped_and_named(mini_vega: Path, tmp_path: Path) -> None:
    for i in range(9):
        _picture(tmp_path / "data", f"good{i}", (150, 150), "a thing")
    _picture(tmp_path / "data", "tiny", (20, 20), "too small")
    make_cache(mini_vega, str(tmp_path / "data"), tmp_path / "cache")
    with safe_open(tmp_path / "cache" / "shard-000000.safetensors", "pt") as shard:
        about = json.loads(shard.metadata()["slimxl"])
    assert about["skipped"] == ["tiny.png: 20x20 is smaller than its bucket 128x128"]
    assert len(LatentCache(tmp_path / "cache", batch_size=3, seed=0)) == 9


def test_too_many_bad_samples_stop_the_run(mini_vega: Path, tmp_path: Path) -> None:
    for i in range(4):
        _picture(tmp_path / "data", f"p{i}", (150, 150) if i else (20, 20), "a thing")
    with pytest.raises(UserError, match=r"1 of the first 4 samples are bad, e\.g\. p0\.png"):
        make_cache(mini_vega, str(tmp_path / "data"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "holds no pictures"),
        (lambda folder: _picture(folder, "a", (150, 150), None), "holds no captions"),
        (lambda folder: None, "no folder and no known form"),
    ],
)
def test_an_unusable_data_set_is_refused_at_once(make, message: str, tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "data"), MINI_FAMILY, 0)


def test_webdataset_shards_are_read(mini_vega: Path, tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "data-000.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"k{i}", "png": Image.new("RGB", (160, 160), "red"), "txt": f"caption {i}"})
    source = open_source(str(tmp_path / "data-000.tar"), MINI_FAMILY, 0)
    assert [source.read(i).caption for i in range(len(source))] == ["caption 0", "caption 1", "caption 2"]


def test_a_cache_resumes_and_is_the_same_from_any_number_of_processes(
    mini_vega: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("distill.cache.SAMPLES_PER_SHARD", 4)
    make_cache(mini_vega, "shapes:10", tmp_path / "one")
    for rank in (1, 0):
        make_cache(mini_vega, "shapes:10", tmp_path / "two", rank=rank, processes=2)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
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


def test_an_empty_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        LatentCache(tmp_path, batch_size=1, seed=0)
