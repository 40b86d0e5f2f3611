"""What every vision test shares: `datasets` keeps what it read in a folder of the test, and asks nobody."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    if importlib.util.find_spec("datasets") is None:
        return
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
