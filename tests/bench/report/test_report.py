import base64
import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from bench.contestants.contestant import STAGES
from bench.floor.predict import floor_ms
from bench.quality.guard import png_base64
from bench.report.elements.formatting import milliseconds
from bench.report.predicted.predictions import measured_latencies, runtime_class
from bench.report.report import write_report
from bench.results import Results
from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES
from distill.models.resolution import Resolution

VOID = {"meta", "link", "img", "br"}


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order or never."""

    def __init__(self):
        super().__init__()
        self.open, self.faults, self.addresses = [], [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for key, value in attributes if key in ("src", "href") and value and tag != "a"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append((tag, self.getpos()))


PICTURE = {"seed": 7, "resolution": "64x64", "steps": 3, "guidance_scale": 5.0, "png_base64": None, "follows": None}


def as_models(results_path, right=(20, 18), **changes):
    """The fakes' results as if models had drawn: each guarded, and so many of its 20 pictures right at each step count."""
    value = json.loads(results_path.read_text())
    for record, count in zip(value["contestants"], right, strict=True):
        record |= {"spec": "eager@fp32:x", "runtime": "diffusers eager", "precision": "fp32"}
        record["quality"] |= {"passed": True, "words": []}
        for steps in (3, 6):
            told = {"contestant": record["name"], "prompt": "a large red circle", "steps": steps}
            judged = [told | {"follows": {"shape": index < count}} for index in range(20)]
            value["pictures"] += [PICTURE | one for one in judged]
    return value | changes


def report_of(tmp_path, value, *more, **options):
    """(index.html, report.md, report.json) of one results file and others."""
    (tmp_path / "r.json").write_text(json.dumps(value))
    write_report([tmp_path / "r.json", *more], tmp_path / "out", **options)
    page, text = ((tmp_path / "out" / name).read_text() for name in ("index.html", "report.md"))
    return page, text, json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.fixture(scope="module")
def report(results_path, tmp_path_factory):
    """A report with pictures, losses and engines put into the fakes' results."""
    value = json.loads(results_path.read_text())
    png = png_base64(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    drawn = PICTURE | {"prompt": "a <b>bold</b> prompt", "png_base64": png}
    value["pictures"] = [drawn | {"contestant": name} for name in ("teacher", "vega")]
    points = [[1, 0.5, {"task": 0.4}], [20, 0.1, {"task": 0.09}]]
    losses = [{"stage": name, "steps": 20, "seconds": 9.0, "points": points} for name in ("one", "two")]
    checkpoint = {"kind": "checkpoint", "folder": "vega", "bytes": 10, "weights_bytes": 9, "unet_bytes": 8}
    engine = {
        "component": "unet", "flavor": "tensorrt-rtx", "flavor_version": "1.7.1", "layout": "ranged",
        "gpus": ["a100", "rtx4090"], "compute_capabilities": ["8.0", "8.9"], "precision": "fp16",
        "resolutions": ["1024x1024"], "batches": [1], "weights_bytes": 5, "onnx_sha256": "b" * 64, "weights_sha256": None,
        "key": "k", "profiles": 1, "file": "unet/x.plan", "sha256": "a" * 64, "bytes": 1_500_000_000,
        "build_seconds": 13.0, "build_peak_rss_bytes": 5_000_000_000, "build_tools": {},
    }  # fmt: skip
    bundle = {
        "kind": "bundle",
        "folder": "b",
        "bytes": 9,
        "source": {"name": "s", "sha256": "c" * 64},
        "engines": [engine],
    }
    value["contestants"][1]["artifacts"] = [checkpoint | {"record": None, "losses": losses}, bundle]
    folder = tmp_path_factory.mktemp("report")
    (folder / "results.json").write_text(json.dumps(value))
    write_report([folder / "results.json", results_path], folder / "out", "a <title>")
    return folder / "out"


def test_the_page_is_whole_and_needs_nothing_from_outside(report):
    page = (report / "index.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.faults == [] and parser.open == []
    assert all(one.startswith(("data:", "#")) for one in parser.addresses), parser.addresses
    assert "http" not in re.sub(r'base64,[A-Za-z0-9+/=]+|<a class="published" href="[^"]+">', "", page)
    assert "{{" not in page and "{%" not in page


def test_a_few_step_model_is_told_with_its_own_steps(results_path, tmp_path):
    value = as_models(results_path)
    value["contestants"][1]["taught"] = {"steps": 1, "guidance_scale": 1.0}
    value["pictures"] = [one for one in value["pictures"] if (one["contestant"], one["steps"]) != ("vega", 6)]
    for one in value["pictures"]:
        if one["contestant"] == "vega":
            one["steps"] = 1
    page, _, told = report_of(tmp_path, value)
    assert "Vega, 1 step" in page and "Vega draws as it was taught: 1 step, guidance 1." in page
    chart = page[page.index('id="quality-latency"') :].partition("</svg>")[0]
    assert chart.count("<circle") == 3 and ">1</text>" in chart and told["headline"]["best"] == "vega"


def test_a_load_test_joins_the_report(results_path, tmp_path):
    level = {
        "concurrency": 8,
        "requests": 101,
        "failures": 1,
        "first_error": "<queue full>",
        "seconds": 50.0,
        "images_per_s": 2.0,
        "mean_batch": 3.5,
        "latency_ms": {"median": 400.0, "p90": 500.0, "p95": 512.0, "p99": None},
        "latencies_ms": [400.0] * 100,
        "server_rss": {"first_bytes": 5e8, "last_bytes": 6e8, "peak_bytes": 6e8, "samples": [[1.0, 5e8]]},
    }
    load = {
        "schema_version": "slimxl.load/1",
        "created_utc": "2026-01-02T03:04:05+00:00",
        "command": "python -m engines load-test",
        "server": {
            "address": "127.0.0.1:8001",
            "name": "triton",
            "version": "2.51.0",
            "instances": ["KIND_GPU 0"],
            "max_batch_size": 4,
        },
        "bundle": {"path": "/b", "manifest_sha256": "a" * 64, "source": "the <source>", "flavor": "tensorrt"},
        "client": {"system": "Linux", "cores": 2},
        "workload": {
            "prompt": "x",
            "width": 128,
            "height": 96,
            "steps": 25,
            "guidance": 5.0,
            "images": 1,
            "rate_per_s": None,
        },
        "levels": [level, level | {"concurrency": 1, "failures": 0, "server_rss": None, "mean_batch": None}],
    }
    (tmp_path / "load.json").write_text(json.dumps(load))
    write_report([results_path, tmp_path / "load.json"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.faults == [] and parser.open == []
    assert "Behind a server" in page and "the &lt;source&gt; (tensorrt) in triton 2.51.0" in page
    assert 'title="&lt;queue full&gt;">1</span>' in page and "up to 4 requests together" in page
    rows = re.sub(r"<[^>]*>", " ", page[page.index('<section id="serving">') :]).split()
    assert "8 101 in 50.0 s 1 2.00 400 ms 500 ms 512 ms 3.5 500 MB at the end 600 MB" in " ".join(rows)
    assert "1 101 in 50.0 s 0 2.00 400 ms 500 ms 512 ms – –" in " ".join(rows)
    assert (
        json.loads((tmp_path / "out/report.json").read_text())["loads"][0]["levels"][0]["first_error"]
        == level["first_error"]
    )
    (tmp_path / "load.json").write_text(json.dumps(load | {"levels": []}))
    with pytest.raises(UserError, match=r"does not keep to slimxl\.load/1: levels"):
        write_report([results_path, tmp_path / "load.json"], tmp_path / "out")


def test_a_sustained_run_is_drawn_and_what_its_figures_depend_on_is_told(results_path, tmp_path):
    value = as_models(results_path, in_turns="<too large>")
    at_s = [float(second) for second in range(500)]
    gpu = {"at_s": at_s[:3], "sm_clock_mhz": [1980.0, None, 1700.0]}
    slower = [100.0] * 250 + [110.0] * 250
    trace = {"seconds": 500.0, "images": 500, "at_s": at_s, "total_ms": slower, "gpu": gpu}
    control = {"what": "that is not told its prompt", "noise_error": 0.4, "caught": True}
    value["contestants"][1] |= {"sustained": trace, "random_weights": True, "weights_sha256": "f" * 64}
    value["contestants"][1]["quality"] |= {"noise_errors": [0.001, 0.0123], "control": control}
    page, _, _ = report_of(tmp_path, value)
    section = page[page.index("Without a pause") :].partition("</section>")[0]
    assert section.count("<svg") == 2 and ">+10 %<" in page and "500 in 8 min 20 s" in page
    assert "Vega: random weights." in page and "f" * 64 in page
    assert "noise_pred off by 1.2 % at the worst step; a UNet that is not told its prompt was caught" in page
    assert "one after the other (&lt;too large&gt;)" in page and "in interleaved rounds." not in page


def test_what_users_gave_is_escaped(report):
    page = (report / "index.html").read_text()
    assert "a &lt;b&gt;bold&lt;/b&gt; prompt" in page and "<b>bold" not in page
    assert "a &lt;title&gt;" in page


def test_the_page_shows_pictures_losses_and_engines(report):
    page = (report / "index.html").read_text()
    encoded = re.search(r"data:image/png;base64,([^\"]+)", page).group(1)
    assert base64.b64decode(encoded).startswith(b"\x89PNG")
    assert "40 steps in 18.0 s. one: 0.5 → 0.1; two: 0.5 → 0.1" in page
    chart = page[page.index('<section id="distillation">') :].partition("</svg>")[0]
    assert chart.count("<polyline") == 2, "two stages are two students"
    ticks = re.findall(r'text-anchor="end">([^<]+)</text>', chart)
    assert len(ticks) >= 2, "a scale can be read"
    assert "compute capability 8.0, 8.9" in page and "1.5 GB" in page


def test_an_engine_counts_as_run_where_a_contestant_held_it_and_finished(report, tmp_path):
    """Not by the flavor that the command line named: a bundle has engines for several GPUs, and a run may fail."""
    value = json.loads((report.parent / "results.json").read_text())
    vega, finished = value["contestants"][1], value["cells"]
    engine = vega["artifacts"][1]["engines"][0]
    other = {"compute_capabilities": ["9.0"], "gpus": ["h100"], "sha256": "d" * 64, "file": "unet/y.plan"}
    vega["artifacts"][1]["engines"].append(engine | other)
    unfinished = [cell | {"rows": cell["rows"][:1], "failures": {"vega": "RuntimeError: no"}} for cell in finished]
    for engines, cells, states in (
        (None, finished, [False, False]),
        ([engine["sha256"]], finished, [True, False]),
        ([engine["sha256"]], unfinished, [False, False]),
    ):
        vega["engines"], value["cells"] = engines, cells
        (tmp_path / "r.json").write_text(json.dumps(value))
        write_report([tmp_path / "r.json"], tmp_path / "out")
        built = json.loads((tmp_path / "out" / "report.json").read_text())["built"]
        assert [one["ran"] for one in built] == states
        page = (tmp_path / "out" / "index.html").read_text()
        assert page.count("<small>✓ 1 of 1 run</small>") == sum(states)
        assert page.count("<small>built, not run</small>") == len(states) - sum(states)


def test_nothing_predicted_looks_measured(report):
    page = (report / "index.html").read_text()
    start, end = page.index('<section id="floors">'), page.index('<section id="quality">')
    floors = page[start:end]
    assert "predicted" in floors and "published" in floors
    assert '"measured"' not in floors
    rest = page[:start] + page[end:]
    assert "≈" in floors and "≈" not in rest


def test_the_json_keeps_the_raw_samples(report):
    told = json.loads((report / "report.json").read_text())
    row = told["results"][0]["cells"][0]["rows"][0]
    assert len(row["samples"]) >= 6 and len(row["samples"][0]["steps_ms"]) == 3
    assert len(told["results"]) == 2


def test_the_markdown_is_a_summary_with_the_same_figures(report):
    told = json.loads((report / "report.json").read_text())
    text = (report / "report.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(told["headline"]["models"]) and len({line.count("|") for line in table}) == 1
    for model, line in zip(told["headline"]["models"], table[2:], strict=True):
        assert f"| {milliseconds(model['total_ms']['value'])} |" in line
    assert "index.html" in text and "report.json" in text and len(text.splitlines()) < 30


def test_a_main_batch_is_not_told_as_one_picture(results_path, tmp_path):
    value = as_models(results_path)
    for text in report_of(tmp_path, value)[:2]:
        assert "draws a picture in" in text and "4 pictures" not in text
    for cell in value["cells"]:
        cell["workload"]["batch"] = 4
    page, text, _ = report_of(tmp_path, value)
    for one in (page, text):
        assert "draws 4 pictures in" in one and "draws a picture" not in one
    assert page.count(">ms for 4 pictures</text>") == 2 and page.count(">4 pictures, median of 8") == 2


def test_speed_and_quality_are_headed_together(results_path, tmp_path):
    page, text, told = report_of(tmp_path, as_models(results_path), price=3.6)
    assert told["headline"]["best"] == "vega" and "1.75× as fast as" in page
    for one in (page, text):
        assert "18 of 20 right (70–97 %), Teacher 20 of 20 right (84–100 %)" in one
    chart = page[page.index('id="quality-latency"') :].partition("</svg>")[0]
    assert chart.count("<circle") == 4 and ">6</text>" in chart, "each model with each number of steps"
    assert "<small>batch 1</small>" in page and "$0.008" in page  # 8 ms a picture at $3.60 an hour
    assert "and worse ones" not in page + text
    for one in report_of(tmp_path, as_models(results_path, right=(20, 5)))[:2]:
        assert "1.75×" in one and "and worse ones" in one
    samples = list(csv.DictReader((tmp_path / "out" / "samples.csv").open()))
    assert len(samples) == 2 * 3 * 8 and {one["contestant"] for one in samples} == {"teacher", "vega"}
    assert sum(float(samples[0][f"{stage}_ms"]) for stage in STAGES) == pytest.approx(float(samples[0]["total_ms"]))
    with pytest.raises(UserError, match="--price -1"):
        report_of(tmp_path, as_models(results_path), price=-1.0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"quality": {"passed": None, "words": []}}, "Vega was not checked by the quality guard"),
        ({"quality": {"passed": False, "words": []}}, "Vega failed the quality guard"),
        ({"runtime": "ONNX Runtime", "precision": "fp16"}, "with another runtime and precision than Teacher"),
        ({"spec": "fake:"}, None),
    ],
)
def test_what_may_not_be_headed_as_best_is_told_and_why(results_path, tmp_path, change, why):
    value = as_models(results_path)
    value["contestants"][1] |= change
    page, _, told = report_of(tmp_path, value)
    assert told["headline"]["best"] is None and "draws a picture in" not in page
    assert "A picture takes Teacher" in page
    assert f"but {why}" in page if why else "vega" not in page.partition("<ul")[0].lower().partition("vega: fake")[0]


def test_a_model_whose_pictures_nobody_judged_is_not_the_best(results_path, tmp_path):
    page, text, told = report_of(tmp_path, as_models(results_path, pictures=[]))
    assert told["headline"]["best"] is None
    for one in (page, text):
        assert "how good its pictures are beside Teacher's is not known" in one.replace("&#39;", "'")


def test_a_tally_joins_the_report(results_path, tmp_path):
    """A model that was drawn with other steps than were timed takes no part."""
    share = {"value": 0.6, "low": 0.55, "high": 0.65}
    tally = {"schema_version": "slimxl.bench.study.tally/1", "study": "s", "models": [], "counted": {"standings": []}}
    for name, steps in (("teacher", 3), ("vega", 3), ("<other>", 3)):
        tally["models"].append({"name": name, "steps": steps})
        tally["counted"]["standings"].append({"model": name, "votes": 9, "preference": share})
    (tmp_path / "t.json").write_text(json.dumps(tally))
    page, _, told = report_of(tmp_path, as_models(results_path, pictures=[]), tmp_path / "t.json")
    assert told["headline"]["best"] == "vega" and "preferred in 60 % of votes (55–65 %)" in page
    assert "preferred, % of votes" in page and "other" not in told["headline"]["models"]
    tally["models"][1]["steps"] = 30
    (tmp_path / "t.json").write_text(json.dumps(tally))
    _, _, told = report_of(tmp_path, as_models(results_path, pictures=[]), tmp_path / "t.json")
    assert told["headline"]["best"] is None


def test_fakes_never_stand_as_measured(results_path, tmp_path):
    page, text, told = report_of(tmp_path, json.loads(results_path.read_text()))
    assert '<body class="no-model">' in page and "measured here" not in page and told["headline"]["kind"] == "fake"
    assert "Teacher, Vega: fake." in page and "Fakes that wait" in text and "Measured on" not in text


def test_markdown_keeps_names_as_they_are(results_path, tmp_path):
    value = as_models(results_path)
    value["notes"] = ["a | pipe, <b> and *stars*\nof `ve_ga`"]
    _, text, _ = report_of(tmp_path, value, title="a_b | <i>")
    assert "# a\\_b \\| \\<i\\>" in text
    assert r"> a \| pipe, \<b\> and \*stars\* of \`ve\_ga\`" in text


def test_every_workload_has_its_row_and_a_failure_part_way_is_told(results_path, tmp_path):
    value = json.loads(results_path.read_text())
    main, other = value["cells"][:2]
    main["failures"] = {"vega": "RuntimeError: lost"}
    load = other["workload"] | {"resolution": main["workload"]["resolution"], "guidance_scale": 1.0}
    other |= {"workload": load, "name": "1024x1024, 3 steps, batch 1, no guidance", "failures": {"vega": "MemoryError"}}
    (tmp_path / "r.json").write_text(json.dumps(value))
    write_report([tmp_path / "r.json"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    for workload in (main["name"], "no guidance", "6 steps"):
        assert f'<tr><td class="left">{workload}</td>' in page
    assert page.count("then failed") == 2
    note = page[page.index("Against these figures") :].partition("</div>")[0]
    assert "Vega failed: RuntimeError: lost" in note


def test_what_has_nothing_to_show_is_left_out(results_path, tmp_path):
    """Fakes have no parameters, a CPU no energy counter, eight runs no percentile."""
    write_report([results_path], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    for absent in ('<section id="sizes">', "energy a picture", ">GPU memory<", "1,000 pictures", ">p90<", "(MFU)"):
        assert absent not in page, absent


def test_a_refused_row_is_struck_through(results_path, tmp_path):
    value = json.loads(results_path.read_text())
    value["cells"][0]["rows"][1]["observed"] = ["refused: picture 0 is black"]
    (tmp_path / "r.json").write_text(json.dumps(value))
    write_report([tmp_path / "r.json"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert 'class="big refused"' in page and "refused: picture 0 is black" in page


def test_a_failed_guard_is_marked_everywhere_and_never_the_headline(results_path, tmp_path):
    value = as_models(results_path)
    value["contestants"][1]["quality"] |= {"passed": False, "words": ["picture 0 is black"]}
    (tmp_path / "r.json").write_text(json.dumps(value))
    page, text, _ = report_of(tmp_path, value, tmp_path / "r.json")
    assert "draws a picture in" not in page and "picture 0 is black" in page
    marks = page.count('title="failed the quality guard"')
    assert marks >= 6 + len(value["cells"])  # card, bar, legend, both tables' heads, device, and each row of the other
    assert 'class="dot c1 failed"' in page and 'class="dot c0 failed"' not in page
    assert "| Vega (guard FAILED) |" in text


def test_nothing_is_told_against_a_baseline_that_failed(results_path, tmp_path):
    value = as_models(results_path)
    value["contestants"][0]["quality"] |= {"passed": False, "words": ["picture 0 is black"]}
    assert "draws a picture in" not in report_of(tmp_path, value)[0]


def test_the_page_tells_the_faults_of_every_file(results_path, tmp_path):
    """The first file may be clean: what the others say against their rows stands in the same tables as theirs."""
    value = json.loads(results_path.read_text())
    for row in (row for cell in value["cells"] for row in cell["rows"]):
        row["observed"] = []
    (tmp_path / "clean.json").write_text(json.dumps(value))
    value["gpu"]["identity"]["name"] = "NVIDIA H200"
    value["notes"] = ["sdxl compiled was not loaded"]
    value["cells"][0]["rows"][1]["observed"] = ["throttled: power cap"]
    value["cells"][1]["failures"] = {"teacher": "RuntimeError: <lost>"}
    value["contestants"][0]["quality"] |= {"passed": False, "words": ["picture 3 is black"]}
    (tmp_path / "faulty.json").write_text(json.dumps(value))
    write_report([tmp_path / "clean.json"], tmp_path / "alone")
    assert "found nothing against any" in (tmp_path / "alone" / "index.html").read_text()
    write_report([tmp_path / "clean.json", tmp_path / "faulty.json"], tmp_path / "out")
    page, text = ((tmp_path / "out" / name).read_text() for name in ("index.html", "report.md"))
    assert "found nothing" not in page
    rows = 2 * sum(len(cell["rows"]) for cell in value["cells"])
    assert f"Of {rows} measured rows: throttled 1, failed 1" in page
    for told in ("throttled: power cap", "fake on NVIDIA H200", "sdxl compiled was not loaded"):
        assert told in page, told
    assert "failed: RuntimeError: &lt;lost&gt;" in page and "sdxl compiled was not loaded" in text
    assert "picture 3 is black" in page


def test_what_a_gpu_adds_has_its_sections(results_path, tmp_path):
    value = json.loads(results_path.read_text())
    kernels = {"families_ms": {"attention": 1.0, "matrix products": 0.5, "idle": 0.5}, "step_ms": 2.0}
    value["contestants"][0]["kernels"] = kernels
    value["cells"][0]["device"] = {"sm_clock_mhz": [1755.0, 1900.0, 1980.0], "power_w": [300.0, 500.0, 650.0]}
    loop = {"name": "published", "seconds": [4.0] * 6, "peak_memory_bytes": 41_000_000_000, "kernels": None}
    quicker = {"name": "sub-block", "seconds": [2.0, 2.0, 2.0, 2.0, 2.0, 1.6], "kernels": kernels}
    loops = {
        "schema_version": "slimxl.distill.bench/2", "teacher": "sdxl", "student": "vega", "resolution": "1024x1024",
        "device": "NVIDIA H200", "options": {"batch": 4, "mixed_precision": "bf16"}, "loops": [loop, loop | quicker],
        "tflop_per_step": 1000.0, "failures": {"sub-block, compiled": "OutOfMemoryError: <CUDA>"},
    }  # fmt: skip
    for name, content in {"r": value, "t": loops}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    write_report([tmp_path / "r.json", tmp_path / "t.json"], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.faults == [] and parser.open == []
    assert "SM clock 1,755–1,980 MHz, 300–650 W" in page
    assert "attention" in page[page.index('id="kernels"') :] and "training, sub-block" in page
    training = page[page.index('id="training"') :]
    for told in ("SDXL → Vega, batch 4, on NVIDIA H200", "OutOfMemoryError: &lt;CUDA&gt;", "41 GB", "takes 6 steps"):
        assert told in training, told
    assert (
        ">2.00×<" in training and "2.00–2.50" in training and f">{1000 / 2 / 989.4:.1%}".replace("%", " %") in training
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text())["training"][0]["tflop_per_step"] == 1000.0


def on_h200(results_path):
    """The fakes' results as if two models of the catalogue had been measured on an H200."""
    value = json.loads(results_path.read_text())
    value["peak"] = {"name": "H200 SXM", "tflops": 989.4, "terabytes_per_s": 4.8, "compute_capability": "9.0"}
    for index, model in enumerate(("sdxl", "vega")):
        about = {"parameters": ARCHITECTURES[model].parameters[0], "runtime": "diffusers eager", "precision": "fp16"}
        value["contestants"][index] |= about
        for cell in value["cells"]:
            load = cell["workload"]
            size = Resolution.parse(load["resolution"])
            cell["rows"][index]["floor_ms"] = floor_ms("h200", model, load["steps"], size)
            for sample in cell["rows"][index][
                "samples"
            ]:  # seconds, not milliseconds: no model is faster than its floor
                sample["total_ms"] *= 1000
    return value


def test_predictions_are_held_against_what_was_measured(results_path, tmp_path):
    """One GPU of the catalogue measured: the method is calibrated on its first figure, and the rest are checks."""
    value = on_h200(results_path)
    (tmp_path / "r.json").write_text(json.dumps(value))
    write_report([tmp_path / "r.json"], tmp_path / "out")
    checks = json.loads((tmp_path / "out" / "report.json").read_text())["prediction_of_measured"]
    assert len(checks) == 2 * len(value["cells"]) - 1  # all but the one it was calibrated on
    assert {one["known"]["resolution"] for one in checks} == {"1024x1024", "1152x896"}
    first = 1000 * value["cells"][0]["rows"][0]["total_ms"]["value"]
    floors = [floor_ms("h200", model, 3) for model in ("sdxl", "vega")]
    vega = next(one for one in checks if (one["known"]["model"], one["known"]["resolution"]) == ("vega", "1024x1024"))
    assert vega["predicted_ms"] == pytest.approx(first * floors[1] / floors[0])
    page = (tmp_path / "out" / "index.html").read_text()
    assert '<section id="checks">' in page
    assert "4 of the figures that calibrate it were measured here" in page  # of both models, at 3 and at 6 steps


def test_what_calibrates_is_sound_and_counted_once(results_path):
    results = Results.model_validate(on_h200(results_path))
    sdxl, vega = results.contestants
    found = measured_latencies([results])
    assert measured_latencies([results, results]) == found, "a second run of the same is no second figure"
    heun = results.cells[0].rows[1].model_copy(update={"floor_ms": 2 * results.cells[0].rows[1].floor_ms})
    twice = results.cells[0].model_copy(update={"rows": [heun]})
    [one] = measured_latencies([results.model_copy(update={"cells": [twice]})])
    assert one.floor_ms == heun.floor_ms, "by the calls that were made, not by the steps"
    vega.quality["passed"] = False
    assert {one.model for one in measured_latencies([results])} == {"sdxl"}, "a black picture is quickly drawn"
    classes = [
        runtime_class(sdxl.model_copy(update={"runtime": runtime, "precision": precision}))
        for runtime, precision in (
            ("diffusers eager", "bf16"),
            ("diffusers + torch.compile", "fp16"),
            ("slimxl bundle, tensorrt, shared", "as built"),
            ("slimxl bundle, tensorrt-rtx", "as built"),
            ("slimxl bundle, tensorrt", "int8"),
        )
    ]
    assert classes == ["diffusers, bf16", "compiled", "TensorRT", "TensorRT-RTX", "TensorRT, int8"]


def test_no_results_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no results files"):
        write_report([], tmp_path)
