"""A cache of the `datasets` library that is no user's, and no network."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest


@pytest.fixture
def own_hub_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, folder / name)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return folder
