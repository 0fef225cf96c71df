"""What each section of a report shows, worked out from the results: plain data, no markup but the charts'."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from bench.contestants.contestant import STAGES
from bench.report import words
from bench.report.charts import Axis, Series, dot_whiskers, line_chart
from bench.report.method import machine_name, run_name
from bench.results import CellRecord, ContestantRecord, Results, Row

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


def drawn(results: Results) -> str:
    """What one call of the main workload draws."""
    batch = results.cells[0].workload["batch"]
    return "a picture" if batch == 1 else f"{batch} pictures"


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
    return {one.name for one in results.contestants if one.failed_guard}


def record_table(all_results: list[Results]) -> list[dict[str, Any]]:
    """What is known of each contestant of each run beyond its times; `colour` is None outside of the main run."""
    return [
        {
            "title": words.title_of(record.name),
            "where": where(record, results, all_results),
            "colour": colours(results)[record.name] if results is all_results[0] else None,
            "record": record,
            "quality": quality_word(record.quality),
        }
        for results in all_results
        for record in results.contestants
    ]


def where(record: ContestantRecord, results: Results, all_results: list[Results]) -> str:
    """A contestant's runtime, and its machine where the report has several."""
    machine, machines = machine_name(results), {machine_name(one) for one in all_results}
    return f"{record.runtime} on {machine}" if len(machines) > 1 else record.runtime


def headline(results: Results) -> dict[str, Any]:
    """The best contestant against the baseline in the main cell; `best` None where there is nothing to compare.

    One that failed the quality guard is told of, but is not the best, nor is anything measured against it.
    """
    main, failed = results.cells[0], failed_guard(results)
    baseline = row_of(main, results.baseline)
    rows = [row for row in main.rows if row.contestant != results.baseline and row.speedup is not None]
    is_base = baseline is not None and not baseline.refused and results.baseline not in failed
    sound = [row for row in rows if is_base and row.contestant not in failed]
    best = max(sound, key=lambda row: row.speedup.value if row.speedup else 0.0, default=None)
    records = [results.contestant(row.contestant) for row in main.rows]
    return {
        "best": best,
        "others": [row for row in rows if row is not best],
        "baseline": baseline,
        "workload": main.name,
        "one_runtime": len({(record.runtime, record.precision) for record in records}) == 1,
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
            {"stage": stage, "ms": value, "width": max(0, 100 * value / longest), "share": value / row.total_ms.value}
            for stage, value in sorted(row.stages_ms.items(), key=lambda item: _stage_order(item[0]))
        ]
        bars.append({"name": name, "title": words.title_of(name), "row": row, "stages": stages, "colour": colour[name]})
    return bars


def stage_names(results: Results) -> list[str]:
    return sorted({stage for row in results.cells[0].rows for stage in row.stages_ms}, key=_stage_order)


def _stage_order(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def workload_table(results: Results) -> list[dict[str, Any]]:
    """One entry per workload: {"workload": all of the main one's name, of another's what sets it apart, "rows":
    {name: Row or None}, "failures"}. A failure beside a row came after some of its rounds."""
    names, main = list(colours(results)), results.cells[0].name.split(", ")
    return [
        {
            "workload": ", ".join(part for part in cell.name.split(", ") if part not in main) or cell.name,
            "rows": {name: row_of(cell, name) for name in names},
            "failures": cell.failures,
        }
        for cell in results.cells
    ]


def speedup_chart(results: Results) -> Markup:
    rows = []
    for card in model_cards(results):
        if card["row"] is not None and card["row"].speedup is not None and not card["is_baseline"]:
            one = card["row"].speedup
            title = f"{card['title']} ✗" if card["record"].failed_guard else card["title"]
            rows.append((title, card["colour"], one.value, one.low, one.high))
    return dot_whiskers(rows, "×", f"speed-up over {results.baseline}")


def steps_chart(results: Results) -> Markup:
    cells = sorted(_varied(results, "steps"), key=lambda cell: cell.workload["steps"])
    if len(cells) < 2:
        return Markup("")
    return line_chart(
        _latency_series(results, cells, lambda cell: float(cell.workload["steps"])),
        Axis("denoising steps", ticks=[(cell.workload["steps"], str(cell.workload["steps"])) for cell in cells]),
        Axis(f"ms for {drawn(results)}", zero=True),
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
        Axis(f"ms for {drawn(results)}", zero=True),
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
        failed = results.contestant(name).failed_guard
        series.append(Series(words.title_of(name), colour, points, failed=failed))
    return series


def picture_grid(results: Results) -> list[dict[str, Any]]:
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
    return list(grid.values())


def notes(all_results: list[Results]) -> list[str]:
    """What each run says of itself as a whole; of which run where it is not the main one."""
    main, *others = all_results
    return main.notes + [f"{run_name(other)}: {note}" for other in others for note in other.notes]


def loudest_words(all_results: list[Results]) -> list[dict[str, Any]]:
    """Every fault the harness found, by run, workload and contestant: in all files, not in the main one alone."""
    faults = []
    for results in all_results:
        for cell in results.cells:
            said = [(row.contestant, row.diagnosis) for row in cell.rows if row.diagnosis]
            said += [(name, [f"failed: {why}"]) for name, why in cell.failures.items()]
            faults += [
                {
                    "cell": cell.name,
                    "title": words.title_of(name),
                    "where": where(results.contestant(name), results, all_results),
                    "words": told,
                }
                for name, told in said
            ]
    return faults


def fault_counts(faults: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """How many rows each kind of fault was said of, the most frequent first."""
    kinds = Counter(word.partition(":")[0] for one in faults for word in one["words"])
    return kinds.most_common()


def main_faults(results: Results) -> list[str]:
    """What is said against the very rows that the headline stands on, and of which of them where not of all."""
    main = results.cells[0]
    said: dict[str, list[str]] = {}
    for row in main.rows:
        failure = main.failures.get(row.contestant)
        for word in row.diagnosis + ([f"failed: {failure}"] if failure else []):
            said.setdefault(word, []).append(words.title_of(row.contestant))
    return [word if len(names) == len(main.rows) else f"{', '.join(names)} {word}" for word, names in said.items()]


def kernel_table(all_results: list[Results], training: list[dict[str, Any]]) -> dict[str, Any] | None:
    """{"families": largest first, "rows": one a contestant, from every run that was profiled}; None where none was.
    Of runs that profiled the same the first stands. Distillation steps, of the files in `training`, come last."""
    rows: list[dict[str, Any]] = []
    seen = set()
    for results in all_results:
        for record in results.contestants:
            found = record.kernels or {}
            key = (results.cells[0].name, record.parameters or record.name, record.runtime, record.precision)
            if found.get("families_ms") and key not in seen:
                seen.add(key)
                whole = sum(found["families_ms"].values())
                about = {"title": words.title_of(record.name), "runtime": record.runtime, "failed": record.failed_guard}
                rows.append(about | {"whole": whole, **found})
    for row in (row for one in training for row in one["rows"] if row.get("kernels")):
        found, title = row["kernels"], f"{words.title_of(row['teacher'])} → {words.title_of(row['student'])}"
        whole = sum(found["families_ms"].values())
        about = {"title": title, "runtime": f"training, {row['title']}", "failed": False}
        rows.append(about | {"whole": whole, **found})
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
