"""What each rater's votes say of the rater: which answers agree with each other, and who clicks without looking."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from bench.study.votes import Vote

LEAST_LOOK_MS = 500
LEAST_CHECKS = 6
LEAST_PASSED = 0.5
SAME_BUTTON, OF_VOTES = 0.95, 20
RULE = (
    "A check is a pair that comes again, passed with the same answer, or a picture beside itself, passed with no "
    "preference. "
    f"A rater is set apart who passes {LEAST_PASSED:.0%} of the checks or fewer (of {LEAST_CHECKS} or more), who gives one "
    f"answer in more than {SAME_BUTTON:.0%} of {OF_VOTES} votes or more, or who looks at half of the pairs for less than "
    f"{LEAST_LOOK_MS / 1e3:g} s."
)


@dataclass(frozen=True)
class Rater:
    """`preferences` are the votes that count: each pair when it was first seen. `repeats` and `same` are (passed, of all).
    `apart` says why the votes are not counted."""

    rater: str
    votes: list[Vote]
    preferences: list[Vote]
    missing: int
    repeats: tuple[int, int]
    same: tuple[int, int]
    median_ms: float
    apart: str | None


def make_rater(votes: list[Vote]) -> Rater:
    """From all votes of one rater, one or more, in order."""
    seen = [vote for vote in votes if vote.choice != "missing"]
    firsts: dict[frozenset[str], Vote] = {}
    again, same = [], []
    for vote in seen:
        pair = frozenset((vote.first, vote.second))
        if len(pair) == 1:
            same.append(vote.choice == "tie")
        elif pair in firsts:
            again.append(vote.chosen == firsts[pair].chosen)
        else:
            firsts[pair] = vote
    preferences = list(firsts.values())
    look_ms = median(vote.ms for vote in seen) if seen else 0.0
    return Rater(
        votes[0].rater,
        seen,
        preferences,
        len(votes) - len(seen),
        (sum(again), len(again)),
        (sum(same), len(same)),
        look_ms,
        _why_apart(preferences, again + same, look_ms),
    )


def _why_apart(preferences: list[Vote], checks: list[bool], look_ms: float) -> str | None:
    """By RULE."""
    choices = [vote.choice for vote in preferences]
    if len(checks) >= LEAST_CHECKS and sum(checks) <= LEAST_PASSED * len(checks):
        return f"passed {sum(checks)} of {len(checks)} checks"
    for choice in ("first", "second", "tie"):
        if len(choices) >= OF_VOTES and choices.count(choice) > SAME_BUTTON * len(choices):
            return f"answered {choice} in {choices.count(choice)} of {len(choices)} votes"
    if choices and look_ms < LEAST_LOOK_MS:
        return f"looked at half of the pairs for less than {look_ms / 1e3:.1f} s"
    return None
