"""Training that is stopped, killed, or started twice: nothing is lost, and it ends as if it had not been."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file

from distill.checkpoints.folder import check_checkpoint, checkpoint_hash
from distill.common.errors import UserError, exit_on_user_error
from distill.common.files import exclusive
from distill.training.guard import DivergenceGuard
from distill.training.objectives import Distill
from distill.training.options import TrainOptions
from distill.training.output.state import TrainingState
from distill.training.recipes import Stage, find_recipe
from distill.training.trainer import train
from tests.distill.small_runs import curve, run, short_recipe, small_recipe
from tests.processes import exit_codes, kill, start, start_ranks, wait_for


def _times(folder: Path) -> dict[Path, int]:
    times = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime_ns
    return times


def _wait_for_more(mark: str, folder: Path, process: BaseProcess, before: dict[Path, int]) -> None:
    """As `wait_for`, and until something in the folder is not as it was `before`."""
    while process.is_alive() and not (any(folder.glob(mark)) and _times(folder) != before):
        time.sleep(0.005)


def test_killed_at_random_points_the_run_ends_in_the_same_bytes(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    whole, killed, recipe = tmp_path / "whole", tmp_path / "killed", small_recipe(str(mini_vega))
    assert exit_codes([start(run, recipe, cache, whole)]) == [0]
    rng = random.Random(0)
    stages = ["stages/01-initial", "state/*/progress.json", "stages/01-shorten-up", "stages/02-initial"]
    for mark in [*stages, "stages/02-whole"]:
        before = _times(killed)
        process = start(run, recipe, cache, killed)
        _wait_for_more(mark, killed, process, before)
        time.sleep(rng.random() if mark in stages else 0)  # the last picture takes a moment only
        kill([process])
    assert exit_codes([start(run, recipe, cache, killed)]) == [0]
    for name in ("unet/diffusion_pytorch_model.safetensors", "samples/01-shorten-up.png", "samples/02-whole.png"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert checkpoint_hash(killed) == checkpoint_hash(whole), "configs too say nothing of the folder"
    steps = [
        [
            (json.loads(line)["stage"], json.loads(line)["step"], json.loads(line)["loss"])
            for line in (run / "losses.jsonl").open()
        ]
        for run in (whole, killed)
    ]
    assert steps[0] == steps[1]


UNDER_TORCHRUN = """
import sys
from pathlib import Path
from tests.distill.small_runs import run, small_recipe
teacher, cache, out = sys.argv[1:]
run(small_recipe(teacher), Path(cache), Path(out))
"""


def _worker(torchrun: subprocess.Popen, rank: str) -> psutil.Process:
    [worker] = [child for child in psutil.Process(torchrun.pid).children() if child.environ().get("RANK") == rank]
    return worker


def _last_state(run: Path) -> Path:
    """The newest checkpoint of a run that was stopped, which is of the last step that it took."""
    state = max((run / "state").glob("[0-9]*"))
    assert int(state.name[3:]) == json.loads((run / "losses.jsonl").read_text().splitlines()[-1])["step"]
    return state


def test_two_processes_give_the_loss_curve_of_one_though_one_of_them_is_stopped(
    cache: Path, mini_vega: Path, finished: Path, tmp_path: Path
) -> None:
    """SIGTERM comes to the second alone; both end after the same step. When they go on, one is killed, and torchrun starts
    both again."""
    two, script, recipe = tmp_path / "two", tmp_path / "start.py", small_recipe(str(mini_vega))
    processes = start_ranks(run, recipe, cache, two)
    wait_for("state/02-*/progress.json", two, processes)
    processes[1].terminate()
    assert exit_codes(processes) == [128 + signal.SIGTERM] * 2
    _last_state(two)
    before = _times(two)
    script.write_text(UNDER_TORCHRUN)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else dead workers' addresses stay, and may be called
    command = [sys.executable, *torchrun, "--max-restarts=1", str(script), str(mini_vega), str(cache), str(two)]
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None and _times(two) == before:
        time.sleep(0.005)
    _worker(process, random.choice("01")).kill()
    assert process.wait() == 0
    assert curve(two) == pytest.approx(curve(finished), rel=2e-4)


def test_fsdp_gives_the_loss_curve_of_one_killed_or_not(
    cache: Path, mini_vega: Path, finished: Path, tmp_path: Path
) -> None:
    """Features at every level, the sharded average, resuming from sharded state, the gathered student."""
    sharded, recipe = tmp_path / "sharded", small_recipe(str(mini_vega))
    processes = start_ranks(run, recipe, cache, sharded, "fsdp")
    wait_for("state/02-*/progress.json", sharded, processes)
    for process in processes:
        process.terminate()
    assert exit_codes(processes) == [128 + signal.SIGTERM] * 2
    assert {path.name for path in _last_state(sharded).glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    assert exit_codes(start_ranks(run, recipe, cache, sharded, "fsdp")) == [0, 0]
    assert curve(sharded) == pytest.approx(curve(finished), rel=2e-4)
    ours, whole = (load_file(run / "unet" / "diffusion_pytorch_model.safetensors") for run in (sharded, finished))
    assert ours.keys() == whole.keys()
    assert all(torch.allclose(ours[key], whole[key], atol=1e-4) for key in whole)
    StableDiffusionXLPipeline.from_pretrained(sharded)


def test_one_run_at_a_time_in_a_folder(cache: Path, mini_vega: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with exclusive(out, lock_file=out / ".lock"), pytest.raises(UserError, match="another process is training into"):
        train(small_recipe(str(mini_vega)), cache=cache, out=out, workdir=tmp_path)
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_moments_in_8_bits_learn_alike_and_survive_a_stop(
    short: list[float], cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, options = short_recipe(mini_vega), TrainOptions(checkpoint_every=1, log_every=1, optimizer="adamw-8bit")
    train(recipe, cache=cache, out=tmp_path / "whole", workdir=tmp_path, options=options)
    assert curve(tmp_path / "whole") == pytest.approx(short, rel=2e-2)
    assert curve(tmp_path / "whole") != short
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


def test_a_run_that_diverges_stops_and_keeps_its_last_good_state(
    cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "distill.training.stage.DivergenceGuard", lambda good: DivergenceGuard(good, factor=5, patience=2)
    )
    monkeypatch.setattr(Stage, "learning_rate_at", lambda _stage, step: 1e-5 if step < 3 else 0.5)
    recipe = short_recipe(mini_vega, steps=12, objective=Distill(output=0.0, feature=0.0))
    recipe = replace(recipe, max_grad_norm=1e9)
    with pytest.raises(UserError, match=r"has diverged: over 5 times its median .* the last good state is in"):
        train(recipe, cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(checkpoint_every=1))
    assert [path.name for path in sorted((tmp_path / "state").iterdir())] == ["01-0000003", "01-0000004"]
    with pytest.raises(
        UserError, match=r"diverged.*at step 6; .*recipe \S+run.json > mine.json`, lower learning_rate there, "
    ):
        train(recipe, cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(checkpoint_every=1))
    assert find_recipe(str(tmp_path / "run.json")) == recipe


def test_a_gradient_that_is_not_finite_leaves_the_state_before(
    cache: Path, mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a loss that is, and at the last step, which no other loss follows."""
    backward, calls = Accelerator.backward, itertools.count(1)

    def overflow(self: Accelerator, loss: torch.Tensor) -> None:
        backward(self, loss * math.inf if next(calls) == 4 else loss)

    monkeypatch.setattr(Accelerator, "backward", overflow)
    with pytest.raises(UserError, match=r"step 4 is not finite \(gradient_norm\)"):
        train(
            short_recipe(mini_vega),
            cache=cache,
            out=tmp_path,
            workdir=tmp_path,
            options=TrainOptions(checkpoint_every=1),
        )
    assert max(path.name for path in (tmp_path / "state").iterdir()) == "01-0000003"
    assert not (tmp_path / "stages" / "01-whole").exists()


def _stopped_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM comes while this step is being taken."""

    learning_rate_at = Stage.learning_rate_at

    def rate(stage: Stage, now: int) -> float:
        if now == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate_at(stage, now)

    monkeypatch.setattr(Stage, "learning_rate_at", rate)


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
    monkeypatch.setattr(
        "distill.training.trainer.require_free_disk", lambda _folder, needed, _what: needs.append(needed)
    )

    def run() -> None:
        train(short_recipe(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(log_every=1))

    for last in (2, 4):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            _stopped_after(last, patch)
            run()
        assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
        assert f"goes on from stage 1, step {last}" in capsys.readouterr().out
        assert curve(tmp_path) == short[:last]
        files = [path for part in ("state", "stages") for path in (tmp_path / part).rglob("*") if path.is_file()]
        held.append(sum(path.stat().st_size for path in files))
    run()
    assert curve(tmp_path) == short
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
    monkeypatch.setattr("distill.training.stage.DivergenceGuard", Guard)
    monkeypatch.setattr("distill.training.stage.save_state", lambda *a, **_keep: saved.append(a[4].step))
    monkeypatch.setattr("distill.training.stage.time", SimpleNamespace(monotonic=itertools.count(0, 200).__next__))
    recipe = short_recipe(mini_vega, steps=12, objective=Distill(output=0.0, feature=0.0))
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
        train(
            short_recipe(mini_vega),
            cache=cache,
            out=tmp_path,
            workdir=tmp_path,
            options=TrainOptions(checkpoint_every=1),
        )
    with monkeypatch.context() as patch, pytest.raises(UserError, match="begun by another version of slimxl"):
        patch.setattr("distill.training.trainer.STATE_FORMAT", 0)
        train(short_recipe(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path)
    train(short_recipe(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=TrainOptions(log_every=1))
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
    replace = Path.replace

    def full(*_arguments: object, **_options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def stopped(self: Path, target: Path) -> Path:
        if self.parent.name == "01-whole" and self.name == "vae":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    def run() -> None:
        options = TrainOptions(checkpoint_every=3, log_every=1)
        train(short_recipe(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=options)

    for owner, name, broken, left in (
        (UNet2DConditionModel, "save_pretrained", full, ["01-initial"]),
        (Path, "replace", stopped, ["01-whole"]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            assert exit_on_user_error(run) == 2
        assert "is full; free some space and run the same command again" in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "stages").iterdir()] == left
        assert (tmp_path / "state").exists() == (left == ["01-initial"])
    run()
    assert curve(tmp_path) == short and not (tmp_path / "stages").exists()
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
        train(short_recipe(mini_vega), cache=cache, out=tmp_path, workdir=tmp_path, options=chosen)

    monkeypatch.setattr(Accelerator, "backward", full)
    assert exit_on_user_error(run) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB" in told
    assert "with the same command and --gradient-checkpointing or --accumulation above 1 or --fsdp on several" in told
    assert re.search(r"expected were [\d.]+ [kMG]B plain, [\d.]+ [kMG]B gradient checkpointing; go on", told), told
    assert "start anew with --optimizer adamw-8bit" in told
    assert [path.name for path in sorted((tmp_path / "state").iterdir())] == ["01-0000001", "01-0000002"]
    run(gradient_checkpointing=True, accumulation=2)
    assert curve(tmp_path) == pytest.approx(short, rel=1e-4)
