"""An engine by the bundle's manifest alone: found, checked, opened by the file of its flavor."""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any


def open_engine(bundle: Path, manifest: dict, component: str, flavor: str, size: str) -> tuple[Any, dict]:
    """The newest engine with weights that serves the size here. Every file's hash is compared before the first is opened."""
    runtime = import_module(f"run_{flavor.removesuffix('-rtx')}")
    engines = [e for e in manifest["engines"] if (e["component"], e["flavor"]) == (component, flavor)]
    whole = [e for e in reversed(engines) if size in e["resolutions"] and not e["options"].get("strip")]
    if not (engine := next(filter(runtime.runs_here, whole), None)):
        there = [(e["resolutions"], e["compute_capabilities"], e["flavor_version"], e["options"]) for e in engines]
        raise SystemExit(f"no {component} ({flavor}) serves {size}, has its weights and runs here; there are {there}")
    for file in engine["files"]:
        if hashlib.sha256((bundle / file["path"]).read_bytes()).hexdigest() != file["sha256"]:
            raise SystemExit(f"{file['path']} is not what the manifest says")
    return runtime.Engine(bundle, engine), engine
