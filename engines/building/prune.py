"""Makes a bundle smaller: removes engines that are not wanted, and what builds have left that its manifest does not name."""

from __future__ import annotations

from pathlib import Path

from distill.common.errors import UserError, unknown
from distill.common.files import size_text
from engines.building.contents import bundle_lock, remove_strays
from engines.building.reports import console
from engines.bundle import Engine, Manifest, read_manifest, write_manifest
from engines.flavors import FLAVORS
from engines.gpus import GPUS, version_tuple
from export.components import TEXT_ENCODERS


def _wanted(engine: Engine, gpus: list[str], flavors: list[str], resolutions: list[str]) -> bool:
    """Whether all three lists name what the engine is for; an empty list names everything. An engine for any GPU, or of a
    component without sizes, is always named."""
    by_gpu = not gpus or any(engine.serves(GPUS[name].compute_capability) for name in gpus)
    by_flavor = not flavors or engine.flavor in flavors
    by_size = not resolutions or engine.component in TEXT_ENCODERS or bool(set(resolutions) & set(engine.resolutions))
    return by_gpu and by_flavor and by_size


def _newest(engines: list[Engine]) -> list[Engine]:
    """Of engines that serve the same, keeps the one built by the newest version, of several by that version the last."""
    same = {"component", "flavor", "layout", "compute_capabilities", "precision", "profiles", "options"}
    by_version = sorted(
        engines, key=lambda engine: version_tuple(engine.flavor_version)
    )  # stable: the oldest build first
    newest = {engine.model_dump_json(include=same): engine.key for engine in by_version}
    return [engine for engine in engines if engine.key in newest.values()]


def prune_bundle(
    bundle: Path,
    gpus: list[str],
    flavors: list[str],
    resolutions: list[str],
    newest: bool = False,
    dry_run: bool = False,
) -> int:
    """Writes the manifest first and deletes files after, so that a killed prune leaves a sound bundle.

    Raises UserError for an unknown GPU, flavor or resolution, and where nothing would be left.
    """
    for name in gpus:
        if name not in GPUS:
            raise unknown("GPU", name, GPUS)
    for name in flavors:
        if name not in FLAVORS:
            raise unknown("flavor", name, FLAVORS)
    manifest = read_manifest(bundle)
    known = {text for engine in manifest.engines for text in engine.resolutions}
    for text in resolutions:
        if text not in known:
            raise unknown("resolution", text, known)
    with bundle_lock(bundle):
        manifest = read_manifest(bundle)
        kept = [engine for engine in manifest.engines if _wanted(engine, gpus, flavors, resolutions)]
        kept = _newest(kept) if newest else kept
        dropped = [engine for engine in manifest.engines if engine not in kept]
        if dropped and not kept:
            raise UserError(f"prune would leave no engine in {bundle}; delete the folder if that is what you want")
        word = "would remove" if dry_run else "removed"
        for engine in dropped:
            console.print(f"{word} {engine.files[0].path} ({size_text(engine.size_bytes)})")
        freed = sum(engine.size_bytes for engine in dropped)
        lean = Manifest(source=manifest.source, engines=kept, files=manifest.files)
        if not dry_run:
            write_manifest(bundle, lean)
        named = {file.path for engine in dropped for file in engine.files}
        for path in remove_strays(bundle, lean, manifest, dry_run):
            if path.relative_to(bundle).as_posix() not in named:
                console.print(f"{word} {path.relative_to(bundle)}, which no manifest names")
        console.print(f"{bundle}: {len(kept)} engine(s) kept, {size_text(freed)} freed")
    return 0
