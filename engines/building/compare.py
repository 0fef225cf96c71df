"""Compares what bundles took to build: time, CPU time, peak memory and disk of each component, as ratios to the first.

Everything is in the manifests already. Built on one machine, one after another, only the ratios hold for other machines.
Which layout runs faster is for the bench room to measure, on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.common.errors import UserError
from distill.common.files import size_text, write_json
from distill.common.ownership import require_writable_file
from engines.building.reports import wide_console
from engines.bundle import Engine, read_manifest

RATIOS = ("build_s", "cpu_s", "peak_rss_bytes", "disk_bytes")


def compare_bundles(bundles: Sequence[Path], out: Path | None) -> int:
    """Prints the table and writes it to `out` as JSON. Raises UserError for fewer than two bundles or unlike ones."""
    if len(bundles) < 2:
        raise UserError("compare takes two bundles or more; the first is what the others are compared with")
    if out:
        require_writable_file(out, ("model", "rows"))
    manifests = [read_manifest(bundle) for bundle in bundles]
    if len(sources := {manifest.source.sha256: manifest.source.name for manifest in manifests}) > 1:
        raise UserError(f"the bundles are of different checkpoints: {', '.join(sources.values())}")
    rows = []
    for bundle, manifest in zip(bundles, manifests, strict=True):
        for component in dict.fromkeys(engine.component for engine in manifest.engines):
            costs = build_costs([engine for engine in manifest.engines if engine.component == component])
            rows.append({"bundle": str(bundle), "component": component, **costs})
    first = {row["component"]: row for row in rows if row["bundle"] == str(bundles[0])}
    for row in rows:
        if base := first.get(row["component"]):
            row["ratios"] = {name: row[name] / base[name] for name in RATIOS if base[name]}
    wide_console(130).print(_table(rows))
    if out:
        write_json(out, {"model": manifests[0].source.name, "rows": rows})
    return 0


def build_costs(engines: Sequence[Engine]) -> dict[str, Any]:
    """Sums time and disk over the engines of one component; memory is the most that any of them took."""
    return {
        "layouts": sorted({engine.layout for engine in engines}),
        "flavors": sorted({f"{engine.flavor} {engine.flavor_version}" for engine in engines}),
        "plans": len(engines),
        "profiles": sum(len(engine.profiles) for engine in engines),
        "build_s": sum(engine.build.seconds for engine in engines),
        "cpu_s": sum(engine.build.cpu_seconds or 0 for engine in engines),
        "peak_rss_bytes": max(engine.build.peak_rss_bytes for engine in engines),
        "disk_bytes": sum(engine.size_bytes for engine in engines),
        "weights_bytes": engines[0].weights_bytes,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="builds (x: against the first bundle)", title_justify="left")
    measures = ("time", "x", "CPU", "x", "memory", "x", "disk", "x", "/ weights")
    for column in ("component", "bundle", "layout", "profiles", *measures):
        table.add_column(column, overflow="fold")
    for row in sorted(rows, key=lambda row: str(row["component"])):
        x = {name: f"{ratio:.3f}" for name, ratio in row.get("ratios", {}).items()}
        cells = [row["component"], row["bundle"], " ".join(row["layouts"]), str(row["profiles"])]
        cells += [f"{row['build_s']:.0f} s", x.get("build_s", ""), f"{row['cpu_s']:.0f} s", x.get("cpu_s", "")]
        cells += [size_text(row["peak_rss_bytes"]), x.get("peak_rss_bytes", "")]
        cells += [
            size_text(row["disk_bytes"]),
            x.get("disk_bytes", ""),
            f"{row['disk_bytes'] / row['weights_bytes']:.3f}",
        ]
        table.add_row(*cells)
    return table
