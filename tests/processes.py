"""Processes that tests start in order to kill them, or to be several: each is forked from a server that has imported torch
and the trainer once, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["distill.training.trainer", "distill.data.make_cache", "distill.checkpoints.assemble"])


def start(work: Callable[..., Any], *arguments: object, **environment: str) -> BaseProcess:
    """`work` is a function of a module; its exit code is 0 unless it raises."""
    process = _SERVER.Process(target=_run, args=(environment, work, arguments))
    process.start()
    return process


def start_ranks(work: Callable[..., Any], *arguments: object) -> list[BaseProcess]:
    """Two processes of one group, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [start(work, *arguments, RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]


def _run(environment: dict[str, str], work: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    work(*arguments)


def exit_codes(processes: Iterable[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def wait_for(mark: str, folder: Path, processes: Iterable[BaseProcess]) -> None:
    """Until the folder has what the pattern `mark` stands for, or a process has ended."""
    while not any(folder.glob(mark)) and all(process.is_alive() for process in processes):
        time.sleep(0.005)


def kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    assert set(exit_codes(processes)) <= {-signal.SIGKILL, 0}
