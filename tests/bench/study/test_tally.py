"""Simulated raters: what they truly prefer comes back out, and who only clicks is found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench.study.bradley_terry import fit
from bench.study.preferences import POINTS, find_preferences
from bench.study.tally import headline, make_tally, write_tally
from bench.study.votes import Vote, read_votes
from distill.common.errors import UserError
from distill.common.files import write_json
from tests.bench.study.simulated import make_key, saved, vote_as

TRUE = [0.0, 0.8, -0.5]
KEY = make_key()
PICTURES = {name: item for name, (item, _) in KEY.pictures().items()}


def test_the_true_preference_is_recovered_and_clickers_are_set_apart() -> None:
    clickers = [vote_as(KEY, 100 + at, TRUE, kind) for at, kind in enumerate(["random", "left", "fast"] * 6)]
    honest = [vote_as(KEY, at, TRUE) for at in range(60)]
    tally = make_tally(KEY, [vote for votes in honest + clickers for vote in votes])
    apart = {rater.rater for rater in tally.raters if rater.apart}
    assert len(apart ^ {votes[0].rater for votes in clickers}) <= 2  # one clicks well by chance, one is of two minds
    for true, one in zip(TRUE[1:], tally.counted.standings[1:], strict=True):
        assert one.strength and one.strength.low < POINTS * true < one.strength.high
        assert abs(one.strength.value - POINTS * true) < 40
    assert tally.everyone
    for counted, everyone in zip(tally.counted.pairs, tally.everyone.pairs, strict=True):
        assert abs(everyone.preference.value - 0.5) < abs(counted.preference.value - 0.5)
    assert headline(tally.counted).startswith("ssd-1b is preferred to sdxl")
    assert tally.first_share and tally.first_share.low < 0.5 < tally.first_share.high
    passed, of = tally.passed("same")
    assert of > 200 and passed / of > 0.9


def test_a_side_that_is_favoured_shows_and_equal_models_have_no_winner() -> None:
    tally = make_tally(KEY, [vote for at in range(60) for vote in vote_as(KEY, at, [0.0, 0.0, 0.0], bias=0.8)])
    assert tally.first_share and tally.first_share.low > 0.5
    assert "show no preference" in headline(tally.counted)


def test_davidson_by_its_closed_form_and_one_sided_votes_stay_finite() -> None:
    wins, ties, losses = 120, 60, 40
    theta, eta = fit(np.array([[[wins, ties, losses]], [[50, 0, 0]]], float), [(0, 1)], 2)
    assert theta[0, 0] - theta[0, 1] == pytest.approx(math.log(wins / losses), abs=1e-3)
    assert eta[0] == pytest.approx(math.log(ties / math.sqrt(wins * losses)), abs=1e-3)
    assert 3 < theta[1, 0] - theta[1, 1] < 20


def test_votes_that_know_nothing_of_each_other_need_what_arithmetic_says() -> None:
    key = make_key(("a", "b"), prompts=800, pairs=1, repeats=0, same=0)
    votes = [vote_as(key, at, [0.0, 0.0])[0] for at in range(800)]
    [pair] = find_preferences(votes, key).pairs
    assert pair.needed == pytest.approx(0.25 * (1.96 / 0.03) ** 2 * (1 - pair.ties / pair.votes), rel=0.25)


def test_a_model_without_votes_is_told_and_has_no_strength(tmp_path: Path) -> None:
    key = make_key(("a", "b", "<i>c</i>"))
    votes = [one for at in range(9) for one in vote_as(key, at, TRUE) if "2" not in _models(key, one)]
    (tmp_path / "votes.jsonl").write_bytes(b"".join(map(Vote.as_line, votes)))
    write_json(tmp_path / "key.json", key.model_dump())
    tally = write_tally(tmp_path / "key.json", [tmp_path / "votes.jsonl"], tmp_path / "out")
    assert tally.counted.standings[2].preference is None and tally.counted.standings[2].strength is None
    page = (tmp_path / "out/index.html").read_text()
    assert "no votes" in page and "&lt;i&gt;c&lt;/i&gt;" in page and "<i>c" not in page
    told = json.loads((tmp_path / "out/tally.json").read_text())
    assert told["counted"]["pairs"][0]["wins"] == tally.counted.pairs[0].wins


def _models(key, vote):
    return "".join(str(key.pictures()[name][1]) for name in (vote.first, vote.second))


def test_a_vote_counts_once_and_as_it_was_changed_last(tmp_path: Path) -> None:
    votes = vote_as(KEY, 1, TRUE)
    changed = votes[3].model_copy(update={"choice": "tie", "at": 99_999})
    (tmp_path / "a.json").write_text(saved([*votes[:3], changed, *votes[4:]]))
    torn = votes[0].as_line()[:30]
    (tmp_path / "b.jsonl").write_bytes(b"".join(map(Vote.as_line, votes)) + torn)
    for files in (["a.json", "b.jsonl"], ["b.jsonl", "a.json", "a.json"]):
        read = read_votes([tmp_path / name for name in files], KEY.study, PICTURES)
        assert read == [*votes[:3], changed, *votes[4:]]


EDITS = {
    "another study": (lambda text: text.replace(KEY.study, "6" * 12), "votes of the study 6"),
    "a choice turned": (lambda text: text.replace('"first","ms"', '"second","ms"'), "was edited"),
    "cut off": (lambda text: text[:-40], "cut off"),
    "nothing": (lambda text: "", "no file of votes"),
    "another kind of file": (lambda text: '{"schema_version": "slimxl.bench.results/2"}', "no file of votes"),
    "a field more": (lambda text: text.replace('"index"', '"x":1,"index"', 1), "edited"),
    "a page": (lambda text: "<html>", "no file of votes"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_bad_file_is_told_in_a_line_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    edit, told = EDITS[name]
    write_json(tmp_path / "key.json", KEY.model_dump())
    (tmp_path / "good.json").write_text(saved(vote_as(KEY, 1, TRUE)))
    (tmp_path / "bad.json").write_text(edit(saved(vote_as(KEY, 2, TRUE))))
    files = [tmp_path / "good.json", tmp_path / "bad.json"]
    with pytest.raises(UserError, match=told) as raised:
        write_tally(tmp_path / "key.json", files, tmp_path / "out")
    assert "bad.json" in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_lines_of_pictures_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    vote = vote_as(KEY, 1, TRUE)[0].model_copy(update={"first": KEY.picture(0, 0), "second": KEY.picture(1, 1)})
    (tmp_path / "votes.jsonl").write_bytes(vote.as_line())
    with pytest.raises(UserError, match="no pair of this study"):
        read_votes([tmp_path / "votes.jsonl"], KEY.study, PICTURES)
    (tmp_path / "votes.jsonl").write_bytes(b"{}\n" + vote.as_line())
    with pytest.raises(UserError, match="line 1"):
        read_votes([tmp_path / "votes.jsonl"], KEY.study, PICTURES)
