from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from distill.common.errors import exit_on_user_error
from distill.common.files import replacing, write_json


def _raising(error: Exception) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


def test_what_the_system_refuses_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert exit_on_user_error(lambda: write_json(tmp_path / "file" / "x.json", {})) == 2

    def fill() -> None:
        with replacing(tmp_path / "big"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_by_numpy() -> None:  # as a graph's weights are written
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            with replacing(tmp_path / "big") as temporary:
                np.zeros(10_000).tofile(temporary)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert exit_on_user_error(fill) == 2
    assert exit_on_user_error(fill_by_numpy) == 2
    assert exit_on_user_error(_raising(SafetensorError("I/O error: No space left on device (os error 28)"))) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: ") and str(tmp_path / "file") in said[0]
    assert said[1] == f"error: the disk of {tmp_path / 'big'} is full; free some space and run the same command again"
    assert said[2:] == ["error: the disk is full; free some space and run the same command again"] * 2
    for mistake in (KeyError("x"), OSError("no number"), SafetensorError("invalid header")):
        with pytest.raises(type(mistake)):
            exit_on_user_error(_raising(mistake))
