"""What an option may be, by its type, in every place where a type can stand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import tyro

from distill.common.errors import UserError, parse_counts, require_above, require_between, require_least
from distill.common.options import OPTIONS, parse_names


@dataclass(kw_only=True)
class Everything:
    number: int = 1
    share: float = 1
    folder: Path = Path("x")
    perhaps: float | None = None
    band: tuple[float, float] | None = None
    many: tuple[float, ...] = ()
    files: tuple[Path, ...] = ()


BEYOND = ("nan", "inf", "-Infinity", "1e400", "1e300")


def read(*words: str) -> Everything:
    with OPTIONS:
        return tyro.cli(Everything, args=words)


def test_what_is_sound_is_read() -> None:
    words = ["--number", "-7", "--share", "1e-3", "--folder", "a/b", "--perhaps", "2", "--band", "1", "2.5"]
    files = (Path("a"), Path("b"))
    told = read(*words, "--many", "1", "2", "--files", "a", "b")
    whole = {"number": -7, "share": 1e-3, "folder": Path("a/b"), "files": files}
    assert told == Everything(**whole, perhaps=2.0, band=(1.0, 2.5), many=(1.0, 2.0))  # type: ignore[arg-type]
    assert read() == Everything() and read("--perhaps", "None").perhaps is None


@pytest.mark.parametrize(
    "words",
    [
        ("--number", "²"),
        ("--number", "9" * 5000),
        ("--number", "9223372036854775808"),
        ("--number", "1e3"),
        *((option, text) for option in ("--share", "--perhaps", "--many") for text in BEYOND),
        ("--band", "nan", "1"),
        *((option, text) for option in ("--folder", "--files") for text in ("", " ")),
    ],
)
def test_what_is_not_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        read(*words)


def test_numbers_between_commas() -> None:
    assert parse_counts("--steps", "8, 4,1") == [8, 4, 1]
    for text in ("", ",", "0", "-1", "²", "1.5", "nan", "1025", "9" * 5000, "1;2"):
        with pytest.raises(UserError, match="is not a list of whole numbers from 1 to 1024"):
            parse_counts("--steps", text)


def test_names_stand_between_commas_and_count_once() -> None:
    assert parse_names("unet, vae_decoder,,unet ") == ["unet", "vae_decoder"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_bounds_take_finite_numbers_alone(number: float) -> None:
    for bound in (
        lambda n: require_least(0, x=n),
        lambda n: require_above(0, x=n),
        lambda n: require_between(0, 1, x=n),
    ):
        with pytest.raises(UserError, match=r"--x is .*finite"):
            bound(number)
