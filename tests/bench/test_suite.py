import json
import sys
from importlib import import_module

import pytest

from bench import suite
from bench.contestants.spec import make_contestant, parse_specs
from bench.jobs import COMPILED_LOOP, LOOPS_ON_CPU, Job, Jobs
from bench.suite import SuiteOptions, run_suite
from distill.common.errors import UserError
from distill.studies.loops import LOOPS

MINI = {"device": "cpu", "models": "mini-ssd-1b,mini-vega", "resolutions": "64x64", "steps": 1}


def options(tmp_path, **changes):
    return SuiteOptions(**({"out": tmp_path / "out"} | MINI | changes))


def jobs_on_gpu(tmp_path, **changes):
    values = {"out": tmp_path, "models": ["sdxl", "ssd-1b", "vega"], "resolutions": ["1024x1024", "1536x640"]}
    values |= {"steps": 30, "device": "cuda", "flavors": ["tensorrt", "tensorrt-rtx", "onnxruntime"], "gpu": "rtx4090"}
    values |= {"eight_bits": ["int8", "fp8"]}
    return {job.name: job for job in Jobs(**(values | changes)).in_order()}


def specs_of(job):
    begin = job.command.index("--contestants") + 1
    end = next(index for index in range(begin, len(job.command)) if job.command[index].startswith("--"))
    return parse_specs(list(job.command[begin:end]))


def after(job, flag):
    return job.command[job.command.index(flag) + 1]


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Jobs whose process runs `code` in place of the real one; `out` is the file that it should leave."""
    real = suite.subprocess.run

    def run(command, **more):
        script = tmp_path / "job.py"
        found = command[command.index("--out") + 1]
        script.write_text(f"import pathlib, sys, time\nout = pathlib.Path({found!r})\n{run.code}")
        return real([sys.executable, str(script)], **more)

    def use(code):
        run.code = code
        monkeypatch.setattr(suite.subprocess, "run", run)
        monkeypatch.setattr("bench.report.report.write_report", lambda *_: None)

    return use


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"models": "sdxk,vega"}, "did you mean 'sdxl'"),
        ({"models": "sdxl,mini-vega"}, "one family"),
        ({"models": "sdxl"}, "two or more"),
        ({"jobs": "eager,magic"}, "no job's name begins with 'magic'"),
        ({"device": "tpu"}, "unknown device"),
        ({"device": "cuda"}, "--device cpu"),
        ({"resolutions": "big"}, "WIDTHxHEIGHT"),
        ({"steps": 0}, "--steps is 0; the least is 1"),
        ({"minutes": -1.0}, "--minutes is -1.0; the least is 0"),
    ],
)
def test_bad_input_is_one_line(tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        run_suite(options(tmp_path, **changes))


def test_jobs_come_in_the_order_of_their_worth(tmp_path):
    names = list(jobs_on_gpu(tmp_path))
    assert names[:8] == [
        "eager", "tensorrt-vega", "tensorrt-sdxl", "tensorrt-rtx-vega", "tensorrt-rtx-sdxl", "compiled-vega",
        "training-ssd-1b", "compiled-sdxl",
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert {"layouts-tensorrt-rtx", "onnxruntime-sdxl", "training-vega", "compiled-1536x640"} < set(names)


def test_every_command_is_one_that_its_room_takes(tmp_path, monkeypatch):
    """Parsed by the rooms' own command lines, which then do nothing."""

    class Parsed(Exception):
        pass

    def stop(*_arguments, **_more):
        raise Parsed

    for place in (
        "bench.run.run_bench",
        "distill.studies.bench.bench_loops",
        "export.folder.export_checkpoint",
        "export.quantise.folder.check_source",
    ):
        monkeypatch.setattr(place, stop)
    monkeypatch.setattr("engines.building.build.build_bundle", stop)
    monkeypatch.setattr("distill.checkpoints.sources.resolve", lambda *_: tmp_path)
    seen = set()

    def parse(job):
        for needed in job.needs:
            parse(needed)
        if job.command not in seen:
            seen.add(job.command)
            monkeypatch.setattr("sys.argv", list(job.command))
            with pytest.raises(Parsed):
                import_module(f"{job.command[0]}.__main__").main()

    for device in ("cuda", "cpu"):
        for job in jobs_on_gpu(tmp_path, device=device).values():
            parse(job)
    assert {command[:2] for command in seen} > {("export", "quantise"), ("engines", "build"), ("distill", "bench")}


def test_the_loops_it_names_are_there():
    assert {*LOOPS_ON_CPU, COMPILED_LOOP} < {loop.name for loop in LOOPS}


def test_the_largest_model_loads_last_and_runs_beside_the_smallest(tmp_path):
    jobs = jobs_on_gpu(tmp_path)
    assert [str(spec) for spec in specs_of(jobs["compiled-sdxl"])] == [
        "eager@fp16:random:sdxl", "compiled@fp16:random:vega", "compiled@fp16:random:sdxl",
    ]  # fmt: skip
    names = [spec.name for spec in specs_of(jobs["tensorrt-sdxl"])]
    assert names == ["sdxl eager", "vega tensorrt+per-resolution", "sdxl tensorrt+per-resolution"]
    assert after(jobs["tensorrt-sdxl"], "--resolutions") == "1024x1024"
    assert after(jobs["onnxruntime-sdxl"], "--batches") == "1,4"
    assert "bf16" in str(specs_of(jobs["eager-bf16"])[0])


def test_layouts_are_built_each_and_run_side_by_side(tmp_path):
    job = jobs_on_gpu(tmp_path)["layouts-tensorrt-rtx"]
    builds = [(after(one, "--layout"), after(one, "--gpus"), one.hide_gpus) for one in job.needs]
    assert builds[:3] == [(layout, "auto", False) for layout in ("ranged", "shared", "per-resolution")]
    assert builds[3:] == [("ranged", "auto", False), ("ranged", "rtx4090", True)]
    contestants = [make_contestant(spec, "cuda") for spec in specs_of(job)]
    ways = [(one.flavor, one.layout, one.cuda_graphs) for one in contestants]
    assert ways[:3] == [("tensorrt-rtx", layout, True) for layout, _, _ in builds[:3]]
    assert ways[3:] == [("tensorrt-rtx", "ranged", False), ("tensorrt-rtx", "ranged", True)]
    assert contestants[0].source == contestants[3].source != contestants[4].source
    assert [one.source for one in contestants] == [after(one, "--out") for one in job.needs]


def test_8_bits_run_beside_half_precision_where_the_gpu_has_them(tmp_path, monkeypatch):
    job = jobs_on_gpu(tmp_path)["tensorrt-rtx-sdxl-8-bits"]
    half, int8, fp8 = job.needs
    assert [one.needs[0].name for one in (int8, fp8)] == ["quantise-sdxl-int8", "quantise-sdxl-fp8"]
    assert half.needs == int8.needs[0].needs  # one export for all
    assert after(int8, "--onnx") == after(int8.needs[0], "--out") != after(half, "--onnx")
    assert half.command in [one.command for one in jobs_on_gpu(tmp_path)["tensorrt-rtx-sdxl"].needs]  # built once
    for capability, found in (("8.0", ["int8"]), ("8.9", ["int8", "fp8"])):
        monkeypatch.setattr("engines.gpus.gpu_at_hand", lambda capability=capability: ("a GPU", capability))
        assert suite._gpu_at_hand()["eight_bits"] == found
    assert not any("8-bits" in name for name in jobs_on_gpu(tmp_path, eight_bits=()))


def test_a_job_that_fails_is_told_with_its_log_and_the_next_begins(tmp_path, pretend, capsys):
    pretend("if 'eager.json' in str(out): sys.exit('error: no memory')\nout.write_text('{}')")
    assert run_suite(options(tmp_path, jobs="eager,training-mini-vega")) == 0
    told, log = capsys.readouterr().out, tmp_path / "out" / "logs" / "eager.log"
    assert f"(exit code 1): no memory; its log is {log}" in told
    assert log.read_text().startswith("python -m bench run --contestants")
    assert (tmp_path / "out" / "training-mini-vega.json").exists()


def test_what_is_there_is_skipped_and_time_only_stops_what_has_not_begun(tmp_path, pretend, capsys):
    pretend("out.write_text('{}')")
    kept = tmp_path / "out" / "eager.json"
    assert run_suite(options(tmp_path, minutes=0.0, jobs="eager")) == 1
    assert "left for another call: eager, eager-batch, eager-bf16" in capsys.readouterr().out
    kept.write_text("as it was")
    pretend("out.write_text('{}')\ntime.sleep(0.2)")
    assert run_suite(options(tmp_path, minutes=0.1 / 60, jobs="eager")) == 0
    assert "left for another call: eager-bf16" in capsys.readouterr().out
    assert kept.read_text() == "as it was" and (tmp_path / "out" / "eager-batch.json").exists()
    with pytest.raises(UserError, match="other settings"):
        run_suite(options(tmp_path, steps=2))


def test_what_two_jobs_need_is_made_once_and_without_it_neither_runs(tmp_path, pretend, capsys):
    pretend("out.write_text('{}') if 'fine' in str(out) else sys.exit('no compiler')")
    export = Job("export", ("export", "onnx", "--out", str(tmp_path / "broken")))
    jobs = [Job(name, ("bench", "run", "--out", str(tmp_path / f"{name}-fine")), (export,)) for name in "ab"]
    ended = {}
    assert [suite._run(job, tmp_path, ended) for job in jobs] == [False, False]
    assert capsys.readouterr().out.count("no compiler") == 1 and not list(tmp_path.glob("*-fine"))


def test_a_gpu_without_a_target_is_told_before_anything_is_exported(monkeypatch, capsys):
    from engines.flavors import find_flavor

    for name in ("tensorrt", "tensorrt-rtx"):
        monkeypatch.setattr(type(find_flavor(name)), "version", lambda _: "1")
    monkeypatch.setattr("engines.gpus.gpu_at_hand", lambda: ("NVIDIA H200", "9.0"))
    assert "tensorrt-rtx" not in suite._flavors("cuda")
    assert "12.1, found NVIDIA H200 (compute capability 9.0)" in capsys.readouterr().out
    assert not {"tensorrt", "tensorrt-rtx"} & set(suite._flavors("cpu"))


def test_real_jobs_leave_results_and_a_report(tmp_path):
    """As a GPU runs them, on the smallest models: their processes, their files, the report of them all."""
    assert run_suite(options(tmp_path, jobs="eager-bf16,training-mini-vega-no")) == 0
    out = tmp_path / "out"
    names = {"settings.json", "eager-bf16.json", "training-mini-vega-no-checkpointing.json"}
    assert {path.name for path in out.glob("*.json")} == names
    training = json.loads((out / "training-mini-vega-no-checkpointing.json").read_text())
    assert [row["name"] for row in training["loops"]] == ["sub-block"] and not training["failures"]
    assert training["loops"][0]["kernels"]["families_ms"]["gemm"] > 0
    assert '<section id="training">' in (out / "report" / "index.html").read_text()
