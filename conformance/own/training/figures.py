"""Figures of runs: built in every test, drawn where a test looks at them; drawing is half of a short run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

from matplotlib.figure import Figure

DRAW = Figure.savefig


def touch(figure: Figure, path: Path, **options: Any) -> None:
    Path(path).touch()


def undrawn() -> AbstractContextManager:
    """Leave an empty file instead of each picture."""
    return mock.patch.object(Figure, "savefig", touch)


def drawn() -> AbstractContextManager:
    """Draw, inside `undrawn`, too."""
    return mock.patch.object(Figure, "savefig", DRAW)
