"""Where the models come from: how the students learnt, what each station of the road weighs, what was built, hashes."""

from __future__ import annotations

from typing import Any

from bench.report import words
from bench.report.charts import Axis, Series, line_chart
from bench.report.views import colours
from bench.results import ContestantRecord, Results


def artifact(record: ContestantRecord, kind: str) -> dict[str, Any] | None:
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


def engines_run(all_results: list[Results]) -> set[str]:
    """sha256 of every engine that a contestant held which finished at least one workload."""
    run: set[str] = set()
    for results in all_results:
        finished = {row.contestant for cell in results.cells for row in cell.rows}
        run.update(*(record.engines or [] for record in results.contestants if record.name in finished))
    return run


def build_table(all_results: list[Results]) -> list[dict[str, Any]]:
    """Every bundle's engines by flavor and target. `loaded` counts those that a contestant ran; `ran` says that a UNet
    is among them: text encoders and the VAE decoder can be the same files for several models."""
    run = engines_run(all_results)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    seen = set()
    for record in (record for results in all_results for record in results.contestants):
        bundle = artifact(record, "bundle")
        for engine in bundle["engines"] if bundle else []:
            source = bundle["source"]["sha256"] if bundle else ""
            if (source, engine["file"], engine["sha256"]) in seen:
                continue
            seen.add((source, engine["file"], engine["sha256"]))
            capabilities = tuple(engine["compute_capabilities"])
            group = groups.setdefault(
                (source, engine["flavor"], engine["flavor_version"], capabilities),
                {
                    "title": words.title_of(record.name),
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
                    "ran": False,
                    "loaded": 0,
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
            group["loaded"] += engine["sha256"] in run
            group["ran"] |= engine["component"] == "unet" and engine["sha256"] in run
    return list(groups.values())


def hash_table(all_results: list[Results]) -> list[dict[str, str]]:
    """Every hash the artifacts carry, so that a reader can tell whether he holds the same files."""
    table: dict[tuple[str, str], None] = {}
    for record in (record for results in all_results for record in results.contestants):
        for one in record.artifacts:
            for component, part in one.get("components", {}).items():
                hashes = part.get("sha256", {})
                files = hashes.items() if isinstance(hashes, dict) else [("model.onnx", hashes)]
                table |= {(f"{record.name}: {component}/{file}", sha): None for file, sha in files}
            if one["kind"] == "bundle":
                table[f"{record.name}: source checkpoint", one["source"]["sha256"]] = None
                for engine in one["engines"]:
                    table[f"{record.name}: {engine['file']}", engine["sha256"]] = None
                    table[f"{record.name}: ONNX of {engine['component']}", engine["onnx_sha256"]] = None
    return [{"what": what, "sha256": sha} for what, sha in table]
