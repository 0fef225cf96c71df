"""What changed between two runs beyond noise; a regression is exit code 1.

Times of two runs differ by what the machine did meanwhile, so contestants are compared by their ratio to the baseline of
the same rounds: what shifts all of them is the machine's. Of several launches the ratios' spread from launch to launch
says what noise is (Welch's interval); of a single one the rounds' interval must do, and only where nothing speaks
against the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, variance

from bench.launches import join
from bench.measure.faults import are_doubts
from bench.measure.stats import Estimate, by_launch, median_interval, round_ratios, t_975
from bench.report.elements.formatting import milliseconds
from bench.results import CellRecord, Results, Row, read_results
from distill.common.errors import UserError

UNKNOWN = 3  # exit code where nothing got worse for certain, and something cannot be told
TO_BE_FOUND = 0.1
"""A change that may not hide: where the interval leaves room for it, nothing is called the same."""


@dataclass(frozen=True)
class Change:
    """`ratio` is after over before, of the time over the baseline's where `relative`; `verdict` is slower, faster, same,
    machine (moved as all did), unknown, gone, new, broken, or mended; `why` it is unknown."""

    workload: str
    contestant: str
    before_ms: float | None
    after_ms: float | None
    ratio: Estimate | None
    verdict: str
    relative: bool = False
    why: str = ""

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("slower", "gone", "broken")


def change_of(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Estimate:
    """How many times as long `after` takes, from values of each round, launch by launch: with several launches on both
    sides the ratio of the geometric means of their medians and Welch's 95 % interval (Welch 1947) of the logarithm; else
    from one end of the medians' intervals to the other, none where there are fewer than six rounds."""
    if len(before) > 1 and len(after) > 1:
        logs = [[math.log(median(launch)) for launch in side] for side in (before, after)]
        difference = fmean(logs[1]) - fmean(logs[0])
        parts = [variance(side) / len(side) for side in logs]
        if not sum(parts):
            return Estimate(value=math.exp(difference), low=math.exp(difference), high=math.exp(difference))
        degrees = sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, logs, strict=True))
        half = t_975(degrees) * math.sqrt(sum(parts))
        return Estimate(value=math.exp(difference), low=math.exp(difference - half), high=math.exp(difference + half))
    old, new = (median_interval([value for launch in side for value in launch]) for side in (before, after))
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return Estimate(value=new.value / old.value)
    return Estimate(value=new.value / old.value, low=new.low / old.high, high=new.high / old.low)


def verdict_of(change: Estimate, tolerance: float) -> str:
    """slower or faster, where the whole interval lies beyond `tolerance`; same, where it lies within TO_BE_FOUND; else, and
    without an interval, unknown."""
    if change.low is None or change.high is None:
        return "unknown"
    if change.low > 1 + tolerance:
        return "slower"
    if change.high < 1 / (1 + tolerance):
        return "faster"
    most = 1 + max(tolerance, TO_BE_FOUND)
    return "same" if 1 / most < change.low and change.high < most else "unknown"


@dataclass(frozen=True)
class _Pair:
    """One contestant's rows of both runs, and the baseline's where it can be held against that."""

    name: str
    rows: tuple[Row, Row]
    bases: tuple[Row, Row] | None

    @property
    def several_launches(self) -> bool:
        return all(row.launches > 1 for row in self.rows)

    @property
    def doubts(self) -> list[str]:
        """What speaks against any of the rows, kind by kind."""
        found = [fault for row in (*self.rows, *(self.bases or ())) for fault in row.diagnosis if are_doubts([fault])]
        return list(dict.fromkeys(fault.partition(":")[0] for fault in found))

    @property
    def absolute(self) -> Estimate:
        sides = [[[one.total_ms for one in launch] for launch in by_launch(row.samples).values()] for row in self.rows]
        return change_of(*sides)

    def judged(self, tolerance: float) -> tuple[Estimate, str, str]:
        """(ratio, verdict, why it is unknown)"""
        change = self.absolute
        if self.bases is not None:
            sides = [round_ratios(row.samples, base.samples) for row, base in zip(self.rows, self.bases, strict=True)]
            change = change_of(*sides)
        verdict = verdict_of(change, tolerance)
        trusted = self.several_launches and self.bases is not None  # their spread holds what the machine did
        if self.doubts and not trusted and abs(change.value - 1) > tolerance:
            return change, "unknown", ", ".join(self.doubts)
        why = "fewer than six runs" if change.low is None else f"the interval leaves room for {TO_BE_FOUND:.0%}"
        return change, verdict, why if verdict == "unknown" else ""


def _compare_cell(before: CellRecord, after: CellRecord, baseline: str, tolerance: float, paired: bool) -> list[Change]:
    """One Change for each contestant that both cells have."""
    names = [row.contestant for row in before.rows if after.row(row.contestant)]
    pairs = {name: _Pair(name, (_row(before, name), _row(after, name)), None) for name in names}
    base = pairs.get(baseline)
    usable = paired and base is not None and not any(row.refused for row in base.rows)
    changes: dict[str, Change] = {}
    for name, pair in pairs.items():
        old, new = pair.rows
        times = old.total_ms.value, new.total_ms.value
        if old.refused != new.refused:
            changes[name] = Change(before.name, name, *times, None, "broken" if new.refused else "mended")
            continue
        relative = usable and name != baseline
        if relative and base is not None:
            pair = _Pair(name, pair.rows, base.rows)
            relative = all(
                round_ratios(row.samples, one.samples) for row, one in zip(pair.rows, base.rows, strict=True)
            )
        one = pair if relative else pairs[name]
        ratio, verdict, why = one.judged(tolerance)
        changes[name] = Change(before.name, name, *times, ratio, verdict, relative, why)
    others = [change.verdict for name, change in changes.items() if name != baseline]
    ours = changes.get(baseline)
    moved = usable and ours is not None and ours.verdict not in ("same", "broken", "mended")
    if moved and others and all(verdict == "same" for verdict in others):
        changes[baseline] = replace(changes[baseline], verdict="machine", why="")
    return list(changes.values())


def _row(cell: CellRecord, name: str) -> Row:
    row = cell.row(name)
    assert row is not None
    return row


def compare_results(before: Results, after: Results, tolerance: float = 0.02) -> list[Change]:
    """One Change per workload and contestant of either; one that raised, be it after some rounds, is broken."""
    baseline = before.baseline if before.baseline == after.baseline else ""
    paired = before.in_turns is None and after.in_turns is None
    changes = []
    for name in dict.fromkeys(cell.name for one in (before, after) for cell in one.cells):
        old, new = (next((cell for cell in one.cells if cell.name == name), None) for one in (before, after))
        both = (
            {one.contestant: one for one in _compare_cell(old, new, baseline, tolerance, paired)} if old and new else {}
        )
        rows = [{row.contestant: row.total_ms.value for row in cell.rows} if cell else {} for cell in (old, new)]
        failed = set(new.failures if new else ()) - set(old.failures if old else ())
        for contestant in dict.fromkeys([*rows[0], *rows[1]]):
            times = rows[0].get(contestant), rows[1].get(contestant)
            found = both.get(contestant) or Change(
                name, contestant, *times, None, "new" if times[0] is None else "gone"
            )
            if times[0] is not None and contestant in failed:
                found = Change(name, contestant, *times, found.ratio, "broken")
            changes.append(found)
    for record in after.contestants:
        earlier = next((other for other in before.contestants if other.name == record.name), None)
        if earlier is not None and earlier.quality.get("passed") and not record.quality.get("passed"):
            verdict = "broken" if record.quality.get("passed") is False else "gone"
            changes.append(Change("quality guard", record.name, None, None, None, verdict))
    return changes


def read_side(path: Path) -> Results:
    """A results file, or a folder of those of several launches of one command. Raises UserError."""
    if not path.is_dir():
        return read_results(path)
    files = sorted(file for file in path.glob("*.json") if not file.stem.endswith(".unfinished"))
    if not files:
        raise UserError(f"{path} holds no results file (*.json); give a file, or a folder of those of one command")
    return join([read_results(file) for file in files])


def compare_files(before: Path, after: Path, tolerance: float) -> int:
    """Prints every change; 1 where one is a regression, UNKNOWN where none is for certain. Raises UserError for a tolerance
    outside of [0, 1), and where the files do not compare."""
    if not 0 <= tolerance < 1:
        raise UserError(f"--tolerance {tolerance:g} is a share: at least 0 and below 1, e.g. 0.02 for 2 %")
    old, new = read_side(before), read_side(after)
    changes = compare_results(old, new, tolerance)
    if all(change.verdict in ("new", "gone") for change in changes):
        raise UserError(f"{before} and {after} share no workload and contestant; compare two runs of the same command")
    if old.host != new.host:
        print("note: the two come from different machines, so a difference need not be the software's")
    if old.baseline != new.baseline:
        print(
            f"note: other baselines ({old.baseline}, then {new.baseline}), so times are compared and not their ratios"
        )
    for record in new.contestants:
        earlier = next((other for other in old.contestants if other.name == record.name), record)
        for what in ("spec", "precision", "runtime", "vae_dtype", "weights_sha256"):
            if getattr(earlier, what) != getattr(record, what):
                print(f"note: {record.name} has another {what}: {getattr(earlier, what)}, then {getattr(record, what)}")
    width = max(len(change.workload) for change in changes)
    for change in changes:
        print(f"{change.workload:<{width}}  {change.contestant:<12} {_told(change)}")
    regressions = sum(change.is_regression for change in changes)
    unknown = sum(change.verdict == "unknown" for change in changes)
    if regressions:
        print(f"{regressions} regression(s) in {len(changes)} comparisons")
    elif not unknown:
        print("no regression beyond noise")
    if unknown:
        print(f"{unknown} of {len(changes)} cannot be told: measure both with --launches 5, and beside a baseline")
    return 1 if regressions else UNKNOWN if unknown else 0


def _told(change: Change) -> str:
    times = f"{milliseconds(change.before_ms)} -> {milliseconds(change.after_ms)}"
    ratio = ""
    if change.ratio is not None:
        ratio = f"{change.ratio.value - 1:+.1%}"
        if change.ratio.low is not None and change.ratio.high is not None:
            ratio += f" ({change.ratio.low - 1:+.1%} to {change.ratio.high - 1:+.1%})"
        ratio += " against the baseline" if change.relative else ""
    why = f": {change.why}" if change.why else ""
    return f"{times:>24}  {ratio:<44}  {change.verdict}{why}"
