"""Checkpoints as files, of a state that takes no training: written, removed and found again."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel

from distill.checkpoints.load import load_component
from distill.common.errors import UserError
from distill.models.architectures import ARCHITECTURES
from distill.training.output.samples import draw_samples
from distill.training.output.state import Progress, TrainingState, gather_student, resume, save_state

ALONE: Any = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)


class State:
    loaded = ""

    def save(self, folder: Path) -> None:
        (folder / "weights").touch()

    def load(self, folder: Path, step: int) -> None:
        self.loaded = folder.name


def _save(folder: Path, step: int, state: Any = State) -> None:
    save_state(ALONE, state(), folder, 0, Progress(step=step), keep=2)


def _resume(folder: Path) -> tuple[str, int]:
    state: Any = State()
    progress = resume(ALONE, state, folder, 0, folder / "losses.jsonl")
    return state.loaded, progress.step


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_nothing_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(folder: Path, **_options: object) -> None:
        (folder / "progress.json").unlink()
        raise KeyboardInterrupt

    for step in (1, 2):
        _save(tmp_path, step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", cut_short)
        _save(tmp_path, 3)
    assert _resume(tmp_path) == ("01-0000003", 3)
    _save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01-0000003", "01-0000004"]


@pytest.mark.parametrize(
    ("cause", "error", "told"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "CUDA out of memory"),
        (
            RuntimeError("[enforce fail at a.cc:6] . unexpected pos 8 vs 2"),
            UserError,
            r"written \(unexpected pos 8 vs 2\)",
        ),
        (
            OSError(28, "No space left on device"),
            UserError,
            r"cannot be written \(\[Errno 28\] No space left on device\)",
        ),
    ],
)
def test_neither_ctrl_c_nor_a_full_gpu_in_a_checkpoint_is_a_full_disk(
    tmp_path: Path, cause: BaseException, error: type[BaseException], told: str
) -> None:
    """torch wraps them all in one exception."""

    class Broken(State):
        def save(self, folder: Path) -> None:
            raise dcp.CheckpointException("save", {0: (cause, None)})  # type: ignore[dict-item]

    with pytest.raises(error, match=told):
        _save(tmp_path, 1, Broken)
    assert _resume(tmp_path) == ("", 0)


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(tmp_path: Path) -> None:
    def state() -> TrainingState:
        net: Any = torch.nn.Linear(64, 64)
        return TrainingState(net, torch.optim.AdamW(net.parameters()))

    def go_on() -> Progress:
        return resume(ALONE, state(), tmp_path, 0, tmp_path / "losses.jsonl")

    for step in (1, 2):
        save_state(ALONE, state(), tmp_path, 0, Progress(step=step), keep=2)
    newest = tmp_path / "01-0000002"
    for name in ("__0_0.distcp", ".metadata", "progress.json"):
        whole = (newest / name).read_bytes()
        for damage in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
            (newest / name).write_bytes(damage)
            with pytest.raises(
                UserError,
                match=r"01-0000002.* (cannot be read \(.*\); run the same command .* remove that folder|is not valid JSON)",
            ):
                go_on()
        (newest / name).write_bytes(whole)
    assert go_on().step == 2
    shutil.rmtree(newest)
    assert go_on().step == 1


def test_all_processes_go_on_from_what_the_first_one_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        _save(tmp_path, step)
    monkeypatch.setattr("distill.training.output.state.broadcast_object_list", lambda _own: ["01-0000001"])
    assert _resume(tmp_path) == ("01-0000001", 1)
    monkeypatch.setattr("distill.training.output.state.broadcast_object_list", lambda _own: ["01-0000003"])
    with pytest.raises(UserError, match="01-0000003 is there for the first process and not for this one"):
        _resume(tmp_path)


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


def test_a_picture_takes_the_student_alone_and_is_left_out_where_the_gpu_is_full(
    mini_vega: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise torch.OutOfMemoryError

    student = load_component(mini_vega, "unet", torch.float32)
    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", None)
    monkeypatch.setattr(StableDiffusionXLPipeline, "to", full)
    draw_samples(student, mini_vega, ("a small red ring",), tmp_path / "one.png")
    assert "one.png was not drawn" in capsys.readouterr().out and not any(tmp_path.iterdir())
