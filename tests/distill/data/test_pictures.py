from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image

from distill.common.errors import UserError
from distill.data.pictures import (
    BadSample,
    PictureSource,
    Row,
    fit_to_bucket,
    in_eight_bits,
    nearest_bucket,
    open_source,
)
from distill.models.families import MINI_FAMILY, SDXL_FAMILY
from distill.models.resolution import Resolution
from tests.distill.pictures import save_picture


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


def test_the_crops_corner_is_of_the_picture_that_is_seen() -> None:
    columns = np.broadcast_to(np.arange(250, dtype=np.uint8)[None, :, None], (96, 250, 3))
    seen = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sample = fit_to_bucket("x", Image.fromarray(columns.copy()), "a", MINI_FAMILY, rng)
        left = sample.crop_top_left[1]
        assert sample.image[0, 0, 0] == (249 - left if sample.flipped else left)
        seen.add((sample.flipped, left > 0))
    assert {(True, True), (False, True)} <= seen


def test_deep_greys_keep_their_levels_and_what_is_transparent_is_white() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    data = BytesIO()
    Image.fromarray(ramp).save(data, "PNG")
    assert np.array_equal(np.asarray(in_eight_bits(Image.open(data)))[0, :, 1], np.arange(256))
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 0))
    palette = clear.quantize()
    data = BytesIO()
    palette.save(data, "PNG")
    for image in (clear, palette, Image.open(data)):
        assert np.asarray(in_eight_bits(image))[0].tolist() == [[200, 0, 0], [255, 255, 255]]


def test_small_and_captionless_pictures_are_bad_samples() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(BadSample, match="smaller than its bucket 128x128"):
        fit_to_bucket("x", Image.new("RGB", (100, 100)), "a", MINI_FAMILY, rng)
    with pytest.raises(BadSample, match="empty caption"):
        fit_to_bucket("x", Image.new("RGB", (200, 200)), " ", MINI_FAMILY, rng)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "holds no pictures"),
        (lambda folder: save_picture(folder, "a", (150, 150), None), "holds no captions"),
        (lambda folder: None, "no folder and no known form"),
    ],
)
def test_an_unusable_data_set_is_refused_at_once(make, message: str, tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "data"), MINI_FAMILY, 0)


def test_photographs_are_turned_as_the_camera_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = BytesIO()
    Image.new("RGB", (300, 200)).save(data, "JPEG", exif=exif)
    row = Row("turned", lambda: Image.open(data), lambda: "a thing")
    sample = PictureSource([row], MINI_FAMILY, 0, None).read(0)
    assert sample.original_size == (300, 200) and sample.resolution.height > sample.resolution.width


def test_whatever_is_wrong_with_a_picture_makes_it_a_bad_sample_with_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    save_picture(folder, "cut", (150, 150), "a thing")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    save_picture(folder, "latin", (150, 150), "")
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "no.jpg").write_text("not a picture")
    (folder / "no.txt").write_text("a caption")
    save_picture(folder, "silent", (150, 150), None)
    source = open_source(str(folder), MINI_FAMILY, 0)
    reasons = {"cut.png": "truncated|broken", "latin.png": "decode", "no.jpg": "identify", "silent.png": "silent.txt"}
    for index, (name, reason) in enumerate(reasons.items()):
        with pytest.raises(BadSample, match=rf"{name}: .*({reason})"):
            source.read(index)


def test_a_line_of_metadata_that_is_wrong_is_named(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"name": "b.png"}\n')
    with pytest.raises(UserError, match=r"metadata.jsonl, line 2: not of the form"):
        open_source(str(tmp_path), MINI_FAMILY, 0)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(UserError, match="holds no captions"):
        open_source(str(tmp_path), MINI_FAMILY, 0)


def test_webdataset_shards_are_read(tmp_path: Path) -> None:
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"data-{shard}.tar")) as writer:
            for i in range(3):
                picture = Image.new("RGB", (160, 160), "red")
                writer.write({"__key__": f"k{shard}{i}", "png": picture, "txt": f"caption {shard}{i}", "json": {}})
    source = open_source(str(tmp_path / "data-{0..1}.tar"), MINI_FAMILY, 0)
    assert [source.read(i).caption for i in range(6)] == [f"caption {shard}{i}" for shard in range(2) for i in range(3)]
    assert [source.read(i).key for i in (5, 0)] == ["data-1.tar/k12", "data-0.tar/k00"]
    os.utime(tmp_path / "data-1.tar", ns=(0, 0))
    assert open_source(str(tmp_path / "data-{0..1}.tar"), MINI_FAMILY, 0).identity != source.identity


def test_a_bad_sample_of_a_shard_is_named(tmp_path: Path) -> None:
    data = BytesIO()
    Image.new("RGB", (160, 160), "red").save(data, "PNG")
    with webdataset.TarWriter(str(tmp_path / "data.tar"), encoder=False) as writer:
        writer.write({"__key__": "torn", "jpg": b"no picture at all", "txt": b"a caption"})
        writer.write({"__key__": "mute", "png": data.getvalue()})
        writer.write({"__key__": "blind", "txt": b"a caption"})
    source = open_source(str(tmp_path / "data.tar"), MINI_FAMILY, 0)
    for index, (key, reason) in enumerate({"torn": "identify", "mute": "empty caption", "blind": "no picture"}.items()):
        with pytest.raises(BadSample, match=rf"data.tar/{key}: .*{reason}"):
            source.read(index)


def _tar_without_captions(path: Path) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "a", "png": Image.new("RGB", (160, 160), "red")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "no whole, uncompressed tar file"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: webdataset.TarWriter(str(path)).close(), "holds no samples"),
        (_tar_without_captions, "holds no captions"),
    ],
)
def test_an_unusable_shard_is_refused_at_once(change, message: str, tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "data.tar")) as writer:
        writer.write({"__key__": "a", "png": Image.new("RGB", (160, 160), "red"), "txt": "a caption"})
    change(tmp_path / "data.tar")
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "data.tar"), MINI_FAMILY, 0)


@pytest.fixture
def own_hub_cache(tmp_path: Path, monkeypatch) -> None:
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / name)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("own_hub_cache")
def test_a_hugging_face_dataset_is_read(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (160, 160), color) for color in ("red", "green", "blue", "white", "black")]
    torn = [{"bytes": b"no picture at all", "path": None}] * 5
    columns = {"picture": pictures, "thumbnail": torn, "caption": ["a", "b", "c", "", "e"]}
    kinds = {"picture": datasets.Image(), "thumbnail": datasets.Image(), "caption": datasets.Value("string")}
    (tmp_path / "parquet").mkdir()
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    source = open_source(f"hf:{tmp_path / 'parquet'}", MINI_FAMILY, 0)
    assert source.read(2).image[0, 0].tolist() == [0, 0, 255]
    with pytest.raises(BadSample, match="row 3: empty caption"):
        source.read(3)
    with ThreadPoolExecutor() as pool:  # as the cache reads
        assert [sample.caption for sample in pool.map(source.read, [0, 1, 2, 4] * 20)] == ["a", "b", "c", "e"] * 20


@pytest.mark.usefixtures("own_hub_cache")
def test_a_hugging_face_dataset_that_will_not_do_is_refused(tmp_path: Path) -> None:
    for name, columns in (("words", {"text": ["a"]}), ("none", {"text": []})):
        (tmp_path / name).mkdir()
        features = datasets.Features({"text": datasets.Value("string")})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / name / "train.parquet")
    with pytest.raises(UserError, match="has the columns text; wanted are one of type Image"):
        open_source(f"hf:{tmp_path / 'words'}", MINI_FAMILY, 0)
    with pytest.raises(UserError, match=r"corresponds to no data|is empty"):
        open_source(f"hf:{tmp_path / 'none'}", MINI_FAMILY, 0)
    with pytest.raises(UserError, match="'nobody/nothing' cannot be had"):
        open_source("hf:nobody/nothing", MINI_FAMILY, 0)
