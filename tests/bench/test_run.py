import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from conftest import fake_options

from bench.contestants.spec import Spec, parse_specs
from bench.quality.fidelity import FidelityOptions
from bench.results import read_results
from bench.run import make_plan, run_bench
from bench.workload import Workload, family_resolutions, make_workloads
from distill.common.errors import UserError, parse_counts
from distill.models.families import MINI_FAMILY
from distill.models.resolution import Resolution


def test_a_run_of_fakes_gives_back_their_speedup(results_path):
    results = read_results(results_path)
    main = results.cells[0]
    rows = {row.contestant: row for row in main.rows}
    assert rows["vega"].speedup.value == pytest.approx(14 / 8, rel=1e-3)
    assert rows["vega"].speedup.low <= rows["vega"].speedup.value <= rows["vega"].speedup.high
    assert rows["teacher"].percentiles_ms == {"p90": None, "p95": None, "p99": None}
    for row in main.rows:
        assert sum(row.stages_ms.values()) == pytest.approx(row.total_ms.value)
        assert len(row.samples) == 8
    assert [cell.workload["steps"] for cell in results.cells] == [3, 3, 6]


def test_absent_readings_are_null_and_say_why(results_path):
    results = read_results(results_path)
    assert results.gpu["identity"]["name"] is None and results.gpu["reason"]
    assert results.gpu["missing"]["power_w"]
    for record in results.contestants:
        assert record.energy["j_per_image"] is None and record.energy["why"]
        assert record.costs is None and "fake" in record.costs_why
        assert record.quality["passed"] is None


def test_one_that_breaks_at_loading_leaves_the_others_their_turn(tmp_path, monkeypatch, virtual_time):
    from bench.contestants.fake import FakeContestant
    from bench.report.report import write_report

    def load(self):
        if self.name == "teacher":
            raise MemoryError("out of memory")

    monkeypatch.setattr(FakeContestant, "load", load)
    results = run_bench(fake_options(tmp_path / "r.json"))
    assert [record.name for record in results.contestants] == ["vega"]
    assert "teacher did not load: MemoryError: out of memory" in results.notes
    assert results.baseline == "vega"
    write_report([tmp_path / "r.json"], tmp_path / "out")
    assert "teacher did not load" in (tmp_path / "out" / "index.html").read_text()
    with pytest.raises(UserError, match="no contestant could be loaded"):
        run_bench(fake_options(tmp_path / "r.json", contestants=["teacher=fake:"]))


def test_what_was_timed_is_kept_where_the_rest_is_cut_short(tmp_path, monkeypatch, virtual_time):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.session.judge", killed)
    with pytest.raises(KeyboardInterrupt):
        run_bench(fake_options(tmp_path / "r.json"))
    results = read_results(tmp_path / "r.unfinished.json")
    assert len(results.cells[0].rows[0].samples) == 8
    assert results.contestants[0].quality["words"] == ["the run was stopped before this"]


def test_a_finished_file_outlives_a_run_that_is_stopped(tmp_path, monkeypatch, virtual_time, capsys):
    from bench.__main__ import main

    def stopped(*_):
        raise KeyboardInterrupt

    line = ["bench", "run", "--contestants", "a=fake:denoise=1", "--out", str(tmp_path / "r.json"), "--seconds", "0"]
    monkeypatch.setattr("sys.argv", line)
    assert main() == 0 and [path.name for path in tmp_path.iterdir()] == ["r.json"]
    finished = (tmp_path / "r.json").read_bytes()
    capsys.readouterr()
    for what, kept in (("measure_cold_start", False), ("judge", True), ("measure_cold_start", False)):
        with monkeypatch.context() as patch:
            patch.setattr(f"bench.session.{what}", stopped)
            assert main() == 130
        told = capsys.readouterr().err
        assert "stopped; the same command begins anew" in told and ("r.unfinished.json" in told) is kept
        assert (tmp_path / "r.json").read_bytes() == finished
    assert read_results(tmp_path / "r.unfinished.json").cells, "what began anew and measured nothing took nothing away"
    monkeypatch.setattr("sys.argv", [*line[:4], "--out", "."])
    assert main() == 2 and "--out . is a folder" in capsys.readouterr().err


def test_one_that_raises_after_the_timed_rounds_costs_only_its_own(tmp_path, monkeypatch, virtual_time):
    from bench.contestants.fake import FakeContestant

    real = FakeContestant.draw

    def draw(self, workload, mark):
        if self.name == "teacher" and workload.seed >= 1000:
            raise MemoryError("too large")
        return real(self, workload, mark)

    def energy(*_):
        raise RuntimeError("the board is gone")

    monkeypatch.setattr(FakeContestant, "draw", draw)
    monkeypatch.setattr("bench.measure.sustained.energy_per_image", energy)
    results = run_bench(fake_options(tmp_path / "r.json", pictures=2))
    assert [one.contestant for one in results.pictures] == ["vega", "vega"]
    assert "the board is gone" in results.contestants[0].energy["why"]
    assert "teacher failed at the pictures, 1024x1024: MemoryError: too large" in results.notes
    assert read_results(tmp_path / "r.json").notes == results.notes


def test_a_reference_that_cannot_be_drawn_is_told(tmp_path, monkeypatch):
    from bench.quality import reference

    def fail(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(reference, "_draw_reference", fail)
    about = {"configs": SimpleNamespace(is_narrow=False), "workdir": tmp_path, "asked": lambda workload: workload}
    contestant = SimpleNamespace(name="vega", checkpoint="here", **about)
    found = reference._references([contestant], Workload(resolution=Resolution(64, 64), steps=1), "cpu")
    assert found == {"vega": "no fp32 reference: RuntimeError: no kernel"}


def test_a_kept_reference_is_of_the_same_files(tmp_path):
    from bench.quality.reference import _kept_reference

    reference = SimpleNamespace(device="cpu", source=str(tmp_path), folder=tmp_path, workdir=tmp_path / "work")
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text("{}")
    workload = Workload(resolution=Resolution(64, 64), steps=1)
    kept = _kept_reference(reference, workload)
    assert _kept_reference(reference, workload) == kept
    scheduler.write_text('{"timestep_spacing": "trailing"}')
    assert _kept_reference(reference, workload) != kept


def test_a_run_killed_between_two_workloads_keeps_the_first(tmp_path, monkeypatch, virtual_time):
    from bench import session

    real = session.measure_cells

    def killed(*arguments, **more):
        yield next(real(*arguments, **more))
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "measure_cells", killed)
    with pytest.raises(KeyboardInterrupt):
        run_bench(fake_options(tmp_path / "r.json"))
    (cell,) = read_results(tmp_path / "r.unfinished.json").cells
    assert [len(row.samples) for row in cell.rows] == [4, 4]


def test_the_gpus_state_is_kept_for_every_cell(tmp_path, monkeypatch, virtual_time):
    from bench import run
    from bench.measure.gpu import Gpu

    clocks = iter(range(1000, 9000))
    state = {"memory_clock_mhz": 3, "temperature_c": 50, "power_w": None, "memory_used_bytes": 1, "other_processes": 0}

    class Board(Gpu):
        present = True

        def state(self):
            return state | {"sm_clock_mhz": next(clocks), "throttle_reasons": ["power cap"]}

        def throttled_ns(self):
            return None

    monkeypatch.setattr("bench.measure.watch.EVERY_S", 0.001)
    monkeypatch.setattr(run, "Gpu", lambda _device: Board())
    results = run_bench(fake_options(tmp_path / "r.json"))
    least, middle, most = results.cells[0].device["sm_clock_mhz"]
    assert 1000 < least < middle < most
    assert results.cells[0].device["temperature_c"] == [50, 50, 50] and results.cells[0].device["power_w"] is None
    samples = results.cells[0].rows[0].samples
    marked = [sample.throttled for sample in samples]
    assert set(map(tuple, marked)) <= {(), ("power cap",)}, "those during which a reading said so"


def test_fid_and_clip_outside_their_bands_fail_the_guard(tmp_path, clip_folder, virtual_time):
    import numpy as np
    import torch

    class Mean(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((2, 3)) / 255

    torch.jit.script(Mean()).save(str(tmp_path / "net.pt"))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    (tmp_path / "captions.txt").write_text("a red circle\n" * 8)
    given = {
        "contestants": ["a=fake:denoise=1"],
        "resolutions": "64x64",
        "max_rounds": 6,
    }
    fidelity = FidelityOptions(
        captions=tmp_path / "captions.txt",
        caption_count=4,
        fid_reference=tmp_path / "stats.npz",
        fid_extractor=tmp_path / "net.pt",
        clip_model=str(clip_folder),
    )
    free = run_bench(fake_options(tmp_path / "free.json", **given, fidelity=fidelity)).contestants[0].quality
    fid, clip = free["fidelity"]["fid"], free["fidelity"]["clip"]
    assert free["passed"] is None and fid > 0 and 0 <= clip <= 100 and free["fidelity"]["count"] == 4
    banded = replace(fidelity, fid_band=(fid - 1, fid + 1), clip_band=(clip + 1, clip + 2))
    judged = run_bench(fake_options(tmp_path / "judged.json", **given, fidelity=banded)).contestants[0].quality
    assert judged["passed"] is False and len(judged["words"]) == 2  # that there was no fp32 reference is said too
    assert f"CLIP score {clip:.2f} is below the band" in judged["words"][1]


@pytest.mark.parametrize("breaks_at", ["load", "draw"])
def test_what_does_not_fit_together_is_measured_in_turns_and_said(tmp_path, monkeypatch, virtual_time, breaks_at):
    from bench.contestants.fake import FakeContestant

    held, draw = set(), FakeContestant.draw

    def require_room():
        if len(held) > 1:
            raise MemoryError("out of memory")

    def load(self):
        held.add(self.name)
        if breaks_at == "load":
            require_room()

    def crowded(self, workload, mark):
        if breaks_at == "draw" and workload.steps == 6:
            require_room()
        return draw(self, workload, mark)

    monkeypatch.setattr(FakeContestant, "load", load)
    monkeypatch.setattr(FakeContestant, "unload", lambda self: held.discard(self.name))
    monkeypatch.setattr(FakeContestant, "draw", crowded)
    results = run_bench(fake_options(tmp_path / "r.json", pictures=2))
    assert "ran out of memory" in results.in_turns and not held
    teacher, vega = results.cells[0].rows
    assert (len(teacher.samples), len(vega.samples), len(results.pictures)) == (8, 8, 4)
    assert vega.speedup.value == pytest.approx(14 / 8, rel=1e-3), "of the medians"
    assert results.notes == [] and not any(cell.failures for cell in results.cells)


def test_launches_are_one_run_and_a_stopped_one_keeps_what_it_has(tmp_path, monkeypatch, virtual_time):
    """In this process; what a true one does beyond is Python's."""
    import pickle

    from bench import launches

    begun = []

    def child(_command, input, check, **_):
        options = pickle.loads(input)
        begun.append(options)
        if len(begun) == 5:
            raise KeyboardInterrupt
        run_bench(options)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(launches, "subprocess", SimpleNamespace(run=child))
    results = run_bench(fake_options(tmp_path / "r.json", launches=3, pictures=1))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"] and read_results(tmp_path / "r.json") == results
    row = results.cells[0].rows[1]
    assert row.launches == 3 and [one.launch for one in row.samples] == [0, 0, 1, 1, 2, 2]
    assert row.speedup.low == pytest.approx(14 / 8, rel=1e-3) and len(results.pictures) == 2
    assert [one.pictures for one in begun] == [1, 0, 0]
    with pytest.raises(KeyboardInterrupt):
        run_bench(fake_options(tmp_path / "s.json", launches=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "s.unfinished.json"]
    assert read_results(tmp_path / "s.unfinished.json").notes == ["1 of 3 launches"]
    begun[3:] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bench.session.measure_cold_start", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        run_bench(fake_options(tmp_path / "t.json", launches=3))
    assert not list(tmp_path.glob("t*.json")), "stopped before the first measurement, it leaves nothing"


def test_a_workload_that_is_stopped_keeps_its_rounds(tmp_path, monkeypatch, virtual_time):
    from bench.contestants.fake import FakeContestant

    real, drawn = FakeContestant.draw, []

    def draw(self, workload, mark):
        drawn.append(self.name)
        if len(drawn) == 11:  # two cold starts, two warm-ups each, two rounds
            raise KeyboardInterrupt
        return real(self, workload, mark)

    monkeypatch.setattr(FakeContestant, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        run_bench(fake_options(tmp_path / "r.json"))
    assert [len(row.samples) for row in read_results(tmp_path / "r.unfinished.json").cells[0].rows] == [2, 2]


def test_a_sustained_run_keeps_the_time_of_every_call(tmp_path):
    options = fake_options(tmp_path / "r.json", contestants=["a=fake:denoise=1"], sustained_seconds=0.2, seconds=0.0)
    record = run_bench(options).contestants[0]
    trace = read_results(tmp_path / "r.json").contestants[0].sustained
    assert trace == record.sustained and trace.seconds >= 0.2 and trace.gpu == {}
    assert len(trace.at_s) == len(trace.total_ms) == trace.images and sorted(trace.at_s) == trace.at_s
    assert record.energy["j_per_image"] is None, "nothing is made up"


def test_sizes_are_those_that_every_bundle_has():
    sizes = {
        "a": None,
        "b": (Resolution(64, 64), Resolution(128, 128)),
        "c": (Resolution(128, 128), Resolution(64, 96)),
    }
    assert family_resolutions("first", MINI_FAMILY, sizes) == (Resolution(128, 128),)
    with pytest.raises(UserError, match="c has no engine for 64x64; it has 128x128, 64x96"):
        family_resolutions("64x64", MINI_FAMILY, sizes)
    with pytest.raises(UserError, match="no size in common"):
        family_resolutions("all", MINI_FAMILY, sizes | {"d": (Resolution(32, 32),)})


def test_damaged_artifacts_are_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delattr("bench.run.Session")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="neither a checkpoint"):
        run_bench(fake_options(tmp_path / "r.json", artifacts=[f"vega={folder}"]))
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="schema version None"):
        run_bench(fake_options(tmp_path / "r.json", artifacts=[f"vega={folder}"]))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"contestants": []}, "no contestants"),
        ({"contestants": ["vega"]}, "NAME=KIND"),
        ({"contestants": ["a=fake:", "a=fake:"]}, "twice"),
        ({"contestants": ["a=warp:x"]}, "unknown kind"),
        ({"contestants": ["a=eager@int3:x"]}, "unknown precision"),
        ({"baseline": "nobody"}, "unknown baseline"),
        ({"contestants": ["a=eager:random:vgea"]}, "did you mean 'vega'"),
        ({"contestants": ["a=optimum:no-such-folder"]}, "no-such-folder is no ONNX folder"),
        ({"contestants": ["a=bundle:no-such-folder"]}, "no-such-folder is not a bundle"),
        ({"max_rounds": 0, "min_rounds": 0}, "--min-rounds is 0"),
        ({"max_rounds": 3}, "--max-rounds 3 is below --min-rounds 6"),
        ({"seconds": -1.0}, "--seconds is -1.0; the least is 0"),
        ({"launches": 0}, "--launches is 0"),
        ({"sustained_seconds": -1.0}, "--sustained-seconds is -1.0"),
        ({"out": Path(), "scheduler": "eulr"}, "is a folder"),
        ({"energy_seconds": float("nan")}, "--energy-seconds is nan"),
        ({"mlperf": True}, "--mlperf sets --steps"),
        ({"steps": "0"}, "from 1 to 1000"),
        ({"steps": "many"}, "whole numbers"),
        ({"guidance": "strong"}, "guidance"),
        ({"guidance": "5,-1"}, "at least 0"),
        ({"resolutions": "0x64"}, "the nearest is 32x64"),
        ({"resolutions": "1000"}, "WIDTHxHEIGHT"),
        ({"resolutions": ","}, "WIDTHxHEIGHT"),
        ({"resolutions": "1000x1000"}, "multiples of 32"),
        ({"scheduler": "eulr"}, "did you mean 'euler'"),
        ({"device": "tpu"}, "unknown device"),
        ({"artifacts": ["nobody=."]}, "unknown contestant"),
        ({"out": Path()}, "is a folder"),
        ({"fidelity": FidelityOptions(captions=Path("no-such-file.txt"))}, "does not exist"),
    ],
)
def test_bad_input_is_said_before_anything_is_loaded(tmp_path, monkeypatch, changes, word):
    monkeypatch.delattr("bench.run.Session")
    with pytest.raises(UserError, match=word):
        run_bench(fake_options(**({"out": tmp_path / "r.json"} | changes)))


def test_specs_keep_colons_of_the_source():
    spec = Spec.parse("vega=eager@fp16:random:vega")
    assert (spec.name, spec.kind, spec.option, spec.source) == ("vega", "eager", "fp16", "random:vega")
    assert str(spec) == "eager@fp16:random:vega"
    assert len(parse_specs(["a=fake:", "b=optimum:x"])) == 2


def test_workloads_change_one_thing_at_a_time():
    found = make_workloads(
        family_resolutions("all", MINI_FAMILY),
        parse_counts("--steps", "8,4"),
        batches=[1, 2],
        guidance_scales=[5.0, 1.0],
        scheduler="default",
        seed=0,
        prompts=("a",),
    )
    assert len(found) == 9 + 1 + 1 + 1
    assert found[0] == Workload(resolution=Resolution(128, 128), steps=8, prompts=("a",))
    assert found[-1].unet_batch == 1 and found[0].unet_batch == 2
    assert found[-2].batch_prompts() == ["a", "a"]


def test_mlperfs_way_is_one_noise_and_a_negative_prompt(tmp_path):
    plan = make_plan(fake_options(tmp_path / "r.json", mlperf=True, steps=None))
    [main] = [workload for workload in plan.workloads if workload.resolution == Resolution(1024, 1024)]
    assert main.name == "1024x1024, 20 steps, batch 1, guidance 8, euler, negative prompt"
    assert main.for_picture("x", 7, main.resolution).seed == main.seed and main.negative_prompt
    plain = replace(main, one_noise=False)
    assert plain.for_picture("x", 7, main.resolution).seed == 7
