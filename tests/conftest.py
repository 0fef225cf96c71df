"""Checkpoints that many tests share, made once a session with random weights: nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

for library in ("DIFFUSERS", "TRANSFORMERS"):
    os.environ.setdefault(f"{library}_VERBOSITY", "error")

from distill.checkpoints.sources import resolve  # noqa: E402
from tests.local_hub import Hub  # noqa: E402


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def mini_sdxl(workdir: Path) -> Path:
    return resolve("random:mini-sdxl", workdir)


@pytest.fixture(scope="session")
def mini_vega(workdir: Path) -> Path:
    """The quickest complete SDXL-format checkpoint: the mini family at Vega's depth."""
    return resolve("random:mini-vega", workdir)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
