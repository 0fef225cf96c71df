"""Where the models come from: how the students learnt, how large each step of the way is, what was built, hashes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.report.cards import Card
from bench.report.elements.charts import Axis, Series, line_chart
from bench.report.elements.formatting import NONE, count, percent, seconds, size, title_of
from bench.report.elements.tables import Cell, Column, Table, make_table, measured
from bench.report.quality import right_counts, share_right, share_text
from bench.results import Results
from distill.data.shapes import ATTRIBUTES


def caption_table(results: Results, cards: list[Card]) -> Table:
    """How often the pictures show what their captions say: all of it with each number of steps, then by attribute with the
    main steps; empty where nothing was judged."""
    counts = right_counts(results)
    main = results.cells[0].workload["steps"]
    timed = sorted({steps for _, steps in counts}, key=lambda steps: (steps != main, steps))

    def column(card: Card) -> Column[int | str]:
        def write(key: int | str) -> Cell | None:
            if isinstance(key, str):
                return measured(percent((card.record.follows or {}).get(key)))
            pair = counts.get((card.name, key))
            return measured(f"{pair[0]} of {pair[1]}", share_text(share_right(*pair))) if pair else None

        return Column(card.head, write)

    def name(key: int | str) -> str:
        return f"everything, {key} steps" if isinstance(key, int) else key

    keys: list[int | str] = [*timed, *(ATTRIBUTES if main in timed else ())]
    return make_table(keys, Column("right in", name), *map(column, cards))


def loss_charts(cards: list[Card]) -> list[dict[str, Any]]:
    """One chart per distilled contestant: every stage's loss over the steps, one stage after another. Stages are lines of
    their own, for each may have another student, teacher and loss."""
    charts = []
    for card in cards:
        losses = (card.record.artifact("checkpoint") or {}).get("losses")
        if not losses:
            continue
        offset, series = 0, []
        for stage in losses:
            points: list[tuple[float, ...]] = [(offset + step, max(loss, 1e-9)) for step, loss, _ in stage["points"]]
            series.append(Series(f"{card.name}, {stage['stage']}", card.colour, points, dots=False))
            offset += stage["steps"]
        chart = line_chart(series, Axis("step"), Axis("loss", log=True), f"distillation loss of {card.name}")
        charts.append(
            {
                "title": card.title,
                "colour": card.colour,
                "chart": chart,
                "steps": offset,
                "seconds": sum(stage["seconds"] or 0 for stage in losses),
                "stages": [(stage["stage"], stage["points"][0][1], stage["points"][-1][1]) for stage in losses],
                "terms": losses[-1]["points"][-1][2],
            }
        )
    return charts


def size_table(cards: list[Card]) -> Table:
    """Parameters, bytes and seconds at each step of the way; a line that no given folder fills is left out."""
    sizes = [_sizes(card) for card in cards]

    def column(card: Card, told: dict[str, str]) -> Column[str]:
        return Column(card.head, lambda label: told[label])

    label: Column[str] = Column("", str)
    return make_table(sizes[0], label, *(column(*pair) for pair in zip(cards, sizes, strict=True)))


def _sizes(card: Card) -> dict[str, str]:
    record = card.record
    checkpoint, onnx, bundle = (record.artifact(kind) or {} for kind in ("checkpoint", "onnx", "bundle"))
    plans = [engine for engine in bundle.get("engines", []) if engine["flavor"] != "onnxruntime"]
    precisions = {part["precision"] for part in onnx.get("components", {}).values() if "precision" in part}
    exports = [part["seconds"] for part in onnx.get("components", {}).values() if "seconds" in part]
    unet = (record.costs or {}).get("unet", {})
    return {
        "UNet parameters": count(record.parameters),
        "FLOP a UNet call": count(unet.get("flops")),
        "checkpoint, all weights": _typed(checkpoint.get("weights_bytes"), checkpoint.get("dtypes")),
        "checkpoint, UNet alone": _typed(checkpoint.get("unet_bytes"), checkpoint.get("unet_dtypes")),
        "VAE computes in": record.vae_dtype or NONE,
        "ONNX folder": _typed(onnx.get("bytes"), ", ".join(sorted(precisions))),
        "TensorRT plans": size(sum(engine["bytes"] for engine in plans) if plans else None),
        "whole bundle": size(bundle.get("bytes")),
        "exported to ONNX in": seconds(sum(exports) if exports else None),
        "TensorRT plans built in": seconds(sum(engine["build_seconds"] for engine in plans) if plans else None),
    }


def _typed(value: float | None, dtype: str | None) -> str:
    return f"{size(value)}, {dtype}" if value is not None and dtype else size(value)


@dataclass
class Build:
    """The engines of one bundle for one flavor and target. `loaded` counts those that a contestant ran; `ran` says that
    a UNet is among them: text encoders and the VAE decoder can be the same files for several models."""

    title: str
    flavor: str
    version: str
    gpus: list[str]
    capabilities: list[str]
    layouts: dict[str, list[str]] = field(default_factory=dict)
    precisions: set[str] = field(default_factory=set)
    components: list[str] = field(default_factory=list)
    resolutions: set[str] = field(default_factory=set)
    profiles: int = 0
    bytes: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    ran: bool = False
    loaded: int = 0

    def add(self, engine: dict[str, Any], was_run: bool) -> None:
        self.layouts.setdefault(engine["layout"], []).append(engine["component"])
        self.precisions.add(engine["precision"])
        self.components.append(engine["component"])
        self.resolutions.update(engine["resolutions"])
        self.profiles += engine["profiles"]
        self.bytes += engine["bytes"]
        self.seconds += engine["build_seconds"]
        self.peak_rss_bytes = max(self.peak_rss_bytes, engine["build_peak_rss_bytes"])
        self.loaded += was_run
        self.ran |= was_run and engine["component"] == "unet"


def engines_run(all_results: list[Results]) -> set[str]:
    """sha256 of every engine that a contestant held which finished at least one workload."""
    run: set[str] = set()
    for results in all_results:
        finished = {row.contestant for cell in results.cells for row in cell.rows}
        run.update(*(record.engines or [] for record in results.contestants if record.name in finished))
    return run


def builds(all_results: list[Results]) -> list[Build]:
    """Every bundle's engines by flavor and target, each engine once."""
    run = engines_run(all_results)
    found: dict[tuple[Any, ...], Build] = {}
    seen = set()
    for record in (record for results in all_results for record in results.contestants):
        bundle = record.artifact("bundle") or {"engines": [], "source": {"sha256": ""}}
        source = bundle["source"]["sha256"]
        for engine in bundle["engines"]:
            file = (source, engine["file"], engine["sha256"])
            if file in seen:
                continue
            seen.add(file)
            flavor, version, capabilities = (
                engine[key] for key in ("flavor", "flavor_version", "compute_capabilities")
            )
            new = Build(title_of(record.name), flavor, version, engine["gpus"], capabilities)
            build = found.setdefault((source, flavor, version, *capabilities), new)
            build.add(engine, engine["sha256"] in run)
    return list(found.values())


def build_table(found: list[Build]) -> Table:
    def model(one: Build) -> Cell:
        state = f"{one.loaded} of {len(one.components)} run" if one.ran else "built, not run"
        return Cell(one.title, small=(f"{'✓ ' if one.ran else ''}{state}",))

    def engines(one: Build) -> Cell:
        number = f"{len(one.components)} engine{'s' if len(one.components) > 1 else ''}"
        profiles = f"{one.profiles} profile{'s' if one.profiles != 1 else ''}"
        layout = f"{number}, {' + '.join(sorted(one.precisions))}; {', '.join(one.layouts)}, {profiles}"
        return Cell(f"{one.flavor} {one.version}", small=(layout,))

    def target(one: Build) -> Cell:
        capabilities = f"compute capability {', '.join(one.capabilities)}" if one.capabilities else ""
        return Cell(", ".join(one.gpus) or "any machine", small=(capabilities,))

    return make_table(
        found,
        Column("model", model),
        Column("engines", engines, "wrap"),
        Column("for", target, "wrap"),
        Column("sizes", lambda one: Cell(str(len(one.resolutions) or "all"), hint=", ".join(sorted(one.resolutions)))),
        Column("bytes", lambda one: size(one.bytes)),
        Column("built in", lambda one: seconds(one.seconds)),
    )


def hash_table(all_results: list[Results]) -> Table:
    """Every hash the artifacts carry, so that a reader can tell whether he holds the same files."""
    found: dict[tuple[str, str], None] = {}
    for record in (record for results in all_results for record in results.contestants):
        if record.weights_sha256:
            found[f"{record.name}: weights, {record.weights_of}", record.weights_sha256] = None
        for one in record.artifacts:
            for component, part in one.get("components", {}).items():
                hashes = part.get("sha256", {})
                files = hashes.items() if isinstance(hashes, dict) else [("model.onnx", hashes)]
                found |= {(f"{record.name}: {component}/{file}", sha): None for file, sha in files}
            if one["kind"] == "bundle":
                found[f"{record.name}: source checkpoint", one["source"]["sha256"]] = None
                for engine in one["engines"]:
                    found[f"{record.name}: {engine['file']}", engine["sha256"]] = None
                    found[f"{record.name}: ONNX of {engine['component']}", engine["onnx_sha256"]] = None
    return make_table(
        found, Column("file", lambda pair: pair[0]), Column("sha256", lambda pair: Cell(pair[1], "hash"), "wrap")
    )
