from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES
from distill.models.catalogue import catalogue_row
from distill.studies.bench import bench_loops, describe, peak_memory, ratio, step_tflop
from distill.studies.loops import LOOPS, Loop, Setup
from distill.training.options import BenchOptions

HALF = "-/1,1/1,1:0:1,1,1/1,1,1/-"


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each call of a compiled graph. Graphs are captured, but run by eager kernels: generating code takes
    long."""
    calls: list[object] = []
    real = torch.nn.Module.compile

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> object:
        def run(*arguments: object) -> object:
            calls.append(graph)
            return graph(*arguments)

        return run

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *_, **__: real(module, backend=backend))
    torch._dynamo.reset()
    return calls


@pytest.mark.usefixtures("compiled_calls")
def test_every_loop_is_measured_and_every_sample_kept(mini_vega: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("distill.studies.bench.WARMUP_ROUNDS", 0)
    monkeypatch.setattr("distill.studies.bench.peak_memory", lambda *_: 10**9)
    options = BenchOptions(model=str(mini_vega), student=HALF, batch=2, rounds=2)
    result = bench_loops(options, tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert [row["name"] for row in result["loops"]] == [loop.name for loop in LOOPS]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in result["loops"])
    table = "\n".join(describe(result))
    assert all(loop.name in table for loop in LOOPS) and "1 GB" in table
    parts = result["loops"][-1]["parts_s"]
    assert parts.keys() == {"teacher", "student", "target", "rest"}
    assert min(parts.values()) > 0 and "a step of LCM: " in table and "published LCM / LCM, wall time" in table


def test_one_loop_is_compiled_and_the_others_on_the_same_nets_are_not(
    mini_vega: Path, tmp_path: Path, compiled_calls: list[object]
) -> None:
    loops = [loop for loop in LOOPS if loop.name in ("published", "layer", "sub-block, compiled")]
    setup = Setup(BenchOptions(model=str(mini_vega), student=HALF, batch=2), loops, tmp_path)
    calls = {}
    for loop in [*loops, *loops]:
        with setup.stepping(loop) as step:
            step()
        calls[loop.name] = len(compiled_calls)
        compiled_calls.clear()
    assert calls == {"published": 0, "layer": 0, "sub-block, compiled": 10 + 15}


def test_a_ratio_is_of_rounds_not_of_means() -> None:
    assert ratio([2.0, 4.0, 60.0], [1.0, 2.0, 30.0])["median"] == pytest.approx(2.0)


def test_the_memory_of_a_loop_is_that_of_a_process_of_its_own(mini_vega: Path) -> None:
    options = BenchOptions(model=str(mini_vega), student=HALF, batch=2)
    measured = peak_memory(options, next(loop for loop in LOOPS if loop.name == "output only"))
    assert measured is not None and 1e8 < measured < 2e9


def test_times_are_kept_where_the_memory_is_not_measured_to_the_end(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_options: BenchOptions, loop: Loop) -> int:
        if loop.name == "block":
            raise KeyboardInterrupt
        return 10**9

    monkeypatch.setattr("distill.studies.bench.WARMUP_ROUNDS", 0)
    monkeypatch.setattr("distill.studies.bench.peak_memory", killed)
    with pytest.raises(KeyboardInterrupt):
        options = BenchOptions(
            model=str(mini_vega), student=HALF, batch=1, rounds=1, loops=("layer", "block", "published")
        )
        bench_loops(options, tmp_path / "bench.json")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in result["loops"]] == ["published", "block", "layer"]
    assert all(len(row["seconds"]) == 1 for row in result["loops"])
    assert [row["peak_memory_bytes"] for row in result["loops"]] == [10**9, None, None]
    assert not result["ratios"]


def test_an_unknown_loop_is_named_before_anything_is_loaded(mini_vega: Path, tmp_path: Path) -> None:
    options = BenchOptions(model=str(mini_vega), loops=("sub-blocks",))
    with pytest.raises(UserError, match=r"unknown loop 'sub-blocks': known are .*did you mean 'sub-block'"):
        bench_loops(options, tmp_path / "bench.json")


def test_a_loop_that_does_not_fit_the_gpu_leaves_the_others_their_turn(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.20 GiB free. More.")

    monkeypatch.setattr("distill.studies.loops.published_steps", lambda *_: nullcontext(full))
    monkeypatch.setattr("distill.studies.bench.peak_memory", lambda *_: 10**9)
    options = BenchOptions(model=str(mini_vega), student=HALF, batch=2, rounds=1, loops=("published", "output only"))
    result = bench_loops(options, tmp_path / "bench.json")
    assert [row["name"] for row in result["loops"]] == ["output only"] and not result["ratios"]
    advice = r"2\.00 GiB\..*'published' was at its turn; take --batch below 2 or --gradient"
    assert re.search(advice, result["failures"]["published"])
    assert any("published failed: the GPU's memory is full" in line for line in describe(result))
    with pytest.raises(UserError, match=advice):
        bench_loops(replace(options, loops=("published",)), tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_random_weights_are_made_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.studies.bench.peak_memory", lambda *_: None)
    monkeypatch.setattr("distill.studies.loops.resolve", None)
    loops = ("published", "output only")
    options = BenchOptions(
        model="random:mini-ssd-1b", student="mini-vega", batch=1, rounds=1, loops=loops, kernels=True
    )
    result = bench_loops(options, tmp_path / "bench.json")
    assert (result["teacher"], result["student"]) == ("mini-ssd-1b", "mini-vega")
    assert all(row["kernels"]["families_ms"]["gemm"] > 0 and row["first_s"] > 0 for row in result["loops"])


def test_a_step_counts_the_teacher_once_and_the_student_three_times() -> None:
    teacher, student = (ARCHITECTURES[name] for name in ("sdxl", "ssd-1b"))
    calls = [catalogue_row(one).tflop_per_call for one in (teacher, student)]  # of two samples
    assert step_tflop(teacher, student, 4) == pytest.approx(2 * calls[0] + 6 * calls[1])
    assert step_tflop(teacher, student, 4, lcm=True) == pytest.approx(4 * calls[0] + 8 * calls[1])
