"""Every option of every command says in --help what it takes; a table of defaults alone tells a new user nothing."""

from __future__ import annotations

import importlib
import re
from itertools import pairwise

import pytest


@pytest.mark.parametrize("room", ["distill", "export", "engines", "bench"])
def test_every_option_has_help(room: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"{room}.__main__").main
    monkeypatch.setenv("COLUMNS", "1000")  # so that no help is broken into lines

    def shown(*command: str) -> str:
        monkeypatch.setattr("sys.argv", [room, *command, "--help"])
        with pytest.raises(SystemExit, match="0"):
            main()
        return capsys.readouterr().out

    def look(*command: str) -> None:
        told = shown(*command)
        if commands := re.search(r"^usage: .*\[-h\] \{(.*?)\}$", told, re.MULTILINE):
            for one in commands[1].split(","):
                look(*command, one)
            return
        lines = [line.strip("│ ") for line in told.splitlines()]
        silent = [before for before, line in pairwise(lines) if line.startswith(("(default", "(required"))]
        silent += [line for line in lines if re.search(r"\S {2,}\((default|required)", line)]
        assert command and not silent, (command, silent)

    look()
