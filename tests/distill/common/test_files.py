from __future__ import annotations

from pathlib import Path

from distill.common.files import remove_leftovers, replacing


def test_what_a_killed_writer_left_is_found_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / ".xl_[v9].0a1b2c3d.partial").mkdir()
    (tmp_path / ".xl_v.0a1b2c3d.partial").mkdir()
    remove_leftovers(tmp_path, "xl_[v9]")
    assert [path.name for path in tmp_path.iterdir()] == [".xl_v.0a1b2c3d.partial"]


def test_a_link_to_a_folder_is_replaced_and_its_folder_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with replacing(tmp_path / "out") as temporary:
        temporary.mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere" / "kept").exists()
