from __future__ import annotations

from pathlib import Path

import pytest
import tyro

from distill.common.errors import exit_on_user_error


@pytest.mark.parametrize(
    ("words", "named"), [(["--out", ""], "--out"), (["--out="], "--out"), (["--data", "x", "--out", " "], "--out")]
)
def test_an_empty_path_is_one_line(
    words: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*, out: Path, data: Path | None = None) -> None:
        raise AssertionError(out)

    monkeypatch.setattr("sys.argv", ["command", *words])
    assert exit_on_user_error(lambda: tyro.cli(command)) == 2
    assert capsys.readouterr().err == f"error: {named} is empty: is a variable unset? name a file or a folder\n"
