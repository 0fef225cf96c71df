"""The tables of one model on several runtimes, from results as a GPU would leave them: made up, so exact."""

import json
from functools import cache

import pytest

from bench.floor.peaks import PEAKS
from bench.floor.predict import floor_ms
from bench.floor.roofline import ModelConfigs, component_costs, total_flops
from bench.measure.clock import Sample
from bench.measure.stats import Estimate
from bench.report.elements.formatting import by_size
from bench.report.report import write_report
from bench.report.runtimes import layout_table, model_gains, quotient, runtime_figures
from bench.results import Results, read_results
from bench.workload import Workload
from distill.models.architectures import ARCHITECTURES
from distill.models.resolution import Resolution

SIZES = ("1024x1024", "1536x640")


@cache
def about(model):
    """(UNet parameters, costs, configs) of an architecture at the main workload."""
    configs = ModelConfigs.of(ARCHITECTURES[model].configs)
    costs = component_costs(configs, Workload(resolution=Resolution.parse(SIZES[0]), steps=30))
    told = {
        name: {"calls": calls, "parameters": cost.parameters, "flops": cost.flops, "bytes": cost.bytes}
        for name, (calls, cost) in costs.items()
    }
    return told["unet"]["parameters"], told, dict(configs.texts)


def gpu_results(template, contestants, sizes=SIZES[:1], part="x"):
    """A results file of the suite. `contestants`: name -> (spec, runtime, precision, [milliseconds of a round])."""
    value = json.loads(template.read_text())
    peak = PEAKS["a100-sxm"]
    value["peak"] = {"name": peak.name, "tflops": peak.tflops, "terabytes_per_s": peak.terabytes_per_s}
    value["peak"] |= {"compute_capability": "8.0", "nvml_names": [], "eight_bits": dict(peak.eight_bits)}
    value["gpu"]["identity"] |= {"name": "NVIDIA A100-SXM4-80GB"}
    value |= {"family": "sdxl", "baseline": next(iter(contestants)), "command": f"python -m bench gpu --parts {part}"}
    record, cell = value["contestants"][0], value["cells"][0]
    value["contestants"], value["cells"] = [], []
    for name, (spec, runtime, precision, _) in contestants.items():
        parameters, costs, configs = about(name.split()[0])
        made = {"name": name, "spec": spec, "runtime": runtime, "precision": precision, "device": "cuda"}
        made |= {"parameters": parameters, "costs": costs, "configs": configs, "costs_why": None}
        quality = {"passed": True, "words": [], "psnr_db": 41.2, "latent_cosine": 0.9991, "identical": False}
        made |= {"quality": quality, "cold": {"load_ms": 4200.0, "first_image_ms": 9100.0}}
        made |= {"energy": {"j_per_image": 500.0, "mean_power_w": 300.0, "seconds": 10.0, "images": 6}}
        memory = {"device_added_bytes": 4_500_000_000, "allocator_peak_bytes": None, "rss_added_bytes": 10_000_000}
        value["contestants"].append(record | made | {"memory": memory | {"why": None}})
    for index, size in enumerate(sizes):
        rows = []
        for name, (_, _, _, totals) in contestants.items():
            row = dict(cell["rows"][0]) | {"contestant": name, "flops": 4e14, "observed": []}
            middle = sorted(totals)[len(totals) // 2]
            row["floor_ms"] = floor_ms("a100-sxm", name.split()[0], 30, Resolution.parse(size))
            row["first_ms"] = [middle + 900 * index, middle + 5]
            samples = [
                Sample(total, {"denoise": 0.94 * total, "vae_decode": 0.06 * total}, [total / 32], 9.0, round=number)
                for number, total in enumerate(totals)
            ]
            rows.append(row | {"samples": samples})
        load = cell["workload"] | {"resolution": size, "steps": 30, "guidance_scale": 5.0}
        named = f"{size}, 30 steps, batch 1, guidance 5"
        value["cells"].append(cell | {"workload": load, "name": named, "rows": rows, "failures": {}})
    return Results.model_validate(value)


def rounds(milliseconds):
    return [milliseconds * (1 + 0.001 * (number % 3)) for number in range(8)]


@pytest.fixture(scope="session")
def suite_results(results_path):
    """The eager, compiled, flavor and layouts parts."""
    eager, dynamo = ("diffusers eager", "fp16"), ("diffusers + torch.compile", "fp16")
    times = {"sdxl": 3300.0, "ssd-1b": 2240.0, "vega": 1650.0}
    plain = {model: ("eager@fp16:x", *eager, rounds(one)) for model, one in times.items()}
    both = {f"{model} eager": entry for model, entry in plain.items()}
    both |= {f"{model} compiled": ("compiled@fp16:x", *dynamo, rounds(one / 1.25)) for model, one in times.items()}
    ours = {"vega eager": plain["vega"]}
    ours["vega tensorrt"] = ("bundle@tensorrt:x", "slimxl bundle, tensorrt", "as built", rounds(1000.0))
    layouts = {
        f"vega {one}": (
            f"bundle@tensorrt+{one}:x",
            f"slimxl bundle, tensorrt, {one}",
            "as built",
            rounds(1000.0 + index),
        )
        for index, one in enumerate(("shared", "ranged", "per-resolution", "no-graphs"))
    }
    return [
        gpu_results(results_path, plain, SIZES, "eager"),
        gpu_results(results_path, both, part="compiled"),
        gpu_results(results_path, ours, part="tensorrt:vega"),
        gpu_results(results_path, layouts, SIZES, "layouts:tensorrt"),
    ]


@pytest.mark.parametrize(("milliseconds", "told"), [(1100.0, "slower in int8: 0.91 times as fast"), (900.0, "")])
def test_8_bits_are_held_against_half_precision_and_their_own_peak(results_path, milliseconds, told):
    """A row of the same model on another runtime, or in another layout, is no measure of what 8 bits do."""
    contestants = {
        "vega fp16": ("bundle@tensorrt:x", "slimxl bundle, tensorrt", "as built", rounds(1000.0)),
        "vega int8": ("bundle@tensorrt+int8:x", "slimxl bundle, tensorrt", "int8", rounds(milliseconds)),
        "vega shared": ("bundle@tensorrt+shared:x", "slimxl bundle, tensorrt, shared", "as built", rounds(1e5)),
    }
    half, eight, _ = gpu_results(results_path, contestants).cells[0].rows
    assert [fault for fault in eight.diagnosis if fault.startswith("slower")] == eight.eight_bit_faults()
    assert told in "".join(eight.eight_bit_faults()) and bool(told) == bool(eight.eight_bit_faults())
    assert not half.eight_bit_faults()
    assert half.mfu * half.total_ms.value * 312 == pytest.approx(eight.mfu * eight.total_ms.value * 624)


def test_the_best_runtime_is_held_against_eager_and_against_torch_compile(suite_results):
    table = runtime_figures(suite_results)
    assert [one.record.name.split()[0] for one in table] == ["sdxl"] * 2 + ["ssd-1b"] * 2 + ["vega"] * 7
    found = {one.record.name: one for one in table}
    assert found["vega"].over_eager is None
    assert found["vega compiled"].over_eager.value == pytest.approx(1.25)
    best = found["vega tensorrt"]
    assert best.over_eager.value == pytest.approx(1.65)
    assert best.over_compiled.value == pytest.approx(1.65 / 1.25)
    assert best.over_compiled.low <= best.over_compiled.value <= best.over_compiled.high
    unet = best.record.costs["unet"]["flops"]
    assert best.denoise_mfu == pytest.approx(unet / (best.row.step_ms / 1e3) / 312e12)
    assert found["vega shared"].over_eager is None, "no eager ran in those rounds"
    assert runtime_figures(suite_results[:1]) == [], "one runtime is no comparison"


def test_the_quotient_of_two_speedups_has_the_widest_interval():
    found = quotient(Estimate(value=3.0, low=2.9, high=3.1), Estimate(value=1.5, low=1.4, high=1.6))
    assert (found.value, found.low, found.high) == (2.0, 2.9 / 1.6, 3.1 / 1.4)
    assert quotient(Estimate(value=3.0), Estimate(value=1.5, low=1.4, high=1.6)).low is None


def test_the_limit_is_the_ratio_of_arithmetic_and_the_claim_the_makers(suite_results):
    table = [one for one in model_gains(suite_results) if one.runtime.startswith("diffusers eager")]
    main = {one.title: one for one in table if one.cell.startswith(SIZES[0])}
    assert main["SSD-1B"].by_flops == pytest.approx(1.58, abs=0.005)
    assert main["Vega"].by_flops == pytest.approx(2.31, abs=0.005)
    assert (main["SSD-1B"].claim, main["Vega"].claim) == (1.6, 2.0)
    assert main["Vega"].speedup.value == pytest.approx(2.0)
    wide = next(one for one in table if one.title == "Vega" and one.cell.startswith(SIZES[1]))
    flops = [
        total_flops(
            component_costs(
                ModelConfigs(tuple(about(model)[2].items())), Workload(resolution=Resolution(1536, 640), steps=30)
            )
        )
        for model in ("sdxl", "vega")
    ]
    assert wide.by_flops == pytest.approx(flops[0] / flops[1])


def test_a_failed_guard_is_told_beside_the_limit(suite_results):
    eager = suite_results[0].model_copy(deep=True)
    eager.contestant("sdxl").quality["passed"] = False
    table = model_gains([eager])
    assert all(one.base_failed and not one.failed for one in table) and table


def test_a_claim_is_against_the_largest_model(results_path, suite_results):
    """A part of the suite that runs the two smaller models comes before the one that has all three."""
    two = {
        name: ("eager@fp16:x", "diffusers eager", "fp16", rounds(one))
        for name, one in (("ssd-1b", 1800.0), ("vega", 1200.0))
    }
    smaller = gpu_results(results_path, two)
    assert [(one.base, one.claim) for one in model_gains([smaller])] == [("SSD-1B", None)]
    found = [one for one in model_gains([smaller, suite_results[0]]) if one.cell.startswith(SIZES[0])]
    assert {(one.title, one.base, one.claim) for one in found} == {
        ("SSD-1B", "SDXL", 1.6),
        ("Vega", "SDXL", 2.0),
    }


def test_runtimes_of_two_machines_are_not_held_against_each_other(suite_results, tmp_path):
    eager, compiled = (one.model_copy(deep=True) for one in suite_results[:2])
    compiled.gpu["identity"]["name"] = "NVIDIA H200"
    for index, results in enumerate((eager, compiled)):
        (tmp_path / f"{index}.json").write_text(results.model_dump_json())
    write_report([tmp_path / "0.json", tmp_path / "1.json"], tmp_path / "out")
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["runtimes"] == [] and {one["runtime"] for one in found["limits"]} == {"diffusers eager, fp16"}


def test_layouts_show_the_cost_of_a_change_of_size(suite_results):
    assert not layout_table(suite_results[:3])
    table = layout_table(suite_results)
    assert [head.text for head in table.heads[3:5]] == [by_size(size) for size in SIZES] and len(table.rows) == 4
    main, wide = table.rows[0][3:5]
    assert (main.text, main.small) == ("1,001 ms", ("back 1,006 ms",))
    assert (wide.text, wide.small) == ("1,001 ms", ("first 1,901 ms",))


def test_the_page_shows_them_all(suite_results, tmp_path):
    paths = []
    for index, results in enumerate(suite_results):
        paths.append(tmp_path / f"{index}.json")
        paths[-1].write_text(results.model_dump_json())
    write_report(paths, tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    for section in ("runtimes", "limits", "layouts", "checks"):
        assert f'<section id="{section}">' in page
    assert '<span class="predicted">2.31×</span>' in page and '<span class="published">2.00×</span>' in page
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert {one["claim"] for one in found["limits"]} == {1.6, 2.0}
    assert read_results(paths[0]).cells[1].rows[0].first_ms[0] > 0
