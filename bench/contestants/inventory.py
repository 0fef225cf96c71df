"""What a model left on disk on its way: checkpoint, ONNX folder, bundle. Each folder is told by what it holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from distill.checkpoints.tensors import read_safetensors_header
from distill.common.errors import UserError, unknown
from distill.common.files import read_json

ENGINE_FACTS = (
    "component", "flavor", "flavor_version", "layout", "gpus", "compute_capabilities", "precision", "resolutions",
    "batches", "weights_bytes", "onnx_sha256", "weights_sha256", "key",
)  # fmt: skip
DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
MAX_POINTS = 240  # a curve on a page needs no more


def kind_of(folder: Path) -> str:
    """`bundle`, `onnx` or `checkpoint`. Raises UserError for anything else."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; --artifacts takes checkpoint, ONNX and bundle folders as NAME=FOLDER")
    if (folder / "manifest.json").is_file():
        return "bundle"
    if (folder / "unet" / "model.onnx").is_file():
        return "onnx"
    if (folder / "unet" / "config.json").is_file():
        return "checkpoint"
    raise UserError(
        f"{folder} is neither a checkpoint (unet/config.json), an ONNX folder (unet/model.onnx) nor a bundle "
        "(manifest.json)"
    )


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read_optional(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _grouped(terms: dict[str, float]) -> dict[str, float]:
    """Terms by the part of their name before a slash: forty feature terms are one line to a reader."""
    groups: dict[str, float] = {}
    for name, value in terms.items():
        group = name.partition("/")[0]
        groups[group] = groups.get(group, 0.0) + float(value)
    return groups


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The loss curves of a distillation, thinned: [{"stage", "points": [[step, loss, {term: loss}]], "seconds"}].

    Lines that are not whole (a run that was killed) are left out.
    """
    stages: dict[str, list[dict[str, Any]]] = {}
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            stages.setdefault(str(record["stage"]), []).append(
                {"step": int(record["step"]), "loss": float(record["loss"]), "terms": _grouped(record.get("terms", {}))}
                | {"seconds": record.get("seconds")}
            )
        except (ValueError, KeyError, TypeError):
            continue
    curves = []
    for stage, records in stages.items():
        stride = max(1, len(records) // MAX_POINTS)
        kept = records[::stride]
        if kept[-1] is not records[-1]:
            kept.append(records[-1])
        curves.append(
            {
                "stage": stage,
                "steps": records[-1]["step"],
                "seconds": records[-1]["seconds"],
                "points": [[record["step"], record["loss"], record["terms"]] for record in kept],
            }
        )
    return curves


def dtypes(weights: list[Path]) -> str:
    """Of the tensors in these files, the most frequent first: `fp16`, `fp32, fp16`."""
    records = (one for file in weights for one in read_safetensors_header(file).values())
    counts = Counter(DTYPES.get(one.dtype, one.dtype) for one in records)
    return ", ".join(name for name, _ in counts.most_common())


def describe_checkpoint(folder: Path) -> dict[str, Any]:
    weights = list(folder.rglob("*.safetensors"))
    unet = [file for file in weights if file.parent.name == "unet"]
    return {
        "kind": "checkpoint",
        "folder": folder.name,
        "bytes": folder_bytes(folder),
        "weights_bytes": sum(file.stat().st_size for file in weights),
        "unet_bytes": sum(file.stat().st_size for file in unet),
        "dtypes": dtypes(weights),
        "unet_dtypes": dtypes(unet),
        "record": read_optional(folder / "slimxl.json"),
        "losses": read_losses(folder / "losses.jsonl"),
    }


def describe_onnx(folder: Path) -> dict[str, Any]:
    components = {}
    for file in sorted(folder.glob("*/model.onnx")):
        record = read_optional(file.parent / "export.json") or {}
        components[file.parent.name] = {"bytes": folder_bytes(file.parent)} | {
            key: record[key] for key in ("parameters", "seconds", "precision", "sha256") if key in record
        }
    return {
        "kind": "onnx",
        "folder": folder.name,
        "bytes": folder_bytes(folder),
        "components": components,
        "record": read_optional(folder / "slimxl.json"),
    }


def describe_bundle(folder: Path) -> dict[str, Any]:
    """What the verified manifest says of each engine. Reading it takes no runtime and no GPU.

    Raises UserError where the manifest is damaged or of another schema.
    """
    from engines.bundle import read_manifest

    manifest = read_manifest(folder)
    engines = [
        {key: getattr(engine, key) for key in ENGINE_FACTS}
        | {
            "profiles": len(engine.profiles),
            "file": engine.files[0].path,
            "sha256": engine.files[0].sha256,
            "bytes": engine.size_bytes,
            "build_seconds": engine.build.seconds,
            "build_peak_rss_bytes": engine.build.peak_rss_bytes,
            "build_tools": engine.build.tools,
        }
        for engine in manifest.engines
    ]
    return {
        "kind": "bundle",
        "folder": folder.name,
        "bytes": folder_bytes(folder),
        "source": {"name": manifest.source.name, "sha256": manifest.source.sha256},
        "engines": engines,
    }


DESCRIBE = {"checkpoint": describe_checkpoint, "onnx": describe_onnx, "bundle": describe_bundle}


def describe(folder: Path) -> dict[str, Any]:
    """Raises UserError for a folder that is none of the three."""
    return DESCRIBE[kind_of(folder)](folder)


def parse_artifacts(texts: list[str], names: list[str]) -> dict[str, dict[Path, dict[str, Any]]]:
    """`NAME=FOLDER`, any number per name: the description of each folder, by name. Raises UserError, for a damaged folder
    too."""
    found: dict[str, dict[Path, dict[str, Any]]] = {name: {} for name in names}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise UserError(f"artifact {text!r} is not of the form NAME=FOLDER, e.g. vega=out/students/vega")
        if name not in found:
            raise unknown("contestant", name, names)
        found[name][Path(folder)] = describe(Path(folder))
    return found
