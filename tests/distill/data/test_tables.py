from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distill.common.errors import UserError
from distill.data.pictures import PictureSource, open_source
from distill.data.samples import BadSample
from distill.models.families import MINI_FAMILY
from tests.distill.pictures import png

pytestmark = pytest.mark.usefixtures("own_hub_cache")

COLORS = ("red", "green", "blue", "white", "black")


def opened(spec: object) -> PictureSource:
    source = open_source(str(spec), MINI_FAMILY, 0)
    assert isinstance(source, PictureSource)
    return source


def _table() -> datasets.Dataset:
    """Five pictures, the fourth without a caption, beside a column that nothing can decode."""
    torn = [{"bytes": b"no picture at all", "path": None}] * 5
    pictures = [Image.new("RGB", (160, 160), color) for color in COLORS]
    columns = {"picture": pictures, "thumbnail": torn, "caption": ["a", "b", "c", "", "e"]}
    kinds = {"picture": datasets.Image(), "thumbnail": datasets.Image(), "caption": datasets.Value("string")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def _parquet(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    _table().select(range(3)).to_parquet(folder / "data" / "train-00000-of-00002.parquet", batch_size=2)
    _table().select(range(3, 5)).to_parquet(folder / "data" / "train-00001-of-00002.parquet")
    _table().to_parquet(folder / "data" / "test-00000-of-00001.parquet")


def _other_parquet(**columns: list) -> object:
    def make(folder: Path) -> None:
        folder.mkdir()
        pq.write_table(pa.table(columns), folder / "part.parquet", row_group_size=2)

    return make


PNGS, WORDS = [png(color) for color in COLORS], ["a", "b", "c", None, "e"]


@pytest.mark.parametrize(
    "make",
    [
        _parquet,
        lambda folder: _table().save_to_disk(folder),
        lambda folder: datasets.DatasetDict(test=_table(), train=_table()).save_to_disk(folder),
        _other_parquet(jpg=PNGS, TEXT=WORDS),  # as img2dataset writes them: no word of Hugging Face in the file
        _other_parquet(image=[{"bytes": data, "path": "x.png"} for data in PNGS], prompt=WORDS),
    ],
)
@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_tables_are_read_where_they_lie(make, prefix: str, tmp_path: Path, own_hub_cache: Path) -> None:
    make(tmp_path / "data")
    source = opened(f"{prefix}{tmp_path / 'data'}")
    assert len(source) == 5 and source.read(2).image[0, 0].tolist() == [0, 0, 255]
    with pytest.raises(BadSample, match="row 3: empty caption"):
        source.read(3)
    with ThreadPoolExecutor() as pool:  # as the cache reads
        assert [sample.caption for sample in pool.map(source.read, [0, 1, 2, 4] * 20)] == ["a", "b", "c", "e"] * 20
    assert not list(own_hub_cache.rglob("*.arrow"))
    (tmp_path / "data").rename(tmp_path / "moved")
    assert opened(f"{tmp_path / 'moved'}/").identity == source.identity


def _unlike(folder: Path) -> None:
    _other_parquet(jpg=PNGS, text=WORDS)(folder)
    pq.write_table(pa.table({"jpg": PNGS, "caption": WORDS}), folder / "a.parquet")


def _torn(folder: Path) -> None:
    _other_parquet(jpg=PNGS, text=WORDS)(folder)
    (folder / "part.parquet").write_bytes((folder / "part.parquet").read_bytes()[:200])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_other_parquet(text=["a"]), "has the columns text; wanted are one of pictures"),
        (_other_parquet(URL=["http://x"], TEXT=["a"]), "columns URL, TEXT; .*img2dataset makes shards"),
        (_other_parquet(jpg=PNGS, label=[1] * 5), "has the columns jpg, label; wanted .* text or caption or prompt"),
        (_other_parquet(jpg=PNGS, caption=[["a"]] * 5), "has the columns jpg, caption; wanted"),
        (_other_parquet(jpg=pa.array([], pa.binary()), text=pa.array([], pa.string())), "is empty"),
        (_unlike, r"a.parquet has no column text, which part.parquet has; it has jpg, caption"),
        (_torn, "part.parquet is no whole parquet file"),
        (lambda folder: datasets.DatasetDict(test=_table()).save_to_disk(folder), "has no split train; it has test"),
        (lambda folder: datasets.Dataset.from_dict({"a": ["x"]}).save_to_disk(folder), "has the columns a; wanted"),
        (lambda folder: (folder.mkdir(), (folder / "state.json").write_text("{}")), "cannot be read as a folder of"),
    ],
)
def test_a_table_that_will_not_do_is_refused(make, message: str, tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_split_alone_is_told(tmp_path: Path) -> None:
    _parquet(tmp_path)
    for path in (tmp_path / "data").glob("train-*"):
        path.unlink()
    with pytest.raises(UserError, match="has no split train; it has test"):
        opened(tmp_path)


def test_a_dataset_that_cannot_be_had_is_named() -> None:
    with pytest.raises(UserError, match="'nobody/nothing' cannot be had"):
        opened("hf:nobody/nothing")
