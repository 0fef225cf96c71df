"""One run as several processes: what differs from launch to launch is seen, and intervals can tell it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bench.options import RunOptions, unfinished
from bench.quality.fidelity import FidelityOptions
from bench.results import CellRecord, Results, Row, read_results, write_results
from distill.common.errors import UserError
from distill.common.progress import say

CHILD = "import pickle, sys; from bench.run import run_bench; from distill.common.errors import exit_on_user_error; "
CHILD += "options = pickle.load(sys.stdin.buffer); sys.exit(exit_on_user_error(lambda: run_bench(options) and 0))"


def run_launches(options: RunOptions) -> Results:
    """`options.launches` processes, each with its share of time and rounds; kernels, energy, pictures and guard are of the
    first. Raises UserError where one fails; what is measured by then is in `unfinished(options.out)`."""
    files = [options.out.parent / f"{options.out.stem}.launch-{number}.json" for number in range(options.launches)]
    try:
        for number, file in enumerate(files):
            say(f"launch {number + 1} of {options.launches}")
            one = _share(options, file, first=number == 0)
            if subprocess.run([sys.executable, "-c", CHILD], input=pickle.dumps(one), check=False).returncode:
                raise UserError(f"launch {number + 1} of {options.launches} failed: what it said stands above")
    finally:
        results = _keep(files, options)
    assert results is not None, "launches that all ended have measured"
    unfinished(options.out).replace(options.out)
    say(f"wrote {options.out}")
    return results


def _keep(files: list[Path], options: RunOptions) -> Results | None:
    """The launches that ended, and what the one that did not has left, as one file; theirs are removed. None where nothing
    was measured."""
    left = [path for file in files for path in (file, unfinished(file)) if path.exists()]
    parts = []
    for path in left:
        with suppress(UserError):  # stopped before its first call
            parts.append(read_results(path))
    results = None
    if parts:
        results = join(parts, options.launches)
        write_results(unfinished(options.out), results)
    for path in left:
        path.unlink()
    return results


def _share(options: RunOptions, out: Path, first: bool) -> RunOptions:
    one = replace(
        options,
        launches=1,
        out=out,
        seconds=options.seconds / options.launches,
        min_rounds=-(-options.min_rounds // options.launches),
        max_rounds=-(-options.max_rounds // options.launches),
    )
    if first:
        return one
    return replace(
        one,
        kernels=False,
        reference=False,
        pictures=0,
        energy_seconds=0.0,
        sustained_seconds=0.0,
        fidelity=FidelityOptions(),
    )


def join(files: Sequence[Results], launches: int | None = None) -> Results:
    """Results of several launches as those of one run: the first's, with the samples of all. `launches` is how many were
    asked for. Raises UserError where they are not of the same baseline."""
    whole, *others = [one.model_copy(deep=True) for one in files]
    if strange := next((one for one in others if one.baseline != whole.baseline), None):
        raise UserError(
            f"results of several launches belong to one command: their baselines are {whole.baseline} and {strange.baseline}"
        )
    counted = _count_launches(whole, 0)
    for one in others:
        counted = _count_launches(one, counted)
        known = {record.name for record in whole.contestants}
        whole.contestants += [record for record in one.contestants if record.name not in known]
        for cell in one.cells:
            same = next((other for other in whole.cells if other.name == cell.name), None)
            if same is None:
                whole.cells.append(cell)
            else:
                _join_cell(same, cell)
        whole.notes += [note for note in one.notes if note not in whole.notes]
        whole.seconds += one.seconds
        whole.gpu["after"] = one.gpu["after"]
        whole.in_turns = whole.in_turns or one.in_turns
    if launches is not None and counted < launches:
        whole.notes.append(f"{counted} of {launches} launches")
    return Results.model_validate(dict(whole))


def _count_launches(results: Results, begin: int) -> int:
    """Numbers the launches of one file from `begin` on; returns the first number that is free."""
    samples = [sample for cell in results.cells for row in cell.rows for sample in row.samples]
    for sample in samples:
        sample.launch += begin
    return 1 + max((sample.launch for sample in samples), default=begin - 1)


def _join_cell(whole: CellRecord, more: CellRecord) -> None:
    for row in more.rows:
        same = whole.row(row.contestant)
        if same is None:
            whole.rows.append(row)
        else:
            _join_row(same, row)
    whole.failures |= more.failures
    for name, values in more.device.items():
        ours = whole.device.get(name)
        if values and ours:  # the median of a launch's readings, and of the next, lies between them
            whole.device[name] = [min(ours[0], values[0]), (ours[1] + values[1]) / 2, max(ours[2], values[2])]


def _join_row(whole: Row, more: Row) -> None:
    whole.samples += more.samples
    whole.first_ms += more.first_ms
    whole.unsettled = max((one for one in (whole.unsettled, more.unsettled) if one is not None), default=None)
    whole.observed += [fault for fault in more.observed if fault not in whole.observed]
