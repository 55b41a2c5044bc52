"""Each test of training runs in a folder of its own: a run's default output is relative to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from .figures import undrawn


@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run a person left below `runs/` must not refuse a test's, nor a test's output lie beside it."""
    folder = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="package", autouse=True)
def short_runs() -> Iterator[None]:
    """Runs draw no figures, and do not wait for the disk: `fstat`, too, refuses what is no open file."""
    with undrawn(), mock.patch.object(os, "fsync", os.fstat):
        yield
