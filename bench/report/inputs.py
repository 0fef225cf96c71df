"""What a report is made from: each file by its schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bench.report.quality import TALLY_SCHEMA, TallyFile
from bench.report.training import LOOPS_SCHEMAS, LoopsFile
from bench.results import Results, parse_as, read_results
from bench.search.front import SEARCH_SCHEMA, FrontFile
from distill.common.files import read_json
from engines.serving.load_file import LOAD_SCHEMA, LoadFile, read_load


@dataclass
class Inputs:
    """Results of `bench run`, loops of `distill bench`, load tests of `engines load-test`, tallies of `bench study`,
    fronts of `bench search`."""

    results: list[Results] = field(default_factory=list)
    loops: list[LoopsFile] = field(default_factory=list)
    loads: list[LoadFile] = field(default_factory=list)
    tallies: list[TallyFile] = field(default_factory=list)
    fronts: list[FrontFile] = field(default_factory=list)


def read_inputs(paths: list[Path]) -> Inputs:
    """Raises UserError for a file of none of the schemas, or that does not keep to its own."""
    inputs = Inputs()
    for path in paths:
        value = read_json(path)
        schema = value.get("schema_version") if isinstance(value, dict) else None
        if schema == LOAD_SCHEMA:
            inputs.loads.append(read_load(path))
        elif schema in LOOPS_SCHEMAS:
            inputs.loops.append(parse_as(schema, LoopsFile, value, path))
        elif schema == TALLY_SCHEMA:
            inputs.tallies.append(parse_as(schema, TallyFile, value, path))
        elif schema == SEARCH_SCHEMA:
            inputs.fronts.append(parse_as(schema, FrontFile, value, path))
        else:
            inputs.results.append(read_results(path))
    return inputs
