"""Compares the layouts: time, CPU time, peak memory and disk of each, as ratios to static builds and to the weights.

Each layout is built anew in a folder of its own, one after another, on the same machine; only ratios travel to
another one. What this cannot say is which layout runs faster: that is measured on a GPU, by the bench room.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from distill.common.errors import UserError, unknown
from distill.common.files import write_json
from engines.building.build import available_memory_bytes, build_bundle, require_memory
from engines.building.jobs import plan_builds
from engines.building.reports import console, size, wide_console
from engines.bundle import LAYOUTS, Engine, Layout
from engines.onnx_folder import read_onnx_folder

BASELINE = "per-resolution"


@dataclass(frozen=True)
class LayoutCost:
    """What the engines of one component cost in one layout."""

    layout: str
    component: str
    plans: int
    profiles: int
    build_s: float
    cpu_s: float
    peak_rss_bytes: int
    disk_bytes: int
    weights_bytes: int

    @property
    def disk_over_weights(self) -> float:
        return self.disk_bytes / self.weights_bytes


def layout_cost(layout: str, component: str, engines: Sequence[Engine]) -> LayoutCost:
    """Sums time and disk over the plans of one component; memory is the most that any of them took."""
    mine = [engine for engine in engines if engine.component == component]
    return LayoutCost(
        layout=layout,
        component=component,
        plans=len(mine),
        profiles=sum(len(engine.profiles) for engine in mine),
        build_s=sum(engine.build.seconds for engine in mine),
        cpu_s=sum(engine.build.cpu_seconds or 0 for engine in mine),
        peak_rss_bytes=max(engine.build.peak_rss_bytes for engine in mine),
        disk_bytes=sum(engine.size_bytes for engine in mine),
        weights_bytes=mine[0].weights_bytes,
    )


def ratios(cost: LayoutCost, baseline: LayoutCost) -> dict[str, float]:
    """Time, memory and disk against a static build for each resolution."""
    return {
        "time": cost.build_s / baseline.build_s,
        "cpu": cost.cpu_s / baseline.cpu_s,
        "memory": cost.peak_rss_bytes / baseline.peak_rss_bytes,
        "disk": cost.disk_bytes / baseline.disk_bytes,
    }


def compare_layouts(
    onnx: Path,
    out: Path,
    *,
    gpus: list[str],
    flavor: str = "tensorrt-rtx",
    layouts: Sequence[Layout] = LAYOUTS,  # type: ignore[assignment]
    components: Sequence[str] = ("unet", "vae_decoder"),
    resolutions: str = "all",
    keep: bool = False,
) -> list[LayoutCost]:
    """Builds every layout, writes `out/layouts.json` and prints the table. Raises UserError as `build_bundle` does, for
    no or an unknown layout, for no component, and where a layout's folder is there already: it would not be built anew."""
    for option, names in (("--layouts", layouts), ("--components", components)):
        if not names:
            raise UserError(f"{option} names none, there is nothing to compare; leave it out for the usual ones")
    for layout in layouts:
        if layout not in LAYOUTS:
            raise unknown("layout", layout, LAYOUTS)
        if (out / layout).exists():
            raise UserError(f"{out / layout} is there already, and is not touched: remove it, or choose another --out")
    asked: dict[str, Any] = {"gpus": gpus, "flavor": flavor, "resolutions": resolutions, "components": list(components)}
    folder, memory = read_onnx_folder(onnx), available_memory_bytes()
    for layout in layouts:  # what cannot be built is refused before the first is
        try:
            require_memory(plan_builds(folder, layout=layout, **asked), memory)
        except UserError as error:
            raise UserError(f"layout {layout}, which --layouts may leave out: {error}") from None
    costs: list[LayoutCost] = []
    for layout in layouts:
        console.print(f"layout {layout}")
        try:
            manifest = build_bundle(onnx, out / layout, layout=layout, **asked)
        finally:
            if not keep:
                shutil.rmtree(out / layout, ignore_errors=True)
        costs += [layout_cost(layout, component, manifest.engines) for component in components]
    wide_console(130).print(cost_table(costs))
    version = manifest.engines[0].flavor_version
    write_json(
        out / "layouts.json",
        {
            "model": manifest.source.name,
            "flavor": f"{flavor} {version}",
            "gpus": gpus,
            "resolutions": list(dict.fromkeys(text for engine in manifest.engines for text in engine.resolutions)),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "layouts": [asdict(cost) | {"ratios": ratios(cost, base)} for cost, base in with_baselines(costs)],
        },
    )
    return costs


def with_baselines(costs: Sequence[LayoutCost]) -> list[tuple[LayoutCost, LayoutCost]]:
    """Each cost beside that of its component's static builds, or of the first layout where those were not built."""
    pairs = []
    for cost in costs:
        rivals = [other for other in costs if other.component == cost.component]
        pairs.append((cost, next((other for other in rivals if other.layout == BASELINE), rivals[0])))
    return pairs


def cost_table(costs: Sequence[LayoutCost]) -> Table:
    """One row per layout and component; CPU times and numbers of plans are in the JSON alone, for want of width."""
    table = Table(
        title="layouts (×: against static builds, one for each resolution)",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for column in ("component", "layout", "time", "×", "memory", "×", "disk", "×", "/ weights"):
        table.add_column(column, no_wrap=True)
    for cost, base in with_baselines(costs):
        ratio = ratios(cost, base)
        table.add_row(
            cost.component,
            cost.layout,
            f"{cost.build_s:.0f} s",
            f"{ratio['time']:.2f}",
            size(cost.peak_rss_bytes),
            f"{ratio['memory']:.2f}",
            size(cost.disk_bytes),
            f"{ratio['disk']:.3f}",
            f"{cost.disk_over_weights:.3f}",
        )
    return table
