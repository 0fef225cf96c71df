"""Whose a folder or a file is: its marker says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from distill.common.errors import UserError
from distill.common.files import clone_file, size_text
from distill.common.ownership import require_apart, require_our_files, require_our_folder, require_writable_file

KEYS = ("seed", "shards")


@pytest.mark.parametrize(
    "names, ours",
    [
        ((), True),
        ((".lock", ".unet.0123abcd.partial/x", "lost+found/"), True),
        (("empty/inside/",), True),
        (("half-made/file",), True),
        (("photo.jpg",), False),
        (("marker.json", "photo.jpg"), True),
        ((".git/config",), False),
    ],
)
def test_a_folder_is_ours_where_its_marker_is(tmp_path: Path, names: tuple[str, ...], ours: bool) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        record = json.dumps({"seed": 0, "shards": 1})
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text(record)
    try:
        require_our_folder(tmp_path, "a cache", ["marker.json"], KEYS, leftovers=("half-made",))
        assert ours
    except UserError as error:
        assert not ours and names[0].split("/")[0] in str(error) and "nothing was touched" in str(error)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"seed": 1}', "[" * 100_000])
def test_a_marker_of_others_is_none_of_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "marker.json").write_text(text)
    with pytest.raises(UserError, match="is not a cache of slimxl"):
        require_our_folder(tmp_path, "a cache", ["marker.json"], KEYS)


def test_files_are_written_over_only_beside_our_marker(tmp_path: Path) -> None:
    names = ("marker.json", "page.html")
    require_our_files(tmp_path / "new", names, names[0], KEYS)
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(UserError, match=r"page\.html was not written by slimxl"):
        require_our_files(tmp_path, names, names[0], KEYS)
    (tmp_path / "marker.json").write_text(json.dumps({"seed": 0, "shards": 1}))
    require_our_files(tmp_path, names, names[0], KEYS)
    with pytest.raises(UserError, match="is a file"):
        require_our_files(tmp_path / "page.html", names, names[0], KEYS)


def test_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    require_writable_file(path, KEYS)
    path.touch()
    require_writable_file(path, KEYS)
    path.write_text(json.dumps({"seed": 0, "shards": 1}))
    require_writable_file(path, KEYS)
    path.write_text("{}")
    with pytest.raises(UserError, match="did not write; it was not touched"):
        require_writable_file(path, KEYS)
    with pytest.raises(UserError, match="is a folder"):
        require_writable_file(tmp_path, KEYS)
    with pytest.raises(UserError, match="no plain file"):
        require_writable_file(Path(os.devnull), KEYS)


def test_folders_apart(tmp_path: Path) -> None:
    require_apart(tmp_path / "a", tmp_path / "ab", ("--out", "--onnx"))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for one, other in (("a", "a"), ("a/b", "a"), ("a", "a/b"), ("link/b", "a")):
        with pytest.raises(UserError, match="choose another --out"):
            require_apart(tmp_path / one, tmp_path / other, ("--out", "--onnx"))


def test_a_clone_is_a_file_of_its_own(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(1 << 20))
    clone_file(source, target)
    assert target.read_bytes() == source.read_bytes() and target.stat().st_nlink == 1
    target.write_bytes(b"changed")
    assert source.stat().st_size == 1 << 20


def test_sizes_are_never_nothing() -> None:
    texts = [size_text(count) for count in (0, 1, 999, 1000, 14_200_000, 999_999, 1_510_000_000, 5_182_000_000_000)]
    assert texts == ["0 B", "1 B", "999 B", "1 kB", "14.2 MB", "1 MB", "1.51 GB", "5,182 GB"]
