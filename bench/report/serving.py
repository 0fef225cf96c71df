"""Load tests of a server, from what `engines load-test` writes."""

from __future__ import annotations

from bench.report.elements.formatting import by_size, milliseconds, seconds, size
from bench.report.elements.tables import Cell, Column, Table, make_table, measured
from engines.serving.load_file import LoadFile, LoadLevel


def load_table(load: LoadFile) -> Table:
    """One line for each number of clients at once."""

    def failed(level: LoadLevel) -> Cell:
        if not level.failures:
            return Cell("0")
        return Cell(str(level.failures), "state failed", hint=level.first_error or "")

    def memory(level: LoadLevel) -> Cell | None:
        if level.server_rss is None:
            return None
        return Cell(size(level.server_rss.first_bytes), small=(f"at the end {size(level.server_rss.last_bytes)}",))

    def latency(name: str) -> Column[LoadLevel]:
        return Column(name, lambda level: measured(milliseconds(level.latency_ms.get(name))))

    return make_table(
        load.levels,
        Column("clients", lambda level: str(level.concurrency)),
        Column("requests", lambda level: Cell(str(level.requests), small=(f"in {seconds(level.seconds)}",))),
        Column("failed", failed),
        Column("images/s", lambda level: measured(f"{level.images_per_s:.2f}")),
        *map(latency, load.levels[0].latency_ms),
        Column("drawn together", lambda level: f"{level.mean_batch:.1f}" if level.mean_batch else None),
        Column("server memory", memory),
    )


def load_conditions(load: LoadFile) -> str:
    """What every request asked for, and of how many copies of the model."""
    ask, server = load.workload, load.server
    parts = [
        by_size(f"{ask.width}x{ask.height}"),
        f"{ask.steps} steps",
        f"guidance {ask.guidance:g}",
        f"{ask.images} image{'s' if ask.images != 1 else ''} a request",
        *([f"at most {ask.rate_per_s:g} requests/s"] if ask.rate_per_s else []),
    ]
    return f"{', '.join(parts)}; {', '.join(server.instances)}, up to {server.max_batch_size} requests together"
