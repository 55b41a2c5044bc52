"""Mistakes of the user, told without a traceback."""

from __future__ import annotations

from typing import Any

INTERRUPTED = 130  # the exit status of a command that Ctrl-C ended, as shells have it


class RefusedError(ValueError):
    """Something the user can put right; printed without a traceback."""


def check(holds: Any, must: str, got: Any, hint: str = "") -> None:
    """Raise `RefusedError("distill: must, got …; hint")` unless `holds`."""
    if not holds:
        raise RefusedError(f"distill: {must}, got {got}" + (f"; {hint}" if hint else ""))
