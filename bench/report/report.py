"""The report: one self-contained HTML page, a summary as Markdown, and everything as JSON, from results files."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from pydantic_core import to_jsonable_python

from bench.contestants.contestant import STAGES
from bench.floor.peaks import SOURCES
from bench.floor.predict import base_size, check_on_measured, check_predictions
from bench.quality.guard import MIN_LATENT_COSINE, MIN_PSNR_DB
from bench.report import (
    cards,
    kernels,
    latency,
    machine,
    method,
    models,
    quality,
    runtimes,
    serving,
    training,
)
from bench.report.elements import formatting
from bench.report.inputs import Inputs, read_inputs
from bench.report.predicted import predictions, searched
from bench.results import Results
from bench.search.front import FrontFile
from distill.common.errors import UserError
from distill.common.files import replacing, write_json
from distill.common.ownership import require_our_folder
from engines.choices import EIGHT_BITS

REPORT, SAMPLES = "report.json", "samples.csv"
NAMES = {"index.html": "report.html.j2", "report.md": "report.md.j2"}
TEMPLATES = Path(__file__).parent / "templates"
REPORT_SCHEMA = "slimxl.bench.report/2"


def make_context(inputs: Inputs, title: str, price: float | None = None) -> dict[str, Any]:
    """Everything the templates show, by section. The first results are the main ones; only those of the same machine
    are compared with each other; faults are those of all. `price` is in dollars an hour."""
    results = inputs.results[0]
    contestants = cards.make_cards(results)
    judged = quality.measures(results, inputs.tallies)
    return {
        "title": title,
        "results": results,
        "machine": method.machine_name(results),
        "rounds": method.rounds_text(results),
        "drawn": cards.drawn(results),
        "as_taught": cards.as_taught(contestants),
        "cards": contestants,
        "judged": judged,
        "head": cards.make_headline(results, contestants, judged),
        "fakes": [card.title for card in contestants if card.is_fake],
        "notes": cards.all_notes(inputs.results),
        "headline_faults": cards.headline_faults(results),
        "headline_table": cards.headline_table(contestants, judged),
        "others": [_other_run(other, results) for other in inputs.results[1:]],
        **_main_run(results, contestants),
        "quality_svgs": latency.quality_charts(results, contestants, judged),
        "price": price,
        **_comparisons(inputs),
        **_predictions(inputs.results),
        "fronts": [_front(front, inputs.results) for front in inputs.fronts],
        **_provenance(inputs.results, contestants, price),
    }


def _main_run(results: Results, contestants: list[cards.Card]) -> dict[str, Any]:
    return {
        "grid": cards.picture_grid(results, contestants),
        "captions": models.caption_table(results, contestants),
        "bars": latency.stage_bars(results, contestants),
        "stage_names": latency.stage_names(results),
        "stages": latency.stage_table(results, contestants),
        "workloads": latency.workload_table(results, contestants),
        "resolution_svg": latency.resolution_chart(results, contestants),
        "steps_svg": latency.steps_chart(results, contestants),
        "losses": models.loss_charts(contestants),
        "sizes": models.size_table(contestants),
    }


def _comparisons(inputs: Inputs) -> dict[str, Any]:
    """What holds several models, runtimes, layouts or loops against each other, on the machine of the main run."""
    on_machine = [one for one in inputs.results if one.host == inputs.results[0].host]
    figures, gains = runtimes.runtime_figures(on_machine), runtimes.model_gains(on_machine)
    return {
        "runtime_figures": figures,
        "runtimes": runtimes.runtime_table(figures),
        "model_gains": gains,
        "limits": runtimes.model_gain_table(gains, inputs.results[0].cells[0].name),
        "layouts": runtimes.layout_table(on_machine),
        "kernels": kernels.kernel_table(kernels.profiles(on_machine, inputs.loops)),
        "loops": [(file, training.loop_table(file)) for file in inputs.loops],
        "loads": [(load, serving.load_table(load), serving.load_conditions(load)) for load in inputs.loads],
    }


def _predictions(all_results: list[Results]) -> dict[str, Any]:
    measured = predictions.measured_latencies(all_results)
    known = predictions.known_latencies(measured)
    published = [check for check in check_predictions(known) if check.known.origin != predictions.MEASURED]
    sources = list(dict.fromkeys(check.known.origin for check in published))
    checked = check_on_measured(measured)
    models = predictions.predicted_models(all_results[0])
    predicted = predictions.all_predictions(known, models)
    return {
        "prediction_steps": predictions.STEPS,
        "prediction_size": base_size(models[0]),
        "predicted": predicted,
        "predictions": predictions.prediction_table(predicted, models),
        "known_in_8_bits": sum(one.precision in EIGHT_BITS for one in known),
        "known_in_half": sum(one.precision not in EIGHT_BITS for one in known),
        "measured_known": sum(one.origin == predictions.MEASURED for one in known),
        "calibration": predictions.calibration(known),
        "published": published,
        "publications": predictions.published_table(published, sources),
        "sources": sources,
        "source_urls": SOURCES,
        "error": predictions.error_sizes([check.error for check in published]),
        "blind": predictions.error_sizes([check.blind_error for check in published if check.blind_error is not None]),
        "measured_checks": checked,
        "checks": predictions.measured_table(checked),
        "measured_error": predictions.error_sizes([check.error for check in checked]),
    }


def _provenance(all_results: list[Results], contestants: list[cards.Card], price: float | None) -> dict[str, Any]:
    results = all_results[0]
    entries, faults = machine.entries(all_results, contestants), machine.all_faults(all_results)
    builds, hashes = models.builds(all_results), models.hash_table(all_results)
    return {
        "build_figures": builds,
        "builds": models.build_table(builds),
        "hashes": hashes,
        "quality": machine.quality_table(entries),
        "guard": {"psnr": f"{MIN_PSNR_DB:g}", "cosine": f"{MIN_LATENT_COSINE:g}"},
        "device": machine.device_table(entries, price),
        "device_ranges": machine.device_ranges(results.cells[0].device),
        "sustained": latency.sustained_charts(results, contestants),
        "random_weights": machine.random_weights(all_results),
        "absent": method.absent_readings(results),
        "rows_measured": sum(len(cell.rows) for one in all_results for cell in one.cells),
        "row_faults": faults,
        "fault_counts": machine.fault_counts(faults),
        "faults": machine.fault_table(faults),
        "method": method.method_lines(all_results),
        "environment": method.environment_facts(results),
    }


def _front(front: FrontFile, all_results: list[Results]) -> dict[str, Any]:
    found = searched.found_students(front, all_results)
    return {
        "file": front,
        "found": found,
        "table": searched.found_table(found),
        "chart": searched.found_chart(found),
        "error": predictions.error_sizes([one.error for one in found if one.error is not None]),
    }


def _other_run(other: Results, main: Results) -> dict[str, Any]:
    return {
        "name": method.run_name(other),
        "rows": latency.workload_table(other, cards.make_cards(other)),
        "device_ranges": machine.device_ranges(other.cells[0].device),
        "facts": method.other_facts(other, main),
    }


def report_json(context: dict[str, Any], inputs: Inputs) -> Any:
    """The machine-readable report: conclusions, predictions beside what was published and measured, and the results with
    raw samples."""
    head = context["head"]
    return to_jsonable_python(
        {
            "schema_version": REPORT_SCHEMA,
            "headline": {
                "kind": "fake" if context["fakes"] else "measured",
                "workload": head.workload,
                "baseline": head.baseline.name if head.baseline.row else None,
                "best": head.best and head.best.name,
                "best_is_worse_than_baseline": head.is_worse,
                "models": [_model_json(card, context["judged"]) for card in context["cards"]],
            },
            "predicted": [one for of_gpu in context["predicted"].values() for one in of_gpu],
            "published": [asdict(one) | {"error": one.error} for one in context["published"]],
            "prediction_of_measured": [asdict(one) | {"error": one.error} for one in context["measured_checks"]],
            "searched": [
                {"gpu": one["file"].gpu, "students": [student.as_json() for student in one["found"]]}
                for one in context["fronts"]
            ],
            "built": context["build_figures"],
            "faults": context["row_faults"],
            "method": context["method"],
            "runtimes": [one.as_json() for one in context["runtime_figures"]],
            "limits": context["model_gains"],
            "training": inputs.loops,
            "loads": inputs.loads,
            "results": [results.model_dump(mode="json", exclude={"pictures"}) for results in inputs.results],
        }
    )


def _model_json(card: cards.Card, judged: list[quality.Measure]) -> dict[str, Any]:
    row = card.row
    return {
        "name": card.name,
        "total_ms": row and row.total_ms,
        "speedup": row and row.speedup,
        "stages_ms": row and row.stages_ms,
        "quality": card.record.quality,
        "follows": card.record.follows,
        "judged": {one.name: one.values[card.name] for one in judged if card.name in one.values},
    }


def sample_rows(all_results: list[Results]) -> Iterator[dict[str, Any]]:
    """Every timed call as one line of the CSV; times in milliseconds, the number of the results file from 1."""
    for number, results in enumerate(all_results, 1):
        for cell in results.cells:
            load = {key: cell.workload[key] for key in ("resolution", "steps", "batch", "guidance_scale", "scheduler")}
            for row in cell.rows:
                record = results.contestant(row.contestant)
                who = {"contestant": record.name, "runtime": record.runtime, "precision": record.precision}
                for sample in row.samples:
                    times = {"round": sample.round, "started_s": sample.started_s, "total_ms": sample.total_ms}
                    stages = {f"{stage}_ms": sample.stages_ms.get(stage) for stage in STAGES}
                    yield {"file": number} | who | load | times | stages


def write_samples(file: TextIO, all_results: list[Results]) -> None:
    rows = list(sample_rows(all_results))
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def markdown_text(value: Any) -> Any:
    """A text that Markdown shows as it is, in a table too."""
    if not isinstance(value, str):
        return value
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", re.sub(r"\s*\n\s*", " ", value))


def render(context: dict[str, Any], template: str) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=markdown_text if template.endswith(".md.j2") else None,
    )
    environment.filters |= {name: write for name, write in vars(formatting).items() if callable(write)}
    return environment.get_template(template).render(**context)


def write_report(
    paths: list[Path], out: Path, title: str = "slimxl latency report", price: float | None = None
) -> None:
    """Writes index.html, report.md, report.json and samples.csv into `out`, each whole or not at all. `price` is what an
    hour of the machine costs, in dollars.

    Raises UserError for no results, a results file that cannot be read, a price of nothing, or an `out` that holds
    something else.
    """
    if price is not None and not 0 < price < math.inf:
        raise UserError(
            f"--price {price:g} is what an hour of the machine costs in dollars: a number above 0, e.g. 1.89"
        )
    require_our_folder(out, "a report", [REPORT], ("schema_version", "headline", "predicted"))
    inputs = read_inputs(paths)
    if not inputs.results:
        raise UserError("no results files: give at least one, made by python -m bench run")
    context = make_context(inputs, title, price)
    write_json(out / REPORT, report_json(context, inputs))  # first, for it says whose the others are
    with replacing(out / SAMPLES) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        write_samples(file, inputs.results)
    for name, template in NAMES.items():
        with replacing(out / name) as temporary:
            temporary.write_text(render(context, template), encoding="utf-8")
    print(f"wrote {out / 'index.html'}, report.md, report.json and {SAMPLES}")
