import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import parts
from bench.contestants.contestants import Spec, make_contestant
from bench.suite import _kernel_folder
from distill.common.errors import UserError


def made_job(tmp_path, part, **changes):
    values = {"command": [], "out": str(tmp_path / "x.json"), "workdir": str(tmp_path), "models": ["sdxl", "vega"]}
    values |= {
        "resolutions": "1024x1024,1536x640",
        "steps": 30,
        "device": "cuda",
        "seconds": 500.0,
        "began": time.time(),
    }
    return parts.Job(part=part, **(values | changes))


@pytest.fixture
def told(monkeypatch):
    """What a part asks of the other rooms and of `bench run`: (commands with whether GPUs were hidden, specs, changes)."""
    commands, runs = [], []
    monkeypatch.setattr(parts, "_checkpoint", lambda job, model: Path(job.workdir, f"{model}-{job.precision}"))

    def command(job, *arguments, hide_gpus=False, keep_s=0.0):
        commands.append((arguments, hide_gpus))
        if "shared" in arguments and job.models == ["without shared"]:
            raise UserError("no memory")
        if arguments[0] == "engines":
            bundle = Path(arguments[arguments.index("--out") + 1])
            bundle.mkdir(exist_ok=True)
            (bundle / "manifest.json").touch()

    monkeypatch.setattr(parts, "_command", command)
    monkeypatch.setattr(parts.Job, "bench", lambda job, specs, **changes: runs.append((specs, changes)))
    return commands, runs


def test_layouts_are_built_each_and_run_side_by_side(tmp_path, monkeypatch, told):
    monkeypatch.setattr("engines.gpus.gpu_at_hand", lambda: ("NVIDIA GeForce RTX 4090", "8.9"))
    parts.layouts(made_job(tmp_path, "layouts:tensorrt-rtx"))
    commands, [(specs, changes)] = told
    builds = [
        (part[part.index("--layout") + 1], part[part.index("--gpus") + 1], hidden) for part, hidden in commands[1:]
    ]
    on_the_spot = [(layout, "auto", False) for layout in ("ranged", "shared", "per-resolution")]
    assert builds == [*on_the_spot, ("ranged", "rtx4090", True)]
    contestants = [make_contestant(Spec.parse(spec), "cuda") for spec in specs]
    ways = [(one.flavor, one.layout, one.cuda_graphs) for one in contestants]
    assert ways[:3] == [("tensorrt-rtx", layout, True) for layout, _, _ in on_the_spot]
    assert ways[3:] == [("tensorrt-rtx", "ranged", True), ("tensorrt-rtx", "ranged", False)]
    assert contestants[3].source != contestants[0].source == contestants[4].source
    assert changes["resolutions"] == "1024x1024,1536x640" and len(changes["artifacts"]) == 5


def test_a_layout_that_cannot_be_built_leaves_the_others_their_turn(tmp_path, monkeypatch, told):
    monkeypatch.setattr("engines.gpus.gpu_at_hand", lambda: None)
    with pytest.raises(UserError, match="shared: no memory"):
        parts.layouts(made_job(tmp_path, "layouts:tensorrt", models=["without shared"]))
    [(specs, _)] = told[1]
    options = [Spec.parse(spec).option for spec in specs]
    assert options == ["tensorrt+ranged", "tensorrt+per-resolution", "tensorrt+ranged+no-graphs"]


def test_the_last_model_of_a_flavor_runs_beside_those_before(tmp_path, told):
    for model in ("vega", "sdxl"):
        parts.flavor(made_job(tmp_path, f"tensorrt:{model}"))
    names = [[spec.partition("=")[0] for spec in specs] for specs, _ in told[1]]
    assert names == [["vega eager", "vega tensorrt"], ["sdxl eager", "sdxl tensorrt", "vega tensorrt"]]


def test_what_follows_the_colon_changes_the_run(tmp_path, told):
    for part in ("eager", "eager:bf16", "compiled:1536x640"):
        job = made_job(tmp_path, part)
        parts.FUNCTIONS[part.partition(":")[0]](job)
    (eager, plain), (halves, _), (compiled, _) = told[1]
    assert eager[0] == "sdxl=eager@fp16:random:sdxl" and plain["resolutions"] == "1024x1024,1536x640"
    assert halves[0] == "sdxl=eager@bf16:random:sdxl"
    assert compiled[0] == "vega compiled=compiled@fp16:random:vega" and job.first_resolution == "1536x640"


def test_the_published_loop_is_partial_where_its_times_are_there(tmp_path, monkeypatch, told):
    job = made_job(tmp_path, "published:vega")
    assert parts.published(job) == []

    def no_time(*_arguments):
        raise UserError("distill bench found no time to end")

    monkeypatch.setattr(parts, "_command", no_time)
    with pytest.raises(UserError, match="no time"):
        parts.published(job)
    Path(job.out).touch()
    assert "found no time to end" in parts.published(job)[0]


def test_the_largest_model_compiles_last_and_runs_beside_all(tmp_path, told):
    for model in ("vega", "sdxl"):
        parts.compiled(made_job(tmp_path, f"compiled:{model}"))
    names = [[spec.partition("=")[0] for spec in specs] for specs, _ in told[1]]
    assert names == [["vega eager", "vega compiled"], ["vega compiled", "sdxl eager", "sdxl compiled"]]
    assert told[1][-1][1]["baseline"] == "sdxl compiled"
    folders = {_kernel_folder(f"compiled:{one}", ["sdxl", "vega"]) for one in ("sdxl", "vega", "bf16")}
    assert folders == {"kernels-compiled", "kernels-compiled-bf16"}


def test_a_part_that_ran_out_of_time_says_what_it_left_out(tmp_path, monkeypatch, capsys):
    from bench import training

    monkeypatch.setattr("sys.argv", ["parts", parts.as_argument(made_job(tmp_path, "training:vega"))])
    rows = [{"title": "with", "failed": None, "samples_per_s": 1.0, "mfu": None}]
    rows += [{"title": "without", "failed": f"{training.NO_TIME}: 3 s left"}]
    monkeypatch.setattr(training, "measure_training", lambda *_, on_row, **__: [on_row(row) for row in rows])
    assert parts.main() == parts.PARTIAL
    assert capsys.readouterr().err.strip() == "without: not run: 3 s left"


def test_a_part_whose_contestant_does_not_load_is_partial(tmp_path, monkeypatch, capsys):
    """Where a GPU is full or a compiler is missing: the same command tries it again."""
    notes = [
        "b was not loaded: too little was left",
        "c did not load: OutOfMemoryError:\nfull",
        "the baseline did not load",
    ]
    monkeypatch.setattr("bench.run.run_bench", lambda options, meanwhile: SimpleNamespace(notes=notes))
    monkeypatch.setattr("sys.argv", ["parts", parts.as_argument(made_job(tmp_path, "eager"))])
    assert parts.main() == parts.PARTIAL
    assert capsys.readouterr().err.strip() == f"{notes[0]}; c did not load: OutOfMemoryError: full"
