import json
from pathlib import Path

import pytest

from bench.report.inputs import read_inputs
from distill.common.errors import UserError


@pytest.mark.parametrize("schema", ["slimxl.distill.bench/1", "slimxl.distill.bench/2", "slimxl.load/1"])
def test_a_file_of_only_its_schema_is_one_line(tmp_path, schema):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"schema_version": schema}))
    with pytest.raises(UserError, match=f"does not keep to {schema}: .*: field required"):
        read_inputs([path])


def test_each_file_is_told_by_its_schema(results_path):
    loops = list((Path(__file__).parents[3] / "distill" / "results").glob("*_cpu*.json"))
    inputs = read_inputs([*loops, results_path])
    assert len(inputs.loops) == len(loops) > 0 and len(inputs.results) == 1 and not inputs.loads
