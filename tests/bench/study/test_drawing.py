"""The folder that raters get: whole, resumable, and silent about whose the pictures are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bench.contestants.fake import FakeContestant
from bench.study.drawing import make_study
from bench.study.files import key_path, read_key, read_study
from bench.study.options import MakeOptions
from bench.study.prompts import choose_prompts
from distill.common.errors import UserError
from distill.models.families import SDXL_FAMILY


def test_nothing_in_the_folder_tells_which_is_which(study: Path) -> None:
    files = [path for path in study.rglob("*") if path.is_file()]
    pictures = [path for path in files if path.suffix == ".png"]
    assert len(pictures) == 8 and {len(path.name) for path in files if path.suffix == ".png"} == {20}
    assert len({path.stat().st_mtime for path in pictures}) == 1
    for path in pictures:
        image = Image.open(path)
        assert image.mode == "RGB" and not image.info and not image.getexif()
    key = read_key(key_path(study))
    assert key_path(study).parent == study.parent
    for path in files:
        text = path.read_bytes()
        for told in ("teacher", "pupil", "fake", key.secret, "markup"):
            assert told.encode() not in text, (told, path)
    assert all(item.pictures == sorted(item.pictures) for item in read_study(study).items)
    first = Counter(item.pictures[0] == key.picture(at, 0) for at, item in enumerate(read_study(study).items))
    assert sum(first.values()) == 4
    page = (study / "index.html").read_text()
    assert "</script><b>" not in page and "http:" not in page and "https:" not in page


def test_the_same_command_draws_only_what_is_missing(
    study: Path, options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_key(key_path(study))
    gone = sorted((study / "pictures").iterdir())[2]
    gone.unlink()
    with pytest.raises(UserError, match=rf"{gone.name} is missing; the same .* study make draws"):
        read_study(study)
    drawn, draw = [], FakeContestant.draw
    monkeypatch.setattr(FakeContestant, "draw", lambda *about: drawn.append(about) or draw(*about))
    assert make_study(options) == before
    assert len(drawn) == 1 and read_study(study).study == before.study


def broken(*_: object) -> None:
    raise RuntimeError("out of luck")


def test_a_model_that_cannot_draw_is_told_and_the_rest_stays(
    options: MakeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FakeContestant, "draw", broken)
        with pytest.raises(UserError, match="teacher could not draw: RuntimeError: out of luck; what is drawn stays"):
            make_study(options)
    assert key_path(options.out).is_file() and not (options.out / "index.html").exists()
    make_study(options)
    assert read_study(options.out)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": "5"}, "begun with other models, steps or guidance"),
        ({"pairs": 3}, r"begun with --pairs 4 \(not 3\); ask for the same"),
        ({"steps": "1,2,3"}, "--steps has 3 numbers for 2 models"),
        ({"models": ["one=fake:"]}, "needs two or more"),
        ({"models": ["a=fake:", "a=fake:"]}, "given twice"),
        ({"count": 5}, "holds 4 prompts"),
        ({"prompts": Path(__file__).with_name("none.txt")}, "does not exist; --prompts takes"),
        ({"prompts": Path(__file__).parent}, "is no file; --prompts takes"),
    ],
)
def test_bad_input_changes_nothing(changes: dict[str, object], told: str, study: Path, options: MakeOptions) -> None:
    before = {path: path.read_bytes() for path in study.parent.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=told):
        make_study(replace(options, **changes))
    assert {path: path.read_bytes() for path in study.parent.rglob("*") if path.is_file()} == before


def test_a_lost_key_is_told(study: Path, options: MakeOptions) -> None:
    key_path(study).unlink()
    with pytest.raises(UserError, match=r"whose key .*study\.key\.json is gone"):
        make_study(options)


def test_the_shipped_prompts_come_by_category_in_turn() -> None:
    prompts = choose_prompts(None, None, SDXL_FAMILY)
    assert len(set(prompts)) == 200
    assert {category: 2 for _, category in prompts} == dict(Counter(category for _, category in prompts[:10]))
