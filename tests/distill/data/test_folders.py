"""Folders as they come: from Macs and Windows, from Hugging Face, from other trainers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, features

from distill.common.errors import UserError
from distill.data.pictures import PictureSource, open_source
from distill.data.samples import BadSample
from distill.models.families import MINI_FAMILY
from tests.distill.pictures import png, save_picture, save_tar

pytestmark = pytest.mark.usefixtures("own_hub_cache")


def opened(folder: Path) -> PictureSource:
    source = open_source(str(folder), MINI_FAMILY, 0)
    assert isinstance(source, PictureSource)
    return source


def contents(folder: Path) -> list[tuple[str, str]]:
    """The key and caption of each sample of a folder, in order."""
    source = opened(folder)
    samples = [source.read(index) for index in range(len(source))]
    return [(sample.key, sample.caption) for sample in samples]


def _pictures(folder: Path, count: int = 2, caption: str | None = None, kind: str = "png") -> None:
    for i in range(count):
        save_picture(folder, str(i), (160, 160), caption, kind)


def _copied_from_a_mac(folder: Path) -> None:
    _pictures(folder, caption="a")
    for name in ("._0.png", ".hidden.png", "__MACOSX/0.png", ".thumbs/0.png", "0.png.part"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\26\7")


def _metadata(text: str, name: str = "metadata.jsonl", encoding: str = "utf-8") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _pictures((folder / name).parent)
        (folder / name).write_bytes(text.encode(encoding))

    return make


def _lines(column: str, *captions: object) -> str:
    entries = [{"file_name": f"{i}.png", column: caption} for i, caption in enumerate(captions)]
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def _captions_of_other_trainers(folder: Path) -> None:
    _pictures(folder)
    (folder / "0.caption").write_text("a\n")
    (folder / "1.txt").write_bytes("b".encode("utf-8-sig"))
    (folder / "1.caption").write_text("not this")


def _from_windows(folder: Path) -> None:
    _pictures(folder, kind="PNG")
    (folder / "0.TXT").write_text("a")
    (folder / "1.Caption").write_text("b")


def _put_together_by_links(folder: Path) -> None:
    _pictures(folder.with_name("elsewhere"), 1, "a")
    folder.mkdir()
    for name in ("here", "there"):
        (folder / name).symlink_to(folder.with_name("elsewhere"))
    (folder.with_name("elsewhere") / "back").symlink_to(folder)


def _splits(folder: Path) -> None:
    _pictures(folder / "train", caption="a")
    _pictures(folder / "test", caption="not this")


def _classes(folder: Path) -> None:
    for name in ("train", "bus"):
        _pictures(folder / name, 1, name)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (_copied_from_a_mac, [("0.png", "a"), ("1.png", "a")]),
        (_captions_of_other_trainers, [("0.png", "a"), ("1.png", "b")]),
        (_from_windows, [("0.PNG", "a"), ("1.PNG", "b")]),
        (_put_together_by_links, [("here/0.png", "a")]),
        (_splits, [("0.png", "a"), ("1.png", "a")]),
        (_classes, [("bus/0.png", "bus"), ("train/0.png", "train")]),
        (_metadata(_lines("text", "a", "b")), [("0.png", "a"), ("1.png", "b")]),
        (_metadata(_lines("caption", "a\u2028b\x85c", "d")), [("0.png", "a\u2028b\x85c"), ("1.png", "d")]),
        (_metadata(_lines("prompt", "é", "b"), encoding="utf-8-sig"), [("0.png", "é"), ("1.png", "b")]),
        (_metadata(_lines("text", "a"), "train/metadata.jsonl"), [("0.png", "a")]),
        (_metadata(_lines("text", "a"), "data/metadata.jsonl"), [("data/0.png", "a")]),
        (_metadata('{"file_name": "train/0.png", "text": "a"}'), None),
        (_metadata('file_name,text\r\n0.png,"a, b"\r\n', "metadata.csv", "utf-8-sig"), [("0.png", "a, b")]),
        (_metadata("file_name,id,Caption\n0.png,7,3\n", "train/metadata.csv"), [("0.png", "3")]),
    ],
)
def test_what_a_folder_holds_is_found(make, found: list[tuple[str, str]] | None, tmp_path: Path) -> None:
    make(tmp_path / "data")
    if found is None:  # the metadata of a folder lists pictures of its train/
        _pictures(tmp_path / "data" / "train", 1)
        found = [("train/0.png", "a")]
    assert contents(tmp_path / "data") == found


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "holds no pictures: it is empty"),
        (_pictures, "holds no captions: give NAME.txt or NAME.caption beside each picture, or metadata.jsonl"),
        (lambda folder: None, "no folder and no known form"),
        (lambda folder: folder.write_text(""), "is a file; give the folder that holds it"),
        (lambda folder: save_tar(folder / "a.tar.gz", []), "it holds 1 .gz; unpack them first"),
        (lambda folder: save_tar(folder / "a.heic", []), "it holds 1 .heic; convert them to jpg or png"),
        (_metadata('{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text":\n'), r"metadata.jsonl .*row 1"),
        (_metadata(_lines("text", "a", ["b"])), r"metadata.jsonl cannot be read .*/text.*row 1"),
        (_metadata(_lines("text", "a").replace("file_name", "name")), "metadata.jsonl cannot be read .*file_name"),
        (_metadata('{"file_name": "0.png"}\n'), "metadata.jsonl has the columns image; wanted"),
        (_metadata(_lines("text", "café"), encoding="latin-1"), "metadata.jsonl is not in UTF-8"),
        (_metadata(_lines("text", "a"), encoding="utf-16"), "metadata.jsonl is not in UTF-8"),
        (_metadata("file_name,text\n0.png,café\n", "metadata.csv", "latin-1"), "metadata.csv is not in UTF-8"),
        (_metadata("file_name;text\n0.png;a\n", "metadata.csv"), "metadata.csv cannot be read .*file_name"),
        (_metadata("file_name,text\n0.png,a, b\n", "metadata.csv"), 'metadata.csv .* put captions with commas in "'),
        (_metadata("", "metadata.csv"), "metadata.csv cannot be read"),
        (_metadata("", "metadata.jsonl"), "metadata.jsonl cannot be read"),
        (_metadata("file_name,text\n", "metadata.csv"), "metadata.csv"),
        (_metadata('{"file_name": "../x.png", "text": "a"}\n'), "metadata.jsonl cannot be read .*relative path"),
    ],
)
def test_an_unusable_folder_is_refused_at_once(make, message: str, tmp_path: Path) -> None:
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_two_kinds_of_metadata_are_one_too_many(tmp_path: Path) -> None:
    for make in (_metadata("file_name,text\n0.png,a\n", "metadata.csv"), _metadata(_lines("text", "b"))):
        make(tmp_path)
    with pytest.raises(UserError, match=r"metadata of several kinds \(metadata.jsonl, metadata.csv\); keep one"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "kind", ["jpg", "JPEG", "jfif", "webp", "gif", "bmp", "tiff", "tif", "ppm", "tga", "avif", "jp2"]
)
def test_pictures_of_many_formats_are_read(kind: str, tmp_path: Path) -> None:
    if (optional := {"avif": "avif", "jp2": "jpg_2000"}.get(kind)) and not features.check(optional):
        pytest.skip(f"this Pillow has no {kind}")
    _pictures(tmp_path / "data", 1, "a", kind)
    assert contents(tmp_path / "data") == [(f"0.{kind}", "a")]


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    _pictures(tmp_path, 1, "a")
    for name in ("a.heic", "b.HEIC", "c.psd", "._d.heic", "notes.md"):
        (tmp_path / name).write_bytes(b"")
    save_tar(tmp_path / "old.tar", [])
    heic, tar = opened(tmp_path).notes
    assert heic.startswith("left out, in formats that are not read: 2 .heic, 1 .psd; convert")
    assert tar == "left out, beside pictures with captions of their own: old.tar (1 files)"


def test_whatever_is_wrong_with_a_picture_makes_it_a_bad_sample_with_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    save_picture(folder, "cut", (150, 150), "a thing")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    save_picture(folder, "latin", (150, 150), "")
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "no.jpg").write_text("not a picture")
    (folder / "no.txt").write_text("a caption")
    os.mkfifo(folder / "pipe.png")
    (folder / "pipe.txt").write_text("a caption")
    save_picture(folder, "silent", (150, 150), None)
    (folder / "silent.png").rename(folder / os.fsdecode(b"silent\xe9.png"))
    source = opened(folder)
    reasons = {"cut.png": "truncated|broken", "latin.png": "UTF-8", "no.jpg": "identify", "pipe.png": "no plain file"}
    reasons[r"silent\\udce9.png"] = r"same name with \.txt"
    for index, (name, reason) in enumerate(reasons.items()):
        with pytest.raises(BadSample, match=rf"{name}: .*({reason})"):
            source.read(index)


def test_rows_of_metadata_without_a_picture_or_caption_are_bad_samples(tmp_path: Path) -> None:
    _metadata(_lines("text", "a", None, "c") + '{"text": "d"}\n')(tmp_path)
    source = opened(tmp_path)
    for index, reason in enumerate(["1.png: empty caption", "2.png: FileNotFoundError", "row 3: no picture"], 1):
        with pytest.raises(BadSample, match=reason):
            source.read(index)


def _with_metadata(folder: Path) -> None:
    _metadata(_lines("text", "a", "b"))(folder)


def _with_shards(folder: Path) -> None:
    save_tar(folder / "a.tar", [("0.png", png()), ("0.txt", b"a")])


@pytest.mark.parametrize("make", [_copied_from_a_mac, _with_metadata, _with_shards])
def test_data_are_known_by_what_they_are_and_not_by_how_they_are_spelled(make, tmp_path: Path, monkeypatch) -> None:
    make(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    spellings = ["data", "./data", "data/", f"{tmp_path}/data", f"{tmp_path}/data/../data/"]
    identities = [open_source(spelling, MINI_FAMILY, 0).identity for spelling in spellings]
    assert all(identity == identities[0] for identity in identities)
    (tmp_path / "data").rename(tmp_path / "moved")
    assert opened(tmp_path / "moved").identity == identities[0]
    changed = next(path for path in (tmp_path / "moved").iterdir() if path.name in ("0.png", "a.tar"))
    changed.write_bytes(changed.read_bytes() + bytes(10240))
    assert opened(tmp_path / "moved").identity != identities[0]


def test_a_changed_caption_makes_other_data(tmp_path: Path) -> None:
    _pictures(tmp_path, caption="a")
    before = opened(tmp_path).identity
    (tmp_path / "0.txt").write_text("another")
    assert opened(tmp_path).identity != before


def test_only_photographs_are_opened(tmp_path: Path) -> None:
    """A PostScript file would be run by Ghostscript."""
    save_picture(tmp_path, "a", (150, 150), "a")
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 150 150\n%%EndComments\nshowpage\n")
    Image.init()
    with pytest.raises(BadSample, match="cannot identify"):
        opened(tmp_path).read(0)
