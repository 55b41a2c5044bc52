"""Values of the demo's flags, checked while the command line is read; mistakes told without a traceback."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..training.refusal import INTERRUPTED
from ..training.teacher import NOT_OPENED


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers.

    Raises:
        ArgumentTypeError: of the reader, for a text that is none, or one below `least`.
    """

    def read(text: str) -> int:
        number = int(text) if text.removeprefix("-").isdecimal() else least - 1
        if number < least:
            raise ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
        return number

    return read


def duration(text: str) -> float:
    """Seconds, more than none.

    Raises:
        ArgumentTypeError: for what is no finite number > 0.
    """
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not 0 < time < math.inf:
        raise ArgumentTypeError(f"must be a finite number of seconds > 0, got {text}")
    return time


def folder_to_write(text: str) -> Path:
    """A folder that is there from now on.

    Raises:
        ArgumentTypeError: if it cannot be made.
    """
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"must be a folder that can be written, got {text}: {error}") from None
    return folder


@contextmanager
def without_traceback() -> Iterator[None]:
    """Within, end with what is wrong with a model, a file or a flag, silently where the user interrupts."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except NOT_OPENED as error:
        sys.exit(str(error))
