"""An engine by the bundle's manifest alone: found, checked, opened by the file of its flavor."""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any


def open_engine(bundle: Path, manifest: dict, component: str, flavor: str, size: str) -> tuple[Any, dict]:
    """The engine that serves the size. Every file's hash is compared before the first is opened."""
    engines = [e for e in manifest["engines"] if (e["component"], e["flavor"]) == (component, flavor)]
    if not (engine := next((e for e in engines if size in e["resolutions"]), None)):
        raise SystemExit(f"{component} ({flavor}) has no {size}: {[s for e in engines for s in e['resolutions']]}")
    for file in engine["files"]:
        if hashlib.sha256((bundle / file["path"]).read_bytes()).hexdigest() != file["sha256"]:
            raise SystemExit(f"{file['path']} is not what the manifest says")
    return import_module(f"plan_{flavor.removesuffix('-rtx')}").Plan(bundle, engine), engine
