"""What fewer steps cost on the mini family: how often pictures follow their captions, against what a picture takes.

Compute is counted: the UNet's passes of a picture times its FLOP a pass (guidance takes two a step). Latency is measured,
from prompt to pixels, all models in turn, so what slows the machine slows all. Students of one name are seeds of one recipe:
each is judged, one is timed. A row that is there is kept, so the same command goes on where it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.checkpoints.folder import checkpoint_hash, find_architecture_of, find_family
from distill.checkpoints.load import load_pipeline
from distill.checkpoints.sampling import sampling_of
from distill.checkpoints.sources import resolve
from distill.common.errors import UserError, require_between
from distill.common.files import read_object, replacing, write_json
from distill.common.ownership import require_our_files
from distill.common.progress import say, track
from distill.data.shapes import wilson
from distill.mini.judge import GUIDANCE_SCALE, READER, check_pictures, judge_checkpoint
from distill.models.catalogue import catalogue_row

NAME = "few-steps"
CAPTION = "a large red circle at the center on a white background"
ROUNDS = 9
"""Of nine sorted ratios the second and the last but one enclose the median 96 times in 100: 1 − 2 · 10 / 2⁹."""
WRITTEN = tuple(f"{NAME}.{kind}" for kind in ("json", "md", "svg"))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model, drawn in some steps at a guidance scale; `passes` are the UNet's, of one picture."""

    name: str
    folder: Path
    steps: int
    guidance_scale: float
    passes: int


def parse_point(text: str, workdir: Path) -> list[Point]:
    """`NAME=MODEL@STEPS,…`: with its own guidance where the model knows it, else the judge's. Raises UserError."""
    name, equals, rest = text.partition("=")
    source, at, numbers = rest.rpartition("@")
    counts = [int(number) if number.isdecimal() and len(number) < 20 else 0 for number in numbers.split(",")]
    if not (name and equals and source and at and all(counts)):
        raise UserError(f"{text!r} is not of the form NAME=MODEL@STEPS,…, e.g. teacher=mini:sdxl@4,25")
    folder = resolve(source, workdir)
    sampling = sampling_of(folder)
    points = []
    for steps in counts:
        require_between(1, 1000, steps=steps)
        if sampling:
            sampling.check(steps)
        scale = GUIDANCE_SCALE if sampling is None or sampling.guidance_scale is None else sampling.guidance_scale
        passes = steps if sampling and sampling.one_pass else 2 * steps
        points.append(Point(name=name, folder=folder, steps=steps, guidance_scale=scale, passes=passes))
    return points


def compare_steps(points: Sequence[Point], results: Path, *, pictures: int) -> dict[str, Any]:
    """Judges each point, and writes few-steps.json, .md and .svg into `results`. Raises UserError for bad input."""
    if not points:
        raise UserError("no model to compare: give NAME=MODEL@STEPS,…, e.g. teacher=mini:sdxl@4,25")
    for point in points:
        check_pictures(pictures, point.steps, find_family(point.folder).resolutions)
    path = results / f"{NAME}.json"
    require_our_files(results, WRITTEN, f"{NAME}.json", ("rows", "settings"), "--results")
    settings = {"pictures": pictures, "reader": READER}
    known = read_object(path) if path.exists() else {}
    held = {_key(row): row for row in _rows(known, path)} if known.get("settings") == settings else {}
    rows = []
    recipes = {point.name: recipe for point in points if (recipe := _recipe(point.folder))}
    for point in points:
        row = _about(point)
        if _key(row) in held:
            row |= {name: held[_key(row)][name] for name in ("followed", "interval")}
        else:
            say(f"{point.name}: {pictures} pictures in {point.steps} steps")
            row["followed"] = judge_checkpoint(point.folder, count=pictures, steps=point.steps)
            row["interval"] = wilson(row["followed"]["all"], pictures)
            held[_key(row)] = row
        rows.append(row)
        report: dict[str, Any] = {"settings": settings, "rows": rows, "recipes": recipes, "latency": []}
        write_json(path, report)
    report["latency"] = measure_latency(list({(one.name, one.steps): one for one in reversed(points)}.values())[::-1])
    write_json(path, report)
    with replacing(results / f"{NAME}.md") as temporary:
        temporary.write_text(table(report), encoding="utf-8")
    _plot(report, results / f"{NAME}.svg")
    return report


def measure_latency(points: Sequence[Point]) -> list[dict[str, Any]]:
    """For each point the milliseconds of a picture of the first size in each round, their median, and how many times
    `faster` than the first point it is: the median of the per-round ratios, with its 96 % interval."""
    pipes = {point.folder: load_pipeline(point.folder, torch.float32) for point in points}
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    size = find_family(points[0].folder).resolutions[0]
    taken: list[list[float]] = [[] for _ in points]
    for number in track(range(ROUNDS + 1), "latency, models in turn", unit="round"):  # the first is a warm-up
        for index in [(number + one) % len(points) for one in range(len(points))]:
            point, begin = points[index], time.perf_counter()
            pipes[point.folder](
                CAPTION,
                width=size.width,
                height=size.height,
                num_inference_steps=point.steps,
                guidance_scale=point.guidance_scale,
                generator=torch.Generator().manual_seed(number),
                output_type="np",
            )
            taken[index] += [1000 * (time.perf_counter() - begin)] if number else []
    told = []
    for point, one in zip(points, taken, strict=True):
        ratios = sorted(before / now for before, now in zip(taken[0], one, strict=True))
        faster = {"median": statistics.median(ratios), "low": ratios[1], "high": ratios[-2]}
        told.append(
            {"name": point.name, "steps": point.steps, "ms": one, "median_ms": statistics.median(one), "faster": faster}
        )
    return told


def _about(point: Point) -> dict[str, Any]:
    architecture = find_architecture_of(point.folder)
    a_pass = catalogue_row(architecture).tflop_per_call / 2
    return {
        "name": point.name,
        "hash": checkpoint_hash(point.folder),
        "scheduler": read_object(point.folder / "scheduler" / "scheduler_config.json").get("_class_name"),
        "architecture": architecture.name,
        "steps": point.steps,
        "guidance_scale": point.guidance_scale,
        "passes": point.passes,
        "gflop": 1000 * a_pass * point.passes,
    }


def _rows(known: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """Of an earlier report. Raises UserError where it is damaged."""
    rows = known["rows"]
    needed = {"hash", "scheduler", "steps", "guidance_scale", "followed", "interval"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise UserError(f"{path} is damaged: its rows are not as this command writes them; remove it first")
    return rows


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["hash"], row["scheduler"], row["steps"], row["guidance_scale"]


def _recipe(folder: Path) -> Any:
    """What a student was taught by; None where nobody says."""
    path = folder / "slimxl.json"
    return read_object(path).get("recipe") if path.is_file() else None


def _pooled(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each name and number of steps: the `shares` of its seeds, their mean with its interval over all pictures,
    and its latency."""
    pooled = []
    for latency in report["latency"]:
        seeds = [row for row in report["rows"] if (row["name"], row["steps"]) == (latency["name"], latency["steps"])]
        shares = [row["followed"]["all"] for row in seeds]
        interval = wilson(statistics.mean(shares), len(shares) * report["settings"]["pictures"])
        pooled.append(seeds[0] | latency | {"shares": shares, "share": statistics.mean(shares), "interval": interval})
    return pooled


def table(report: Mapping[str, Any]) -> str:
    """Markdown: one row a model and number of steps, with compute and latency against the first row's."""
    rows, pictures = _pooled(report), report["settings"]["pictures"]
    lines = [
        "| model | steps | UNet passes | GFLOP | less than the first | ms | faster than the first (96 %) "
        "| right in everything (95 %) | seeds |",
        "|---|" + "---:|" * 8,
    ]
    for row in rows:
        (low, high), faster = row["interval"], row["faster"]
        right = f"{row['share']:.0%} ({low:.0%}–{high:.0%})"
        less = f"{rows[0]['gflop'] / row['gflop']:.1f}×"
        gain = f"{faster['median']:.1f}× ({faster['low']:.1f}–{faster['high']:.1f})"
        seeds = ", ".join(f"{share:.0%}" for share in row["shares"])
        lines.append(
            f"| {row['name']} | {row['steps']} | {row['passes']} | {row['gflop']:.2f} | {less} | {row['median_ms']:.0f} | "
            f"{gain} | {right} | {seeds} |"
        )
    return "\n".join(
        [*lines, "", f"{pictures} pictures of unseen captions each; latency of one, in {ROUNDS} rounds.", ""]
    )


def _plot(report: Mapping[str, Any], path: Path) -> None:
    """A line a model: the share of right pictures with its interval, against latency."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    pooled = _pooled(report)
    for name in dict.fromkeys(row["name"] for row in pooled):
        rows = sorted((row for row in pooled if row["name"] == name), key=lambda row: row["median_ms"])
        latencies, shares = [row["median_ms"] for row in rows], [row["share"] for row in rows]
        bars = [[share - row["interval"][0] for share, row in zip(shares, rows, strict=True)]]
        bars.append([row["interval"][1] - share for share, row in zip(shares, rows, strict=True)])
        axes.errorbar(latencies, shares, yerr=bars, marker="o", capsize=3, label=name)
        for row in rows:
            axes.annotate(
                str(row["steps"]),
                (row["median_ms"], row["share"]),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=8,
            )
    axes.set(xscale="log", xlabel="ms for a picture (numbers: steps)", ylabel="pictures right in everything")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
