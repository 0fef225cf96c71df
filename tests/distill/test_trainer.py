from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.architectures import ARCHITECTURES, MINI_FAMILY, find_architecture
from distill.cache import make_cache
from distill.checkpoints import TrainingState, draw_validation, gather_student
from distill.errors import UserError, exit_on_user_error
from distill.options import TrainOptions
from distill.pair import Pair
from distill.recipes import Level, LossWeights, Recipe, Stage, find_recipe
from distill.sharding import check_fsdp, check_no_other_fsdp
from distill.sources import check_checkpoint, check_successor, component_tensors, load_component, read_config, resolve
from distill.step import DivergenceGuard, learning_rate
from distill.surgery import make_student
from distill.trainer import train

HALF = "-/1,1/1,1:0:1,1,1/1,1,1/-"  # half of Vega's last transformers: a student that trains in a moment


def small_recipe(teacher: str, **changes) -> Recipe:
    losses = LossWeights(level="layer", normalize=True)
    stage = Stage(
        name="whole", teacher=teacher, student=HALF, steps=6, layer_map="first", losses=losses, warmup_steps=2
    )
    shorter = replace(stage, name="shorten-up", student="-/1,1/2,2:0:1,1,1/1,1,1/-", steps=3, learning_rate=1e-3)
    defaults = {"batch_size": 4, "ema_decay": 0.9, "validation_prompts": ("a small red ring at the top",)}
    return Recipe(name="small", stages=(shorter, stage), **defaults | changes)


@pytest.fixture(scope="module")
def cache(mini_vega: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    make_cache(mini_vega, "shapes:45", folder)
    return folder


@pytest.fixture(scope="module")
def finished(mini_vega: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("students") / "small"
    options = TrainOptions(checkpoint_every=2, log_every=1)
    train(small_recipe(str(mini_vega)), cache=cache, out=out, workdir=out, options=options)
    return out


def test_a_finished_student_is_a_pipeline_that_draws(finished: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(finished)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a small red ring at the top", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    assert component_tensors(finished / "unet").keys() == pipe.unet.state_dict().keys()
    assert not (finished / "stages").exists() and not (finished / "state").exists()


def test_the_whole_recipe_is_in_the_checkpoint(finished: Path, mini_vega: Path) -> None:
    about = json.loads((finished / "slimxl.json").read_text())
    assert about["recipe"] == json.loads(json.dumps(small_recipe(str(mini_vega)).as_dict()))
    assert about["layer_map"]["down_blocks.2.attentions.0"] == [0]


def test_every_term_is_logged_by_name_and_they_sum_to_the_loss(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "losses.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        *(("1-shorten-up", step) for step in range(1, 4)),
        *(("2-whole", step) for step in range(1, 7)),
    ]
    for line in lines:
        assert sum(line["terms"].values()) == pytest.approx(line["loss"], rel=1e-4)
        assert {"task", "output", "feature/mid_block.resnets.0"} <= line["terms"].keys()


def test_the_student_is_not_the_teacher(finished: Path, mini_vega: Path) -> None:
    student, teacher = (component_tensors(folder / "unet") for folder in (finished, mini_vega))
    assert len(student) < len(teacher)
    assert read_config(finished, "unet")["transformer_layers_per_block"] == [1, [1, 1], [1, 1]]


def test_a_second_run_does_nothing(finished: Path, mini_vega: Path, cache: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train(small_recipe(str(mini_vega)), cache=cache, out=finished, workdir=finished, options=TrainOptions())
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_folder_of_another_recipe_is_refused(finished: Path, mini_vega: Path, cache: Path) -> None:
    with pytest.raises(UserError, match="belongs to another recipe"):
        train(small_recipe(str(mini_vega), seed=7), cache=cache, out=finished, workdir=finished)


def test_a_model_that_no_training_made_is_not_written_over(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="belongs to another recipe"):
        train(small_recipe(str(mini_vega)), cache=cache, out=mini_vega, workdir=tmp_path)
    make_student(mini_vega, find_architecture(HALF, MINI_FAMILY), "first", tmp_path / "untrained")
    with pytest.raises(UserError, match="belongs to another recipe"):
        train(small_recipe(str(mini_vega)), cache=cache, out=tmp_path / "untrained", workdir=tmp_path)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trainer import small_recipe
from distill.options import TrainOptions
from distill.trainer import train
cache, teacher, out, *flags = sys.argv[1:]
train(small_recipe(teacher), cache=Path(cache), out=Path(out), workdir=Path(out),
      options=TrainOptions(checkpoint_every=2, log_every=1, **dict.fromkeys(flags, True)))
"""


def _run(cache: Path, teacher: Path, out: Path, *launcher: str, flags: tuple[str, ...] = ()) -> subprocess.Popen:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    path = out.with_suffix(".py")
    path.write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(path), str(cache), str(teacher), str(out), *flags]
    return subprocess.Popen(command, env=environment)


def _curve(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "losses.jsonl").open()]


def test_killed_at_random_points_the_run_ends_in_the_same_bytes(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert _run(cache, mini_vega, whole).wait() == 0
    killed = tmp_path / "killed"
    rng = random.Random(0)
    marks = ["stages/01-initial", "state/*/progress.json", "stages/01-shorten-up", "stages/02-initial"]
    for mark in marks:
        process = _run(cache, mini_vega, killed)
        while process.poll() is None and not any(killed.glob(mark)):
            time.sleep(0.01)
        time.sleep(rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert _run(cache, mini_vega, killed).wait() == 0
    for name in ("unet/diffusion_pytorch_model.safetensors", "samples.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    steps = [
        [
            (json.loads(line)["stage"], json.loads(line)["step"], json.loads(line)["loss"])
            for line in (run / "losses.jsonl").open()
        ]
        for run in (whole, killed)
    ]
    assert steps[0] == steps[1]


def test_two_processes_give_the_loss_curve_of_one(cache: Path, mini_vega: Path, finished: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611")
    assert _run(cache, mini_vega, two, *launcher).wait() == 0
    assert _curve(two) == pytest.approx(_curve(finished), rel=2e-4)


def test_fsdp_gives_the_loss_curve_of_one_killed_or_not(
    cache: Path, mini_vega: Path, finished: Path, tmp_path: Path
) -> None:
    """Features at every level, the sharded average, resuming from sharded state, the gathered student."""
    sharded = tmp_path / "sharded"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29613")
    process = _run(cache, mini_vega, sharded, *launcher, flags=("fsdp",))
    while process.poll() is None and not any((sharded / "state").glob("02-*/progress.json")):
        time.sleep(0.01)
    process.terminate()  # torchrun passes it on
    process.wait()
    state = max((sharded / "state").glob("02-*"))
    assert int(state.name[3:]) == json.loads((sharded / "losses.jsonl").read_text().splitlines()[-1])["step"]
    assert {path.name for path in state.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert _run(cache, mini_vega, sharded, *launcher, flags=("fsdp",)).wait() == 0
    assert _curve(sharded) == pytest.approx(_curve(finished), rel=2e-4)
    ours, whole = (load_file(run / "unet" / "diffusion_pytorch_model.safetensors") for run in (sharded, finished))
    assert ours.keys() == whole.keys()
    assert all(torch.allclose(ours[key], whole[key], atol=1e-4) for key in whole)
    StableDiffusionXLPipeline.from_pretrained(sharded)


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        ({}, 1, "start it with torchrun"),
        ({"mixed_precision": "fp16"}, 2, "use --mixed-precision bf16"),
        ({"optimizer": "adamw-8bit"}, 2, "shards adamw only"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(options: dict[str, str], processes: int, message: str) -> None:
    asked = {"mixed_precision": "bf16", "optimizer": "adamw"} | options
    with pytest.raises(UserError, match=message):
        check_fsdp(processes, **asked)


def test_fsdp_by_accelerates_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="give --fsdp"):
        check_no_other_fsdp()


def _short(teacher: Path, **changes) -> Recipe:
    """One stage, of four steps if not told otherwise."""
    recipe = small_recipe(str(teacher), validation_prompts=(), ema_decay=None)
    return replace(recipe, stages=(replace(recipe.stages[1], **({"steps": 4} | changes)),))


@pytest.fixture(scope="module")
def short(mini_vega: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    out = tmp_path_factory.mktemp("short") / "out"
    train(_short(mini_vega), cache=cache, out=out, workdir=out, options=TrainOptions(log_every=1))
    return _curve(out)


def test_gradient_checkpointing_and_accumulation_change_no_loss(
    short: list[float], cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are on: the blocks run again in backward, and each step has as many of these as it accumulates."""
    micro_batches: list[int] = []
    resnet_batches: list[int] = []

    class Watched(Pair):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            assert self.student.is_gradient_checkpointing
            for module, seen in ((self.student, micro_batches), (self.student.up_blocks[0].resnets[0], resnet_batches)):
                module.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(len(inputs[0])))

    monkeypatch.setattr("distill.trainer.Pair", Watched)
    options = TrainOptions(log_every=1, gradient_checkpointing=True, accumulation=2)
    train(_short(mini_vega), cache=cache, out=tmp_path / "out", workdir=tmp_path, options=options)
    assert _curve(tmp_path / "out") == pytest.approx(short, rel=1e-4)
    assert micro_batches == [2] * (4 * 2)
    assert resnet_batches == [2] * (4 * 2 * 2)


def test_moments_in_8_bits_learn_alike_and_survive_a_stop(
    short: list[float], cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, options = _short(mini_vega), TrainOptions(checkpoint_every=1, log_every=1, optimizer="adamw-8bit")
    train(recipe, cache=cache, out=tmp_path / "whole", workdir=tmp_path, options=options)
    assert _curve(tmp_path / "whole") == pytest.approx(short, rel=2e-2)
    assert _curve(tmp_path / "whole") != short
    save, saved = TrainingState.save, []

    def stop_at_the_third(self: TrainingState, folder: Path) -> None:
        saved.append(folder)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(self, folder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingState, "save", stop_at_the_third)
        train(recipe, cache=cache, out=tmp_path / "stopped", workdir=tmp_path, options=options)
    train(recipe, cache=cache, out=tmp_path / "stopped", workdir=tmp_path, options=options)
    ours, whole = (tmp_path / run / "unet" / "diffusion_pytorch_model.safetensors" for run in ("stopped", "whole"))
    assert ours.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("level", ["layer", "self-attention"])
def test_compiled_blocks_are_tapped_as_before(
    level: Level, cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the graphs captured and differentiated ahead of time, but run by eager kernels: what taps could break is
    the capture, and generating code takes minutes."""
    compiled = []
    real = torch.nn.Module.compile

    def compile_eagerly(module: torch.nn.Module, *_args: object, **_options: object) -> None:
        compiled.append(module)
        real(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    torch._dynamo.reset()
    recipe = _short(mini_vega, losses=LossWeights(level=level, normalize=True))
    for name, compile in (("plain", False), ("compiled", True)):
        options = TrainOptions(log_every=1, compile=compile)
        train(recipe, cache=cache, out=tmp_path / name, workdir=tmp_path, options=options)
    assert len(compiled) == 10 + 15 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert _curve(tmp_path / "compiled") == pytest.approx(_curve(tmp_path / "plain"), rel=1e-4)


def test_pictures_at_fixed_seeds_and_curves_along_the_way(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    recipe = replace(_short(mini_vega, learning_rate=0.0), validation_prompts=("a small red ring at the top",))
    options = TrainOptions(validate_every=1, tensorboard=True, log_every=1)
    train(recipe, cache=cache, out=tmp_path / "out", workdir=tmp_path, options=options)
    pictures = sorted((tmp_path / "out" / "samples").glob("01-whole-*.png"))
    assert [path.stem[-1] for path in pictures] == ["1", "2", "3"]
    assert len({path.read_bytes() for path in pictures}) == 1, "the same weights, so the same pictures"
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    for line in map(json.loads, (tmp_path / "out" / "losses.jsonl").read_text().splitlines()):
        for name, value in line["terms"].items():
            assert events.Scalars(name)[line["step"] - 1].value == pytest.approx(value)


def test_the_guard_tells_a_bad_step_from_a_bad_road() -> None:
    guard = DivergenceGuard(factor=5, patience=10)
    assert not any(guard.diverged(1.0 + 0.1 * (i % 3)) for i in range(30))
    assert not any(guard.diverged(loss) for loss in (50.0, 50.0, 1.0, 50.0))
    assert [guard.diverged(50.0) for _ in range(9)] == [False] * 8 + [True]


def test_a_run_that_diverges_stops_and_keeps_its_last_good_state(
    cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.trainer.DivergenceGuard", lambda: DivergenceGuard(factor=5, patience=2))
    monkeypatch.setattr("distill.trainer.learning_rate", lambda _stage, step: 1e-5 if step < 3 else 0.5)
    recipe = _short(mini_vega, steps=12, losses=LossWeights(output=0.0, feature=0.0))
    recipe = replace(recipe, max_grad_norm=1e9)
    with pytest.raises(UserError, match=r"has diverged: over 5 times its median .* the last good state is in"):
        train(recipe, cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(checkpoint_every=1))
    assert [path.name for path in sorted((tmp_path / "state").iterdir())] == ["01-0000003", "01-0000004"]
    with pytest.raises(
        UserError, match=r"diverged.*at step 5; .*recipe \S+run.json > mine.json`, lower learning_rate there, "
    ):
        train(recipe, cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(checkpoint_every=1))
    assert find_recipe(str(tmp_path / "run.json")) == recipe


def _stopped_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes while this step is being taken."""

    def rate(stage: Stage, now: int) -> float:
        if now == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(stage, now)

    monkeypatch.setattr("distill.trainer.learning_rate", rate)


def test_sigterm_ends_the_step_and_keeps_it(
    short: list[float],
    cache: Path,
    mini_vega: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the midst of a stage and at its last step. What is kept then is not asked of the disk again."""
    before, needs, held = signal.getsignal(signal.SIGTERM), [], []
    monkeypatch.setattr("distill.trainer.require_free_disk", lambda _folder, needed, _what: needs.append(needed))

    def run() -> None:
        train(_short(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(log_every=1))

    for last in (2, 4):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            _stopped_after(last, patch)
            run()
        assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
        assert f"goes on from stage 1, step {last}" in capsys.readouterr().out
        assert _curve(tmp_path) == short[:last]
        files = [path for part in ("state", "stages") for path in (tmp_path / part).rglob("*") if path.is_file()]
        held.append(sum(path.stat().st_size for path in files))
    run()
    assert _curve(tmp_path) == short
    assert [needs[0] - needed for needed in needs] == [0, *held]
    assert needs[2] > 0


def test_a_checkpoint_is_written_by_the_clock_too_and_waits_for_a_good_step(
    cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of ten steps is due at the third, which is bad, and one of half an hour at the ninth."""

    class Guard(DivergenceGuard):
        def diverged(self, loss: float) -> bool:
            self.good.append(loss)
            self.bad_steps = int(len(self.good) in (3, 4))
            return False

    saved = []
    monkeypatch.setattr("distill.trainer.DivergenceGuard", Guard)
    monkeypatch.setattr("distill.trainer.save_state", lambda *a, **_keep: saved.append(a[4].step))
    monkeypatch.setattr("distill.trainer.time", SimpleNamespace(monotonic=itertools.count(0, 200).__next__))
    recipe = _short(mini_vega, steps=12, losses=LossWeights(output=0.0, feature=0.0))
    options = TrainOptions(checkpoint_every=3, log_every=100)
    train(recipe, cache=cache, out=tmp_path, workdir=tmp_path, options=options)
    assert saved == [5, 6, 9]


def test_a_checkpoint_that_the_disk_does_not_take_leaves_the_one_before(
    cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = TrainingState.save

    def full(self: TrainingState, folder: Path) -> None:
        save(self, folder)
        if any(folder.parent.glob("[0-9]*")):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"No space left on device.*is kept"):
        patch.setattr(TrainingState, "save", full)
        train(_short(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(checkpoint_every=1))
    train(_short(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(log_every=1))
    assert [json.loads(line)["step"] for line in (tmp_path / "losses.jsonl").open()] == [2, 3, 4]


def test_a_disk_full_at_the_end_loses_nothing(
    short: list[float],
    cache: Path,
    mini_vega: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """First while the student is written, then while it is moved to its place."""
    rename = Path.rename

    def full(*_arguments: object, **_options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def stopped(self: Path, target: Path) -> Path:
        if self.parent.name == "01-whole" and self.name == "vae":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    def run() -> None:
        options = TrainOptions(checkpoint_every=3, log_every=1)
        train(_short(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=options)

    for owner, name, broken, left in (
        (UNet2DConditionModel, "save_pretrained", full, ["01-initial"]),
        (Path, "rename", stopped, ["01-whole"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            assert exit_on_user_error(run) == 2
        assert "is full; free some space and run the same command again" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "stages").iterdir()] == left
        assert (tmp_path / "state").exists() == (left == ["01-initial"])
    run()
    assert _curve(tmp_path) == short and not (tmp_path / "stages").exists()
    check_checkpoint(tmp_path)


FULL_GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.20 GiB is free. "
    "Including non-PyTorch memory, this process has 77.90 GiB memory in use."
)


def test_a_full_gpu_is_one_line_and_the_same_command_goes_on(
    short: list[float],
    cache: Path,
    mini_vega: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The memory is said to be full within the third backward pass."""
    backward, calls = Accelerator.backward, itertools.count(1)

    def full(self: Accelerator, loss: torch.Tensor) -> None:
        backward(self, loss)
        if next(calls) == 3:
            raise torch.OutOfMemoryError(FULL_GPU)

    def run(**options: object) -> None:
        chosen = TrainOptions(checkpoint_every=1, log_every=1, **options)
        train(_short(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=chosen)

    monkeypatch.setattr(Accelerator, "backward", full)
    assert exit_on_user_error(run) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB" in told
    assert "with the same command and --gradient-checkpointing or --accumulation above 1 or --fsdp on several" in told
    assert re.search(r"planned were \S+ GB plain, \S+ GB gradient checkpointing; go on", told), told
    assert "start anew with --optimizer adamw-8bit" in told
    assert [path.name for path in sorted((tmp_path / "state").iterdir())] == ["01-0000001", "01-0000002"]
    run(gradient_checkpointing=True, accumulation=2)
    assert _curve(tmp_path) == pytest.approx(short, rel=1e-4)


def test_a_disk_too_small_for_the_checkpoints_is_refused_first(
    cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(UserError, match="what this run has yet to keep needs"):
        train(_short(mini_vega), cache=cache, out=tmp_path / "out", workdir=tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_average_is_what_is_saved_and_the_student_goes_on_as_it_was() -> None:
    net = UNet2DConditionModel(**ARCHITECTURES["mini-vega"].unet_config)
    state = TrainingState(net, torch.optim.AdamW(net.parameters()), EMAModel(net.parameters(), decay=0.9))
    began = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    gathered = gather_student(state)
    assert gathered is not None and gathered.state_dict().keys() == began.keys()
    assert all(torch.equal(value, began[key]) for key, value in gathered.state_dict().items())
    assert all(torch.equal(value, began[key] + 1.0) for key, value in net.state_dict().items())


def test_the_loss_scale_is_part_of_the_state(tmp_path: Path) -> None:
    states = []
    for scale in (64.0, 2.0):
        net = UNet2DConditionModel(**ARCHITECTURES["mini-vega"].unet_config)
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        states.append(TrainingState(net, optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=scale)))
    states[0].save(tmp_path / "state")
    states[1].load(tmp_path / "state", step=1)
    weights = [state.student.state_dict() for state in states]
    assert states[1].scaler.state_dict()["scale"] == 64.0
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamw-8bit"}, "needs the package bitsandbytes"),
        ({"tensorboard": True}, "needs the package tensorboard"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
    ],
)
def test_what_is_not_there_is_one_line(
    options: dict, message: str, cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("bitsandbytes", "bitsandbytes.optim", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        train(_short(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(**options))


def test_a_loss_that_is_not_finite_stops_the_run(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    recipe = small_recipe(str(mini_vega))
    broken = replace(recipe, stages=(replace(recipe.stages[0], learning_rate=float("inf")),))
    with pytest.raises(UserError, match="is not finite"):
        train(broken, cache=cache, out=tmp_path / "out", workdir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation": 0}, "--accumulation is 0; the least is 1"),
        ({"checkpoint_every": 0}, "--checkpoint-every is 0; the least is 1"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints is 0; the least is 1"),
        ({"validate_every": -1}, "--validate-every is -1; the least is 0"),
    ],
)
def test_a_number_out_of_range_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainOptions(**options)


def test_pictures_of_no_prompts_are_refused(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="validation_prompts, and it has none"):
        train(_short(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(validate_every=2))


def test_a_picture_takes_the_student_alone_and_is_left_out_where_the_gpu_is_full(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise torch.OutOfMemoryError

    student = load_component(mini_vega, "unet", torch.float32)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", None)
    monkeypatch.setattr(StableDiffusionXLPipeline, "to", full)
    draw_validation(student, mini_vega, ("a small red ring",), tmp_path / "one.png")
    assert "one.png was not drawn" in capsys.readouterr().out and not any(tmp_path.iterdir())


def test_a_batch_that_cannot_be_shared_is_refused(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be shared"):
        train(
            small_recipe(str(mini_vega)),
            cache=cache,
            out=tmp_path,
            workdir=tmp_path,
            options=TrainOptions(accumulation=3),
        )


def test_a_successor_of_another_depth_or_prediction_is_refused(
    mini_vega: Path, mini_sdxl: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="mid_block_type is 'UNetMidBlock2D', was 'UNetMidBlock2DCrossAttn'"):
        check_successor(mini_sdxl, mini_vega)
    copy = tmp_path / "v"
    resolve("random:mini-vega", tmp_path).rename(copy)
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(UserError, match="predicts 'v_prediction'"):
        check_successor(mini_vega, copy)


def test_gradients_are_clipped(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    """To nothing at all, and so the student stays what surgery made it, whatever the learning rate."""
    recipe = replace(_short(mini_vega, learning_rate=0.1), max_grad_norm=0.0, weight_decay=0.0)
    train(recipe, cache=cache, out=tmp_path / "out", workdir=tmp_path)
    student, teacher = (
        load_file(next((folder / "unet").glob("*.safetensors"))) for folder in (tmp_path / "out", mini_vega)
    )
    assert all(torch.equal(value, teacher[key]) for key, value in student.items())


def test_ema_starts_from_the_student(mini_vega: Path, cache: Path, tmp_path: Path) -> None:
    recipe = small_recipe(str(mini_vega), ema_decay=0.9999)
    frozen = tuple(replace(stage, learning_rate=0.0) for stage in recipe.stages)
    train(replace(recipe, stages=frozen), cache=cache, out=tmp_path / "out", workdir=tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet").state_dict()
    teacher = UNet2DConditionModel.from_pretrained(mini_vega / "unet").state_dict()
    assert all(torch.allclose(value, teacher[key], atol=1e-6) for key, value in unet.items())


def test_the_average_takes_the_students_place_and_gives_it_back() -> None:
    student = torch.nn.Linear(3, 2)
    own = [value.clone() for value in student.parameters()]
    ema = EMAModel(student.parameters(), decay=0.9)
    ema.shadow_params = [value + 1 for value in own]
    state = TrainingState(student, torch.optim.SGD(student.parameters()), ema)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError), state.averaged() as averaged:
        assert all(torch.equal(value, mine + 1) for value, mine in zip(averaged.parameters(), own, strict=True))
        1 / 0  # noqa: B018
    assert all(torch.equal(value, mine) for value, mine in zip(student.parameters(), own, strict=True))
    assert all(torch.equal(value, mine + 1) for value, mine in zip(ema.shadow_params, own, strict=True))
