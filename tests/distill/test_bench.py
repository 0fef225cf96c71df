from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.bench import LOOPS, BenchOptions, bench_loops, describe, ratio


def test_every_loop_is_measured_and_every_sample_kept(mini_vega: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("distill.bench.WARMUP_ROUNDS", 0)
    monkeypatch.setattr("distill.bench.peak_memory", lambda *_: 10**9)
    options = BenchOptions(model=str(mini_vega), student="-/1,1/1,1:0:1,1,1/1,1,1/-", batch=2, rounds=2)
    result = bench_loops(options, tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert [row["name"] for row in result["loops"]] == [loop.name for loop in LOOPS]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in result["loops"])
    table = "\n".join(describe(result))
    assert all(loop.name in table for loop in LOOPS) and "1,000 MB" in table


def test_a_ratio_is_of_rounds_not_of_means() -> None:
    assert ratio([2.0, 4.0, 60.0], [1.0, 2.0, 30.0])["median"] == pytest.approx(2.0)
