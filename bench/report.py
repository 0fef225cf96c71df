"""The report: one self-contained HTML page, the same as Markdown, and everything as JSON, from results files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench import views, words
from bench.peaks import PEAKS
from bench.predict import Check, Known, check_on_measured, check_predictions, floor_ms, predict, published_known
from bench.quality import MIN_LATENT_COSINE, MIN_PSNR_DB
from bench.results import Inputs, Results, read_inputs
from bench.runtimes import MODELS, limit_table, model_of, runtime_table, shape_table
from distill.architectures import Resolution
from distill.errors import UserError
from distill.files import replacing, write_json
from distill.shapes import ATTRIBUTES

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


def machine_name(results: Results) -> str:
    """The device the figures were taken on, in words."""
    if results.gpu["identity"]["name"]:
        return str(results.gpu["identity"]["name"])
    cpu = results.environment["cpu"]
    return f"a CPU ({cpu['model']}, {cpu['cores_usable']} cores)"


MEASURED = "measured by slimxl"


def measured_latencies(all_results: list[Results]) -> list[Known]:
    """What was measured with guidance on a GPU of the catalogue, of models of the catalogue, the baseline first."""
    known = []
    for results in all_results:
        gpu = next((key for key, peak in PEAKS.items() if results.peak and peak.name == results.peak["name"]), None)
        if gpu is None:
            continue
        models = {record.name: model_of(record) for record in results.contestants}
        for cell in results.cells:
            load = cell.workload
            for row in sorted(cell.rows, key=lambda row: row.contestant != results.baseline):
                model = models[row.contestant]
                if model is None or row.refused or load["guidance_scale"] <= 1:
                    continue
                size = Resolution.parse(load["resolution"])
                known.append(
                    Known(
                        gpu,
                        model,
                        load["steps"],
                        runtime_class(results.contestant(row.contestant).runtime),
                        row.total_ms.value,
                        floor_ms(gpu, model, load["steps"], size, load["batch"]),
                        MEASURED,
                        load["resolution"],
                        load["batch"],
                    )
                )
    return known


def known_latencies(measured: list[Known]) -> list[Known]:
    """Published figures, and those measured at the size that predictions are made for."""
    return published_known() + [one for one in measured if (one.resolution, one.batch) == ("1024x1024", 1)]


def runtime_class(runtime: str) -> str:
    """The published figures' word for a runtime of ours."""
    lower = runtime.lower()
    if "tensorrt" in lower:
        return "TensorRT"
    return "compiled" if "compile" in lower else "diffusers" if "eager" in lower else runtime


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


def absent_readings(results: Results) -> dict[str, list[str]]:
    """Reason -> what could not be read for that reason."""
    absent: dict[str, list[str]] = {}
    for what, why in {**results.gpu["missing"], **results.environment["cpu"]["missing"]}.items():
        absent.setdefault(why, []).append(what.replace("_", " "))
    if len(absent.get(results.gpu["reason"] or "", [])) > 4:
        absent[results.gpu["reason"]] = ["GPU clocks, temperature, power, throttle reasons, energy and memory"]
    return absent


def environment_facts(results: Results) -> list[tuple[str, str]]:
    env, gpu = results.environment, results.gpu["identity"]
    cpu = env["cpu"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items() if version)
    facts = [
        ("GPU", gpu["name"] or f"none read: {results.gpu['reason']}"),
        ("CPU", f"{cpu['model']}, {cpu['cores_usable']} usable cores, governor {cpu['governor'] or 'unknown'}"),
        ("memory", f"{words.size(cpu['memory_bytes'])}, at most {words.size(env['peak_rss_bytes'])} used by the run"),
        ("system", f"{env['system']}, Python {env['python']}"),
        ("packages", packages),
        (
            "threads",
            f"torch {env['torch_threads']}"
            + "".join(f", {key}={value}" for key, value in env["thread_variables"].items()),
        ),
        ("commit", env["commit"] or "not in a repository"),
        ("command", results.command),
        ("when", f"{results.created_utc}, took {words.seconds(results.seconds)}"),
    ]
    if gpu["name"]:
        told = ("uuid", "driver", "compute_capability", "power_limit_w", "max_sm_clock_mhz", "board_part_number")
        facts.insert(
            1, ("board", ", ".join(f"{key.replace('_', ' ')} {gpu[key]}" for key in told if gpu.get(key) is not None))
        )
    return facts


def method_lines(results: Results) -> list[str]:
    """The method in full, in the order in which a sceptic would ask."""
    load = results.cells[0].workload
    device = results.environment["device"]
    clock = "CUDA events in the device's stream" if device == "cuda" else "the monotonic clock"
    return [
        "Timed: prompt in, uint8 pixels out. Tokenising, both text encoders, every denoising step with scheduler and "
        "guidance, VAE decode, and the conversion to pixels. Not timed: loading, the first picture (both told apart as "
        "cold start), PNG compression, saving.",
        f"Clock: {clock}, one mark at the end of each stage, all on one timeline; an independent clock around the "
        "whole call gives the total, and a row whose stages miss it by over 1 % says so.",
        f"Main workload: {results.cells[0].name}; scheduler {load['scheduler']} (the checkpoint's own where it says "
        f"default), seed {load['seed']}; other rows change one thing at a time.",
        "Order: warm-up until two calls agree within 5 %, then rounds A B C, B C A, C A B, so that what happens to "
        "the machine happens to all; workloads are visited twice, there and back again. The garbage collector runs "
        "between rounds, never inside a call.",
        "Medians; 95 % percentile-bootstrap intervals over 2000 resamples, none from fewer than six runs. A speed-up "
        "is the median of the per-round ratios, with rounds resampled as pairs.",
        "Percentiles only where a binomial bound supports them at 99 % confidence. Raw samples are in the JSON.",
        "FLOPs are counted on meta tensors (a multiply-add is two); bytes are each weight once a call plus inputs and "
        "outputs at two bytes. A row faster than its floor is refused.",
        "Quality: the same prompt, seed and steps by the same checkpoint in diffusers, fp32, on the same device.",
        "Built and measured are different things: an engine counts as measured only where its own flavor ran here.",
    ]


def make_context(inputs: Inputs, title: str) -> dict[str, Any]:
    """Everything the templates show; the first results are the main ones."""
    all_results = inputs.results
    results = all_results[0]
    measured = measured_latencies(all_results)
    known = known_latencies(measured)
    checks = [check for check in check_predictions(known) if check.known.origin != MEASURED]
    measured_checks = check_on_measured(measured)
    cards = views.model_cards(results)
    sizes = views.size_table(results)
    follows = [card["record"].follows for card in cards if card["record"].follows]
    return {
        "title": title,
        "css": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "results": results,
        "machine": machine_name(results),
        "colour": views.colours(results),
        "head": views.headline(results),
        "cards": cards,
        "grid": views.picture_grid(results),
        "follows": follows,
        "follows_keys": [key for key in (*ATTRIBUTES, "all") if key in follows[0]] if follows else [],
        "bars": views.stage_bars(results),
        "stages": views.stage_names(results),
        "resolutions": views.resolution_table(results),
        "resolution_svg": views.resolution_chart(results),
        "steps_svg": views.steps_chart(results),
        "speedup_svg": views.speedup_chart(results),
        "losses": views.loss_charts(results),
        "sizes": sizes,
        "size_rows": [row for row in SIZE_ROWS if any(one[row[1]] is not None for one in sizes)],
        "device_words": views.device_words(results.cells[0].device),
        "builds": views.build_table(results),
        "prediction_steps": STEPS,
        "prediction_models": MODELS,
        "predictions": _predictions(known),
        "known": known,
        "calibration": [_named(one, one.gpu) for one in known if one.runtime == RUNTIME],
        "failed": views.failed_guard(results),
        "checks": [_check_row(check) for check in checks],
        "sources": list(dict.fromkeys(check.known.origin for check in checks)),
        "error": _errors([check.error for check in checks]),
        "blind": _errors([check.blind_error for check in checks if check.blind_error is not None]),
        "measured_checks": [_check_row(check) for check in measured_checks],
        "measured_error": _errors([check.error for check in measured_checks]),
        "runtimes": runtime_table(all_results),
        "limits": limit_table(all_results),
        "shapes": shape_table(all_results),
        "kernels": views.kernel_table(all_results, inputs.training),
        "published_loops": inputs.published_loops,
        "training": [row for one in inputs.training for row in one["rows"]],
        "acceptance": inputs.acceptance,
        "sessions": inputs.sessions,
        "loads": inputs.loads,
        "guard": {"psnr": f"{MIN_PSNR_DB:g}", "cosine": f"{MIN_LATENT_COSINE:g}"},
        "absent": absent_readings(results),
        "faults": views.loudest_words(results),
        "fault_counts": views.fault_counts(results),
        "main_faults": views.main_faults(results),
        "rows_measured": sum(len(cell.rows) for cell in results.cells),
        "others": [
            {
                "results": other,
                "machine": machine_name(other),
                "runtimes": list(dict.fromkeys(record.runtime for record in other.contestants)),
                "failed": views.failed_guard(other),
            }
            for other in all_results[1:]
        ],
        "method": method_lines(results),
        "environment": environment_facts(results),
        "hashes": views.hash_table(results),
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
