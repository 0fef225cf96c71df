from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from distill.common.errors import UserError
from distill.data.pictures import PictureSource, open_source
from distill.data.samples import BadSample
from distill.models.families import MINI_FAMILY
from tests.distill.pictures import png, save_tar


def opened(spec: object) -> PictureSource:
    source = open_source(str(spec), MINI_FAMILY, 0)
    assert isinstance(source, PictureSource)
    return source


def test_webdataset_shards_are_read(tmp_path: Path) -> None:
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"data-{shard}.tar")) as writer:
            for i in range(3):
                picture = Image.new("RGB", (160, 160), "red")
                writer.write({"__key__": f"k{shard}{i}", "png": picture, "txt": f"caption {shard}{i}", "json": {}})
    source = opened(tmp_path / "data-{0..1}.tar")
    assert [source.read(i).caption for i in range(6)] == [f"caption {shard}{i}" for shard in range(2) for i in range(3)]
    assert [source.read(i).key for i in (5, 0)] == ["data-1.tar/k12", "data-0.tar/k00"]
    for spelling in ("*.tar", "data-?.tar", "./data-{0,1}.tar", ""):
        assert opened(tmp_path / spelling).identity == source.identity
    os.utime(tmp_path / "data-1.tar", ns=(0, 0))
    assert opened(tmp_path / "data-{0..1}.tar").identity != source.identity


MAC = [(name, b"\0\5\26\7") for name in ("._a.png", "__MACOSX/a.png", "./.DS_Store", "x/._b.jpg", ".hidden/c.png")]
PNG, TORN = png(), b"no picture at all"


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ([*MAC, ("./a.PNG", PNG), ("a.txt", b"\xef\xbb\xbfa\n")], [("a", "a")]),
        ([("x/a.png", PNG), ("x/a.caption", b"a")], [("x/a", "a")]),
        ([("a.png", PNG), ("a.json", json.dumps({"id": 1, "caption": "a"}).encode())], [("a", "a")]),
        ([("a.json", b'{"text": "no"}'), ("a.caption", b"no"), ("a.txt", b"a"), ("a.png", PNG)], [("a", "a")]),
        ([("a.png", PNG), ("b.png", PNG), ("a.txt", b"a"), ("b.txt", b"b")], [("a", "a"), ("b", "b")]),
        ([("a.png", PNG), ("a.seg.png", TORN), ("a.txt", b"a")], [("a", "a")]),
        ([("a.png", PNG), ("a.txt", b"a"), ("a.png", PNG), ("a.txt", b"b")], [("a", "a"), ("a (2)", "b")]),
    ],
)
def test_samples_are_made_of_the_files_of_a_key(members, found: list[tuple[str, str]], tmp_path: Path) -> None:
    save_tar(tmp_path / "data.tar", members)
    source = opened(tmp_path / "data.tar")
    samples = [source.read(index) for index in range(len(source))]
    assert [(sample.key, sample.caption) for sample in samples] == [(f"data.tar/{key}", text) for key, text in found]


def test_repeated_keys_are_told_and_not_merged(tmp_path: Path) -> None:
    sample = [("a.png", PNG), ("a.txt", b"a")]
    save_tar(tmp_path / "0" / "data.tar", [*sample, *sample, ("c.png", PNG)])
    save_tar(tmp_path / "1" / "data.tar", [*sample, ("b.heic", PNG), ("b.txt", b"b")])
    source = opened(tmp_path)
    heic, repeated = source.notes
    assert "1 .heic" in heic
    assert repeated.startswith("warning: 2 keys stand more than once in the shards (0/data.tar/a, 1/data.tar/a);")
    keys = [source.read(index).key for index in (0, 1, 3)]
    assert keys == ["0/data.tar/a", "0/data.tar/a (2)", "1/data.tar/a"]


def test_a_bad_sample_of_a_shard_is_named(tmp_path: Path) -> None:
    latin = "café".encode("latin-1")
    files = [("torn.jpg", TORN), ("torn.txt", b"a"), ("mute.png", PNG), ("blind.txt", b"a"), ("odd.png", PNG)]
    save_tar(
        tmp_path / "data.tar",
        [
            *files,
            ("odd.txt", latin),
            ("list.png", PNG),
            ("list.json", b"[1]"),
            ("several.png", PNG),
            ("several.json", b'{"caption": ["a", "b"]}'),
        ],
    )
    source = opened(tmp_path / "data.tar")
    reasons = {"torn": "identify", "mute": "empty caption", "blind": "no picture", "odd": "UTF-8", "list": "no object"}
    reasons["several"] = r'caption is \["a", "b"\], a text is needed'
    for index, (key, reason) in enumerate(reasons.items()):
        with pytest.raises(BadSample, match=rf"data.tar/{key}: .*{reason}"):
            source.read(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "no whole, uncompressed tar file"),
        (lambda path: path.write_bytes(path.read_bytes()[:1100]), "no whole, uncompressed tar file"),
        (lambda path: path.write_bytes(path.read_bytes()[:1024] + b"x" * 512 + bytes(9216)), "bad header at byte 1024"),
        (lambda path: path.write_bytes(b""), "no whole, uncompressed tar file"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: save_tar(path, []), "holds no samples"),
        (lambda path: save_tar(path, MAC), "holds no samples"),
        (lambda path: save_tar(path, [("a.png", PNG)]), "holds no captions"),
        (lambda path: save_tar(path, [("a.mp4", PNG), ("a.txt", b"a")]), "holds no pictures; its files are .mp4, .txt"),
        (lambda path: save_tar(path, [("a.png", PNG)], "w:gz"), "is compressed, .*uncompress it first"),
        (lambda path: save_tar(path, [("a.png", PNG)], "w:xz"), "is compressed, .*uncompress it first"),
    ],
)
def test_an_unusable_shard_is_refused_at_once(change, message: str, tmp_path: Path) -> None:
    save_tar(tmp_path / "data.tar", [("a.png", PNG), ("a.txt", b"a caption")])
    change(tmp_path / "data.tar")
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "data.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("data-{000..009}.tar", r"names 10 shards, of which 9 are not there, first .*data-000\.tar"),
        ("other-*.tar", r"no such file: .*other-\*\.tar"),
        ("data-{000..009.tar", "its braces do not close"),
        ("data-{0..9999999999999}.tar", "names more than 1000000 shards"),
        ("data-{0..1999}-{0..1999}.tar", "names more than 1000000 shards"),
        ("data.tar.gz", "no such file"),
    ],
)
def test_a_pattern_without_a_match_is_told(pattern: str, message: str, tmp_path: Path) -> None:
    save_tar(tmp_path / "data-004.tar", [("a.png", PNG), ("a.txt", b"a")])
    with pytest.raises(UserError, match=message):
        opened(tmp_path / pattern)
