"""What a training run goes on from after a stop: its state, saved and read again.

It is written by torch.distributed.checkpoint: every process writes its own part, under names free of any
wrapper, so one process, DDP and FSDP read each other's, whatever their number.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from distill.common.errors import UserError
from distill.common.files import read_json, remove_leftovers, replacing, write_json
from distill.common.progress import say
from distill.training.accelerator import trained_parameters

STATE_FORMAT = 2
"""Stands in run.json; another number is a state that this version does not read, or would go on from otherwise (2: samples
come in another order, and what is drawn of each by its own seed)."""
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)
"""A state that lacks a trained weight is refused all the same, by torch.distributed.checkpoint."""


@dataclass
class TrainingState:
    """Everything in a stage that has a history, beside `Progress`: weights, moments, their average, fp16's loss scale, and
    the average that an objective takes its targets from."""

    student: UNet2DConditionModel
    optimizer: torch.optim.Optimizer
    ema: EMAModel | None = None
    scaler: Any = None
    target: UNet2DConditionModel | None = None

    def as_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.student, self.optimizer, options=TRAINED_ONLY)
        state: dict[str, Any] = {"student": model, "optimizer": optimizer}
        if self.ema:
            state["ema"] = {str(i): tensor for i, tensor in enumerate(self.ema.shadow_params)}
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        if self.target is not None:
            state["target"] = get_model_state_dict(self.target)
        return state

    def save(self, folder: Path) -> None:
        dcp.save(self.as_dict(), checkpoint_id=folder)

    def load(self, folder: Path, step: int) -> None:
        state = self.as_dict()
        dcp.load(state, checkpoint_id=folder)  # writes into the tensors of `state`: the averages have their values now
        set_state_dict(
            self.student,
            self.optimizer,
            model_state_dict=state["student"],
            optim_state_dict=state["optimizer"],
            options=TRAINED_ONLY,
        )
        if self.ema:
            self.ema.optimization_step = step
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])

    @contextmanager
    def averaged(self) -> Iterator[UNet2DConditionModel]:
        """The student with the averaged weights in place of its own, where an average is kept."""
        if not self.ema:
            yield self.student
            return
        self._exchange(self.ema)
        try:
            yield self.student
        finally:
            self._exchange(self.ema)

    @torch.no_grad()
    def _exchange(self, ema: EMAModel) -> None:
        """Swaps student and average, one tensor at a time: a GPU may have no room for a third copy."""
        for parameter, average in zip(trained_parameters(self.student), ema.shadow_params, strict=True):
            own = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(own)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage has come: its steps, and the losses that its guard judges the next ones by."""

    step: int = 0
    good_losses: tuple[float, ...] = ()


def save_state(
    accelerator: Accelerator, state: TrainingState, folder: Path, number: int, progress: Progress, *, keep: int
) -> None:
    """Writes `folder/STAGE-STEP` whole or not at all, then removes all but the newest `keep`.

    Raises UserError where the disk does not take it, and torch.OutOfMemoryError; the checkpoints before stay.
    """
    final = folder / f"{number + 1:02d}-{progress.step:07d}"
    temporary = folder / f".{final.name}.state.partial"  # one name per step: NFS may still show the last one's
    if accelerator.is_main_process:
        remove_leftovers(folder)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's note that only one process is running
            state.save(temporary)
        if accelerator.is_main_process:
            write_json(temporary / "progress.json", asdict(progress))
            temporary.replace(final)
    except (OSError, dcp.CheckpointException) as error:
        raise UserError(
            f"the checkpoint of step {progress.step} cannot be written ({_reason(error)}); the one before is kept: see that "
            f"the disk of {folder} has space and may be written, and run the same command again"
        ) from None
    if accelerator.is_main_process:
        for old in _states(folder)[:-keep]:
            old.replace(folder / f".{old.name}.state.old")  # so that a kill leaves no half of it under its name
        remove_leftovers(folder)
    accelerator.wait_for_everyone()


def _reason(error: BaseException) -> str:
    """Why a save or a load failed, in any process, in a few words. Ctrl-C and a full GPU are not about the checkpoint, and
    are raised as they are."""
    causes = [cause for cause, _stack in getattr(error, "failures", {}).values()] or [error]
    for cause in causes:
        if isinstance(cause, KeyboardInterrupt | torch.OutOfMemoryError):
            raise cause from None
    words = re.sub(r"^\[enforce fail [^]]*\][ .]*", "", str(causes[0]).strip()) or type(causes[0]).__name__
    return words.splitlines()[0].split(". ")[0]


def _states(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("[0-9]*/progress.json"))


def resume(accelerator: Accelerator, state: TrainingState, folder: Path, number: int, log: Path) -> Progress:
    """Loads the newest checkpoint of stage `number`, cuts the log back to its step, and returns the progress so far.

    All processes load the checkpoint that the first one finds, since a shared disk may show it to the others later. Raises
    UserError where one of them does not see it, or where it is damaged.
    """
    progress = Progress()
    names: list[str | None] = [path.name for path in _states(folder) if path.name.startswith(f"{number + 1:02d}-")]
    [newest] = broadcast_object_list(names[-1:] or [None])
    if newest:
        if not (folder / newest).is_dir():
            raise UserError(
                f"{folder / newest} is there for the first process and not for this one: --out must lie on a disk that all "
                "processes see; if it does, run the same command again"
            )
        progress = Progress(**read_json(folder / newest / "progress.json"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state.load(folder / newest, progress.step)
        except dcp.CheckpointException as error:
            raise UserError(
                f"the checkpoint {folder / newest} cannot be read ({_reason(error)}); run the same command again, and if it "
                "says the same, remove that folder: it goes on from the one before, or begins the stage anew"
            ) from None
        if accelerator.is_main_process:
            say(f"going on from stage {number + 1}, step {progress.step}")
    if accelerator.is_main_process and log.exists():
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        reached = (number + 1, progress.step)
        kept = [line for line in lines if (int(line["stage"].split("-")[0]), line["step"]) <= reached]
        with replacing(log) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    accelerator.wait_for_everyone()
    return progress


def gather_student(state: TrainingState) -> UNet2DConditionModel | None:
    """The student as one whole net on the CPU, its average where one is kept. Every process must call this; only the
    first gets the net."""
    with state.averaged() as student:
        weights: dict[str, Any] = get_model_state_dict(
            student, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if not weights:
            return None
        with torch.device("meta"):
            whole = UNet2DConditionModel.from_config(student.config)
            for name, adapter in getattr(student, "peft_config", {}).items():
                whole.add_adapter(adapter, name)
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        for name in trained & weights.keys():
            weights[name] = weights[name].clone()  # on a CPU they are the student's own memory
        whole.load_state_dict(weights, assign=True)
    return whole.eval()
