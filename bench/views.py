"""What each section of a report shows, worked out from the results: plain data, no markup but the charts'."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from bench import words
from bench.charts import Axis, Series, dot_whiskers, line_chart
from bench.measure import STAGES
from bench.results import CellRecord, Results, Row

COLOURS = 8


def colours(results: Results) -> dict[str, int]:
    """Contestant -> index of its colour; the baseline is always 0."""
    names = [one.name for one in results.contestants]
    ordered = [results.baseline, *(name for name in names if name != results.baseline)]
    return {name: index % COLOURS for index, name in enumerate(ordered)}


def row_of(cell: CellRecord, name: str) -> Row | None:
    return next((row for row in cell.rows if row.contestant == name), None)


def _varied(results: Results, key: str) -> list[CellRecord]:
    """The cells that differ from the main one in `key` alone, the main one among them."""
    main = results.cells[0].workload
    same = [other for other in ("resolution", "steps", "batch", "guidance_scale", "scheduler") if other != key]
    return [cell for cell in results.cells if all(cell.workload[other] == main[other] for other in same)]


def model_cards(results: Results) -> list[dict[str, Any]]:
    """One card per contestant, baseline first, from the main cell."""
    main, colour = results.cells[0], colours(results)
    cards = []
    for name in colour:
        record, row = results.contestant(name), row_of(main, name)
        cards.append(
            {
                "name": name,
                "title": words.title_of(name),
                "colour": colour[name],
                "row": row,
                "record": record,
                "is_baseline": name == results.baseline,
                "failure": main.failures.get(name),
                "quality": quality_word(record.quality),
            }
        )
    return cards


def quality_word(quality: dict[str, Any]) -> dict[str, str]:
    """{"state": passed | failed | unchecked, "text"}"""
    state = {True: "passed", False: "failed", None: "unchecked"}[quality.get("passed")]
    parts = []
    if quality.get("identical"):
        parts.append("identical to the fp32 reference")
    elif quality.get("psnr_db") is not None:
        parts.append(f"PSNR {quality['psnr_db']:.1f} dB")
    if quality.get("latent_cosine") is not None:
        parts.append(f"latent cosine {quality['latent_cosine']:.5f}")
    for name, value in (quality.get("fidelity") or {}).items():
        if name in ("fid", "clip") and value is not None:
            parts.append(f"{'FID' if name == 'fid' else 'CLIP score'} {value:.2f}")
    return {"state": state, "text": "; ".join(parts + list(quality.get("words", [])))}


def failed_guard(results: Results) -> set[str]:
    return {one.name for one in results.contestants if one.quality.get("passed") is False}


def headline(results: Results) -> dict[str, Any]:
    """The best contestant against the baseline in the main cell; `best` None where there is nothing to compare.

    One that failed the quality guard is told of, but is not the best.
    """
    main = results.cells[0]
    rows = [row for row in main.rows if row.contestant != results.baseline and row.speedup is not None]
    sound = [row for row in rows if row.contestant not in failed_guard(results)]
    best = max(sound, key=lambda row: row.speedup.value if row.speedup else 0.0, default=None)
    return {
        "best": best,
        "others": [row for row in rows if row is not best],
        "baseline": row_of(main, results.baseline),
        "workload": main.name,
    }


def stage_bars(results: Results) -> list[dict[str, Any]]:
    """Each contestant's stages of the main cell as shares of the longest total."""
    main, colour = results.cells[0], colours(results)
    longest = max((row.total_ms.value for row in main.rows), default=1.0)
    bars = []
    for name in colour:
        row = row_of(main, name)
        if row is None:
            continue
        stages = [
            {"stage": stage, "ms": value, "width": 100 * value / longest, "share": value / row.total_ms.value}
            for stage, value in sorted(row.stages_ms.items(), key=lambda item: _stage_order(item[0]))
        ]
        bars.append({"name": name, "title": words.title_of(name), "row": row, "stages": stages, "colour": colour[name]})
    return bars


def stage_names(results: Results) -> list[str]:
    return sorted({stage for row in results.cells[0].rows for stage in row.stages_ms}, key=_stage_order)


def _stage_order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def resolution_table(results: Results) -> list[dict[str, Any]]:
    """One entry per resolution: {"resolution", "rows": {name: Row or None}}."""
    names = list(colours(results))
    return [
        {"resolution": cell.workload["resolution"], "rows": {name: row_of(cell, name) for name in names}}
        for cell in _varied(results, "resolution")
    ]


def speedup_chart(results: Results) -> Markup:
    colour = colours(results)
    rows = []
    for cell in results.cells[:1]:
        for name in colour:
            row = row_of(cell, name)
            if row is not None and row.speedup is not None and name != results.baseline:
                one = row.speedup
                rows.append((words.title_of(name), colour[name], one.value, one.low, one.high))
    return dot_whiskers(rows, "×", f"speed-up over {results.baseline}")


def steps_chart(results: Results) -> Markup:
    cells = sorted(_varied(results, "steps"), key=lambda cell: cell.workload["steps"])
    if len(cells) < 2:
        return Markup("")
    return line_chart(
        _latency_series(results, cells, lambda cell: float(cell.workload["steps"])),
        Axis("denoising steps", ticks=[(cell.workload["steps"], str(cell.workload["steps"])) for cell in cells]),
        Axis("ms an image", zero=True),
        "latency against steps",
    )


def resolution_chart(results: Results) -> Markup:
    def pixels(cell: CellRecord) -> float:
        width, height = cell.workload["resolution"].split("x")
        return int(width) * int(height) / 1e3

    cells = sorted(_varied(results, "resolution"), key=pixels)
    if len(cells) < 2:
        return Markup("")
    series = _latency_series(results, cells, pixels)
    return line_chart(
        [replace(one, line=False, shift=4.0 * (index - (len(series) - 1) / 2)) for index, one in enumerate(series)],
        Axis("thousand pixels"),
        Axis("ms an image", zero=True),
        "latency against picture size",
    )


def _latency_series(results: Results, cells: list[CellRecord], x: Any) -> list[Series]:
    series = []
    for name, colour in colours(results).items():
        points: list[tuple[float, ...]] = []
        for cell in cells:
            row = row_of(cell, name)
            if row is not None and not row.refused:
                total = row.total_ms
                interval = (total.low, total.high) if total.low is not None and total.high is not None else ()
                points.append((x(cell), total.value, *interval))
        series.append(Series(words.title_of(name), colour, points))
    return series


def picture_grid(results: Results, limit: int = 9) -> list[dict[str, Any]]:
    """The same prompt and seed side by side: [{"prompt", "seed", "resolution", "pictures": [...]}]."""
    order: list[str] = list(colours(results))
    grid: dict[tuple[str, int], dict[str, Any]] = {}
    for picture in results.pictures:
        key = (picture.prompt, picture.seed)
        entry = grid.setdefault(
            key,
            {
                "prompt": picture.prompt,
                "seed": picture.seed,
                "resolution": picture.resolution,
                "aspect": int(picture.resolution.split("x")[0]) / int(picture.resolution.split("x")[1]),
                "pictures": [],
            },
        )
        wrong = [name for name, right in (picture.follows or {}).items() if not right]
        entry["pictures"].append(
            {
                "name": picture.contestant,
                "title": words.title_of(picture.contestant),
                "png": picture.png_base64,
                "judged": picture.follows is not None,
                "wrong": wrong,
            }
        )
    for entry in grid.values():
        entry["pictures"].sort(key=lambda one: order.index(one["name"]))
    return list(grid.values())[:limit]


def artifact(record: Any, kind: str) -> dict[str, Any] | None:
    return next((one for one in record.artifacts if one["kind"] == kind), None)


def loss_charts(results: Results) -> list[dict[str, Any]]:
    """One chart per distilled contestant: every stage's loss over the steps, one stage after another."""
    charts = []
    for name, colour in colours(results).items():
        checkpoint = artifact(results.contestant(name), "checkpoint")
        if not checkpoint or not checkpoint["losses"]:
            continue
        offset = 0
        points: list[tuple[float, ...]] = []
        for stage in checkpoint["losses"]:
            points += [(offset + step, max(loss, 1e-9)) for step, loss, _ in stage["points"]]
            offset += stage["steps"]
        last = checkpoint["losses"][-1]
        terms = last["points"][-1][2]
        chart = line_chart(
            [Series(name, colour, points, dots=False)],
            Axis("step"),
            Axis("loss", log=True),
            f"distillation loss of {name}",
        )
        charts.append(
            {
                "title": words.title_of(name),
                "name": name,
                "colour": colour,
                "chart": chart,
                "steps": offset,
                "seconds": sum(stage["seconds"] or 0 for stage in checkpoint["losses"]),
                "stages": [stage["stage"] for stage in checkpoint["losses"]],
                "first": points[0][1],
                "last": points[-1][1],
                "terms": terms,
            }
        )
    return charts


def size_table(results: Results) -> list[dict[str, Any]]:
    """Parameters and bytes at each station of the road; None where that folder was not given."""
    table = []
    for name, colour in colours(results).items():
        record = results.contestant(name)
        checkpoint, onnx, bundle = (artifact(record, kind) for kind in ("checkpoint", "onnx", "bundle"))
        plans = [engine for engine in (bundle or {}).get("engines", []) if engine["flavor"] != "onnxruntime"]
        unet = (record.costs or {}).get("unet", {})
        table.append(
            {
                "title": words.title_of(name),
                "colour": colour,
                "parameters": record.parameters,
                "flops": unet.get("flops"),
                "checkpoint_bytes": checkpoint and checkpoint["weights_bytes"],
                "unet_bytes": checkpoint and checkpoint["unet_bytes"],
                "onnx_bytes": onnx and onnx["bytes"],
                "plan_bytes": sum(engine["bytes"] for engine in plans) if plans else None,
                "bundle_bytes": bundle and bundle["bytes"],
                "export_seconds": _export_seconds(onnx),
                "build_seconds": sum(engine["build_seconds"] for engine in plans) if plans else None,
            }
        )
    return table


def _export_seconds(onnx: dict[str, Any] | None) -> float | None:
    """None where no component's record tells how long its export took."""
    times = [part["seconds"] for part in (onnx or {}).get("components", {}).values() if "seconds" in part]
    return sum(times) if times else None


def build_table(results: Results) -> list[dict[str, Any]]:
    """Engines grouped by contestant, flavor and target, with whether any of them ran in this report."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in colours(results):
        record = results.contestant(name)
        for engine in (artifact(record, "bundle") or {}).get("engines", []):
            capabilities = tuple(engine["compute_capabilities"])
            key = (name, engine["flavor"], capabilities)
            ran = record.spec.startswith((f"bundle@{engine['flavor']}:", f"bundle@{engine['flavor']}+"))
            group = groups.setdefault(
                key,
                {
                    "title": words.title_of(name),
                    "flavor": engine["flavor"],
                    "version": engine["flavor_version"],
                    "gpus": engine["gpus"],
                    "capabilities": list(capabilities),
                    "layouts": {},
                    "precisions": set(),
                    "components": [],
                    "resolutions": set(),
                    "profiles": 0,
                    "bytes": 0,
                    "seconds": 0.0,
                    "peak_rss_bytes": 0,
                    "ran": ran,
                },
            )
            group["components"].append(engine["component"])
            group["layouts"].setdefault(engine["layout"], []).append(engine["component"])
            group["precisions"].add(engine["precision"])
            group["resolutions"].update(engine["resolutions"])
            group["profiles"] += engine["profiles"]
            group["bytes"] += engine["bytes"]
            group["seconds"] += engine["build_seconds"]
            group["peak_rss_bytes"] = max(group["peak_rss_bytes"], engine["build_peak_rss_bytes"])
    return list(groups.values())


def hash_table(results: Results) -> list[dict[str, str]]:
    """Every hash the artifacts carry, so that a reader can tell whether he holds the same files."""
    table = []
    for record in results.contestants:
        for one in record.artifacts:
            for component, part in one.get("components", {}).items():
                hashes = part.get("sha256", {})
                files = hashes.items() if isinstance(hashes, dict) else [("model.onnx", hashes)]
                table += [{"what": f"{record.name}: {component}/{file}", "sha256": sha} for file, sha in files]
            if one["kind"] == "bundle":
                table.append({"what": f"{record.name}: source checkpoint", "sha256": one["source"]["sha256"]})
                table += [
                    {"what": f"{record.name}: {engine['file']}", "sha256": engine["sha256"]}
                    for engine in one["engines"]
                ]
                onnx = {(engine["component"], engine["onnx_sha256"]) for engine in one["engines"]}
                table += [{"what": f"{record.name}: ONNX of {name}", "sha256": sha} for name, sha in sorted(onnx)]
    return table


def loudest_words(results: Results) -> list[dict[str, Any]]:
    """Every fault the harness found, by workload and contestant."""
    return [
        {"cell": cell.name, "title": words.title_of(row.contestant), "words": row.diagnosis}
        for cell in results.cells
        for row in cell.rows
        if row.diagnosis
    ] + [
        {"cell": cell.name, "title": words.title_of(name), "words": [f"failed: {why}"]}
        for cell in results.cells
        for name, why in cell.failures.items()
    ]


def fault_counts(results: Results) -> list[tuple[str, int]]:
    """How many rows each kind of fault was said of, the most frequent first."""
    kinds = Counter(word.partition(":")[0] for one in loudest_words(results) for word in one["words"])
    return kinds.most_common()


def main_faults(results: Results) -> list[str]:
    """What is said against the very rows that the headline stands on, and of which of them where not of all."""
    rows = results.cells[0].rows
    said: dict[str, list[str]] = {}
    for row in rows:
        for word in row.diagnosis:
            said.setdefault(word, []).append(words.title_of(row.contestant))
    return [word if len(names) == len(rows) else f"{', '.join(names)} {word}" for word, names in said.items()]


def kernel_table(all_results: list[Results], training: list[dict[str, Any]]) -> dict[str, Any] | None:
    """{"families": largest first, "rows": one a contestant, from every run that was profiled}; None where none was.
    Of runs that profiled the same the first stands. Distillation steps, of the files in `training`, come last."""
    rows, seen = [], set()
    for results in all_results:
        for record in results.contestants:
            found = record.kernels or {}
            key = (results.cells[0].name, record.parameters or record.name, record.runtime, record.precision)
            if found.get("families_ms") and key not in seen:
                seen.add(key)
                whole = sum(found["families_ms"].values())
                rows.append({"title": words.title_of(record.name), "runtime": record.runtime, "whole": whole, **found})
    for row in (row for one in training for row in one["rows"] if row.get("kernels")):
        found, title = row["kernels"], f"{words.title_of(row['teacher'])} → {words.title_of(row['student'])}"
        whole = sum(found["families_ms"].values())
        rows.append({"title": title, "runtime": f"training, {row['title']}", "whole": whole, **found})
    totals: Counter[str] = Counter()
    for one in rows:
        for family, milliseconds in one["families_ms"].items():
            totals[family] += milliseconds / one["whole"]
    return {"families": [family for family, _ in totals.most_common()], "rows": rows} if rows else None


def device_words(device: dict[str, list[float] | None]) -> list[str]:
    """What the GPU showed between the timed calls, each reading from its least to its most."""
    names = {
        "sm_clock_mhz": ("SM clock", "MHz"),
        "memory_clock_mhz": ("memory clock", "MHz"),
        "temperature_c": ("", "°C"),
        "power_w": ("", "W"),
    }
    told = []
    for key, (name, unit) in names.items():
        values = device.get(key)
        if values:
            least, _, most = values
            told.append(f"{name} {least:,.0f}{f'–{most:,.0f}' if most > least else ''} {unit}".strip())
    return told
