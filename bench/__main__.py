"""`python -m bench run|report|compare|search|gpu|study`"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from bench.options import RunOptions
from bench.search.options import SearchOptions
from bench.study.commands import study
from bench.suite import SuiteOptions
from distill.common.errors import exit_on_user_error
from distill.common.launcher import program


def run(options: Annotated[RunOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> int:
    """Measure contestants on this machine and write one results file."""
    from bench.options import unfinished
    from bench.run import run_bench

    kept = unfinished(options.out)
    before = kept.stat().st_mtime_ns if kept.exists() else None
    try:
        run_bench(options)
    except BaseException as error:
        if kept.exists() and kept.stat().st_mtime_ns != before:
            print(f"what was measured so far is in {kept}", file=sys.stderr)
        if not isinstance(error, KeyboardInterrupt):
            raise
        print("stopped; the same command begins anew", file=sys.stderr)
        return 130
    return 0


def report(results: list[Path], out: Path, title: str = "slimxl latency report", price: float | None = None) -> int:
    """Make one self-contained page, its Markdown, its JSON and every timed call as CSV from one or more results files.

    Args:
        results: Results files, the main one first; what `bench search` (search.json), `bench study tally`, `distill bench`
            and `engines load-test` write may join.
        out: Folder to write index.html, report.md, report.json and samples.csv into; it is made where it is absent.
        title: Title of the page.
        price: What an hour of the machine costs in dollars: the page then tells what 1,000 pictures cost.
    """
    from bench.report.report import write_report

    write_report(results, out, title, price)
    return 0


def compare(before: tyro.conf.Positional[Path], after: tyro.conf.Positional[Path], tolerance: float = 0.02) -> int:
    """Say what changed beyond noise between two results files; exit code 1 on a regression.

    Args:
        before: The older results file.
        after: The newer results file.
        tolerance: Share of the median, below 1: a change up to it counts as none, however narrow the intervals.
    """
    from bench.compare import compare_files

    return compare_files(before, after, tolerance)


def search(options: Annotated[SearchOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> int:
    """Find what to leave out of a teacher for a latency: a front of students, each proposal with a recipe to train it by."""
    from bench.search.search import run_search

    run_search(options)
    return 0


def gpu(options: Annotated[SuiteOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]) -> int:
    """Everything a GPU can be measured for, job by job, as JSON and a report."""
    from bench.suite import run_suite

    return run_suite(options)


def main() -> int:
    commands: dict[str, Callable[..., int]] = {
        "run": run,
        "report": report,
        "compare": compare,
        "search": search,
        "gpu": gpu,
        "study": study,
    }
    return exit_on_user_error(lambda: tyro.extras.subcommand_cli_from_dict(commands, prog=program("bench")))


if __name__ == "__main__":
    sys.exit(main())
