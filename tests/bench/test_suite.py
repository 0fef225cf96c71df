import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from bench import parts, suite
from bench.suite import SuiteOptions, part_names, run_suite
from distill.common.errors import UserError

MINI = {"device": "cpu", "models": "mini-vega", "resolutions": "64x64", "steps": 1, "minutes": 20.0}


def options(tmp_path, **changes):
    return SuiteOptions(**({"out": tmp_path / "results", "workdir": tmp_path / "work"} | MINI | changes))


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def session_of(tmp_path):
    value = json.loads(next((tmp_path / "results").glob("*_session.json")).read_text())
    return {one["part"]: one for one in value["parts"]}


def pretend(monkeypatch, tmp_path, code):
    """Parts whose process runs `code` in place of the real one; `job` is the part's argument."""
    script = tmp_path / "part.py"
    start = "import json, os, pathlib, signal, sys, time\njob = json.loads(sys.argv[1])\n"
    script.write_text(start + "pathlib.Path(job['out']).parent.mkdir(parents=True, exist_ok=True)\n" + code)
    real = suite.subprocess.Popen
    monkeypatch.setattr(
        suite.subprocess, "Popen", lambda command, **more: real([sys.executable, str(script), command[-1]], **more)
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"models": "sdxk"}, "did you mean 'sdxl'"),
        ({"models": "sdxl,mini-vega"}, "one family"),
        ({"parts": "eager,magic"}, "unknown part"),
        ({"device": "tpu"}, "unknown device"),
        ({"device": "cuda"}, "--device cpu"),
        ({"resolutions": "big"}, "WIDTHxHEIGHT"),
        ({"steps": 0}, "--steps is 0; the least is 1"),
        ({"minutes": -1.0}, "--minutes is -1.0; the least is 0"),
    ],
)
def test_bad_input_is_one_line(tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        run_suite(options(tmp_path, **changes))
    assert not (tmp_path / "results").exists()


def test_every_part_has_a_function_and_a_need():
    names = part_names(["sdxl", "ssd-1b", "vega"], "1024x1024,1536x640")
    for name in names:
        kind = name.partition(":")[0]
        assert kind in parts.FUNCTIONS and suite.NEEDS_S[kind] > 0
    assert {"compiled:1536x640", "layouts:tensorrt-rtx", "published:ssd-1b", "tensorrt:sdxl"} <= set(names)
    assert "compiled:1024x1024" not in names


def test_parts_are_chosen_by_name_or_by_kind(tmp_path):
    chosen = suite._chosen(options(tmp_path, parts="eager,training"), ["mini-sdxl", "mini-ssd-1b", "mini-vega"])
    assert chosen == ["eager", "training:mini-ssd-1b", "training:mini-vega"]


def test_a_part_without_a_row_does_not_cost_the_others_their_report(tmp_path, monkeypatch, capsys):
    pretend(
        monkeypatch,
        tmp_path,
        """
empty = {"schema_version": "slimxl.bench.results/1", "cells": []}
if job["part"] == "acceptance": empty = {"schema_version": "slimxl.bench.acceptance/1", "rows": []}
pathlib.Path(job["out"]).write_text(json.dumps(empty))
""",
    )
    monkeypatch.setattr(suite, "NEEDS_S", dict.fromkeys(suite.NEEDS_S, 0))
    assert run_suite(options(tmp_path, parts="eager,acceptance")) == 0
    assert "left out of the report" in capsys.readouterr().out


def test_the_first_command_reaches_a_compiled_model():
    names = part_names(["sdxl", "ssd-1b", "vega"], "1024x1024,1536x640,640x1536")
    left_s = 60 * SuiteOptions().minutes - suite.REPORT_S
    for part in names[: names.index("compiled:vega")]:
        kind = part.partition(":")[0]
        assert left_s >= suite.NEEDS_S[kind]
        left_s -= suite.MOST_S[kind]
    assert left_s >= suite.NEEDS_S["compiled"]


@pytest.mark.parametrize(("minutes", "most_s"), [(3.0, 110.0), (8.5, 110.0), (17.0, 220.0)])
def test_what_is_held_ends_with_its_share(tmp_path, monkeypatch, minutes, most_s):
    pretend(
        monkeypatch,
        tmp_path,
        """
pathlib.Path(job["out"]).write_text(json.dumps(job))
sys.exit("without the cache: out of memory")
""",
    )
    session = suite.Session(options(tmp_path, minutes=minutes), ["mini-vega"], "x", time.monotonic() + 900)
    told = []
    for hold in (True, False):
        suite._run_part(session, "training:mini-vega", hold)
        told.append(json.loads(session.path("training:mini-vega").read_text())["seconds"])
    assert told[0] == most_s - suite.STOP_S and told[1] > 800


def test_a_first_try_is_held_while_a_compiled_model_waits(tmp_path, monkeypatch):
    held = {}

    def run(session, part, hold):
        held[part] = hold
        session.record(part, "done")

    monkeypatch.setattr(suite, "_run_part", run)
    monkeypatch.setattr(suite, "NEEDS_S", dict.fromkeys(suite.NEEDS_S, 0))
    run_suite(options(tmp_path, parts="eager,training,compiled,published", models="mini-ssd-1b,mini-vega"))
    assert [part for part, hold in held.items() if hold] == ["eager", "training:mini-vega", "compiled:mini-vega"]
    run_suite(options(tmp_path / "alone", parts="eager"))
    assert held["eager"] is False


def test_what_does_not_fit_or_is_not_there_is_listed_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(suite.MODULES, "tensorrt", "no_such_module")
    assert run_suite(options(tmp_path, minutes=0.5)) == 1
    found = session_of(tmp_path)
    assert set(found) == set(part_names(["mini-vega"], "64x64"))
    assert {one["state"] for one in found.values()} == {"not run"}
    assert "no_such_module is not installed" in found["tensorrt:mini-vega"]["why"]
    assert "it needs about 120" in found["eager"]["why"]


def test_a_gpu_without_a_target_is_told_before_anything_is_exported(monkeypatch):
    monkeypatch.setattr("engines.gpus.gpu_at_hand", lambda: ("NVIDIA H200", "9.0"))
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda _: True)
    assert "no target for NVIDIA H200" in suite._absent("tensorrt-rtx:vega", "cuda")
    assert suite._absent("tensorrt:vega", "cuda") is None
    assert "NVIDIA GPU only" in suite._absent("tensorrt:vega", "cpu")
    assert suite._absent("eager", "cuda") is None


def test_one_part_that_breaks_hangs_or_dies_leaves_the_others_their_turn(tmp_path, monkeypatch):
    pretend(
        monkeypatch,
        tmp_path,
        """
if job["part"] == "eager": sys.exit("boom\\nCUDA error: out of memory")
if job["part"] == "acceptance": os.kill(os.getpid(), signal.SIGSEGV)
if job["part"] == "compiled:batch": time.sleep(600)
pathlib.Path(job["out"]).write_text('{"schema_version": "slimxl.bench.training/1", "rows": []}')
""",
    )
    monkeypatch.setattr(suite, "NEEDS_S", dict.fromkeys(suite.NEEDS_S, 0))
    monkeypatch.setattr(suite.Session, "left_s", property(lambda session: 0.5 if len(session.records) == 2 else 600.0))
    assert run_suite(options(tmp_path, parts="eager,acceptance,compiled:batch,eager:bf16")) == 0
    found = session_of(tmp_path)
    assert (found["eager"]["state"], found["eager"]["why"]) == ("failed", "CUDA error: out of memory")
    assert found["eager"]["log"][0] == "boom"
    assert (found["acceptance"]["state"], found["acceptance"]["why"]) == ("failed", "ended by signal 11")
    assert found["compiled:batch"]["state"] == "stopped"
    assert found["eager:bf16"]["state"] == "done"


def test_the_same_command_goes_on_with_what_is_not_done(tmp_path, monkeypatch):
    pretend(
        monkeypatch,
        tmp_path,
        """
log = pathlib.Path(job["workdir"], "began")
log.write_text((log.read_text() if log.exists() else "") + job["part"] + " ")
if job["part"] == "eager:bf16" and log.read_text().count("bf16") == 1: sys.exit("not yet")
pathlib.Path(job["out"]).write_text('{"schema_version": "slimxl.bench.training/1", "rows": []}')
""",
    )
    run_suite(options(tmp_path, parts="eager:batch,eager:bf16"))
    assert session_of(tmp_path)["eager:bf16"]["state"] == "failed"
    run_suite(options(tmp_path, parts="eager:batch,eager:bf16"))
    assert session_of(tmp_path)["eager:bf16"]["state"] == "done"
    assert (tmp_path / "work" / "began").read_text() == "eager:batch eager:bf16 eager:bf16 "
    with pytest.raises(UserError, match="other settings"):
        run_suite(options(tmp_path, steps=2))


def test_what_was_left_out_is_tried_again_after_what_was_never_tried(tmp_path, monkeypatch):
    """And finds what it has compiled."""
    pretend(
        monkeypatch,
        tmp_path,
        """
work, kernels = pathlib.Path(job["workdir"]), pathlib.Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
with (work / "began").open("a") as log: print(job["part"], job["again"], (kernels / "one").exists(), file=log)
kernels.mkdir(exist_ok=True)
(kernels / "one").touch()
pathlib.Path(job["out"]).write_text('{"schema_version": "slimxl.bench.training/1", "rows": []}')
if job["part"] == "compiled:mini-vega" and not job["again"]: print("sdxl was not loaded", file=sys.stderr); sys.exit(3)
""",
    )
    assert run_suite(options(tmp_path, parts="compiled:mini-vega")) == 0
    one = session_of(tmp_path)["compiled:mini-vega"]
    assert (one["state"], one["why"]) == ("partial", "sdxl was not loaded")
    assert run_suite(options(tmp_path, parts="compiled:mini-vega", minutes=0.5)) == 0
    assert session_of(tmp_path)["compiled:mini-vega"] == one  # a command without time for it takes nothing from it
    assert run_suite(options(tmp_path, parts="compiled:mini-vega,eager:bf16")) == 0
    assert {one["state"] for one in session_of(tmp_path).values()} == {"done"}
    began = (tmp_path / "work" / "began").read_text().splitlines()
    assert began == ["compiled:mini-vega False False", "eager:bf16 False False", "compiled:mini-vega True True"]


def test_a_retry_that_gets_less_far_leaves_what_was_measured(tmp_path, monkeypatch, capsys):
    pretend(
        monkeypatch,
        tmp_path,
        """
tries = pathlib.Path(job["workdir"], "tries")
tries.write_text((tries.read_text() if tries.exists() else "") + "x")
number = len(tries.read_text())
row = {"teacher": "a", "student": "b", "title": "t", "batch": 1, "failed": None, "samples_per_s": 1.0 * number}
row |= {"peak_memory_bytes": None, "mfu": None}
rows = {1: 2, 2: 1, 3: 0, 4: 3}[number] * [row]
if rows: pathlib.Path(job["out"]).write_text(json.dumps({"schema_version": "slimxl.bench.training/1", "rows": rows}))
if number == 1: print("one was not run", file=sys.stderr); sys.exit(3)
if number < 4: sys.exit("no GPU")
""",
    )
    path = suite._open_session(options(tmp_path)).path("training:mini-vega")
    for tries, rows, state in ((1, 2, "partial"), (2, 2, "partial"), (3, 2, "partial"), (4, 3, "done")):
        assert run_suite(options(tmp_path, models="mini-ssd-1b,mini-vega", parts="training:mini-vega")) == 0
        told = json.loads(path.read_text())["rows"]
        assert (len(told), told[0]["samples_per_s"]) == (rows, 4.0 if tries == 4 else 1.0)
        assert session_of(tmp_path)["training:mini-vega"]["state"] == state
    assert capsys.readouterr().out.count("failed: no GPU; what it had before is more, and stands") == 2
    assert not list(path.parent.glob("*.earlier"))


LEAVES_A_CHILD = """
import pathlib, subprocess, sys
place = pathlib.Path(sys.argv[-1]).with_name("child")
subprocess.run(["sh", "-c", f"sleep 600 & echo $! > {place}"])  # which has lost its parent
"""
IN_A_GROUP_OF_ITS_OWN = LEAVES_A_CHILD.replace('"])', '"], process_group=0)')


def child_is_gone(folder):
    pid = int((folder / "child").read_text())
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def has_a_child(folder):
    return (folder / "child").exists() and (folder / "child").read_text().endswith("\n")


def test_a_stopped_part_takes_what_it_has_started_with_it(tmp_path):
    script = f"{IN_A_GROUP_OF_ITS_OWN}\nimport time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "x")], start_new_session=True)
    wait_for(lambda: has_a_child(tmp_path))
    suite._stop(process)
    assert process.returncode == -signal.SIGKILL
    wait_for(lambda: child_is_gone(tmp_path))


@pytest.mark.parametrize(("end", "state"), [("", "done"), ("sys.exit('boom')", "failed")])
def test_a_part_that_ends_leaves_nothing_running(tmp_path, monkeypatch, end, state):
    pretend(monkeypatch, tmp_path, f"sys.argv.append(job['out']){IN_A_GROUP_OF_ITS_OWN}{end}")
    session = suite.Session(options(tmp_path), ["mini-vega"], "x", time.monotonic() + 900)
    suite._run_part(session, "eager")
    assert session.state("eager") == state
    wait_for(lambda: child_is_gone(tmp_path / "results"))


def test_a_command_out_of_time_takes_what_it_has_started_with_it(tmp_path, monkeypatch):
    (tmp_path / "leaves_a_child.py").write_text(f"{LEAVES_A_CHILD}\nimport time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = SimpleNamespace(left_s=lambda: wait_for(lambda: has_a_child(tmp_path)) or 0.0)
    with pytest.raises(UserError, match="found no time to end"):
        parts._command(job, "leaves_a_child", str(tmp_path / "x"))
    wait_for(lambda: child_is_gone(tmp_path))


def test_real_parts_leave_results_a_session_and_a_report(tmp_path, monkeypatch):
    """The parts as a GPU runs them, on the smallest model: their processes, their files, the report of them all."""
    monkeypatch.setattr(suite, "MOST_S", {})
    assert run_suite(options(tmp_path, models="mini-ssd-1b,mini-vega", parts="eager,acceptance,training")) == 0
    found = session_of(tmp_path)
    assert {name: one["state"] for name, one in found.items()} == {
        "eager": "done", "acceptance": "done", "training:mini-vega": "done",
    }  # fmt: skip
    results = tmp_path / "results"
    training = json.loads(next(results.glob("*_training-mini-vega.json")).read_text())["rows"]
    assert [row["failed"] for row in training] == [None] * 7
    assert all(row["samples_per_s"] > 0 and row["mfu"] is None and row["mfu_why"] for row in training)
    terms = {row["features"]: row["loss_terms"] for row in training}
    assert terms[None] == 2 < terms["block"] < terms["sub-block"] < terms["layer"]
    targets = {row["target"] for row in json.loads(next(results.glob("*_acceptance.json")).read_text())["rows"]}
    assert {"CURRENT", "SM80", "SM89", "CUDAExecutionProvider", "onnxruntime_ep_nv_tensorrt_rtx"} <= targets
    assert training[0]["kernels"]["families_ms"]["gemm"] > 0
    page = (next(results.glob("*_report")) / "index.html").read_text()
    for section in ("kernels", "training", "acceptance", "session"):
        assert f'<section id="{section}">' in page
