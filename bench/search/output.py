"""What a search writes: search.json, a table, a plot, and a recipe for each proposal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.search.costs import StudentCosts
from bench.search.front import SEARCH_SCHEMA, work_of
from bench.search.latency import Interval, median_error
from bench.search.shrink import Student
from bench.search.space import layer_map_of
from distill.common.errors import UserError
from distill.common.files import replacing, write_json
from distill.common.progress import say
from distill.models.architectures import Architecture
from distill.models.module_map import ModuleMap
from distill.training.objectives import Distill
from distill.training.recipes import RECIPES, Recipe, find_recipe, peek_teacher

COLOURS = {"greedy": "#8a94a6", "search": "#1f4e8c", "one-shot": "#c4661f", "random": "#b8b8b8", "published": "#2b7a3d"}


def write_front(
    out: Path, teacher: str, architecture: Architecture, costs: StudentCosts, students: Sequence[Student]
) -> None:
    """`teacher` is the source of the model that was searched, which the recipes name."""
    recipes = {}
    (out / "recipes").mkdir(exist_ok=True)
    for student in students:
        if student.budget and student.way == "search":
            name = re.sub(r"[^\w.]+", "-", student.budget).strip("-")
            recipe = replace(make_recipe(teacher, architecture, student.modules), name=f"searched-{name}")
            write_json(out / "recipes" / f"{name}.json", recipe.as_dict())
            recipes[student.budget] = f"recipes/{name}.json"
    rows = [_row(student, costs) for student in students]
    write_json(
        out / "search.json",
        {
            "schema_version": SEARCH_SCHEMA,
            "teacher": teacher,
            "depth": str(architecture.depth),
            "family": architecture.family.name,
            "gpu": costs.gpu,
            "runtime": costs.runtime,
            "workload": work_of(vars(costs.workload)),
            "latency_stands_on": costs.model.origin,
            "checks": [asdict(check) | {"error": check.error} for check in costs.checks],
            "recipes": recipes,
            "students": rows,
        },
    )
    text = _table(costs, rows, recipes)
    with replacing(out / "search.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    _plot(costs, rows, out / "search.svg")
    say(text)
    for path in recipes.values():
        say(f"python -m distill train --recipe {out / path} --cache CACHE --out OUT")


def _row(student: Student, costs: StudentCosts) -> dict[str, Any]:
    modules = student.modules
    return {
        "way": student.way,
        "name": student.name or student.budget or "",
        "depth": str(modules.student),
        "layer_map": layer_map_of(modules),
        "parameters": costs.parameters(modules),
        "latency_ms": asdict(costs.latency_ms(modules)),
        "speedup": asdict(costs.speedup(modules)),
        "change": student.change,
    }


def make_recipe(teacher: str, architecture: Architecture, modules: ModuleMap) -> Recipe:
    """By the road of the first recipe of the family that takes the student and teaches it all of its steps, none of the
    few-step ones, with the searched model in place of its first teacher. Raises UserError where there is none."""
    of_family = [
        name
        for name, make in RECIPES.items()
        if peek_teacher(recipe := make()).family.name == architecture.family.name
        and all(isinstance(stage.objective, Distill) for stage in recipe.stages)
    ]
    for name in of_family:
        try:
            recipe = find_recipe(name, student=str(modules.student), layer_map=layer_map_of(modules))
        except UserError:  # one of adapters, or with stages that are no shorter than the student
            continue
        first = recipe.stages[0].teacher
        stages = (
            replace(stage, teacher=teacher if stage.teacher == first else stage.teacher) for stage in recipe.stages
        )
        return replace(recipe, stages=tuple(stages))
    raise UserError(f"no recipe of the {architecture.family.name} family takes {modules.student}")


def _shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the way down only the students at some distance from each other."""
    down = [row for row in rows if row["way"] == "greedy"]
    every = max(1, len(down) // 8)
    return [*down[::every], *(row for row in rows if row["way"] != "greedy")]


def _table(costs: StudentCosts, rows: Sequence[dict[str, Any]], recipes: dict[str, str]) -> str:
    lines = [
        f"# Students of {costs.architecture.name} for {costs.machine}",
        "",
        f"{costs.workload.name}. Latencies are predicted (90 % intervals) from {costs.model.origin}. `change` is the "
        "relative mean square change of noise_pred before any training: a guide to quality, not quality.",
        "",
        "| way | student | depth | parameters | latency in ms | speed-up | change |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _shown(rows):
        latency, speedup = Interval(**row["latency_ms"]), Interval(**row["speedup"])
        lines.append(
            f"| {row['way']} | {row['name']} | `{row['depth']}` | {row['parameters']:,} | {latency} | {speedup} | "
            f"{row['change']:.3g} |"
        )
    if costs.checks:
        lines += [
            "",
            f"How far the prediction is off, each measured depth from the others: {median_error(costs.checks):.1%} in the "
            "median.",
            "",
            "| measured | depth | one UNet call, ms | predicted | error |",
            "|---|---|---|---|---|",
            *(
                f"| {one.name} | `{one.depth}` | {one.measured_ms:.4g} | {one.predicted_ms:.4g} | {one.error:+.1%} |"
                for one in costs.checks
            ),
        ]
    lines += ["", *(f"{budget}: `{path}`" for budget, path in recipes.items()), ""]
    return "\n".join(lines)


def _plot(costs: StudentCosts, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Change against predicted speed-up; whiskers are 90 % intervals. What changes nothing has no place on the scale."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    labels = {
        "greedy": "way down",
        "search": "proposal",
        "one-shot": "single scores added up",
        "random": "at random",
        "published": "published cut",
    }
    for way, colour in COLOURS.items():
        points = [row for row in rows if row["way"] == way and row["change"] > 0]
        if not points:
            continue
        x, y = [row["speedup"]["value"] for row in points], [row["change"] for row in points]
        if way == "greedy":
            axes.plot(x, y, color=colour, linewidth=1, marker=".", markersize=3, label=labels[way], zorder=1)
            continue
        low = [row["speedup"]["value"] - row["speedup"]["low"] for row in points]
        high = [row["speedup"]["high"] - row["speedup"]["value"] for row in points]
        marker, zorder = ("o", 4) if way == "search" else ("s", 3)
        axes.errorbar(
            x,
            y,
            xerr=[low, high],
            fmt=marker,
            color=colour,
            markersize=5,
            elinewidth=0.8,
            alpha=0.9,
            label=labels[way],
            zorder=zorder,
        )
        if way in ("search", "published"):
            for row, place, change in zip(points, x, y, strict=True):
                axes.annotate(
                    row["name"], (place, change), textcoords="offset points", xytext=(6, 5), fontsize=8, color=colour
                )
    axes.set(
        yscale="log",
        xlabel=f"predicted speed-up, {costs.machine}, {costs.workload.name}",
        ylabel="relative change of noise_pred, untrained",
        title=f"What may be left out of {costs.architecture.name}",
    )
    axes.xaxis.label.set_fontsize(8)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
