"""`study tally`: from files of votes to a page and its JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_jsonable_python

from bench.measure.stats import Estimate
from bench.study.files import Key, read_key
from bench.study.page import write_html
from bench.study.preferences import MARGIN, Preferences, find_preferences, share, weigh
from bench.study.raters import RULE, Rater, make_rater
from bench.study.votes import Vote, read_votes
from distill.common.errors import UserError
from distill.common.files import write_json
from distill.common.ownership import require_our_files
from distill.common.progress import say

TALLY, TALLY_SCHEMA = "tally.json", "slimxl.bench.study.tally/1"
INDEPENDENT = 0.25 * (1.96 / MARGIN) ** 2
"""Votes for ±3 points where every vote is by another rater on another prompt, and the models are equal."""


@dataclass(frozen=True)
class Tally:
    """`counted` is of raters who were not set apart, `everyone` of all, None where that is the same. `first_share` is how
    often the left or upper picture was chosen where one was."""

    key: Key
    raters: list[Rater]
    counted: Preferences
    everyone: Preferences | None
    first_share: Estimate | None

    @property
    def kept(self) -> list[Rater]:
        return [rater for rater in self.raters if rater.apart is None]

    def passed(self, kind: str) -> tuple[int, int]:
        """Checks passed, and all, of the raters who count; `kind` is repeats or same."""
        pairs = [getattr(rater, kind) for rater in self.kept]
        return sum(passed for passed, _ in pairs), sum(of for _, of in pairs)


def make_tally(key: Key, votes: list[Vote]) -> Tally:
    """`votes` in the order of raters. Raises UserError where none is left to count."""
    raters = [make_rater(list(own)) for _, own in groupby(votes, key=lambda vote: vote.rater)]
    kept = [rater for rater in raters if rater.apart is None]
    counted = [vote for rater in kept for vote in rater.preferences]
    if not counted:
        why = "; ".join(sorted({rater.apart for rater in raters if rater.apart})[:3])
        raise UserError(f"no votes to count from {len(raters)} raters" + (f", who are set apart: {why}" if why else ""))
    everyone = [vote for rater in raters for vote in rater.preferences]
    return Tally(
        key,
        raters,
        find_preferences(counted, key),
        find_preferences(everyone, key) if len(kept) < len(raters) else None,
        _first_share([vote for rater in kept for vote in rater.votes if vote.choice != "tie"], key),
    )


def _first_share(decided: list[Vote], key: Key) -> Estimate | None:
    if not decided:
        return None
    places = key.pictures()
    items = np.array([places[vote.first][0] for vote in decided])
    counts = weigh(decided, items, np.array([int(vote.choice == "first") for vote in decided]), 2)
    return share(counts[:, 1], counts.sum(axis=1))


def headline(counted: Preferences) -> str:
    """What the votes say of the two strongest models."""
    ranked = sorted(counted.standings, key=lambda one: one.strength.value if one.strength else -math.inf, reverse=True)
    two = {one.model for one in ranked[:2]}
    pair = next((one for one in counted.pairs if {one.first, one.second} == two), None)
    if pair is None:
        return f"{ranked[0].model} and {ranked[1].model} were never compared."
    value, low, high = pair.preference.value, pair.preference.low, pair.preference.high
    if low is not None and low > 0.5:
        return f"{pair.first} is preferred to {pair.second}, with {value:.0%} of the votes."
    if high is not None and high < 0.5:
        return f"{pair.second} is preferred to {pair.first}, with {1 - value:.0%} of the votes."
    return f"These votes show no preference between {pair.first} and {pair.second}."


def as_json(tally: Tally) -> Any:
    """The machine-readable tally."""
    return to_jsonable_python(
        {
            "schema_version": TALLY_SCHEMA,
            "study": tally.key.study,
            "headline": headline(tally.counted),
            "models": [model.model_dump() for model in tally.key.models],
            "counted": asdict(tally.counted),
            "everyone": tally.everyone and asdict(tally.everyone),
            "first_share": tally.first_share,
            "repeats": dict(zip(("passed", "of"), tally.passed("repeats"), strict=True)),
            "same": dict(zip(("passed", "of"), tally.passed("same"), strict=True)),
            "rule": RULE,
            "raters": [
                {name: value for name, value in asdict(rater).items() if name not in ("votes", "preferences")}
                | {"votes": len(rater.votes)}
                for rater in tally.raters
            ],
        }
    )


def write_tally(key_file: Path, votes: list[Path], out: Path) -> Tally:
    """Writes index.html and tally.json into `out`, each whole or not at all.

    Raises UserError for a file that cannot be used, and then writes nothing."""
    require_our_files(out, ("index.html", TALLY), TALLY, ("schema_version", "study", "counted"))
    key = read_key(key_file)
    if not votes:
        raise UserError("no files of votes: give at least one to --votes")
    pictures = {name: item for name, (item, _) in key.pictures().items()}
    tally = make_tally(key, read_votes(votes, key.study, pictures))
    write_json(out / TALLY, as_json(tally))  # first, for it says whose the page is
    everyone = {(one.first, one.second): one for one in tally.everyone.pairs} if tally.everyone else {}
    context = {
        "tally": tally,
        "headline": headline(tally.counted),
        "categories": list(tally.counted.standings[0].categories),
        "everyone": everyone,
        "colours": {model.name: index % 8 for index, model in enumerate(key.models)},
        "rule": RULE,
        "independent": round(INDEPENDENT, -1),
        "missing": sum(rater.missing for rater in tally.raters),
    }
    write_html(out / "index.html", "tally.html.j2", context)
    say(headline(tally.counted))
    say(f"wrote {out / 'index.html'} and {TALLY}")
    return tally
