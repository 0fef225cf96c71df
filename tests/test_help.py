"""Every option of every command says in --help what it takes, and a word that no command knows is told: a table of defaults
alone, or silence, tells a new user nothing."""

from __future__ import annotations

import importlib
import re
from itertools import pairwise

import pytest

from distill.common.launcher import ROOMS


@pytest.mark.parametrize("room", ROOMS)
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


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("word", ["unknown-command", "--unknown"])
def test_a_word_that_no_command_knows_is_told_and_ends_in_2(
    room: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [room, word])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"{room}.__main__").main()
    told = capsys.readouterr()
    assert ended.value.code == 2 and word.strip("-") in told.out + told.err
