"""What changed between two results files beyond noise; a regression is exit code 1."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.report.elements.formatting import milliseconds
from bench.results import Results, Row, read_results
from distill.common.errors import UserError


@dataclass(frozen=True)
class Change:
    """`ratio` is after over before; `verdict` is slower, faster, same, unknown, gone, new, broken, or mended."""

    workload: str
    contestant: str
    before_ms: float | None
    after_ms: float | None
    ratio: float | None
    verdict: str

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("slower", "gone", "broken")


def verdict_on(before: Row, after: Row, tolerance: float) -> str:
    """`broken` or `mended` where one was refused and the other not; else `slower` or `faster` only where the intervals do
    not touch and the medians differ by more than `tolerance`; `unknown` where they differ so, and one has too few runs
    for an interval."""
    if before.refused != after.refused:
        return "broken" if after.refused else "mended"
    ratio = after.total_ms.value / before.total_ms.value
    if abs(ratio - 1) <= tolerance:
        return "same"
    if before.total_ms.low is None or after.total_ms.low is None:
        return "unknown"
    if before.total_ms.overlaps(after.total_ms):
        return "same"
    return "slower" if ratio > 1 else "faster"


def compare_results(before: Results, after: Results, tolerance: float = 0.02) -> list[Change]:
    """One Change per workload and contestant of either file; one that raised, be it after some rounds, is broken."""
    old, new = (
        {(cell.name, row.contestant): row for cell in one.cells for row in cell.rows} for one in (before, after)
    )
    failed = [{(cell.name, name) for cell in one.cells for name in cell.failures} for one in (before, after)]
    changes = []
    for key in dict.fromkeys([*old, *new]):
        old_row, new_row = old.get(key), new.get(key)
        if old_row is None or new_row is None:
            verdict, ratio = ("new", None) if old_row is None else ("gone", None)
        else:
            verdict, ratio = verdict_on(old_row, new_row, tolerance), new_row.total_ms.value / old_row.total_ms.value
        if old_row is not None and key in failed[1] - failed[0]:
            verdict = "broken"
        before_ms, after_ms = (row.total_ms.value if row else None for row in (old_row, new_row))
        changes.append(Change(*key, before_ms, after_ms, ratio, verdict))
    for record in after.contestants:
        earlier = next((other for other in before.contestants if other.name == record.name), None)
        if earlier is not None and earlier.quality.get("passed") and not record.quality.get("passed"):
            verdict = "broken" if record.quality.get("passed") is False else "gone"
            changes.append(Change("quality guard", record.name, None, None, None, verdict))
    return changes


def compare_files(before: Path, after: Path, tolerance: float) -> int:
    """Prints every change; 1 where one is a regression, or may be one for all that is known. Raises UserError for a
    tolerance outside of [0, 1), and where the files do not compare."""
    if not 0 <= tolerance < 1:
        raise UserError(f"--tolerance {tolerance:g} is a share: at least 0 and below 1, e.g. 0.02 for 2 %")
    old, new = read_results(before), read_results(after)
    changes = compare_results(old, new, tolerance)
    if all(change.verdict in ("new", "gone") for change in changes):
        raise UserError(f"{before} and {after} share no workload and contestant; compare two runs of the same command")
    if old.environment["cpu"]["model"] != new.environment["cpu"]["model"] or (
        old.gpu["identity"]["name"] != new.gpu["identity"]["name"]
    ):
        print("note: the two files come from different machines, so a difference need not be the software's")
    for record in new.contestants:
        earlier = next((other for other in old.contestants if other.name == record.name), record)
        for what in ("spec", "precision", "runtime"):
            if getattr(earlier, what) != getattr(record, what):
                print(f"note: {record.name} has another {what}: {getattr(earlier, what)}, then {getattr(record, what)}")
    width = max(len(change.workload) for change in changes)
    for change in changes:
        ratio = f"{change.ratio - 1:+.1%}" if change.ratio is not None else ""
        times = f"{milliseconds(change.before_ms)} -> {milliseconds(change.after_ms)}"
        print(f"{change.workload:<{width}}  {change.contestant:<12} {times:>24} {ratio:>8}  {change.verdict}")
    regressions = sum(change.is_regression for change in changes)
    unknown = sum(change.verdict == "unknown" for change in changes)
    if unknown:
        print(
            f"{unknown} of {len(changes)} differ by fewer than six runs, which say nothing: measure with --min-rounds 6"
        )
    elif not regressions:
        print("no regression beyond noise")
    if regressions:
        print(f"{regressions} regression(s) in {len(changes)} comparisons")
    return 1 if regressions or unknown else 0
