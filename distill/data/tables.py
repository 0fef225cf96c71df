"""Tables of captioned pictures: what the `datasets` library knows (parquet, arrow, the hub, imagefolder's metadata).

The library decides which files belong to the split `train`, and what their columns are. Its tables of paths and its
saved arrow files are read where they lie. Parquet and tar files are not copied into arrow files first, as the library
does before it gives rows by index: parquet is read here a row group at a time, tar by shards.py.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from PIL import Image

from distill.common.errors import UserError
from distill.common.files import sha256_file
from distill.data.rows import CAPTION_COLUMNS, Found, Row, open_picture, printable, stamp
from distill.data.samples import BadSample
from distill.data.shards import open_shards

if TYPE_CHECKING:
    import datasets

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def is_saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(folder: Path) -> Found:
    """What `save_to_disk` wrote, of a dict of splits its `train`, read where it lies."""
    datasets = _library()
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # its readers raise anything
        raise UserError(f"{folder} cannot be read as a folder of save_to_disk ({_reason(error)})") from None
    if isinstance(saved, datasets.DatasetDict):
        _require_train(saved, str(folder))
        saved = saved["train"]
    files = [Path(file["filename"]) for file in saved.cache_files]
    return Found(ArrowRows(saved, str(folder)), ["saved", _stamps(files)])


def open_metadata(files: Sequence[Path], folder: Path) -> Found:
    """The pictures that `files` list: metadata.jsonl, .csv or .parquet with file_name and a column of captions, as
    https://huggingface.co/docs/datasets/image_dataset says."""
    datasets = _library()
    if len({file.suffix for file in files}) > 1:
        raise UserError(
            f"{folder} holds metadata of several kinds ({', '.join(f.name for f in files)}); keep one of them"
        )
    named = files[0] if len(files) == 1 else folder
    root = Path(os.path.abspath(folder))  # noqa: PTH100  # as the library takes `..` out of names
    try:
        table = datasets.load_dataset(
            "imagefolder", data_files={"train": [str(root / file.relative_to(folder)) for file in files]}, split="train"
        )
    except Exception as error:  # its builders raise anything
        for file in files:
            _require_utf8(file)
        raise UserError(
            f"{named} cannot be read ({_reason(error)}); wanted are file_name and one of {', '.join(CAPTION_COLUMNS)}, "
            'e.g. {"file_name": "a.jpg", "text": "its caption"} on each line of a metadata.jsonl'
        ) from None
    if "__index_level_0__" in table.features:
        raise UserError(f'{named} has lines of more values than columns; put captions with commas in "quotes"')
    rows = ArrowRows(table, str(named), root)
    digest = hashlib.sha256("".join(map(sha256_file, files)).encode())
    for part in rows.table.iter(batch_size=1000):
        for stored in part[rows.picture]:
            digest.update(repr(stored and (rows.name(stored), stamp(Path(stored["path"])))).encode())
    return Found(rows, ["metadata", digest.hexdigest()])


def open_dataset(name: str) -> Found:
    """The split `train` of a dataset on the hub, or of a local folder as the library understands it."""
    datasets = _library()
    try:
        builder = datasets.load_dataset_builder(name)
        files = builder.config.data_files
        if files is not None:
            _require_train(files, name)
        kind, wanted = builder.name, list(files["train"]) if files is not None else []
        if kind in ("parquet", "webdataset"):
            local = [Path(file) for file in datasets.DownloadManager().download(wanted)]
        else:
            table = datasets.load_dataset(name, split="train")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the dataset {name!r} cannot be had ({_reason(error)})") from None
    if kind == "webdataset":
        return open_shards(local, f"the dataset {name!r}")
    rows = ParquetRows(local, name) if kind == "parquet" else ArrowRows(table, name)
    if Path(name).is_dir():
        return Found(rows, [kind, _stamps([Path(file) for file in wanted])])
    return Found(rows, [kind, wanted or table._fingerprint])  # the hub's names of files state the commit


class ArrowRows:
    """Rows of a table of the library, pictures left undecoded until they are opened."""

    def __init__(self, table: datasets.Dataset, place: str, folder: Path | None = None) -> None:
        """Pictures of files below `folder` are named from there. Raises UserError where there is none, or no caption."""
        self.picture, self.column = find_columns(table.features, place)
        if not len(table):
            raise UserError(f"{place} is empty")
        wanted = table.select_columns([self.picture, self.column])  # another column may not even be readable
        if isinstance(table.features[self.picture], _library().Image):
            wanted = wanted.cast_column(self.picture, _library().Image(decode=False))
        self.table: Any = wanted
        self.folder = folder

    def __len__(self) -> int:
        return len(self.table)

    def name(self, stored: Mapping[str, Any]) -> str:
        """Of a picture's file, from the folder on."""
        return printable(Path(stored["path"]).relative_to(str(self.folder)).as_posix())

    def __getitem__(self, index: int) -> Row:
        row = self.table[index]
        key = self.name(row[self.picture]) if self.folder and row[self.picture] else f"row {index}"
        return Row(key, partial(_open, key, row[self.picture]), partial(_caption, row[self.column]))


class ParquetRows:
    """Rows of parquet files, read where they lie: the two row groups used last are held in memory."""

    def __init__(self, files: Sequence[Path], place: str) -> None:
        """Raises UserError for a file that cannot be read, where there is no row or no wanted column, and where the
        files have unlike columns."""
        import pyarrow.parquet as pq

        datasets = _library()
        self.groups: list[tuple[Path, int]] = []
        counts, names = [], {}
        for file in files:
            try:
                metadata = pq.read_metadata(file)
                schema = pq.read_schema(file)
            except Exception as error:
                raise UserError(f"{file} is no whole parquet file ({_reason(error)})") from None
            names[file] = schema.names
            self.groups += [(file, group) for group in range(metadata.num_row_groups)]
            counts += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = [0, *accumulate(counts)]
        self.columns = find_columns(datasets.Features.from_arrow_schema(schema), place)
        for file, held in names.items():
            if lacking := [column for column in self.columns if column not in held]:
                raise UserError(
                    f"{file} has no column {lacking[0]}, which {files[-1].name} has; it has {', '.join(held)}: give files "
                    "of the same columns"
                )
        if not len(self):
            raise UserError(f"{place} is empty")
        self.lock = Lock()
        self.group = lru_cache(maxsize=2)(self._read_group)

    def _read_group(self, number: int) -> Any:
        import pyarrow.parquet as pq

        file, group = self.groups[number]
        with pq.ParquetFile(file) as parquet:
            return parquet.read_row_group(group, columns=list(self.columns))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Row:
        number = bisect_right(self.starts, index) - 1
        with self.lock:  # so that no two threads read the same group
            table = self.group(number)
        picture, caption = (table[column][index - self.starts[number]].as_py() for column in self.columns)
        key = f"row {index}"
        return Row(key, partial(_open, key, picture), partial(_caption, caption))


def find_columns(features: Any, place: str) -> tuple[str, str]:
    """Of a table's columns that of pictures (of type Image, else encoded as bytes) and that of captions.

    Raises UserError that says what was found.
    """
    datasets = _library()
    encoded = datasets.Value("binary"), datasets.Value("large_binary")
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    pictures += [
        name for name, kind in features.items() if (kind.get("bytes") if isinstance(kind, dict) else kind) in encoded
    ]
    names = {name.lower(): name for name, kind in reversed(features.items()) if isinstance(kind, datasets.Value)}
    captions = [names[column] for column in CAPTION_COLUMNS if column in names]
    if pictures and captions:
        return pictures[0], captions[0]
    found = (
        f"{place} has the columns {', '.join(features)}; wanted are one of pictures (type Image, or their bytes) and "
    )
    found += f"one of captions, called {' or '.join(CAPTION_COLUMNS)}"
    if not pictures and {"url", "image_url"} & names.keys():
        found += "; pictures that are named by URL are downloaded first: img2dataset makes shards that are read here"
    raise UserError(found)


def _library() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _require_train(splits: Any, place: str) -> None:
    if "train" not in splits:
        raise UserError(f"{place} has no split train; it has {', '.join(map(str, splits))}")


def _require_utf8(file: Path) -> None:
    if file.suffix == ".parquet":
        return
    with file.open(encoding="utf-8-sig") as text:
        try:
            while text.read(1 << 20):
                pass
        except UnicodeDecodeError:
            raise UserError(f"{file} is not in UTF-8; save it as UTF-8") from None


def _reason(error: BaseException) -> str:
    """An error's first line; the library hides the true one behind its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _stamps(files: Sequence[Path]) -> list[Any]:
    return [(file.name, stamp(file)) for file in files]


def _open(key: str, stored: Any) -> Image.Image:
    """A picture as a table holds it: its bytes, or {bytes, path}."""
    data = stored["bytes"] if isinstance(stored, dict) else stored
    if data:
        return open_picture(BytesIO(data))
    if stored and stored.get("path"):
        return open_picture(Path(stored["path"]))
    raise BadSample(f"{key}: no picture")


def _caption(stored: Any) -> str:
    return "" if stored is None else str(stored)
