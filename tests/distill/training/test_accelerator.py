"""Several nodes, two processes here, that are not alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os
from accelerate import PartialState
from distill.common.errors import exit_on_user_error
from distill.training.accelerator import require_alike
PartialState(cpu=True)
def start():
    require_alike({"torch": "2.13.0", "the cache out/cache": "same"})
    require_alike({"the cache out/cache": "abc" if os.environ["RANK"] == "0" else "xyz"})
raise SystemExit(exit_on_user_error(start))
"""


def test_a_node_with_another_cache_is_refused_by_all(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *launcher, script], env=environment, capture_output=True, text=True, check=False
    )
    told = "process 1 has the cache out/cache xyz, the first one has abc: all nodes must have the same"
    assert done.returncode != 0 and done.stderr.count(told) >= 1 and "Error: process" not in done.stderr
