"""The report: one self-contained HTML page, the same as Markdown, and everything as JSON, from results files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench.floor.peaks import PEAKS
from bench.floor.predict import Check, Known, check_on_measured, check_predictions, predict, published_known
from bench.quality.guard import MIN_LATENT_COSINE, MIN_PSNR_DB
from bench.reading import Inputs, read_inputs
from bench.report import method, provenance, views, words
from bench.report.runtimes import MODELS, limit_table, model_of, runtime_table, shape_table
from bench.results import ContestantRecord, Results
from distill.common.errors import UserError
from distill.common.files import replacing, write_json
from distill.data.shapes import ATTRIBUTES

TEMPLATES = Path(__file__).parent / "templates"
STEPS = 30
RUNTIME = "TensorRT"
SIZE_ROWS = (  # label, key of views.size_table, how it is written
    ("UNet parameters", "parameters", "count"),
    ("FLOP a UNet call", "flops", "count"),
    ("checkpoint, all weights", "checkpoint_bytes", "size"),
    ("checkpoint, UNet alone", "unet_bytes", "size"),
    ("ONNX folder", "onnx_bytes", "size"),
    ("TensorRT plans", "plan_bytes", "size"),
    ("whole bundle", "bundle_bytes", "size"),
    ("exported to ONNX in", "export_seconds", "seconds"),
    ("TensorRT plans built in", "build_seconds", "seconds"),
)
REPORT_SCHEMA = "slimxl.bench.report/1"
MEASURED = "measured by slimxl"


def measured_latencies(all_results: list[Results]) -> list[Known]:
    """What was measured with guidance on a GPU of the catalogue, of models of the catalogue, the baseline first. What
    was refused or failed the quality guard tells nothing of a GPU; of runs that measured the same the first stands. The
    floor is the row's own, by the calls of the UNet that were made: some schedulers make more than they have steps."""
    known: dict[tuple[Any, ...], Known] = {}
    for results in all_results:
        gpu = next((key for key, peak in PEAKS.items() if results.peak and peak.name == results.peak["name"]), None)
        if gpu is None:
            continue
        for cell in results.cells:
            load = cell.workload
            for row in sorted(cell.rows, key=lambda row: row.contestant != results.baseline):
                record = results.contestant(row.contestant)
                model = model_of(record)
                sound = not (row.refused or record.failed_guard)
                if model is None or row.floor_ms is None or not sound or load["guidance_scale"] <= 1:
                    continue
                runtime = runtime_class(record)
                one = Known(
                    gpu,
                    model,
                    load["steps"],
                    runtime,
                    row.total_ms.value,
                    row.floor_ms,
                    MEASURED,
                    load["resolution"],
                    load["batch"],
                )
                known.setdefault((gpu, model, runtime, load["steps"], load["resolution"], load["batch"]), one)
    return list(known.values())


def known_latencies(measured: list[Known]) -> list[Known]:
    """Published figures, and those measured at the size that predictions are made for."""
    return published_known() + [one for one in measured if (one.resolution, one.batch) == ("1024x1024", 1)]


def runtime_class(record: ContestantRecord) -> str:
    """The published figures' word for a runtime of ours; they are of fp16, so another precision is told with it."""
    classes = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT", "compile": "compiled", "eager": "diffusers"}
    name = next((word for part, word in classes.items() if part in record.runtime), record.runtime)
    return f"{name}, {record.precision}" if record.precision in ("bf16", "fp32") else name


def _predictions(known: list[Known]) -> list[dict[str, Any]]:
    return [
        {"gpu": key, "peak": peak, "models": [predict(key, model, STEPS, RUNTIME, known) for model in MODELS]}
        for key, peak in PEAKS.items()
    ]


def _named(one: Any, gpu: str) -> dict[str, Any]:
    return {"known": one, "efficiency": one.efficiency, "gpu_name": PEAKS[gpu].name}


def _check_row(check: Check) -> dict[str, Any]:
    told = {"predicted_ms": check.predicted_ms, "error": check.error, "blind_error": check.blind_error}
    return _named(check.known, check.known.gpu) | told


def _errors(errors: list[float]) -> dict[str, float]:
    sizes = [abs(error) for error in errors] or [0.0]
    return {"median": median(sizes), "worst": max(sizes)}


def make_context(inputs: Inputs, title: str) -> dict[str, Any]:
    """Everything the templates show; the first results are the main ones, and only those of the same machine
    are held against each other; faults are those of all."""
    all_results = inputs.results
    results, machine = all_results[0], method.machine_name(all_results[0])
    on_machine = [one for one in all_results if method.machine_name(one) == machine]
    measured = measured_latencies(all_results)
    known = known_latencies(measured)
    checks = [check for check in check_predictions(known) if check.known.origin != MEASURED]
    measured_checks = check_on_measured(measured)
    cards = views.model_cards(results)
    sizes = provenance.size_table(results)
    faults = views.loudest_words(all_results)
    follows = [card["record"].follows for card in cards if card["record"].follows]
    return {
        "title": title,
        "css": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "results": results,
        "machine": machine,
        "notes": views.notes(all_results),
        "colour": views.colours(results),
        "head": views.headline(results),
        "drawn": views.drawn(results),
        "cards": cards,
        "grid": views.picture_grid(results),
        "follows": follows,
        "follows_keys": [key for key in (*ATTRIBUTES, "all") if key in follows[0]] if follows else [],
        "bars": views.stage_bars(results),
        "stages": views.stage_names(results),
        "workloads": views.workload_table(results),
        "resolution_svg": views.resolution_chart(results),
        "steps_svg": views.steps_chart(results),
        "speedup_svg": views.speedup_chart(results),
        "losses": provenance.loss_charts(results),
        "sizes": sizes,
        "size_rows": [row for row in SIZE_ROWS if any(one[row[1]] is not None for one in sizes)],
        "device_words": views.device_words(results.cells[0].device),
        "records": views.record_table(all_results),
        "builds": provenance.build_table(all_results),
        "prediction_steps": STEPS,
        "prediction_models": MODELS,
        "predictions": _predictions(known),
        "known": known,
        "measured_known": sum(one.origin == MEASURED for one in known),
        "calibration": [_named(one, one.gpu) for one in known if one.runtime == RUNTIME],
        "failed": views.failed_guard(results),
        "checks": [_check_row(check) for check in checks],
        "sources": list(dict.fromkeys(check.known.origin for check in checks)),
        "error": _errors([check.error for check in checks]),
        "blind": _errors([check.blind_error for check in checks if check.blind_error is not None]),
        "measured_checks": [_check_row(check) for check in measured_checks],
        "measured_error": _errors([check.error for check in measured_checks]),
        "runtimes": runtime_table(on_machine),
        "limits": limit_table(on_machine),
        "shapes": shape_table(on_machine),
        "kernels": views.kernel_table(on_machine, inputs.training),
        "published_loops": inputs.published_loops,
        "training": [row for one in inputs.training for row in one["rows"]],
        "acceptance": inputs.acceptance,
        "sessions": inputs.sessions,
        "loads": inputs.loads,
        "guard": {"psnr": f"{MIN_PSNR_DB:g}", "cosine": f"{MIN_LATENT_COSINE:g}"},
        "absent": method.absent_readings(results),
        "faults": faults,
        "fault_counts": views.fault_counts(faults),
        "main_faults": views.main_faults(results),
        "rows_measured": sum(len(cell.rows) for one in all_results for cell in one.cells),
        "others": [
            {
                "results": other,
                "name": method.run_name(other),
                "failed": views.failed_guard(other),
                "device_words": views.device_words(other.cells[0].device),
                "facts": method.other_facts(other, results),
            }
            for other in all_results[1:]
        ],
        "method": method.method_lines(all_results),
        "environment": method.environment_facts(results),
        "hashes": provenance.hash_table(all_results),
    }


def report_json(context: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """The machine-readable report: conclusions, predictions with their kind, and the results with raw samples."""
    head = context["head"]
    return {
        "schema_version": REPORT_SCHEMA,
        "headline": {
            "kind": "measured",
            "workload": head["workload"],
            "baseline": head["baseline"].contestant if head["baseline"] else None,
            "models": [
                {
                    "name": card["name"],
                    "total_ms": card["row"].total_ms.model_dump() if card["row"] else None,
                    "speedup": card["row"].speedup.model_dump() if card["row"] and card["row"].speedup else None,
                    "stages_ms": card["row"].stages_ms if card["row"] else None,
                    "quality": card["record"].quality,
                    "follows": card["record"].follows,
                }
                for card in context["cards"]
            ],
        },
        "predicted": [
            asdict(one) | {"kind": "predicted"} for entry in context["predictions"] for one in entry["models"]
        ],
        "published": [
            asdict(row["known"])
            | {"kind": "published", **{key: row[key] for key in ("predicted_ms", "error", "blind_error")}}
            for row in context["checks"]
        ],
        "built": [
            group | {"resolutions": sorted(group["resolutions"]), "precisions": sorted(group["precisions"])}
            for group in context["builds"]
        ],
        "faults": context["faults"],
        "method": context["method"],
        "prediction_of_measured": [
            asdict(row["known"]) | {"predicted_ms": row["predicted_ms"], "error": row["error"]}
            for row in context["measured_checks"]
        ],
        "runtimes": [
            {"contestant": one["record"].name, "runtime": one["record"].runtime, "precision": one["record"].precision}
            | {key: one[key] and one[key].model_dump() for key in ("over_eager", "over_compiled")}
            | {"total_ms": one["row"].total_ms.model_dump(), "mfu": one["row"].mfu, "denoise_mfu": one["denoise_mfu"]}
            for one in context["runtimes"]
        ],
        "limits": [one | {"speedup": one["speedup"].model_dump()} for one in context["limits"]],
        "training": inputs.training,
        "published_loops": inputs.published_loops,
        "acceptance": inputs.acceptance,
        "sessions": inputs.sessions,
        "loads": [load.model_dump(mode="json") for load in inputs.loads],
        "results": [results.model_dump(mode="json", exclude={"pictures"}) for results in inputs.results],
    }


def render(context: dict[str, Any], template: str) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "ms": words.milliseconds,
        "long": words.long_seconds,
        "signed": words.signed_percent,
        "sec": words.seconds,
        "size": words.size,
        "count": words.count,
        "quality": views.quality_word,
        "times": words.times,
        "pct": words.percent,
        "interval": words.interval,
        "title_of": words.title_of,
        "stage": lambda stage: words.STAGE_WORDS.get(stage, stage),
    }
    if template.endswith(".html.j2"):
        from markupsafe import Markup

        context = context | {"css": Markup(context["css"])}
    return environment.get_template(template).render(**context)


def write_report(paths: list[Path], out: Path, title: str = "slimxl latency report") -> None:
    """Writes index.html, report.md and report.json into `out`, each whole or not at all.

    Raises UserError for no results, or a results file that cannot be read.
    """
    inputs = read_inputs(paths)
    if not inputs.results:
        raise UserError("no results files: give at least one, made by python -m bench run")
    context = make_context(inputs, title)
    for template, name in (("report.html.j2", "index.html"), ("report.md.j2", "report.md")):
        with replacing(out / name) as temporary:
            temporary.write_text(render(context, template), encoding="utf-8")
    write_json(out / "report.json", report_json(context, inputs))
    print(f"wrote {out / 'index.html'}, report.md and report.json")
