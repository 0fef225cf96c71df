"""What an ONNX folder says of itself, read and checked: slimxl.json of the whole, export.json of each component."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.common.errors import UserError
from distill.common.files import read_object


def read_about(folder: Path) -> dict[str, Any]:
    """slimxl.json of an ONNX folder. Raises UserError where there is none, or a student's, and where it is damaged."""
    path = folder / "slimxl.json"
    about = read_object(path) if path.is_file() else {}
    if not {"source", "resolutions"} <= about.keys():  # a student's has no resolutions
        raise UserError(f"{folder} is no ONNX folder that python -m export onnx has finished: {path} does not say so")
    source, sizes = about["source"], about["resolutions"]
    stated = isinstance(source, dict) and all(isinstance(source.get(name), str) for name in ("name", "sha256"))
    listed = isinstance(sizes, list) and sizes and all(isinstance(size, str) for size in sizes)
    if not stated or not listed or about.get("precision") not in ("fp16", "fp32"):
        raise UserError(
            f"{path} is damaged: it does not say what it was made from, at which precision and resolutions; export again"
        )
    return about


def read_record(folder: Path) -> dict[str, Any]:
    """export.json of a component. Raises UserError where it is damaged."""
    if not (folder / "export.json").is_file():
        raise UserError(f"{folder} has no export.json, which says what its files are; export {folder.name} again")
    record = read_object(folder / "export.json")
    tables: list[Any] = [record.get(name) for name in ("bytes", "sha256", "graphs")]
    sizes, hashes, graphs = tables
    whole = all(isinstance(table, dict) and all(map(_is_file_name, table)) for table in (sizes, hashes))
    if (
        not whole
        or not all(type(size) is int for size in sizes.values())
        or not {"model.onnx"} <= hashes.keys() & sizes.keys()
    ):
        raise UserError(
            f"{folder / 'export.json'} is damaged: it does not say what files there are; export {folder.name} again"
        )
    if graphs is not None and not (isinstance(graphs, dict) and all(file in list(hashes) for file in graphs.values())):
        raise UserError(
            f"{folder / 'export.json'} is damaged: its graphs are no table of its files; export {folder.name} again"
        )
    return record


def _is_file_name(name: str) -> bool:
    return Path(name).name == name
