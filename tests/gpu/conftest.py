"""Tests of what only a GPU can show: collected where there is one (`make test-gpu`), absent elsewhere."""

from __future__ import annotations

from engines.gpus import gpu_at_hand

GPU = gpu_at_hand()
collect_ignore_glob = [] if GPU else ["test_*.py"]
