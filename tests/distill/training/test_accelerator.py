"""Several nodes, two processes here, that are not alike."""

from __future__ import annotations

import os

import pytest
from accelerate import PartialState

from distill.common.errors import UserError
from distill.training.accelerator import require_alike
from tests.processes import exit_codes, start_ranks


def compare_caches() -> None:
    PartialState(cpu=True)
    require_alike({"torch": "2.13.0", "the cache out/cache": "same"})
    told = "process 1 has the cache out/cache xyz, the first one has abc: all nodes must have the same"
    with pytest.raises(UserError, match=told):
        require_alike({"the cache out/cache": "abc" if os.environ["RANK"] == "0" else "xyz"})


def test_a_node_with_another_cache_is_refused_by_all() -> None:
    assert exit_codes(start_ranks(compare_caches)) == [0, 0]
